"""Copies on this machine of files that lie elsewhere: folders of a cache, each there whole or not at all."""

import contextlib
import fcntl
import pathlib
from collections.abc import Callable, Iterable, Iterator, Sequence

from daajax import output
from daajax.console import Progress, say


@contextlib.contextmanager
def alone(home: pathlib.Path) -> Iterator[None]:
    """Keeps other processes of this host from a folder of copies while the block lasts; they wait."""
    home.mkdir(parents=True, exist_ok=True)
    with (home / ".lock").open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"another process fetches to {home}: waiting for it")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def make(copy: pathlib.Path, names: Sequence[str], read: Callable[[str], Iterable[bytes]], what: str) -> None:
    """Copies files to a folder, which takes its name when it is whole; what an interrupted copy has made is kept.

    Args:
        copy: The folder, which is not there.
        names: Of the files, as they are to be in it.
        read: The content of one, a part at a time.
        what: For the progress line.

    Raises:
        OSError: If they cannot be written.
    """
    partial = copy.with_name(f"{copy.name}.partial")
    with contextlib.closing(Progress(what, len(names), "file")) as progress:
        for name in names:
            file = partial / name
            if not file.is_file():
                file.parent.mkdir(parents=True, exist_ok=True)
                with output.replacing(file) as scratch, scratch.open("wb") as target:
                    for part in read(name):
                        target.write(part)
            progress.advance()
    wanted = {partial / name for name in names}
    for left in set(partial.rglob("*.partial")) - wanted:  # by a copy that was killed
        if left.is_file():
            left.unlink()
    partial.rename(copy)
