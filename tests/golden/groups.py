"""Golden files of objectives of whole batches, of lists of responses, of single labelled ones, and with a state."""

from collections.abc import Callable

import jax.numpy as jnp
import numpy as np

from daajax.losses.objectives import OBJECTIVES
from daajax.losses.terms import bind
from tests.golden.cases import Case
from tests.golden.evaluation import Evaluation, Problem, batches, problem, sequence
from tests.golden.layouts import Layout, columns, lists, pairs

# The gaps of consecutive updates, as a case writes them.
UPDATES: dict[str, Callable[[np.ndarray], np.ndarray]] = {"gap": lambda h: h, "gap*.5+1": lambda h: 0.5 * h + 1}


def aot(case: Case) -> Problem:
    """The source's losses are in the order of the policy's side, ours belong to the examples."""
    form = case.choose("form", {"paired": "paired", "unpaired": "unpaired"})
    name = {"paired": "aot", "unpaired": "aot_unpaired"}[form]

    def losses(found: Evaluation) -> jnp.ndarray:
        logps, ratios = found.responses.logps, found.responses.log_ratios
        side = logps[:, 0] - logps[:, 1] if form == "paired" else ratios[:, 0]
        return found.losses[jnp.argsort(side[: found.examples])]

    loss = dict(name=name, **case.named(beta="beta", label_smoothing="label_smoothing"))
    return problem(case, loss, pairs(case.inputs), {"losses": losses})


def beta_dpo(case: Case) -> Problem:
    return _moving_averages(case) if "updates" in case.left else _selected(case)


def _moving_averages(case: Case) -> Problem:
    """What the objective keeps after each of some updates."""
    layout = pairs(case.inputs)
    gaps = layout.numbers["log_ratios"][:, 0] - layout.numbers["log_ratios"][:, 1]
    gumbel = np.zeros(len(gaps))
    updates = [case.one_of("updates", update, UPDATES)(gaps) for update in case.take("updates")]
    layouts = [layout.with_numbers(log_ratios=np.stack([h, 0 * h], axis=1), gumbel=gumbel) for h in updates]
    loss = dict(name="beta_dpo", **case.named(decay="decay"))
    steps = sequence(
        case, loss, layouts, {"ema": lambda found: jnp.stack([found.result.state["mean"], found.result.state["std"]])}
    )

    def outputs(numbers):
        found = steps.outputs(numbers)
        return {"ema": jnp.stack([found[f"steps.{place}.ema"] for place in range(len(updates))])}

    return steps._replace(outputs=outputs)


def _selected(case: Case) -> Problem:
    """One update whose averages and selection are given: the state before it, and a draw that selects so."""
    decay = 0.9
    layout = pairs(case.inputs)
    ratios, selected = layout.numbers["log_ratios"], case.wanted["selected"] > 0
    gaps = ratios[:, 0] - ratios[:, 1]
    after = {"mean": case.take("ema_mean"), "std": case.take("ema_std")}
    of_batch = {"mean": gaps.mean(), "std": gaps.std(ddof=1)}
    before = {name: (after[name] - (1 - decay) * of_batch[name]) / decay for name in after}
    loss = dict(name="beta_dpo", decay=decay, **case.named(beta="beta", a="alpha", rho="rho"))

    def unmasked(found: Evaluation) -> jnp.ndarray:
        beta = found.result.metrics["beta"][0]
        z = beta * (found.responses.log_ratios[:, 0] - found.responses.log_ratios[:, 1])
        responses = found.responses._replace(log_ratios=jnp.stack([z, 0 * z], axis=1))
        return OBJECTIVES["dpo"].function(responses, beta=1.0).losses[: found.examples]

    outputs = {
        "selected": lambda found: found.result.metrics["kept"][: found.examples],
        "beta_used": lambda found: found.result.metrics["beta"][:1],
        "losses_unmasked": unmasked,
    }
    gumbel = np.where(selected, 1e9, -1e9)  # larger than any log-weight
    return problem(case, loss, layout.with_examples(gumbel=gumbel), outputs, state=before)


def plackett_luce(case: Case) -> Problem:
    return problem(case, dict(name="plackett_luce", **case.named(beta="beta")), _responses(case))


def _responses(case: Case) -> Layout:
    """Lists, or pairs where the case has no lists."""
    return lists(case.inputs) if "policy_logps" in case.inputs else pairs(case.inputs)


def exo(case: Case) -> Problem:
    form = case.choose("form", {None: "reverse_kl", "forward_kl": "forward_kl"}, None)
    if form == "forward_kl" and "eps" in case.left:
        return problem(case, dict(name="dpo", **case.named(beta_pi="beta", eps="label_smoothing")), _responses(case))
    if form == "forward_kl":
        names = case.named(beta_pi="beta", beta_r="score_temperature")
        return problem(case, dict(name="info_nca", target="scores", score_bonus=0.0, **names), _responses(case))
    normalised = case.choose("normalised", {True: True, False: False}, True)
    loss = dict(name="exo", target="scores" if "beta_r" in case.left else "pair")
    loss |= case.named(beta_pi="beta", beta_r="score_temperature", eps="eps", log_eps="log_eps")
    if normalised and "log_eps" in loss:
        loss["eps"] = float(np.exp(loss.pop("log_eps")))
    if not normalised and "eps" in loss:
        loss["log_eps"] = float(np.log(loss.pop("eps")))
    return problem(case, loss, _responses(case))


def nca(objective: str) -> Callable[[Case], Problem]:
    """Without a temperature of the scores, response 0 is the target."""

    def read(case: Case) -> Problem:
        loss = dict(name=objective, target="first", **case.named(beta="beta"))
        if "alpha" in case.left:
            loss |= {"target": "scores", "score_bonus": 0.0}
            loss |= case.named(alpha="score_temperature", score_bonus_col0="score_bonus")
        return problem(case, loss, _responses(case))

    return read


def kto(case: Case) -> Problem:
    kind = case.choose("loss", {None: "kto", "apo_zero_unpaired": "apo_zero_unpaired"}, None)
    form = case.choose("form", {None: None, "kto_pair": "kto_pair", "rlhf_book": "rlhf_book"}, None)
    weights = case.named(beta="beta", desirable_weight="desirable_weight", undesirable_weight="undesirable_weight")
    if form is not None:
        return _kto_of_pairs(case, form, weights)
    if kind == "apo_zero_unpaired":  # it has no anchor: its code reports 0
        return problem(case, dict(name=kind, **weights), _singles(case), {"kl": lambda found: jnp.zeros(())})
    return problem(case, dict(name="kto", **weights), _singles(case, mismatched=True), {"kl": _anchor})


def _kto_of_pairs(case: Case, form: str, weights: dict[str, float]) -> Problem:
    """`kto_pair`: the source has twice as many losses, of all chosen responses and then of all rejected ones."""
    loss = dict(name="kto_pair", anchor="rejected" if form == "rlhf_book" else "other", **weights)
    if form == "rlhf_book":
        return problem(case, loss, pairs(case.inputs), {"kl": _anchor})
    sides = [bind([loss | {side: 0.0}])[0] for side in ("undesirable_weight", "desirable_weight")]

    def losses(found: Evaluation) -> jnp.ndarray:
        return jnp.concatenate([2 * side.loss(found.responses).losses[: found.examples] for side in sides])

    return problem(case, loss, pairs(case.inputs), {"losses": losses}, losses_of_an_example=2)


def _anchor(found: Evaluation) -> jnp.ndarray:
    return found.result.metrics["kl"][0]


def _singles(case: Case, *, mismatched: bool = False) -> Layout:
    """Labelled responses; beside them, as response 1, the mismatched ones."""
    kinds = ["policy_logps", "policy_kl_logps"][: 2 if mismatched else 1]
    layout = columns(case.inputs, kinds, [kind.replace("policy", "ref") for kind in kinds], ["lengths"])
    return layout.with_examples(labels=case.inputs["label"].astype(np.int32))


def bco(case: Case) -> Problem:
    form = case.take("form", None)
    forms = {
        None: _bco,
        "paper_delta_current_batch": _bco,
        "pair_delta_mean_of_batch_means": _bco_pair,
        "pair_delta_zero": _bco_pair,
    }
    return case.one_of("form", form, forms)(case, form)


def _bco(case: Case, form: str | None) -> Problem:
    names = ("beta", "min_density_ratio", "max_density_ratio")
    loss = dict(name="bco", delta="paper" if form else "running", **case.named(**{name: name for name in names}))
    layout = _singles(case)
    if case.take("udm", False):
        layout = layout.with_numbers(prompt_probabilities=case.inputs["udm_prob"])
    outputs = {"delta": lambda found: found.result.metrics["delta"][0]}
    if not form:
        outputs["count"] = lambda found: found.result.state["count"]
    return _in_batches(case, loss, layout, outputs)


def _bco_pair(case: Case, form: str | None) -> Problem:
    delta = "zero" if form == "pair_delta_zero" else "running"
    loss = dict(name="bco_pair", delta=delta, **case.named(beta="beta"))
    return _in_batches(case, loss, pairs(case.inputs), {"delta": lambda found: found.result.metrics["delta"][0]})


def _in_batches(case: Case, loss, layout: Layout, outputs) -> Problem:
    if case.batches:
        return sequence(case, loss, batches(case, layout), outputs)
    return problem(case, loss, layout, outputs)
