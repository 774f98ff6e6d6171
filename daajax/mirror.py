"""Files that grow while a run lasts, for a folder in a bucket: written on this machine and copied there now and then.

An object cannot be appended to, so a file is written anew each time: at most every `SECONDS`, and the less often the
longer it takes. What a run that is killed had not copied yet is of updates that the next one does again, since `push`
comes before a checkpoint. That is best effort: a bucket that takes nothing for minutes, which is said, is no reason to
keep a checkpoint back, so a run that is killed then leaves a gap in what it reported. A run does not end as finished
before the bucket has all; where it has not, the folder on this machine stays and is named.
"""

import pathlib
import shutil
import tempfile
import threading
import time

from daajax import bucket
from daajax.console import say

SECONDS = 30.0
_SHARE = 20  # of the time, at most one part is spent on copying


class Mirror:
    """A folder on this machine, empty at first, whose files are copied to one in a bucket.

    Args:
        target: The folder in the bucket.

    Attributes:
        local: The one on this machine.
    """

    def __init__(self, target: bucket.BucketPath):
        self._target, self.local = target, pathlib.Path(tempfile.mkdtemp(prefix="daajax-"))
        self._copied: dict[pathlib.Path, tuple[int, int]] = {}
        self._stays = False  # the folder on this machine, since somebody was told of it
        self._one, self._next = threading.Lock(), time.monotonic() + SECONDS
        self._thread: threading.Thread | None = None

    def fetch(self, name: str) -> None:
        """Brings a file from the bucket, if it is there."""
        file = self._target / name
        if file.is_file():
            (self.local / name).write_bytes(file.read_bytes())
            self._copied[self.local / name] = _version(self.local / name)

    def push_soon(self) -> None:
        """Copies what has changed, in the background, if the time has come."""
        if time.monotonic() >= self._next and (self._thread is None or not self._thread.is_alive()):
            self._thread = threading.Thread(target=self.push, name="mirror", daemon=True)
            self._thread.start()

    def push(self) -> None:
        """Copies what has changed. A bucket that does not take it is no reason to end a run: it is said."""
        try:
            self._copy()
        except bucket.BucketError as error:
            say(f"{error} The run goes on; until the bucket takes it, what is new is in {self.local} alone")

    def complete(self) -> None:
        """Copies what has changed.

        Raises:
            BucketError: If the bucket does not take it; it names the folder on this machine, which stays.
        """
        try:
            self._copy()
        except bucket.BucketError as error:
            self._stays = True
            raise type(error)(f"what is new is in {self.local} alone: {error}") from None

    def close(self) -> bucket.Path:
        """Copies what has changed, and removes the folder on this machine if the bucket has all.

        Returns:
            Where all is: in the bucket, or on this machine, which is said.
        """
        if not self._stays:
            try:
                self.complete()
            except bucket.BucketError as error:
                say(str(error))
        if self._stays:
            return self.local
        shutil.rmtree(self.local, ignore_errors=True)
        return self._target

    def _copy(self) -> None:
        with self._one:
            began = time.monotonic()
            try:
                for file in sorted(file for file in self.local.rglob("*") if file.is_file()):
                    if self._copied.get(file) != (version := _version(file)):
                        bucket.write(self._target / file.relative_to(self.local).as_posix(), file.read_bytes())
                        self._copied[file] = version
            finally:
                now = time.monotonic()
                self._next = now + max(SECONDS, _SHARE * (now - began))


def _version(file: pathlib.Path) -> tuple[int, int]:
    """What changes when a file is written to."""
    found = file.stat()
    return found.st_size, found.st_mtime_ns
