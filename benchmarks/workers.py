"""Two processes that take turns: a parent asks, a worker answers, one JSON line each; only one of them works at a time.

Nothing but Python's own library is imported here, so that a worker may run in an environment without daajax.
"""

import contextlib
import json
import os
import pathlib
import resource
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any, TextIO

TAIL = 4000  # characters of a worker's output that are shown where it fails


class RefusedError(Exception):
    """What a worker says that its user can mend, in one line."""


class DiedError(Exception):
    """A worker's end without an answer, with what it printed last."""


class Worker:
    """A worker as its parent sees it.

    Args:
        command: What starts it.
        log: File for all it prints.
        cwd: Where it runs.
        environment: Variables beside the parent's.
    """

    def __init__(self, command: Sequence[str], log: pathlib.Path, *, cwd: pathlib.Path, environment: Mapping[str, str]):
        self._log = log
        with log.open("w") as stream:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stream,
                cwd=cwd,
                env=os.environ | environment,
                text=True,
            )

    def answer(self) -> dict[str, Any]:
        """The next line it sends.

        Raises:
            RefusedError: If it refuses to go on.
            DiedError: If it ends without one; what it printed last is shown.
        """
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            code = self._process.wait()
            raise DiedError(f"a worker ended with code {code}; its output:\n{self._log.read_text()[-TAIL:]}")
        answer = json.loads(line)
        if "refused" in answer:
            raise RefusedError(answer["refused"])
        return answer

    def ask(self, what: str, **values: Any) -> dict[str, Any]:
        """Sends a command and waits for what comes of it."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # `answer` says why
            self._process.stdin.write(json.dumps({"do": what, **values}) + "\n")
            self._process.stdin.flush()
        return self.answer()

    def update(self, count: int) -> dict[str, Any]:
        """Has it do so many updates; see `Stopwatch.read`, and `losses` by update."""
        return self.ask("update", count=count)

    def end(self) -> int:
        """Ends it; the most memory it ever had resident, bytes."""
        peak = self.ask("end")["peak"]
        self._process.wait(timeout=60)
        self.kill()
        return peak

    def kill(self) -> None:
        """Ends it whatever it does, if it has not ended."""
        self._process.kill()
        for stream in (self._process.stdin, self._process.stdout):
            assert stream is not None
            with contextlib.suppress(BrokenPipeError):
                stream.close()
        self._process.wait()


class Parent:
    """The parent as a worker sees it: takes the standard output for answers, and sends what others print to stderr."""

    def __init__(self) -> None:
        self._answers: TextIO = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)

    def tell(self, **values: Any) -> None:
        """Sends one answer."""
        self._answers.write(json.dumps(values) + "\n")
        self._answers.flush()

    def refuse(self, why: str) -> None:
        """Sends, in place of an answer, what the user can mend; the worker ends."""
        self.tell(refused=why)

    def next(self) -> dict[str, Any]:
        """The next command; `{"do": "end"}` also when the parent is gone."""
        line = sys.stdin.readline()
        return json.loads(line) if line else {"do": "end"}


class Stopwatch:
    """Wall and CPU seconds of this process, all threads together, since it was made or read."""

    def __init__(self) -> None:
        self._began = self._now()

    def read(self) -> dict[str, float]:
        """`wall` and `cpu` seconds; starts again from here."""
        now, began = self._now(), self._began
        self._began = now
        return {"wall": now[0] - began[0], "cpu": now[1] - began[1]}

    @staticmethod
    def _now() -> tuple[float, float]:
        used = resource.getrusage(resource.RUSAGE_SELF)
        return time.perf_counter(), used.ru_utime + used.ru_stime


def peak() -> int:
    """The most memory that this process ever had resident, bytes; Linux counts in KiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
