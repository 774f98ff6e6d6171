"""Inputs of further cases: the committed sets, put together, and tokens at the ends of what there is."""

import json
from collections.abc import Iterator
from typing import Any

import numpy as np

from tests.golden import further, further_groups, further_tokens
from tests.golden.cases import COMMITTED, TOKEN_INPUTS
from tests.golden.further import case

Inputs = dict[str, np.ndarray]


def files() -> Iterator[tuple[str, dict[str, Any]]]:
    """Every further case: a name, and a golden file of it alone."""
    main, edge = committed("dpo", "main"), committed("dpo", "edge")
    mixed = {name: np.concatenate([main[name][:8], edge[name]]) for name in main}
    yield from further.of_pairs(mixed)
    for key, inputs in (("main", main), ("mixed", mixed)):
        for name, made in further_groups.of_batches(further.with_data(inputs)):
            yield f"{key}-{name}", made
    yield from further_groups.of_labels(committed("bco", "unpaired") | committed("kto", "unpaired"))
    yield from further_groups.of_lists(committed("exo", "kwise") | committed("dpo_plackett_luce", "kwise"))
    for key, inputs in (("main", committed("wpo", "main") | committed("sampo", "main")), ("extreme", extreme_tokens())):
        for name, made in further_tokens.of_tokens(inputs):
            yield f"{key}-{name}", made
    tokens = json.loads((COMMITTED / TOKEN_INPUTS).read_text(encoding="utf-8"))
    logits = {f"{side}.{name}": np.asarray(x) for side, arrays in tokens.items() for name, x in arrays.items()}
    yield from further_tokens.of_logits(logits)
    parameters = {"policy": [4.0, 0.0], "ref": [0.0, -8.0]}
    yield "tr_dpo", case("tr_dpo", {"alpha": 0.25}, parameters, {"ref_after": [1.0, -6.0]}, "n/a")


def committed(name: str, key: str) -> Inputs:
    """A set of a committed file."""
    content = json.loads((COMMITTED / f"{name}.json").read_text(encoding="utf-8"))
    return {name: np.asarray(values) for name, values in content["inputs"][key].items()}


def extreme_tokens() -> Inputs:
    """Sequences of up to 3000 nats, tokens near certainty, a policy that is the reference, lengths from 1 to 24."""
    rng = np.random.default_rng(3)
    n, T = 16, 24  # the shapes of the set `main`, for which everything is compiled
    lengths = {"chosen": np.resize([24, 1, 7, 24, 1, 20], n), "rejected": np.resize([12, 24, 7, 23, 1], n)}
    scales = np.resize([1.0, 125.0, 1e-9, 125.0, 1e-9, 5.0], n)[:, None]
    inputs = {}
    for side, length in lengths.items():
        there = np.arange(T) < length[:, None]
        policy, reference = (np.where(there, -scales * rng.uniform(0.5, 1, (n, T)), 0) for _ in range(2))
        reference[0] = policy[0]
        inputs |= {f"policy_{side}_token_logps": policy, f"ref_{side}_token_logps": reference}
        inputs |= {f"{side}_lengths": length, f"log_sum_sq_{side}": np.where(there, -rng.uniform(0, 3, (n, T)), 0)}
        for model in ("policy", "ref"):
            ranks = np.argsort(np.argsort(np.where(there, rng.uniform(size=(n, T)), 2), axis=1), axis=1)
            inputs[f"keep_{side}_{model}"] = (ranks < np.minimum(*lengths.values())[:, None]).astype(float)
    return inputs
