"""Whether what was compiled will fit, asked before it runs: a machine out of memory ends a process without a word."""

import pathlib
import resource
import sys
from collections.abc import Callable
from typing import Any

import jax

from daajax.errors import UserError

REMEDIES = (
    "raise micro_batches, set remat=full, lower max_length or batch_size, or spread the model over more devices with "
    "mesh.fsdp"
)
_GIB = 2**30


def check(compiled: Any, what: str, advice: Callable[[bool], str] = lambda of_state: REMEDIES) -> str:
    """Compares what a compiled program needs, its arguments included, with what is free before they are there.

    Args:
        compiled: A `jax.stages.Compiled`.
        what: Name of the program, for messages.
        advice: What helps, by whether its arguments need more than what it works in.

    Returns:
        A line that says both; empty where the platform tells neither.

    Raises:
        UserError: If it does not fit.
    """
    analysis, free = compiled.memory_analysis(), available()
    if analysis is None or free is None:
        return ""
    devices = 1 if jax.default_backend() != "cpu" else len(jax.local_devices())  # those of a CPU share its memory
    outputs = analysis.output_size_in_bytes - analysis.alias_size_in_bytes
    needed = devices * (analysis.argument_size_in_bytes + analysis.temp_size_in_bytes + outputs)
    line = f"{what} needs {needed / _GIB:.2f} GiB of memory, {free / _GIB:.2f} GiB are free"
    if needed > free:
        raise UserError(f"{line}; {advice(analysis.argument_size_in_bytes > analysis.temp_size_in_bytes)}.")
    return line


def available() -> int | None:
    """Bytes that are free: of a device's memory, or of the machine's for a CPU; None where it does not say."""
    device = jax.local_devices()[0]
    if device.platform != "cpu":
        stats = device.memory_stats() or {}
        if "bytes_limit" not in stats:
            return None
        return stats["bytes_limit"] - stats["bytes_in_use"]
    amounts = [amount for amount in (_of_machine(), _of_group()) if amount is not None]
    return min(amounts, default=None)


def peak() -> dict[str, int]:
    """The most bytes that were in use until now, by the name of a metric.

    `peak_memory_bytes` is of a device's own memory, the fullest of this process's. The devices of a CPU have none:
    `peak_process_bytes` is what the whole process had in the machine's at once, reading and compiling included.
    """
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    known = [found["peak_bytes_in_use"] for found in stats if "peak_bytes_in_use" in found]
    if known:
        return {"peak_memory_bytes": max(known)}
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"peak_process_bytes": most * (1 if sys.platform == "darwin" else 1024)}


def _of_machine() -> int | None:
    for line in _lines("/proc/meminfo"):
        name, _, amount = line.partition(":")
        if name == "MemAvailable":
            return int(amount.split()[0]) * 1024
    return None


def _of_group() -> int | None:
    """What a container is allowed, less what it uses beyond caches that can be dropped."""
    limit = next(iter(_lines("/sys/fs/cgroup/memory.max")), "max")
    used = next(iter(_lines("/sys/fs/cgroup/memory.current")), None)
    if limit == "max" or used is None:
        return None
    caches = sum(
        int(line.split()[1]) for line in _lines("/sys/fs/cgroup/memory.stat") if line.startswith("inactive_file ")
    )
    return int(limit) - int(used) + caches


def _lines(path: str) -> list[str]:
    try:
        return pathlib.Path(path).read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
