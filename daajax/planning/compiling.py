"""Programs compiled for machines that are not there, and what came of it, kept in a folder.

What is kept is found by a digest of the program's own text, the machines, what the compiler was told and its version:
whatever determines it. A program that does not fit is a result like any other.
"""

import dataclasses
import hashlib
import json
import math
import os
import pathlib
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from daajax import output
from daajax.errors import UserError, one_line
from daajax.planning.collectives import Collective, collectives_of
from daajax.planning.topologies import Topology
from daajax.shortage import EXHAUSTED, Buffer, listed_in, said_by_xla

CACHE = "~/.cache/daajax/plans"
_FORMAT = 1  # of what is kept; another one is compiled anew


@dataclasses.dataclass(frozen=True)
class Sent:
    """A collective operation of a program, without its groups: see `daajax.planning.collectives.Collective`.

    Attributes:
        kind: As there, like the next ones.
        dtype: Likewise.
        shape: Likewise.
        times: Likewise.
        in_loop: Likewise.
        is_counted: Likewise.
        group_size: Likewise.
        received: Bytes that a device gets from the others in one run.
        on_host: Most devices of a group that one host has.
    """

    kind: str
    dtype: str
    shape: tuple[int, ...]
    times: int
    in_loop: bool
    is_counted: bool
    group_size: int
    received: float
    on_host: int


@dataclasses.dataclass(frozen=True)
class Result:
    """What came of compiling a program; bytes of one device.

    Attributes:
        arguments: What it is given.
        on_host: Of that, what lies in the host's memory.
        temporaries: What it works in when it needs most.
        outputs: What it makes and takes no argument's place.
        seconds: That it took to compile.
        refused: Why the compiler refuses it: what it says of memory; empty if it does not.
        buffers: The largest ones, where it refuses.
        sent: What devices send each other.
        unread: Why that is not known; empty if it is.
        program: Digest of the program and all that its compilation depends on.
    """

    arguments: int = 0
    on_host: int = 0
    temporaries: int = 0
    outputs: int = 0
    seconds: float = 0.0
    refused: str = ""
    buffers: tuple[Buffer, ...] = ()
    sent: tuple[Sent, ...] = ()
    unread: str = ""
    program: str = ""

    @property
    def peak(self) -> int:
        """Bytes that the program needs."""
        return self.arguments + self.temporaries + self.outputs


class Cache:
    """Results in a folder, one file each.

    Args:
        folder: Which; it is made for its owner alone. None: nothing is kept.

    Raises:
        UserError: If it cannot be made.
    """

    def __init__(self, folder: str | None):
        self.folder = None if folder is None else pathlib.Path(folder).expanduser()
        if self.folder is not None:
            try:
                self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            except OSError as error:
                raise UserError(f"--cache={folder} cannot be made ({error.strerror}); name another folder.") from None

    def get(self, digest: str) -> Result | None:
        """What is kept under a digest; None if nothing is, or it cannot be read."""
        if self.folder is None:
            return None
        try:
            return from_json((self.folder / f"{digest}.json").read_text(encoding="utf-8"))
        except (OSError, ValueError, TypeError, KeyError):
            return None

    def put(self, result: Result) -> None:
        """Keeps a result."""
        if self.folder is not None:
            output.write_text(self.folder / f"{result.program}.json", to_json(result))


def to_json(result: Result) -> str:
    """A result as text."""
    return json.dumps({"format": _FORMAT, **dataclasses.asdict(result)}) + "\n"


def from_json(text: str) -> Result:
    """The result that a text is.

    Raises:
        ValueError: If it is none, or of another format.
    """
    values = json.loads(text)
    if values.pop("format", None) != _FORMAT:
        raise ValueError("another format")
    values["buffers"] = tuple(Buffer(*buffer) for buffer in values["buffers"])
    values["sent"] = tuple(Sent(**{**sent, "shape": tuple(sent["shape"])}) for sent in values["sent"])
    return Result(**values)


def digest_of(text: str, topology: Topology) -> str:
    """Of all that the compilation of a program depends on.

    Args:
        text: The program, as `jax.stages.Lowered.as_text` has it, with shardings and what is donated.
        topology: The machines.
    """
    versions = [jax.__version__, topology.compiler, topology.name, str(_FORMAT)]
    told = sorted(map(str, topology.compiler_options.items()))
    told += [f"{name}={os.environ.get(name, '')}" for name in ("XLA_FLAGS", "LIBTPU_INIT_ARGS")]
    return hashlib.sha256("\0".join([*versions, *told, text]).encode()).hexdigest()[:32]


def compile_for(lowered: Any, topology: Topology, cache: Cache, options: Mapping[str, Any] | None = None) -> Result:
    """What comes of compiling a program for machines that need not be there.

    Args:
        lowered: The program, a `jax.stages.Lowered`.
        topology: The machines.
        cache: Where results are kept.
        options: Further ones of the compiler that the program carries, for the digest alone.
    """
    digest = digest_of(f"{sorted((options or {}).items())}\0{lowered.as_text()}", topology)
    if (known := cache.get(digest)) is not None:
        return known
    began = time.perf_counter()
    try:
        compiled = lowered.compile(compiler_options=dict(topology.compiler_options))
    except jax.errors.JaxRuntimeError as error:
        if EXHAUSTED not in str(error):
            raise UserError(
                f"the compiler for {topology.name} failed, and not for lack of memory ({one_line(error)}); try another "
                "layout, or report it."
            ) from None
        listed = tuple(listed_in(str(error)))
        result = Result(refused=said_by_xla(error), buffers=listed, seconds=time.perf_counter() - began, program=digest)
    else:
        result = _read(compiled, topology, time.perf_counter() - began, digest)
    cache.put(result)
    return result


def _read(compiled: Any, topology: Topology, seconds: float, digest: str) -> Result:
    """The numbers of a compiled program."""
    found, sent, unread = compiled.memory_analysis(), (), ""
    outputs = found.output_size_in_bytes - found.alias_size_in_bytes
    # The peak is what a TPU's compiler compares with its memory; the temporaries that it names are of others too.
    held = found.argument_size_in_bytes + outputs
    temporaries = getattr(found, "peak_memory_in_bytes", 0) - held
    try:
        sent = tuple(_without_groups(one, topology.of_host) for one in collectives_of(compiled.as_text() or ""))
    except (jax.errors.JaxRuntimeError, ValueError, MemoryError) as error:  # the text of some large programs fails
        unread = one_line(error)
    return Result(
        arguments=found.argument_size_in_bytes,
        on_host=found.host_argument_size_in_bytes,
        temporaries=temporaries if temporaries > 0 else found.temp_size_in_bytes,
        outputs=outputs,
        seconds=seconds,
        sent=sent,
        unread=unread,
        program=digest,
    )


def _without_groups(one: Collective, of_host: int) -> Sent:
    is_permutation = one.kind == "collective-permute"
    size = max(one.group_size, 1)
    on_host = size if is_permutation else max((_most_on_host(group, of_host) for group in one.groups[:1]), default=size)
    if is_permutation and any(a // of_host != b // of_host for a, b in one.groups):
        on_host = 1
    return Sent(
        one.kind,
        one.dtype,
        one.shape,
        one.times,
        one.in_loop,
        one.is_counted,
        one.group_size,
        one.received if math.isfinite(one.received) else 0.0,
        on_host,
    )


def _most_on_host(group: Sequence[int], of_host: int) -> int:
    hosts = [device // of_host for device in group]
    return max(map(hosts.count, set(hosts)))
