"""Buckets of Google Cloud Storage as folders: what `gs://bucket/folder` means wherever an option takes it.

TensorStore reads and writes the objects; it finds the user's credentials by itself, and asks `TENSORSTORE_GCS_HTTP_URL`
where that is set. `path_of` gives a path that is used as a local one is, by Orbax too. What differs:

- A folder is there as long as an object lies in it; making one does nothing.
- An object is written when its file is closed, whole or not at all. Nothing is appended.
- Renaming copies, object by object, through this machine.

A bucket that does not answer, or only that it cannot now, is asked again for about five minutes; then that is an
outage, after which the same command may be started again.
"""

import collections
import contextlib
import errno
import fnmatch
import functools
import io
import os
import pathlib
import posixpath
import re
from collections.abc import Iterator, Sequence
from typing import Any

import tensorstore
from etils import epath
from etils.epath import backend, gpath, stat_utils

from daajax.errors import OutageError, UserError, one_line

LOG_IN = "log in with `gcloud auth application-default login`"
# Seven times within half a minute, then every half minute.
RETRIES = {"gcs_request_retries": {"max_retries": 16, "initial_delay": "250ms", "max_delay": "32s"}}
_SCHEME = "gs://"
_NAME = re.compile(r"gs://[a-z0-9][a-z0-9._-]+(/[^/?#*\[\]\s]+)+")
_ABSENT = b"\x02"  # the generation that TensorStore gives to what is not there; with an empty one it asks for nothing
_IN_FLIGHT = 16  # objects that are removed at a time
_GRANT = "have its owner grant you the role roles/storage.objectUser"
_PART_BYTES, _READ_AHEAD = 32 << 20, 4  # of an object, read at once; parts that are read ahead of what is used
_CODE = re.compile(r"http_response_code='(\d+)'")
_GIVEN_UP = re.compile("retry attempts failed")  # what TensorStore asked for again and again; of others, none says so
_HELPS = {  # code of an answer: what the user can do
    "401": f"it is not open to everybody; {LOG_IN}",
    "403": f"your credentials do not open it; {LOG_IN} as somebody who may, or {_GRANT}",
    "404": "there is no such bucket; check the name, or make it",
}


class BucketError(UserError):
    """A bucket that does not give or take an object. That there is none is a FileNotFoundError, as on a disk."""


class BucketOutageError(BucketError, OutageError):
    """A bucket that does not answer, or only that it cannot now."""


def path_of(address: str, option: str) -> "Path":
    """The path that an option names: on this machine or in a bucket.

    Args:
        address: What the user says.
        option: Which names it, such as `--workdir`, for messages.

    Raises:
        UserError: If it is an address of another kind, or of no folder in a bucket.
    """
    scheme, is_address, _ = address.partition("://")
    if not is_address:
        if re.match("[a-z0-9]+:/", address):
            raise UserError(f"{option}={address} is neither a folder nor an address; two slashes follow the colon.")
        return pathlib.Path(address)
    if scheme != "gs":
        raise UserError(
            f"{option}={address}: {scheme}:// is neither read nor written; name a folder or gs://bucket/folder."
        )
    if not _NAME.fullmatch(address.rstrip("/")) or {".", ".."} & set(address.split("/")):
        raise UserError(
            f"{option}={address} is no folder in a bucket; needed is gs://bucket/folder, without spaces and any of "
            "? # * [ ]."
        )
    return BucketPath(address.rstrip("/"))


class _Objects(backend.Backend):
    """The objects of all buckets, as etils asks for files."""

    def open(self, path: Any, mode: str) -> Any:
        if "a" in mode:
            raise io.UnsupportedOperation(f"{os.fspath(path)}: nothing is appended to an object")
        if "w" in mode:
            upload = _Upload(os.fspath(path))
            return upload if "b" in mode else _TextUpload(upload)
        file = io.BytesIO(read(path).value)
        return file if "b" in mode else io.TextIOWrapper(file, encoding="utf-8")

    def exists(self, path: Any) -> bool:
        return is_object(path) or self.isdir(path)

    def isdir(self, path: Any) -> bool:
        return bool(names(path))

    def listdir(self, path: Any) -> list[str]:
        if not (found := names(path)):
            raise FileNotFoundError(errno.ENOENT, "No such folder", os.fspath(path))
        return sorted({name.partition("/")[0] for name in found})

    def glob(self, path: Any) -> list[str]:
        folder, _, pattern = os.fspath(path).rpartition("/")
        if any(letter in folder for letter in "*?["):
            raise NotImplementedError(f"{os.fspath(path)}: a pattern may be in the last part alone")
        there = {name.partition("/")[0] for name in names(folder)}
        return [f"{folder}/{name}" for name in sorted(there) if fnmatch.fnmatchcase(name, pattern)]

    def walk(self, top: Any, *, top_down: bool = True, on_error: Any = None) -> Iterator[Any]:
        del on_error
        folders: dict[str, tuple[list[str], list[str]]] = {"": ([], [])}
        for name in sorted(names(top)):
            *above, last = name.split("/")
            for depth, folder in enumerate(above):
                if (key := "/".join(above[: depth + 1])) not in folders:
                    folders[key] = [], []
                    folders["/".join(above[:depth])][0].append(folder)
            folders["/".join(above)][1].append(last)
        found = [(posixpath.join(os.fspath(top), key), *inside) for key, inside in folders.items()]
        yield from found if top_down else reversed(found)

    def makedirs(self, path: Any, *, exist_ok: bool = False, mode: int | None = None) -> None:
        self.mkdir(path, exist_ok=exist_ok, mode=mode)

    def mkdir(self, path: Any, *, exist_ok: bool = False, mode: int | None = None) -> None:
        del mode
        if not exist_ok and self.exists(path):
            raise FileExistsError(errno.EEXIST, "It is there", os.fspath(path))

    def rmtree(self, path: Any) -> None:
        remove(path, found := names(path))
        if not found:
            raise FileNotFoundError(errno.ENOENT, "No such folder", os.fspath(path))

    def remove(self, path: Any) -> None:
        read(path, slice(0, 0))
        write(path, None)

    def rename(self, path: Any, dst: Any) -> None:
        if self.exists(dst):
            raise FileExistsError(errno.EEXIST, "It is there", os.fspath(dst))
        self.replace(path, dst)

    def replace(self, path: Any, dst: Any) -> None:
        inside = names(path)
        for name in inside:
            self.copy(posixpath.join(os.fspath(path), name), posixpath.join(os.fspath(dst), name), True)
        if is_object(path):
            self.copy(path, dst, True)
            self.remove(path)
        elif not inside:
            raise FileNotFoundError(errno.ENOENT, "No such file", os.fspath(path))
        remove(path, inside)

    def copy(self, path: Any, dst: Any, overwrite: bool) -> None:
        if not overwrite and self.exists(dst):
            raise FileExistsError(errno.EEXIST, "It is there", os.fspath(dst))
        write(dst, read(path).value)

    def stat(self, path: Any) -> stat_utils.StatResult:
        is_folder = not is_object(path)
        if is_folder and not self.isdir(path):
            raise FileNotFoundError(errno.ENOENT, "No such file", os.fspath(path))
        length = 0 if is_folder else len(read(path).value)
        return stat_utils.StatResult(is_directory=is_folder, length=length, mtime=0)


class _Upload(io.BytesIO):
    """A file that becomes an object when it is closed, unless what fills it fails, or nobody holds it any more."""

    def __init__(self, path: str):
        super().__init__()
        self._path: str | None = path

    def discard(self) -> None:
        """Leaves the object as it is, now and when the file is closed."""
        self._path = None

    def __exit__(self, kind: Any, *exception: Any) -> None:
        if kind is not None:
            self.discard()
        self.close()

    def __del__(self) -> None:
        self.discard()  # whoever did not close it was interrupted, and it may not be whole

    def close(self) -> None:
        path, self._path = self._path, None
        try:
            if path is not None:
                write(path, self.getvalue())
        finally:
            super().close()


class _TextUpload(io.TextIOWrapper):
    """The same of a text, UTF-8; Python's own closes what is beneath it, whatever happened."""

    def __init__(self, upload: _Upload):
        super().__init__(upload, encoding="utf-8")
        self._upload = upload

    def __exit__(self, kind: Any, *exception: Any) -> None:
        if kind is not None:
            self._upload.discard()
        self.close()

    def __del__(self) -> None:
        self._upload.discard()


@epath.register_path_cls(_SCHEME)
class BucketPath(gpath.PosixGPath):
    """A path in a bucket; Orbax finds its way by it too."""

    @property
    def _backend(self) -> backend.Backend:
        return _OBJECTS

    def resolve(self, strict: bool = False) -> "BucketPath":
        """Itself."""
        del strict
        return self


Path = pathlib.Path | BucketPath  # a path on this machine or in a bucket
_OBJECTS = _Objects()


def is_object(path: str | os.PathLike[str]) -> bool:
    """Whether there is an object of that name."""
    try:
        read(path, slice(0, 0))
    except FileNotFoundError:
        return False
    return True


def read(
    path: str | os.PathLike[str], part: slice | None = None, *, seconds: float | None = None
) -> tensorstore.KvStore.ReadResult:
    """An object's content, or a part of it, and its generation.

    Args:
        path: Its name.
        part: None: all of it.
        seconds: After which it is not asked for any more; None: as `RETRIES` says.

    Raises:
        FileNotFoundError: If there is none.
        BucketError: If the bucket does not give it.
    """
    store, key = _split(path)
    with _named(path, "read"):
        found = store.read(key, byte_range=part).result(timeout=seconds)
    if found.state == "missing":
        raise FileNotFoundError(errno.ENOENT, "No such object", os.fspath(path))
    return found


def parts(path: str | os.PathLike[str], generation: bytes | None = None) -> Iterator[bytes]:
    """An object's content, some of it at a time; a bucket does not say how much there is.

    Args:
        path: Its name.
        generation: The one that is asked for; None: the one that it has when the first part is read.

    Raises:
        FileNotFoundError: If there is none.
        BucketError: If the bucket does not give it, or it is of another generation.
    """
    store, key = _split(path)

    def read_part(begin: int) -> tensorstore.Future[tensorstore.KvStore.ReadResult]:
        return store.read(key, byte_range=slice(begin, begin + _PART_BYTES))

    ahead, asked = collections.deque([read_part(0)]), 1  # of one that is small there is no more than that
    begin, is_last = 0, False
    while not is_last:
        with _named(path, "read"):
            try:
                found = ahead.popleft().result()
                while len(ahead) < _READ_AHEAD:
                    ahead.append(read_part(asked * _PART_BYTES))
                    asked += 1
            except ValueError as error:
                if "OUT_OF_RANGE" not in str(error):
                    raise
                # It ends within this part, which the bucket gives when it is asked for the rest.
                is_last, found = True, _rest(store, key, begin)
        if found is None:
            return
        if found.state == "missing":
            raise FileNotFoundError(errno.ENOENT, "No such object", os.fspath(path))
        if generation is None:
            generation = found.stamp.generation
        if found.stamp.generation != generation:
            raise BucketError(f"{os.fspath(path)} was written to while it was read; start again.")
        yield found.value
        begin += len(found.value)


def _rest(store: tensorstore.KvStore, key: str, begin: int) -> tensorstore.KvStore.ReadResult | None:
    """What an object has from there on; None if that is nothing."""
    try:
        return store.read(key, byte_range=slice(begin, None)).result()
    except ValueError as error:
        if begin and "OUT_OF_RANGE" in str(error):
            return None
        raise


def write(
    path: str | os.PathLike[str],
    content: bytes | None,
    *,
    only_at: bytes | None = None,
    seconds: float | None = None,
) -> bytes | None:
    """Makes or replaces an object; None removes it.

    Args:
        path: Its name.
        content: Its content.
        only_at: The generation that it must be of, empty where there must be none; None: whatever there is.
        seconds: After which it is not tried any more, though it may have been done; None: as `RETRIES` says.

    Returns:
        Its generation; None where it was of another than `only_at`.

    Raises:
        BucketError: If the bucket does not take it.
    """
    store, key = _split(path)
    with _named(path, "written"):
        stamp = store.write(key, content, if_equal=_ABSENT if only_at == b"" else only_at).result(timeout=seconds)
    return None if stamp.generation == b"" and only_at is not None else stamp.generation


def names(folder: str | os.PathLike[str]) -> list[str]:
    """The names of all objects in a folder and the folders in it, behind the folder's own.

    Raises:
        BucketError: If the bucket does not say.
    """
    store, key = _split(folder)
    prefix = f"{key}/".encode() if key else b""
    # "0" comes behind "/".
    within = tensorstore.KvStore.KeyRange(prefix, prefix[:-1] + b"0" if prefix else b"")
    with _named(folder, "read"):
        found = store.list(within, strip_prefix_length=len(prefix)).result()
    return sorted(name for name in (key.decode(errors="replace") for key in found) if name)


def remove(folder: str | os.PathLike[str], within: Sequence[str]) -> None:
    """Removes objects of a folder."""
    store, key = _split(folder)
    with _named(folder, "written"):
        for first in range(0, len(within), _IN_FLIGHT):
            some = [store.write(f"{key}/{name}", None) for name in within[first : first + _IN_FLIGHT]]
            for removal in some:
                removal.result()


def upload(source: pathlib.Path, target: str | os.PathLike[str], last: str = "") -> None:
    """Writes the files of a folder of this machine to one in a bucket.

    Args:
        source: The folder.
        target: Where they go, under the same names; what else is there stays.
        last: The file without which the others are nothing; it is written when they all are there.

    Raises:
        BucketError: If the bucket does not take one.
    """
    files = sorted(file for file in source.rglob("*") if file.is_file())
    for file in sorted(files, key=lambda file: file == source / last):
        write(posixpath.join(os.fspath(target), file.relative_to(source).as_posix()), file.read_bytes())


@functools.cache
def store_of(name: str) -> tensorstore.KvStore:
    """A bucket by its name."""
    context = tensorstore.Context(RETRIES)
    return tensorstore.KvStore.open({"driver": "gcs", "bucket": name, "path": ""}, context=context).result()


def _split(path: str | os.PathLike[str]) -> tuple[tensorstore.KvStore, str]:
    """The bucket of a path, and the key in it."""
    name, _, key = os.fspath(path).removeprefix(_SCHEME).partition("/")
    with _named(path, "read"):
        return store_of(name), key.rstrip("/")


@contextlib.contextmanager
def _named(path: str | os.PathLike[str], done: str) -> Iterator[None]:
    """Turns what TensorStore raises into what the user can do."""
    try:
        yield
    except Exception as error:  # of several kinds
        raise refused(path, done, error) from None


def refused(path: str | os.PathLike[str], done: str, error: Exception) -> BucketError:
    """What an error of TensorStore says of a path in a bucket."""
    kind = BucketOutageError if is_outage(error) else BucketError
    return kind(f"{os.fspath(path)} cannot be {done} ({_reason(error)}")


def is_out_of_reach(error: Exception) -> bool:
    """Whether an error of TensorStore says nothing of what lies in a bucket, since that did not answer, or not us."""
    return bool(_CODE.search(str(error)) or is_outage(error))


def is_outage(error: Exception) -> bool:
    """Whether an error of TensorStore says that a bucket did not answer, or only that it cannot now."""
    code = _CODE.search(str(error))
    is_refusal = code is not None and code[1] in _HELPS
    return isinstance(error, TimeoutError) or (bool(_GIVEN_UP.search(str(error))) and not is_refusal)


def _reason(error: Exception) -> str:
    """What TensorStore says, in brackets that a caller opened, and behind them what helps."""
    name = one_line(error).rstrip(": ")  # a timeout says nothing but its kind
    code = _CODE.search(str(error))
    if code is None or code[1] not in _HELPS:
        return f"{name}); check the network, then start the same command again."
    return f"HTTP {code[1]}): {_HELPS[code[1]]}."
