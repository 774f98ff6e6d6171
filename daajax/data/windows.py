"""Windows: which examples each update consumes, in which place."""

import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int

from daajax.data.balance import even_out
from daajax.data.sizes import Sizes
from daajax.errors import UserError

BALANCED_WITHIN = 0.01  # relative spread of the windows' token totals that swaps aim at


def describe(updates: int, batch_size: int, examples: int, *, mixed: bool = False) -> str:
    """One line: how many updates, epochs and examples; unless sources are mixed, what the last epoch leaves over."""
    used = updates * batch_size
    line = f"{updates} updates of {batch_size} examples: {used / examples:.2f} epochs of {examples}"
    return line if mixed else f"{line}; {-used % examples} examples of the last epoch are not used"


def updates_of(*, steps: int | None, epochs: float | None, examples: int, batch_size: int) -> int:
    """Length of the run in updates; `steps` and `epochs` are two ways to say it, one of them None.

    Raises:
        UserError: If that is not at least one update.
    """
    updates = steps or math.floor((epochs or 0) * examples / batch_size + 1e-9)  # 0.57 * 100 is 56.99…
    if updates < 1:
        raise UserError(
            f"steps={steps}, epochs={epochs} with {examples} examples and batch_size={batch_size} give no update; "
            "raise them or lower batch_size."
        )
    return updates


def training_windows(
    sizes: Sizes,
    *,
    batch_size: int,
    updates: int,
    shuffle: bool,
    seed: int,
    sources: Sequence[Int[np.ndarray, " _"]] | None = None,
    shares: Sequence[float] | None = None,
) -> Int[np.ndarray, "updates batch_size"]:
    """Which examples each update consumes; update t does not depend on how many updates follow.

    Epoch permutations follow one another and are cut into windows, so a window may hold the end of one epoch and the
    beginning of the next. Shuffled windows are balanced within each epoch, by swaps; unshuffled ones follow file order.

    With `shares` each source has permutations of its own, which follow one another while the sources take turns. An
    epoch is still as many draws as there are examples in all: a small source with a large share is drawn repeatedly.

    Args:
        sizes: What each example needs.
        batch_size: Examples an update.
        updates: Updates wanted.
        shuffle: False keeps file order.
        seed: With the data it fixes the order.
        sources: The examples of each source. None: all are of one.
        shares: Of each source in what is drawn, > 0, in any unit. None: each example once an epoch.

    Raises:
        UserError: If there are fewer examples than one update needs.
    """
    measures = sizes.measures
    examples = len(measures)
    if examples < batch_size:
        raise UserError(
            f"data has {examples} usable examples but batch_size is {batch_size}; lower batch_size or add data."
        )
    if sources is None or shares is None:
        sources, shares = [np.arange(examples)], [1.0]
    needed = updates * batch_size
    stream = np.empty(math.ceil(needed / examples) * examples, np.int64)  # whole epochs
    turns = take_turns(shares, len(stream))
    for source, members in enumerate(sources):
        places = np.flatnonzero(turns == source)
        for walk, start in enumerate(range(0, len(places), len(members))):
            order = np.arange(len(members))
            if shuffle:
                order = np.random.default_rng([seed, walk, source]).permutation(len(members))
            here = places[start : start + len(members)]
            stream[here] = members[order[: len(here)]]
    if shuffle:
        for start in range(0, len(stream), examples):
            epoch = slice(start, start + examples)
            stream[epoch] = _balance(stream[epoch], measures, first_cut=-start % batch_size, batch_size=batch_size)
    return stream[:needed].reshape(updates, batch_size)


def take_turns(shares: Sequence[float], draws: int) -> Int[np.ndarray, " draws"]:
    """Which source each draw is from, so that every beginning holds them by their shares.

    Draw i of a source is due at (i + 1/2) / share. Of S sources whose shares sum to 1, the one with share s has had
    s · n draws of the first n, up to (1 + s · S) / 2 more or less.

    Args:
        shares: > 0, in any unit.
        draws: How many; those before do not depend on it.
    """
    parts = np.asarray(shares, np.float64) / np.sum(shares)
    counts = np.ceil(parts * (draws + len(parts))).astype(np.int64) + 1  # no source has more of the first draws
    due = np.concatenate([(np.arange(count) + 0.5) / part for count, part in zip(counts, parts, strict=True)])
    return np.repeat(np.arange(len(parts)), counts)[np.argsort(due, kind="stable")[:draws]]


def epochs_of(windows: Int[np.ndarray, "updates batch_size"], sources: Sequence[Int[np.ndarray, " _"]]) -> list[float]:
    """How often each source is gone through, on the average of its examples."""
    drawn = np.bincount(windows.ravel(), minlength=sum(map(len, sources)))
    return [float(drawn[members].mean()) for members in sources]


def sweep_windows(
    sizes: Sizes, *, batch_size: int, examples: Int[np.ndarray, " wanted"] | None = None
) -> Int[np.ndarray, "updates batch_size"]:
    """Windows that hold every example exactly once; the last is filled up with -1.

    Args:
        sizes: What each example needs.
        batch_size: Examples a window.
        examples: Indices of those to visit; None: all.
    """
    measures = sizes.measures
    examples = np.arange(len(measures)) if examples is None else examples
    order = np.random.default_rng(0).permutation(len(examples))
    order = _balance(order, measures[examples], first_cut=0, batch_size=batch_size)
    windows = np.full((math.ceil(len(examples) / batch_size), batch_size), -1, np.int64)
    windows.reshape(-1)[: len(examples)] = examples[order]
    return windows


def _balance(
    order: Int[np.ndarray, " examples"],
    measures: Float[np.ndarray, "examples dims"],
    *,
    first_cut: int,
    batch_size: int,
) -> Int[np.ndarray, " examples"]:
    """Swaps examples between the windows of one epoch until their totals agree; partial windows aim at their share."""
    examples = len(order)
    cuts = np.arange(first_cut, examples, batch_size)
    edges = np.unique(np.concatenate([[0], cuts, [examples]]))
    counts = np.diff(edges)
    bins = np.full((len(counts), batch_size), examples, np.int64)  # `examples` stands for no example
    inside = np.arange(batch_size) < counts[:, None]
    bins[inside] = order
    padded = np.concatenate([measures, np.zeros((1, measures.shape[1]))])
    targets = counts[:, None] * measures[order].mean(axis=0)
    room = BALANCED_WITHIN / 10 * np.tile(targets.max(axis=0) * [1, 4], (len(bins), 1))
    bins = even_out(
        bins,
        padded,
        targets,
        group=np.zeros(len(bins), np.int64),
        room=room,
        both_ways=True,
        all_meet=False,  # a run that goes on needs the windows that it began with
        movable=inside,
    )
    return bins[inside]
