"""The files that a data set lies in, and their rows as they stand there.

A file or a whole folder of files, in subfolders too, in the order of their names. Where a folder has splits, a file's
is found as the Hub finds it: from `train-00000-of-00002.parquet`, `train.jsonl.gz` or `train/0000.parquet`.
"""

import codecs
import contextlib
import dataclasses
import gzip
import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from daajax.data.bad_rows import BadRow, described
from daajax.errors import UserError

if TYPE_CHECKING:
    import pyarrow

Row = dict[str, Any] | BadRow  # a row that cannot be read comes as the reason
Rows = Iterator[tuple[str, Row]]  # each with its location, "<path>:<row>", counted from 1

ROWS_AT_ONCE = 1024
_SPLITS = {  # what splits are called in the names of files and folders, and what that stands for
    "train": "train|training",
    "test": "test|testing|eval|evaluation",
    "validation": "validation|valid|val|dev",
}
_SHARD = re.compile(r"(\w+)-\d{5}-of-\d{5}")


@dataclasses.dataclass(frozen=True)
class Address:
    """What a user says of where data are.

    Attributes:
        path: A file or a folder, or what else a source knows.
        split: Which part of it; None: there is only one.
        option: What these options are called in the config: `data`, `eval_data`, …
    """

    path: str
    split: str | None = None
    option: str = "data"

    def refused(self, reason: str) -> UserError:
        """The error that says what is wrong with the path."""
        return UserError(f"{self.option}.path={self.path} {reason}")

    def choose(self, splits: Sequence[str]) -> str:
        """The split that is asked for, or the only one.

        Raises:
            UserError: If it is not there, or it is not said which.
        """
        there = f"has the splits {', '.join(splits) or '(none)'}"
        if self.split is None and len(splits) != 1:
            raise self.refused(f"{there}; choose one with {self.option}.split")
        if self.split is not None and self.split not in splits:
            raise self.refused(f"{there}, but {self.option}.split={self.split!r}")
        return self.split or splits[0]

    def refuse_split(self, what: str) -> None:
        """Refuses a split where there is nothing to choose from."""
        if self.split is not None:
            raise self.refused(f"is {what}, so {self.option}.split={self.split!r} cannot act; unset it")


def find(address: Address, endings: Sequence[str]) -> list[Path]:
    """The files of a data set, in order.

    Args:
        address: A file of any name, or a folder that is searched.
        endings: Of the names that count in a folder.

    Raises:
        UserError: If there are none, or the split does not say which.
    """
    path, kinds = Path(address.path), " or ".join(endings)
    if path.is_file():
        address.refuse_split("a single file")
        return [path]
    if not path.is_dir():
        raise address.refused(f"does not exist; needed a {kinds} file, or a folder of them")
    by_split: dict[str, list[Path]] = {}
    for file in sorted(path.rglob("*")):
        within = file.relative_to(path)
        hidden = within.name.startswith("_") or any(part.startswith(".") for part in within.parts)
        if within.name.endswith(tuple(endings)) and not hidden and file.is_file():
            by_split.setdefault(_split_of(within), []).append(file)
    if not by_split:
        raise address.refused(f"is a folder without any {kinds} file")
    if set(by_split) == {""}:
        address.refuse_split("a folder without splits (names such as train.jsonl or train/0.parquet)")
        return by_split[""]
    if "" in by_split and address.split is None:
        raise address.refused(
            f"holds files of the splits {', '.join(sorted(set(by_split) - {''}))} and others, such as "
            f"{by_split[''][0].relative_to(path)}; choose a split with {address.option}.split"
        )
    return by_split[address.choose(sorted(set(by_split) - {""}))]


def _split_of(within: Path) -> str:
    """The split that a file belongs to by its name, or else its folders'; "" if they say nothing."""
    shard = _SHARD.match(within.name)
    for name in [within.name, *reversed(within.parts[:-1])]:
        for split, words in _SPLITS.items():
            if re.search(rf"(^|[-_. ])({words})($|[-_. ])", name):
                return shard[1] if shard and name == within.name else split  # train_prefs is one of its own
    return shard[1] if shard and shard[1] not in ("data", "part", "shard") else ""


def json_rows(path: Path, address: Address) -> Rows:
    """The lines of a JSONL file, or of one compressed by gzip; blank lines hold nothing.

    A line that is no JSON object comes as the reason. CRLF line ends and a byte order mark are taken as they come.
    """
    with (
        _errors_named(path, address, OSError, EOFError, zlib.error),
        gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as lines,
    ):
        for number, line in enumerate(lines, start=1):
            content = line.removeprefix(codecs.BOM_UTF8).strip() if number == 1 else line.strip()
            if content:
                yield f"{path}:{number}", _json_object(content)


def parquet_rows(path: Path, address: Address) -> Rows:
    """The rows of a Parquet file, a part of a row group at a time."""
    import pyarrow.parquet  # half a second, which other sources need not pay

    with (
        _errors_named(path, address, OSError, pyarrow.ArrowException),
        pyarrow.parquet.ParquetFile(path, memory_map=True) as file,
    ):
        yield from _arrow_rows(str(path), file.iter_batches(ROWS_AT_ONCE))


def arrow_rows(path: Path, address: Address) -> Rows:
    """The rows of a file in Arrow's stream format, in which the `datasets` library keeps data."""
    import pyarrow

    with (
        _errors_named(path, address, OSError, pyarrow.ArrowException),
        pyarrow.memory_map(str(path)) as file,
        pyarrow.ipc.open_stream(file) as batches,
    ):
        yield from _arrow_rows(str(path), batches)


def _arrow_rows(name: str, batches: Iterable["pyarrow.RecordBatch"]) -> Rows:
    """The rows of Arrow tables; text that is not UTF-8 makes a bad row."""
    number = 0
    for batch in batches:
        try:
            rows = batch.to_pylist()
        except UnicodeDecodeError:
            rows = [_arrow_row(batch.slice(place, 1)) for place in range(batch.num_rows)]
        for row in rows:
            number += 1
            yield f"{name}:{number}", row


def _arrow_row(batch: "pyarrow.RecordBatch") -> Row:
    """A table's only row, or why it cannot be had."""
    try:
        return batch.to_pylist()[0]
    except UnicodeDecodeError as error:
        return BadRow(f"not UTF-8 at byte {error.start} of a text")


@contextlib.contextmanager
def _errors_named(path: Path, address: Address, *kinds: type[Exception]) -> Iterator[None]:
    """Turns what reading a file raises into what the user can do."""
    try:
        yield
    except kinds as error:
        which = "" if str(path) == address.path else f"holds {path}, which "
        reason = " ".join(str(error).split())
        raise address.refused(f"{which}cannot be read to its end ({reason}); copy or compress it again") from error


def _json_object(line: bytes) -> Row:
    """One line's object, or why there is none."""
    try:
        row = json.loads(line.decode())
    except UnicodeDecodeError as error:
        return BadRow(f"not UTF-8 at byte {error.start} of the line")
    except json.JSONDecodeError as error:
        return BadRow(f"not JSON ({error.msg} at character {error.pos})")
    except (ValueError, RecursionError) as error:
        return BadRow(f"not JSON that can be read ({error})")
    if not isinstance(row, dict):
        return BadRow(f"{described(row)}, needed a JSON object on each line")
    return row


READERS: dict[str, Callable[[Path, Address], Rows]] = {  # by the ending of a file's name
    ".jsonl": json_rows,
    ".jsonl.gz": json_rows,
    ".parquet": parquet_rows,
    ".arrow": arrow_rows,
}
