"""Golden files of objectives of a chosen and a rejected response, example by example."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

from daajax.losses import scores
from daajax.losses.objectives import OBJECTIVES
from tests.golden.cases import Case
from tests.golden.evaluation import Evaluation, Problem, problem
from tests.golden.layouts import Layout, pairs

LINKS = {"sigmoid": "logistic", "hinge": "hinge", "ipo": "ipo"}


def plain(objective: str, names: str, **renamed: str) -> Callable[[Case], Problem]:
    """A file with hyper-parameters like ours.

    Args:
        objective: Ours.
        names: Those that are named as ours are.
        **renamed: Theirs and ours.
    """
    all_names = {name: name for name in names.split()} | renamed

    def read(case: Case) -> Problem:
        return problem(case, dict(name=objective, **case.named(**all_names)), pairs(case.inputs))

    return read


def with_scores(case: Case, layout: Layout, chosen: str, rejected: str) -> Layout:
    """The layout with what the data say of either response."""
    return layout.with_numbers(scores=np.stack([case.inputs[chosen], case.inputs[rejected]], axis=1))


def dpo(case: Case) -> Problem:
    layout = pairs(case.inputs, reference=not case.take("reference_free", False))
    return problem(case, dict(name="dpo", **case.named(beta="beta")), layout)


def dpo_unweighted(case: Case) -> Problem:
    name = case.choose("form", {None: "dpo_unweighted", "unlikelihood": "unlikelihood"}, None)
    return problem(case, dict(name=name, **case.named(beta="beta", alpha="alpha")), pairs(case.inputs))


def ipo(case: Case) -> Problem:
    name = case.choose("reduction", {"sum": "ipo", "mean": "ipo_mean"})
    return problem(case, dict(name=name, **case.named(tau="beta")), pairs(case.inputs))


def spin(case: Case) -> Problem:
    loss = dict(name="spin", link=case.choose("link", LINKS, "sigmoid"), **case.named(beta="beta"))
    return problem(case, loss, pairs(case.inputs))


def discopop(case: Case) -> Problem:
    loss = dict(name="discopop", link=case.choose("link", {None: "lrml", "cell": "cell"}, None))
    return problem(case, loss | case.named(beta="beta", tau="tau"), pairs(case.inputs))


def f_dpo(case: Case) -> Problem:
    of_trl = case.take("alpha_trl", None)
    loss = dict(name="f_dpo") if of_trl is None else dict(name="f_dpo", alpha=1 - of_trl)
    return problem(
        case, loss | case.named(beta="beta", divergence="divergence", alpha_paper="alpha"), pairs(case.inputs)
    )


def cal_dpo(case: Case) -> Problem:
    """`cal_reduction` batch: the squares are averaged over the batch before they are added to each loss."""
    averaged = case.choose("cal_reduction", {None: False, "batch": True}, None)
    loss: dict[str, Any] = dict(name="cal_dpo", **case.named(beta="beta", cal_weight="calibration_weight"))

    def losses(found: Evaluation) -> jnp.ndarray:
        preference = OBJECTIVES["dpo"].function(found.responses, beta=1.0).losses[: found.examples]
        return preference + (found.losses - preference).mean()

    return problem(case, loss, pairs(case.inputs), {"losses": losses} if averaged else {})


def odpo(case: Case) -> Problem:
    """Margins are given where the scores are not. A margin that has no log is refused with the data."""
    loss = dict(name="odpo", **case.named(beta="beta", alpha="alpha", f="transform"))
    loss["of"] = case.choose("of", {None: "difference", "score_ratio": "ratio"}, None)
    layout = pairs(case.inputs)
    if "chosen_scores" in case.inputs:
        layout = with_scores(case, layout, "chosen_scores", "rejected_scores")
    else:
        margins = case.inputs["margins"]
        layout = layout.with_numbers(scores=np.stack([margins, np.zeros_like(margins)], axis=1))
    return problem(case, loss, layout)._replace(finite=False)


def rebel(case: Case) -> Problem:
    loss = dict(name="rebel", **case.named(eta="eta", form="scale"))
    return problem(case, loss, with_scores(case, pairs(case.inputs), "chosen_scores", "rejected_scores"))


def dno(case: Case) -> Problem:
    loss = dict(name="dno", **case.named(eta="eta"))
    return problem(case, loss, with_scores(case, pairs(case.inputs), "win_rate_1", "win_rate_2"))


def sppo(case: Case) -> Problem:
    """Win rates against the pool; `sppo_single` has only that of the chosen response against the rejected one."""
    form, layout = case.take("form", "sppo"), pairs(case.inputs)

    def single() -> Layout:
        wins = case.inputs["chosen_probs"]
        return layout.with_numbers(scores=np.stack([wins, 1 - wins], axis=1))

    forms = {
        "sppo": ("sppo", lambda: with_scores(case, layout, "chosen_probs_win", "chosen_probs_lose")),
        "sppo_single": ("sppo", single),
        "sppo_hard": ("sppo_hard", lambda: layout),
    }
    name, with_rates = case.one_of("form", form, forms)
    return problem(case, dict(name=name, **case.named(beta="beta")), with_rates())


def simpo(case: Case) -> Problem:
    loss = dict(name="simpo", link=case.choose("link", {None: "logistic", "hinge": "hinge"}, None))
    loss |= case.named(beta="beta", gamma="gamma", label_smoothing="label_smoothing")
    return problem(case, _with_gamma(case, loss), pairs(case.inputs))


def _with_gamma(case: Case, loss: dict[str, Any]) -> dict[str, Any]:
    """`gamma_beta_ratio` says what gamma is where the case does not."""
    ratio = case.take("gamma_beta_ratio", None)
    return loss if ratio is None else {"gamma": ratio * loss["beta"], **loss}


def cpo(case: Case) -> Problem:
    """Link `ipo`: the source's function gets means over tokens, which the case's note says; so does ours take them."""
    case.choose("note", {None: None, "logps averaged upstream": None}, None)
    name = case.choose("form", {None: "cpo", "cpo_simpo": "cpo_simpo"}, None)
    loss = dict(name=name, **case.named(beta="beta", gamma="gamma", nll_weight="nll_weight"))
    loss |= {"nll_weight": 0.0} | loss | case.named(nll_reduction="nll_reduction")
    link = case.choose("link", {None: {}, "ipo": {"link": "ipo"}}, None)
    return problem(case, loss | link, pairs(case.inputs))


def orpo(case: Case) -> Problem:
    """`seq_given`: the caller adds the negative log-likelihood, which is the mean over the response as in `seq`."""
    nll = case.choose("nll", {"none": 0.0, "seq": 1.0, "seq_given": 1.0}, "seq")
    loss = dict(name="orpo", nll_weight=nll, nll_reduction="seq", **case.named(**{"lambda": "odds_ratio_weight"}))

    def means(found: Evaluation) -> jnp.ndarray:
        return scores.mean_logps(found.responses)[: found.examples]

    outputs = {
        "log_odds": lambda found: scores.gap(scores.log_odds(means(found))),
        "mean_logp_chosen": lambda found: means(found)[:, 0],
        "mean_logp_rejected": lambda found: means(found)[:, 1],
    }
    return problem(case, loss, pairs(case.inputs), outputs)


def asft(case: Case) -> Problem:
    """Both forms are of turbo-alignment, which lets 1 - p fall to 1e-7 and no further."""
    form = case.choose("form", {None: "asft", "orpo_beta_inside": "orpo"}, None)
    weight = {"asft": "odds_weight", "orpo": "odds_ratio_weight"}[form]
    loss = dict(name=form, floor=1e-7, **case.named(beta="beta", ce="nll_weight", **{"lambda": weight}))
    return problem(case, loss, pairs(case.inputs))


def slic_hf(case: Case) -> Problem:
    form = case.choose("form", {None: "slic", "slic": "slic", "rso_hinge": "rso", "reference_free_hinge": "free"}, None)
    if form == "rso":
        return problem(case, dict(name="hinge", **case.named(beta="beta", delta="delta")), pairs(case.inputs))
    case.choose("sft_reduction", {None: None, "sum": None}, None)
    loss = dict(
        name="slic_hf", **case.named(beta="beta", delta="delta", sft_weight="sft_weight", sft_target="sft_target")
    )
    if form == "free":
        loss = {"sft_weight": 0.0, **loss}
    separate = loss.get("sft_target") == "separate"
    sides = ("chosen", "rejected", "sft") if separate else ("chosen", "rejected")
    return problem(case, loss, pairs(case.inputs, sides=sides))
