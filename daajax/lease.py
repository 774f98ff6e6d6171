"""The lock of a run's folder in a bucket: an object that its holder writes again and again, as a sign of life.

Only an object that is as it was last seen is written, so of two runs that want a folder one gets it. No clock of
another machine is trusted: whoever finds a lock watches it for as long as it says; if it changes, its run is alive, and
if it does not, that run was killed and the folder is free. A run that ends lets go of its folder at once; one that was
silent for so long and comes back to find its folder taken ends.

It finds that out at its next sign of life, so one that was cut off may write beside the run that took over for as long
as is between two signs, a sixth of the silence, 15 s. Of a file that both write in that time, one run's is there; a
checkpoint that is not of one run alone does not fit its digests, and is set aside.

`DAAJAX_LOCK_SECONDS` is that silence, 90 unless it is set.
"""

import contextlib
import json
import os
import secrets
import sys
import threading
import time
from collections.abc import Iterator

from daajax import bucket, places, processes
from daajax.console import say
from daajax.errors import UserError

SECONDS = 90
_SIGNS = 6  # of life, within that time; one that takes longer than the pause between them has failed
_AGAIN_SECONDS = 1.0  # after a sign that failed
_LOOK_SECONDS = 1.0


@contextlib.contextmanager
def held(lock: bucket.BucketPath, holder: str) -> Iterator[None]:
    """Holds a lock while the block lasts.

    Args:
        lock: The object.
        holder: Who does, for others to read.

    Raises:
        UserError: If another run holds it, or the bucket takes no object.
    """
    lease = _Lease(lock, holder)
    lease.take()
    thread = threading.Thread(target=lease.keep, name="lease", daemon=True)
    thread.start()
    try:
        yield
    finally:
        lease.ended.set()
        thread.join()
        lease.give_up()


class _Lease:
    """A lock, taken or to be taken.

    Attributes:
        ended: Set when no sign of life is to be given any more.
    """

    def __init__(self, lock: bucket.BucketPath, holder: str):
        self._lock, self._where, self._holder = lock, lock.parent, holder
        self._seconds = SECONDS
        if "DAAJAX_LOCK_SECONDS" in os.environ:
            self._seconds = max(places.number_in("DAAJAX_LOCK_SECONDS", os.environ, "it is a number of seconds"), 1)
        self._token, self._signs = secrets.token_hex(8), 0
        self._generation: bytes | None = None
        self.ended = threading.Event()

    def take(self) -> None:
        """Makes the lock, or takes over one that nobody holds any more."""
        while not self._write(b""):
            try:
                found = bucket.read(self._lock)
            except FileNotFoundError:  # just let go of
                continue
            holder, seconds = _said(found.value)
            say(f"--workdir={self._where} is locked by {holder}: waiting for {seconds:g} s whether it is alive")
            if not self._is_free(found.stamp.generation, holder, seconds):
                continue
            if self._write(found.stamp.generation):
                say(f"--workdir={self._where}: {holder} gave no sign of life; its lock is taken over")
                return

    def keep(self) -> None:
        """Gives a sign of life now and then; ends the process if the lock is another's."""
        pause = between = self._seconds / _SIGNS
        most = max(between, 1.0)
        while not self.ended.wait(pause):
            try:
                if not self._write(self._generation, most) and not self._is_own(most):
                    self._lost()
                    return
                pause = between
            except bucket.BucketError:  # if it lasts, another run may take over
                pause = min(_AGAIN_SECONDS, between)

    def give_up(self) -> None:
        """Removes the lock, if it is still this one."""
        try:
            bucket.write(self._lock, None, only_at=self._generation, seconds=float(self._seconds))
        except bucket.BucketError as error:
            say(f"{error} The next run here waits for {self._seconds} s")

    def _write(self, only_at: bytes | None, seconds: float | None = None) -> bool:
        """Writes the lock where it is of that generation, within so many seconds."""
        self._signs += 1
        said = {"holder": self._holder, "token": self._token, "signs": self._signs, "seconds": self._seconds}
        generation = bucket.write(self._lock, json.dumps(said).encode(), only_at=only_at, seconds=seconds)
        if generation is None:
            return False
        self._generation = generation
        return True

    def _is_own(self, seconds: float) -> bool:
        """Whether the lock is this one: a request whose answer was lost has been made all the same."""
        with contextlib.suppress(FileNotFoundError):
            found = bucket.read(self._lock, seconds=seconds)
            if self._token.encode() in found.value:
                self._generation = found.stamp.generation
                return True
        return False

    def _is_free(self, generation: bytes, holder: str, seconds: float) -> bool:
        """Watches a lock; whether it has stayed as it was. If it is gone, it has not."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            time.sleep(min(_LOOK_SECONDS, seconds / _SIGNS))
            try:
                now = bucket.read(self._lock, slice(0, 0)).stamp.generation
            except FileNotFoundError:
                return False
            if now != generation:
                raise UserError(
                    f"--workdir={self._where}: another run is at work there ({holder}); "
                    "wait for it, or name another folder."
                )
        return True

    def _lost(self) -> None:
        sys.stderr.write(
            f"error: another run has taken --workdir={self._where}, since this one gave no sign of life for "
            f"{self._seconds} s; wait for it, or name another folder.\n"
        )
        processes.leave(1)


def _said(content: bytes) -> tuple[str, float]:
    """Who holds a lock, and how many seconds of silence set it free."""
    try:
        said = json.loads(content)
        return str(said["holder"]), float(said["seconds"])
    except (ValueError, TypeError, KeyError):
        return "somebody unknown", float(SECONDS)
