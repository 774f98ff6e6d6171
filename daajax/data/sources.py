"""Where examples come from: data sets by the kind of their source.

A source is a function from an address to a `Source`: the files it lies in, and an iterator over its rows, dicts of the
data's own columns. What the columns mean is the same for all of them: `daajax.data.rows`. To add a source, write that
function and give it a line in `SOURCES`.
"""

import dataclasses
import itertools
import json
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from daajax.data.bad_rows import BadRow, BadRows, described
from daajax.data.files import READERS, Address, Row, Rows, arrow_rows, find, json_rows, parquet_rows
from daajax.data.rows import Example, parse, unused_names
from daajax.errors import UserError, one_line

JSONL = (".jsonl", ".jsonl.gz")
ODDITIES = ("examples_with_later_turns", "examples_sorted_by_score", "pairs_scored_against_their_order")


@dataclasses.dataclass(frozen=True)
class Examples:
    """What a source held.

    Attributes:
        examples: The good rows, in the order of the data.
        counters: `rows`, `bad_rows` and `ODDITIES`: examples in which a response goes on to further user turns, which
            are scored with it; lists put in order; pairs whose rejected response has the higher score.
        notices: One line each, to be printed: columns not used, bad rows tolerated.
        bad_rows: The account of bad rows, which tokenization continues.
    """

    examples: list[Example]
    counters: dict[str, int] = dataclasses.field(default_factory=dict)
    notices: list[str] = dataclasses.field(default_factory=list)
    bad_rows: BadRows = dataclasses.field(default_factory=BadRows)


@dataclasses.dataclass(frozen=True)
class Source:
    """A data set that was found, not yet read.

    Attributes:
        address: What the user said of it.
        files: All that its rows follow from.
        rows: Begins a pass over them.
    """

    address: Address
    files: Sequence[Path]
    rows: Callable[[], Rows]

    def name_of(self, location: str | Path) -> str:
        """A file, or a row's location, without the folders that all of the data lie in."""
        root = f"{Path(self.address.path)}/"
        return str(location).removeprefix(root) if str(location).startswith(root) else Path(location).name

    def read(self, *, limit: int | None = None, max_bad_rows: int = 0) -> Examples:
        """Reads the rows as examples; see `read`."""
        option = self.address.option
        check_count(f"{option}.limit", limit, least=1, optional=True)
        check_count(f"{option}.max_bad_rows", max_bad_rows, least=0)
        examples, bad_rows = [], BadRows(max_bad_rows, option)
        unused: dict[str, None] = {}  # in order of appearance
        counters: dict[str, int] = dict.fromkeys(("rows", "bad_rows", *ODDITIES), 0)
        for location, row in self.rows():
            counters["rows"] += 1
            try:
                if isinstance(row, BadRow):
                    raise row
                example = parse(row, location, self.name_of(location))
            except BadRow as reason:
                bad_rows.add(location, reason)
                continue
            examples.append(example)
            unused.update(dict.fromkeys(unused_names(row)))
            for oddity in example.oddities:
                counters[oddity] += 1
            if len(examples) == limit:
                break
        if not examples:
            found = f"{counters['rows']} rows, none of them good" if counters["rows"] else "no rows"
            raise self.address.refused(f"holds {found}; needed at least one example with a prompt and responses")
        notices = [f"columns not used: {', '.join(unused)}"] if unused else []
        notices += [f"bad row skipped: {reason}" for reason in bad_rows.reasons]
        return Examples(examples, counters | {"bad_rows": bad_rows.count}, notices, bad_rows)


def open_source(name: str, path: str | Path, *, split: str | None = None, option: str = "data") -> Source:
    """Finds a data set.

    Args:
        name: A key of `SOURCES`, `data.name`.
        path: Where the data are, `data.path`.
        split: Which part of them, `data.split`.
        option: What these options are called in the config.

    Raises:
        UserError: If there is no such source, or nothing of its kind at the path.
    """
    if name not in SOURCES:
        raise UserError(f"{option}.name={name!r} is no source; known are {', '.join(sorted(SOURCES))}")
    if split is not None and not re.fullmatch(r"[\w.-]+", split):
        raise UserError(f"{option}.split={split!r} is no split's name; for a part of one set {option}.limit")
    return SOURCES[name](Address(str(path), split, option))


def read(
    name: str,
    path: str | Path,
    *,
    split: str | None = None,
    limit: int | None = None,
    max_bad_rows: int = 0,
    option: str = "data",
) -> Examples:
    """Reads a data set's rows as examples.

    Args:
        name: See `open_source`.
        path: See `open_source`.
        split: See `open_source`.
        limit: Examples to stop after, `data.limit`; None reads all of them.
        max_bad_rows: Rows that may be unusable, `data.max_bad_rows`; they are skipped and counted, the first few named.
        option: See `open_source`.

    Raises:
        UserError: If the data cannot be read, hold no example, or hold more bad rows than are tolerated.
    """
    return open_source(name, path, split=split, option=option).read(limit=limit, max_bad_rows=max_bad_rows)


def check_count(name: str, value: int | None, *, least: int, optional: bool = False) -> None:
    """Refuses a number of things, named `name` in the config, that is not an integer of at least `least`."""
    if value is None and optional:
        return
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise UserError(f"{name}={value!r}: needed an integer >= {least}{' or None' if optional else ''}")


def jsonl(address: Address) -> Source:
    """JSONL, also compressed by gzip: a file, or a folder of them."""
    return _in_files(address, find(address, JSONL), json_rows)


def parquet(address: Address) -> Source:
    """Parquet: a file, or a folder of them."""
    return _in_files(address, find(address, (".parquet",)), parquet_rows)


def hh(address: Address) -> Source:
    """JSONL as Anthropic published hh-rlhf: two whole conversations as text, split on turns.

    A file, or a folder of them: also all of hh-rlhf, whose subsets are folders with a train and a test file each.
    """

    def rows(path: Path, address: Address) -> Rows:
        return ((location, _conversations(row)) for location, row in json_rows(path, address))

    return _in_files(address, find(address, JSONL), rows)


def hub(address: Address) -> Source:
    """A data set of the Hugging Face Hub: a folder that it was downloaded or saved to, or its name there.

    The folder is a snapshot of its repository, with Parquet, JSONL or Arrow files, or what `datasets` wrote by
    `save_to_disk`. The name is `owner/name`, `owner/name/config` or either with `@revision`; it needs the extra `hub`.
    """
    path = Path(address.path)
    if path.is_file():
        raise address.refused("is a file; needed a folder, or a name on the Hub (a file is for jsonl or parquet)")
    if not path.is_dir():
        return _from_the_hub(address)
    if (path / "dataset_dict.json").is_file():
        split = address.choose(sorted(folder.parent.name for folder in path.glob("*/state.json")))
        return _saved(address, path / split)
    if (path / "state.json").is_file():
        address.refuse_split("a single data set that was saved to disk")
        return _saved(address, path)
    files = find(address, tuple(READERS))
    reader, *others = {_reader_of(file) for file in files}
    if others:
        kinds = ", ".join(sorted({f"*{file.suffix}" for file in files}))
        raise address.refused(f"holds the same or other data as {kinds}; keep one kind, or name a subfolder")
    return _in_files(address, files, reader)


def tfds(address: Address) -> Source:
    """A data set that TensorFlow Datasets prepared as array_record or Parquet: the folder of its version."""
    folder = Path(address.path)
    if not (folder / "dataset_info.json").is_file():
        below = sorted(str(info.parent.relative_to(folder)) for info in folder.rglob("dataset_info.json"))
        found = f"has no dataset_info.json, but {', '.join(below)} below it" if below else "has no dataset_info.json"
        found = found if folder.is_dir() else "does not exist"
        raise address.refused(f"{found}; needed the folder of a prepared version, such as …/name/1.0.0")
    import tensorflow_datasets  # half a second, which other sources need not pay

    try:
        builder: Any = tensorflow_datasets.builder_from_directory(str(folder))
        split = address.choose([str(name) for name in builder.info.splits])
        data = builder.as_data_source(split)
    except UserError:
        raise
    except Exception as error:  # it raises nearly anything
        reason = f"{one_line(error)}; it needs file_format array_record or parquet"
        raise address.refused(f"cannot be read as a prepared data set ({reason})") from error
    files = [file for file in sorted(folder.iterdir()) if file.is_file()]
    return Source(address, files, lambda: _prepared_rows(data, address, split))


def _in_files(address: Address, files: Sequence[Path], reader: Callable[[Path, Address], Rows]) -> Source:
    """A data set whose rows are those of its files, one file after the other."""
    return Source(address, files, lambda: itertools.chain.from_iterable(reader(file, address) for file in files))


def _reader_of(file: Path) -> Callable[[Path, Address], Rows]:
    """What reads a file of that name."""
    return next(reader for ending, reader in READERS.items() if file.name.endswith(ending))


def _conversations(row: Row) -> Row:
    """A row of hh-rlhf, or why it is none."""
    if isinstance(row, BadRow):
        return row
    if "prompt" in row:
        return BadRow("has a `prompt`, but rows of hh-rlhf are whole conversations; the source jsonl takes both")
    for name in ("chosen", "rejected"):
        if not isinstance(row.get(name), str):
            return BadRow(f"`{name}` is {described(row.get(name))}, needed a whole conversation as text")
    return row


def _saved(address: Address, folder: Path) -> Source:
    """What `datasets.Dataset.save_to_disk` wrote."""
    try:
        state = json.loads((folder / "state.json").read_bytes())
        files = [folder / Path(entry["filename"]).name for entry in state["_data_files"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise address.refused(f"has a state.json that cannot be used ({one_line(error)}); save it again") from error
    return _in_files(address, files, arrow_rows)


def _from_the_hub(address: Address) -> Source:
    """A data set by its name, downloaded into the cache of the `datasets` library."""
    name = re.fullmatch(r"([\w-][\w.-]*/[\w.-]+)(?:/([\w.-]+))?(?:@([\w.-]+))?", address.path)
    if name is None:
        raise address.refused("does not exist, and is no name on the Hub such as owner/name or owner/name/config")
    try:
        import datasets  # pyright: ignore[reportMissingImports] # an extra
    except ImportError:
        raise address.refused(
            "is no folder; a data set of the Hub by name needs the extra: pip install 'daajax[hub]'; or download it "
            f"(hf download --repo-type dataset {name[1]} --local-dir …) and name the folder"
        ) from None
    try:
        found = datasets.load_dataset(name[1], name[2], revision=name[3])
    except Exception as error:  # it raises nearly anything
        raise address.refused(
            f"is no folder, and the Hub gives no such data set ({one_line(error)}); check the name and the network, "
            "or download it elsewhere and name the folder"
        ) from error
    split = address.choose([str(name) for name in found])
    files = [Path(file["filename"]) for file in found[split].cache_files]
    return _in_files(address, files, arrow_rows)


def _prepared_rows(data: Any, address: Address, split: str) -> Rows:
    """The rows of a split that TFDS prepared, in the order of its files; `data` is its data source."""
    place = 0
    try:
        for place in range(len(data)):
            try:
                row: Row = {name: _plain(value) for name, value in data[place].items()}
            except UnicodeDecodeError as error:
                row = BadRow(f"not UTF-8 at byte {error.start} of a text")
            yield f"{Path(address.path)}/{split}:{place + 1}", row
    except Exception as error:  # it raises nearly anything
        raise address.refused(f"cannot be read at row {place + 1} ({one_line(error)}); prepare it again") from error


def _plain(value: Any) -> Any:
    """What TFDS gives as plain Python: text comes as bytes, numbers as NumPy's."""
    if isinstance(value, bytes):
        return value.decode()
    if isinstance(value, np.ndarray | np.generic):
        return _plain(value.tolist())
    if isinstance(value, dict):
        return {name: _plain(entry) for name, entry in value.items()}
    return [_plain(entry) for entry in value] if isinstance(value, Iterable) and not isinstance(value, str) else value


SOURCES: dict[str, Callable[[Address], Source]] = {
    "hh": hh,
    "hub": hub,
    "jsonl": jsonl,
    "parquet": parquet,
    "tfds": tfds,
}
