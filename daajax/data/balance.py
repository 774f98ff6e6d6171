"""Evening out: swaps between bins until their totals agree."""

import numpy as np
from jaxtyping import Bool, Float, Int

_ROUNDS = 60  # of swaps at most; real data settle in 5 to 30
_CANDIDATES = 48  # items of a bin that one round looks at; others have their turn in the next
_ALIKE = 3  # rounds without a swap after which other pairs meet
_CELLS_AT_ONCE = 2**17  # bounds the memory of a round


def even_out(
    bins: Int[np.ndarray, "bins width"],
    measures: Float[np.ndarray, "items dims"],
    targets: Float[np.ndarray, "bins dims"],
    *,
    group: Int[np.ndarray, " bins"],
    room: Float[np.ndarray, "bins dims"],
    both_ways: bool,
    all_meet: bool,
    later: float = 0.3,
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
        room: What a bin may be off its targets and is left alone, in the units of `measures`.
        both_ways: Whether a bin is off that lacks as much, or only one that has too much.
        all_meet: Whether other pairs meet where none of a group finds a swap, until all have met all.
        later: Weight of the measures behind the first.
        movable: Places that may take part in a swap; None: all.
    """
    bins = bins.copy()
    width = bins.shape[1]
    scale = np.maximum(targets.max(axis=0, initial=0), 1.0)
    sizes = measures / scale
    weights = np.array([1.0] + [later] * (measures.shape[1] - 1))
    deviation = (measures[bins].sum(axis=1) - targets) / scale
    limits = room / scale
    members = np.bincount(group)
    idle = np.zeros(len(members), np.int64)  # rounds since a group's last swap
    patience = _ALIKE + members * all_meet
    chunk = max(1, _CELLS_AT_ONCE // min(width, _CANDIDATES) ** 2)
    for turn in range(_ROUNDS):
        off = ((np.abs(deviation) if both_ways else deviation) > limits).any(axis=1)
        off &= (idle < patience)[group]
        if not off.any():
            break
        light, heavy = _meetings(deviation, group, members, idle, turn)
        needed = off[light] | off[heavy]
        light, heavy = light[needed], heavy[needed]
        # Many items are looked at in turns.
        columns = np.arange(width) if width <= _CANDIDATES else (turn * 31 + np.arange(_CANDIDATES)) % width
        idle += 1
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
            idle[group[a]] = 0
    return bins


def _meetings(
    deviation: Float[np.ndarray, "bins dims"],
    group: Int[np.ndarray, " bins"],
    members: Int[np.ndarray, " groups"],
    idle: Int[np.ndarray, " groups"],
    turn: int,
) -> tuple[Int[np.ndarray, " pairs"], Int[np.ndarray, " pairs"]]:
    """Which bins meet in a round: the lighter and the heavier one of each pair.

    Args:
        deviation: Of the bins' totals from their targets.
        group: Of each bin; sorted.
        members: Bins of each group.
        idle: Rounds since each group's last swap; from `_ALIKE` on, others meet in every further one.
        turn: The round's number; the measure that decides who meets whom alternates with it.
    """
    starts = np.cumsum(members) - members
    rank = np.arange(len(group)) - starts[group]
    by_later = (turn % _ALIKE == _ALIKE - 1) & (idle[group] < _ALIKE)
    ranked = np.lexsort((np.where(by_later, deviation[:, -1], deviation[:, 0]), group))
    others = np.maximum(idle - _ALIKE + 1, 0)
    met = (members[group] - 1 - others[group] - rank) % members[group]
    first = rank < met
    return ranked[first], ranked[(starts[group] + met)[first]]


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
        added = delta + gaps[:, measure, None, None]
        delta *= weight
        added *= delta
        change += added
    if movable is not None:
        change = np.where(movable[0][:, :, None] & movable[1][:, None, :], change, np.inf)
    change = change.reshape(pairs, -1)
    best = change.argmin(axis=1)
    i, j = np.divmod(best, width)
    return i, j, np.take_along_axis(change, best[:, None], axis=1)[:, 0] < -1e-15
