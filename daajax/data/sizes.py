"""What each example needs of a row, in tokens: all that windows and rows are planned from."""

import dataclasses

import numpy as np
from jaxtyping import Float, Int

from daajax.data.tokens import TokenizedData


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What each of N examples needs of a row, in tokens.

    Attributes:
        tokens: Unique tokens, prompt once: the layout-independent measure that windows are balanced by.
        length: Row positions it takes: `tokens` with prefix sharing, more without.
        scored: Tokens with a log-prob, over all responses.
        keys: Keys that attention gathers: prompt and response, once per response.
        prefix_sharing: Whether the prompt lies in the row once.
        predicted: Most scored tokens that one position predicts: of each response one, behind a prompt that they share.
    """

    tokens: Int[np.ndarray, " examples"]
    length: Int[np.ndarray, " examples"]
    scored: Int[np.ndarray, " examples"]
    keys: Int[np.ndarray, " examples"]
    prefix_sharing: bool
    predicted: int

    @classmethod
    def of(cls, data: TokenizedData, *, prefix_sharing: bool) -> "Sizes":
        """The sizes of every example of a data set."""
        lengths = data.lengths.astype(np.int64)
        prompt, responses = lengths[:, 0], lengths[:, 1:]
        scored = data.scored_lengths().sum(axis=1, dtype=np.int64)
        tokens = lengths.sum(axis=1)
        keys = responses.sum(axis=1) + prompt * (responses > 0).sum(axis=1)
        predicted = responses.shape[1] if prefix_sharing else 1
        return cls(tokens, tokens if prefix_sharing else keys, scored, keys, prefix_sharing, predicted)

    @property
    def measures(self) -> Float[np.ndarray, "examples 2"]:
        """What windows are balanced by, whatever the layout: `tokens`, then `scored`; float64."""
        return np.stack([self.tokens, self.scored], axis=1).astype(np.float64)
