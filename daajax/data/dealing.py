"""Dealing: which row each example of a window goes to.

A first deal is greedy; swaps then even the rows out until none is fuller than it may be; windows in which that fails
are dealt again in another order. It depends on the sizes of the examples and on nothing else.
"""

import math

import numpy as np
from jaxtyping import Float, Int, Shaped

from daajax.data.balance import even_out

_DEALS = 12  # of a window at most
_IN_ALL = 2  # likewise, on the average of all
_NOISE = 0.3  # of the logarithm of the sizes, by which later deals order the examples
_LATER = 0.3, 0.03, 0.003  # weight of the measures behind the first, deal by deal
_SPARE_SLOTS = 1 / 4  # share of a row's mean number of examples that it may have beyond it


def deal(
    windows: Int[np.ndarray, "updates batch_size"],
    measures: Float[np.ndarray, "examples dims"],
    rows: int,
    most: Float[np.ndarray, "updates dims"],
) -> Int[np.ndarray, "updates batch_size"]:
    """The row of every place of every window, -1 where there is no example.

    Args:
        windows: Example index by update and place, -1 for none.
        measures: Of each example; the first counts most.
        rows: To deal into.
        most: What a row may hold; where that was not found, as little more as was.
    """
    measures = np.concatenate([measures, np.zeros((1, measures.shape[1]))])  # index -1: nothing
    row_of, excess = np.zeros(windows.shape, np.int32), np.full(most.shape, np.inf)
    dealt = np.arange(len(windows))
    left = _IN_ALL * len(windows)
    for attempt in range(_DEALS if rows > 1 else 1):
        later = _LATER[min(attempt, len(_LATER) - 1)]
        sizes, noise = measures[windows[dealt]], np.random.default_rng(attempt) if attempt else None
        found = _swap(_deal_greedily(sizes, rows, later, noise), sizes, rows, most[dealt], later)
        over = _excess(found, sizes, rows, most[dealt])
        better = _badness(over) < _badness(excess[dealt])
        row_of[dealt[better]], excess[dealt[better]] = found[better], over[better]
        dealt, left = np.flatnonzero(excess[:, 0] > 0), left - len(dealt)
        if not 0 < len(dealt) <= left:
            break
    return np.where(windows >= 0, row_of, -1).astype(np.int32)


def totals(
    row_of: Int[np.ndarray, "updates batch_size"], sizes: Shaped[np.ndarray, "updates batch_size"], rows: int
) -> Float[np.ndarray, "updates rows"]:
    """What the examples of each row add up to; those whose row is -1 are left out."""
    updates = len(row_of)
    flat = np.where(row_of >= 0, np.arange(updates)[:, None] * rows + row_of, updates * rows)
    added = np.bincount(flat.ravel(), weights=sizes.ravel(), minlength=updates * rows + 1)
    return added[:-1].reshape(updates, rows)


def _badness(excess: Float[np.ndarray, "updates dims"]) -> Float[np.ndarray, " updates"]:
    """By what deals of a window are compared: the excess of the first measure, the others where that is alike."""
    return excess[:, 0] + 1e-3 * excess[:, 1:].sum(axis=1)


def _slots(batch_size: int, rows: int) -> int:
    """Examples that a row may have."""
    return math.ceil(batch_size / rows * (1 + _SPARE_SLOTS)) + 1


def _deal_greedily(
    sizes: Float[np.ndarray, "updates batch_size dims"], rows: int, later: float, noise: np.random.Generator | None
) -> Int[np.ndarray, "updates batch_size"]:
    """Every example, the largest first, into the row where it adds least to the sum of the squared totals."""
    updates, batch_size, dims = sizes.shape
    weights = np.sqrt([1.0] + [later] * (dims - 1))
    sizes = sizes * weights / np.maximum(sizes.mean(axis=(0, 1)), 1)
    largest = sizes.sum(axis=2)
    if noise is not None:
        largest *= np.exp(_NOISE * noise.standard_normal(largest.shape))
    loads, taken = np.zeros((updates, rows, dims)), np.zeros((updates, rows), np.int32)
    row_of = np.empty((updates, batch_size), np.int32)
    each = np.arange(updates)
    for place in np.argsort(-largest, axis=1, kind="stable").T:
        size = sizes[each, place]
        cost = np.einsum("urd,ud->ur", loads, size)  # (load + size)² - load² = 2 load · size + what is alike everywhere
        cost[taken >= _slots(batch_size, rows)] = np.inf
        row = cost.argmin(axis=1)
        row_of[each, place] = row
        loads[each, row] += size
        taken[each, row] += 1
    return row_of


def _swap(
    row_of: Int[np.ndarray, "updates batch_size"],
    sizes: Float[np.ndarray, "updates batch_size dims"],
    rows: int,
    most: Float[np.ndarray, "updates dims"],
    later: float,
) -> Int[np.ndarray, "updates batch_size"]:
    """The rows evened out by swaps, and by moves into free slots."""
    updates, batch_size, dims = sizes.shape
    row = (np.arange(updates)[:, None] * rows + row_of).ravel()
    by_row = np.argsort(row, kind="stable")
    counts = np.bincount(row, minlength=updates * rows)
    bins = np.full((updates * rows, _slots(batch_size, rows)), row.size)  # `row.size` stands for nothing
    bins[row[by_row], np.arange(row.size) - np.repeat(np.cumsum(counts) - counts, counts)] = by_row
    targets = np.repeat(sizes.mean(axis=1) * batch_size / rows, rows, axis=0)
    bins = even_out(
        bins,
        np.concatenate([sizes.reshape(-1, dims), np.zeros((1, dims))]),
        targets,
        group=np.repeat(np.arange(updates), rows),
        room=np.repeat(most, rows, axis=0) - targets,
        both_ways=False,
        all_meet=True,
        later=later,
    )
    evened = np.empty(row.size + 1, np.int32)
    evened[bins] = (np.arange(updates * rows) % rows)[:, None]
    return evened[:-1].reshape(updates, batch_size)


def _excess(
    row_of: Int[np.ndarray, "updates batch_size"],
    sizes: Float[np.ndarray, "updates batch_size dims"],
    rows: int,
    most: Float[np.ndarray, "updates dims"],
) -> Float[np.ndarray, "updates dims"]:
    """By what share the fullest row of each window exceeds what it may hold."""
    fullest = [totals(row_of, sizes[..., measure], rows).max(axis=1) for measure in range(sizes.shape[2])]
    return np.maximum(np.stack(fullest, axis=1) / most - 1, 0)
