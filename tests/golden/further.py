"""Further cases, worked out here: other hyper-parameters, extreme numbers, and forms that the committed files lack.

Written apart from the project's objectives, from the formulas of the papers and codes: plain arithmetic on one example
at a time, in float64. To add one: a formula from a row and hyper-parameters to a loss, and a line in `PAIRS`.
"""

import cmath
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from tests.golden.arithmetic import (
    Hyperparameters,
    Number,
    Row,
    exponential,
    gradients,
    log_odds,
    logistic,
    relu,
    rows_of,
    sigmoid,
    softplus,
    stop,
)

LOGPS = ("policy_chosen_logps", "policy_rejected_logps")
Formula = Callable[[Row, Hyperparameters], Number]


def alphapo(e: Row, p: Hyperparameters) -> Number:
    def reward(m: Number) -> Number:
        return (1 - exponential(-p["alpha"] * m)) / p["alpha"]

    return logistic(p["beta"] * (reward(e.m_c) - reward(e.m_r)) - p["gamma"])


def apo_down(e: Row, p: Hyperparameters) -> Number:
    return sigmoid(p["beta"] * e.q_c) + sigmoid(-p["beta"] * e.h) - 1 + p.get("constant", 1)


def apo_zero(e: Row, p: Hyperparameters) -> Number:
    return sigmoid(-p["beta"] * e.q_c) + sigmoid(p["beta"] * e.q_r) - 1 + p.get("constant", 1)


def asft(e: Row, p: Hyperparameters) -> Number:
    chosen, rejected = (p["beta"] * log_odds(m, floor=1e-7) for m in (e.m_c, e.m_r))
    odds = logistic(chosen - rejected) if p.get("form") else logistic(chosen) + logistic(-rejected)
    return -p["ce"] * e.m_c + p["lambda"] * odds


def bco_pair(e: Row, p: Hyperparameters) -> Number:
    return logistic(p["beta"] * e.q_c) + logistic(-p["beta"] * e.q_r)


def cal_dpo(e: Row, p: Hyperparameters) -> Number:
    target = 1 / (2 * p["beta"])
    return logistic(e.h) + p["cal_weight"] * ((e.q_c - target) ** 2 + (e.q_r + target) ** 2)


def cpo(e: Row, p: Hyperparameters) -> Number:
    nll = p.get("nll_weight", 0) * -e.s_c
    if p.get("form") == "cpo_simpo":
        return logistic(p["beta"] * (e.m_c - e.m_r) - p["gamma"]) + nll
    if p.get("link") == "ipo":
        return (e.m_c - e.m_r - 1 / (2 * p["beta"])) ** 2 + nll
    return logistic(p["beta"] * (e.s_c - e.s_r)) + nll


def discopop(e: Row, p: Hyperparameters) -> Number:
    z = p["beta"] * e.h
    if p.get("link") == "cell":
        return (exponential(-z) + logistic(z)) / 2
    modulation = z / p["tau"]
    return sigmoid(-modulation) * logistic(z) + exponential(-z - softplus(-modulation))


def dno(e: Row, p: Hyperparameters) -> Number:
    share, z = sigmoid(e["win_rate_1"] - e["win_rate_2"]), p["eta"] * e.h
    return share * logistic(z) + (1 - share) * logistic(-z)


def dpo(e: Row, p: Hyperparameters) -> Number:
    h = e.s_c - e.s_r if p.get("reference_free") else e.h
    smoothing = next((p[name] for name in ("label_smoothing", "epsilon", "eps") if name in p), 0.0)
    return logistic(p["beta" if "beta" in p else "beta_pi"] * h, smoothing)


def dpo_nll(e: Row, p: Hyperparameters) -> Number:
    return logistic(p["beta"] * e.h) - p["nll_weight"] * e.m_c


def dpo_norm(e: Row, p: Hyperparameters) -> Number:
    return logistic(p["beta"] * (e.m_c - e.m0_c - e.m_r + e.m0_r))


def dpo_unweighted(e: Row, p: Hyperparameters) -> Number:
    return -e.s_c + p["alpha"] * e.s_r if "form" in p else -p["beta"] * e.h


def dpop(e: Row, p: Hyperparameters) -> Number:
    return logistic(p["beta"] * (e.h - p["lambda"] * relu(-e.q_c)))


def exo_pair(e: Row, p: Hyperparameters) -> Number:
    z = p["beta_pi"] * e.h
    log_c, log_r = math.log(1 - p["eps"]), math.log(p["eps"])
    return sigmoid(z) * (-logistic(z) - log_c) + sigmoid(-z) * (-logistic(-z) - log_r)


def f_dpo(e: Row, p: Hyperparameters) -> Number:
    alpha = p.get("alpha_paper", 1 - p.get("alpha_trl", 0))
    slopes: dict[str, Callable[[Number], Number]] = {
        "reverse_kl": lambda q: q,
        "forward_kl": lambda q: -exponential(-q),
        "js": lambda q: math.log(2) - softplus(-q),
        "alpha": lambda q: -exponential(-alpha * q) / alpha,
    }
    slope = slopes[p["divergence"]]
    return logistic(p["beta"] * (slope(e.q_c) - slope(e.q_r)))


def ipo(e: Row, p: Hyperparameters) -> Number:
    h = e.m_c - e.m0_c - e.m_r + e.m0_r if p["reduction"] == "mean" else e.h
    return (h - 1 / (2 * p["tau"])) ** 2


def mallows_po(e: Row, p: Hyperparameters) -> Number:
    h = -p["c"] * math.log(e["ref_entropy"]) * e.h
    links = {
        None: logistic(p["beta"] * h),
        "ipo": (h - 1 / (2 * p["beta"])) ** 2,
        "ipo_rainbow": (p["beta"] * h - 0.5) ** 2,
    }
    return links[p.get("link")]


def nca_pair(e: Row, p: Hyperparameters) -> Number:
    chosen, rejected = p["beta"] * e.q_c, p["beta"] * e.q_r
    return softplus(-chosen) + (softplus(chosen) + softplus(rejected)) / 2


def odpo(e: Row, p: Hyperparameters) -> Number:
    c, r = e["chosen_scores"], e["rejected_scores"]
    margin = c / r if p.get("of") == "score_ratio" else c - r
    return logistic(p["beta"] * e.h - p["alpha"] * (math.log(margin) if p["f"] == "log" else margin))


def orpo(e: Row, p: Hyperparameters) -> Number:
    return p["lambda"] * logistic(log_odds(e.m_c) - log_odds(e.m_r)) - (e.m_c if p["nll"] != "none" else 0)


def r_dpo(e: Row, p: Hyperparameters) -> Number:
    return logistic(p["beta"] * e.h + p["alpha"] * (e.n_c - e.n_r))


def rainbow_po(e: Row, p: Hyperparameters) -> Number:
    per_token = p["length_normalization"]
    policy = e.m_c - e.m_r if per_token else e.s_c - e.s_r
    reference = e.m0_c - e.m0_r if per_token else e["ref_chosen_logps"] - e["ref_rejected_logps"]
    share = p["mixing_alpha"] if p.get("if_mixing_alpha") else 1
    advantage = p["home_advantage"] * (1 - share if p.get("if_mixing_alpha") else 1)
    z = p["beta"] * (policy - (0 if p.get("reference_free") else share * reference) - advantage)
    if p["loss_type"] == "mallows_dpo":
        z *= -p["dispersion_mean"] * math.log(e["ref_entropy"])
    link: dict[str, Callable[[], Number]] = {
        "sigmoid": lambda: logistic(z),
        "mallows_dpo": lambda: logistic(z),
        "ipo": lambda: (z - 0.5) ** 2,
        "cauchy": lambda: -cmath.log(_arctangent(z) / math.pi),
    }
    sft = p["sft_coef"] * (e.m_c if per_token else e.s_c) if p.get("add_sft_loss") else 0
    return link[p["loss_type"]]() - sft


def _arctangent(z: Number) -> Number:
    """atan(z) + π/2."""
    return (
        -cmath.atan(1 / z) if z.real < 0 else math.pi - cmath.atan(1 / z) if z.real > 0 else math.pi / 2 + cmath.atan(z)
    )


def rebel(e: Row, p: Hyperparameters) -> Number:
    margin = e["chosen_scores"] - e["rejected_scores"]
    return (e.h - p["eta"] * margin) ** 2 / (p["eta"] ** 2 if p["form"] == "paper" else 1)


def robust(e: Row, p: Hyperparameters) -> Number:
    eps, z = p["label_smoothing"], p["beta"] * e.h
    return ((1 - eps) * softplus(-z) - eps * softplus(z)) / (1 - 2 * eps)


def simpo(e: Row, p: Hyperparameters) -> Number:
    gamma = p["gamma"] if "gamma" in p else p["gamma_beta_ratio"] * p["beta"]
    z = p["beta"] * (e.m_c - e.m_r) - gamma
    return relu(1 - z) if p.get("link") == "hinge" else logistic(z, p.get("label_smoothing", 0.0))


def slic_hf(e: Row, p: Hyperparameters) -> Number:
    if p.get("form") == "rso_hinge":
        return relu(1 - p["beta"] * e.h)
    if p.get("form") == "reference_free_hinge":
        return relu(1 - p["beta"] * (e.s_c - e.s_r))
    target = e["policy_sft_logps"] if p.get("sft_target") == "separate" else e.s_c
    return relu(p["delta"] - p.get("beta", 1) * (e.s_c - e.s_r)) - p["sft_weight"] * target


def spin(e: Row, p: Hyperparameters) -> Number:
    z = p["beta"] * e.h
    return relu(1 - z) if p["link"] == "hinge" else logistic(z)


def sppo(e: Row, p: Hyperparameters) -> Number:
    wins = {
        "sppo": (e["chosen_probs_win"], e["chosen_probs_lose"]),
        "sppo_single": (e["chosen_probs"], 1 - e["chosen_probs"]),
        "sppo_hard": (1, 0),
    }[p["form"]]
    squares = sum((q - (win - 0.5) / p["beta"]) ** 2 for q, win in zip((e.q_c, e.q_r), wins, strict=True))
    return squares if p["form"] == "sppo_hard" else squares / 2


def tdpo(e: Row, p: Hyperparameters) -> Number:
    h = e["chosen_logps_margin"] - e["rejected_logps_margin"]
    chosen, rejected = e["chosen_position_kl"], e["rejected_position_kl"]
    later = p["alpha"] * (rejected - stop(chosen)) if p["tdpo2"] else rejected - chosen
    return logistic(p["beta"] * (h - later))


BETAS = [dict(beta=beta) for beta in (0.01, 0.1, 0.7)]


def grid(**values: Sequence[Any]) -> list[dict[str, Any]]:
    """Every combination."""
    return [dict(zip(values, combination, strict=True)) for combination in itertools.product(*values.values())]


RAINBOW = [
    *grid(loss_type=["sigmoid", "ipo", "cauchy"], beta=[0.3], home_advantage=[0.2], length_normalization=[False]),
    *grid(
        loss_type=["sigmoid", "ipo", "cauchy", "mallows_dpo"],
        dispersion_mean=[0.4],
        beta=[2.0],
        home_advantage=[0.2],
        length_normalization=[True],
        if_mixing_alpha=[True],
        mixing_alpha=[0.3],
        add_sft_loss=[True],
        sft_coef=[0.3],
    ),
    dict(loss_type="mallows_dpo", dispersion_mean=0.5, beta=2.0, home_advantage=0.2, length_normalization=True),
]
RAINBOW += [
    {**RAINBOW[3], "length_normalization": False},
    {**RAINBOW[4], "reference_free": True},
    {**RAINBOW[-1], "reference_free": True},
]

# The file, its formula and hyper-parameters.
PAIRS: list[tuple[str, Formula, list[dict[str, Any]]]] = [
    ("alphapo", alphapo, grid(beta=[2.5], gamma=[0.6], alpha=[0.4, -0.5, 0.01])),
    ("apo_down", apo_down, [dict(beta=0.03, constant=0), dict(beta=0.7)]),
    ("apo_zero", apo_zero, [dict(beta=0.03, constant=0), dict(beta=0.7)]),
    ("asft", asft, grid(beta=[0.3, 2.0], ce=[0.5], **{"lambda": [0.7]})),
    ("asft", asft, grid(beta=[0.3, 2.0], ce=[0.5], form=["orpo_beta_inside"], **{"lambda": [0.7]})),
    ("bco", bco_pair, grid(beta=[0.01, 0.4], form=["pair_delta_zero"])),
    ("cal_dpo", cal_dpo, [dict(beta=0.001, cal_weight=0.5), dict(beta=0.3, cal_weight=0.0)]),
    ("cdpo", dpo, [dict(beta=0.05, label_smoothing=0.45), dict(beta=0.7, label_smoothing=0.1)]),
    ("cpo", cpo, [dict(beta=0.05, nll_weight=0.0), dict(beta=0.7, nll_weight=0.3, nll_reduction="sum")]),
    ("cpo", cpo, [dict(beta=2.0, gamma=0.5, nll_weight=0.3, nll_reduction="sum", form="cpo_simpo")]),
    ("cpo", cpo, grid(beta=[0.1, 0.7], link=["ipo"], nll_weight=[0.0], note=["logps averaged upstream"])),
    ("discopop", discopop, [dict(beta=0.01, tau=0.05), dict(beta=0.3, tau=1.0), dict(beta=0.3, link="cell")]),
    ("dno", dno, grid(eta=[0.01, 0.5])),
    ("dpo", dpo, [*BETAS, dict(beta=0.3, reference_free=True)]),
    ("dpo_nll", dpo_nll, [dict(beta=0.3, nll_weight=0.7, nll_reduction="seq")]),
    ("dpo_norm", dpo_norm, grid(beta=[0.1, 5.0])),
    ("dpo_unweighted", dpo_unweighted, [dict(beta=0.7), dict(alpha=0.5, form="unlikelihood")]),
    ("dpop", dpop, [dict(beta=0.1, **{"lambda": 0.0}), dict(beta=0.3, **{"lambda": 5.0})]),
    ("exo", exo_pair, [dict(beta_pi=0.05, eps=0.2), dict(beta_pi=0.5, eps=0.001)]),
    ("exo", dpo, [dict(beta_pi=0.05, eps=0.2, form="forward_kl")]),
    ("f_dpo", f_dpo, grid(beta=[0.05, 0.5], divergence=["reverse_kl", "forward_kl", "js"])),
    ("f_dpo", f_dpo, grid(beta=[0.5], divergence=["alpha"], alpha_paper=[0.3, 0.7])),
    ("f_dpo", f_dpo, grid(beta=[0.05], divergence=["alpha"], alpha_trl=[0.2])),
    ("halos_dpo_cdpo", dpo, grid(beta=[0.2], epsilon=[0.3])),
    ("info_nca", dpo, [dict(beta=0.3)]),
    ("ipo", ipo, grid(tau=[0.05, 0.7], reduction=["sum", "mean"])),
    ("mallows_po", mallows_po, grid(beta=[0.7], c=[2.0], link=[None, "ipo", "ipo_rainbow"])),
    ("nca", nca_pair, [dict(beta=0.02), dict(beta=0.7)]),
    ("odpo", odpo, grid(beta=[0.1], alpha=[0.3], f=["log", "identity"])),
    ("odpo", odpo, grid(beta=[0.1], alpha=[0.5], f=["log", "identity"], of=["score_ratio"])),
    ("orpo", orpo, grid(nll=["none", "seq", "seq_given"], **{"lambda": [0.5]})),
    ("r_dpo", r_dpo, [dict(beta=0.05, alpha=0.0), dict(beta=0.7, alpha=0.02)]),
    ("rainbow_po", rainbow_po, RAINBOW),
    ("rebel", rebel, grid(eta=[0.3, 2.0], form=["code", "paper"])),
    ("robust_dpo", robust, [dict(beta=0.05, label_smoothing=0.45), dict(beta=0.7, label_smoothing=0.0)]),
    ("simpo", simpo, [dict(beta=10.0, gamma_beta_ratio=0.3), dict(beta=2.0, gamma=0.4, link="hinge")]),
    ("slic_hf", slic_hf, grid(form=["rso_hinge", "reference_free_hinge"], beta=[0.05, 0.5])),
    ("slic_hf", slic_hf, [dict(form="slic", delta=2.0, beta=0.5, sft_weight=0.0)]),
    ("slic_hf", slic_hf, grid(delta=[2.0], sft_weight=[0.2], sft_target=["chosen", "separate"], sft_reduction=["sum"])),
    ("spin", spin, grid(beta=[0.05, 0.7], link=["sigmoid", "hinge"])),
    ("sppo", sppo, [*grid(beta=[0.001], form=["sppo", "sppo_single"]), dict(beta=0.1, form="sppo_hard")]),
    ("tdpo", tdpo, grid(beta=[0.05, 0.7], alpha=[0.3], tdpo2=[True, False])),
]

VARIABLES = {
    "tdpo": [f"{side}_{kind}" for side in ("chosen", "rejected") for kind in ("logps_margin", "position_kl")],
}


def with_data(inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Pairs with all that any objective reads of the data."""
    rng = np.random.default_rng(7)
    n = len(inputs["policy_chosen_logps"])

    def uniform(low: float, high: float) -> np.ndarray:
        return rng.uniform(low, high, n)

    made = {"rejected_scores": uniform(0.5, 3), "ref_entropy": uniform(0.05, 0.95), "chosen_probs": uniform(0, 1)}
    made |= {name: uniform(0, 1) for name in ("win_rate_1", "win_rate_2", "chosen_probs_win", "chosen_probs_lose")}
    made |= {"chosen_scores": made["rejected_scores"] + uniform(0.1, 3), "policy_sft_logps": uniform(-50, -1)}
    for side in ("chosen", "rejected"):
        made[f"{side}_logps_margin"] = inputs[f"policy_{side}_logps"] - inputs[f"ref_{side}_logps"]
        made[f"{side}_position_kl"] = uniform(0, 9)
    return {**inputs, **made}


def case(
    name: str,
    hyperparameters: Mapping[str, Any],
    inputs: Mapping[str, np.ndarray],
    outputs: Mapping[str, Any],
    grad_of: str = "sum",
) -> dict[str, Any]:
    """A file of one case."""
    of_case = dict(hyperparameters=hyperparameters, inputs="set", outputs=outputs, grad_of=grad_of, rtol=1e-10)
    given = {key: np.asarray(values).tolist() for key, values in inputs.items()}
    return dict(name=name, inputs={"set": given}, cases=[of_case | {"source": {"kind": "formula"}}])


def of_pairs(inputs: Mapping[str, np.ndarray]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Of every line of `PAIRS`: a name, and the file."""
    given = with_data(inputs)
    rows = rows_of(given)
    for name, formula, combinations in PAIRS:
        for p in combinations:
            variables = VARIABLES.get(name, LOGPS)
            if p.get("sft_target") == "separate":
                variables = (*variables, "policy_sft_logps")

            def of_rows(rows: list[Row], formula: Formula = formula, p: Hyperparameters = p) -> list[Number]:
                return [formula(row, p) for row in rows]

            losses = of_rows(rows)
            outputs = {"losses": [loss.real for loss in losses], "loss_mean": np.mean(losses).real}
            yield f"{name}-{p}", case(name, p, given, outputs | {"grads": gradients(of_rows, rows, variables)})
