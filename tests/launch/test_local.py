"""launch/local.sh: processes started, watched over, stopped and started again, with a stand-in for the trainer."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests import worlds
from tests.launch import goldens

ROOT = Path(__file__).parents[2]

# In the trainer's place, as a package `daajax` that comes first: does what the plan says of this start of this process.
STAND_IN = """
import json, os, pathlib, signal, sys, time
home = pathlib.Path(os.environ["STAND_IN"])
me = int(os.environ.get("DAAJAX_PROCESS_ID", "0"))
start = len(list(home.glob(f"started-{me}-*")))
action = json.loads((home / "plan.json").read_text())[start][me]
if action == "stopped":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(42))
(home / f"part-{me}").write_text(json.dumps(dict(os.environ) | {"argv": sys.argv[1:]}))
(home / f"part-{me}").rename(home / f"started-{me}-{start}")
while len(list(home.glob(f"started-*-{start}"))) < int(os.environ.get("DAAJAX_NUM_PROCESSES", "1")):
    time.sleep(0.01)  # as processes of one run do
print("here is", me, flush=True)
if action == "killed":
    os.kill(os.getpid(), signal.SIGKILL)
if isinstance(action, int):
    sys.exit(action)
try:
    time.sleep(60)
except KeyboardInterrupt:
    sys.exit(130)
"""


class Launcher:
    """launch/local.sh in an environment of its own, whose trainer follows a plan: by start, by process."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "daajax").mkdir()
        (folder / "daajax/__init__.py").touch()
        (folder / "daajax/train.py").write_text(STAND_IN)

    def begin(self, *arguments: str, plan: list[list[int | str]], **environment: str) -> subprocess.Popen[str]:
        (self.folder / "plan.json").write_text(json.dumps(plan))
        needed = {"PATH": os.environ["PATH"], "PYTHON": sys.executable, "PYTHONPATH": str(self.folder)}
        return subprocess.Popen(
            [ROOT / "launch/local.sh", *arguments],
            cwd=self.folder,
            env=needed | {"STAND_IN": str(self.folder), "JAX_PLATFORMS": "cpu", "GRACE_SECONDS": "0.3"} | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, *arguments: str, plan: list[list[int | str]], **environment: str) -> tuple[int, str, str]:
        process = self.begin(*arguments, plan=plan, **environment)
        out, err = process.communicate(timeout=60)
        return process.returncode, out, err

    def started(self, process: int = 0, start: int = 0) -> dict[str, str]:
        """What a process found, once it has started."""
        file = self.folder / f"started-{process}-{start}"
        end = time.monotonic() + 30
        while not file.exists():
            assert time.monotonic() < end, f"{file.name} is not there"
            time.sleep(0.02)
        return json.loads(file.read_text())

    def starts(self) -> int:
        return len(list(self.folder.glob("started-0-*")))


@pytest.fixture
def launcher(tmp_path):
    return Launcher(tmp_path)


def dry_run(*arguments: str, **environment: str) -> str:
    result = subprocess.run(
        [ROOT / "launch/local.sh", *arguments],
        env={"PATH": os.environ["PATH"], "PYTHON": sys.executable, "JAX_PLATFORMS": "cpu"} | environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    return (result.stdout + result.stderr).replace(sys.executable, "python").replace(str(ROOT), "CHECKOUT")


def test_several_processes_know_of_each_other_and_of_nothing_else(launcher):
    strange = {"https_proxy": "p", "NO_PROXY": "n", "SLURM_JOB_ID": "1", "TPU_NAME": "t"}
    code, out, err = launcher.run(
        "--processes=2", "--devices=3", "--config=a b.py", "--workdir=w", plan=[[0, 0]], **strange
    )
    assert code == 0, err
    found = [launcher.started(i) for i in (0, 1)]
    for i, process in enumerate(found):
        assert process["DAAJAX_NUM_PROCESSES"] == "2"
        assert process["DAAJAX_PROCESS_ID"] == str(i)
        assert process["JAX_NUM_CPU_DEVICES"] == "3"
        assert process["argv"] == ["--config=a b.py", "--workdir=w"]
        assert not set(strange) & set(process)
    assert found[0]["JAX_COORDINATOR_ADDRESS"] == found[1]["JAX_COORDINATOR_ADDRESS"]
    assert found[0]["JAX_COORDINATOR_ADDRESS"].startswith("127.0.0.1:")
    assert found[0]["GLIBC_TUNABLES"] == "glibc.malloc.hugetlb=1"
    assert sorted(out.splitlines()) == ["[1] here is 1", "here is 0"]
    assert "the processes do without NO_PROXY, SLURM_JOB_ID, TPU_NAME, https_proxy" in err


def test_one_process_keeps_its_environment(launcher):
    code, _, _ = launcher.run("--restarts=1", "--config=c.py", plan=[[0]], https_proxy="p", SLURM_JOB_ID="1")
    assert code == 0
    found = launcher.started()
    assert found["https_proxy"] == "p"
    assert found["SLURM_JOB_ID"] == "1"
    assert "DAAJAX_NUM_PROCESSES" not in found


@pytest.mark.parametrize(
    ("ends", "code"),
    [
        ([0, 0], 0),
        ([42, 42], 42),
        ([43, 42], 43),
        ([1, 134], 1),  # who met the error says so; the other one lost its partner
        ([134, 1], 1),
        (["killed", 0], 137),
        ([0, 134], 134),
    ],
    ids=str,
)
def test_the_exit_code_is_the_one_that_matters_most(launcher, ends, code):
    assert launcher.run("--processes=2", "--config=c.py", plan=[ends])[0] == code
    assert launcher.starts() == 1


def test_who_hangs_after_another_died_is_killed(launcher):
    code, _, err = launcher.run("--processes=3", "--config=c.py", plan=[["hangs", "killed", "hangs"]])
    assert code == 137
    assert "process 1 ended with exit code 137; the others have 0.3 s" in err


def test_all_are_started_again_where_that_helps(launcher):
    plan = [[42, 42], ["killed", "hangs"], [43, 43], [0, 0]]
    code, _, err = launcher.run("--processes=2", "--restarts=3", "--config=c.py", plan=plan)
    assert code == 0
    assert launcher.starts() == 4
    assert [line.split(": ")[1] for line in err.splitlines() if "again" in line] == [
        "exit code 42",
        "exit code 137",
        "exit code 43",
    ]


@pytest.mark.parametrize(("ends", "code", "starts"), [([1], 1, 1), ([130], 130, 1), ([42], 42, 3)])
def test_what_does_not_help_is_not_done(launcher, ends, code, starts):
    assert launcher.run("--restarts=2", "--config=c.py", plan=[ends] * 5)[0] == code
    assert launcher.starts() == starts


@pytest.mark.parametrize(
    ("number", "action", "code"), [(signal.SIGTERM, "stopped", 42), (signal.SIGINT, "interrupted", 130)]
)
def test_a_signal_reaches_all_processes_and_ends_the_launcher(launcher, number, action, code):
    process = launcher.begin("--processes=2", "--restarts=5", "--config=c.py", plan=[[action] * 2] * 3)
    for i in (0, 1):
        launcher.started(i)
    process.send_signal(number)
    process.communicate(timeout=30)
    assert process.returncode == code
    assert launcher.starts() == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--processes=0", "--config=c.py"], "--processes=0: a whole number of at least 1"),
        (["--processes", "--config=c.py"], "--processes=--config=c.py: a whole number"),
        (["--restarts=-1", "--config=c.py"], "--restarts=-1: a whole number of at least 0"),
        (["--devices=two", "--config=c.py"], "--devices=two: a whole number"),
        (["--processes=2"], "no recipe: --config=configs/dpo_llama.py, or --smoke"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_every_mistake_is_one_line(arguments, said):
    text = dry_run(*arguments)
    assert said in text
    assert text.count("\n") == 1


def test_gpus_that_cannot_be_shared_out_are_one_line():
    gpus = {"JAX_PLATFORMS": "cuda", "CUDA_VISIBLE_DEVICES": "0,1,2"}
    assert dry_run("--processes=2", "--config=c.py", **gpus).count("\n") == 1
    assert "3 GPUs for 2 processes of 2" in dry_run("--processes=2", "--devices=2", "--config=c.py", **gpus)


def test_help_says_what_there_is():
    assert "--restarts=R" in dry_run("--help")


def test_dry_runs_are_as_expected():
    gpus = {"JAX_PLATFORMS": "cuda", "CUDA_VISIBLE_DEVICES": "0,1,GPU-a,GPU-b"}
    cases = [
        (["--dry-run", "--config=configs/dpo_llama.py"], {}),
        (["--dry-run", "--processes=2", "--devices=4", "--config=c d.py"], {"http_proxy": "p"}),
        (["--dry-run", "--processes", "2", "--config", "c.py"], gpus),
        (["--dry-run", "--devices=2", "--config=c.py"], gpus),
        (["--dry-run", "--smoke", "--processes=2"], {}),
        (["--dry-run", "--smoke", "--workdir=w"], {}),
    ]
    text = ""
    for arguments, environment in cases:
        text += f"$ {' '.join([*(f'{k}={v}' for k, v in environment.items()), 'launch/local.sh', *arguments])}\n"
        text += dry_run(*arguments, **environment)
    goldens.check("local.txt", text)


@pytest.mark.slow
def test_a_training_whose_process_is_killed_goes_on_from_its_checkpoint(tmp_path):
    world, workdir, updates = worlds.make_world(tmp_path), tmp_path / "run", 60
    line = [f"--config={worlds.STORIES}", f"--workdir={workdir}", *world.flags, f"--config.steps={updates}"]
    with (tmp_path / "log").open("w") as log:
        launcher = subprocess.Popen(
            [ROOT / "launch/local.sh", "--processes=2", "--restarts=1", *line, "--config.checkpoint.every=5"],
            env={"PATH": os.environ["PATH"], "HOME": str(tmp_path), "PYTHON": sys.executable, "PYTHONPATH": str(ROOT)}
            | {"JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "DAAJAX_HEARTBEAT_SECONDS": "10"},
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        try:
            end = time.monotonic() + 200
            while not (workdir / "checkpoints/10").exists():
                assert time.monotonic() < end, (tmp_path / "log").read_text()
                assert launcher.poll() is None, (tmp_path / "log").read_text()
                time.sleep(0.1)
            children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
            os.kill(int(children[1]), signal.SIGKILL)
            assert launcher.wait(timeout=200) == 0, (tmp_path / "log").read_text()
        finally:
            launcher.terminate()
    said = (tmp_path / "log").read_text()
    assert "process 1 ended with exit code 137" in said
    assert "starting again, 0 more times at most" in said
    assert "resumed after update " in said, said
    assert worlds.read_metrics(workdir)[-1]["step"] == updates
