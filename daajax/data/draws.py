"""Random draws, a function of the seed and of what they are for, whatever the layout, the mesh or the run's past.

Each kind has a stream of its own, so that asking for one changes no other. The bit generator is a counter-based one:
the generator of any place is had without those before it.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool

_STREAMS = ("mismatched", "gumbel", "kept", "reference_kept")  # a stream's place is its key: append only


def generator(stream: str, *, seed: int, update: int = 0, place: int = 0) -> np.random.Generator:
    """What is drawn for one example of one update.

    Args:
        stream: One of `_STREAMS`.
        seed: Of the run, >= 0.
        update: Which one.
        place: The example's place in it.
    """
    key, counter = [seed, _STREAMS.index(stream)], [0, 0, place, update]
    return np.random.Generator(np.random.Philox(key=key, counter=counter))


def keep(generator: np.random.Generator, lengths: Sequence[int]) -> list[Bool[np.ndarray, " scored"]]:
    """Draws, of each response, as many of its tokens as the shortest has, uniformly and without replacement.

    Args:
        generator: Of the example.
        lengths: Scored tokens of each response; 0: there is no such response.

    Returns:
        For each response which tokens are kept.
    """
    shortest = min((length for length in lengths if length), default=0)
    return [generator.permutation(length) < shortest for length in lengths]
