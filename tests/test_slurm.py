"""A real Slurm of two nodes on one machine, and what launch/slurm.sbatch does in its queue."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests import worlds

ROOT = Path(__file__).parents[1]
DAEMONS = ("slurmctld", "slurmd", "munged", "sbatch")
MISSING = [name for name in DAEMONS if shutil.which(name, path=os.environ.get("PATH", "") + ":/usr/sbin") is None]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        bool(MISSING) or os.geteuid() != 0,
        reason="needs root and apt-get install slurmctld slurmd slurm-client munge",
    ),
]

CONFIGURATION = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket,cred_expire=5
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SchedulerType=sched/builtin
SchedulerParameters=sched_interval=1,sched_min_interval=0,batch_sched_delay=0
SelectType=select/cons_tres
MpiDefault=none
ReturnToService=2
KillWait=5
MinJobAge=300
# Names that are addresses: processes look for each other by them.
NodeName=127.0.0.1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=1
NodeName=127.0.0.2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=1
PartitionName=all Nodes=127.0.0.1,127.0.0.2 Default=YES MaxTime=10 State=UP OverTimeLimit=0
"""

# In the trainer's place: it is stopped once and goes on then.
STAND_IN = """#!{python}
import os, signal, sys, time
print("arguments", *sys.argv[1:], flush=True)
number, count, nodes = (os.environ["SLURM_" + name] for name in ("PROCID", "NTASKS", "STEP_NODELIST"))
print("process", number, "of", count, nodes, flush=True)
if os.environ.get("SLURM_RESTART_COUNT", "0") != "0":
    print("resumed", flush=True)
    sys.exit({then})
signal.signal(signal.SIGTERM, lambda *_: (print("saved", flush=True), sys.exit(42)))
open({ready!r} + number, "w").close()
if {first}:
    sys.exit({first})
time.sleep(120)
"""


def free_ports(count: int) -> list[int]:
    probes = [socket.socket() for _ in range(count)]
    for probe in probes:
        probe.bind(("127.0.0.1", 0))
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports


class Cluster:
    """Slurm's commands, and what waits for its jobs."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = os.environ | {
            "SLURM_CONF": str(folder / "slurm.conf"),
            "PATH": os.environ["PATH"] + ":/usr/sbin",
        }

    def run(self, *command: str | Path, **environment: str) -> str:
        result = subprocess.run(
            command,
            cwd=ROOT,
            env=self.environment | environment,
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )
        assert result.returncode == 0, result.stderr
        return result.stdout

    def submit(self, *arguments: str, options: tuple[str, ...] = (), **environment: str) -> str:
        """Submits the launcher; returns the job's number."""
        said = self.run(
            "sbatch", "--nodes=2", f"--output={self.folder}/%j.log", *options, "launch/slurm.sbatch", *arguments,
            **environment,
        )  # fmt: skip
        return said.split()[-1]

    def job(self, number: str) -> dict[str, str]:
        return dict(re.findall(r"(\w+)=(\S+)", self.run("scontrol", "show", "job", number)))

    def log(self, number: str) -> str:
        file = self.folder / f"{number}.log"
        return file.read_text() if file.exists() else ""

    def wait(self, what: str, condition, number: str, seconds: float = 45) -> None:
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, f"no {what}: {self.job(number)}\n{self.log(number)}\n{self.logs()}"
            time.sleep(0.2)

    def wait_for_state(self, number: str, state: str, seconds: float = 60) -> None:
        self.wait(state, lambda: self.job(number)["JobState"] == state, number, seconds)

    def logs(self) -> str:
        return "\n".join(path.read_text()[-2000:] for path in sorted(self.folder.glob("slurm*.log")))


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    folder = tmp_path_factory.mktemp("slurm")
    for name in ("state", "spool-127.0.0.1", "spool-127.0.0.2", "munge"):
        (folder / name).mkdir()
    folder.chmod(0o755)
    host = socket.gethostname().split(".")[0]
    (folder / "slurm.conf").write_text(CONFIGURATION.format(folder=folder, host=host, ports=free_ports(3)))
    key = folder / "munge" / "key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o600)
    cluster = Cluster(folder)
    at = folder / "munge"
    munge = ["munged", "--foreground", "--force", f"--socket={at}/socket", f"--key-file={key}", f"--pid-file={at}/pid"]
    munge += [f"--log-file={at}/log", f"--seed-file={at}/seed"]
    commands = [munge, ["slurmctld", "-D"], *(["slurmd", "-D", "-N", node] for node in ("127.0.0.1", "127.0.0.2"))]
    started = []
    try:
        for command in commands:
            started.append(subprocess.Popen(command, env=cluster.environment, stderr=subprocess.DEVNULL))
            end = time.monotonic() + 10
            while command is munge and not (at / "socket").exists():
                assert time.monotonic() < end, "munged does not start"
                time.sleep(0.1)
        end = time.monotonic() + 30
        while "idle|2" not in cluster_states(cluster):
            assert time.monotonic() < end, cluster_states(cluster) + cluster.logs()
            time.sleep(0.3)
        yield cluster
    finally:
        for process in reversed(started):
            process.send_signal(signal.SIGTERM)
        for process in started:
            try:
                process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                process.kill()


def cluster_states(cluster: Cluster) -> str:
    result = subprocess.run(
        ["sinfo", "--noheader", "--format=%T|%D"], env=cluster.environment, capture_output=True, text=True, check=False
    )
    return result.stdout + result.stderr


def stand_in(folder: Path, *, first: int | str = 0, then: int = 0) -> tuple[str, Path]:
    """A program that takes the trainer's place; where it says that a process has started."""
    ready = folder / "ready-"
    program = folder / "python"
    program.write_text(STAND_IN.format(python=sys.executable, ready=str(ready), first=first, then=then))
    program.chmod(0o755)
    return str(program), ready


def started(ready: Path) -> bool:
    return all(Path(f"{ready}{i}").exists() for i in (0, 1))


def test_a_job_whose_time_is_nearly_up_goes_back_into_the_queue_and_goes_on(cluster, tmp_path):
    python, _ = stand_in(tmp_path)
    # Of its minute fewer than the launcher's 120 s are left: its processes are told as soon as Slurm looks.
    number = cluster.submit("--config=a b.py", "--workdir=w", options=("--time=1",), PYTHON=python)
    cluster.wait_for_state(number, "COMPLETED")
    log = cluster.log(number)
    assert log.count("arguments -m daajax.train --config=a b.py --workdir=w") == 4, log
    assert {"0: process 0 of 2 127.0.0.[1-2]", "1: process 1 of 2 127.0.0.[1-2]"} <= set(log.splitlines())
    assert log.count("saved") == log.count("resumed") == 2
    assert "exit code 42, back into the queue" in log
    assert cluster.job(number)["Restarts"] == "1"


def test_a_job_that_dies_is_restarted_so_many_times(cluster, tmp_path):
    python, _ = stand_in(tmp_path, first=134, then=134)
    number = cluster.submit("--config=c.py", PYTHON=python, RESTARTS="1")
    cluster.wait_for_state(number, "FAILED")
    assert cluster.job(number)["Restarts"] == "1"
    assert "exit code 134 after 1 restarts: the job ends" in cluster.log(number)


def test_a_clear_error_ends_the_job(cluster, tmp_path):
    python, _ = stand_in(tmp_path, first=1)
    number = cluster.submit("--config=c.py", PYTHON=python)
    cluster.wait_for_state(number, "FAILED")
    assert cluster.job(number)["Restarts"] == "0"
    assert cluster.job(number)["ExitCode"] == "1:0"


def test_a_clear_error_of_one_process_ends_the_job(cluster, tmp_path):
    python, _ = stand_in(tmp_path, first="(1, 134)[int(number)]")  # the other one lost it
    number = cluster.submit("--config=c.py", PYTHON=python)
    cluster.wait_for_state(number, "FAILED")
    assert cluster.job(number)["Restarts"] == "0"
    assert cluster.job(number)["ExitCode"] == "1:0"


def test_a_cancelled_job_stays_cancelled(cluster, tmp_path):
    python, ready = stand_in(tmp_path)
    number = cluster.submit("--config=c.py", PYTHON=python)
    cluster.wait("start", lambda: started(ready), number)
    cluster.run("scancel", number)
    cluster.wait("end", lambda: "saved" in cluster.log(number), number)
    cluster.wait_for_state(number, "CANCELLED")
    time.sleep(1)
    assert cluster.job(number)["JobState"] == "CANCELLED"


def test_two_nodes_train_as_one_are_stopped_and_go_on(cluster, tmp_path):
    world, workdir, updates = worlds.make_world(tmp_path), tmp_path / "run", 100
    line = [f"--config={worlds.STORIES}", f"--workdir={workdir}", *world.flags, f"--config.steps={updates}"]
    # The machine's time is shared by both nodes: compiling most of it.
    environment = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    number = cluster.submit(*line, PYTHON=sys.executable, **environment)
    cluster.wait("update", (workdir / "metrics.jsonl").exists, number, seconds=150)
    cluster.run("scancel", "--signal=TERM", number)
    cluster.wait_for_state(number, "COMPLETED", seconds=200)
    log = cluster.log(number)
    assert log.count("0: devices: 2 cpu, mesh {'data': 1, 'fsdp': 2, 'tensor': 1, 'context': 1}") == 2, log
    assert "exit code 42, back into the queue" in log
    assert re.search(rf"0: resumed after update \d+ of {updates}", log)
    assert worlds.read_metrics(workdir)[-1]["step"] == updates
    assert (workdir / "model/model.safetensors").is_file()
