"""The processes of a job: how one finds the others, what they agree on, and that the platform wants them to stop.

A job is one process or many, each with devices of its own, that run the same command line. `join` makes them one
program; afterwards every function here is called by all of them in the same order. The first process alone speaks and
writes what there is one of.

What a process is, `places` reads from its environment, the first of these that is there:

1. `DAAJAX_NUM_PROCESSES`, `DAAJAX_PROCESS_ID` (or `JOB_COMPLETION_INDEX`, of an indexed job of Kubernetes) and
   `JAX_COORDINATOR_ADDRESS`, the host and port of process 0; `JAX_LOCAL_DEVICE_IDS` where it is not to use all devices.
2. A step of Slurm, as `srun` starts it. With one task a node it uses all GPUs of the node, with more its share of them.
3. A Cloud TPU, whose workers JAX finds.
4. Nothing: one process.

`DAAJAX_START_SECONDS` bounds the wait for the others at the start, `DAAJAX_HEARTBEAT_SECONDS` the silence after which
one is taken for dead.
"""

import contextlib
import importlib.util
import json
import os
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, NoReturn, TypeVar

import jax
import numpy as np
from jax._src import distributed
from jax.experimental import multihost_utils

from daajax import console, places
from daajax.console import say
from daajax.errors import OutageError, UserError, one_line

# Exit codes after which the same command goes on: the platform takes the machine away and what was done is saved; there
# is no progress any more, or what does not answer may do so later.
STOPPED, STUCK = 42, 43
START_SECONDS, HEARTBEAT_SECONDS = 300, 100
_FAILURE, _TOGETHER_SECONDS, _STUCK_SECONDS = "daajax/failure", 3, 30
_LOST = re.compile("UNAVAILABLE|DEADLINE_EXCEEDED|ABORTED|[Gg]loo|NCCL|[Cc]oordination service")
_BROADCAST = 1 << 24  # numbers that are sent at a time
_PROXIES = ("http_proxy", "https_proxy", "all_proxy", "grpc_proxy")

Made = TypeVar("Made")
_has_joined = False


class StoppedError(Exception):
    """The platform wants the processes to stop, and all that was done is saved; its text says what that is."""


def join(*, stops: bool) -> None:
    """Finds the other processes of the job and makes all of them one program; of a single one, a program of its own.

    Call it before anything that touches a device.

    Args:
        stops: Whether what follows asks `is_stopping`; if not, SIGTERM ends a process as it does any other.

    Raises:
        UserError: If the environment is at fault, or the others are not there in time.
    """
    global _has_joined
    place, notices = places.place_of(os.environ), []
    if place is None:
        if partial := [name for name in places.SLURM if name in os.environ]:
            notices.append(f"{partial[0]} is set but this is no step that srun started: one process, on its own")
        if importlib.util.find_spec("libtpu") and os.environ.get("JAX_PLATFORMS", "tpu") in ("", "tpu"):
            _join_on_tpu()
    elif place.count > 1 and (proxies := [name for name in os.environ if name.lower() in _PROXIES]):
        notices.append(f"{proxies[0]} is set: if the processes do not find each other, unset it")
    if not jax.distributed.is_initialized():
        _initialize(place or places.Place(0, 1, f"127.0.0.1:{_free_port()}"))
    _has_joined = True
    if not stops:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if not is_first():
        console.mute()
    for line in notices:
        say(f"processes: {line}")
    if count() > 1:
        hosts = len(set(gathered(socket.gethostname())))
        say(f"processes: {count()} on {hosts} {'host' if hosts == 1 else 'hosts'}")


def _join_on_tpu() -> None:
    """Lets JAX find the workers of a Cloud TPU, where this is one."""
    try:
        _meet("this worker of a TPU did not meet the others")
    except ValueError as error:
        if "coordinator_address" not in str(error):  # that is what JAX says where it finds no cluster
            raise UserError(f"the workers of this TPU do not find each other: {one_line(error)}") from None


def _initialize(place: places.Place) -> None:
    try:
        _meet(
            f"process {place.number} of {place.count} did not meet the others at {place.coordinator}",
            coordinator_address=place.coordinator,
            num_processes=place.count,
            process_id=place.number,
            local_device_ids=place.devices,
            cluster_detection_method="deactivate",
            coordinator_bind_address=place.coordinator if place.count == 1 else None,
        )
    except ValueError as error:
        raise UserError(f"{place} cannot be: {one_line(error)}") from None


def _meet(words: str, **options: Any) -> None:
    """Calls `jax.distributed.initialize`; where the others are not there in time, the process ends with these words."""
    seconds = {"DAAJAX_START_SECONDS": START_SECONDS, "DAAJAX_HEARTBEAT_SECONDS": HEARTBEAT_SECONDS}
    for name in seconds:
        if name in os.environ:
            seconds[name] = max(places.number_in(name, os.environ, "it is a number of seconds"), 1)
    start, heartbeat = seconds.values()
    late = threading.Timer(start, _give_up, (words, start))  # JAX would abort the process with a page of C++
    late.daemon = True
    late.start()
    try:
        jax.distributed.initialize(
            **options,
            initialization_timeout=start + 60,
            heartbeat_timeout_seconds=heartbeat,
            shutdown_timeout_seconds=heartbeat,
        )
    except RuntimeError as error:
        raise UserError(f"{words} ({one_line(error)}); see that nothing else listens there.") from None
    finally:
        late.cancel()


def _give_up(words: str, seconds: int) -> None:
    sys.stderr.write(
        f"error: {words} within {seconds} s; see that all are started and that they can reach each other, or raise "
        "DAAJAX_START_SECONDS.\n"
    )
    leave(1)


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def count() -> int:
    """How many processes there are."""
    return jax.process_count()


def is_first() -> bool:
    """Whether this one speaks and writes for all."""
    return jax.process_index() == 0


def is_turn(number: int) -> bool:
    """Whether a piece of work, by its number, is this process's."""
    return number % count() == jax.process_index()


def leave_together(code: int) -> NoReturn:
    """Ends all processes at once; the first one, whose end the others would take for a failure, last."""
    gathered(None)
    if is_first() and count() > 1:
        time.sleep(_TOGETHER_SECONDS)
    leave(code)


def leave_stuck() -> NoReturn:
    """Ends a process that waits in vain; the others are given the time to find the same, and the first ends last."""
    if are_several():
        client: Any = distributed.global_state.client
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            client.wait_at_barrier(f"{_FAILURE}/stuck", _STUCK_SECONDS * 1000)
        if is_first():
            time.sleep(_TOGETHER_SECONDS)
    leave(STUCK)


def are_several() -> bool:
    """Whether there are others; before `join` nobody knows of any."""
    return _has_joined and count() > 1


def says(line: str) -> bool:
    """Whether this process is to say what went wrong in it: of several that fail alike within seconds, the first is."""
    if not are_several():
        return True
    client: Any = distributed.global_state.client  # what JAX itself tells processes by; it has no public name
    is_said = False
    with contextlib.suppress(jax.errors.JaxRuntimeError):  # they do not all fail, or some are gone
        if is_first():
            client.key_value_set(_FAILURE, line)
        else:
            is_said = client.blocking_key_value_get(_FAILURE, _TOGETHER_SECONDS * 1000) == line
        client.wait_at_barrier(_FAILURE, _TOGETHER_SECONDS * 1000)
    return not is_said


def is_lost(error: Exception) -> bool:
    """Whether an error says that another process is gone, so that a computation of all of them cannot end."""
    kinds = (RuntimeError, ValueError)  # JAX raises either, by where it notices
    return are_several() and isinstance(error, kinds) and bool(_LOST.search(str(error)))


def leave(code: int) -> NoReturn:
    """Ends this process at once.

    An orderly end would wait for the others, and they may be in a computation that waits for this one.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def gathered(value: Any) -> list[Any]:
    """The value of every process, which JSON can hold, in their order."""
    if count() == 1:
        return [value]
    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.int32(len(text)))
    padded = np.zeros(int(sizes.max()), np.uint8)
    padded[: len(text)] = text
    rows = np.asarray(multihost_utils.process_allgather(padded))
    return [json.loads(row[:size].tobytes()) for row, size in zip(rows, sizes.tolist(), strict=True)]


def from_first(make: Callable[[], Made]) -> Made:
    """What `make` returns in the first process, which JSON can hold; if it raises, the others do so as well."""
    if count() == 1:
        return make()
    outcome: dict[str, Any] = {}
    if is_first():
        try:
            outcome = {"made": make()}
        except Exception as error:  # whatever it is, the others wait for it
            _from_first({"error": _told(error)})
            raise
    outcome = _from_first(outcome)
    if "error" in outcome:
        raise _heard(outcome["error"])
    return outcome["made"]


def raise_together(error: UserError | None) -> None:
    """Raises in every process what one of them has met, if any has; of several, the first one's.

    Raises:
        UserError: As it was met, an OutageError where it is one.
    """
    if errors := [told for told in gathered(None if error is None else _told(error)) if told is not None]:
        raise _heard(errors[0])


def _told(error: Exception) -> dict[str, Any]:
    """An error as JSON."""
    text = str(error) if isinstance(error, UserError) else one_line(error)
    return {"text": text, "is_outage": isinstance(error, OutageError)}


def _heard(told: dict[str, Any]) -> UserError:
    """The error of another process, from JSON."""
    return (OutageError if told["is_outage"] else UserError)(told["text"])


def _from_first(value: Any) -> Any:
    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(text))))
    padded = np.zeros(size, np.uint8)
    padded[: len(text)] = text[:size]
    return json.loads(np.asarray(multihost_utils.broadcast_one_to_all(padded)).tobytes())


def array_from_first(values: np.ndarray | None, size: int) -> np.ndarray:
    """A float32 array [size] of the first process; the others have None of it."""
    if count() == 1 and values is not None:
        return values
    whole = np.zeros(size, np.float32) if values is None else values
    parts = range(0, size, _BROADCAST)
    return np.concatenate(
        [np.zeros(0, np.float32)]
        + [np.asarray(multihost_utils.broadcast_one_to_all(whole[at : at + _BROADCAST])) for at in parts]
    )


def first_alone(act: Callable[[], object]) -> None:
    """What there is one of: done by the first process, while the others wait."""
    from_first(lambda: act() and None)


def by_first(make: Callable[[], Made], others: Callable[[], Made]) -> Made:
    """What `make` returns in the first process, and then what `others` returns in the others."""
    if count() == 1:
        return make()
    made: list[Made] = []
    first_alone(lambda: made.append(make()))
    return made[0] if is_first() else others()


def after_first(make: Callable[[], Made]) -> Made:
    """What `make` returns in each process; the first goes ahead, so that the others find what it keeps in a cache."""
    return by_first(make, make)


def check_same(value: str, what: str) -> None:
    """Refuses to go on with processes that do not have the same.

    Args:
        value: Of this process.
        what: What it is of, for the message, in the plural.

    Raises:
        UserError: If another one has another value.
    """
    values = gathered(value)
    if others := [number for number, other in enumerate(values) if other != values[0]]:
        raise UserError(
            f"{what} differ: process {others[0]} has others than process 0; give all the same command line and files."
        )


def check_everywhere(holds: bool, words: Callable[[Sequence[str]], str]) -> None:
    """Refuses to go on where something does not hold in some process.

    Args:
        holds: Whether it does in this one.
        words: From the processes in which it does not, each by number and host, to what there is to say.

    Raises:
        UserError: If there are any.
    """
    found = gathered(None if holds else socket.gethostname())
    if lacking := [f"process {number} on {host}" for number, host in enumerate(found) if host is not None]:
        raise UserError(words(lacking))


_polls = 0


def is_stopping() -> bool:
    """Whether the platform wants the processes to stop: SIGTERM to any of them says so, and all hear it in one call."""
    global _polls
    _polls += 1
    return multihost_utils.reached_preemption_sync_point(_polls)


def stop_if_asked(words: str) -> None:
    """Ends what is under way if the platform wants that; `words` say what is saved.

    Raises:
        StoppedError: If so.
    """
    if is_stopping():
        raise StoppedError(words)
