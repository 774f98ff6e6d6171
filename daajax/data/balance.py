"""Evening out: swaps between bins until their totals agree."""

import numpy as np
from jaxtyping import Bool, Float, Int

_ROUNDS = 60  # of swaps at most; real data settle in 5 to 30
_CANDIDATES = 48  # items of a bin that one round looks at; others have their turn in the next
_CELLS_AT_ONCE = 2**22  # bounds the memory of a round
_LATER = 0.3  # weight of the measures behind the first


def even_out(
    bins: Int[np.ndarray, "bins width"],
    measures: Float[np.ndarray, "items dims"],
    targets: Float[np.ndarray, "bins dims"],
    *,
    group: Int[np.ndarray, " bins"],
    within: float,
    movable: Bool[np.ndarray, "bins width"] | None = None,
) -> Int[np.ndarray, "bins width"]:
    """Swaps items between bins of a group until each bin's totals are near its targets.

    In each round the fullest bin of a group meets the emptiest, the second fullest the second emptiest, and so on; each
    pair makes the one swap that helps most. The first measure (row or window tokens) counts most.

    Args:
        bins: Items by bin; may repeat an item of zero size.
        measures: Sizes of the items.
        targets: Totals that each bin should have.
        group: Bins are paired within their group; sorted.
        within: Relative deviation at which a bin is left alone; four times as much in the later measures.
        movable: Places that may take part in a swap; None: all.
    """
    bins = bins.copy()
    count, width = bins.shape
    scale = np.maximum(targets.max(axis=0, initial=0), 1.0)
    sizes = measures / scale
    weights = np.array([1.0] + [_LATER] * (measures.shape[1] - 1))
    deviation = (measures[bins].sum(axis=1) - targets) / scale
    limits = within * np.where(np.arange(measures.shape[1]) == 0, 1, 4)
    members = np.bincount(group)
    starts = np.cumsum(members) - members
    rank = np.arange(count) - starts[group]
    opposite = starts[group] + members[group] - 1 - rank
    lower_half = rank < members[group] // 2
    chunk = max(1, _CELLS_AT_ONCE // min(width, _CANDIDATES) ** 2)
    idle = 0
    for turn in range(_ROUNDS):
        off = (np.abs(deviation) > limits).any(axis=1)
        if not off.any() or idle > 2:
            break
        # The measure that decides who meets whom alternates, as do the items that a round looks at.
        ranked = np.lexsort((deviation[:, -1 if turn % 3 == 2 else 0], group))
        light, heavy = ranked[lower_half], ranked[opposite[lower_half]]
        needed = off[light] | off[heavy]
        light, heavy = light[needed], heavy[needed]
        columns = np.arange(width) if width <= _CANDIDATES else (turn * 31 + np.arange(_CANDIDATES)) % width
        swaps = 0
        for begin in range(0, len(light), chunk):
            a, b = light[begin : begin + chunk], heavy[begin : begin + chunk]
            ours, theirs = (sizes[bins[side][:, columns]] for side in (a, b))
            allowed = None if movable is None else (movable[a][:, columns], movable[b][:, columns])
            i, j, better = _find_best_swaps(ours, theirs, deviation[a] - deviation[b], weights, allowed)
            a, b, i, j = a[better], b[better], columns[i[better]], columns[j[better]]
            moved = sizes[bins[b, j]] - sizes[bins[a, i]]
            deviation[a] += moved
            deviation[b] -= moved
            bins[a, i], bins[b, j] = bins[b, j], bins[a, i]
            swaps += len(a)
        idle = 0 if swaps else idle + 1
    return bins


def _find_best_swaps(
    ours: Float[np.ndarray, "pairs columns dims"],
    theirs: Float[np.ndarray, "pairs columns dims"],
    gaps: Float[np.ndarray, "pairs dims"],
    weights: Float[np.ndarray, " dims"],
    movable: tuple[Bool[np.ndarray, "pairs columns"], Bool[np.ndarray, "pairs columns"]] | None,
) -> tuple[Int[np.ndarray, " pairs"], Int[np.ndarray, " pairs"], Bool[np.ndarray, " pairs"]]:
    """The swap that helps each pair of bins most: its column in the one and in the other, and whether it helps at all.

    Args:
        ours: Sizes of the one bin's items.
        theirs: Sizes of the other's.
        gaps: Deviation of the one bin less that of the other.
        weights: Of the measures.
        movable: Items of both that may take part; None: all.
    """
    pairs, width, _ = ours.shape
    change = np.zeros((pairs, width, width))  # of the squared deviations, halved
    for measure, weight in enumerate(weights):
        delta = theirs[:, None, :, measure] - ours[:, :, None, measure]
        change += weight * delta * (delta + gaps[:, measure, None, None])
    if movable is not None:
        change = np.where(movable[0][:, :, None] & movable[1][:, None, :], change, np.inf)
    change = change.reshape(pairs, -1)
    best = change.argmin(axis=1)
    i, j = np.divmod(best, width)
    return i, j, np.take_along_axis(change, best[:, None], axis=1)[:, 0] < -1e-15
