"""Labelled responses, as KTO and BCO learn from them: pairs taken apart, and mismatched responses beside the labelled.

Both make a data set of another, whose token ids they take as they are.
"""

import dataclasses
import hashlib

import numpy as np
from jaxtyping import Bool, Int, Int32, Int64

from daajax.data.draws import generator
from daajax.data.tokens import Ids, TokenizedData, array_digest
from daajax.errors import UserError

_PIECES_AT_ONCE = 1 << 16  # of tokens that are gathered; bounds what the indices of single tokens take


def unpaired(data: TokenizedData) -> TokenizedData:
    """Pairs as twice as many single responses: of each first the chosen with label 1, then the rejected with label 0.

    Args:
        data: Pairs.

    Returns:
        Examples with one response, called `<id>/chosen` and `<id>/rejected`; weights, scores and sources are those of
        the pairs. The last notice says what was done.

    Raises:
        UserError: If the data are no pairs, or have labels.
    """
    _check_responses(data, 2, "labelled responses are made of pairs")
    if data.labels is not None:
        raise UserError(
            "labelled responses are made of pairs without labels, but the data have both; keep the columns `chosen` "
            "and `rejected`, or rows of one response with a `label`."
        )
    count = len(data.weights)
    begins, lengths = _parts(data)
    lengths = lengths[:, [0, 1, 0, 2]].reshape(-1, 2)
    tokens, scored = _gather(data, begins[:, [0, 1, 0, 2]].reshape(-1, 2), lengths)
    twice = {"weights": data.weights, "sources": data.sources, "prompt_probabilities": data.prompt_probabilities}
    return dataclasses.replace(
        data,
        tokens=tokens,
        scored=scored,
        starts=_starts(lengths),
        lengths=lengths,
        labels=np.tile(np.array([1, 0], np.int8), count),
        scores=None if data.scores is None else data.scores.reshape(-1, 1),
        ids=Ids.of([f"{name}/{side}" for name in data.ids for side in ("chosen", "rejected")]),
        notices=[*data.notices, f"{count:,} pairs are taken apart: the chosen are wanted, the rejected are not"],
        digest=_digest(f"{data.digest} unpaired"),
        **{name: None if column is None else np.repeat(column, 2) for name, column in twice.items()},
    )


def with_mismatched(data: TokenizedData, *, seed: int, max_length: int) -> TokenizedData:
    """Single responses, each with another example's response behind the same prompt, for KTO's reference point.

    Args:
        data: Examples with one response.
        seed: With the data it fixes which is whose; see `partners`.
        max_length: Tokens of a response together with its prompt, at least those of the data's own; a mismatched one
            is cut to it.

    Returns:
        Examples with two responses: the second is another's as it is, with the tokens that are scored, but without a
        score. All else is the example's own. The last notice says what was done.

    Raises:
        UserError: If the examples have not one response, or too many of them the same prompt.
    """
    _check_responses(data, 1, "mismatched responses are put beside single ones")
    partner = partners(data, seed)
    begins, lengths = _parts(data)
    begins = np.concatenate([begins, begins[partner, 1:]], axis=1)
    theirs = np.minimum(lengths[partner, 1], max_length - lengths[:, 0])
    cut = int((theirs < lengths[partner, 1]).sum())
    lengths = np.concatenate([lengths, theirs[:, None]], axis=1)
    starts = _starts(lengths)
    tokens, scored = _gather(data, begins, lengths)
    scored[(starts[1:] - theirs)[lengths[:, 0] == 0]] = False  # behind an empty prompt nothing predicts a first token
    scores = data.scores
    return dataclasses.replace(
        data,
        tokens=tokens,
        scored=scored,
        starts=starts,
        lengths=lengths,
        scores=None if scores is None else np.concatenate([scores, np.full_like(scores, np.nan)], axis=1),
        notices=[
            *data.notices,
            f"beside each response lies another's, behind the same prompt; {cut:,} of them are cut at max_length",
        ],
        digest=_digest(f"{data.digest} mismatched {array_digest(partner)} {array_digest(lengths)}"),
    )


def partners(data: TokenizedData, seed: int) -> Int64[np.ndarray, " examples"]:
    """Whose response is put beside each example's own: a permutation that leads from no prompt to an equal one.

    The examples stand in a circle, those of one prompt side by side, otherwise in random order; each is given the
    response of the example as many steps ahead as the most frequent prompt has examples.

    Args:
        data: The examples.
        seed: With the data it fixes the order.

    Raises:
        UserError: If more than half of the examples have the same prompt.
    """
    prompts = _prompts(data)
    counts = np.bincount(prompts)
    most, count = int(counts.max()), len(prompts)
    if 2 * most > count:
        name = data.ids[int(np.flatnonzero(prompts == counts.argmax())[0])]
        raise UserError(
            f"each example needs a response to another prompt beside its own, but {most:,} of {count:,} examples have "
            f"the same prompt as {name!r}, more than half; add examples with other prompts, or remove some of these."
        )
    draw = generator("mismatched", seed=seed)
    order = draw.permutation(count)
    order = order[np.argsort(draw.permutation(len(counts))[prompts[order]], kind="stable")]
    found = np.empty(count, np.int64)
    found[order] = np.roll(order, -most)
    return found


def _prompts(data: TokenizedData) -> Int[np.ndarray, " examples"]:
    """A number for each example, the same for equal prompts."""
    numbers: dict[bytes, int] = {}
    starts = data.starts[:-1]
    found = [
        numbers.setdefault(hashlib.blake2b(data.tokens[start:end].tobytes(), digest_size=16).digest(), len(numbers))
        for start, end in zip(starts.tolist(), (starts + data.lengths[:, 0]).tolist(), strict=True)
    ]
    return np.array(found)


def _check_responses(data: TokenizedData, count: int, what: str) -> None:
    """Refuses data whose examples have not that number of responses."""
    found = data.lengths.shape[1] - 1
    if found != count:
        raise UserError(f"{what}, but the data have {found} responses a prompt, not {count}; choose other data.")
    if len(fewer := np.flatnonzero((data.lengths[:, 1:] == 0).any(axis=1))):
        raise UserError(
            f"{what}, but {len(fewer):,} of {len(data.weights):,} examples have fewer than {count} responses, such "
            f"as {data.ids[int(fewer[0])]!r}; complete or remove them."
        )


def _parts(data: TokenizedData) -> tuple[Int64[np.ndarray, "examples parts"], Int32[np.ndarray, "examples parts"]]:
    """Where each example's prompt and responses begin in the data's tokens, and how long they are."""
    ends = data.starts[:-1, None] + np.cumsum(data.lengths, axis=1, dtype=np.int64)
    return ends - data.lengths, np.asarray(data.lengths)


def _starts(lengths: Int32[np.ndarray, "examples parts"]) -> Int64[np.ndarray, " bounds"]:
    """Where examples of these lengths begin, and the end of the last one."""
    return np.concatenate([[0], np.cumsum(lengths.sum(axis=1, dtype=np.int64))])


def _gather(
    data: TokenizedData, begins: Int64[np.ndarray, "examples parts"], lengths: Int32[np.ndarray, "examples parts"]
) -> tuple[Int32[np.ndarray, " total"], Bool[np.ndarray, " total"]]:
    """Pieces of the data one after the other, and which of their tokens are scored."""
    begins, lengths = begins.ravel(), lengths.ravel()
    bounds = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    tokens, scored = np.empty(bounds[-1], np.int32), np.empty(bounds[-1], bool)
    for first in range(0, len(begins), _PIECES_AT_ONCE):
        pieces = slice(first, first + _PIECES_AT_ONCE)
        here = slice(bounds[pieces][0], bounds[pieces][0] + lengths[pieces].sum(dtype=np.int64))
        indices = np.arange(here.start, here.stop) + np.repeat(begins[pieces] - bounds[:-1][pieces], lengths[pieces])
        tokens[here], scored[here] = data.tokens[indices], data.scored[indices]
    return tokens, scored


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
