"""Runs whose folder, model, data and caches lie in a bucket: they go on as runs on a disk do, and one at a time."""

import json
import signal
from unittest import mock

import jax
import pytest
import safetensors.numpy

from daajax import bucket as buckets
from daajax import checkpoint, folder, metrics
from daajax.errors import UserError
from daajax.evaluate import evaluate
from daajax.export import export
from daajax.generate import Options, model_of_run
from tests import jobs, stores, worlds
from tests.test_checkpoint import ABSTRACT, make_state, same, save

RUN = buckets.BucketPath("gs://bucket/runs/one")
# An interrupted run's traceback holds files open until it is collected; what Orbax cannot read leaves coroutines.
pytestmark = [
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return worlds.make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture
def saved(bucket):
    saved = checkpoint.Checkpoints(RUN, keep=2)
    yield saved
    saved.close()


def checkpoints(bucket):
    """Updates that there are objects of checkpoints of."""
    return sorted({int(name.split("/")[1]) for name in bucket.files("runs/one") if name.startswith("checkpoints/")})


# ---------------------------------------------------------------------- checkpoints


def test_a_state_comes_back_bit_for_bit_and_the_latest_are_kept(saved, bucket):
    save(saved, 1, 2, 3, wait=False)
    save(saved, 4)
    assert saved.steps == checkpoints(bucket) == [3, 4]
    step, state = checkpoint.Checkpoints(RUN).restore_latest(ABSTRACT)
    assert step == 4
    assert same(state, make_state(4))
    assert saved.record(4).data == "data"


def test_the_best_is_kept_besides(bucket):
    saved = checkpoint.Checkpoints(RUN, keep=1, best="eval/loss")
    for step, loss in ((1, 0.5), (2, 0.7), (3, 0.6)):
        save(saved, step, eval_loss=loss)
    assert (saved.steps, saved.best_step()) == ([1, 3], 1)
    saved.close()


def test_what_is_not_whole_does_not_count_and_is_removed(saved, bucket):
    save(saved, 1, 2)
    saved.close()
    bucket.remove("runs/one", "checkpoints/2/commit_success.txt")
    again = checkpoint.Checkpoints(RUN, keep=2)
    assert again.steps == [1]
    assert checkpoints(bucket) == [1, 2]
    save(again, 2)  # that it was begun before is no hindrance
    assert again.steps == [1, 2]
    assert same(again.restore(2, ABSTRACT), make_state(2))
    again.close()


def test_a_damaged_checkpoint_is_set_aside(saved, bucket, capsys):
    save(saved, 1, 2)
    files = bucket.files("runs/one/checkpoints/2/params")
    largest = max((name for name in files if name.startswith("d/")), key=lambda name: len(files[name]))
    content = bytearray(files[largest])
    content[len(content) // 2] ^= 1
    bucket.write("runs/one/checkpoints/2/params", {largest: bytes(content)})
    step, state = saved.restore_latest(ABSTRACT)
    assert step == 1
    assert same(state, make_state(1))
    assert "set aside as gs://bucket/runs/one/damaged-checkpoints/2" in capsys.readouterr().out
    assert checkpoints(bucket) == [1]
    assert bucket.files("runs/one/damaged-checkpoints/2/params")[largest] == bytes(content)


@pytest.mark.parametrize("status", [403, 503])
def test_a_bucket_out_of_reach_is_no_damage(saved, bucket, monkeypatch, status):
    save(saved, 1)
    monkeypatch.setattr(checkpoint.Checkpoints, "steps", [1])
    bucket.status = status
    monkeypatch.setattr(buckets, "RETRIES", {"gcs_request_retries": {"max_retries": 1, "initial_delay": "10ms"}})
    buckets.store_of.cache_clear()
    with pytest.raises(UserError, match="cannot be read"):
        saved.restore_latest(ABSTRACT)
    bucket.status = 0
    assert checkpoints(bucket) == [1]


def test_words_of_another_failure_are_none_of_the_bucket(tmp_path, monkeypatch):
    monkeypatch.setattr("daajax.processes.are_several", lambda: True)
    for where in (tmp_path, RUN):
        lost = jax.errors.JaxRuntimeError("UNAVAILABLE: Gloo: connection closed by peer")
        monkeypatch.setattr("orbax.checkpoint.Checkpointer.restore", mock.Mock(side_effect=lost))
        with pytest.raises(jax.errors.JaxRuntimeError):
            checkpoint.Checkpoints(where).restore_parts(1, ABSTRACT)
    denied = ValueError("PERMISSION_DENIED: Forbidden")
    monkeypatch.setattr("orbax.checkpoint.Checkpointer.restore", mock.Mock(side_effect=denied))
    with pytest.raises(UserError, match="is damaged"):
        checkpoint.Checkpoints(tmp_path).restore_parts(1, ABSTRACT)


# The thread in which Orbax saves ends by the error that is then raised.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_bucket_that_takes_nothing_is_retried_and_ends_the_run(saved, bucket, capsys):
    save(saved, 1)
    bucket.read_only = True
    save(saved, 2)
    assert "the checkpoint of update 2 could not be saved" in capsys.readouterr().out
    bucket.read_only = False
    save(saved, 3)
    assert saved.steps == [1, 3]
    bucket.read_only = True
    save(saved, 4, 5)
    with pytest.raises(UserError, match="3 times in a row"):
        save(saved, 6)


# ---------------------------------------------------------------------- the folder


def test_a_held_folder_is_refused(world, bucket, monkeypatch):
    monkeypatch.setenv("DAAJAX_LOCK_SECONDS", "1")
    config, _ = worlds.parse(*world.flags)
    with folder.claimed(RUN, config) as found:
        assert found == "new"
        with pytest.raises(UserError, match="another run is at work there"), folder.claimed(RUN, config):
            pass
        folder.begin(RUN, config, updates=0)
    with folder.claimed(RUN, config) as found:
        assert found == "unfinished"
    assert sorted(bucket.files("runs/one")) == ["config.json", "metrics.jsonl"]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda bucket: setattr(bucket, "read_only", True), r"\.lock cannot be written \(HTTP 403\): your credentials"),
        (
            lambda bucket: setattr(bucket, "status", 401),
            r"cannot be read \(HTTP 401\): it is not open to everybody; log",
        ),
        (lambda bucket: bucket.write("runs/one", {"x": b""}), "is not a run's folder; name another one"),
    ],
    ids=["read only", "closed", "foreign"],
)
def test_a_folder_that_will_not_do_is_refused_before_the_work(world, bucket, change, says):
    config, _ = worlds.parse(*world.flags)
    change(bucket)
    with pytest.raises(UserError, match=says), folder.claimed(RUN, config):
        pass


def test_an_address_of_another_kind_is_refused(world):
    for act in (
        lambda: worlds.train("s3://bucket/run", *world.flags),
        lambda: worlds.at(export, "s3://bucket/run"),
        lambda: model_of_run(Options(workdir="s3://bucket/run")),
    ):
        with pytest.raises(
            UserError, match="--workdir=s3://bucket/run: s3:// is neither read nor written; name a folder"
        ):
            act()


# ---------------------------------------------------------------------- whole runs


@pytest.mark.slow
def test_all_of_a_run_lies_in_a_bucket_and_goes_on_bit_for_bit(world, bucket, tmp_path, capsys):
    bucket.write("models/m", stores.files_of(world.model))
    bucket.write("data", {"pairs.jsonl": world.data.read_bytes()})
    flags = [*world.flags, "--config.lora.rank=2", "--config.checkpoint.every=2", "--config.log.every=1"]
    there = [
        *flags,
        "--config.model.path=gs://bucket/models/m",
        "--config.data.path=gs://bucket/data/pairs.jsonl",
        "--config.data.cache_dir=gs://bucket/tokens",
        "--config.reference.cache_dir=gs://bucket/reference",
        "--config.profile.start=2",
        "--config.profile.steps=1",
    ]
    worlds.precompute(*there)
    worlds.train(RUN, *there, "--config.steps=2")
    assert "16 of 16 examples in the cache gs://bucket/reference/" in capsys.readouterr().out
    bucket.write("runs/one", {"metrics.jsonl": bucket.files("runs/one")["metrics.jsonl"] + b'{"step": 3}\n{"st'})
    history = worlds.train(RUN, *there)
    assert "resumed after update 2 of 5" in capsys.readouterr().out
    whole = worlds.train(tmp_path / "whole", *flags)
    numbers = ("step", "loss", "grad_norm")
    assert [[row[name] for name in numbers] for row in history] == [[row[name] for name in numbers] for row in whole]
    files = bucket.files("runs/one")
    for name in ("model/model.safetensors", "adapter/adapter_model.safetensors"):
        written = safetensors.numpy.load(files[name])
        expected = safetensors.numpy.load_file(tmp_path / "whole" / name)
        assert written.keys() == expected.keys()
        assert all((written[key] == expected[key]).all() for key in written)
    kinds = {name.partition("/")[0] for name in files}
    assert kinds == {
        *("adapter", "checkpoints", "config.json", "finished", "metrics.jsonl", "model", "profile", "revisions.json"),
        "tensorboard",
    }
    assert stores.TOKEN.encode() not in b"".join(files.values())

    worlds.train(RUN, *there)
    assert "gs://bucket/runs/one is finished: the model is in gs://bucket/runs/one/model" in capsys.readouterr().out
    worlds.at(export, RUN)
    exported = bucket.files("runs/one/model-5")
    assert exported == bucket.files("runs/one/model")
    with pytest.raises(UserError, match="--output=gs://bucket/runs/one/model-5 exists"):
        worlds.at(export, RUN)
    held_out = [
        "--config.eval_data.path=gs://bucket/data/pairs.jsonl",
        "--config.eval_data.cache_dir=gs://bucket/tokens",
    ]
    worlds.at(evaluate, RUN, *held_out, "--output=gs://bucket/rows.d/rows.jsonl")
    worlds.at(evaluate, RUN, *held_out)
    assert bucket.files("runs/one")["evaluations.jsonl"].count(b"\n") == 2
    assert bucket.files("rows.d")["rows.jsonl"].count(b"\n") == 40
    assert model_of_run(Options(workdir=str(RUN))).name == "gs://bucket/runs/one after update 5"


def test_a_run_whose_metrics_are_refused_at_the_end_is_not_finished(world, bucket):
    flags = [*world.flags, "--config.steps=1"]

    def refuse(writer):  # from here on
        bucket.refuses = {"metrics.jsonl"}
        complete(writer)

    complete = metrics.Writer.complete
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metrics.Writer, "complete", refuse)
        patch.setattr(metrics.Writer, "flush", lambda writer: None)
        with pytest.raises(UserError, match=r"what is new is in \S+ alone"):
            worlds.train(RUN, *flags)
    assert "finished" not in bucket.files("runs/one")
    bucket.refuses = set()
    worlds.train(RUN, *flags)
    assert "finished" in bucket.files("runs/one")


@pytest.mark.slow
def test_a_job_stops_and_goes_on_in_a_bucket(world, bucket, tmp_path):
    flags = [*world.flags, "--config.checkpoint.every=1000", "--config.log.every=1"]
    line = [f"--config={worlds.STORIES}", f"--workdir={RUN}", *flags]
    job = jobs.start(tmp_path / "first", *line, "--config.steps=100000", processes=2, DAAJAX_LOCK_SECONDS="6")
    job.until(lambda: "train 2/" in job.said(0))
    with pytest.raises(UserError, match="another run is at work there"):
        worlds.train(RUN, *flags, "--config.steps=100000")
    job.processes[1].send_signal(signal.SIGTERM)
    assert job.wait() == [42, 42], job.said(0)[-3000:]
    (done,) = checkpoints(bucket)
    assert f"update {done} of 100000 is saved" in job.said(0)
    assert [row["step"] for row in worlds.read_metrics(RUN)] == [*range(1, done + 1)]
    files = bucket.files("runs/one")
    assert ".lock" not in files
    assert any("ocdbt.process_1" in name for name in files)  # each has written its own part

    (tmp_path / "lines.json").write_text(json.dumps([[*line, f"--config.steps={done + 2}"]]))
    arguments = ("20000", str(tmp_path / "lines.json"))
    job = jobs.start(tmp_path / "second", *arguments, processes=2, module="tests.trainings")
    assert job.wait() == [0, 0], job.said(0)[-3000:] + job.said(1)[-3000:]
    assert f"resumed after update {done} of {done + 2}" in job.said(0)
    whole = worlds.train(tmp_path / "whole", *flags, f"--config.steps={done + 2}")
    history = worlds.read_metrics(RUN)
    assert [row["step"] for row in history] == [*range(1, done + 3)]
    assert worlds.deviation(worlds.column(history, "loss"), worlds.column(whole, "loss")) < 1e-5

    files = bucket.files("runs/one/model")
    index = json.loads(files["model.safetensors.index.json"])
    assert set(index["weight_map"].values()) == {name for name in files if name.endswith(".safetensors")}
    assert len(set(index["weight_map"].values())) > 1  # of which each has written some
    assert [name for name in bucket.written if "/model/" in name][-1].endswith("config.json")
