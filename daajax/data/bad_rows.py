"""Rows that cannot be used: why not, how many of them, and how many are tolerated."""

import dataclasses
from typing import Any

from daajax.errors import UserError

NAMED_BAD_ROWS = 5


class BadRow(Exception):  # noqa: N818 - it describes a row; `BadRows` decides whether it is an error
    """A row that cannot be used; its text is the reason."""


@dataclasses.dataclass
class BadRows:
    """Counts the rows that cannot be used, and ends the run once there are more than are tolerated.

    Attributes:
        tolerated: Rows, `data.max_bad_rows`.
        option: What the data are called in the config: `data`, `eval_data`, …
        count: Rows so far.
        reasons: Place and reason of the first few.
    """

    tolerated: int = 0
    option: str = "data"
    count: int = 0
    reasons: list[str] = dataclasses.field(default_factory=list)

    def add(self, location: str, reason: BadRow) -> None:
        """Counts one more.

        Raises:
            UserError: If it is one too many; names the first bad row.
        """
        self.count += 1
        if len(self.reasons) < NAMED_BAD_ROWS:
            self.reasons.append(f"{location}: {reason}")
        if self.count > self.tolerated:
            option = f"{self.option}.max_bad_rows"
            raise UserError(
                f"{self.reasons[0]}. {self.count} bad row(s), but {option}={self.tolerated}: "
                f"mend or remove the row, or tolerate more with {option}"
            )


def described(value: Any) -> str:
    """A value in a message about it."""
    return "missing" if value is None else f"{type(value).__name__} {shortened(repr(value))}"


def shortened(text: str) -> str:
    """The beginning of a text, as one line that fits a message."""
    return text if len(text) <= 60 else text[:60] + "…"
