"""Evening out: swaps between bins until their totals agree."""

import numpy as np
from jaxtyping import Bool, Float, Int

_ROUNDS = 60  # of swaps at most; real data settle in 5 to 30
_PAIRS_AT_ONCE = 4096  # bounds the memory of a round


def evened(
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
        within: Relative deviation at which a bin is left alone.
        movable: Places that may take part in a swap; None: all.
    """
    bins = bins.copy()
    scale = np.maximum(targets.reshape(-1, targets.shape[-1]).max(axis=0), 1.0)
    weight = np.array([1.0] + [0.3] * (measures.shape[1] - 1))
    deviation = (measures[bins].sum(axis=1) - targets) / scale
    sizes = measures / scale
    starts = np.searchsorted(group, np.arange(group[-1] + 1)) if len(group) else np.zeros(0, np.int64)
    for turn in range(_ROUNDS):
        # Alternate the measure that decides who meets whom; a turn without gain in either ends the search.
        axis = 1 if turn % 3 == 2 and measures.shape[1] > 1 else 0
        if np.abs(deviation[:, 0]).max(initial=0.0) <= within and np.abs(deviation).max(initial=0.0) <= 4 * within:
            break
        ranked = np.lexsort((deviation[:, axis], group))
        rank = np.arange(len(bins)) - starts[group]
        count = np.bincount(group)[group]
        partner = ranked[starts[group] + count - 1 - rank]
        first = rank < count // 2
        light, heavy = ranked[first], partner[first]
        gained = False
        for begin in range(0, len(light), _PAIRS_AT_ONCE):
            a, b = light[begin : begin + _PAIRS_AT_ONCE], heavy[begin : begin + _PAIRS_AT_ONCE]
            delta = sizes[bins[b]][:, None, :, :] - sizes[bins[a]][:, :, None, :]  # [pairs, width, width, dims]
            after = weight * ((deviation[a][:, None, None] + delta) ** 2 + (deviation[b][:, None, None] - delta) ** 2)
            cost = after.sum(axis=-1)
            if movable is not None:
                cost = np.where(movable[a][:, :, None] & movable[b][:, None, :], cost, np.inf)
            flat = cost.reshape(len(a), -1)
            best = flat.argmin(axis=1)
            before = (weight * (deviation[a] ** 2 + deviation[b] ** 2)).sum(axis=-1)
            better = flat[np.arange(len(a)), best] < before * (1 - 1e-9) - 1e-15
            i, j = np.divmod(best, bins.shape[1])
            a, b, i, j, best = (x[better] for x in (a, b, i, j, best))
            moved = delta.reshape(len(better), -1, delta.shape[-1])[better, best]
            deviation[a] += moved
            deviation[b] -= moved
            bins[a, i], bins[b, j] = bins[b, j], bins[a, i]
            gained |= bool(better.any())
        if not gained and axis == 0 and turn % 3 == 1:
            break
    return bins
