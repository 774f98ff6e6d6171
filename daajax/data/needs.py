"""Whether data have what an objective reads of them besides token ids."""

from collections.abc import Sequence

import numpy as np

from daajax.data.tokens import COLUMNS, TokenizedData

_REMEDIES = {
    "scores": "add `score_chosen` and `score_rejected` to pairs, `scores` to lists of responses",
    "labels": "add `label` to single responses, true where they are wanted, else false",
    "prompt_probabilities": "add `prompt_probability` to single responses, a number from 0 to 1",
    "finished": "it is known only of responses that are sampled in training",
}


def lacking(data: TokenizedData, fields: Sequence[str]) -> str | None:
    """What an objective misses, as the rest of a line that begins with its name; None if it misses nothing.

    Args:
        data: The examples.
        fields: What it reads, of `Objective.reads`.
    """
    for field in fields:
        missing = _missing(data, field)
        if len(missing):
            return (
                f"needs {field} but {len(missing):,} of {len(data.weights):,} examples have none, such as "
                f"{data.ids[int(missing[0])]!r}: {_REMEDIES[field]}."
            )
    return None


def _missing(data: TokenizedData, field: str) -> np.ndarray:
    """The examples that lack it, or that have a response which does."""
    if field not in COLUMNS:
        return np.arange(len(data.weights))
    absent, values = COLUMNS[field][2], data.column(field)
    found = np.isnan(values) if np.isnan(absent) else values == absent
    if found.ndim == 2:
        found = (found & (data.lengths[:, 1:] > 0)).any(axis=1)
    return np.flatnonzero(found)
