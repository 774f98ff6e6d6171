"""Paths in a bucket: they read and write as those on a disk do, and what a bucket refuses is one line."""

import gc
import gzip
import json
import pathlib
import shutil
import threading
import time

import numpy as np
import pytest
from etils import epath

from daajax import bucket as buckets
from daajax import command, data_copies, lease, metrics, output, processes, prompts, reference
from daajax.data import token_cache
from daajax.errors import OutageError, UserError
from daajax.mirror import Mirror
from daajax.watchdog import Watchdog
from tests import stores, worlds

ROOT = buckets.BucketPath("gs://bucket/a/run")
NOWHERE = "gs://nowhere/a"


@pytest.fixture
def broken(bucket, monkeypatch):
    """The bucket, asked but once more where it does not answer."""
    monkeypatch.setattr(buckets, "RETRIES", {"gcs_request_retries": {"max_retries": 1, "initial_delay": "10ms"}})
    return bucket


# ---------------------------------------------------------------------- addresses


@pytest.mark.parametrize(
    ("address", "says"),
    [
        ("s3://bucket/run", "s3:// is neither read nor written; name a folder or gs://bucket/folder"),
        ("hf://org/model", "hf:// is neither read nor written"),
        ("gs:/bucket/run", "is neither a folder nor an address; two slashes follow the colon"),
        ("gs://bucket", "is no folder in a bucket; needed is gs://bucket/folder"),
        ("gs://bucket/", "is no folder in a bucket"),
        ("gs:///run", "is no folder in a bucket"),
        ("gs://bucket/a/../b", "is no folder in a bucket"),
        ("gs://bucket/a//b", "is no folder in a bucket"),
        ("gs://bucket/a b", "without spaces and any of ? # * [ ]"),
        ("gs://bucket/a?b", "is no folder in a bucket"),
    ],
)
def test_an_address_that_cannot_be_is_one_line(address, says):
    with pytest.raises(UserError) as error:
        buckets.path_of(address, "--workdir")
    assert str(error.value).startswith(f"--workdir={address}")
    assert says in str(error.value)
    assert "\n" not in str(error.value)


def test_an_address_is_a_path_here_or_in_a_bucket(tmp_path):
    assert buckets.path_of(str(tmp_path), "--workdir") == tmp_path
    path = buckets.path_of("gs://bucket/a/run/", "--workdir")
    assert str(path / "x.json") == "gs://bucket/a/run/x.json"
    assert path == epath.Path("gs://bucket/a/run") == path.absolute()
    assert isinstance(epath.Path("gs://bucket/a") / "run", buckets.BucketPath)


# ---------------------------------------------------------------------- files


def test_a_folder_is_there_while_an_object_lies_in_it(bucket):
    bucket.write("a/running", {"x": b""})  # beside it, not in it
    assert not ROOT.exists()
    ROOT.mkdir(parents=True, exist_ok=True)
    assert not ROOT.is_dir()
    (ROOT / "deep" / "er.txt").write_text("wörter\n", encoding="utf-8")
    (ROOT / "top.json").write_bytes(b"{}")
    assert ROOT.is_dir()
    assert not ROOT.is_file()
    assert (ROOT / "deep").is_dir()
    assert (ROOT / "top.json").is_file()
    assert (ROOT / "deep" / "er.txt").read_text(encoding="utf-8") == "wörter\n"
    assert sorted(path.name for path in ROOT.iterdir()) == ["deep", "top.json"]
    assert list(ROOT.glob("*.json")) == [ROOT / "top.json"]
    assert list(ROOT.walk()) == [(ROOT, ["deep"], ["top.json"]), (ROOT / "deep", [], ["er.txt"])]
    assert (ROOT / "top.json").stat().length == 2
    with pytest.raises(FileExistsError):
        (ROOT / "deep").mkdir()
    (ROOT / "deep").rename(ROOT / "other")
    assert bucket.files("a/run") == {"other/er.txt": "wörter\n".encode(), "top.json": b"{}"}
    ROOT.rmtree()
    assert bucket.files("a") == {"running/x": b""}


def test_what_is_not_there_is_told_as_on_a_disk(bucket):
    for act in (
        ROOT.read_bytes,
        ROOT.unlink,
        ROOT.rmtree,
        ROOT.stat,
        lambda: ROOT.rename(ROOT),
        lambda: [*ROOT.iterdir()],
    ):
        with pytest.raises(FileNotFoundError):
            act()
    ROOT.unlink(missing_ok=True)


@pytest.mark.parametrize(("mode", "content"), [("wb", b"ha"), ("w", "ha")])
def test_a_file_whose_writing_fails_is_not_there(bucket, mode, content):
    (ROOT / "file").write_text("before")

    def half() -> None:
        with (ROOT / "file").open(mode) as file:
            file.write(content)
            raise MemoryError

    with pytest.raises(MemoryError):
        half()
    left = (ROOT / "file").open(mode)
    left.write(content)
    del left
    gc.collect()
    assert (ROOT / "file").read_text() == "before"


def test_more_names_than_a_page_of_a_list_has(bucket, capsys):
    bucket.write("a/run", {f"d/{number:03}": b"" for number in range(120)})
    assert buckets.names(ROOT) == [f"d/{number:03}" for number in range(120)]
    bucket.read_only = True
    output.remove_folder(ROOT)
    assert "a/run cannot be written (HTTP 403)" in capsys.readouterr().out
    bucket.read_only = False
    output.remove_folder(ROOT)
    assert not bucket.files("a/run")


@pytest.mark.parametrize("size", [0, 1, 5, 9, 10, 11, 40, 57])
def test_an_object_read_in_parts_is_the_object(bucket, monkeypatch, size):
    monkeypatch.setattr(buckets, "_PART_BYTES", 10)
    content = bytes(range(size))
    bucket.write("a/run", {"x": content})
    found = list(buckets.parts(ROOT / "x"))
    assert b"".join(found) == content
    assert all(len(part) <= 10 for part in found)


def test_an_object_that_is_written_to_while_it_is_read_is_refused(bucket, monkeypatch):
    monkeypatch.setattr(buckets, "_PART_BYTES", 10)
    monkeypatch.setattr(buckets, "_READ_AHEAD", 1)
    bucket.write("a/run", {"x": bytes(50)})
    parts = buckets.parts(ROOT / "x")
    next(parts)
    next(parts)
    bucket.write("a/run", {"x": bytes(50)})
    with pytest.raises(UserError, match="was written to while it was read; start again"):
        list(parts)


def test_an_object_is_written_where_it_is_as_it_was(bucket):
    first = buckets.write(ROOT / "x", b"1", only_at=b"")
    assert first is not None
    assert buckets.write(ROOT / "x", b"2", only_at=b"") is None  # it is there
    second = buckets.write(ROOT / "x", b"2", only_at=first)
    assert buckets.write(ROOT / "x", None, only_at=first) is None
    assert (ROOT / "x").read_bytes() == b"2"
    assert buckets.write(ROOT / "x", None, only_at=second) is not None
    assert not (ROOT / "x").exists()


# ---------------------------------------------------------------------- what a bucket refuses


@pytest.mark.parametrize(
    ("status", "says"),
    [
        (401, r"\(HTTP 401\): it is not open to everybody; log in with `gcloud auth application-default login`\."),
        (403, r"\(HTTP 403\): your credentials do not open it; .* roles/storage\.objectUser\."),
        (503, r"\(BucketError|All 1 retry attempts failed.*\); check the network, then start the same command again\."),
    ],
)
def test_what_a_bucket_refuses_is_one_line(broken, status, says):
    broken.status = status
    for act, done in (
        (ROOT.read_bytes, "read"),
        (lambda: (ROOT / "x").write_bytes(b""), "written"),
        (ROOT.exists, "read"),
    ):
        with pytest.raises(buckets.BucketError, match=rf"^gs://bucket/a/run(/x)? cannot be {done} .*{says}$") as error:
            act()
        assert "\n" not in str(error.value)
        assert isinstance(error.value, OutageError) == (status == 503)


def test_an_outage_ends_a_command_with_the_code_that_it_is_started_again_after(broken, capsys):
    for status, code in ((503, processes.STUCK), (403, 1)):
        broken.status = status
        with pytest.raises(SystemExit) as ended:
            command.end(lambda arguments: ROOT.read_bytes(), "", ["train"])
        assert ended.value.code == code
        assert "gs://bucket/a/run cannot be read" in capsys.readouterr().err


def test_a_request_that_is_given_so_many_seconds_takes_no_longer(bucket):
    bucket.status = 503
    began = time.monotonic()
    with pytest.raises(OutageError, match="cannot be written"):
        buckets.write(ROOT / "x", b"", seconds=0.2)
    assert time.monotonic() - began < 20  # with all its tries it would take minutes


def test_a_bucket_that_is_not_there_is_named(bucket):
    with pytest.raises(UserError, match=r"nowhere/a/x cannot be written \(HTTP 404\): there is no such bucket; check"):
        (buckets.BucketPath(NOWHERE) / "x").write_bytes(b"")


def test_a_network_that_is_down_is_one_line(broken, monkeypatch):
    monkeypatch.setenv("TENSORSTORE_GCS_HTTP_URL", "http://127.0.0.1:9")
    buckets.store_of.cache_clear()
    with pytest.raises(UserError, match=r"cannot be read .*; check the network, then start the same command again"):
        ROOT.exists()


# ---------------------------------------------------------------------- whole or not at all


def test_a_file_and_a_folder_take_their_place_at_the_end(bucket):
    with output.replacing(ROOT / "file") as scratch:
        scratch.write_text("new")
        assert not bucket.files("a/run")
    bucket.write("a/run/model", {"config.json": b"old", "old.safetensors": b"old"})
    bucket.asked.clear()
    with output.replacing_folder(ROOT / "model", last="config.json") as folder:
        for name in ("config.json", "weights", "tokenizer.json"):
            (folder / name).write_text("new")
        assert len(bucket.files("a/run/model")) == 2
    assert bucket.files("a/run") == {"file": b"new"} | {
        f"model/{name}": b"new" for name in ("config.json", "weights", "tokenizer.json")
    }
    changes = [line for line in bucket.written if "model/" in line]
    assert changes[0] == "DELETE a/run/model/config.json"
    assert changes[-1] == "POST a/run/model/config.json"


def test_lines_are_added_to_a_report_that_others_write_to_as_well(bucket):
    threads = [threading.Thread(target=output.append, args=(ROOT / "lines", f"{n}\n")) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(bucket.files("a/run")["lines"].split()) == [b"0", b"1", b"2", b"3"]


def test_an_output_that_exists_or_cannot_be_written_is_refused_before_the_work(bucket):
    output.check(ROOT / "rows.jsonl")
    output.write_rows(ROOT / "rows.jsonl", [{"a": 1}])
    assert bucket.files("a/run") == {"rows.jsonl": b'{"a": 1}\n'}
    with pytest.raises(UserError, match=r"--output=gs://bucket/a/run/rows\.jsonl exists"):
        output.check(ROOT / "rows.jsonl")
    bucket.read_only = True
    with pytest.raises(UserError, match=r"other cannot be written \(HTTP 403\)"):
        output.check(ROOT / "other")


# ---------------------------------------------------------------------- a mirror


def test_a_mirror_copies_what_has_changed(bucket, capsys):
    bucket.write("a/run", {"lines": b"1\n"})
    mirror = Mirror(ROOT)
    mirror.fetch("lines")
    mirror.fetch("nothing")
    with (mirror.local / "lines").open("a") as file:
        file.write("2\n")
    (mirror.local / "deep").mkdir()
    (mirror.local / "deep" / "x").touch()
    mirror.push_soon()  # not yet
    assert bucket.files("a/run") == {"lines": b"1\n"}
    mirror.push()
    assert bucket.files("a/run") == {"lines": b"1\n2\n", "deep/x": b""}
    bucket.asked.clear()
    mirror.push()
    assert bucket.asked == []
    bucket.read_only = True
    (mirror.local / "deep" / "x").write_text("more")
    mirror.push()
    assert "cannot be written (HTTP 403)" in capsys.readouterr().out
    bucket.read_only = False
    assert mirror.close() == ROOT
    assert bucket.files("a/run")["deep/x"] == b"more"
    assert not mirror.local.exists()


def test_a_mirror_whose_last_copy_is_refused_keeps_what_it_has_and_names_it(bucket, capsys):
    mirror = Mirror(ROOT)
    (mirror.local / "lines").write_text("1\n")
    bucket.read_only = True
    assert mirror.close() == mirror.local
    assert f"what is new is in {mirror.local} alone: {ROOT}/lines cannot be written" in capsys.readouterr().out
    assert (mirror.local / "lines").read_text() == "1\n"
    shutil.rmtree(mirror.local)


def test_metrics_that_a_bucket_refuses_at_the_end_are_named_and_stay(bucket):
    writer = metrics.Writer(ROOT)
    writer.write(1, {"loss": 0.5})
    bucket.read_only = True
    with pytest.raises(buckets.BucketError, match=r"what is new is in (\S+) alone: .*HTTP 403") as error:
        writer.complete()
    bucket.read_only = False
    writer.close()  # what was said of the folder holds
    assert not bucket.files("a/run")
    local = pathlib.Path(str(error.value).split()[5])
    assert json.loads((local / "metrics.jsonl").read_text()) == {"step": 1, "loss": 0.5}
    shutil.rmtree(local)


def test_a_mirror_copies_by_itself_when_the_time_has_come(bucket, monkeypatch):
    monkeypatch.setattr("daajax.mirror.SECONDS", 0.0)
    mirror = Mirror(ROOT)
    (mirror.local / "x").write_text("1")
    mirror.push_soon()
    end = time.monotonic() + 20
    while not bucket.files("a/run"):
        assert time.monotonic() < end
        time.sleep(0.01)
    mirror.close()


def test_what_a_hanging_run_was_doing_is_written_to_its_bucket(bucket, monkeypatch):
    ended = threading.Event()
    monkeypatch.setattr("daajax.processes.leave_stuck", ended.set)
    with Watchdog(ROOT, 0.001):
        assert ended.wait(20)
    assert b"test_what_a_hanging_run_was_doing" in bucket.files("a/run")["stacks/process-0.txt"]


# ---------------------------------------------------------------------- the lock


@pytest.fixture
def lock(bucket, monkeypatch):
    monkeypatch.setenv("DAAJAX_LOCK_SECONDS", "1")
    monkeypatch.setattr(lease, "_LOOK_SECONDS", 0.02)
    return ROOT / ".lock"


def test_a_lock_is_held_by_one_and_let_go_of(bucket, lock, capsys):
    with lease.held(lock, "the first"):
        assert "the first" in lock.read_text()
        with pytest.raises(
            UserError, match=r"--workdir=gs://bucket/a/run: another run is at work there \(the first\); wait"
        ):
            lease.held(lock, "the second").__enter__()
        assert "is locked by the first: waiting for 1 s whether it is alive" in capsys.readouterr().out
    assert not bucket.files("a/run")
    with lease.held(lock, "the second"):
        assert "the second" in lock.read_text()


@pytest.mark.parametrize("content", [b'{"holder": "the dead", "seconds": 1}', b"damaged", b"[]"])
def test_a_lock_that_nobody_holds_any_more_is_taken_over(bucket, lock, monkeypatch, capsys, content):
    monkeypatch.setattr(lease, "SECONDS", 1)
    bucket.write("a/run", {".lock": content})
    with lease.held(lock, "the living"):
        assert "the living" in lock.read_text()
    holder = "the dead" if b"dead" in content else "somebody unknown"
    assert f"{holder} gave no sign of life; its lock is taken over" in capsys.readouterr().out


def test_of_two_that_find_a_dead_lock_one_takes_it_over(bucket, lock):
    bucket.write("a/run", {".lock": b'{"holder": "the dead", "seconds": 0.3}'})
    outcomes = []

    def want(name):
        try:
            with lease.held(lock, name):
                outcomes.append("held")
                time.sleep(1.5)
        except UserError:
            outcomes.append("refused")

    threads = [threading.Thread(target=want, args=(name,)) for name in ("a", "b")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) == ["held", "refused"]


def test_whoever_lost_its_lock_ends(bucket, lock, monkeypatch, capfd):
    left = threading.Event()
    monkeypatch.setattr("daajax.processes.leave", lambda code: left.set())
    with lease.held(lock, "the first"):
        bucket.write("a/run", {".lock": b"another's"})
        assert left.wait(20)
    assert "another run has taken --workdir=gs://bucket/a/run" in capfd.readouterr().err
    assert bucket.files("a/run") == {".lock": b"another's"}


def test_a_sign_of_life_whose_answer_was_lost_counts(bucket, lock, monkeypatch):
    monkeypatch.setattr("daajax.processes.leave", lambda code: pytest.fail("it ended"))
    with lease.held(lock, "the first"):
        bucket.write("a/run", {".lock": lock.read_bytes()})  # the same, of another generation
        time.sleep(0.6)
        assert json.loads(lock.read_bytes())["signs"] > 2
    assert not bucket.files("a/run")


# ---------------------------------------------------------------------- data and caches


ROWS = b'{"prompt": "a", "chosen": "b", "rejected": "c"}\n'


def test_data_in_a_bucket_are_read_from_a_copy(bucket, capsys, tmp_path):
    bucket.write("data", {"pairs.jsonl": ROWS, "all/train/1.jsonl.gz": gzip.compress(ROWS), "all/.hidden/x.jsonl": b""})
    file = data_copies.fetch("gs://bucket/data/pairs.jsonl", "data.path")
    folder = data_copies.fetch("gs://bucket/data/all/", "data.path")
    assert file.endswith("/pairs.jsonl")
    assert pathlib.Path(file).read_bytes() == ROWS
    assert [path.name for path in (tmp_path / "data").glob(f"{'*/' * 3}*.gz")] == ["1.jsonl.gz"]
    assert "data.path: gs://bucket/data/all/ is in " in capsys.readouterr().out
    bucket.asked.clear()
    assert data_copies.fetch("gs://bucket/data/all", "data.path") == folder
    assert len(bucket.names("GET")) == 3  # is it an object, what is in it, of which generation
    bucket.write("data", {"pairs.jsonl": ROWS * 2})
    assert data_copies.fetch("gs://bucket/data/pairs.jsonl", "data.path") != file
    (prompt,) = prompts.read("gs://bucket/data/all/train/1.jsonl.gz")
    assert prompt.prompt == "a"
    assert data_copies.fetch("owner/name", "data.path") == "owner/name"


def test_a_copy_of_data_that_was_killed_leaves_nothing_in_the_next(bucket, tmp_path):
    bucket.write("data", {"all/1.jsonl": ROWS, "all/2.jsonl.partial": ROWS})
    copy = pathlib.Path(data_copies.fetch("gs://bucket/data/all", "data.path"))
    partial = copy.rename(copy.with_name(f"{copy.name}.partial"))
    (partial / "1.jsonl.0123abcd.partial").write_bytes(b"ha")
    data_copies.fetch("gs://bucket/data/all", "data.path")
    assert sorted(path.name for path in copy.rglob("*")) == ["1.jsonl", "2.jsonl.partial"]


@pytest.mark.parametrize(
    ("address", "says"),
    [
        ("gs://bucket/none", "data.path=gs://bucket/none holds nothing that you may list; check the name, or log in"),
        ("s3://bucket/x", "data.path=s3://bucket/x: s3:// is neither read nor written"),
        ("gs://nowhere/x", "holds nothing that you may list"),
    ],
)
def test_data_that_are_not_there_are_refused(bucket, address, says):
    with pytest.raises(UserError) as error:
        data_copies.fetch(address, "data.path")
    assert says in str(error.value)


def test_tokenized_data_in_a_bucket_serve_another_host(bucket, tmp_path, monkeypatch):
    worlds.save_tokenizer(tmp_path / "model")
    data = worlds.write_rows(tmp_path / "pairs.jsonl", worlds.pairs(6))

    def tokenize():
        return token_cache.tokenized("jsonl", data, tmp_path / "model", max_length=64, cache_dir="gs://bucket/tokens")

    made = tokenize()
    assert "tokenized 6 examples" in made.notices[-1]
    assert bucket.written[-1].endswith("/meta.json")
    monkeypatch.setattr(token_cache, "LOCAL", tmp_path / "another host")
    found = tokenize()
    assert "cache: hit" in found.notices[-1]
    np.testing.assert_array_equal(found.tokens, made.tokens)
    # What is damaged there is made again; what is lacking there is copied from here.
    name = next(name for name in bucket.files("tokens") if name.endswith("tokens.npy"))
    bucket.write("tokens", {name: b"damaged"})
    monkeypatch.setattr(token_cache, "LOCAL", tmp_path / "a third host")
    mended = tokenize()
    assert "is damaged" in mended.notices[-2]
    assert bucket.files("tokens")[name] != b"damaged"
    bucket.remove("tokens", *bucket.files("tokens"))
    assert "cache: hit" in tokenize().notices[-1]
    assert name in bucket.files("tokens")


def test_a_cache_in_a_bucket_may_be_only_to_read_from(bucket, tmp_path, capsys):
    worlds.save_tokenizer(tmp_path / "model")
    data = worlds.write_rows(tmp_path / "pairs.jsonl", worlds.pairs(6))
    bucket.read_only = True
    for notice in ("tokenized 6 examples", "cache: hit"):
        made = token_cache.tokenized("jsonl", data, tmp_path / "model", max_length=64, cache_dir="gs://bucket/tokens")
        assert notice in made.notices[-1]
        said = capsys.readouterr().out
        assert "(HTTP 403)" in said
        assert f"The run goes on with {tmp_path / 'tokens'}" in said


def test_a_reference_cache_in_a_bucket(bucket):
    def opened():
        return reference.Cache("gs://bucket/cache", reference.Header("weights", {}, "float32"))

    cache, key = opened(), bytes(16)
    cache.append({key: {"logps": np.float32([-1, -2])}})
    assert opened().get(key, 2)["logps"].tolist() == [-1, -2]
    (part,) = (name for name in bucket.files("cache") if "part-" in name)
    bucket.write("cache", {part: bucket.files("cache")[part][:-9]})
    damaged = opened()
    assert damaged.get(key, 2) is None
    assert "is damaged" in damaged.notices[0]
    assert part.replace(".parquet", ".damaged") in bucket.files("cache")
    bucket.status = 403
    with pytest.raises(UserError, match=r"cannot be written \(HTTP 403\)"):
        opened()
    assert stores.TOKEN not in "".join(map(str, bucket.files("cache")))
