"""What a process is among those of a job, as its environment says."""

import dataclasses
import re
from collections.abc import Mapping

from daajax.errors import UserError

SLURM = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")
_OWN_GPUS = ("SLURM_GPUS_PER_TASK", "SLURM_TRES_PER_TASK", "SLURM_NTASKS_PER_GPU")
_SLURM_PORTS = 4096  # the last ones there are, of which a job takes one by its number


@dataclasses.dataclass(frozen=True)
class Place:
    """One process among those of a job.

    Attributes:
        number: Which, from 0.
        count: How many there are.
        coordinator: Host and port of process 0.
        devices: Numbers of the machine's devices that it is to use; None: all.
    """

    number: int
    count: int
    coordinator: str
    devices: tuple[int, ...] | None = None


def place_of(environment: Mapping[str, str]) -> Place | None:
    """What an environment says a process is; None if it says nothing.

    Raises:
        UserError: If it says half of it, or what cannot be.
    """
    named = [name for name in ("DAAJAX_NUM_PROCESSES", "DAAJAX_PROCESS_ID") if name in environment]
    if named:
        return _named_place(environment)
    if all(name in environment for name in SLURM):
        return _slurm_place(environment)
    return None


def _named_place(environment: Mapping[str, str]) -> Place:
    wanted = "DAAJAX_NUM_PROCESSES, DAAJAX_PROCESS_ID and JAX_COORDINATOR_ADDRESS go together"
    count = number_in("DAAJAX_NUM_PROCESSES", environment, wanted)
    indexed = "DAAJAX_PROCESS_ID" not in environment and "JOB_COMPLETION_INDEX" in environment
    number = number_in("JOB_COMPLETION_INDEX" if indexed else "DAAJAX_PROCESS_ID", environment, wanted)
    if not 0 <= number < count:
        raise UserError(f"DAAJAX_PROCESS_ID={number} but DAAJAX_NUM_PROCESSES={count}; ids go from 0 to {count - 1}.")
    coordinator = environment.get("JAX_COORDINATOR_ADDRESS", "")
    if not re.fullmatch(r".+:\d+", coordinator):
        raise UserError(
            f"JAX_COORDINATOR_ADDRESS={coordinator!r} is not host:port of process 0, which {count} processes need."
        )
    ids = environment.get("JAX_LOCAL_DEVICE_IDS", "")
    if not re.fullmatch(r"(\d+(,\d+)*)?", ids):
        raise UserError(f"JAX_LOCAL_DEVICE_IDS={ids!r} is not a list of numbers such as 0,1.")
    return Place(number, count, coordinator, tuple(map(int, ids.split(","))) if ids else None)


def number_in(name: str, environment: Mapping[str, str], wanted: str) -> int:
    """A variable's number; `wanted` says what is needed, where it has none.

    Raises:
        UserError: If it is not set, or no number.
    """
    text = environment.get(name)
    if text is None or not text.isdecimal():
        raise UserError(f"{name} is {'not set' if text is None else repr(text)}; {wanted}.")
    return int(text)


def _slurm_place(environment: Mapping[str, str]) -> Place:
    """The place of a task of a step; the first node coordinates, at a port that follows from the job's number."""
    job, nodes, count, number, local = (environment[name] for name in SLURM)
    # A host, or the first of a range in brackets; behind either nothing or further hosts.
    if (found := re.match(r"([^,\[]+)(?:\[(\w+)[^\]]*\])?(?:,|$)", nodes)) is None:
        raise UserError(
            f"SLURM_STEP_NODELIST={nodes!r}: the first node cannot be told; set JAX_COORDINATOR_ADDRESS, "
            "DAAJAX_NUM_PROCESSES and DAAJAX_PROCESS_ID."
        )
    first = found[1] + (found[2] or "")
    port = 65536 - _SLURM_PORTS + int(job) % _SLURM_PORTS
    per_node = max(int(count) // max(int(environment.get("SLURM_NNODES", count)), 1), 1)
    visible = [gpu for gpu in environment.get("CUDA_VISIBLE_DEVICES", "").split(",") if gpu]
    are_own = any(name in environment for name in _OWN_GPUS)
    devices = None
    if per_node > 1 and len(visible) > 1 and not are_own:  # the tasks of a node see the same ones and share them
        share = len(visible) // per_node
        if not share or len(visible) % per_node:
            raise UserError(
                f"{per_node} Slurm tasks a node do not share {len(visible)} GPUs evenly; set --ntasks-per-node."
            )
        devices = tuple(range(int(local) * share, (int(local) + 1) * share))
    return Place(int(number), int(count), f"{first}:{port}", devices)
