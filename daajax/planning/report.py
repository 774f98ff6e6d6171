"""A plan in words and as numbers: memory by kind, arithmetic, time at least, what is sent, and whether it fits."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from daajax.planning import roofline
from daajax.planning.compiling import Result, Sent
from daajax.planning.layouts import Layout
from daajax.planning.topologies import GPU_SHARE, GPU_SHARE_UNTOLD
from daajax.shortage import Shortage

_GIB = 2**30


@dataclasses.dataclass(frozen=True, eq=False)
class Planned:
    """A layout with what came of compiling it.

    Attributes:
        layout: Which.
        update: Of the update.
        reference_pass: Of the reference pass; None: there is none.
    """

    layout: Layout
    update: Result
    reference_pass: Result | None = None

    @property
    def fits(self) -> bool:
        """Whether both programs do."""
        return all(fits(one, self.layout) for one in (self.update, self.reference_pass) if one is not None)


def fits(result: Result, layout: Layout) -> bool:
    """Whether a program does, by its compiler and by what a device has."""
    return not result.refused and result.peak <= layout.subject.topology.memory


def by_kind(planned: Planned) -> dict[str, int]:
    """Bytes of a device by what they are for; those of temporaries only where the program was compiled.

    What is held is exact, from shapes and shardings; gradients and what the layers keep for the backward pass are
    counted; what else the compiler works in is the rest of its temporaries, negative where it keeps less than counted.
    """
    held, result = planned.layout.held, planned.update
    found = {"parameters": held.parameters, "optimizer": held.optimizer}
    found |= {name: size for name in ("frozen", "reference") if (size := getattr(held, name))}
    found |= {"batch": held.batch, "gradients": held.gradients, "activations": planned.layout.kept}
    if not result.refused:
        padding = result.arguments - held.state
        found["temporaries"] = result.temporaries - held.gradients - planned.layout.kept
        found["outputs and padding"] = result.outputs + padding
    return found


def lines(planned: Planned) -> list[str]:
    """The report."""
    layout, result = planned.layout, planned.update
    return [
        *_layout_lines(layout),
        *_memory_lines(planned),
        *_arithmetic_lines(planned),
        *_sent_lines(result),
        *verdict(planned),
    ]


def _layout_lines(layout: Layout) -> list[str]:
    subject, plan = layout.subject, layout.plan
    topology = subject.topology
    found = [
        f"machines: {topology.name}: {topology.chips:g} chips, {len(topology.devices)} devices of "
        f"{topology.devices[0].device_kind}, {amount(topology.memory)} each for a program, "
        f"mesh {dict(layout.mesh.shape)}; compiled by {topology.compiler}",
        *(f"plan: {line}" for line in plan.report()),
        f"attention: {layout.scorer.attention.name} ({layout.scorer.attention.why}); remat {layout.config.remat}",
        f"head: {layout.head.report()}",
    ]
    return found


def _memory_lines(planned: Planned) -> list[str]:
    layout, result = planned.layout, planned.update
    meanings = {
        "parameters": "trained, by their shardings",
        "optimizer": "its state, by its shardings",
        "frozen": "not trained, by their shardings",
        "reference": "a reference's that stays, by its shardings",
        "batch": "of an update",
        "gradients": "counted, as large as what is trained",
        "activations": f"counted: what remat={layout.config.remat} keeps of the layers",
        "temporaries": "all else that the compiler works in",
        "outputs and padding": "as the compiler says, less what it does not read of the batch",
    }
    found = ["memory of a device in the update:"]
    found += [f"  {name:<24} {amount(size):>12}  {meanings[name]}" for name, size in by_kind(planned).items()]
    if result.refused:
        found.append(
            f"  {'at least':<24} {amount(layout.least_memory):>12}  of {amount(layout.subject.topology.memory)}"
        )
    else:
        found.append(f"  {'together':<24} {amount(result.peak):>12}  of {amount(layout.subject.topology.memory)}")
    if on_host := layout.held.on_host:
        found.append(f"  {'in the host memory':<24} {amount(on_host):>12}  of each device")
    if (other := planned.reference_pass) is not None:
        size = "does not fit" if other.refused else amount(other.peak)
        found.append(f"memory of a device in the reference pass: {size}")
    return found


def _arithmetic_lines(planned: Planned) -> list[str]:
    layout, topology = planned.layout, planned.layout.subject.topology
    least, asked = layout.flops
    found = [
        f"arithmetic of an update: {asked:.4g} FLOPs, {least:.4g} at least ({100 * least / asked:.1f} %)",
    ]
    result = planned.update
    time = roofline.estimate(layout, None if result.refused or result.unread else result.sent)
    pairs = layout.plan.batch_size / time.seconds / topology.chips
    mfu = least / (time.seconds * topology.chips * topology.chip.flops)
    parts = ", ".join(f"{name} {_seconds(value)}" for name, value in time._asdict().items())
    found.append(
        f"time of an update, an estimate and not measured: {_seconds(time.seconds)} at least, by {time.limit} "
        f"({parts}); at most {pairs:.3g} examples/s a chip, {100 * mfu:.0f} % mfu"
    )
    return found


def _sent_lines(result: Result) -> list[str]:
    if result.refused:
        return []
    if result.unread:
        return [f"sent between devices: not known, the program's text cannot be had ({result.unread})"]
    if not result.sent:
        return ["sent between devices: nothing"]
    found = ["sent between devices in an update:"]
    for kind, (times, received) in sums(result.sent).items():
        inside = sum(one.times for one in result.sent if one.kind == kind and one.in_loop)
        dtypes = ", ".join(sorted({one.dtype for one in result.sent if one.kind == kind}))
        groups = ", ".join(str(size) for size in sorted({one.group_size for one in result.sent if one.kind == kind}))
        found.append(
            f"  {kind:<20} {amount(received):>12} to a device, {times:,} arrays of {dtypes}, {inside:,} in loops, "
            f"over {groups} devices"
        )
    if unknown := [one for one in result.sent if not one.is_counted]:
        found.append(f"  {len(unknown)} of them lie in loops that do not say how often they run, which count once")
    return found


def sums(sent: tuple[Sent, ...]) -> dict[str, tuple[int, float]]:
    """By kind, how many arrays are sent in one update, and bytes that a device gets of them."""
    found: dict[str, tuple[int, float]] = {}
    for one in sent:
        count, received = found.get(one.kind, (0, 0.0))
        found[one.kind] = (count + one.times, received + one.times * one.received)
    return dict(sorted(found.items(), key=lambda item: -item[1][1]))


def verdict(planned: Planned) -> list[str]:
    """Whether it fits, and if it does not, what would."""
    layout, topology = planned.layout, planned.layout.subject.topology
    results = {"the update": planned.update, "the reference pass": planned.reference_pass}
    wrong = {name: one for name, one in results.items() if one is not None and not fits(one, layout)}
    if not wrong:
        largest = max(one.peak for one in results.values() if one is not None)
        found = [f"fits: {amount(largest)} of {amount(topology.memory)} a device"]
        if topology.platform == "gpu" and largest > topology.memory * GPU_SHARE_UNTOLD / GPU_SHARE:
            found.append(
                f"  JAX takes {GPU_SHARE_UNTOLD:.0%} of a GPU's memory unless told: set "
                f"XLA_PYTHON_CLIENT_MEM_FRACTION={GPU_SHARE}"
            )
        return found
    shortage = Shortage(
        layout.config, layout.mesh, {"state": layout.update.state, "beside": layout.update.beside}, layout.head.form
    )
    found = []
    for name, one in wrong.items():
        of_state = layout.held.state > topology.memory / 2
        why = one.refused or f"needs {amount(one.peak)} of {amount(topology.memory)}"
        found.append(f"does not fit: {name}: {why}; {shortage.advice(of_state, one.buffers)}")
    return found


def as_values(planned: Planned) -> dict[str, Any]:
    """The plan as numbers, for a file."""
    layout, topology, result = planned.layout, planned.layout.subject.topology, planned.update
    time = roofline.estimate(layout, None if result.refused or result.unread else result.sent)
    return {
        "model": layout.subject.name,
        "topology": topology.name,
        "compiler": topology.compiler,
        "mesh": dict(layout.mesh.shape),
        "remat": layout.config.remat,
        "micro_batches": layout.plan.micro_batches,
        "batch_size": layout.plan.batch_size,
        "rows": layout.rows,
        "row_length": int(layout.batch["tokens"].shape[2]),
        "head": layout.head.form,
        "attention": layout.scorer.attention.name,
        "lora_rank": layout.config.lora.rank,
        "fits": planned.fits,
        "refused": result.refused,
        "memory": topology.memory,
        "bytes": by_kind(planned),
        "peak": None if result.refused else result.peak,
        "on_host": layout.held.on_host,
        "reference_pass_peak": planned.reference_pass and planned.reference_pass.peak,
        "flops": dict(zip(("least", "asked"), layout.flops, strict=True)),
        "seconds_at_least": dict(time._asdict()),
        "collectives": {kind: {"arrays": n, "bytes": size} for kind, (n, size) in sums(result.sent).items()},
        "compile_seconds": round(result.seconds, 1),
    }


def pasted(options: Mapping[str, Any]) -> str:
    """Options as they are given on a command line."""
    return " ".join(f"--config.{name}={value}" for name, value in options.items())


def amount(size: float | int) -> str:
    """Bytes in words."""
    return f"{size / _GIB:,.2f} GiB" if abs(size) >= _GIB / 100 else f"{size / 2**20:,.2f} MiB"


def _seconds(value: float | int) -> str:
    return f"{value:.3g} s" if value >= 0.1 else f"{1000 * value:.3g} ms"
