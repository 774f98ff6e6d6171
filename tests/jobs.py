"""Jobs of several processes on this machine, started as a launcher starts them."""

import dataclasses
import os
import pathlib
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence

from tests.worlds import ROOT

_KEPT_OUT = re.compile("(?i).*_proxy$|SLURM_.*|TPU_.*|DAAJAX_(NUM|PROCESS)_.*|JAX_NUM_CPU_DEVICES")


@dataclasses.dataclass
class Job:
    """Processes that run; what each says goes to files."""

    processes: list[subprocess.Popen[bytes]]
    files: list[pathlib.Path]

    def wait(self, seconds: float = 240) -> list[int]:
        """The exit codes; all are killed when it takes longer."""
        end = time.monotonic() + seconds
        try:
            return [process.wait(max(end - time.monotonic(), 0.1)) for process in self.processes]
        finally:
            for process in self.processes:
                process.kill()
                process.wait()

    def said(self, process: int) -> str:
        """What a process has said until now."""
        return self.files[process].read_text(errors="replace")

    def until(self, holds: Callable[[], bool], seconds: float = 120) -> None:
        """Waits for something to become true while all run."""
        end = time.monotonic() + seconds
        while not holds():
            ended = [process.poll() for process in self.processes]
            assert ended == [None] * len(ended), (ended, [self.said(n)[-2000:] for n in range(len(ended))])
            assert time.monotonic() < end, "it takes too long"
            time.sleep(0.05)


def start(
    folder: pathlib.Path,
    *arguments: str,
    processes: int,
    devices: int = 1,
    module: str = "daajax.train",
    own: Sequence[Sequence[str]] = (),
    cwds: Sequence[pathlib.Path] = (),
    only: Sequence[int] | None = None,
    **environment: str,
) -> Job:
    """Starts `python -m MODULE` in so many processes of so many CPU devices.

    Args:
        folder: For their files.
        *arguments: Of all.
        processes: How many belong to the job; a single one is told nothing of it.
        devices: Of each.
        module: What they run.
        own: Further arguments of each.
        cwds: Where each runs; all in the repository if there are none.
        only: Those that are started; all if None.
        **environment: Of all.
    """
    clean = {name: value for name, value in os.environ.items() if not _KEPT_OUT.fullmatch(name)}
    common = clean | {
        "PYTHONPATH": str(ROOT),
        "JAX_NUM_CPU_DEVICES": str(devices),
        "DAAJAX_HEARTBEAT_SECONDS": "10",
        **environment,
    }
    if processes > 1:
        common |= {
            "DAAJAX_NUM_PROCESSES": str(processes),
            "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{free_port()}",
        }
    folder.mkdir(parents=True, exist_ok=True)
    started, files = [], []
    for number in range(processes) if only is None else only:
        files.append(folder / f"process-{number}.txt")
        with files[-1].open("wb") as file:
            line = [sys.executable, "-m", module, *arguments, *(own[number] if own else ())]
            started.append(
                subprocess.Popen(
                    line,
                    cwd=cwds[number] if cwds else ROOT,
                    env=common | ({"DAAJAX_PROCESS_ID": str(number)} if processes > 1 else {}),
                    stdout=file,
                    stderr=subprocess.STDOUT,
                )
            )
    return Job(started, files)


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]
