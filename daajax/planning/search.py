"""The fastest layout that fits: counted first, put in order of time, compiled until one fits.

Layouts differ in mesh, remat, micro-batches, rows and form of the head; none of these changes what is learned. To try
something else, add it in `choices`.
"""

import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from daajax.config import Config
from daajax.errors import UserError
from daajax.models.architecture import Architecture
from daajax.models.remat import REMAT
from daajax.planning import roofline
from daajax.planning.layouts import Layout, Subject, make_layout, with_options
from daajax.planning.roofline import Roofline
from daajax.planning.topologies import Topology

MOST_TENSOR = 16  # devices that heads are cut over; beyond a GPU's host they would wait for the network
MOST_CONTEXT = 16  # devices that the length of a row is cut over
MOST_PARTS = 16  # micro-batches
HEADS = ("auto", "token")  # where `auto` takes `row`, which holds a row's logits, `token` needs less


class Candidate(NamedTuple):
    """A layout that was counted.

    Attributes:
        options: What it sets.
        time: What it would take at least.
        waits: Seconds of what is sent and what follows waits for, which `time` takes to overlap.
        memory: Bytes of a device that it needs at least.
    """

    options: dict[str, Any]
    time: Roofline
    waits: float
    memory: int


class Tried(NamedTuple):
    """A candidate that was compiled.

    Attributes:
        candidate: Which.
        fits: Whether it does.
        outcome: What `compile_candidate` returned.
    """

    candidate: Candidate
    fits: bool
    outcome: Any


class Counted(NamedTuple):
    """Everything that could be tried.

    Attributes:
        candidates: That can be laid out, the fastest first.
        refused: How many cannot, by why.
    """

    candidates: list[Candidate]
    refused: dict[str, int]


class Found(NamedTuple):
    """What a search came to.

    Attributes:
        best: The fastest that fits; None: none of those that were compiled does.
        tried: All that were compiled, in that order.
        too_large: How many need more than a device has whatever their compiler does.
        left: How many were neither compiled nor too large.
    """

    best: Tried | None
    tried: list[Tried]
    too_large: int
    left: int


def count(subject: Subject, config: Config) -> Counted:
    """Counts every layout that there is.

    Args:
        subject: What is planned for.
        config: Of the run; what is tried takes the place of its own options.
    """
    candidates, refused = [], {}
    for options, heads in bases(config, subject):
        try:
            base = make_layout(subject, with_options(config, options))
        except UserError as error:
            why = str(error).split(":")[0]
            refused[why] = refused.get(why, 0) + 1
            continue
        candidates.extend(_variants(base, options, heads))
    # Of equally fast ones that with the smallest sum of all parts; of equal ones, that which needs least memory.
    candidates.sort(key=lambda one: (round(one.time.seconds + one.waits, 9), sum(one.time), one.memory))
    return Counted(candidates, refused)


def search(
    candidates: list[Candidate], memory: int, compile_candidate: Callable[[Candidate], tuple[bool, Any]], *, tries: int
) -> Found:
    """Finds the first candidate that fits.

    Args:
        candidates: The fastest first.
        memory: Bytes that a device has.
        compile_candidate: Says whether one fits, and whatever else came of it.
        tries: Most that are compiled.
    """
    possible = [one for one in candidates if one.memory <= memory]
    tried = []
    for candidate in possible[:tries]:
        fits, outcome = compile_candidate(candidate)
        tried.append(Tried(candidate, fits, outcome))
        if fits:
            break
    best = next((one for one in tried if one.fits), None)
    return Found(best, tried, len(candidates) - len(possible), len(possible) - len(tried))


def _variants(base: Layout, options: dict[str, Any], heads: tuple[str, ...]) -> Iterator[Candidate]:
    """A layout with every remat, and every form of the head that differs."""
    seen = set()
    for remat, head in itertools.product(REMAT, heads):
        layout = base.considered(remat, head)
        if (remat, layout.head.form) in seen:
            continue
        seen.add((remat, layout.head.form))
        chosen = options | {"remat": remat, "head": head}
        sent = roofline.expected_sent(layout)
        waits = roofline.link_seconds(layout.subject.topology, roofline.waited_for(layout))
        yield Candidate(chosen, roofline.estimate(layout, sent), waits, layout.least_memory)


def bases(config: Config, subject: Subject) -> Iterator[tuple[dict[str, Any], tuple[str, ...]]]:
    """Options of meshes and rows, and the heads to try with each."""
    batch_size = config.batch_size
    for data, fsdp, tensor, context in meshes(subject.topology, subject.architecture):
        parts = 1
        while parts <= MOST_PARTS and (parts == 1 or parts * data * fsdp <= batch_size):
            rows: list[int | None] = [config.packing.rows]
            if config.packing.rows is None and config.packing.enabled and 2 * parts * data * fsdp <= batch_size:
                rows.append(2 * data * fsdp)
            for count in rows:
                mesh = {"mesh.data": data, "mesh.fsdp": fsdp, "mesh.tensor": tensor, "mesh.context": context}
                yield mesh | {"micro_batches": parts, "packing.rows": count}, HEADS
            parts *= 2


def meshes(topology: Topology, architecture: Architecture) -> Iterator[tuple[int, int, int, int]]:
    """Devices on `data`, `fsdp`, `tensor` and `context`.

    Heads are cut evenly, within a host of GPUs; there are replicas in powers of two, or rows cut in powers of two. Of
    several slices each has as many replicas.
    """
    slices, devices = topology.slices, len(topology.devices) // topology.slices
    most = min(MOST_TENSOR, topology.of_host)
    for tensor in range(1, min(most, devices) + 1):
        if devices % tensor or architecture.num_key_value_heads % tensor or architecture.num_attention_heads % tensor:
            continue
        data = 1
        while data <= devices // tensor:
            if devices // tensor % data == 0:
                yield slices * data, devices // tensor // data, tensor, 1
            data *= 2
        context = 2
        while context <= MOST_CONTEXT and devices // tensor % context == 0:
            yield slices, devices // tensor // context, tensor, context
            context *= 2
