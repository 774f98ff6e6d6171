"""Further cases of objectives that read tokens, and of those of the policy's own samples."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from tests.golden.arithmetic import Hyperparameters, Number, Row, logistic, mean, rows_of
from tests.golden.further import LOGPS, case, grid
from tests.golden.further_groups import Arrays, Batch, File, outputs_of

SIDES = ("chosen", "rejected")
MODELS = ("policy", "ref")
TOKENS = ("policy_chosen_token_logps", "policy_rejected_token_logps")


def of_tokens(inputs: Arrays) -> Iterator[File]:
    rows = rows_of(inputs)
    for p in grid(beta=[0.4], ld_alpha=[0.0, 0.6]):
        yield f"ld_dpo-{p}", case("ld_dpo", p, inputs, outputs_of(of_sides(ld), p, rows, TOKENS))
    for p in grid(beta=[0.3], subset=["shared", "independent"]):
        yield f"sampo-{p}", case("sampo", p, inputs, outputs_of(of_sides(kept), p, rows, TOKENS))
    for p in grid(beta=[0.4], clip_max=[None, 0.4], label_smoothing=[0.1]):
        given = dict(inputs)
        for key in (f"{model}_{side}" for model in MODELS for side in SIDES):
            given[f"{key}_logps"] = np.sum(inputs[f"{key}_token_logps"], axis=1)
        found = outputs_of(wpo, p, rows_of(given), LOGPS) | {"weights": [weight(e, p) for e in rows]}
        yield f"wpo-{p}", case("wpo", p, given, found)
    for p in grid(beta=[0.6], link=["sigmoid", "ipo"], missing_eos_penalty=[None, 1.5]):
        yield f"online_dpo-{p}", online_dpo(inputs, rows, p)
    names = {"model_logps_on_model": "policy_chosen", "model_logps_on_ref": "policy_rejected"}
    names |= {"ref_logps_on_model": "ref_chosen", "ref_logps_on_ref": "ref_rejected"}
    given = {ours: inputs[f"{theirs}_token_logps"] for ours, theirs in names.items()}
    given |= {"model_is_chosen": np.arange(len(rows)) % 3 == 0, "probability": np.linspace(0, 1, len(rows))}
    given["model_is_chosen"] = given["model_is_chosen"].astype(int)
    for p in grid(beta=[0.4], alpha=[0.02], link=["sigmoid", "ipo"]):
        found = outputs_of(xpo, p, rows_of(given), list(names)[:2], 1 / len(rows))
        found = {"loss": found["loss_mean"], "per_example": found["losses"], "grads": found["grads"]}
        yield f"xpo-{p}", case("xpo", p, given, found, "batch mean")
    for p in grid(beta=[0.9]):
        yield f"nash_md-{p}", case("nash_md", p, given, nash_md(given, p), "batch mean")


def of_sides(total: Callable[[Row, Hyperparameters, str, str], Number]) -> Batch:
    """DPO on other sums of tokens."""

    def losses(rows: list[Row], p: Hyperparameters) -> list[Number]:
        def gap(e: Row) -> Number:
            chosen, rejected = (total(e, p, "policy", side) - total(e, p, "ref", side) for side in SIDES)
            return chosen - rejected

        return [logistic(p["beta"] * gap(e)) for e in rows]

    return losses


def ld(e: Row, p: Hyperparameters, kind: str, side: str) -> Number:
    logps, shared = e[f"{kind}_{side}_token_logps"], min(e.n_c, e.n_r)
    return sum(logps[:shared]) + p["ld_alpha"] * sum(logps[shared : e[f"{side}_lengths"]])


def kept(e: Row, p: Hyperparameters, kind: str, side: str) -> Number:
    draw = e[f"keep_{side}_{'policy' if p['subset'] == 'shared' else kind}"]
    return sum(x for x, there in zip(e[f"{kind}_{side}_token_logps"], draw, strict=True) if there)


def weight(e: Row, p: Hyperparameters) -> float:
    total = 0.0
    for side in SIDES:
        n = e[f"{side}_lengths"]
        logps, squares = e[f"policy_{side}_token_logps"][:n], e[f"log_sum_sq_{side}"][:n]
        total += mean([x - y for x, y in zip(logps, squares, strict=True)]).real
    return min(math.exp(total), math.inf if p["clip_max"] is None else p["clip_max"])


def wpo(rows: list[Row], p: Hyperparameters) -> list[Number]:
    return [weight(e, p) * logistic(p["beta"] * e.h, p["label_smoothing"]) for e in rows]


def preference(h: Number, p: Hyperparameters) -> Number:
    return logistic(p["beta"] * h) if p["link"] == "sigmoid" else (h - 1 / (2 * p["beta"])) ** 2


def online_dpo(inputs: Arrays, rows: list[Row], p: Hyperparameters) -> dict[str, Any]:
    """Scores are whole numbers, so that some are equal; there the first response is chosen."""
    n = len(rows)
    rng = np.random.default_rng(5)
    rewards, finished = rng.integers(0, 3, 2 * n).astype(float), rng.integers(0, 2, 2 * n)
    scores = rewards - (p["missing_eos_penalty"] or 0.0) * (1 - finished)
    first = scores[:n] >= scores[n:]

    def losses(rows: list[Row], p: Hyperparameters) -> list[Number]:
        logps, reference = ([sum(e[f"{kind}_logps"]) for e in rows] for kind in MODELS)
        ratios = [x - y for x, y in zip(logps, reference, strict=True)]
        gaps = [a - b for a, b in zip(ratios[:n], ratios[n:], strict=True)]
        return [preference(h if won else -h, p) for h, won in zip(gaps, first, strict=True)]

    both = {kind: np.concatenate([inputs[f"{kind}_{side}_token_logps"] for side in SIDES]) for kind in MODELS}
    found = outputs_of(losses, p, rows_of({f"{kind}_logps": x for kind, x in both.items()}), ["policy_logps"], 1 / n)
    lengths = np.concatenate([inputs["chosen_lengths"], inputs["rejected_lengths"]])
    gradient = np.where(np.arange(both["policy"].shape[1]) < lengths[:, None], found["grads"]["policy_logps"], 0)
    given = {"logprobs": both["policy"], "ref_logprobs": both["ref"], "rewards": rewards, "contains_eos": finished}
    places = np.arange(n)
    outputs = {
        "loss": found["loss_mean"],
        "per_example": found["losses"],
        "grads": {"logprobs": gradient.tolist()},
        "chosen_indices": np.where(first, places, places + n).tolist(),
        "rejected_indices": np.where(first, places + n, places).tolist(),
    }
    return case("online_dpo", p, given | {"lengths": lengths}, outputs, "batch mean")


def xpo(rows: list[Row], p: Hyperparameters) -> list[Number]:
    losses = []
    for e in rows:
        on_model = sum(e["model_logps_on_model"]) - sum(e["ref_logps_on_model"])
        on_reference = sum(e["model_logps_on_ref"]) - sum(e["ref_logps_on_ref"])
        h = on_model - on_reference if e["model_is_chosen"] else on_reference - on_model
        losses.append(preference(h, p) + p["alpha"] * sum(e["model_logps_on_ref"]))
    return losses


def nash_md(inputs: Arrays, p: Hyperparameters) -> dict[str, Any]:
    logps, ratios = inputs["model_logps_on_model"], inputs["model_logps_on_model"] - inputs["ref_logps_on_model"]
    excess = inputs["probability"][:, None] - 0.5
    losses = (p["beta"] * ratios * logps - excess * logps).sum(axis=1)
    gradient = (p["beta"] * ratios - excess) / len(losses)
    return {"loss": losses.mean(), "grads": {"model_logps_on_model": gradient.tolist()}}


def of_logits(inputs: Arrays) -> Iterator[File]:
    """TDPO of logits: the gradient of a log-prob is δ - π, that of a divergence π - π_ref."""
    shares, references, logps, kl = {}, {}, {}, {}
    for side in SIDES:
        mask, labels = inputs[f"{side}.mask"], inputs[f"{side}.labels"]
        shares[side], references[side] = (log_softmax_of(inputs[f"{side}.{model}_logits"]) for model in MODELS)
        ratios = np.take_along_axis(shares[side] - references[side], labels[..., None], axis=2)[..., 0]
        logps[side] = (mask * ratios).sum(axis=1)
        divergences = (np.exp(references[side]) * (references[side] - shares[side])).sum(axis=2)
        kl[side] = (mask * divergences).sum(axis=1)
    for p in grid(beta=[0.3], alpha=[0.4], tdpo2=[True, False], level=["logits"]):
        h, alpha = logps["chosen"] - logps["rejected"], p["alpha"] if p["tdpo2"] else 1
        z = p["beta"] * (h - alpha * (kl["rejected"] - kl["chosen"]))
        slope, grads = -p["beta"] / (1 + np.exp(z)), {}
        for side, sign in zip(SIDES, (1, -1), strict=True):
            one_hot = inputs[f"{side}.labels"][..., None] == np.arange(shares[side].shape[2])
            of_kl = 0 if p["tdpo2"] and side == "chosen" else alpha
            share, reference = np.exp(shares[side]), np.exp(references[side])
            gradient = sign * (one_hot - share + of_kl * (share - reference)) * inputs[f"{side}.mask"][..., None]
            grads[f"policy_{side}_logits"] = (slope[:, None, None] * gradient).tolist()
        losses = np.logaddexp(0, -z)
        made = case("tdpo", p, {}, {"losses": losses.tolist(), "loss_mean": losses.mean(), "grads": grads})
        made["cases"][0]["inputs"] = "token_inputs.json"
        yield f"tdpo-{p}", made


def log_softmax_of(logits: np.ndarray) -> np.ndarray:
    return logits - np.log(np.exp(logits).sum(axis=2, keepdims=True))
