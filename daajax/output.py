"""Output files, on this machine or in a bucket: there whole or not at all, and as JSON lines."""

import contextlib
import json
import math
import os
import pathlib
import secrets
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from daajax import bucket
from daajax.console import say
from daajax.errors import UserError


@contextlib.contextmanager
def replacing(path: bucket.Path) -> Iterator[pathlib.Path]:
    """A path on this machine to write to: what is written there takes the place of `path` once it is on disk.

    If the block raises, `path` is as it was and nothing is left beside it.

    Args:
        path: The file to make or replace; its folder exists.
    """
    if isinstance(path, bucket.BucketPath):
        with tempfile.TemporaryDirectory(prefix="daajax-") as folder:
            yield pathlib.Path(folder) / path.name
            path.write_bytes((pathlib.Path(folder) / path.name).read_bytes())
        return
    scratch = path.with_name(f"{path.name}.{secrets.token_hex(4)}.partial")
    try:
        yield scratch
        with scratch.open("rb") as written:
            os.fsync(written.fileno())
        scratch.replace(path)
    finally:
        with contextlib.suppress(OSError):
            scratch.unlink(missing_ok=True)


@contextlib.contextmanager
def replacing_folder(path: bucket.Path, *, last: str) -> Iterator[pathlib.Path]:
    """An empty folder on this machine to write to, which takes the place of `path` at the end.

    If the block raises, `path` is as it was. In a bucket there is no moment at which it changes as a whole: the file
    `last` is removed first and written last.

    Args:
        path: The folder to make or replace.
        last: The file without which the others are nothing.
    """
    if isinstance(path, bucket.BucketPath):
        with tempfile.TemporaryDirectory(prefix="daajax-") as folder:
            yield pathlib.Path(folder)
            void(path, last)
            bucket.upload(pathlib.Path(folder), path, last)
        return
    partial, aside = (path.with_name(path.name + ending) for ending in (".partial", ".old"))
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    yield partial
    if path.exists():  # set aside first, so that there is always a whole one
        shutil.rmtree(aside, ignore_errors=True)
        path.rename(aside)
    partial.rename(path)
    shutil.rmtree(aside, ignore_errors=True)


def void(path: bucket.BucketPath, last: str) -> None:
    """Removes a folder of a bucket, the file without which the others are nothing before them."""
    (path / last).unlink(missing_ok=True)
    bucket.remove(path, bucket.names(path))


def remove_folder(path: bucket.Path) -> None:
    """Removes a folder, if it is there and can be removed; that a bucket does not is said."""
    if isinstance(path, bucket.BucketPath):
        try:
            bucket.remove(path, bucket.names(path))
        except bucket.BucketError as error:
            say(f"{error} Until then {path} stays")
    else:
        shutil.rmtree(path, ignore_errors=True)


def append(path: bucket.Path, line: str) -> None:
    """Adds a line to a file, which is made if need be.

    Raises:
        OSError: If it cannot be written.
    """
    if not isinstance(path, bucket.BucketPath):
        with path.open("a", encoding="utf-8") as file:
            file.write(line)
        return
    is_tried = False
    while True:  # until nobody has written to it meanwhile
        try:
            found = bucket.read(path)
            content, generation = found.value, found.stamp.generation
        except FileNotFoundError:
            content, generation = b"", b""
        if is_tried and content.endswith(line.encode()):  # it was written, and the answer was lost
            return
        if bucket.write(path, content + line.encode(), only_at=generation) is not None:
            return
        is_tried = True


def copy(source: str, patterns: Sequence[str], folder: pathlib.Path) -> None:
    """Copies the files of a folder that match into another one, under the same names."""
    for file in (file for pattern in patterns for file in pathlib.Path(source).glob(pattern) if file.is_file()):
        target = folder / file.relative_to(source)
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(file, target)


def write_text(path: bucket.Path, text: str) -> None:
    """Makes or replaces a text file, UTF-8."""
    with replacing(path) as scratch:
        scratch.write_text(text, encoding="utf-8")


def as_json(values: Mapping[str, Any]) -> str:
    """One line of JSON; a number that is not finite, for which JSON has no name, is null."""
    return json.dumps(_finite(values), ensure_ascii=False) + "\n"


def check(path: bucket.Path) -> None:
    """Refuses, before the work is done, what `--output` names if it exists or cannot be written; makes its folder.

    Raises:
        UserError: If so.
    """
    if path.exists():
        raise UserError(f"--output={path} exists; name another file, or remove it.")
    with _refused(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, "")
        path.unlink()


def write_rows(path: bucket.Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Makes or replaces the JSON lines that `--output` names.

    Raises:
        UserError: If they cannot be written.
    """
    with _refused(path):
        write_text(path, "".join(map(as_json, rows)))


@contextlib.contextmanager
def _refused(path: bucket.Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"--output={path} cannot be written ({error.strerror}); name another file.") from None


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _finite(part) for name, part in value.items()}
    if isinstance(value, list):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
