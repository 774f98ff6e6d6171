"""Further cases of objectives of whole batches, of labelled responses and of lists."""

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
    log_softmax,
    logistic,
    mean,
    relu,
    rows_of,
    sigmoid,
    softplus,
    stop,
)
from tests.golden.further import LOGPS, case, dpo, grid

File = tuple[str, dict[str, Any]]
Arrays = Mapping[str, np.ndarray]
Batch = Callable[[list[Row], Hyperparameters], list[Number]]


def outputs_of(
    batch: Batch, p: Hyperparameters, rows: list[Row], names: Sequence[str], scale: float = 1.0
) -> dict[str, Any]:
    """Losses, and gradients of `scale` times their sum."""
    losses = [loss.real for loss in batch(rows, p)]
    found = gradients(lambda changed: batch(changed, p), rows, names)
    scaled = {name: (scale * np.asarray(values)).tolist() for name, values in found.items()}
    return {"losses": losses, "loss_mean": float(np.mean(losses)), "grads": scaled}


def of_batches(inputs: Arrays) -> Iterator[File]:
    rows = rows_of(inputs)
    n = len(rows)
    for p in grid(beta=[0.05, 0.4], label_smoothing=[0.3], form=["paired", "unpaired"]):
        yield f"aot-{p}", case("aot", p, inputs, outputs_of(aot, p, rows, LOGPS))
    for p in grid(beta=[0.5], nll_weight=[0.3], nll_reduction=["batch"]):
        for name in ("cpo", "dpo_nll"):
            found = outputs_of(with_batch_nll(name), p, rows, LOGPS, 1 / n)
            found["loss"] = found.pop("loss_mean")
            del found["losses"]
            yield f"{name}-{p}", case(name, p, inputs, found, "batch mean")
    for p in grid(beta=[0.05], cal_weight=[0.5], cal_reduction=["batch"]):
        yield f"cal_dpo-{p}", case("cal_dpo", p, inputs, outputs_of(cal_dpo, p, rows, LOGPS, 1 / n), "batch mean")
    for p in grid(beta=[0.5], link=["ipo", "sigmoid"]):
        found = outputs_of(d2po, p, rows, LOGPS)
        found = {"loss": float(np.sum(found["losses"])), "grads": found["grads"]}
        yield f"d2po-{p}", case("d2po", p, inputs, found, "batch sum")
    for p in grid(beta=[0.6], form=["kto_pair"]):
        yield f"kto-{p}", case("kto", p, inputs, outputs_of(kto_pair, p, rows, LOGPS))
    for p in grid(beta=[0.6], desirable_weight=[1.2], undesirable_weight=[0.8], form=["rlhf_book"]):
        found = outputs_of(kto_book, p, rows, LOGPS, 1 / n)
        yield f"kto-{p}", case("kto", p, inputs, {"loss": found["loss_mean"], "grads": found["grads"]}, "loss")
    for p in grid(beta=[0.4], form=["pair_delta_mean_of_batch_means"]):
        yield f"bco-{p}", case("bco", p, inputs, bco_steps(p, rows, LOGPS))
    yield from of_beta_dpo(inputs, rows)


def aot(rows: list[Row], p: Hyperparameters) -> list[Number]:
    if p["form"] == "paired":
        one, two = [e.s_c - e.s_r for e in rows], [e["ref_chosen_logps"] - e["ref_rejected_logps"] for e in rows]
    else:
        one, two = [e.q_c for e in rows], [e.q_r for e in rows]
    ranks = zip(*(sorted(values, key=lambda x: x.real) for values in (one, two)), strict=True)
    return [logistic(p["beta"] * (a - b), p["label_smoothing"]) for a, b in ranks]


def with_batch_nll(name: str) -> Batch:
    def losses(rows: list[Row], p: Hyperparameters) -> list[Number]:
        nll = -sum(e.s_c for e in rows) / sum(e.n_c for e in rows)
        gaps = [e.s_c - e.s_r if name == "cpo" else e.h for e in rows]
        return [logistic(p["beta"] * h) + p["nll_weight"] * nll for h in gaps]

    return losses


def cal_dpo(rows: list[Row], p: Hyperparameters) -> list[Number]:
    target = 1 / (2 * p["beta"])
    squares = mean([(e.q_c - target) ** 2 + (e.q_r + target) ** 2 for e in rows])
    return [logistic(e.h) + p["cal_weight"] * squares for e in rows]


def d2po(rows: list[Row], p: Hyperparameters) -> list[Number]:
    return [dpo(e, p) if p["link"] == "sigmoid" else (e.h - 1 / (2 * p["beta"])) ** 2 for e in rows]


def kto_pair(rows: list[Row], p: Hyperparameters) -> list[Number]:
    of_chosen, of_rejected = relu(mean([e.q_c for e in rows])), relu(mean([e.q_r for e in rows]))
    chosen = [sigmoid(-p["beta"] * (e.q_c - of_rejected)) for e in rows]
    return chosen + [sigmoid(-p["beta"] * (of_chosen - e.q_r)) for e in rows]


def kto_book(rows: list[Row], p: Hyperparameters) -> list[Number]:
    anchor = max(0.0, stop(mean([e.q_r for e in rows])))
    return [
        p["desirable_weight"] * sigmoid(-p["beta"] * (e.q_c - anchor))
        + p["undesirable_weight"] * sigmoid(-p["beta"] * (anchor - e.q_r))
        for e in rows
    ]


def bco_steps(p: Hyperparameters, rows: list[Row], names: Sequence[str]) -> dict[str, Any]:
    """Three batches; delta is the mean of batch means (pairs), or that of all rewards so far."""
    edges = [0, 6, 10, len(rows)] if "policy_chosen_logps" in rows[0] else [0, 5, 11, len(rows)]
    batches, steps, seen, count = [list(pair) for pair in itertools.pairwise(edges)], [], [], 0
    for first, last in batches:
        part = rows[first:last]
        count += len(part)
        if "form" in p:
            seen.append(mean([p["beta"] * (e.q_c + e.q_r) / 2 for e in part]))
        else:
            seen += [p["beta"] * (e["policy_logps"] - e["ref_logps"]) for e in part]
        delta = mean(seen)
        step = outputs_of(lambda some, p, delta=delta: [bco(e, p, delta) for e in some], p, part, names)
        steps.append(step | {"delta": delta} | ({} if "form" in p else {"count": float(count)}))
    return {"batches": batches, "steps": steps}


def bco(e: Row, p: Hyperparameters, delta: float) -> Number:
    if "form" in p and p["form"].startswith("pair"):
        return logistic(p["beta"] * e.q_c - delta) + logistic(delta - p["beta"] * e.q_r)
    u = p["beta"] * (e["policy_logps"] - e["ref_logps"])
    if e["label"]:
        return logistic(u - delta)
    odds = e["udm_prob"] / (1 - e["udm_prob"] + 1e-8)
    return (min(max(odds, p["min_density_ratio"]), p["max_density_ratio"]) if p["udm"] else 1) * logistic(delta - u)


def of_beta_dpo(inputs: Arrays, rows: list[Row]) -> Iterator[File]:
    gaps = np.array([e.h for e in rows])
    for rho, a in ((0.2, 0.6), (0.5, 0.05)):
        p = dict(beta=0.1, a=a, rho=rho, ema_mean=-1.0, ema_std=3.0)
        kept = sorted(range(len(rows)), key=lambda i: (i * 7) % len(rows))[: int((1 - rho) * len(rows))]
        beta = max(1e-3, p["beta"] * (1 + a * (gaps[kept].mean() - p["ema_mean"])))

        def losses(rows: list[Row], p: Hyperparameters, kept: list[int] = kept, beta: float = beta) -> list[Number]:
            return [logistic(beta * rows[i].h) / len(kept) for i in kept]

        found = outputs_of(losses, p, rows, LOGPS)
        outputs = {
            "loss": float(np.sum(found["losses"])),
            "grads": found["grads"],
            "selected": [float(i in kept) for i in range(len(rows))],
            "beta_used": [beta],
            "losses_unmasked": [logistic(beta * e.h) for e in rows],
        }
        yield f"beta_dpo-{rho}", case("beta_dpo", p, inputs, outputs, "loss")
    averages, ema = np.zeros(2), []
    for h in (gaps * 0.5 + 1, gaps, gaps):
        averages = 0.7 * averages + 0.3 * np.array([h.mean(), h.std(ddof=1)])
        ema.append(averages.tolist())
    p = dict(decay=0.7, updates=["gap*.5+1", "gap", "gap"])
    yield "beta_dpo-ema", case("beta_dpo", p, inputs, {"ema": ema}, "n/a")


def of_labels(inputs: Arrays) -> Iterator[File]:
    rows = rows_of(inputs)
    for p in grid(beta=[0.05, 0.9], desirable_weight=[1.4], undesirable_weight=[0.6]):
        anchor = max(0.0, mean([e["policy_kl_logps"] - e["ref_kl_logps"] for e in rows]))
        for loss, kl in (("kto", anchor), ("apo_zero_unpaired", 0.0)):

            def losses(rows: list[Row], p: Hyperparameters, kl: float = kl) -> list[Number]:
                values = [p["beta"] * (e["policy_logps"] - e["ref_logps"] - kl) for e in rows]
                up, down = p["desirable_weight"], p["undesirable_weight"]
                return [
                    up * sigmoid(-v) if e["label"] else down * sigmoid(v) for e, v in zip(rows, values, strict=True)
                ]

            found = outputs_of(losses, p, rows, ["policy_logps"]) | {"kl": kl}
            given = p if loss == "kto" else {**p, "loss": loss}
            yield f"{loss}-{p}", case("kto", given, inputs, found)
    for p in grid(beta=[0.6], udm=[False, True], min_density_ratio=[0.3], max_density_ratio=[4.0]):
        yield f"bco-{p}", case("bco", p, inputs, bco_steps(p, rows, ["policy_logps"]))
        paper = {**p, "form": "paper_delta_current_batch"}
        rewards = [(p["beta"] * (e["policy_logps"] - e["ref_logps"]), e["label"]) for e in rows]
        delta = mean([mean([u for u, label in rewards if label == one]) for one in (0, 1)])
        found = outputs_of(lambda some, p, delta=delta: [bco(e, p, delta) for e in some], paper, rows, ["policy_logps"])
        yield f"bco-paper-{p}", case("bco", paper, inputs, found | {"delta": delta})


def of_lists(inputs: Arrays) -> Iterator[File]:
    rows = rows_of(inputs)
    formulas: list[tuple[str, Batch, list[dict[str, Any]]]] = [
        ("dpo_plackett_luce", plackett_luce, grid(beta=[0.02, 0.9])),
        ("exo", exo, grid(beta_pi=[0.9], beta_r=[0.05, 2.0])),
        ("exo", exo, grid(beta_pi=[0.9], beta_r=[0.05, 2.0], form=["forward_kl"])),
        ("info_nca", info_nca, grid(beta=[0.9], alpha=[0.001, 0.7], score_bonus_col0=[0.02])),
        ("nca", nca, grid(beta=[0.9], alpha=[0.001, 0.7], score_bonus_col0=[0.02])),
    ]
    for name, formula, combinations in formulas:
        for p in combinations:
            yield f"{name}-{p}", case(name, p, inputs, outputs_of(formula, p, rows, ["policy_logps"]))


def rewards_of(e: Row, beta: float) -> list[Number]:
    """Of the responses that there are."""
    there = range(e["n_valid"])
    return [beta * (e["policy_logps"][k] - e["ref_logps"][k]) for k in there]


def plackett_luce(rows: list[Row], p: Hyperparameters) -> list[Number]:
    ranked = [rewards_of(e, p["beta"]) for e in rows]
    return [-sum(log_softmax(r[k:])[0] for k in range(len(r))) for r in ranked]


def shares_of(e: Row, temperature: float, bonus: float = 0.0) -> list[float]:
    scores = e["scores"][: e["n_valid"]]
    return [stop(x) for x in log_softmax([(x + bonus * (k == 0)) / temperature for k, x in enumerate(scores)])]


def exo(rows: list[Row], p: Hyperparameters) -> list[Number]:
    losses = []
    for e in rows:
        found, wanted = log_softmax(rewards_of(e, p["beta_pi"])), shares_of(e, p["beta_r"])
        pairs = list(zip(found, wanted, strict=True))
        forward = -sum(exponential(t) * f for f, t in pairs)
        losses.append(forward if "form" in p else sum(exponential(f) * (f - t) for f, t in pairs))
    return losses


def info_nca(rows: list[Row], p: Hyperparameters) -> list[Number]:
    def loss(e: Row) -> Number:
        found, wanted = log_softmax(rewards_of(e, p["beta"])), shares_of(e, p["alpha"], p["score_bonus_col0"])
        return -sum(math.exp(t) * f for f, t in zip(found, wanted, strict=True))

    return [loss(e) for e in rows]


def nca(rows: list[Row], p: Hyperparameters) -> list[Number]:
    def loss(e: Row) -> Number:
        rewards, wanted = rewards_of(e, p["beta"]), shares_of(e, p["alpha"], p["score_bonus_col0"])
        up = sum(math.exp(t) * softplus(-r) for r, t in zip(rewards, wanted, strict=True))
        return up + mean([softplus(r) for r in rewards])

    return [loss(e) for e in rows]
