"""Golden files of objectives that need more of a response than its log-prob, of online ones, and TR-DPO's update."""

import jax
import jax.numpy as jnp
import numpy as np

from daajax import ema
from tests.golden.cases import Case
from tests.golden.evaluation import Evaluation, Problem, problem
from tests.golden.layouts import SIDES, Arrays, Layout, logits, pairs, token_pairs, tokens

KL = [f"{side}_position_kl" for side in SIDES]
LINKS = {"sigmoid": "logistic", "ipo": "ipo"}


def ld_dpo(case: Case) -> Problem:
    return problem(case, dict(name="ld_dpo", **case.named(beta="beta", ld_alpha="alpha")), token_pairs(case.inputs))


def sampo(case: Case) -> Problem:
    """`shared`: the policy's draw for both."""
    subset = case.choose("subset", {"shared": "shared", "independent": "independent"})
    names = {"kept": "keep_{}_policy", "reference_kept": "keep_{}_ref"}
    draws = {
        name: np.stack([case.inputs[key.format(side)] for side in SIDES], axis=1)
        for name, key in names.items()
        if subset == "independent" or name == "kept"
    }
    loss = dict(name="sampo", subset=subset, **case.named(beta="beta"))
    return problem(case, loss, token_pairs(case.inputs, draws=draws))


def wpo(case: Case) -> Problem:
    names = ("beta", "clip_max", "label_smoothing")
    loss = dict(name="wpo", **case.named(**{name: name for name in names}))
    sum_squares = np.stack([case.inputs[f"log_sum_sq_{side}"] for side in SIDES], axis=1)
    layout = token_pairs(case.inputs, statistics={"sum_squares": sum_squares})
    return problem(case, loss, layout, {"weights": lambda found: found.result.metrics["weights"][: found.examples]})


def tdpo(case: Case) -> Problem:
    """TDPO1 has no alpha, though the source's function takes one."""
    alpha = case.named(alpha="alpha")
    second = case.choose("tdpo2", {True: True, False: False}, True)
    loss = dict(name="tdpo2", **alpha) if second else dict(name="tdpo1")
    level = case.choose("level", {None: "margins", "logits": "logits"}, None)
    layout = _of_logits(case) if level == "logits" else _of_margins(case)
    layout = layout.with_variables([f"{side}_logps_margin" for side in SIDES], kl=KL)
    return problem(case, loss | case.named(beta="beta"), layout)


def _of_margins(case: Case) -> Layout:
    """Log-ratios and divergences are given."""
    ratios = np.stack([case.inputs[f"{side}_logps_margin"] for side in SIDES], axis=1)
    layout = pairs(case.inputs).with_numbers(log_ratios=ratios)
    return layout.with_further(kl=np.stack([case.inputs[name] for name in KL], axis=1))


def _of_logits(case: Case) -> Layout:
    """Logits are given, or they are those of the set `main`; gradients name the side."""

    def named(side: str) -> str:
        gradients = (name.removeprefix("grads.") for name in case.wanted if name.startswith("grads."))
        return next((name for name in gradients if side in name and "logits" in name), f"policy_{side}_logits")

    inputs = case.inputs if any("logits" in name for name in case.inputs) else case.tokens()
    return logits(inputs, [named(side) for side in SIDES])


def mallows_po(case: Case) -> Problem:
    link = case.choose(
        "link",
        {
            None: dict(name="mallows_dpo"),
            "ipo": dict(name="mallows_ipo", form="paper"),
            "ipo_rainbow": dict(name="mallows_ipo", form="rainbow"),
        },
        None,
    )
    return problem(case, link | case.named(beta="beta", c="c"), _with_entropies(case))


def _with_entropies(case: Case) -> Layout:
    """The mean over both responses of the mean over tokens is given; both have it."""
    layout = pairs(case.inputs)
    return layout.with_further(reference_entropies=case.inputs["ref_entropy"][:, None] * layout.examples["lengths"])


def rainbow_po(case: Case) -> Problem:
    """Of `loss_type`, only `mallows_dpo` reads the entropies."""
    kinds = {
        "sigmoid": dict(link="logistic", dispersion_mean=None),
        "ipo": dict(link="ipo", dispersion_mean=None),
        "cauchy": dict(link="cauchy", dispersion_mean=None),
        "mallows_dpo": dict(link="logistic"),
    }
    kind = case.choose("loss_type", kinds, "mallows_dpo")
    dispersion, mixing = case.named(dispersion_mean="dispersion_mean"), case.named(mixing_alpha="mixing")
    mixed, sft = (case.choose(key, {False: False, True: True}, False) for key in ("if_mixing_alpha", "add_sft_loss"))
    likelihood = case.named(sft_coef="nll_weight")
    loss = dict(name="rainbow", **dispersion | kind, **mixing if mixed else {"mixing": None})
    loss |= likelihood if sft else {}
    names = ("beta", "home_advantage", "length_normalization", "reference_free")
    loss |= case.named(**{name: name for name in names})
    layout = pairs(case.inputs) if "dispersion_mean" in kind else _with_entropies(case)
    return problem(case, loss, layout)


def d2po(case: Case) -> Problem:
    loss = dict(name="d2po", link=case.choose("link", LINKS, "sigmoid"), **case.named(beta="beta"))
    return problem(case, loss, pairs(case.inputs))


def online_dpo(case: Case) -> Problem:
    """Two samples of each prompt, the first of all prompts before the second of all."""
    rows, T = case.inputs["logprobs"].shape

    def by_prompt(x):
        return x.reshape(2, rows // 2, *x.shape[1:]).swapaxes(0, 1)

    layout = tokens(
        by_prompt(case.inputs["logprobs"]),
        by_prompt(case.inputs["ref_logprobs"]),
        by_prompt(case.inputs["lengths"]) if "lengths" in case.inputs else None,
        {"logprobs": (rows, T)},
        lambda changes: by_prompt(changes["logprobs"]),
    )
    loss = dict(name="online_dpo", link=case.choose("link", LINKS, "sigmoid"))
    loss |= case.named(beta="beta", missing_eos_penalty="missing_eos_penalty")
    layout = layout.with_examples(
        scores=by_prompt(case.inputs["rewards"]), finished=by_prompt(case.inputs["contains_eos"]) > 0
    )

    def winners(found: Evaluation) -> jnp.ndarray:
        """0 or 1: where policy is reference, the gradient says which response is chosen."""

        def loss(ratios):
            return found.term.loss(found.responses._replace(log_ratios=ratios)).losses.sum()

        gradient = jax.grad(loss)(jnp.zeros_like(found.responses.log_ratios))
        return (gradient[: found.examples, 1] < 0).astype(jnp.int32)

    first = np.arange(rows // 2)
    outputs = {
        "chosen_indices": lambda found: first + rows // 2 * winners(found),
        "rejected_indices": lambda found: first + rows // 2 * (1 - winners(found)),
    }
    return problem(case, loss, layout, outputs)


def xpo(case: Case) -> Problem:
    """Response 0 is the policy's own, 1 the reference's; every position is a token."""
    names = [f"model_logps_on_{side}" for side in ("model", "ref")]
    policy = np.stack([case.inputs[name] for name in names], axis=1)
    reference = np.stack([case.inputs[f"ref_logps_on_{side}"] for side in ("model", "ref")], axis=1)
    variables = {name: case.inputs[name].shape for name in names}
    layout = tokens(policy, reference, None, variables, lambda changes: jnp.stack([changes[n] for n in names], axis=1))
    won = case.inputs["model_is_chosen"].astype(np.float64)
    loss = dict(name="xpo", link=case.choose("link", LINKS, "sigmoid"), **case.named(beta="beta", alpha="alpha"))
    return problem(case, loss, layout.with_examples(scores=np.stack([won, 1 - won], axis=1)))


def nash_md(case: Case) -> Problem:
    """One sample of the policy; every position is a token."""
    name = "model_logps_on_model"
    policy, reference = case.inputs[name][:, None], case.inputs["ref_logps_on_model"][:, None]
    layout = tokens(policy, reference, None, {name: case.inputs[name].shape}, lambda changes: changes[name][:, None])
    layout = layout.with_numbers(scores=case.inputs["probability"][:, None])
    return problem(case, dict(name="nash_md", **case.named(beta="beta")), layout)


def tr_dpo(case: Case) -> Problem:
    decay = 1 - case.take("alpha")

    def outputs(numbers: Arrays) -> dict[str, jax.Array]:
        (after,) = ema.follow({"leaf": numbers["ref"]}, {"leaf": numbers["policy"]}, decay).values()
        return {"ref_after": after}

    return Problem({name: case.inputs[name] for name in ("ref", "policy")}, outputs)
