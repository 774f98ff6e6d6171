"""Output files: there whole or not at all, and as JSON lines."""

import contextlib
import json
import math
import os
import pathlib
import secrets
import shutil
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from daajax.errors import UserError


@contextlib.contextmanager
def replacing(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """A path beside `path` to write to: what is written there takes the place of `path` once it is on disk.

    If the block raises, `path` is as it was and nothing is left beside it.

    Args:
        path: The file to make or replace; its folder exists.
    """
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
def replacing_folder(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """An empty folder beside `path` to write to, which takes its place at the end; if the block raises, it does not.

    Args:
        path: The folder to make or replace.
    """
    partial, aside = (path.with_name(path.name + ending) for ending in (".partial", ".old"))
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    yield partial
    if path.exists():  # set aside first, so that there is always a whole one
        shutil.rmtree(aside, ignore_errors=True)
        path.rename(aside)
    partial.rename(path)
    shutil.rmtree(aside, ignore_errors=True)


def copy(source: str, patterns: Sequence[str], folder: pathlib.Path) -> None:
    """Copies the files of a folder that match into another one, under the same names."""
    for file in (file for pattern in patterns for file in pathlib.Path(source).glob(pattern) if file.is_file()):
        target = folder / file.relative_to(source)
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(file, target)


def write_text(path: pathlib.Path, text: str) -> None:
    """Makes or replaces a text file, UTF-8."""
    with replacing(path) as scratch:
        scratch.write_text(text, encoding="utf-8")


def as_json(values: Mapping[str, Any]) -> str:
    """One line of JSON; a number that is not finite, for which JSON has no name, is null."""
    return json.dumps(_finite(values), ensure_ascii=False) + "\n"


def check(path: pathlib.Path) -> None:
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


def write_rows(path: pathlib.Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Makes or replaces the JSON lines that `--output` names.

    Raises:
        UserError: If they cannot be written.
    """
    with _refused(path):
        write_text(path, "".join(map(as_json, rows)))


@contextlib.contextmanager
def _refused(path: pathlib.Path) -> Iterator[None]:
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
