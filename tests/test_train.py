"""A run from its command line to its folder: first loss, metrics, events, model, and what an error leaves behind."""

import collections
import dataclasses
import gc
import json
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from daajax import inputs, metrics, run, step
from daajax.data.token_cache import tokenized
from daajax.errors import UserError
from tests import worlds

SIMPO = ("--config.loss={'name':'simpo','beta':2.0}", "--config.reference.mode=none")
SFT = ("--config.loss={'name':'sft'}", "--config.reference.mode=none")
NAMES = {
    "loss",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/margins",
    "rewards/accuracies",
    "logps/chosen",
    "logps/rejected",
    "grad_norm",
    "learning_rate",
    "epoch",
    "num_tokens",
    "update_seconds",
    "data_wait_seconds",
    "pairs_per_second",
    "tokens_per_second",
    "packing_efficiency",
    "pairs_per_second_per_chip",
    "tokens_per_second_per_chip",
    "mfu/head",
    "mfu/remat",
    "mfu/sharing",
    "mfu/packing",
    "peak_process_bytes",
    "gradient_weight",
    "displacement/chosen",
    "displacement/rejected",
}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return worlds.make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def finished(world):
    """A finished run of the small case, and its folder."""
    workdir = world.folder / "finished"
    return workdir, worlds.train(workdir, *world.flags)


def files(folder):
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


# ---------------------------------------------------------------------- the first loss


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        ("{'name':'dpo','beta':0.1}", 0.693147),
        ("{'name':'ipo','beta':0.1}", 25.0),
        pytest.param("{'name':'ipo_mean','beta':0.1}", 25.0, marks=pytest.mark.slow),
        # The mean over labels: (1 - s) ln 2 + s ln 2.
        pytest.param("{'name':'dpo','beta':0.5,'label_smoothing':0.2}", 0.693147, marks=pytest.mark.slow),
    ],
)
def test_the_first_loss_is_the_closed_form(world, tmp_path, capsys, loss, expected):
    history = worlds.train(tmp_path / "run", *world.flags, "--config.steps=1", f"--config.loss={loss}")
    # Relative: an IPO loss of 25 changes by 10 for each nat, and log-ratios are 0 to some 1e-6 nats.
    assert history[0]["loss"] == pytest.approx(expected, rel=1e-5)
    said = re.search(r"first loss: ([\d.]+), with the reference's log-probs ([\d.]+);", capsys.readouterr().out)
    assert [float(number) for number in said.groups()] == pytest.approx([expected] * 2, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "expected"), [("dpo", 0.693147), ("ipo", 25.0)])
def test_the_first_loss_on_stories_is_the_closed_form(assets, tmp_path, name, expected):
    folders = [f"--config.{kind}.cache_dir={tmp_path / kind}" for kind in ("data", "reference")]
    loss = f"--config.loss={{'name':'{name}','beta':0.1}}"
    history = worlds.train(tmp_path / "run", loss, "--config.steps=1", *folders)
    assert history[0]["loss"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("arguments", [SIMPO, SFT], ids=["simpo", "sft"])
def test_without_a_reference_the_run_says_that_the_first_loss_is_not_checked(world, tmp_path, capsys, arguments):
    history = worlds.train(tmp_path / "run", *world.flags, "--config.steps=1", *arguments)
    assert "first loss: not checked, the loss reads no reference" in capsys.readouterr().out
    assert "displacement/chosen" not in history[0]
    assert math.isfinite(history[0]["loss"])


@pytest.mark.slow
def test_sft_is_minus_the_log_likelihood_per_token(world, finished, tmp_path):
    history = worlds.train(tmp_path / "run", *world.flags, "--config.steps=1", *SFT)
    config, _ = worlds.parse(*world.flags)
    data = tokenized("jsonl", world.data, world.model, max_length=config.max_length)
    tokens = data.scored_lengths()[:8, 0].sum()
    # The same sum over the same eight responses, which the finished DPO run logged as a mean.
    assert history[0]["loss"] == pytest.approx(-finished[1][0]["logps/chosen"] * 8 / tokens, rel=1e-5)


@pytest.fixture
def perturbed(monkeypatch):
    """A reference column that is off by some nats at every token."""

    def shift(by):
        load = run.load_reference

        def load_shifted(*arguments):
            found = load(*arguments)
            columns = [{"logps": column["logps"] + np.float32(by)} for column in found.columns]
            return dataclasses.replace(found, columns=columns)

        monkeypatch.setattr(run, "load_reference", load_shifted)

    return shift


@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_a_reference_that_is_not_the_policy_fails_the_first_check(world, tmp_path, perturbed):
    perturbed(1e-3)
    with pytest.raises(
        UserError, match=r"the first loss is .* though policy and reference are the same model"
    ) as error:
        worlds.train(tmp_path / "run", *world.flags)
    assert "check_first_loss=False" in str(error.value)
    assert not (tmp_path / "run" / "model").exists()
    del error
    gc.collect()


def test_the_check_can_be_turned_off(world, tmp_path, capsys, perturbed):
    perturbed(1e-3)
    worlds.train(tmp_path / "run", *world.flags, "--config.steps=1", "--config.check_first_loss=False")
    assert "first loss: not checked, check_first_loss is off" in capsys.readouterr().out


def test_rounding_of_the_reference_passes_the_check(world, tmp_path, perturbed):
    perturbed(1e-5)  # some 25 tokens: 2.5e-4 nats, below the 1e-3 that float32 may be off by
    worlds.train(tmp_path / "run", *world.flags, "--config.steps=1")


@pytest.mark.slow
def test_bfloat16_passes_the_check_and_trains(world, tmp_path, capsys):
    bfloat16 = ("--config.model.dtype=bfloat16", "--config.steps=2")
    history = worlds.train(tmp_path / "run", *world.flags, *bfloat16)
    said = capsys.readouterr().out
    assert "log_ratios/largest_per_sqrt_token" in said
    assert "attention blockwise (the one for cpu)" in said
    assert history[0]["loss"] == pytest.approx(math.log(2), abs=0.02)


# ---------------------------------------------------------------------- what a run leaves behind


def test_the_folder_holds_what_is_promised(world, finished):
    workdir, history = finished
    assert {path.name for path in workdir.iterdir()} == {
        ".lock", "checkpoints", "config.json", "finished", "metrics.jsonl", "model", "tensorboard",
    }  # fmt: skip
    assert sorted(path.name for path in (workdir / "model").iterdir()) == sorted(
        path.name for path in world.model.iterdir()
    )
    assert [values["step"] for values in history] == [1, 2, 3, 4, 5]
    assert all(math.isfinite(value) for values in history for value in values.values())
    assert set(history[0]) >= NAMES


def test_the_config_on_disk_is_the_resolved_one(world, finished):
    config = json.loads((finished[0] / "config.json").read_text())
    assert config["model"]["path"] == str(world.model)
    assert config["loss"] == {"name": "dpo", "weight": 1.0, "beta": 0.1, "label_smoothing": 0.0}
    assert config["steps"] == 5
    resolved, _ = worlds.parse(*world.flags)
    assert config == json.loads(resolved.to_json_best_effort())


def test_metrics_are_consistent_with_each_other(world, finished):
    history = finished[1]
    tokens = worlds.column(history, "num_tokens")
    assert (np.diff(tokens) > 0).all()
    np.testing.assert_allclose(worlds.column(history, "epoch"), np.arange(1, 6) * 8 / 40)
    np.testing.assert_allclose(worlds.column(history, "learning_rate"), 1e-3, rtol=1e-6)
    margins = worlds.column(history, "rewards/chosen") - worlds.column(history, "rewards/rejected")
    np.testing.assert_allclose(worlds.column(history, "rewards/margins"), margins, atol=1e-6)
    np.testing.assert_allclose(
        worlds.column(history, "rewards/chosen"), 0.1 * worlds.column(history, "displacement/chosen"), rtol=1e-5
    )
    assert (worlds.column(history, "update_seconds") > 0).all()


def test_the_events_hold_the_same_numbers(finished):
    workdir, history = finished
    found = collections.defaultdict(dict)
    for file in sorted((workdir / "tensorboard").iterdir()):
        for event in events_of(file.read_bytes()):
            for value in event.summary.value:
                found[event.step][value.tag] = value.simple_value
    assert sorted(found) == [1, 2, 3, 4, 5]
    for values in history:
        expected = {name: value for name, value in values.items() if name != "step"}
        assert found[values["step"]] == pytest.approx(expected, rel=1e-6)


def events_of(content):
    """Records of an events file: length (8 bytes), checksum (4), event, checksum (4)."""
    from tensorboardX.proto.event_pb2 import Event

    while content:
        length = int.from_bytes(content[:8], "little")
        event = Event()
        event.ParseFromString(content[12 : 12 + length])
        yield event
        content = content[16 + length :]


def test_the_model_has_moved_and_keeps_names_shapes_and_dtypes(world, finished):
    before = safetensors.numpy.load_file(world.model / "model.safetensors")
    after = safetensors.numpy.load_file(finished[0] / "model" / "model.safetensors")
    assert {name: (x.shape, x.dtype) for name, x in before.items()} == {
        name: (x.shape, x.dtype) for name, x in after.items()
    }
    assert all((before[name] != after[name]).any() for name in before)


def test_the_model_is_the_start_of_another_run(finished, world, tmp_path):
    history = worlds.train(
        tmp_path / "run", *world.flags, "--config.steps=1", f"--config.model.path={finished[0] / 'model'}"
    )
    assert history[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    # Trained on these very pairs, it likes the first of them better or worse than the fresh one did: not alike.
    assert history[0]["logps/chosen"] != finished[1][0]["logps/chosen"]


@pytest.mark.parametrize(("every", "expected"), [(1, [1, 2, 3, 4, 5]), (2, [1, 2, 4, 5]), (100, [1, 5])])
def test_metrics_come_every_so_often_and_first_and_last(world, finished, tmp_path, every, expected):
    history = worlds.train(tmp_path / "run", *world.flags, f"--config.log.every={every}")
    assert [values["step"] for values in history] == expected
    # What is computed between two log lines does not depend on how many there are.
    assert history[-1]["loss"] == finished[1][-1]["loss"]
    assert history[-1]["num_tokens"] == finished[1][-1]["num_tokens"]


def test_nothing_is_fetched_to_the_host_inside_a_log_interval(world, tmp_path, monkeypatch):
    happened = []
    kind = type(jnp.zeros(()))
    value, call, write = kind._value, step.Update.__call__, metrics.Writer.write

    def fetch(array):
        happened.append("fetch")
        return value.__get__(array)

    def update(self, *arguments, **options):
        happened.append("update")
        return call(self, *arguments, **options)

    def log(self, *arguments):
        happened.append("log")
        return write(self, *arguments)

    monkeypatch.setattr(kind, "_value", property(fetch))
    monkeypatch.setattr(step.Update, "__call__", update)
    monkeypatch.setattr(metrics.Writer, "write", log)
    worlds.train(tmp_path / "run", *world.flags, "--config.log.every=100")
    began = happened.index("update")
    first, last = (place for place, what in enumerate(happened) if what == "log")
    assert "fetch" in happened[began:first]  # the spy sees what is fetched for a log line
    inside = happened[first + 1 : last]
    assert inside[:4] == ["update"] * 4
    assert set(inside[4:]) == {"fetch"}


@pytest.mark.slow
def test_the_same_seed_gives_the_same_run_and_another_one_another_order(world, tmp_path):
    shuffled = ("--config.data.shuffle=True", "--config.steps=3")
    runs = [
        worlds.train(tmp_path / str(place), *world.flags, *shuffled, f"--config.seed={seed}")
        for place, seed in enumerate((0, 0, 1))
    ]
    losses = [worlds.column(history, "loss").tolist() for history in runs]
    assert losses[0] == losses[1]
    assert losses[0] != losses[2]
    one, two = (safetensors.numpy.load_file(tmp_path / str(n) / "model" / "model.safetensors") for n in (0, 1))
    assert all((one[name] == two[name]).all() for name in one)


def test_weights_of_the_data_scale_their_examples(world, tmp_path):
    # Weights multiply and do not enter the count: all halves is half the loss, and half the gradient.
    rows = [row | {"weight": 0.5} for row in worlds.pairs(40)]
    data = worlds.write_rows(tmp_path / "pairs.jsonl", rows)
    whole = worlds.train(tmp_path / "whole", *world.flags, "--config.steps=1")
    half = worlds.train(tmp_path / "half", *world.flags, "--config.steps=1", f"--config.data.path={data}")
    assert half[0]["loss"] == pytest.approx(whole[0]["loss"] / 2, rel=1e-6)
    assert half[0]["grad_norm"] == pytest.approx(whole[0]["grad_norm"] / 2, rel=1e-5)


@pytest.mark.slow
def test_further_losses_are_added_with_their_weight(world, tmp_path):
    further = "--config.extra_losses=({'name':'sft','weight':0.2},)"
    values = worlds.train(tmp_path / "run", *world.flags, "--config.steps=1", further)[0]
    assert values["loss/dpo"] == pytest.approx(math.log(2), abs=1e-6)
    assert values["loss"] == pytest.approx(values["loss/dpo"] + 0.2 * values["loss/sft"], rel=1e-6)
    assert values["loss/sft"] > 1


# ---------------------------------------------------------------------- the same folder again


def test_the_same_line_again_says_that_it_is_finished_and_changes_nothing(world, finished, capsys):
    workdir, _ = finished
    before = files(workdir)
    worlds.train(workdir, *world.flags)
    assert f"{workdir} is finished" in capsys.readouterr().out
    assert files(workdir) == before


def test_another_config_is_refused_in_a_finished_folder(world, finished):
    before = files(finished[0])
    with pytest.raises(UserError, match=r"--workdir=.* holds a run of another config: loss\.beta was .*name another"):
        worlds.train(finished[0], *world.flags, "--config.loss.beta=0.2")
    assert files(finished[0]) == before


def test_a_run_that_did_not_finish_begins_again(world, finished, tmp_path, capsys):
    workdir, history = finished
    (tmp_path / "config.json").write_bytes((workdir / "config.json").read_bytes())
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 1, "loss": 7.0}) + "\n")
    again = worlds.train(tmp_path, *world.flags)
    assert f"{tmp_path} holds this run without a checkpoint: it begins again from update 1" in capsys.readouterr().out
    assert worlds.column(again, "loss").tolist() == worlds.column(history, "loss").tolist()


def test_an_unfinished_run_of_another_config_is_refused(world, finished, tmp_path):
    (tmp_path / "config.json").write_bytes((finished[0] / "config.json").read_bytes())
    with pytest.raises(UserError, match=r"holds a run of another config: seed was 0, is 1; name another folder"):
        worlds.train(tmp_path, *world.flags, "--config.seed=1")
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_a_foreign_folder_is_refused(world, tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match=r"exists and is not a run's folder; name another one"):
        worlds.train(tmp_path, *world.flags)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_folder_with_a_damaged_config_is_refused(world, tmp_path):
    (tmp_path / "config.json").write_text('{"seed": ')
    with pytest.raises(UserError, match=r"config.json is damaged; name another --workdir"):
        worlds.train(tmp_path, *world.flags)


@pytest.mark.parametrize("below", ["", "run", "run/further"])
def test_a_file_in_the_way_of_the_folder_is_refused_before_the_work(world, tmp_path, monkeypatch, below):
    monkeypatch.setattr(inputs, "load_data", None)  # calling it would be a TypeError
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"--workdir=.*file"):
        worlds.train(tmp_path / "file" / below, *world.flags)


def test_an_empty_folder_is_as_good_as_none(world, tmp_path):
    assert len(worlds.train(tmp_path, *world.flags, "--config.steps=1")) == 1


# ---------------------------------------------------------------------- after an error


@pytest.mark.parametrize(
    "overrides",
    [
        ("--config.data.path=missing.jsonl",),
        ("--config.batch_size=100",),
        ("--config.optimizer.name=sgd",),
        ("--config.mesh.fsdp=3",),
        ("--config.packing.rows=3", "--config.mesh.fsdp=2"),
    ],
    ids=["data", "batch", "optimizer", "mesh", "rows"],
)
def test_an_error_before_the_first_update_leaves_no_folder(world, tmp_path, overrides):
    with pytest.raises(UserError):
        worlds.train(tmp_path / "run", *world.flags, *overrides)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_a_run_that_diverges_says_so_and_writes_no_model(world, tmp_path):
    diverging = ("--config.optimizer.learning_rate=1e30", "--config.steps=4")
    with pytest.raises(UserError, match=r"update \d: loss is .* No model was written") as error:
        worlds.train(tmp_path / "run", *world.flags, *diverging)
    assert not (tmp_path / "run" / "model").exists()
    # What went before is there to look at, and every line of it is whole.
    history = worlds.read_metrics(tmp_path / "run")
    assert history[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    del error
    gc.collect()


def test_a_model_that_cannot_be_written_whole_is_not_there(world, tmp_path, monkeypatch):
    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.numpy.save_file", full)
    with pytest.raises((UserError, OSError)):
        worlds.train(tmp_path / "run", *world.flags, "--config.steps=1")
    assert not (tmp_path / "run" / "model").exists()


# ---------------------------------------------------------------------- what is printed


def test_only_visible_devices_make_the_mesh(world, tmp_path, capsys):
    # The tests' shortcut to one device, and all eight, say so.
    worlds.train(tmp_path / "one", *world.flags, "--config.steps=1")
    assert "devices: 1 " in capsys.readouterr().out
    assert jax.device_count() == 8


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:overflow encountered in cast:RuntimeWarning")  # of the rate itself
def test_a_last_update_that_ruins_the_parameters_writes_no_model(world, tmp_path):
    """Loss and gradient norm are those of the parameters before it, and are sound."""
    with pytest.raises(UserError, match="update 1 made parameters that are not finite"):
        worlds.train(tmp_path / "run", *world.flags, "--config.steps=1", "--config.optimizer.learning_rate=1e39")
    assert not (tmp_path / "run" / "model").exists()


def test_a_warm_up_that_outlasts_the_run_is_refused_before_the_reference_pass(world, tmp_path, capsys):
    with pytest.raises(UserError, match="warmup_steps=9 but the run has 2 updates"):
        worlds.train(tmp_path / "run", *world.flags, "--config.steps=2", "--config.optimizer.warmup_steps=9")
    assert "reference" not in capsys.readouterr().out
    assert not (tmp_path / "run").exists()
