"""What ends a run that has come to a stop without an error: a network that hangs, a process that waits for another."""

import contextlib
import faulthandler
import sys
import tempfile
import threading
import time
from collections.abc import Iterator

import jax

from daajax import bucket, processes

_FOLDER = "stacks"
_BUCKET_SECONDS = 10  # most that a bucket gets to take the stacks: the network may be what hangs


class Watchdog:
    """Ends the process with exit code 43 when no update ends for too long; what each thread was doing is written first.

    Args:
        where: The run's folder; the stacks are written to `stacks/process-N.txt` in it, and to stderr.
        minutes: How long an update may take; 0 watches nothing.
    """

    def __init__(self, where: bucket.Path, minutes: float):
        self._where, self._seconds = where, 60 * minutes
        self._last: float | None = time.monotonic()  # None while nothing is watched
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> "Watchdog":
        if self._seconds:
            self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._ended.set()

    def advance(self) -> None:
        """There is progress: an update has ended on the devices, or a batch of an evaluation."""
        self._last = time.monotonic()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """What may take as long as it takes: a checkpoint, or the model at the end."""
        self._last = None
        yield
        self._last = time.monotonic()

    def _watch(self) -> None:
        while not self._ended.wait(min(self._seconds / 4, 10.0)):
            last = self._last
            if last is not None and time.monotonic() - last > self._seconds:
                self._end()

    def _end(self) -> None:
        file = self._where / _FOLDER / f"process-{jax.process_index()}.txt"
        faulthandler.dump_traceback(sys.stderr, all_threads=True)
        if isinstance(file, bucket.BucketPath):
            writer = threading.Thread(target=_write, args=(file,), daemon=True)
            writer.start()
            writer.join(_BUCKET_SECONDS)
        else:
            with contextlib.suppress(OSError):
                file.parent.mkdir(exist_ok=True)
                with file.open("w", encoding="utf-8") as stacks:
                    faulthandler.dump_traceback(stacks, all_threads=True)
        sys.stderr.write(
            f"error: no update has ended for {self._seconds / 60:g} minutes; what every thread was doing is in {file}. "
            "The same command goes on from the last checkpoint; config.watchdog_minutes sets the limit.\n"
        )
        processes.leave_stuck()


def _write(file: bucket.BucketPath) -> None:
    """Writes what each thread is doing to a bucket."""
    with contextlib.suppress(OSError, bucket.BucketError), tempfile.TemporaryFile() as stacks:
        faulthandler.dump_traceback(stacks, all_threads=True)
        stacks.seek(0)
        file.write_bytes(stacks.read())
