import concurrent.futures
import dataclasses
import json
import os
import shutil
import threading

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from daajax.data import token_cache
from daajax.data.sources import read
from daajax.data.token_cache import ARRAYS, load, tokenized
from daajax.data.tokenization import tokenize
from daajax.data.tokenizer import load_tokenizer
from daajax.errors import UserError
from tests.data import sets

ROWS = [{"prompt": "ab", "chosen": "c" * n, "rejected": "de", "weight": n, "id": f"row/{n}"} for n in range(1, 30)]
CHAT = {"prompt": [{"role": "user", "content": "ab"}], "chosen": "c", "rejected": "d"}
TEMPLATE = "{% for m in messages %}{{ m['content'] }}x{% endfor %}"
FILES = ["meta.json", *(f"{name}.npy" for name in ARRAYS)]


@pytest.fixture
def run(tmp_path):
    """Runs the front door on a small data set and tokenizer; keyword arguments override."""
    backend = Tokenizer(
        models.WordLevel({"<s>": 0, "</s>": 1} | {chr(97 + i): i + 2 for i in range(26)}, unk_token="z")
    )
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    backend.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(map(json.dumps, ROWS)))

    def front_door(**overrides):
        options = {"path": path, "tokenizer_path": folder, "max_length": 20, "cache_dir": tmp_path / "cache"}
        return tokenized(**{"name": "jsonl"} | options | overrides)

    front_door.path, front_door.tokenizer, front_door.cache = path, folder, tmp_path / "cache"
    return front_door


def entry_of(run):
    (entry,) = run.cache.iterdir()
    return entry


def assert_same(one, two):
    for field in ("tokens", "scored", "starts", "lengths", "weights"):
        left, right = getattr(one, field), getattr(two, field)
        assert left.dtype == right.dtype
        np.testing.assert_array_equal(left, right)
    assert list(one.ids) == list(two.ids)
    assert (one.counters, one.digest) == (two.counters, two.digest)


def hit(data):
    return data.notices[-1].startswith("cache: hit ")


def test_the_second_run_finds_what_the_first_one_made(run):
    first, second = run(), run()
    assert not hit(first)
    assert first.notices[-1].startswith("tokenized 29 examples in ")
    assert hit(second)
    assert second.notices[-1] == f"cache: hit {entry_of(run).name}"
    assert_same(first, second)
    assert_same(first, tokenize(read("jsonl", run.path), load_tokenizer(run.tokenizer), max_length=20))
    assert not second.tokens.flags.writeable
    assert isinstance(second.tokens.base, np.memmap)


def test_without_a_folder_nothing_is_kept(run):
    data = run(cache_dir=None)
    assert not run.cache.exists()
    assert_same(data, run())


def test_notices_and_counters_survive_the_cache(run):
    run.path.write_text("{\n" + json.dumps(ROWS[0] | {"extra": 1}))
    first, second = run(max_bad_rows=1), run(max_bad_rows=1)
    assert hit(second)
    assert first.notices[:-1] == second.notices[:-1]
    assert any("columns not used: extra" in notice for notice in second.notices)
    assert second.counters["bad_rows"] == 1


@pytest.mark.parametrize(
    "overrides",
    [
        {"max_length": 21},
        {"max_prompt_length": 5},
        {"truncation": "drop"},
        {"limit": 28},
        {"max_bad_rows": 1},
        {"template": TEMPLATE},
    ],
)
def test_every_option_that_matters_misses(run, overrides):
    run()
    assert not hit(run(**overrides))
    assert hit(run(**overrides))
    assert hit(run())
    assert len(list(run.cache.iterdir())) == 2


def test_what_does_not_matter_hits(run, tmp_path):
    run()
    shutil.copytree(run.tokenizer, tmp_path / "copy")
    (tmp_path / "copy" / "model.safetensors").write_bytes(b"other weights")
    (tmp_path / "elsewhere").mkdir()
    shutil.copy(run.path, tmp_path / "elsewhere")
    moved = run(path=tmp_path / "elsewhere" / run.path.name, tokenizer_path=tmp_path / "copy", vocab_size=64)
    assert hit(moved)


def test_another_byte_of_data_or_tokenizer_misses(run):
    run()
    run.path.write_text(run.path.read_text() + "\n")
    assert not hit(run())
    (run.tokenizer / "chat_template.jinja").write_text(TEMPLATE)
    assert not hit(run())
    (run.tokenizer / "tokenizer.json").write_text((run.tokenizer / "tokenizer.json").read_text() + " ")
    assert not hit(run())
    (run.tokenizer / "special_tokens_map.json").write_text("{}")
    assert not hit(run())


@pytest.mark.parametrize("kind", sets.KINDS)
def test_every_kind_of_data_set_is_cached_by_its_content(run, tmp_path, kind):
    rows = [{name: row[name] for name in ("prompt", "chosen", "rejected")} for row in ROWS]
    name, path, *flags = sets.KINDS[kind](tmp_path / "data", rows)
    split = flags[0].split("=")[1] if flags else None
    first = run(name=name, path=path, split=split)
    assert not hit(first)
    again = run(name=name, path=path, split=split)
    assert hit(again)
    assert_same(first, again)
    root = path if path.is_dir() else path.parent
    root.rename(tmp_path / "moved")
    path = tmp_path / "moved" if path == root else tmp_path / "moved" / path.name
    moved = run(name=name, path=path, split=split)
    assert hit(moved)
    assert list(moved.ids) == list(first.ids)
    shutil.rmtree(tmp_path / "moved")
    changed = [rows[0] | {"chosen": "zz"}, *rows[1:]]
    _, path, *_ = sets.KINDS[kind](tmp_path / "data", changed)
    assert not hit(run(name=name, path=path, split=split))


def test_a_changed_name_a_file_more_or_another_split_misses(run, tmp_path):
    name, path, *_ = sets.jsonl_gz(tmp_path / "data", ROWS)
    run(name=name, path=path)
    (path / "pairs-0.jsonl.gz").rename(path / "pairs-00.jsonl.gz")  # rows without an id are called by it
    assert not hit(run(name=name, path=path))
    shutil.copy(path / "pairs-1.jsonl.gz", path / "pairs-2.jsonl.gz")
    more = run(name=name, path=path)
    assert not hit(more)
    assert len(more.ids) == 29 + 15
    (path / "notes.txt").write_text("not data")
    assert hit(run(name=name, path=path))
    name, path, *_ = sets.parquet_folder(tmp_path / "halves", ROWS, splits={"train": 14, "test": 15})
    assert len(run(name=name, path=path, split="train").ids) == 14
    other = run(name=name, path=path, split="test")
    assert not hit(other)
    assert len(other.ids) == 15


@pytest.mark.parametrize("column", [{"scores": [1, 2]}, {"label": True}, {"prompt_probability": 0.3}, {}])
def test_columns_that_only_some_data_have_survive_the_cache(run, column):
    responses = {"responses": ["c", "d"]} if "scores" in column else {"completion": "c"}
    rows = [{"prompt": "ab"} | responses | column, {"prompt": "b"} | responses]
    run.path.write_text("\n".join(map(json.dumps, rows)))
    first, second = run(), run()
    assert hit(second)
    for name, key in {"scores": "scores", "labels": "label", "prompt_probabilities": "prompt_probability"}.items():
        left, right = getattr(first, name), getattr(second, name)
        assert (right is not None) == (key in column)
        assert (left is None) == (right is None)
        if left is not None:
            assert left.dtype == right.dtype
            np.testing.assert_array_equal(left, right)
    assert first.digest == second.digest


def test_a_damaged_column_is_made_again(run):
    run.path.write_text(json.dumps({"prompt": "ab", "completion": "c", "label": True}))
    first = run()
    damage(entry_of(run) / "labels.npy", 6)
    again = run()
    assert "is damaged" in again.notices[-2]
    np.testing.assert_array_equal(first.labels, again.labels)


def test_a_template_file_counts_by_its_content(run, tmp_path):
    run.path.write_text(json.dumps(CHAT))
    template = tmp_path / "chat.jinja"
    template.write_text(TEMPLATE)
    first = run(template=str(template))
    assert hit(run(template=TEMPLATE))
    template.write_text(TEMPLATE.replace("x", "yy"))
    second = run(template=str(template))
    assert not hit(second)
    assert second.digest != first.digest


def test_tools_and_template_arguments_and_what_is_scored_make_other_entries(run):
    template = "{{ tools }}{{ mood }}" + TEMPLATE
    (run.tokenizer / "chat_template.jinja").write_text(template)
    conversation = {"messages": [*CHAT["prompt"], {"role": "assistant", "content": "c"}] * 2}
    found = []
    for extra in ({}, {"tools": [{"name": "a"}]}, {"tools": [{"name": "b"}]}, {"chat_template_kwargs": {"mood": "a"}}):
        run.path.write_text(json.dumps(conversation | extra))
        found += [run(max_length=999), run(max_length=999, score="all")]
        assert not hit(found[-1])
        assert hit(run(max_length=999, score="all"))
    assert len({data.digest for data in found}) == 8
    assert len(list(run.cache.iterdir())) == 8


def test_another_format_misses(run, monkeypatch):
    run()
    monkeypatch.setattr(token_cache, "FORMAT", token_cache.FORMAT + 1)
    assert not hit(run())


def damage(file, how):
    content = bytearray(file.read_bytes())
    if how == "deleted":
        file.unlink()
        return
    if how == "truncated":
        del content[-3:]
    elif how == "emptied":
        content.clear()
    elif how == "zeroed":
        content[:] = bytes(len(content))
    else:
        content[how * len(content) // 7] ^= 16
    file.write_bytes(content)


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("how", ["deleted", "truncated", "emptied", "zeroed", 0, 3, 6])
def test_a_damaged_entry_is_never_used_but_made_again(run, file, how):
    first = run(cache_dir=None)
    run()
    damage(entry_of(run) / file, how)
    again = run()
    assert not hit(again)
    assert "is damaged" in again.notices[-2]
    assert again.notices[-2].endswith("made again")
    assert_same(first, again)
    assert hit(run())
    assert len(list(run.cache.iterdir())) == 1


def test_an_entry_of_another_key_is_foreign(run):
    run()
    mine = entry_of(run)
    run(max_length=5)
    (other,) = set(run.cache.iterdir()) - {mine}
    shutil.rmtree(mine)
    other.rename(mine)
    again = run()
    assert "written for another key" in again.notices[-2]
    assert_same(again, run(cache_dir=None))


@pytest.mark.parametrize("kind", ["empty folder", "file"])
def test_what_is_no_entry_is_replaced(run, kind):
    first = run()
    entry = entry_of(run)
    shutil.rmtree(entry)
    if kind == "file":
        entry.write_text("something else")
    else:
        entry.mkdir()
    again = run()
    assert "is damaged" in again.notices[-2]
    assert_same(first, again)
    assert hit(run())


def test_a_pickle_in_an_entry_is_never_opened(run, tmp_path):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "exploded"),)

    run()
    entry = entry_of(run)
    np.save(entry / "tokens.npy", np.array([Bomb()], object), allow_pickle=True)
    meta = json.loads((entry / "meta.json").read_text())
    size, digest = (entry / "tokens.npy").stat().st_size, token_cache._file_digest(entry / "tokens.npy")
    meta["content"]["files"]["tokens.npy"] = {"bytes": size, "sha256": digest}
    meta["sha256"] = token_cache.hashlib.sha256(token_cache._canonical(meta["content"])).hexdigest()
    (entry / "meta.json").write_text(json.dumps(meta))
    assert_same(run(), run(cache_dir=None))
    assert not (tmp_path / "exploded").exists()


def test_an_interrupted_write_leaves_no_entry(run, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(token_cache, "_flush_folder", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run()
    assert list(run.cache.iterdir()) == []
    assert not hit(run())


def test_a_full_disk_is_a_clear_error(run, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "save", full)
    with pytest.raises(UserError, match=r"^data\.cache_dir=.* cannot keep .*No space left on device.*make room"):
        run()


def test_a_cache_folder_that_cannot_be_made_is_refused_before_the_work(run, monkeypatch):
    run.cache.write_text("a file is in its place")
    monkeypatch.setattr(token_cache, "tokenize", None)
    with pytest.raises(UserError, match=r"^data\.cache_dir="):
        run()


def test_a_missing_data_file_is_the_data_paths_fault(run, tmp_path):
    with pytest.raises(UserError, match=r"^data\.path="):
        run(path=tmp_path / "nowhere.jsonl")


def test_the_vocabulary_is_checked_even_on_a_hit(run):
    run(vocab_size=28)
    with pytest.raises(UserError, match="vocabulary larger than the embedding"):
        run(vocab_size=27)


def test_the_loser_of_a_race_keeps_the_winners_entry(run, monkeypatch):
    winner = run()
    entry = entry_of(run)
    written = (entry / "tokens.npy").stat().st_ino
    token_cache.save(dataclasses.replace(winner, notices=["a second writer"]), entry)
    assert (entry / "tokens.npy").stat().st_ino == written
    assert_same(load(entry), winner)
    assert list(run.cache.iterdir()) == [entry]


def test_concurrent_runs_agree(run):
    barrier = threading.Barrier(4)

    def race(_):
        barrier.wait(60)
        return run()

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        made = list(pool.map(race, range(4)))
    for data in made:
        assert_same(data, run(cache_dir=None))
    assert hit(run())
    assert len(list(run.cache.iterdir())) == 1


def test_a_tilde_in_the_folders_name_is_home(run, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    run(cache_dir="~/cache")
    assert hit(run())
