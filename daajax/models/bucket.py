"""Models in a bucket, `gs://bucket/folder`, copied to a cache of this machine.

TensorStore, which checkpoints go through as well, reads them; it finds the user's credentials by itself.
"""

import collections
import fnmatch
import hashlib
import json
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import tensorstore

from daajax import bucket, copies
from daajax.bucket import LOG_IN
from daajax.console import say
from daajax.errors import OutageError, UserError, one_line
from daajax.models.tensor_files import SECOND_COPY, STORED
from daajax.models.weights import SMALL

CACHE = pathlib.Path("~/.cache/daajax/models")
_PART_BYTES = 32 << 20  # read at once
_HEADER_BYTES = 100_000_000  # most that safetensors allows
_IN_FLIGHT = 8  # parts that are read ahead of what is written
_SMALL = "-without-weights"  # behind the name of a copy


def fetch(address: str, option: str, *, with_weights: bool, revision: str) -> tuple[str, str]:
    """A copy of a bucket's folder, and its revision: a digest of the generations of its files; see `directory.fetch`.

    Each revision is copied to a folder of its own, which is there whole or not at all. A copy that was interrupted is
    gone on with, file by file.
    """
    name = address.removeprefix("gs://").strip("/")
    home = CACHE.expanduser() / name.replace("/", "--")
    if revision and (copy := _copy_of(home, revision, with_weights)):
        return copy, revision
    try:
        store = tensorstore.KvStore.open(f"gs://{name}/", context=tensorstore.Context(bucket.RETRIES)).result()
        files = _generations(store)
        now = hashlib.sha256(json.dumps([name, sorted(files.items())]).encode()).hexdigest()[:40]
        if revision and now != revision:
            say(f"{option}: {address} has changed since the run began")
        with copies.alone(home):
            if not (copy := _copy_of(home, now, with_weights)):
                copy = str(home / f"{now}{'' if with_weights else _SMALL}")
                wanted = {file: files[file] for file in files if with_weights or not _is_among(file, STORED)}
                copies.make(pathlib.Path(copy), list(wanted), lambda name: _parts(store, name, wanted[name]), "fetch")
    except _UnusableError as error:
        raise UserError(f"{option}={address} {error}.") from None
    except OSError as error:
        raise UserError(f"{option}={address} cannot be copied to {home} ({error.strerror}); make room there.") from None
    except Exception as error:  # from TensorStore, of several kinds
        kind = OutageError if bucket.is_outage(error) else UserError
        raise kind(
            f"{option}={address} cannot be read ({one_line(error)}); check the name and the network, or {LOG_IN}."
        ) from None
    return copy, now


class _UnusableError(Exception):
    """A bucket holds nothing that can be copied; its text is the reason."""


def _copy_of(home: pathlib.Path, revision: str, with_weights: bool) -> str:
    """The folder of a whole copy, empty if there is none; where no weights are needed, one that has them serves too."""
    names = [revision] if with_weights else [revision, revision + _SMALL]
    return next((str(home / name) for name in names if (home / name).is_dir()), "")


def _generations(store: tensorstore.KvStore) -> dict[str, str]:
    """The files of a model, by name, each with what changes when it is written again."""
    names = sorted(key.decode(errors="replace") for key in store.list().result())
    names = [name for name in names if _is_among(name, (*STORED, *SMALL))]
    if not names:
        raise _UnusableError(f"holds no model that you may list: check the name, or {LOG_IN}")
    reads = {name: store.read(name, byte_range=slice(0, 0)) for name in names}
    return {name: read.result().stamp.generation.hex() for name, read in reads.items()}


def _is_among(name: str, patterns: Sequence[str]) -> bool:
    """Whether a name fits a pattern, where `*` stands for any text but a folder; a second copy never does."""
    return any(
        name.count("/") == pattern.count("/") and fnmatch.fnmatchcase(name, pattern) for pattern in patterns
    ) and not fnmatch.fnmatchcase(name, SECOND_COPY)


def _parts(store: tensorstore.KvStore, name: str, generation: str) -> Iterator[bytes]:
    """The content of a file, a part at a time."""
    if not name.endswith(".safetensors"):  # small
        yield _value(name, store.read(name), generation)
        return

    def read(begin: int, end: int) -> Any:
        return store.read(name, byte_range=slice(begin, end))

    # A store does not say how long a file is, but a file of safetensors does.
    length = int.from_bytes(_value(name, read(0, 8), generation), "little")
    header = _value(name, read(8, 8 + length), generation) if length <= _HEADER_BYTES else b""
    try:
        tensors = json.loads(header)
        ends = [tensor["data_offsets"][1] for key, tensor in tensors.items() if key != "__metadata__"]
        size = 8 + length + max(ends, default=0)
    except (ValueError, TypeError, LookupError, AttributeError):
        raise _UnusableError(f"holds {name}, which is no safetensors file: upload it again") from None
    ahead: collections.deque[Any] = collections.deque()
    for begin in range(0, size, _PART_BYTES):
        ahead.append(read(begin, min(begin + _PART_BYTES, size)))
        if len(ahead) == _IN_FLIGHT:
            yield _value(name, ahead.popleft(), generation)
    for last in ahead:
        yield _value(name, last, generation)


def _value(name: str, read: Any, generation: str) -> bytes:
    """What was read, if it is of the generation that was asked for."""
    try:
        found = read.result()
    except ValueError as error:
        if "OUT_OF_RANGE" not in str(error):
            raise
        raise _UnusableError(f"holds {name} cut off: upload it again") from None
    if found.stamp.generation.hex() != generation:
        raise _UnusableError(f"was written to while {name} was read: start again")
    return found.value
