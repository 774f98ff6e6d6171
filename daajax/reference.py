"""Reference log-probs: scored once by a jitted pass of their own, kept per token, found by content.

An objective may ask for the entropies of the reference's distributions too; they are a second column of the same
entries, there where it was asked for.

The cache has one entry a response, keyed by the digest of its token ids and of which of them are scored. Entries lie
in a folder named by what else they follow from: the reference's weights, its architecture and the compute dtype.
Objective, beta, learning rate, layout, mesh and output folder are not part of either key, so every run of a sweep
reads the same entries.

Files are Parquet with page checksums: readable anywhere, and a truncated or damaged one is noticed.
"""

import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
import pathlib
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Float, Int

from daajax import bucket, output, processes
from daajax.console import Progress
from daajax.data.ahead import made_ahead
from daajax.data.batches import Batch, Batches
from daajax.data.packing import Plan
from daajax.data.tokens import TokenizedData
from daajax.errors import UserError

FORMAT = 2  # raise it whenever the same weights and tokens would get other numbers, or the files another layout
_SAVE_SECONDS = 60.0  # what an interrupted pass can lose
_HEADER = b"daajax.reference"


Entry = dict[str, Float[np.ndarray, " scored"]]  # by column, of a response's scored tokens: nats


@dataclasses.dataclass(frozen=True)
class Header:
    """What every entry of a cache folder follows from, besides the tokens.

    Attributes:
        weights: `daajax.models.digest.digest_of` of the reference.
        architecture: Its architecture as a dict.
        dtype: Compute dtype.
    """

    weights: str
    architecture: dict[str, Any]
    dtype: str

    @property
    def content(self) -> bytes:
        """Canonical JSON."""
        return json.dumps({"format": FORMAT, **dataclasses.asdict(self)}, sort_keys=True).encode()

    @property
    def digest(self) -> str:
        """Name of the cache folder."""
        return hashlib.sha256(self.content).hexdigest()[:32]


class Cache:
    """Reference log-probs on disk.

    Args:
        folder: Root of all caches.
        header: What the entries follow from.
        columns: Keys of `daajax.ops.statistics.STATISTICS` that an entry must have to count; the first is `logps`.
        is_kept: Whether entries are read from disk and written to it: of several processes, the first one does that.

    Attributes:
        folder: Where its files lie.
        notices: Lines that say what was found damaged.

    Raises:
        UserError: If the folder cannot be written.
    """

    def __init__(self, folder: str, header: Header, columns: Sequence[str] = ("logps",), *, is_kept: bool = True):
        self._header, self.columns, self._is_kept = header, tuple(columns), is_kept
        self.folder = bucket.path_of(folder, "reference.cache_dir").expanduser() / header.digest
        self.notices: list[str] = []
        self._entries: dict[bytes, Entry] = {}
        if not is_kept:
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / "header.json").write_bytes(header.content)
        except OSError as error:
            raise UserError(
                f"reference.cache_dir={folder} cannot be written ({error.strerror}); name another folder."
            ) from None
        for file in sorted(self.folder.glob("part-*.parquet")):
            self._read(file)

    def get(self, key: bytes, length: int) -> Entry | None:
        """The columns of a response's scored tokens; None if no sound entry of that length has all of them."""
        entry = self._entries.get(key, {})
        return entry if all(len(entry.get(name, ())) == length for name in self.columns) else None

    def append(self, entries: Mapping[bytes, Entry]) -> None:
        """Writes entries, which have all columns, as one further file, whole or not at all.

        What an entry has already stays as it is: whoever read it has computed with it to the last bit.
        """
        if not entries or not self._is_kept:
            return
        entries = {key: {**entry, **self._entries.get(key, {})} for key, entry in entries.items()}
        lists = {}
        for name in self.columns:
            values = [entry[name] for entry in entries.values()]
            offsets = np.cumsum([0, *map(len, values)], dtype=np.int64)
            flat = np.concatenate([np.zeros(0, np.float32), *values]).astype(np.float32)
            lists[name] = pa.LargeListArray.from_arrays(pa.array(offsets), pa.array(flat))
        table = pa.table({"response": pa.array(list(entries), pa.binary(16)), **lists})
        table = table.replace_schema_metadata({_HEADER: self._header.content})
        file = self.folder / f"part-{secrets.token_hex(8)}.parquet"
        try:
            with output.replacing(file) as scratch:
                pq.write_table(table, scratch, compression="none", use_dictionary=False, write_page_checksum=True)
        except OSError as error:
            raise UserError(
                f"reference cache {self.folder} cannot be written ({error}); make room or name another folder."
            ) from None
        self._entries.update(entries)

    def _read(self, file: bucket.Path) -> None:
        source = file if isinstance(file, pathlib.Path) else pa.BufferReader(file.read_bytes())
        try:
            table = pq.read_table(source, page_checksum_verification=True)
            if (table.schema.metadata or {}).get(_HEADER) != self._header.content:
                raise ValueError("it was written for another reference")
            keys = table.column("response").to_pylist()
            columns = {}
            for name in ("logps", *(set(table.column_names) & set(self.columns) - {"logps"})):
                column = table.column(name).combine_chunks()
                flat, offsets = np.asarray(column.values), np.asarray(column.offsets)
                if len(keys) and not np.isfinite(flat).all():
                    raise ValueError("it holds numbers that are not finite")
                columns[name] = [flat[begin:end] for begin, end in itertools.pairwise(offsets)]
        except (OSError, ValueError, KeyError, AttributeError, pa.ArrowException) as error:
            aside = file.with_suffix(".damaged")
            with contextlib.suppress(OSError):
                file.rename(aside)
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            self.notices.append(
                f"reference cache: {file} is damaged ({reason}); "
                f"set aside as {aside.name}, its entries are scored again"
            )
            return
        for place, key in enumerate(keys):
            found = {name: column[place] for name, column in columns.items()}
            self._entries[key] = self._entries.get(key, {}) | found  # an older file may have fewer columns


@dataclasses.dataclass(frozen=True)
class Response:
    """Where a response lies in the data: its key and its scored tokens."""

    key: bytes
    tokens: Int[np.ndarray, " scored"]  # indices into the data's flat tokens


def responses_of(data: TokenizedData, example: int) -> list[Response]:
    """The responses of an example that exist."""
    lengths = data.lengths[example]
    begin = data.starts[example]
    prompt = slice(begin, begin + lengths[0])
    found, cursor = [], prompt.stop
    for length in lengths[1:]:
        if length:
            span = slice(cursor, cursor + length)
            ids = np.concatenate([data.tokens[prompt], data.tokens[span]]).astype("<i4")
            scored = np.concatenate([data.scored[prompt], data.scored[span]])
            content = hashlib.blake2b(ids.tobytes(), digest_size=16, person=b"response")
            content.update(np.packbits(scored).tobytes())
            found.append(Response(content.digest(), span.start + np.nonzero(data.scored[span])[0]))
        cursor += length
    return found


def examples_of(plan: Plan) -> Int[np.ndarray, " some"]:
    """The examples that a plan visits, each once."""
    return np.unique(plan.windows[plan.windows >= 0])


def missing(data: TokenizedData, examples: Int[np.ndarray, " some"], cache: Cache) -> Int[np.ndarray, " fewer"]:
    """Those of the examples that have a response which the cache lacks."""
    lacking = [
        example
        for example in examples.tolist()
        if any(cache.get(response.key, len(response.tokens)) is None for response in responses_of(data, example))
    ]
    return np.array(lacking, np.int64)


def score_pass(
    data: TokenizedData,
    plan: Plan,
    score: Callable[[Batch, int], Mapping[str, Any]],
    cache: Cache,
    *,
    what: str,
) -> None:
    """The reference pass: scores every example of a plan and writes the cache as it goes.

    Args:
        data: The examples.
        plan: Windows over the examples to score.
        score: From one micro-batch on the host and the capacity in gathered keys to the cache's columns, each
            `[rows, scored]`.
        cache: Where they go.
        what: Name of the reference, for the progress line.

    Raises:
        UserError: If a log-prob is not finite.
    """
    batches = Batches(data, plan)
    progress = Progress(f"reference pass ({what})", plan.updates, "batch")
    columns = {name: np.zeros(len(data.tokens), np.float32) for name in cache.columns}
    unsaved: dict[bytes, Entry] = {}
    saved = time.perf_counter()
    with contextlib.closing(made_ahead(batches.fill, range(plan.updates))) as filled:
        for update, (batch, indices) in enumerate(filled):
            keys = plan.shape(update).keys
            for part in range(plan.micro_batches):
                found = score({name: value[part] for name, value in batch.items()}, keys)
                real = indices[part] >= 0
                for name, column in columns.items():
                    column[indices[part][real]] = np.asarray(found[name])[real]
            for example in plan.windows[update].tolist():
                for response in responses_of(data, example) if example >= 0 else ():
                    entry = unsaved[response.key] = {name: values[response.tokens] for name, values in columns.items()}
                    if not all(np.isfinite(values).all() for values in entry.values()):
                        raise UserError(
                            f"the log-probs of {what} for example {data.ids[example]!r} are not finite; "
                            "check the model's weights and model.dtype."
                        )
            if time.perf_counter() - saved > _SAVE_SECONDS:
                cache.append(unsaved)
                unsaved, saved = {}, time.perf_counter()
            progress.advance()
            if processes.is_stopping():
                processes.first_alone(functools.partial(cache.append, unsaved))
                done = f"{update + 1} of {plan.updates} batches of the reference pass are in the cache"
                raise processes.StoppedError(done)
    processes.first_alone(lambda: cache.append(unsaved))
    progress.close()


def columns_of(
    data: TokenizedData, examples: Int[np.ndarray, " some"], cache: Cache
) -> dict[str, Float[np.ndarray, " total"]]:
    """The cache's columns for each of the data's tokens, nats; NaN where the examples have none.

    Raises:
        KeyError: If the cache lacks a response of the examples.
    """
    columns = {name: np.full(len(data.tokens), np.nan, np.float32) for name in cache.columns}
    for example in examples.tolist():
        for response in responses_of(data, example):
            entry = cache.get(response.key, len(response.tokens))
            if entry is None:
                raise KeyError(f"the reference cache lacks a response of example {example}")
            for name, column in columns.items():
                column[response.tokens] = entry[name]
    return columns
