"""Files that are there whole or not at all."""

import contextlib
import os
import pathlib
import secrets
from collections.abc import Iterator


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


def write_text(path: pathlib.Path, text: str) -> None:
    """Makes or replaces a text file, UTF-8."""
    with replacing(path) as scratch:
        scratch.write_text(text, encoding="utf-8")
