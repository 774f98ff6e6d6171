"""A run that was interrupted goes on as though it had not been: the same numbers, the same model, each update once."""

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from daajax import step
from daajax.checkpoint import Checkpoints
from daajax.errors import UserError
from daajax.export import export
from tests import worlds

EVERY = ("--config.checkpoint.every=2", "--config.log.every=1")
# An interrupted run's traceback holds files open until it is collected; what Orbax cannot read leaves coroutines.
pytestmark = [
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return worlds.make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def whole(world):
    """The uninterrupted run."""
    workdir = world.folder / "whole"
    return workdir, worlds.train(workdir, *world.flags, *EVERY)


def interrupt(workdir, *flags, after=3, devices=1, kind=KeyboardInterrupt):
    """A run that ends when update `after` is done."""
    call, done = step.Update.__call__, []

    def update(self, *arguments, **options):
        if len(done) == after:
            raise kind
        done.append(None)
        return call(self, *arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step.Update, "__call__", update)
        with pytest.raises(kind):
            worlds.train(workdir, *flags, devices=devices)


@pytest.fixture(scope="module")
def stopped(world):
    """A run that was interrupted after update 3, with a checkpoint of update 2."""
    workdir = world.folder / "stopped"
    interrupt(workdir, *world.flags, *EVERY)
    assert Checkpoints(workdir).steps == [2]
    assert [values["step"] for values in worlds.read_metrics(workdir)] == [1, 2, 3]
    assert not (workdir / "model").exists()
    return workdir


@pytest.fixture
def copy(stopped, tmp_path):
    """The interrupted run, to go on with."""
    shutil.copytree(stopped, tmp_path / "run")
    return tmp_path / "run"


def columns(history):
    return [(values["step"], values["loss"], values["grad_norm"]) for values in history]


def model_of(workdir):
    return (workdir / "model" / "model.safetensors").read_bytes()


def events(workdir):
    """Loss by update as TensorBoard shows it: what a restart voids is dropped."""
    from tensorboardX.proto.event_pb2 import Event, SessionLog

    found = []
    for file in sorted((workdir / "tensorboard").iterdir(), key=lambda path: int(path.name.split(".")[3])):
        content = file.read_bytes()
        while content:
            length = int.from_bytes(content[:8], "little")
            event = Event()
            event.ParseFromString(content[12 : 12 + length])
            content = content[16 + length :]
            if event.session_log.status == SessionLog.START:
                found = [(at, value) for at, value in found if at < event.step]
            found += [(event.step, value.simple_value) for value in event.summary.value if value.tag == "loss"]
    return found


# ---------------------------------------------------------------------- the same numbers


def test_the_same_command_again_goes_on_bit_for_bit(world, whole, copy, capsys):
    capsys.readouterr()
    history = worlds.train(copy, *world.flags, *EVERY)
    said = capsys.readouterr().out
    assert "resumed after update 2 of 5" in said
    assert "first loss: not checked, the policy has done 2 updates" in said
    assert columns(history) == columns(whole[1])
    for name in ("num_tokens", "epoch", "learning_rate", "rewards/margins", "logps/chosen"):
        assert (worlds.column(history, name) == worlds.column(whole[1], name)).all()
    assert model_of(copy) == model_of(whole[0])
    assert Checkpoints(copy).steps == [4, 5]


def test_what_was_reported_of_updates_done_again_is_void(world, whole, copy):
    # TensorBoard reads files in order of their names, which begin with the second they were made in.
    time.sleep(1.1)
    worlds.train(copy, *world.flags, *EVERY)
    expected = [(values["step"], np.float32(values["loss"])) for values in whole[1]]
    assert events(copy) == expected
    assert [values["step"] for values in worlds.read_metrics(copy)] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("after", [1, *(pytest.param(after, marks=pytest.mark.slow) for after in (2, 4))])
def test_it_does_not_matter_where_it_was_interrupted(world, whole, tmp_path, capsys, after):
    interrupt(tmp_path / "run", *world.flags, *EVERY, after=after)
    history = worlds.train(tmp_path / "run", *world.flags, *EVERY)
    last = 2 * (after // 2)
    assert (f"resumed after update {last} of 5" if last else "it begins again from update 1") in capsys.readouterr().out
    assert columns(history) == columns(whole[1])
    assert model_of(tmp_path / "run") == model_of(whole[0])


@pytest.mark.slow
def test_it_may_be_interrupted_again_and_again(world, whole, tmp_path):
    every = ("--config.checkpoint.every=1", "--config.log.every=1")
    for _ in range(4):
        interrupt(tmp_path / "run", *world.flags, *every, after=1)
    assert columns(worlds.train(tmp_path / "run", *world.flags, *every)) == columns(whole[1])
    assert model_of(tmp_path / "run") == model_of(whole[0])


def test_a_run_interrupted_before_its_model_was_written_writes_it(world, whole, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("daajax.models.weights.save", _interrupted)
        with pytest.raises(KeyboardInterrupt):
            worlds.train(tmp_path / "run", *world.flags, *EVERY)
    assert not (tmp_path / "run" / "model").exists()
    monkeypatch.setattr(step.Update, "__call__", _interrupted)  # nothing is left to be done
    history = worlds.train(tmp_path / "run", *world.flags, *EVERY)
    assert columns(history) == columns(whole[1])
    assert model_of(tmp_path / "run") == model_of(whole[0])


def _interrupted(*_, **__):
    raise KeyboardInterrupt


@pytest.mark.slow
@pytest.mark.parametrize(
    "mesh",
    [("--config.mesh.fsdp=4", "--config.mesh.tensor=2"), ("--config.mesh.data=8",)],
    ids=["tensor", "data"],
)
def test_on_another_mesh_it_goes_on_within_rounding(world, whole, copy, mesh):
    fsdp = () if "fsdp" in mesh[0] else ("--config.mesh.fsdp=1",)
    history = worlds.train(copy, *world.flags, *EVERY, *mesh, *fsdp, devices=8)
    assert worlds.deviation(worlds.column(history, "loss"), worlds.column(whole[1], "loss")) < 1e-6
    # A norm adds up rounding of every gradient.
    assert worlds.deviation(worlds.column(history, "grad_norm"), worlds.column(whole[1], "grad_norm")) < 1e-5


@pytest.mark.slow
def test_a_run_of_eight_devices_goes_on_on_them_bit_for_bit_and_on_one_within_rounding(world, tmp_path):
    flags = (*world.flags, *EVERY)
    expected = worlds.train(tmp_path / "whole", *flags, devices=8)
    interrupt(tmp_path / "run", *flags, devices=8)
    shutil.copytree(tmp_path / "run", tmp_path / "one")
    assert columns(worlds.train(tmp_path / "run", *flags, devices=8)) == columns(expected)
    assert model_of(tmp_path / "run") == model_of(tmp_path / "whole")
    history = worlds.train(tmp_path / "one", *flags, devices=1)
    assert worlds.deviation(worlds.column(history, "loss"), worlds.column(expected, "loss")) < 1e-6


@pytest.mark.slow
def test_a_process_killed_at_update_12_of_30_goes_on_bit_for_bit(world, tmp_path):
    flags = ["--config=configs/stories.py", *world.flags, "--config.steps=30", "--config.log.every=1"]
    flags += ["--config.checkpoint.every=5"]
    environment = {"JAX_NUM_CPU_DEVICES": "1"}
    one = subprocess.Popen(
        [sys.executable, "-m", "daajax.train", *flags, f"--workdir={tmp_path / 'run'}"],
        cwd=worlds.ROOT,
        env=os.environ | {"PYTHONPATH": str(worlds.ROOT)} | environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    metrics = tmp_path / "run" / "metrics.jsonl"
    while one.poll() is None and not (metrics.is_file() and metrics.read_bytes().count(b"\n") >= 12):
        time.sleep(0.01)
    one.send_signal(signal.SIGKILL)
    assert one.wait() == -signal.SIGKILL
    assert not (tmp_path / "run" / "model").exists()
    for workdir in ("run", "whole"):
        done = worlds.command("train", *flags, f"--workdir={tmp_path / workdir}", timeout=900, **environment)
        assert done.returncode == 0, done.stderr
        assert bool(re.search(r"resumed after update (5|10|15|20|25) of 30", done.stdout)) == (workdir == "run")
    histories = [worlds.read_metrics(tmp_path / workdir) for workdir in ("run", "whole")]
    assert [values["step"] for values in histories[0]] == list(range(1, 31))
    assert columns(histories[0]) == columns(histories[1])
    assert model_of(tmp_path / "run") == model_of(tmp_path / "whole")


# ---------------------------------------------------------------------- longer, shorter


def test_a_finished_run_goes_on_if_it_gets_longer(world, whole, tmp_path, capsys):
    worlds.train(tmp_path / "run", *world.flags, *EVERY, "--config.steps=3")
    history = worlds.train(tmp_path / "run", *world.flags, *EVERY)
    assert "config: steps was 3, is 5\n" in capsys.readouterr().out
    assert columns(history) == columns(whole[1])
    assert model_of(tmp_path / "run") == model_of(whole[0])
    assert json.loads((tmp_path / "run" / "config.json").read_text())["steps"] == 5


def test_a_run_that_is_beyond_its_end_is_refused(world, copy):
    with pytest.raises(UserError, match=r"holds update 2 but this run ends at 1; raise steps or epochs") as error:
        worlds.train(copy, *world.flags, *EVERY, "--config.steps=1")
    assert "\n" not in str(error.value)
    assert Checkpoints(copy).steps == [2]


def test_the_last_update_is_saved_once(world, tmp_path, monkeypatch):
    saves, save = [], Checkpoints.save

    def spy(self, step, *arguments, wait):
        saves.append((step, wait))
        return save(self, step, *arguments, wait=wait)

    monkeypatch.setattr(Checkpoints, "save", spy)
    worlds.train(tmp_path / "run", *world.flags, "--config.steps=4", *EVERY)
    assert saves == [(2, False), (4, True)]


# ---------------------------------------------------------------------- what may change


@pytest.mark.parametrize(
    "changes",
    [
        ("log.every=3",),
        ("checkpoint.every=1", "checkpoint.keep=3"),
        ("check_first_loss=False",),
        ("data.max_bad_rows=7",),
        ("data.cache_dir=None",),
        ("reference.cache_dir={}/elsewhere",),
        ("epochs=1.0", "steps=None"),
    ],
    ids=lambda changes: changes[0].split("=")[0],
)
def test_what_decides_no_number_may_change(world, whole, copy, changes):
    flags = [f"--config.{change.format(copy.parent)}" for change in changes]
    history = worlds.train(copy, *world.flags, *EVERY, *flags)
    by_step = {values["step"]: values["loss"] for values in whole[1]}
    assert history[-1]["step"] == 5
    assert all(values["loss"] == by_step[values["step"]] for values in history)
    assert model_of(copy) == model_of(whole[0])


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        ("attention=dense", "head=token"),
        ("remat=full", "micro_batches=2"),
        ("packing.enabled=False", "packing.prefix_sharing=False"),
    ],
    ids=lambda changes: changes[0],
)
def test_how_the_same_numbers_are_computed_may_change(world, whole, copy, changes):
    history = worlds.train(copy, *world.flags, *EVERY, *(f"--config.{change}" for change in changes))
    assert worlds.deviation(worlds.column(history, "loss"), worlds.column(whole[1], "loss")) < 1e-5


# ---------------------------------------------------------------------- by force


@pytest.mark.slow
def test_another_loss_is_taken_by_force(world, whole, copy, capsys):
    flags = (*world.flags, *EVERY, "--config.loss={'name':'ipo','beta':0.1}")
    with pytest.raises(UserError, match=r"another config: .*loss\.name was \"dpo\", is \"ipo\".*resume=force"):
        worlds.train(copy, *flags)
    history = worlds.train(copy, *flags, "--config.resume=force")
    said = capsys.readouterr().out
    assert 'config: loss.name was "dpo", is "ipo" (forced)' in said
    assert "resumed after update 2 of 5" in said
    assert columns(history[:2]) == columns(whole[1][:2])
    # The same parameters, seen by another loss.
    assert history[2]["logps/chosen"] == whole[1][2]["logps/chosen"]
    assert history[2]["loss"] != whole[1][2]["loss"]


@pytest.mark.slow
def test_another_learning_rate_is_taken_by_force(world, whole, copy, capsys):
    flags = (*world.flags, *EVERY, "--config.optimizer.learning_rate=5e-4", "--config.resume=force")
    history = worlds.train(copy, *flags)
    assert "config: optimizer.learning_rate was 0.001, is 0.0005 (forced)" in capsys.readouterr().out
    assert worlds.column(history, "learning_rate").tolist() == pytest.approx([1e-3] * 2 + [5e-4] * 3)
    assert columns(history[:3]) == columns(whole[1][:3])
    assert columns(history[3:]) != columns(whole[1][3:])


@pytest.mark.slow
def test_another_optimizer_starts_afresh_by_force_and_keeps_to_the_schedule(world, copy, tmp_path, capsys):
    with worlds.visible(1):
        export(worlds.parse(*world.flags)[0], str(copy), output=str(tmp_path / "before"))
    changes = ("--config.optimizer.name=sgd", "--config.optimizer.b1=None", "--config.optimizer.b2=None")
    schedule = ("--config.optimizer.schedule=linear", "--config.optimizer.max_grad_norm=None", "--config.steps=3")
    flags = (*world.flags, *EVERY, *changes, *schedule)
    with pytest.raises(UserError, match=r"another config: optimizer\."):
        worlds.train(copy, *flags)
    values = worlds.train(copy, *flags, "--config.resume=force")[-1]
    assert "its parameters are taken, and the optimizer starts afresh" in capsys.readouterr().out
    # The third of three updates has a third of the peak rate, and plain descent moves by the rate times the gradient.
    assert values["learning_rate"] == pytest.approx(1e-3 / 3)
    before, after = (worlds.load_tensors(path) for path in (tmp_path / "before", copy / "model"))
    moved = math.sqrt(sum(float(((after[name] - before[name]).astype(np.float64) ** 2).sum()) for name in before))
    assert moved == pytest.approx(1e-3 / 3 * values["grad_norm"], rel=1e-3)


@pytest.mark.slow
def test_other_data_under_the_same_path_are_refused_unless_forced(world, tmp_path, capsys):
    data = worlds.write_rows(tmp_path / "pairs.jsonl", worlds.pairs(40))
    flags = (*world.flags, *EVERY, f"--config.data.path={data}")
    interrupt(tmp_path / "run", *flags)
    worlds.write_rows(data, worlds.pairs(40, seed=1))
    with pytest.raises(UserError, match=r"the data changed since .*: digest \w{12} then, \w{12} now; restore") as error:
        worlds.train(tmp_path / "run", *flags)
    assert "\n" not in str(error.value)
    assert Checkpoints(tmp_path / "run").steps == [2]
    worlds.train(tmp_path / "run", *flags, "--config.resume=force")
    assert re.search(r"the data changed since .* now \(forced\)", capsys.readouterr().out)


def test_other_weights_under_the_same_path_are_refused(world, tmp_path):
    model = worlds.make_model(tmp_path / "model")
    flags = (*world.flags, *EVERY, f"--config.model.path={model}")
    interrupt(tmp_path / "run", *flags)
    worlds.make_model(model, seed=1)
    with pytest.raises(UserError, match=r"the weights of the model changed since"):
        worlds.train(tmp_path / "run", *flags)


@pytest.mark.slow
def test_a_model_of_other_shapes_is_refused_by_force_too(world, copy, tmp_path):
    model = worlds.make_model(tmp_path / "model", intermediate_size=96)
    flags = (*world.flags, *EVERY, f"--config.model.path={model}", "--config.resume=force")
    with pytest.raises(
        UserError, match=r"is of another model or optimizer: params/.* is float32\[.*needed is"
    ) as error:
        worlds.train(copy, *flags)
    assert "\n" not in str(error.value)
    assert Checkpoints(copy).steps == [2]


def test_a_run_that_is_not_to_be_gone_on_with_is_refused(world, copy):
    with pytest.raises(UserError, match="holds a run, and resume='never' goes on with none"):
        worlds.train(copy, *world.flags, *EVERY, "--config.resume=never")


# ---------------------------------------------------------------------- damage


def test_a_damaged_checkpoint_costs_updates_but_changes_no_number(world, whole, tmp_path, capsys):
    every = ("--config.checkpoint.every=1", "--config.checkpoint.keep=2", "--config.log.every=1")
    interrupt(tmp_path / "run", *world.flags, *every)
    assert Checkpoints(tmp_path / "run").steps == [2, 3]
    large = max((tmp_path / "run" / "checkpoints" / "3" / "params").rglob("d/*"), key=lambda path: path.stat().st_size)
    content = bytearray(large.read_bytes())
    content[len(content) // 2] ^= 1
    large.write_bytes(content)
    history = worlds.train(tmp_path / "run", *world.flags, *every)
    said = capsys.readouterr().out
    assert "checkpoint of update 3 is damaged (" in said
    assert "resumed after update 2 of 5" in said
    assert columns(history) == columns(whole[1])
    assert model_of(tmp_path / "run") == model_of(whole[0])


def test_a_run_whose_checkpoints_are_all_damaged_never_begins_again(world, copy):
    (copy / "checkpoints" / "2" / "record" / "metadata").write_text("")
    for _ in range(2):
        with pytest.raises(UserError, match=r"every checkpoint in .* is damaged: update 2 \("):
            worlds.train(copy, *world.flags, *EVERY)
    assert not (copy / "model").exists()
    assert [values["step"] for values in worlds.read_metrics(copy)] == [1, 2, 3]


def test_parameters_that_are_not_finite_are_never_saved(world, tmp_path, monkeypatch):
    call = step.Update.__call__

    def update(self, state, *given, keys):
        state, logged = call(self, state, *given, keys=keys)
        if int(state.step) == 4:
            state = state._replace(params=state.params | {"norm": state.params["norm"] * math.nan})
        return state, logged

    monkeypatch.setattr(step.Update, "__call__", update)
    with pytest.raises(UserError, match="update 4 made parameters that are not finite"):
        worlds.train(tmp_path / "run", *world.flags, *EVERY)
    assert Checkpoints(tmp_path / "run").steps == [2]


def test_a_full_disk_does_not_end_a_run_at_once(world, whole, tmp_path, monkeypatch, capsys):
    import orbax.checkpoint as ocp

    save = ocp.CheckpointManager.save

    def full(self, step, *arguments, **options):
        if step == 2:
            raise OSError(28, "No space left on device")
        return save(self, step, *arguments, **options)

    monkeypatch.setattr(ocp.CheckpointManager, "save", full)
    history = worlds.train(tmp_path / "run", *world.flags, *EVERY)
    assert "the checkpoint of update 2 could not be saved (OSError: [Errno 28] No space" in capsys.readouterr().out
    assert columns(history) == columns(whole[1])
    assert Checkpoints(tmp_path / "run").steps == [4, 5]


def test_checkpoints_come_every_so_often_and_of_the_last_update(world, tmp_path):
    worlds.train(tmp_path / "run", *world.flags, "--config.checkpoint.every=2", "--config.checkpoint.keep=9")
    assert Checkpoints(tmp_path / "run").steps == [2, 4, 5]


@pytest.mark.slow
def test_another_reference_under_the_same_path_is_refused_unless_forced(world, tmp_path, capsys):
    other = worlds.make_model(tmp_path / "other", seed=1)
    flags = (*world.flags, "--config.reference.mode=path", f"--config.reference.path={other}")
    worlds.train(tmp_path / "run", *flags, "--config.steps=1")
    worlds.make_model(other, seed=2)
    with pytest.raises(UserError, match="the weights of the reference changed since the checkpoint was made"):
        worlds.train(tmp_path / "run", *flags, "--config.steps=2")
    worlds.train(tmp_path / "run", *flags, "--config.steps=2", "--config.resume=force")
    assert "the weights of the reference changed since the checkpoint was made" in capsys.readouterr().out


def test_a_run_whose_last_checkpoint_is_not_saved_is_not_finished(world, whole, tmp_path, monkeypatch):
    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("orbax.checkpoint.CheckpointManager.save", full)
        with pytest.raises(UserError, match=r"the model is in .*/model, but the last checkpoint could not be saved"):
            worlds.train(tmp_path / "run", *world.flags)
    assert (tmp_path / "run" / "model").is_dir()
    assert not (tmp_path / "run" / "finished").exists()
    again = worlds.train(tmp_path / "run", *world.flags)
    assert [values["step"] for values in again] == [1, 2, 3, 4, 5]


@pytest.mark.slow
def test_a_finished_run_without_its_model_writes_it_again(world, tmp_path):
    worlds.train(tmp_path / "run", *world.flags, "--config.steps=1")
    before = (tmp_path / "run" / "model" / "model.safetensors").read_bytes()
    shutil.rmtree(tmp_path / "run" / "model")
    worlds.train(tmp_path / "run", *world.flags, "--config.steps=1")
    assert (tmp_path / "run" / "model" / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize("error", [MemoryError(), PermissionError(13, "Permission denied")])
def test_what_keeps_a_checkpoint_from_being_read_is_not_taken_for_damage(world, tmp_path, monkeypatch, error):
    def fail(*arguments, **options):
        raise error

    worlds.train(tmp_path / "run", *world.flags, "--config.steps=1")
    with monkeypatch.context() as patch:
        patch.setattr("orbax.checkpoint.Checkpointer.restore", fail)
        with pytest.raises(type(error)):
            worlds.train(tmp_path / "run", *world.flags, "--config.steps=2")
    assert Checkpoints(tmp_path / "run").steps == [1]
    assert not (tmp_path / "run" / "damaged-checkpoints").exists()
