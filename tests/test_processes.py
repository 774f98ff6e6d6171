"""Jobs of several processes: they find each other, train as one process does, stop together and say so once."""

import json
import pathlib
import re
import signal
import time

import jax
import numpy as np
import pytest

from benchmarks import loading
from daajax import console, generate, places, processes, sharding
from daajax.data.batches import Batches
from daajax.errors import UserError
from daajax.watchdog import Watchdog
from tests import jobs, worlds
from tests.data.test_batches import planned, random_examples, tokenized_data

SLURM = {
    "SLURM_JOB_ID": "4097",
    "SLURM_STEP_NODELIST": "node[07-09],other",
    "SLURM_NTASKS": "4",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_NNODES": "2",
}
NAMED = {"DAAJAX_NUM_PROCESSES": "4", "DAAJAX_PROCESS_ID": "2", "JAX_COORDINATOR_ADDRESS": "host:1234"}


@pytest.mark.parametrize(
    ("environment", "place"),
    [
        ({}, None),
        (NAMED, places.Place(2, 4, "host:1234")),
        (NAMED | {"JAX_LOCAL_DEVICE_IDS": "0,2"}, places.Place(2, 4, "host:1234", (0, 2))),
        (NAMED | SLURM, places.Place(2, 4, "host:1234")),
        (
            {name: value for name, value in NAMED.items() if "ID" not in name} | {"JOB_COMPLETION_INDEX": "1"},
            places.Place(1, 4, "host:1234"),
        ),
        (SLURM, places.Place(3, 4, "node07:61441")),
        (SLURM | {"SLURM_STEP_NODELIST": "node1"}, places.Place(3, 4, "node1:61441")),
        (SLURM | {"SLURM_STEP_NODELIST": "node1,node2"}, places.Place(3, 4, "node1:61441")),
        # Two tasks a node that see all of its GPUs share them; one task has all, as has one that sees its own only.
        (SLURM | {"CUDA_VISIBLE_DEVICES": "0,1,2,3"}, places.Place(3, 4, "node07:61441", (2, 3))),
        (
            SLURM | {"CUDA_VISIBLE_DEVICES": "0,1", "SLURM_GPUS_PER_TASK": "2"},
            places.Place(3, 4, "node07:61441"),
        ),
        (SLURM | {"CUDA_VISIBLE_DEVICES": "1"}, places.Place(3, 4, "node07:61441")),
        (SLURM | {"CUDA_VISIBLE_DEVICES": "0,1", "SLURM_NNODES": "4"}, places.Place(3, 4, "node07:61441")),
        # A shell on a node of a job is no step of it.
        ({"SLURM_JOB_ID": "4097", "SLURM_NTASKS": "4"}, None),
    ],
)
def test_a_process_knows_its_place(environment, place):
    assert places.place_of(environment) == place


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"DAAJAX_NUM_PROCESSES": "2"}, "DAAJAX_PROCESS_ID is not set"),
        ({"DAAJAX_PROCESS_ID": "0"}, "DAAJAX_NUM_PROCESSES is not set"),
        (NAMED | {"DAAJAX_NUM_PROCESSES": "two"}, "DAAJAX_NUM_PROCESSES is 'two'"),
        (NAMED | {"DAAJAX_PROCESS_ID": "4"}, "ids go from 0 to 3"),
        (NAMED | {"JAX_COORDINATOR_ADDRESS": "host"}, "not host:port of process 0"),
        (NAMED | {"JAX_LOCAL_DEVICE_IDS": "all"}, "not a list of numbers"),
        (SLURM | {"CUDA_VISIBLE_DEVICES": "0,1,2"}, "do not share 3 GPUs evenly"),
        (SLURM | {"SLURM_STEP_NODELIST": "rack[1-2]node[1-4]"}, "the first node cannot be told"),
    ],
)
def test_half_an_environment_is_refused(environment, words):
    with pytest.raises(UserError, match=re.escape(words)):
        places.place_of(environment)


def test_one_process_agrees_with_itself():
    assert processes.gathered({"a": 1}) == [{"a": 1}]
    assert processes.from_first(lambda: 3) == processes.after_first(lambda: 3) == 3
    processes.check_same("a", "the words")
    processes.check_everywhere(True, lambda others: "never")
    with pytest.raises(UserError, match="process 0 on"):
        processes.check_everywhere(False, lambda others: f"not in {others}")
    with pytest.raises(UserError, match="mended"):
        processes.first_alone(lambda: (_ for _ in ()).throw(UserError("to be mended")))


def test_sampling_is_refused_in_several_processes(monkeypatch):
    monkeypatch.setattr(processes, "count", lambda: 2)
    with pytest.raises(UserError, match="runs in one process, this is one of 2"):
        generate.generate(generate.parse(["generate", "--model=none", "--prompt=a"]))


def test_a_muted_console_says_nothing(monkeypatch, capsys):
    monkeypatch.setattr(console, "_is_muted", False)
    console.mute()
    console.say("nothing")
    console.Progress("train", 1, "update").advance({"loss": 1.0})
    assert not capsys.readouterr().out


@pytest.mark.parametrize(
    "mesh_sizes", [dict(data=2, fsdp=4), dict(data=2, fsdp=2, tensor=2), dict(fsdp=2, context=4)], ids=str
)
@pytest.mark.parametrize("of", [2, 4])
def test_processes_fill_their_own_rows_of_one_batch(monkeypatch, mesh_sizes, of):
    mesh = sharding.make_mesh(mesh_sizes)
    data = tokenized_data(random_examples(24))
    plan = planned(data, row_multiple=8, parts=sharding.length_parts(mesh))
    whole = Batches(data, plan, draws=["gumbel"], seed=3)
    found = []
    for number in range(of):
        mine = set(mesh.devices.flat[number * 8 // of : (number + 1) * 8 // of].tolist())
        with monkeypatch.context() as patch:
            patch.setattr(
                jax.sharding.NamedSharding,
                "addressable_devices_indices_map",
                lambda self, shape, mine=mine: {
                    device: index for device, index in self.devices_indices_map(shape).items() if device in mine
                },
            )
            found.append(sharding.own_rows(mesh, plan.rows))
    assert sorted({row for rows in found for row in rows.tolist()}) == list(range(plan.rows))
    for rows in found:
        own, full = Batches(data, plan, draws=["gumbel"], seed=3, rows=rows)[1], whole[1]
        for name, value in whole.shaped(1).items():
            assert (value.shape, value.dtype) == (full[name].shape, full[name].dtype)
        for name, value in own.items():
            np.testing.assert_array_equal(value, full[name][:, rows])
    placed = sharding.place(mesh, whole[1], rows=plan.rows)
    for name, value in whole[1].items():
        np.testing.assert_array_equal(placed[name], value)


def test_a_run_without_progress_ends_with_what_it_was_doing(monkeypatch, tmp_path, capfd):
    ended = []
    monkeypatch.setattr(processes, "leave_stuck", lambda: ended.append(processes.STUCK))
    with Watchdog(tmp_path, 0.001) as watchdog:
        with watchdog.paused():
            time.sleep(0.2)
        assert not ended
        deadline = time.monotonic() + 30
        while not ended and time.monotonic() < deadline:
            time.sleep(0.01)
    assert ended[0] == processes.STUCK
    assert "test_a_run_without_progress" in (tmp_path / "stacks" / "process-0.txt").read_text()
    assert "no update has ended for 0.001 minutes" in capfd.readouterr().err


def test_a_watchdog_that_is_off_watches_nothing(monkeypatch, tmp_path):
    monkeypatch.setattr(processes, "leave_stuck", lambda: pytest.fail("it ended"))
    with Watchdog(tmp_path, 0.0):
        time.sleep(0.05)
    assert not (tmp_path / "stacks").exists()


# ---------------------------------------------------------------------------------------------------- jobs


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return worlds.make_world(tmp_path_factory.mktemp("world"))


def line(world, name, *flags, recipe=worlds.STORIES, cache="shared"):
    kept = f"--config.reference.cache_dir={world.folder / f'reference-{cache}'}"
    return [f"--config={recipe}", f"--workdir={world.folder / name}", *world.flags, *flags, kept]


DPO = str(worlds.ROOT / "configs" / "dpo_llama.py")
SMALL = (
    "--config.batch_size=8",
    "--config.epochs=None",
    "--config.log.every=1",
    "--config.model.dtype=float32",
    "--config.remat=none",
)
CASES = {  # name: recipe, flags; every objective that is coupled over the batch is among them
    "dpo": (worlds.STORIES, ("--config.eval.every=2",)),
    "lora": (worlds.STORIES, ("--config.lora.rank=4", "--config.optimizer.learning_rate=1e-2")),
    "kto": (f"{DPO}:kto", (*SMALL, "--config.micro_batches=2")),
    "coupled": (
        f"{DPO}:aot",
        (
            *SMALL,
            "--config.micro_batches=2",
            # beta-DPO without leaving pairs out: where policy and reference are one, rounding would choose them.
            "--config.extra_losses=({'name': 'beta_dpo', 'weight': 1.0, 'rho': 0.0}, "
            "{'name': 'bco_pair', 'weight': 0.5})",
        ),
    ),
}
MESHES = {  # processes, devices of each: mesh of each case
    (2, 4): {"dpo": dict(fsdp=4, tensor=2), "kto": dict(data=8, fsdp=1), "coupled": dict(data=2, fsdp=2, tensor=2)},
    (4, 2): {"dpo": dict(fsdp=8), "coupled": dict(fsdp=4, tensor=2)},
    # Heads and vocabulary cut between processes, and the length of rows.
    (2, 1): {"dpo": dict(fsdp=1, tensor=2), "lora": dict(fsdp=2), "kto": dict(fsdp=1, context=2)},
}


def held_out(world, name):
    """Some of the cases are evaluated too."""
    cache = world.folder / "tokens"
    return [f"--config.eval_data.path={world.data}", f"--config.eval_data.cache_dir={cache}"] if name == "dpo" else []


def adapter_of(workdir):
    """The tensors of a run's adapter; none if it has none."""
    return worlds.load_tensors(workdir / "adapter")


@pytest.fixture(scope="module")
def alone(world):
    """Metrics of each case on one device, and its model's tensors."""
    found = {}

    def of(name):
        if name not in found:
            recipe, flags = CASES[name]
            workdir = world.folder / f"alone-{name}"
            flags = [*flags, *held_out(world, name)]
            history = worlds.train(workdir, *line(world, "", *flags, cache="alone")[2:], recipe=recipe)
            found[name] = history, worlds.load_tensors(workdir / "model"), adapter_of(workdir)
        return found[name]

    return of


@pytest.mark.slow
@pytest.mark.parametrize(("of", "devices"), MESHES)
def test_a_job_computes_what_one_process_does(world, alone, tmp_path, of, devices):
    lines = []
    for name, mesh in MESHES[of, devices].items():
        recipe, flags = CASES[name]
        cuts = [f"--config.mesh.{axis}={size}" for axis, size in mesh.items()]
        flags = [*flags, *cuts, *held_out(world, name)]
        lines.append(line(world, f"job{of}x{devices}-{name}", *flags, recipe=recipe, cache=f"job{of}x{devices}"))
    (tmp_path / "lines.json").write_text(json.dumps(lines))
    job = jobs.start(
        tmp_path, "20000", str(tmp_path / "lines.json"), processes=of, devices=devices, module="tests.trainings"
    )
    assert job.wait(400) == [0] * of, job.said(0)[-3000:] + job.said(of - 1)[-3000:]
    for name in MESHES[of, devices]:
        history, tensors, adapter = alone(name)
        workdir = world.folder / f"job{of}x{devices}-{name}"
        found = worlds.read_metrics(workdir)
        compared = ("loss", "grad_norm", *(["eval/loss"] if name == "dpo" else []))
        for metric in [metric for metric in history[-1] if metric in compared or metric.startswith("loss/")]:
            ours, theirs = ([row[metric] for row in rows if metric in row] for rows in (found, history))
            assert len(ours) == len(theirs)
            off = worlds.deviation(ours, theirs)
            assert off < (5e-5 if metric == "grad_norm" else 1e-5), (name, metric)
        index = json.loads((workdir / "model" / "model.safetensors.index.json").read_text())
        assert len(set(index["weight_map"].values())) >= of  # each process wrote some
        written = worlds.load_tensors(workdir / "model")
        assert written.keys() == tensors.keys() == index["weight_map"].keys()
        written |= adapter_of(workdir)
        for tensor, value in (tensors | adapter).items():
            np.testing.assert_allclose(written[tensor], value, atol=2e-4, err_msg=tensor)
    # The first process speaks for all; a library of theirs names ranks, in pieces of lines.
    others = [row for row in job.said(1).splitlines() if "peer rank" not in row]
    assert others == ["process 1 is done"]
    assert len(re.findall("the model is in", job.said(0))) == len(lines)


# A checkpoint after every update: what saves asks nothing of the platform itself.
LONG = ("--config.steps=20", "--config.log.every=1", "--config.checkpoint.every=1")


@pytest.mark.slow
@pytest.mark.parametrize("of", [1, 2])
def test_a_job_stops_when_asked_and_goes_on_as_if_it_had_not(world, tmp_path, of):
    devices = 2 // of  # the same mesh
    whole = jobs.start(tmp_path / "whole", *line(world, f"whole{of}", *LONG), processes=of, devices=devices)
    assert whole.wait() == [0] * of, whole.said(0)[-3000:]
    job = jobs.start(tmp_path / "first", *line(world, f"stopped{of}", *LONG), processes=of, devices=devices)
    metrics = world.folder / f"stopped{of}" / "metrics.jsonl"
    job.until(lambda: metrics.is_file() and metrics.read_text().count("\n") > 2)
    for _ in range(2):  # a second signal is harmless
        job.processes[-1].send_signal(signal.SIGTERM)
    assert job.wait() == [processes.STOPPED] * of
    assert re.search(r"stopped by the platform: update \d+ of 20 is saved; the same command goes on", job.said(0))
    assert len(worlds.read_metrics(metrics.parent)) < 20
    again = jobs.start(tmp_path / "second", *line(world, f"stopped{of}", *LONG), processes=of, devices=devices)
    assert again.wait() == [0] * of, again.said(0)[-3000:]
    assert "resumed after update" in again.said(0)
    one, other = (worlds.read_metrics(world.folder / f"{name}{of}") for name in ("whole", "stopped"))
    assert [values["loss"] for values in one] == [values["loss"] for values in other]


@pytest.mark.slow
def test_processes_do_not_outlive_one_that_dies(world, tmp_path):
    job = jobs.start(tmp_path, *line(world, "dying", *LONG), processes=2)
    metrics = world.folder / "dying" / "metrics.jsonl"
    job.until(lambda: metrics.is_file() and metrics.read_text().count("\n") > 2)
    job.processes[1].kill()
    began = time.monotonic()
    codes = job.wait(60)
    assert codes[0] not in (0, 1)  # whoever starts jobs starts it again
    assert codes[1] == -signal.SIGKILL
    assert time.monotonic() - began < 30


@pytest.mark.slow
def test_hosts_need_one_folder_and_one_command_line(world, tmp_path):
    cwds = [tmp_path / "one", tmp_path / "other"]
    for cwd in cwds:
        cwd.mkdir()
    flags = [flag for flag in line(world, "") if not flag.startswith("--workdir")]
    apart = jobs.start(tmp_path / "apart", *flags, "--workdir=run", processes=2, cwds=cwds)
    own = [["--config.seed=1"], ["--config.seed=2"]]
    unlike = jobs.start(tmp_path / "unlike", *line(world, "unlike"), processes=2, own=own)
    for job, words in (
        (apart, "is not the same folder in process 1 on"),
        (unlike, "the command lines differ: process 1"),
    ):
        assert job.wait() == [1, 1], job.said(0)[-3000:]
        said = [row for n in range(2) for row in job.said(n).splitlines() if row.startswith("error:")]
        assert len(said) == 1
        assert words in said[0]
    assert not (world.folder / "unlike").exists()


@pytest.mark.slow
def test_a_process_that_finds_nobody_says_so_in_time(world, tmp_path):
    for number in range(2):
        folder = tmp_path / str(number)
        job = jobs.start(folder, *line(world, "lonely"), processes=2, only=[number], DAAJAX_START_SECONDS="3")
        assert job.wait(60) == [1]
        assert f"error: process {number} of 2 did not meet the others at 127.0.0.1" in job.said(0)
    assert not pathlib.Path(world.folder / "lonely").exists()


@pytest.mark.slow
def test_processes_read_their_own_slices_of_a_model(tmp_path):
    small = dict(vocab_size=4000, hidden_size=512, intermediate_size=1408, num_attention_heads=8)
    size = loading.write_model(tmp_path, 0.3 * loading.GIB, 3, loading.CONFIG | small)
    for held in loading.measure(tmp_path, 2):
        # A half that stays, and one parameter at a time on its way; a whole model would be more.
        assert 0.5 * size < held["own"] - held["before"] < 0.8 * size
