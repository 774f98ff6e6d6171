"""Parts of rows: what each device has of a row whose length is cut over several.

Later tokens see more keys, and one long example would keep the device that has the end of a row busy twice as long as
the average. So a row is cut into chunks, dealt to the parts in turns, there and back: an array's tokens lie part by
part, and `order` says which of the row's they are. With two chunks a part, from either end of the row one, a sequence
is dealt evenly; where a prompt has several responses, keys are few again where the next one begins, and more chunks
even that out: of random pairs the busiest of 8 parts has 1.9 times the average at worst with 2 chunks, 1.2 times with 8
and 1.1 times with 16, and 2.2 times uncut. A chunk shorter than a block of attention would spread the block's queries.

Scored slots lie in the part of the state that predicts them, filled up from the front of each part.
"""

import numpy as np
from jaxtyping import Int, Shaped

LENGTH_MULTIPLE = 128  # row lengths and gathered keys come in whole attention blocks
SCORED_MULTIPLE = 8
CHUNKS = (16, 8, 4, 2)  # of a part, the most that are not too short; each divides `LENGTH_MULTIPLE`
LEAST_CHUNK = 512  # tokens, a block of attention


def length_multiple(parts: int) -> int:
    """What the length of a row is a multiple of, tokens: whole attention blocks in every part."""
    return LENGTH_MULTIPLE * parts


def order(length: int, parts: int) -> Int[np.ndarray, " length"]:
    """Which of a row's tokens lies in each place of an array.

    Args:
        length: Tokens of the row, a multiple of `length_multiple`.
        parts: Devices that it is cut over.
    """
    if parts == 1:
        return np.arange(length, dtype=np.int32)
    turns = np.arange(length, dtype=np.int32).reshape(_chunks(length // parts), parts, -1)
    dealt = np.where(np.arange(len(turns))[:, None, None] % 2, turns[:, ::-1], turns)
    return dealt.transpose(1, 0, 2).reshape(-1)


def _chunks(tokens: int) -> int:
    """How many chunks a part of so many tokens has."""
    return next((count for count in CHUNKS if tokens >= count * LEAST_CHUNK), CHUNKS[-1])


def places(length: int, parts: int) -> Int[np.ndarray, " length"]:
    """In which place of an array each token of a row lies: the inverse of `order`."""
    return np.argsort(order(length, parts)).astype(np.int32)


def scored_of_rows(most: int, length: int, slots: int, parts: int, responses: int) -> int:
    """Scored slots of a row, in all parts together, that are enough wherever its responses lie.

    Args:
        most: Scored tokens of a row.
        length: Its tokens.
        slots: Its examples.
        parts: Devices that it is cut over.
        responses: Most tokens that one state predicts, the last of a shared prompt: one of each response.
    """
    if parts == 1:
        return _whole(most)
    return parts * _whole(min(most, length // parts + slots * (responses - 1)))


def _whole(scored: int) -> int:
    return max(1, -(-scored // SCORED_MULTIPLE)) * SCORED_MULTIPLE


def scored_places(
    sources: Int[np.ndarray, "rows scored"], owners: Int[np.ndarray, "rows scored"], length: int, parts: int
) -> Int[np.ndarray, "rows scored"]:
    """In which slot each scored token lies, where slots are cut as the states are that predict them.

    Args:
        sources: In which place of its array each state lies.
        owners: Negative where a slot is empty.
        length: Tokens of a row.
        parts: Devices that it is cut over.

    Returns:
        Slots; -1 for what is empty.

    Raises:
        ValueError: If a part has too few.
    """
    room = owners.shape[1] // parts
    part = np.where(owners >= 0, sources // (length // parts), -1)
    found = np.full(owners.shape, -1)
    for here in range(parts):
        mine = part == here
        before = mine.cumsum(axis=1) - 1
        if (before >= room).any():
            raise ValueError(f"part {here} of a row scores {before.max() + 1} tokens and has room for {room}")
        found = np.where(mine, here * room + before, found)
    return found


def moved(
    values: Shaped[np.ndarray, "rows scored"], where: Int[np.ndarray, "rows scored"], empty: float | int | bool
) -> Shaped[np.ndarray, "rows scored"]:
    """Values in other slots.

    Args:
        values: As they are.
        where: The slot of each; -1: it is dropped.
        empty: What is in slots that nothing goes to.
    """
    found = np.full_like(values, empty)
    rows, slots = np.nonzero(where >= 0)
    found[rows, where[rows, slots]] = values[rows, slots]
    return found
