"""A run's folder: what may begin or go on there, who is at work in it, and whether it is finished."""

import contextlib
import datetime
import fcntl
import json
import math
import os
import pathlib
import socket
import time
from collections.abc import Iterator, Mapping
from typing import IO, Any, Literal

from daajax import bucket, lease, output, processes
from daajax.config import Config, restored
from daajax.console import say
from daajax.errors import UserError

# What a run may go on with changed: how long it is, what it reports and keeps, and how the same numbers are computed.
# Whatever is not listed decides what is learned from what. To free another option, add it or the dict it lies in.
MAY_CHANGE = (
    "attention",
    "check_first_loss",
    "checkpoint",
    "compiler_options",
    "data.cache_dir",
    "data.max_bad_rows",
    "epochs",
    "eval",
    "eval_data",
    "head",
    "log",
    "mesh",
    "micro_batches",
    "optimizer.offload",
    "packing",
    "peak_flops",
    "profile",
    "reference.cache_dir",
    "reference.live",
    "remat",
    "resume",
    "steps",
    "watchdog_minutes",
)
_LENGTH = ("epochs", "steps")  # of a run; a finished one is not finished if they change
_CONFIG, _METRICS, _FINISHED, LOCK = "config.json", "metrics.jsonl", "finished", ".lock"
_REVISIONS = "revisions.json"
_NAMED = 3  # differences
_SEEN_SECONDS = 10  # within which all hosts see a file

State = Literal["new", "unfinished", "finished"]


@contextlib.contextmanager
def claimed(where: bucket.Path, config: Config) -> Iterator[State]:
    """Keeps other runs out of a folder while the block lasts; a new one that stays empty is removed again.

    Args:
        where: The folder.
        config: Of the run that is to begin or go on there.

    Yields:
        What the folder is to the run; a finished one is not claimed, and not written to.

    Raises:
        UserError: As `examine`, or if another run is at work there, or not all processes have that folder.
    """
    with contextlib.ExitStack() as stack:
        # Of several processes, the first one holds the folder for all of them.
        found, token = processes.from_first(lambda: stack.enter_context(_claimed(where, config)))
        if processes.count() > 1 and found != "finished":
            processes.check_everywhere(
                _sees(where, token),
                lambda others: (
                    f"--workdir={where} is not the same folder in {', '.join(others[:_NAMED])}"
                    f"{f' and {len(others) - _NAMED} more' if len(others) > _NAMED else ''}; name one on a disk that "
                    "all hosts share."
                ),
            )
        yield found


def _sees(where: bucket.Path, token: str) -> bool:
    """Whether the lock in a folder says this; another host may see only after a while what one has written."""
    if isinstance(where, bucket.BucketPath):  # the bucket says the same to all at once
        with contextlib.suppress(FileNotFoundError):
            return token in bucket.read(where / LOCK).value.decode(errors="replace")
        return False
    for _ in range(_SEEN_SECONDS):
        with contextlib.suppress(OSError):
            os.listdir(where.parent)  # which makes a network's file system look
            if token in (where / LOCK).read_text(encoding="utf-8", errors="replace"):
                return True
        time.sleep(1)
    return False


@contextlib.contextmanager
def _claimed(where: bucket.Path, config: Config) -> Iterator[tuple[State, str]]:
    """See `claimed`; with what the folder is, words that its lock holds."""
    if examine(where, config) == "finished":
        for _, line in _changes(where, config):
            say(f"config: {line}; this does nothing, the run is finished: see daajax.evaluate and daajax.export")
        yield "finished", ""
        return
    try:
        where.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--workdir={where} cannot be made ({error.strerror}); name another folder.") from None
    with locked(where) as holder:
        found = examine(where, config)  # again: until now another run may have changed it
        for name, line in _changes(where, config) if found == "unfinished" else ():
            say(f"config: {line}{'' if may_change(name) else ' (forced)'}")
        try:
            yield found, holder
        finally:
            if isinstance(where, pathlib.Path) and [path.name for path in where.iterdir()] == [LOCK]:
                output.remove_folder(where)


def examine(where: bucket.Path, config: Config) -> State:
    """What a folder is to the run of a config.

    Raises:
        UserError: If it holds something else, or nothing can be written there.
    """
    if not where.exists() or (where.is_dir() and not any(path.name != LOCK for path in where.iterdir())):
        if isinstance(where, pathlib.Path):  # that a bucket takes nothing shows when its lock is written
            above = next(parent for parent in (where, *where.resolve().parents) if parent.exists())
            if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
                raise UserError(f"--workdir={where}: {above} cannot be written; name another folder.")
        return "new"
    changed = _changes(where, config)
    if config.resume == "never":
        raise UserError(f"--workdir={where} holds a run, and resume='never' goes on with none; name another folder.")
    refused = [line for name, line in changed if not may_change(name)]
    if refused and config.resume != "force":
        further = f" and {len(refused) - _NAMED} more" if len(refused) > _NAMED else ""
        raise UserError(
            f"--workdir={where} holds a run of another config: {'; '.join(refused[:_NAMED])}{further}; "
            "name another folder, or go on all the same with --config.resume=force."
        )
    ended = (where / _FINISHED).is_file() and (where / "model").is_dir()
    if ended and not refused and not any(_is_among(name, _LENGTH) for name, _ in changed):
        return "finished"
    if isinstance(where, pathlib.Path) and not os.access(where, os.W_OK | os.X_OK):
        raise UserError(f"--workdir={where} cannot be written; make it writable, or name another folder.")
    return "unfinished"


def _changes(where: bucket.Path, config: Config) -> list[tuple[str, str]]:
    """How a config differs from that of the folder's run; an option that was not there then had today's default."""
    before = restored(_stored(where))
    return list(differences(json.loads(_text(before)), json.loads(_text(config))))


def differences(before: Any, now: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """What differs between two configs read from JSON: an option, and a line such as `loss.beta was 0.1, is 0.2`.

    Args:
        before: A config or a part of it.
        now: The same of the other one.
        name: Of the part.
    """
    if isinstance(before, dict) and isinstance(now, dict):
        for key in sorted(before.keys() | now.keys()):
            yield from differences(before.get(key), now.get(key), f"{name}.{key}" if name else key)
    elif before != now:
        yield name, f"{name} was {json.dumps(before)}, is {json.dumps(now)}"


def begin(where: bucket.Path, config: Config, *, updates: int, revisions: Mapping[str, str] | None = None) -> None:
    """Makes a claimed folder this run's.

    What a run that was interrupted later reported of updates that are now done again is removed.

    Args:
        where: The folder.
        config: Of the run; it becomes `config.json`.
        updates: Done before; what is reported of them stays.
        revisions: Of the addresses in it; see `read_revisions`.

    Raises:
        UserError: If the folder cannot be written.
    """
    try:
        (where / _FINISHED).unlink(missing_ok=True)
        if revisions:
            output.write_text(where / _REVISIONS, json.dumps(dict(revisions), indent=2, sort_keys=True) + "\n")
        else:
            (where / _REVISIONS).unlink(missing_ok=True)
        output.write_text(where / _CONFIG, _text(config))
        if not updates:
            output.remove_folder(where / "tensorboard")
        kept = [line for line in _lines(where / _METRICS) if _step_of(line) <= updates]
        output.write_text(where / _METRICS, "".join(f"{line}\n" for line in kept))
    except OSError as error:
        raise UserError(f"--workdir={where} cannot be written ({error.strerror}); name another folder.") from None


def finish(where: bucket.Path, updates: int) -> None:
    """Marks a run as finished after so many updates."""
    output.write_text(where / _FINISHED, json.dumps({"updates": updates}) + "\n")


def read_config(where: bucket.Path) -> dict[str, Any]:
    """The config that a run was begun or last gone on with.

    Raises:
        UserError: If the folder holds no run.
    """
    if not where.is_dir():
        raise UserError(f"--workdir={where} is not a folder; name that of a run.")
    return _stored(where)


def read_revisions(where: bucket.Path) -> dict[str, str]:
    """Of each address of a model, such as `hf://organization/name`, the revision that the folder's run began with.

    Raises:
        UserError: If the file is damaged.
    """
    file = where / _REVISIONS
    if not file.is_file():
        return {}
    try:
        return {str(address): str(revision) for address, revision in json.loads(file.read_bytes()).items()}
    except (ValueError, AttributeError):
        raise UserError(f"{file} is damaged; remove it to go on with what the addresses of models mean now.") from None


@contextlib.contextmanager
def locked(where: bucket.Path) -> Iterator[str]:
    """Holds a folder's lock, and gives what it says; the system lets go of it when the process ends in any way."""
    now = datetime.datetime.now().isoformat(" ", "seconds")
    holder = f"process {os.getpid()} on {socket.gethostname()} since {now}"
    if isinstance(where, bucket.BucketPath):
        with lease.held(where / LOCK, holder):
            yield holder
        return
    with _opened(where / LOCK) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            other = file.read().strip()
            raise UserError(
                f"--workdir={where}: another run is at work there{other and f' ({other})'}; "
                "wait for it, or name another folder."
            ) from None
        file.truncate(0)
        file.write(f"{holder}\n")
        file.flush()
        os.fsync(file.fileno())  # for other hosts to see
        yield holder


def _opened(lock: pathlib.Path) -> IO[str]:
    try:
        return lock.open("a+", encoding="utf-8", errors="replace")
    except OSError as error:
        raise UserError(
            f"{lock} cannot be written ({error.strerror}); make it writable, or name another folder."
        ) from None


def may_change(name: str) -> bool:
    """Whether a run may go on with another value of an option."""
    return _is_among(name, MAY_CHANGE)


def _is_among(name: str, options: tuple[str, ...]) -> bool:
    """Whether an option is one of these or lies in one of them."""
    return any(name == option or name.startswith(f"{option}.") for option in options)


def _stored(where: bucket.Path) -> dict[str, Any]:
    """The config of the run that a folder holds."""
    file = where / _CONFIG
    if not file.is_file():
        raise UserError(f"--workdir={where} exists and is not a run's folder; name another one.")
    try:
        stored = dict(json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, TypeError):
        raise UserError(f"{file} is damaged; name another --workdir, or remove the folder.") from None
    if not isinstance(stored.get("model"), dict):  # a model's directory has a config.json as well
        raise UserError(f"--workdir={where} is not a run's folder, though it holds a config.json; name another one.")
    return stored


def _lines(path: bucket.Path) -> list[str]:
    """A file's whole lines; none if it is not there. A last line without an end was cut off."""
    return path.read_bytes().decode(errors="replace").split("\n")[:-1] if path.is_file() else []


def _step_of(line: str) -> float:
    """The update that a line of metrics is of; none ever for a line that is damaged."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf


def _text(config: Config) -> str:
    return config.to_json_best_effort(indent=2, sort_keys=True) + "\n"
