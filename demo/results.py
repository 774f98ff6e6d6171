"""What came of the demo: the numbers, the bars they must pass, and how they are shown."""

import math
import statistics
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from demo.world import HELD_OUT

ACCURACY = 0.80  # on held-out pairs, at least
RISE = 3.0  # of the mean reward, in standard errors, at least


class Estimate(NamedTuple):
    """A mean and its standard error."""

    mean: float
    error: float

    @classmethod
    def of(cls, values: Iterable[float]) -> "Estimate":
        """Of independent values, at least two."""
        values = list(values)
        return cls(statistics.fmean(values), statistics.stdev(values) / math.sqrt(len(values)))

    def __str__(self) -> str:
        return f"{self.mean:.2f} ± {self.error:.2f}"


class Results(NamedTuple):
    """The demo's numbers.

    Attributes:
        accuracy: Share of held-out pairs whose better response has the higher implicit reward.
        before: Reward of samples of the model that learned the language alone.
        after: Reward of samples of the aligned model.
        divergence: KL of the aligned model from the other one, nats a response: the mean log-ratio of its samples.
        ended: Samples that it is the mean of: those that came to their end.
    """

    accuracy: float
    before: Estimate
    after: Estimate
    divergence: Estimate
    ended: int

    @property
    def rise(self) -> float:
        """By how many standard errors the mean reward rose."""
        return (self.after.mean - self.before.mean) / math.hypot(self.before.error, self.after.error)

    def shortcomings(self) -> list[str]:
        """The bars that are missed, in words; none says that alignment worked. NaN misses its bar."""
        missed = []
        if not self.accuracy >= ACCURACY:
            missed.append(f"held-out accuracy is {self.accuracy:.3f}, needed {ACCURACY:.2f}")
        if not self.rise >= RISE:
            missed.append(f"the reward rose by {self.rise:.1f} standard errors, needed {RISE:.0f}")
        return missed

    def table(self, seconds: Mapping[str, float]) -> list[str]:
        """The numbers as lines of text.

        Args:
            seconds: How long each stage took, by name.
        """
        rise = f"{self.rise:+.0f} standard errors, needed {RISE:+.0f}"
        rows = [
            ("", "before", "after", ""),
            (f"reward of {HELD_OUT} samples", self.before, self.after, rise),
            ("held-out accuracy", "-", f"{self.accuracy:.3f}", f"needed {ACCURACY:.3f}"),
            ("KL to the reference, nats", "0", self.divergence, f"of {self.ended} samples that ended"),
        ]
        lines = [f"{name:<28}  {before!s:>13}  {after!s:>13}  {note}".rstrip() for name, before, after, note in rows]
        times = ", ".join(f"{name} {value:.0f}" for name, value in seconds.items())
        return [*lines, "", f"{sum(seconds.values()):.0f} s in all: {times}"]
