"""Starts a training in several processes on this machine, watches over them, and starts them again where that helps.

launch/local.sh comes here with --processes, --restarts and the like; it has set what must be set before Python starts.
Nothing but the standard library is imported: what trains are the processes.
"""

import dataclasses
import os
import pathlib
import re
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from typing import NoReturn

USAGE = """usage: launch/local.sh [--processes=N] [--devices=M] [--restarts=R] [--smoke] [--dry-run] --config=RECIPE ...
  --processes=N  processes on this machine (default 1), one run: they share mesh, data and workdir
  --devices=M    devices of each: CPU devices (default JAX_NUM_CPU_DEVICES, or 1), or GPUs (default: all, shared out)
  --restarts=R   start again up to R times (default 0) when a process was stopped, stands still or died
  --smoke        no recipe: 3 updates of a tiny random model on every device, whose first loss must be ln 2
  --dry-run      print what would be started
Everything else goes to `python -m daajax.train`: its options are in configs/base.py.
Exit codes: 0 done, 1 a clear error, 42 stopped after saving, 43 no progress (both: start the same line again),
130 stopped from the keyboard, anything else a process that died."""

ROOT = pathlib.Path(__file__).resolve().parents[1]
DONE, ERROR, STOPPED, STUCK, INTERRUPTED = 0, 1, 42, 43, 130
GRACE = float(os.environ.get("GRACE_SECONDS", "30"))  # for the others to end by themselves after one has failed
# Of these a process would learn of a proxy on its way to the others, or of a job that it is not a part of.
STRIPPED = re.compile(r"(?i:\w+_proxy)|(SLURM|TPU)_\w+")


@dataclasses.dataclass
class Options:
    """The launcher's own options; `arguments` go to the trainer."""

    processes: int = 1
    devices: int | None = None
    restarts: int = 0
    smoke: bool = False
    dry_run: bool = False
    arguments: list[str] = dataclasses.field(default_factory=list)


@dataclasses.dataclass
class Start:
    """One process to be: what is run, and the environment beside what this process has."""

    command: list[str]
    changes: dict[str, str]
    removed: list[str]

    def environment(self) -> dict[str, str]:
        """The whole of it."""
        kept = {name: value for name, value in os.environ.items() if name not in self.removed}
        return kept | self.changes

    def __str__(self) -> str:
        words = [*(f"-u {name}" for name in self.removed), *(f"{k}={shlex.quote(v)}" for k, v in self.changes.items())]
        return " ".join([*(["env", *words] if words else []), shlex.join(self.command)])


def fail(message: str) -> NoReturn:
    """Ends with one line on what is wrong."""
    _say(message)
    sys.exit(ERROR)


def _say(message: str) -> None:
    sys.stderr.write(f"launch/local.sh: {message}\n")
    sys.stderr.flush()


def parse(arguments: Sequence[str]) -> Options:
    """Takes the launcher's own options out of a command line."""
    options, words = Options(), iter(arguments)
    for word in words:
        name, equals, value = word.partition("=")
        if name in ("--processes", "--devices", "--restarts"):
            value = value if equals else next(words, "")
            least = 0 if name == "--restarts" else 1
            if not re.fullmatch(r"\d+", value) or int(value) < least:
                fail(f"{name}={value}: a whole number of at least {least} is needed.")
            setattr(options, name.removeprefix("--"), int(value))
        elif word == "--smoke":
            options.smoke = True
        elif word == "--dry-run":
            options.dry_run = True
        else:
            options.arguments.append(word)
    if not options.smoke and not any(re.match(r"--?config(=|$)", word) for word in options.arguments):
        fail("no recipe: --config=configs/dpo_llama.py, or --smoke to try the machine; --help says more.")
    return options


def gpus(environment: Mapping[str, str]) -> list[str]:
    """What CUDA calls the GPUs that a process would see; none where JAX is told to leave them alone."""
    platforms = environment.get("JAX_PLATFORMS", "cuda")
    if not {"cuda", "gpu"} & set(platforms.split(",")):
        return []
    if (chosen := environment.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [name for name in chosen.split(",") if name]
    return [str(i) for i in range(len(list(pathlib.Path("/dev").glob("nvidia[0-9]*"))))]


def starts(options: Options, environment: Mapping[str, str], port: str, workdir: str | None) -> list[Start]:
    """What is to be started: one for each process.

    Args:
        options: The launcher's.
        environment: This process's.
        port: Where process 0 waits for the others.
        workdir: For the trial run, where none is given.
    """
    module = "demo.smoke" if options.smoke else "daajax.train"
    command = [sys.executable, "-m", module, *options.arguments]
    if workdir is not None:
        command.append(f"--workdir={workdir}")
    changes = {"PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [environment.get("PYTHONPATH")])])}
    changes = changes if options.smoke else {}  # only what is installed is on the path of all others
    count, names = options.processes, gpus(environment)
    each = options.devices
    if names:
        each = each or len(names) // count
        if each * count > len(names) or (options.devices is None and len(names) % count):
            fail(f"{len(names)} GPUs for {count} processes of {options.devices or 'as many'}: choose others.")
    elif each is not None:
        changes["JAX_NUM_CPU_DEVICES"] = str(each)
    result = []
    for i in range(count):
        own = dict(changes)
        if names and (count > 1 or options.devices):
            own["CUDA_VISIBLE_DEVICES"] = ",".join(names[i * (each or 1) : (i + 1) * (each or 1)])
        if count > 1:
            own |= {"DAAJAX_NUM_PROCESSES": str(count), "DAAJAX_PROCESS_ID": str(i)}
            own["JAX_COORDINATOR_ADDRESS"] = f"127.0.0.1:{port}"
        removed = sorted(name for name in environment if STRIPPED.fullmatch(name)) if count > 1 else []
        result.append(Start(command, own, removed))
    return result


def free_port() -> str:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


class Signals:
    """What this process is asked to do, passed on to the processes that train."""

    def __init__(self) -> None:
        self.asked: int | None = None
        self.to: list[subprocess.Popen[bytes]] = []
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, self._pass_on)

    def _pass_on(self, number: int, _: object = None) -> None:
        self.asked = number
        for process in self.to:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM if number == signal.SIGHUP else number)

    def again(self) -> None:
        """Passes on what came while processes were started: some of them were not there yet."""
        if self.asked is not None:
            self._pass_on(self.asked)


def run(planned: Sequence[Start], signals: Signals) -> int:
    """Runs processes to their end; returns the exit code of all.

    An end with 0 or 42 leaves the others the time that they need; any other one gives them `GRACE` seconds.
    """
    running: list[subprocess.Popen[bytes]] = []
    labels: list[threading.Thread] = []
    signals.to = running
    for i, start in enumerate(planned):
        # In groups of their own: Ctrl-C reaches this process alone, which passes it on once.
        process = subprocess.Popen(
            start.command,
            env=start.environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE if i else None,
            stderr=subprocess.STDOUT if i else None,
            process_group=0,
        )
        running.append(process)
        if i:
            labels.append(threading.Thread(target=_label, args=(process, i), daemon=True))
            labels[-1].start()
    signals.again()
    codes: list[int] = []  # in the order of their ends, those of processes killed here left out
    ended: set[int] = set()
    deadline = None
    while len(ended) < len(running):
        time.sleep(0.1)
        for i, process in enumerate(running):
            if i not in ended and (code := process.poll()) is not None:
                ended.add(i)
                codes.append(code if code >= 0 else 128 - code)
                if codes[-1] in (DONE, STOPPED):
                    continue
                first = deadline is None and len(ended) < len(running)
                _say(f"process {i} ended with exit code {codes[-1]}{f'; the others have {GRACE:g} s' * first}")
                if first:
                    deadline = time.monotonic() + GRACE
        if deadline is not None and time.monotonic() > deadline:
            for i, process in enumerate(running):
                if i not in ended:
                    os.killpg(process.pid, signal.SIGKILL)  # with what it has started itself
                    process.wait()
                    ended.add(i)
    for label in labels:
        label.join(2)  # their last lines are the errors
    return of_all(codes)


def _label(process: subprocess.Popen[bytes], i: int) -> None:
    """Prints what a process says with its number in front of every line."""
    for line in process.stdout or ():
        sys.stdout.buffer.write(f"[{i}] ".encode() + line)
        sys.stdout.flush()


def of_all(codes: Sequence[int]) -> int:
    """One exit code for those of all, in the order of their ends: an error, a death, a stand-still, a stop, done."""
    died = [code for code in codes if code not in (DONE, ERROR, STOPPED, STUCK, INTERRUPTED)]
    for code in (ERROR, INTERRUPTED, *died, STUCK, STOPPED):
        if code in codes:
            return code
    return DONE


def main(arguments: Sequence[str]) -> int:
    """The launcher; returns its exit code."""
    if {"--help", "-h"} & set(arguments):
        sys.stdout.write(USAGE + "\n")
        return DONE
    options = parse(arguments)
    own_folder = options.smoke and not any(word.startswith("--workdir") for word in options.arguments)
    if options.dry_run:
        planned = starts(options, os.environ, "PORT", "WORKDIR" if own_folder else None)
        sys.stdout.write("".join(f"{start}\n" for start in planned))
        return DONE
    signals = Signals()
    for left in range(options.restarts, -1, -1):
        with tempfile.TemporaryDirectory(prefix="daajax-smoke-") as folder:
            planned = starts(options, os.environ, free_port(), folder if own_folder else None)
            if options.processes > 1 and planned[0].removed:
                _say(f"the processes do without {', '.join(planned[0].removed)}: they are for each other")
            code = run(planned, signals)
        if code in (DONE, ERROR, INTERRUPTED) or signals.asked is not None or not left:
            break
        _say(f"exit code {code}: starting again, {left - 1} more times at most")
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
