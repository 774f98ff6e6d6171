"""What a command says: plain lines, and one progress bar on a terminal."""

import sys
import time
from collections.abc import Mapping
from typing import Any

import tqdm


def say(line: str) -> None:
    """Prints a line; it does not tear a progress bar."""
    tqdm.tqdm.write(line, file=sys.stdout)
    sys.stdout.flush()


class Progress:
    """Progress through a known number of steps: a bar with rate and time left on a terminal, else plain lines.

    Args:
        name: What is being done, for the front of the line.
        total: Steps.
        unit: One step.
        seconds: Least time between plain lines of `advance`; `note` always prints one.
    """

    def __init__(self, name: str, total: int, unit: str, seconds: float = 10.0):
        self._name, self._total, self._unit, self._seconds = name, total, unit, seconds
        self._done = 0
        self._began = self._said = time.perf_counter()
        self._bar = tqdm.tqdm(total=total, desc=name, unit=unit, file=sys.stdout) if sys.stdout.isatty() else None

    def advance(self) -> None:
        """One step is done."""
        self._done += 1
        if self._bar is not None:
            self._bar.update()
        elif self._done == self._total or time.perf_counter() - self._said >= self._seconds:
            self._line("")

    def note(self, values: Mapping[str, Any]) -> None:
        """Shows some numbers beside the progress."""
        text = ", ".join(f"{name} {value:.4g}" for name, value in values.items())
        if self._bar is not None:
            self._bar.set_postfix_str(text)
        else:
            self._line(f": {text}")

    def close(self) -> None:
        """Ends the bar."""
        if self._bar is not None:
            self._bar.close()

    def _line(self, text: str) -> None:
        now = self._said = time.perf_counter()
        rate = self._done / max(now - self._began, 1e-9)
        left = (self._total - self._done) / rate if self._done else float("nan")
        say(f"{self._name} {self._done}/{self._total} ({rate:.2f} {self._unit}/s, {left:.0f} s left){text}")
