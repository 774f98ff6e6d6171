"""Small data sets of every kind, written by the tools that users have: pyarrow, gzip, TFDS, datasets."""

import gzip
import json
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet

from daajax.data.sources import read
from daajax.data.tokenization import tokenize
from daajax.data.tokenizer import load_tokenizer
from daajax.data.tokens import TokenizedData
from tests import worlds

Rows = Sequence[dict[str, Any]]
DataSet = tuple[str, pathlib.Path, *tuple[str, ...]]  # data.name, data.path, further flags


def tokenizing(folder: pathlib.Path, *, max_length: int) -> Callable[..., TokenizedData]:
    """What makes tokenized data of rows, with a small tokenizer."""
    worlds.save_tokenizer(folder / "tokenizer")
    tokenizer = load_tokenizer(folder / "tokenizer")

    def tokenized(*rows: dict[str, Any]) -> TokenizedData:
        (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
        return tokenize(read("jsonl", folder / "rows.jsonl"), tokenizer, max_length=max_length)

    return tokenized


def jsonl_gz(folder: pathlib.Path, rows: Rows) -> DataSet:
    """Two compressed shards in a folder."""
    folder.mkdir()
    half = len(rows) // 2
    for number, part in enumerate((rows[:half], rows[half:])):
        text = "".join(json.dumps(row) + "\n" for row in part)
        (folder / f"pairs-{number}.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    return "jsonl", folder


def parquet_file(folder: pathlib.Path, rows: Rows) -> DataSet:
    """One file of several row groups."""
    folder.mkdir()
    pyarrow.parquet.write_table(pa.Table.from_pylist(list(rows)), folder / "pairs.parquet", row_group_size=5)
    return "parquet", folder / "pairs.parquet"


def parquet_folder(folder: pathlib.Path, rows: Rows, splits: Mapping[str, int] | None = None) -> DataSet:
    """Shards named as the Hub names them; `splits` says how many of the rows each has, from the front."""
    folder.mkdir()
    rows = list(rows)
    for split, count in (splits or {"train": len(rows)}).items():
        part, rows = rows[:count], rows[count:]
        shards = [part[: count // 2], part[count // 2 :]] if splits is None else [part]
        for number, shard in enumerate(shards):
            file = folder / f"{split}-{number:05d}-of-{len(shards):05d}.parquet"
            pyarrow.parquet.write_table(pa.Table.from_pylist(shard), file)
    return "parquet", folder


def hh(folder: pathlib.Path, rows: Rows) -> DataSet:
    """Whole conversations whose turns, taken apart, are the rows again."""
    folder.mkdir()
    text = "".join(json.dumps(conversation(row)) + "\n" for row in rows)
    (folder / "pairs.jsonl").write_text(text)
    return "hh", folder / "pairs.jsonl"


def conversation(row: dict[str, Any]) -> dict[str, str]:
    """A text pair as hh-rlhf has them."""
    return {name: f"\n\nHuman: {row['prompt']}\n\nAssistant:{row[name]}" for name in ("chosen", "rejected")}


def hh_folder(folder: pathlib.Path, rows: Rows) -> pathlib.Path:
    """Anthropic's layout: folders of subsets, each with its splits, and one that holds no pairs."""
    for subset, part in (("harmless-base", rows[::2]), ("helpful-base", rows[1::2])):
        (folder / subset).mkdir(parents=True)
        for split, some in (("train", part), ("test", part[:2])):
            text = "".join(json.dumps(conversation(row)) + "\n" for row in some)
            (folder / subset / f"{split}.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    (folder / "red-team-attempts").mkdir()
    (folder / "red-team-attempts" / "red_team_attempts.jsonl.gz").write_bytes(gzip.compress(b'{"transcript": "a"}\n'))
    return folder


def tfds(
    folder: pathlib.Path, rows: Rows, *, file_format: str = "array_record", features: Mapping[str, Any] | None = None
) -> DataSet:
    """Prepared by TFDS without TensorFlow, with the splits train and test."""
    import tensorflow_datasets

    folder.mkdir(parents=True, exist_ok=True)
    texts = {name: tensorflow_datasets.features.Text() for name in rows[0]}

    class Pairs(tensorflow_datasets.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tensorflow_datasets.core.Version("1.0.0")
        pkg_dir_path, code_path = folder, None  # it looks for files beside the code

        def _info(self):
            dict_of = tensorflow_datasets.features.FeaturesDict
            return self.dataset_info_from_configs(features=dict_of(texts | dict(features or {})))

        def _split_generators(self, dl_manager):
            return {"train": enumerate(rows), "test": enumerate(rows[:3])}

        def _generate_examples(self):
            raise NotImplementedError

    builder = Pairs(data_dir=str(folder), file_format=file_format)
    builder.download_and_prepare()
    return "tfds", pathlib.Path(builder.data_dir), "--config.data.split=train"


def tfds_parquet(folder: pathlib.Path, rows: Rows) -> DataSet:
    """Likewise, as Parquet."""
    return tfds(folder, rows, file_format="parquet")


def arrow_stream(file: pathlib.Path, rows: Rows) -> None:
    """A file in the format in which `datasets` keeps data."""
    file.parent.mkdir(parents=True, exist_ok=True)
    table = pa.Table.from_pylist(list(rows))
    with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=7)


def saved_to_disk(folder: pathlib.Path, rows: Rows) -> DataSet:
    """As `datasets.DatasetDict.save_to_disk` writes it: splits, shards, and a stale file that is none of them."""
    half = len(rows) // 2
    for split, parts in {"train": [rows[:half], rows[half:]], "test": [rows[:3]]}.items():
        names = [f"data-{number:05d}-of-{len(parts):05d}.arrow" for number in range(len(parts))]
        for name, part in zip(names, parts, strict=True):
            arrow_stream(folder / split / name, part)
        state = {"_data_files": [{"filename": name} for name in names], "_split": split}
        (folder / split / "state.json").write_text(json.dumps(state))
    arrow_stream(folder / "train" / "cache-0123.arrow", rows[:1])
    (folder / "dataset_dict.json").write_text(json.dumps({"splits": ["train", "test"]}))
    return "hub", folder, "--config.data.split=train"


def snapshot(folder: pathlib.Path, rows: Rows) -> DataSet:
    """A repository of the Hub as its client downloads it."""
    folder.mkdir()
    parquet_folder(folder / "data", rows)
    (folder / "README.md").write_text("# pairs")
    (folder / ".cache").mkdir()
    (folder / ".cache" / "other.parquet").write_text("not ours")
    return "hub", folder


def hub_cache(folder: pathlib.Path, name: str, rows: Rows) -> pathlib.Path:
    """A cache of the `datasets` library that holds a data set of the Hub, as a download leaves it."""
    import datasets

    source = folder / "source.parquet"
    folder.mkdir()
    pyarrow.parquet.write_table(pa.Table.from_pylist(list(rows)), source)
    datasets.load_dataset("parquet", data_files={"train": str(source)}, cache_dir=str(folder))
    (made,) = (folder / "parquet").glob("default-*/0.0.0/*/")
    place = folder / name.replace("/", "___") / "default" / "0.0.0" / ("a" * 40)
    place.parent.mkdir(parents=True)
    made.rename(place)
    short = name.split("/")[1]
    (place / "parquet-train.arrow").rename(place / f"{short}-train.arrow")
    return folder


KINDS = {
    "jsonl.gz shards": jsonl_gz,
    "parquet file": parquet_file,
    "parquet shards": parquet_folder,
    "tfds array_record": tfds,
    "tfds parquet": tfds_parquet,
    "hub snapshot": snapshot,
    "hub saved to disk": saved_to_disk,
}
