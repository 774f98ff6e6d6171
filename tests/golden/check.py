"""Checks the project's objectives against golden files: `python -m tests.golden.check DIR`.

Every case of every file in the folder is evaluated in float64 and in float32, values and gradients. Each failure is
printed with both numbers. The last line is `N passed, N failed, N skipped`; the exit code is 1 if anything failed.
"""

import dataclasses
import pathlib
import sys
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from daajax.errors import UserError
from tests.golden import comparison
from tests.golden.cases import TOKEN_INPUTS, Case, UnreadableError, read
from tests.golden.files import FILES


class Verdict(NamedTuple):
    """What came of a case: `passed`, `failed` or `skipped`, and why."""

    outcome: str
    lines: tuple[str, ...] = ()


def check_folder(folder: pathlib.Path) -> Iterator[Verdict]:
    """Checks every file of a folder."""
    files = sorted(folder.glob("*.json")) if folder.is_dir() else []
    files = [file for file in files if file.name != TOKEN_INPUTS]
    if not files:
        yield Verdict("failed", (f"{folder}: there are no golden files there",))
    for file in files:
        yield from check_file(file)


def check_file(file: pathlib.Path) -> Iterator[Verdict]:
    """Checks every case of a file."""
    try:
        for case in read(file):
            yield check_case(case) if isinstance(case, Case) else Verdict("failed", (f"{file.name} {case}",))
    except UnreadableError as error:
        yield Verdict("failed", (f"{file.name}: {error}",))


def check_case(case: Case) -> Verdict:
    """Checks a case in both dtypes."""
    if not any(np.isfinite(values).any() for values in case.wanted.values()):
        return Verdict("skipped", (f"{case}: its source has no finite number here (nonfinite_as_null); {case.notes}",))
    try:
        lines = tuple(_failures(case))
    except (UnreadableError, UserError) as error:
        lines = (str(error),)
    except Exception as error:  # one case must not keep the others from being checked
        lines = (f"{type(error).__name__}: {' '.join(str(error).split())}",)
    return Verdict("failed", tuple(f"{case}: {line}" for line in lines)) if lines else Verdict("passed")


def _failures(case: Case) -> Iterator[str]:
    case = dataclasses.replace(case)  # nothing of it is understood yet
    if case.name not in FILES:
        raise UnreadableError(f"{case.name!r} is none of the objectives that there are files of: {', '.join(FILES)}")
    problem = FILES[case.name](case)
    if case.left:
        raise UnreadableError(f"nothing is known of the hyper-parameters {case.left}")
    yield from comparison.failures(case, problem)


def main(arguments: list[str]) -> int:
    """Checks a folder and prints what came of it; the exit code."""
    if len(arguments) != 1:
        print("usage: python -m tests.golden.check DIR", file=sys.stderr)
        return 1
    counts = {"passed": 0, "failed": 0, "skipped": 0}
    for verdict in check_folder(pathlib.Path(arguments[0])):
        counts[verdict.outcome] += 1
        for line in verdict.lines:
            print(f"{verdict.outcome.upper()} {line}")
    print(", ".join(f"{count} {outcome}" for outcome, count in counts.items()))
    return int(counts["failed"] > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
