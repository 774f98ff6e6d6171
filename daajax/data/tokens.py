"""A tokenized data set: flat arrays that can lie in memory-mapped files, and the account of how they came about."""

import dataclasses
import hashlib
import re
from collections.abc import Mapping, Sequence
from typing import overload

import numpy as np
from jaxtyping import Bool, Float32, Int, Int8, Int16, Int32, Int64, UInt8

from daajax.errors import UserError

ARRAYS = ("tokens", "scored", "lengths", "weights")  # what every data set consists of
UNLABELLED = -1
_AT_ONCE = 2**16  # prompts and responses whose scored tokens are counted in one go
COLUMNS = {  # what some bring besides: (dtype, axes, value where there is none)
    "scores": (np.float32, ("examples", "responses"), np.nan),
    "labels": (np.int8, ("examples",), UNLABELLED),
    "prompt_probabilities": (np.float32, ("examples",), np.nan),
}

# The counters and, for what `summary` names when it happened, their meaning. Beside them are `truncated_<response>` and
# those of `sources.Examples`.
COUNTERS = {
    "examples": "",
    "examples_kept": "",
    "bad_rows": "bad rows skipped",
    "examples_with_later_turns": "examples with user or tool turns inside a response, scored with it",
    "examples_sorted_by_score": "examples whose responses were put in order of their scores, best first",
    "pairs_scored_against_their_order": "pairs whose rejected response has the higher score: kept as they are",
    "dropped_prompt_too_long": "examples dropped: the prompt leaves no room for a response",
    "dropped_too_long": "examples dropped: longer than the limits",
    "truncated_prompts": "prompts cut to max_prompt_length",
    "eos_kept": "",  # responses that were not cut: they end in EOS, chat as its template ends
    "responses_without_end": "responses of chats that no special token ends: nothing teaches the model to stop there",
    "eos_in_text": "responses whose text brought its own EOS: one is kept",
    "tools_not_rendered": "examples whose tools the chat template does not print",
    "messages_not_rendered": "examples with messages or calls of tools that the chat template does not print",
    "unknown_template_kwargs": "examples with chat_template_kwargs that the chat template does not know",
    "straddling_tokens": "tokens straddle the end of the prompt: scored",
    "unscored_first_tokens": "first tokens that nothing predicts: not scored",
    "double_bos_removed": "sequences with more than one BOS: one is kept",
    "identical_after_truncation": "examples with equal responses after tokenization and truncation: kept",
    "prompt_tokens": "",
    "response_tokens": "",
    "scored_tokens": "",
}


class Ids(Sequence[str]):
    """The examples' ids, as UTF-8 in one flat array, so that they can lie in a memory-mapped file.

    Attributes:
        text: All ids, one after the other.
        starts: Where each begins in `text`; one more than there are ids.
    """

    def __init__(self, text: UInt8[np.ndarray, " bytes"], starts: Int64[np.ndarray, " bounds"]) -> None:
        self.text = text
        self.starts = starts

    @classmethod
    def of(cls, ids: Sequence[str]) -> "Ids":
        """Packs ids."""
        encoded = [identity.encode() for identity in ids]
        starts = np.cumsum([0, *map(len, encoded)], dtype=np.int64)
        return cls(np.frombuffer(b"".join(encoded), np.uint8), starts)

    @classmethod
    def joined(cls, parts: Mapping[str, "Ids"]) -> "Ids":
        """The ids of several sources, each behind its source's name and a slash."""
        texts, sizes = [], []
        for name, ids in parts.items():
            prefix, count = np.frombuffer(f"{name}/".encode(), np.uint8), len(ids)
            starts = ids.starts + len(prefix) * np.arange(count + 1)
            text = np.empty(starts[-1], np.uint8)
            places = (starts[:-1, None] + np.arange(len(prefix))).ravel()
            text[places] = np.tile(prefix, count)
            text[np.delete(np.arange(len(text)), places)] = ids.text
            texts.append(text)
            sizes.append(np.diff(starts))
        return cls(np.concatenate(texts), np.concatenate([[0], np.cumsum(np.concatenate(sizes))]).astype(np.int64))

    def __len__(self) -> int:
        return len(self.starts) - 1

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[place] for place in range(len(self))[index]]
        place = range(len(self))[index]  # raises IndexError, and counts negative ones from the end
        return self.text[self.starts[place] : self.starts[place + 1]].tobytes().decode()


@dataclasses.dataclass(frozen=True, eq=False)
class TokenizedData:
    """Examples of up to K responses each, flat. The arrays may be memory-mapped and read-only.

    Attributes:
        tokens: Example after example: shared prompt, response 1, …, response K.
        scored: Whether the token counts towards its response's log-prob. A response may begin with tokens that do not:
            prompt tokens that differ between the responses.
        starts: Where each example begins in `tokens`, and the end of the last one.
        lengths: Tokens of the shared prompt, then of each response; 0: there is no such response.
        weights: Multiplies the example's loss.
        ids: The data's own ids, or "<file>:<row>"; of several sources, "<source>/<id>".
        counters: What was read, dropped, cut and found odd; `summary` says it in words.
        notices: One line each, to be printed.
        digest: SHA-256 over the arrays of `ARRAYS` and `COLUMNS`; of several sources, over theirs.
        scores: Of each response, the higher the better; NaN where there is none. None: no example has any.
        labels: 1 if the example's first response is wanted, 0 if not, `UNLABELLED`. None: no example has one.
        prompt_probabilities: Of a response to the example's prompt being wanted, in [0, 1]; NaN where it is not given.
            None: no example has one.
        source_names: Of the sources that the examples come from, each its own.
        sources: Index into `source_names`. None: all are of the first.
    """

    tokens: Int32[np.ndarray, " total"]
    scored: Bool[np.ndarray, " total"]
    starts: Int64[np.ndarray, " bounds"]
    lengths: Int32[np.ndarray, "examples parts"]
    weights: Float32[np.ndarray, " examples"]
    ids: Ids
    counters: dict[str, int]
    notices: list[str]
    digest: str
    scores: Float32[np.ndarray, "examples responses"] | None = None
    labels: Int8[np.ndarray, " examples"] | None = None
    prompt_probabilities: Float32[np.ndarray, " examples"] | None = None
    source_names: tuple[str, ...] = ("data",)
    sources: Int16[np.ndarray, " examples"] | None = None

    def by_source(self) -> dict[str, Int[np.ndarray, " _"]]:
        """Which examples come from each source, in the order of the data."""
        if self.sources is None:
            return {self.source_names[0]: np.arange(len(self.weights))}
        return {name: np.flatnonzero(self.sources == index) for index, name in enumerate(self.source_names)}

    def first_responses(self, count: int) -> "TokenizedData":
        """The same examples with only their first `count` responses."""
        lengths = np.ascontiguousarray(self.lengths[:, : 1 + count])
        kept = np.tile(np.arange(self.lengths.shape[1]) <= count, len(self.lengths))
        mask = np.repeat(kept, self.lengths.ravel())
        starts = np.concatenate([[0], np.cumsum(lengths.sum(axis=1, dtype=np.int64))])
        arrays = {"tokens": self.tokens[mask], "scored": self.scored[mask], "lengths": lengths, "weights": self.weights}
        for name, (_, axes, _) in COLUMNS.items():
            column = getattr(self, name)
            if column is not None:
                arrays[name] = np.ascontiguousarray(column[:, :count]) if "responses" in axes else column
        digests = {name: array_digest(array) for name, array in arrays.items()}
        return dataclasses.replace(self, **arrays, starts=starts, digest=digest(digests))

    def column(self, name: str) -> np.ndarray:
        """One of `COLUMNS`; of data that have none, filled with what stands for that."""
        dtype, axes, absent = COLUMNS[name]
        sizes = dict(examples=len(self.weights), responses=self.lengths.shape[1] - 1)
        column = getattr(self, name)
        return np.full([sizes[axis] for axis in axes], absent, dtype) if column is None else column

    def scored_lengths(self) -> Int32[np.ndarray, "examples responses"]:
        """Scored tokens of each response; 0: there is no such response."""
        sizes = self.lengths.ravel()
        counts = np.zeros(sizes.shape, np.int32)
        ends, there = np.cumsum(sizes, dtype=np.int64), np.flatnonzero(sizes)
        begins = (ends - sizes)[there]
        for first in range(0, len(there), _AT_ONCE):  # all at once, NumPy would hold a copy of `scored` as int32
            block = slice(first, first + _AT_ONCE)
            start, stop = begins[first], ends[there[block][-1]]
            counts[there[block]] = np.add.reduceat(self.scored[start:stop], begins[block] - start, dtype=np.int32)
        return counts.reshape(self.lengths.shape)[:, 1:]


def response_names(responses: int) -> tuple[str, ...]:
    """What counters call the responses of an example."""
    return {1: ("response",), 2: ("chosen", "rejected")}.get(
        responses, tuple(f"response_{index + 1}" for index in range(responses))
    )


def source_names(addresses: Sequence[tuple[str, str | None]]) -> list[str]:
    """Short names of sources, no two alike: `pairs` of data/pairs.jsonl.gz, `hh-rlhf-test` of its split.

    Args:
        addresses: Path and split of each.
    """
    names: list[str] = []
    for path, split in addresses:
        parts = [re.sub(r"\.(jsonl|jsonl\.gz|parquet)$", "", part) for part in path.rstrip("/").split("/")]
        ending = f"-{split}" if split else ""
        # As many folders as make it one of its own.
        choices = ["-".join(parts[-count:]) + ending for count in range(1, len(parts) + 1)]
        choices += [f"{choices[0]}-{number}" for number in range(2, len(addresses) + 2)]
        names.append(next(name for name in choices if name and name not in names))
    return names


def array_digest(array: np.ndarray) -> str:
    """SHA-256 of an array: its type, its shape and its bytes."""
    content = hashlib.sha256(f"{array.dtype.str} {array.shape} ".encode())
    content.update(np.ascontiguousarray(array).data)
    return content.hexdigest()


def digest(digests: Mapping[str, str]) -> str:
    """The digest of a data set from those of its arrays."""
    text = "".join(digests[name] for name in ARRAYS)
    text += "".join(f" {name} {digests[name]}" for name in COLUMNS if name in digests)
    return hashlib.sha256(text.encode()).hexdigest()


def concatenate(parts: Mapping[str, TokenizedData]) -> TokenizedData:
    """Several sources as one data set, one behind the other.

    Args:
        parts: By the name of their source.

    Raises:
        UserError: If they have not the same number of responses.
    """
    names, data = tuple(parts), list(parts.values())
    if len(data) == 1:
        return dataclasses.replace(data[0], source_names=names)
    counts = {name: part.lengths.shape[1] - 1 for name, part in parts.items()}
    if len(set(counts.values())) > 1:
        found = ", ".join(f"{count} in {name}" for name, count in counts.items())
        raise UserError(f"sources that are mixed need equally many responses an example, but there are {found}")
    arrays = {name: np.concatenate([getattr(part, name) for part in data]) for name in ARRAYS}
    sizes = [len(part.weights) for part in data]
    for name in COLUMNS:
        if any(getattr(part, name) is not None for part in data):
            arrays[name] = np.concatenate([part.column(name) for part in data])
    return TokenizedData(
        **arrays,
        starts=np.concatenate([[0], np.cumsum(arrays["lengths"].sum(axis=1, dtype=np.int64))]),
        ids=Ids.joined({name: part.ids for name, part in parts.items()}),
        counters={name: sum(part.counters.get(name, 0) for part in data) for part in data for name in part.counters},
        notices=[f"{name}: {notice}" for name, part in parts.items() for notice in part.notices],
        digest=hashlib.sha256(" ".join(part.digest for part in data).encode()).hexdigest(),
        source_names=names,
        sources=np.repeat(np.arange(len(data), dtype=np.int16), sizes),
    )


def summary(counters: Mapping[str, int]) -> list[str]:
    """What happened to the data, in lines to be printed: the totals, and everything odd that did happen.

    Args:
        counters: `TokenizedData.counters`.
    """
    lines = [
        f"{counters['examples_kept']:,} of {counters['examples']:,} examples kept",
        f"{counters['prompt_tokens']:,} tokens of prompts, {counters['response_tokens']:,} of responses, "
        f"{counters['scored_tokens']:,} scored",
    ]
    lines += [f"{counters[name]:,} {meaning}" for name, meaning in COUNTERS.items() if meaning and counters.get(name)]
    cut_responses = {
        name.removeprefix("truncated_"): count for name, count in counters.items() if name.startswith("truncated_")
    }
    cut_responses.pop("prompts", None)
    if any(cut_responses.values()):
        cut_ones = ", ".join(f"{count:,} {name}" for name, count in cut_responses.items())
        lines.append(f"responses cut at max_length: {cut_ones}; {counters['eos_kept']:,} kept their end")
    return lines
