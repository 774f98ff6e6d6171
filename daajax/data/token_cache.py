"""Tokenized data, kept from run to run: one folder an entry, named by the digest of everything that goes into it.

An entry is written beside its place and renamed into it, so there is all of it or nothing. Every file is checked
against its digest before it is used: what is damaged is made again, and that is said. A cache in a bucket is used
through one on this machine: an entry is brought from there, or made and copied there.
"""

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import json
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from daajax import bucket
from daajax.console import say
from daajax.data import tokens
from daajax.data.chat import template_text
from daajax.data.sources import Source, open_source
from daajax.data.tokenization import tokenize
from daajax.data.tokenizer import TOKENIZER_FILES, check_vocabulary, load_tokenizer
from daajax.data.tokens import Ids, TokenizedData
from daajax.errors import UserError

LOCAL = Path("~/.cache/daajax/tokens")  # what a cache in a bucket is used through
FORMAT = 4  # raise it whenever the same rows would become other arrays
_META = "meta.json"  # what the other files of an entry must be
ARRAYS = (*tokens.ARRAYS, "starts", "id_text", "id_starts")  # the files of an entry, beside `tokens.COLUMNS`


class DamagedError(Exception):
    """An entry that cannot be used; its text is the reason."""


def tokenized(
    name: str,
    path: str | Path,
    tokenizer_path: str | Path,
    *,
    split: str | None = None,
    max_length: int,
    max_prompt_length: int | None = None,
    truncation: str = "truncate",
    template: str | None = None,
    score: str = "last",
    limit: int | None = None,
    max_bad_rows: int = 0,
    vocab_size: int | None = None,
    cache_dir: str | Path | None = None,
    option: str = "data",
) -> TokenizedData:
    """Reads and tokenizes a data set, or finds it in the cache.

    Args:
        name: See `sources.read`.
        path: See `sources.read`.
        tokenizer_path: See `load_tokenizer`.
        split: See `sources.read`.
        max_length: See `tokenization.Limits`.
        max_prompt_length: See `tokenization.Limits`.
        truncation: See `tokenization.Limits`.
        template: See `chat.load_template`.
        score: See `tokenize`.
        limit: See `sources.read`.
        max_bad_rows: See `sources.read`; tokenization continues the account.
        vocab_size: The model's, to check the tokenizer against.
        cache_dir: The cache's folder, made if need be; None keeps nothing.
        option: What these options are called in the config.

    Returns:
        The data, memory-mapped from the cache where there is one; the last notice says where they came from.

    Raises:
        UserError: If the data, the tokenizer, an option or the cache's folder is at fault.
    """
    source = open_source(name, path, split=split, option=option)
    tokenizer = load_tokenizer(tokenizer_path)
    if vocab_size is not None:
        check_vocabulary(tokenizer, vocab_size)
    limits = {"max_length": max_length, "max_prompt_length": max_prompt_length, "truncation": truncation}
    options = limits | {"template": template, "score": score}

    def make() -> tuple[TokenizedData, str]:
        start = time.perf_counter()
        data = tokenize(source.read(limit=limit, max_bad_rows=max_bad_rows), tokenizer, **options)
        return data, f"tokenized {data.counters['examples']:,} examples in {time.perf_counter() - start:.1f} s"

    if cache_dir is None:
        return _with_notices(*make())
    ingredients = options | {"name": name, "split": split, "limit": limit, "max_bad_rows": max_bad_rows}
    return _find_or_make(cache_dir, entry_key(source, Path(tokenizer_path), ingredients), make, option)


def _find_or_make(
    cache_dir: str | Path, key: str, make: Callable[[], tuple[TokenizedData, str]], option: str
) -> TokenizedData:
    """The entry of that key, memory-mapped; `make` gives what an absent or damaged one should hold, and a notice."""
    cache, notices = bucket.path_of(str(cache_dir), f"{option}.cache_dir"), []
    entry = (LOCAL if isinstance(cache, bucket.BucketPath) else cache).expanduser() / key
    if isinstance(cache, bucket.BucketPath) and not entry.exists():
        with _cache_errors_named(cache_dir, option):
            _bring(cache / key, entry)
    if entry.exists():
        try:
            found = load(entry)
            if isinstance(cache, bucket.BucketPath):
                _share(entry, cache / key)
            return _with_notices(found, f"cache: hit {entry.name}")
        except DamagedError as reason:
            notices.append(f"cache: entry {entry} is damaged ({reason}): made again")
    with _cache_errors_named(cache_dir, option):  # before the work, not after it
        entry.parent.mkdir(parents=True, exist_ok=True)
    data, notice = make()
    with _cache_errors_named(cache_dir, option):
        save(data, entry)
        data = load(entry)
    if isinstance(cache, bucket.BucketPath):
        _share(entry, cache / key, is_remade=True)
    return _with_notices(data, *notices, notice)


def _bring(source: bucket.BucketPath, entry: Path) -> None:
    """Copies an entry from a bucket, if all of it is there."""
    names = bucket.names(source)
    if _META not in names:
        return
    scratch = _scratch(entry)
    scratch.mkdir(parents=True)
    try:
        for name in names:
            with (scratch / Path(name).name).open("wb") as file:
                for part in bucket.parts(source / name):
                    file.write(part)
        _publish(scratch, entry)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _share(entry: Path, target: bucket.BucketPath, *, is_remade: bool = False) -> None:
    """Copies an entry to a bucket where it is not there or was made again; a bucket may be only to read from."""
    try:
        if is_remade or not bucket.is_object(target / _META):
            bucket.upload(entry, target, _META)
    except bucket.BucketError as error:
        say(f"{error} The run goes on with {entry}, which other hosts do not find")


def _scratch(entry: Path) -> Path:
    """A name beside an entry that nobody else writes to."""
    return entry.with_name(f"{entry.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")


@contextlib.contextmanager
def _cache_errors_named(cache_dir: str | Path, option: str) -> Iterator[None]:
    """Turns what the file system says into what the user can do."""
    try:
        yield
    except (OSError, DamagedError) as error:
        raise UserError(
            f"{option}.cache_dir={cache_dir} cannot keep the tokenized data ({error}); "
            "make room, make it writable, or name another folder"
        ) from error


def entry_key(source: Source, tokenizer_path: Path, options: dict[str, Any]) -> str:
    """The digest of everything that the tokenized data follow from.

    Args:
        source: The data: their files' content and names, by which rows without an id are called.
        tokenizer_path: The tokenizer's folder.
        options: All other arguments of reading and tokenizing.
    """
    files = sorted(file for pattern in (*TOKENIZER_FILES, "config.json") for file in tokenizer_path.glob(pattern))
    try:
        ingredients = {
            "format": FORMAT,
            "versions": {name: importlib.metadata.version(name) for name in ("tokenizers", "transformers", "jinja2")},
            "data": [[source.name_of(file), _file_digest(file)] for file in source.files],
            "tokenizer": [[str(file.relative_to(tokenizer_path)), _file_digest(file)] for file in files],
            "options": options | {"template": template_text(options["template"])},
        }
    except OSError as error:
        raise UserError(f"{error.filename} cannot be read ({error.strerror}); make it readable") from error
    return hashlib.sha256(_canonical(ingredients)).hexdigest()


def save(data: TokenizedData, entry: Path) -> None:
    """Writes an entry, so that it is there whole or not at all; if another process was first, its entry stays.

    Raises:
        OSError: If the folder cannot be written.
    """
    scratch = _scratch(entry)
    scratch.mkdir()
    try:
        files = {}
        for name, array in _arrays(data).items():
            file = scratch / f"{name}.npy"
            with file.open("wb") as handle:
                np.save(handle, array, allow_pickle=False)
                _flush(handle)
            files[file.name] = {"bytes": file.stat().st_size, "sha256": _file_digest(file)}
        content = {"key": entry.name, "files": files, "digest": data.digest}
        content |= {"counters": data.counters, "notices": data.notices}
        with (scratch / _META).open("wb") as handle:
            handle.write(_canonical({"sha256": hashlib.sha256(_canonical(content)).hexdigest(), "content": content}))
            _flush(handle)
        _flush_folder(scratch)
        _publish(scratch, entry)
        _flush_folder(entry.parent)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def load(entry: Path) -> TokenizedData:
    """Opens an entry; its arrays stay on disk until they are read.

    Raises:
        DamagedError: If any of it is missing, is not what was written, or was written for another key.
    """
    try:
        meta = json.loads((entry / _META).read_bytes())
        content = meta["content"]
        if hashlib.sha256(_canonical(content)).hexdigest() != meta["sha256"]:
            raise DamagedError("meta.json does not match its digest")
        if content["key"] != entry.name:
            raise DamagedError("it was written for another key")
        for name, expected in content["files"].items():
            if (entry / name).stat().st_size != expected["bytes"]:
                raise DamagedError(f"{name} has another size")
            if _file_digest(entry / name) != expected["sha256"]:
                raise DamagedError(f"{name} does not match its digest")
        names = [*ARRAYS, *(name for name in tokens.COLUMNS if f"{name}.npy" in content["files"])]
        arrays: dict[str, Any] = {
            name: np.asarray(np.load(entry / f"{name}.npy", mmap_mode="r", allow_pickle=False)) for name in names
        }
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DamagedError(f"{type(error).__name__}: {error}") from error
    ids = Ids(arrays.pop("id_text"), arrays.pop("id_starts"))
    return TokenizedData(
        **arrays, ids=ids, counters=content["counters"], notices=content["notices"], digest=content["digest"]
    )


def _publish(scratch: Path, entry: Path) -> None:
    """Renames a finished entry into its place, unless a good one is there."""
    try:
        scratch.rename(entry)
    except OSError:
        try:
            load(entry)
        except DamagedError:
            damaged = scratch.with_suffix(".damaged")
            entry.rename(damaged)
            scratch.rename(entry)
            if damaged.is_dir():
                shutil.rmtree(damaged)
            else:
                damaged.unlink()


def _arrays(data: TokenizedData) -> dict[str, np.ndarray]:
    """What an entry holds, by the name of its file."""
    columns = vars(data) | {"id_text": data.ids.text, "id_starts": data.ids.starts}
    return {name: columns[name] for name in (*ARRAYS, *tokens.COLUMNS) if columns[name] is not None}


def _with_notices(data: TokenizedData, *notices: str) -> TokenizedData:
    """The same data with more to say."""
    return dataclasses.replace(data, notices=[*data.notices, *notices])


def _canonical(content: dict[str, Any]) -> bytes:
    """JSON that is the same for equal content."""
    return json.dumps(content, sort_keys=True, separators=(",", ":"), default=str).encode()


def _file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(file: BinaryIO) -> None:
    """Waits until a file's content is on disk."""
    file.flush()
    os.fsync(file.fileno())


def _flush_folder(path: Path) -> None:
    """Waits until a folder's names are on disk."""
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
