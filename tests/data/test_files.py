"""Files and folders of rows: which are read, in which order, and what is said of those that cannot be."""

import builtins
import json
import sys

import pyarrow as pa
import pyarrow.parquet
import pytest

from daajax.data.files import ROWS_AT_ONCE, Address, find
from daajax.data.sources import SOURCES, open_source, read
from daajax.errors import UserError
from tests.data import sets

ROWS = [{"prompt": "ab", "chosen": "c" * n, "rejected": "de"} for n in range(1, 12)]
HH = "\n\nHuman: Is it red?\n\nAssistant:"


def layout(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(json.dumps(ROWS[0]))
    return root


def found(root, split=None, endings=(".jsonl", ".parquet")):
    return [str(file.relative_to(root)) for file in find(Address(str(root), split), endings)]


# ---------------------------------------------------------------------- files and splits


def test_a_folder_is_read_in_the_order_of_names_without_what_is_hidden(tmp_path):
    layout(tmp_path, "b.jsonl", "a/c.jsonl", "a.jsonl", ".git/d.jsonl", "_e.jsonl", "notes.txt")
    assert found(tmp_path) == ["a/c.jsonl", "a.jsonl", "b.jsonl"]


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("train.jsonl", "train"),
        ("data/test-00000-of-00002.parquet", "test"),
        ("data/train_prefs-00000-of-00001-b42a.parquet", "train_prefs"),
        ("data/preferences-00000-of-00001.parquet", "preferences"),
        ("default/validation/0000.parquet", "validation"),
        ("val/0000.parquet", "validation"),
        ("pairs-dev.jsonl", "validation"),
        ("helpful-base/eval.jsonl", "test"),
        ("train/part-00000-of-00009.parquet", "train"),
        ("train/data-00000-of-00001.parquet", "train"),
    ],
)
def test_the_split_of_a_file_is_read_off_its_name_or_its_folders(tmp_path, name, split):
    layout(tmp_path, name)
    assert found(tmp_path, split) == [name]
    assert found(tmp_path) == [name]  # the only one
    with pytest.raises(UserError, match=rf"has the splits {split}, but data\.split='nope'"):
        found(tmp_path, "nope")


@pytest.mark.parametrize("name", ["latest.jsonl", "part-00000-of-00002.parquet", "trainer/contest.jsonl"])
def test_names_that_only_look_like_splits_are_none(tmp_path, name):
    layout(tmp_path, name)
    assert found(tmp_path) == [name]
    with pytest.raises(UserError, match=r"is a folder without splits .*data\.split='train' cannot act; unset it"):
        found(tmp_path, "train")


def test_files_of_a_split_among_others_need_a_choice(tmp_path):
    layout(tmp_path, "train.jsonl", "more.jsonl")
    assert found(tmp_path, "train") == ["train.jsonl"]
    with pytest.raises(UserError, match=r"holds files of the splits train and others, such as more\.jsonl; choose"):
        found(tmp_path)


def test_a_single_file_has_no_splits(tmp_path):
    file = layout(tmp_path, "train.jsonl") / "train.jsonl"
    with pytest.raises(UserError, match=r"is a single file, so data\.split='train' cannot act"):
        read("jsonl", file, split="train")


@pytest.mark.parametrize("split", ["train[:10%]", "train+test", ""])
def test_a_part_of_a_split_is_a_limit(tmp_path, split):
    with pytest.raises(UserError, match=r"is no split's name; for a part of one set data\.limit"):
        read("tfds", tmp_path, split=split)


@pytest.mark.parametrize("name", sorted(set(SOURCES) - {"hub"}))
def test_a_path_that_is_not_there_is_refused(tmp_path, name):
    with pytest.raises(UserError, match=r"^eval_data\.path=.*nowhere does not exist"):
        open_source(name, tmp_path / "nowhere", option="eval_data")


# ---------------------------------------------------------------------- ids and limits


def test_rows_of_several_files_are_called_by_their_place_in_the_folder(tmp_path):
    root = sets.hh_folder(tmp_path / "hh", ROWS[:6])
    examples = read("hh", root, split="train").examples
    assert [e.id for e in examples] == [
        f"{s}-base/train.jsonl.gz:{n}" for s in ("harmless", "helpful") for n in (1, 2, 3)
    ]
    assert examples[0].location == f"{root}/harmless-base/train.jsonl.gz:1"


@pytest.mark.parametrize("kind", sets.KINDS)
def test_every_kind_of_data_set_gives_its_rows_and_stops_at_a_limit(tmp_path, kind):
    name, path, *flags = sets.KINDS[kind](tmp_path / "data", ROWS)
    split = flags[0].split("=")[1] if flags else None
    every = read(name, path, split=split).examples
    assert sorted(e.responses for e in every) == sorted((row["chosen"], row["rejected"]) for row in ROWS)
    assert len({e.id for e in every}) == len(every)
    assert read(name, path, split=split, limit=7).examples == every[:7]


def test_rows_are_numbered_on_through_batches_and_row_groups(tmp_path):
    count = 2 * ROWS_AT_ONCE + 5
    rows = [{"prompt": str(n), "chosen": "a", "rejected": "b"} for n in range(count)]
    _, path, *_ = sets.parquet_file(tmp_path / "data", rows)
    examples = read("parquet", path).examples
    assert [e.prompt for e in examples] == [str(n) for n in range(count)]
    assert [e.location for e in examples] == [f"{path}:{n + 1}" for n in range(count)]


# ---------------------------------------------------------------------- Parquet and Arrow


def test_a_null_in_a_table_is_an_absent_column(tmp_path):
    rows = [{"prompt": "a", "chosen": "b", "rejected": "c", "weight": None, "note": None}]
    _, path, *_ = sets.parquet_file(tmp_path / "data", [*rows, rows[0] | {"weight": 2.0}])
    result = read("parquet", path)
    assert [e.weight for e in result.examples] == [1.0, 2.0]
    assert result.notices == []


def test_a_bad_row_of_a_table_is_named_by_file_and_row(tmp_path):
    _, path, *_ = sets.parquet_file(tmp_path / "data", [*ROWS, ROWS[0] | {"chosen": ""}])
    with pytest.raises(UserError) as error:
        read("parquet", path)
    assert str(error.value).startswith(f"{path}:12: `chosen` is empty")


def test_text_of_a_table_that_is_not_utf8_is_a_bad_row(tmp_path):
    path = tmp_path / "pairs.parquet"
    texts = pa.array([b"x", b"\xff", b"y"]).cast(pa.binary())
    broken = pa.StringArray.from_buffers(3, texts.buffers()[1], texts.buffers()[2])
    table = pa.table({"prompt": broken, "chosen": ["a"] * 3, "rejected": ["b"] * 3})
    pyarrow.parquet.write_table(table, path)
    result = read("parquet", path, max_bad_rows=1)
    assert [e.prompt for e in result.examples] == ["x", "y"]
    assert result.bad_rows.reasons == [f"{path}:2: not UTF-8 at byte 0 of a text"]


@pytest.mark.parametrize("damage", ["truncated", "empty", "text"])
@pytest.mark.parametrize(("name", "ending"), [("parquet", "parquet"), ("hub", "arrow")])
def test_a_damaged_table_is_named(tmp_path, name, ending, damage):
    file = tmp_path / f"pairs.{ending}"
    if ending == "parquet":
        pyarrow.parquet.write_table(pa.Table.from_pylist(ROWS), file)
    else:
        sets.arrow_stream(file, ROWS)
    content = file.read_bytes()
    file.write_bytes({"truncated": content[: len(content) // 2], "empty": b"", "text": b"not a table" * 9}[damage])
    with pytest.raises(UserError) as error:
        read(name, tmp_path)
    assert f"data.path={tmp_path} holds {file}, which cannot be read to its end" in str(error.value)
    assert "\n" not in str(error.value)


# ---------------------------------------------------------------------- hh-rlhf


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": HH, "chosen": " a", "rejected": " b"}, "has a `prompt`"),
        ({"chosen": HH + " a"}, "`rejected` is missing, needed a whole conversation"),
        ({"chosen": [{"role": "user", "content": "a"}], "rejected": "b"}, "`chosen` is list"),
        ({"chosen": "red", "rejected": "blue"}, "do not begin with a common"),
        ({"chosen": HH + " a", "rejected": HH + " a"}, "are equal"),
    ],
)
def test_what_is_no_pair_of_conversations_is_a_bad_row(tmp_path, row, reason):
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps({"chosen": HH + " a", "rejected": HH + " b"}) + "\n" + json.dumps(row) + "\n{")
    with pytest.raises(UserError) as error:
        read("hh", path)
    assert str(error.value).startswith(f"{path}:2: ")
    assert reason in str(error.value)
    assert read("hh", path, max_bad_rows=2).counters["bad_rows"] == 2


# ---------------------------------------------------------------------- TFDS


def test_all_columns_of_a_prepared_data_set_arrive_as_python_values(tmp_path):
    import numpy as np
    import tensorflow_datasets as library

    chat = library.features.Sequence({"role": library.features.Text(), "content": library.features.Text()})
    features = {"prompt": chat, "completion": library.features.Text(), "label": library.features.Scalar(np.bool_)}
    features |= {"weight": library.features.Scalar(np.float32)}
    rows = [
        {"prompt": [{"role": "user", "content": "é?"}], "completion": f"ü{n}", "label": n == 1, "weight": 0.5}
        for n in range(3)
    ]
    for file_format in ("array_record", "parquet"):
        _, path, *_ = sets.tfds(tmp_path / file_format, rows, file_format=file_format, features=features)
        examples = read("tfds", path, split="train").examples
        assert sorted(e.responses[0][0]["content"] for e in examples) == ["ü0", "ü1", "ü2"]
        for example in examples:
            assert example.prompt == [{"role": "user", "content": "é?"}]
            assert example.label is (example.responses[0][0]["content"] == "ü1")
            assert example.weight == 0.5
            assert example.location.startswith(f"{path}/train:")
    assert "tensorflow" not in sys.modules


def test_a_prepared_data_set_needs_its_version_folder_and_a_split(tmp_path):
    _, path, *_ = sets.tfds(tmp_path, ROWS)
    with pytest.raises(UserError, match=r"has no dataset_info\.json, but pairs/1\.0\.0 below it; needed the folder"):
        read("tfds", tmp_path)
    with pytest.raises(UserError, match=r"has the splits train, test; choose one with data\.split"):
        read("tfds", path)
    with pytest.raises(UserError, match=r"has the splits train, test, but data\.split='nope'"):
        read("tfds", path, split="nope")


@pytest.mark.parametrize("file_format", ["array_record", "parquet"])
@pytest.mark.parametrize("damage", ["truncated", "deleted"])
def test_a_damaged_prepared_data_set_is_one_line(tmp_path, file_format, damage):
    _, path, *_ = sets.tfds(tmp_path, ROWS, file_format=file_format)
    (file,) = path.glob("*train*")
    if damage == "deleted":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:40])
    with pytest.raises(UserError) as error:
        read("tfds", path, split="train")
    assert str(error.value).startswith(f"data.path={path} cannot be read")
    assert "\n" not in str(error.value)


def test_a_format_that_needs_tensorflow_is_refused_in_one_line(tmp_path):
    _, path, *_ = sets.tfds(tmp_path, ROWS)
    info = path / "dataset_info.json"
    info.write_text(info.read_text().replace('"fileFormat": "array_record"', '"fileFormat": "tfrecord"'))
    with pytest.raises(UserError) as error:
        read("tfds", path, split="train")
    assert "it needs file_format array_record or parquet" in str(error.value)
    assert "\n" not in str(error.value)


# ---------------------------------------------------------------------- the Hub


def test_what_datasets_itself_saves_is_read(tmp_path):
    datasets = pytest.importorskip("datasets", reason="the extra `hub` is not installed")
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "one", num_shards=2)
    examples = read("hub", tmp_path / "one").examples
    assert [e.responses[0] for e in examples] == [row["chosen"] for row in ROWS]
    assert examples[6].id == "data-00001-of-00002.arrow:1"
    halves = {"left": datasets.Dataset.from_list(ROWS[:4]), "right": datasets.Dataset.from_list(ROWS[4:])}
    datasets.DatasetDict(halves).save_to_disk(tmp_path / "two")
    assert len(read("hub", tmp_path / "two", split="right").examples) == 7
    with pytest.raises(UserError, match=r"has the splits left, right; choose one"):
        read("hub", tmp_path / "two")
    with pytest.raises(UserError, match=r"is a single data set that was saved to disk, so data\.split='left'"):
        read("hub", tmp_path / "one", split="left")


def test_a_state_that_cannot_be_used_is_named(tmp_path):
    (tmp_path / "state.json").write_text("{}")
    with pytest.raises(UserError, match=r"has a state\.json that cannot be used"):
        read("hub", tmp_path)


def test_a_saved_data_set_cannot_name_files_elsewhere(tmp_path):
    sets.arrow_stream(tmp_path / "secret.arrow", ROWS)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "state.json").write_text(json.dumps({"_data_files": [{"filename": "../secret.arrow"}]}))
    with pytest.raises(UserError, match="cannot be read to its end"):
        read("hub", tmp_path / "data")


def test_a_folder_with_the_same_data_twice_is_refused(tmp_path):
    layout(tmp_path, "pairs.jsonl")
    pyarrow.parquet.write_table(pa.Table.from_pylist(ROWS), tmp_path / "pairs.parquet")
    with pytest.raises(UserError, match=r"as \*\.jsonl, \*\.parquet; keep one kind"):
        read("hub", tmp_path)


def test_a_file_is_no_data_set_of_the_hub(tmp_path):
    with pytest.raises(UserError, match=r"is a file; needed a folder, or a name on the Hub"):
        read("hub", layout(tmp_path, "pairs.jsonl") / "pairs.jsonl")


def test_a_path_that_is_neither_folder_nor_name_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"does not exist, and is no name on the Hub"):
        read("hub", tmp_path / "nowhere")


def test_a_name_without_the_extra_says_how_to_get_it(monkeypatch):
    real = builtins.__import__

    def without(name, *arguments, **options):
        if name == "datasets":
            raise ImportError(name)
        return real(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UserError, match=r"pip install 'daajax\[hub\]'; or download it \(hf download .* owner/name"):
        read("hub", "owner/name")


def test_a_name_that_cannot_be_reached_is_one_line():
    pytest.importorskip("datasets", reason="the extra `hub` is not installed")
    with pytest.raises(UserError) as error:
        read("hub", "owner/nowhere")
    assert str(error.value).startswith("data.path=owner/nowhere is no folder, and the Hub gives no such data set")
    assert "\n" not in str(error.value)


def test_a_name_may_carry_a_config_and_a_revision(monkeypatch):
    datasets = pytest.importorskip("datasets", reason="the extra `hub` is not installed")
    asked = []

    def load_dataset(*arguments, **options):
        asked.append((arguments, options))
        raise ConnectionError("enough")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    for path in ("owner/name", "owner/name/config", "owner/name/config@v1.0", "owner/name@main"):
        with pytest.raises(UserError, match="enough"):
            read("hub", path)
    assert asked == [
        (("owner/name", None), {"revision": None}),
        (("owner/name", "config"), {"revision": None}),
        (("owner/name", "config"), {"revision": "v1.0"}),
        (("owner/name", None), {"revision": "main"}),
    ]
