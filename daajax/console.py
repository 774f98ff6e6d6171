"""What a command says: plain lines, and one progress bar on a terminal."""

import sys
import time
from collections.abc import Mapping

import tqdm

_is_muted = False


def mute() -> None:
    """Says nothing from now on: of several processes, one speaks."""
    global _is_muted
    _is_muted = True


def say(line: str) -> None:
    """Prints a line; it does not tear a progress bar."""
    if _is_muted:
        return
    tqdm.tqdm.write(line, file=sys.stdout)
    sys.stdout.flush()


class Progress:
    """Progress through a known number of steps: a bar with rate and time left on a terminal, else plain lines.

    Args:
        name: What is being done, for the front of the line.
        total: Steps.
        unit: One step.
        done: Steps that were done before.
        seconds: Time after which a plain line is printed though there are no numbers to show.
    """

    def __init__(self, name: str, total: int, unit: str, *, done: int = 0, seconds: float = 10.0):
        self._name, self._total, self._unit, self._seconds = name, total, unit, seconds
        self._done = self._before = done
        self._began = self._said = time.perf_counter()
        self._bar = None
        if sys.stdout.isatty() and not _is_muted:
            self._bar = tqdm.tqdm(total=total, desc=name, unit=unit, initial=done, file=sys.stdout)

    def advance(self, values: Mapping[str, float] | None = None) -> None:
        """One step is done; `values` are numbers to show beside the progress, if there are new ones."""
        self._done += 1
        text = ", ".join(f"{name} {value:.4g}" for name, value in (values or {}).items())
        if self._bar is not None:
            self._bar.update()
            if text:
                self._bar.set_postfix_str(text)
        elif text or self._done == self._total or time.perf_counter() - self._said >= self._seconds:
            now = self._said = time.perf_counter()
            rate = (self._done - self._before) / max(now - self._began, 1e-9)
            left = (self._total - self._done) / rate
            line = f"{self._name} {self._done}/{self._total} ({rate:.2f} {self._unit}/s, {left:.0f} s left)"
            say(f"{line}: {text}" if text else line)

    def close(self) -> None:
        """Ends the bar."""
        if self._bar is not None:
            self._bar.close()
