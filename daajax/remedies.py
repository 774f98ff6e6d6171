"""What makes a run smaller: options with values, from its own, those first that leave its numbers as they are.

To add one, append it in `of_work` or `of_state`, whichever it makes smaller.
"""

import inspect
from collections.abc import Mapping
from typing import Any, NamedTuple

import optax

from daajax.config import Config, has_adapters, hyperparameters
from daajax.data.packing import parse_row_length
from daajax.data.parts import length_multiple
from daajax.folder import may_change
from daajax.models.remat import REMAT
from daajax.optimizer import OPTIMIZERS, holds_moments, make_optimizer

OFFERED = 3


class Remedy(NamedTuple):
    """Options that are set together.

    Attributes:
        values: By option, what to set it to, and what it is.
        condition: What it takes besides.
    """

    values: Mapping[str, tuple[Any, Any]]
    condition: str = ""

    @property
    def keeps_numbers(self) -> bool:
        """Whether the run may go on with it, because it computes the same."""
        return all(map(may_change, self.values))

    def words(self) -> str:
        """As a part of a sentence."""
        new = " and ".join(f"{name}={value}" for name, (value, _) in self.values.items())
        old = " and ".join(str(value) for _, value in self.values.values())
        mark = "" if self.keeps_numbers else " (changes what is learned, so in a new run)"
        return f"{self.condition}set {new} in place of {old}{mark}"


def remedies(
    config: Config,
    mesh: Mapping[str, int],
    *,
    of_state: bool,
    platform: str = "cpu",
    head: str | None = None,
    slices: int = 1,
) -> list[Remedy]:
    """What helps a run that needs too much memory, at most `OFFERED`.

    Args:
        config: The run's.
        mesh: Devices on each axis.
        of_state: Whether it is parameters and optimizer state that need it, not what an update works in.
        platform: Of the devices: cpu, gpu, tpu.
        head: Form of the head that the run takes; None: not known.
        slices: Of TPUs, each of which has a replica at least.
    """
    work, state = _of_work(config, mesh, head), _of_state(config, mesh, platform, slices)
    ordered = [*state, *work] if of_state else sorted([*work, *state], key=lambda remedy: not remedy.keeps_numbers)
    return ordered[:OFFERED]


def _of_work(config: Config, mesh: Mapping[str, int], head: str | None) -> list[Remedy]:
    """What makes smaller what an update works in."""
    found = []
    if (parts := _smaller_parts(config, mesh)) is not None:
        found.append(parts)
    kept = list(REMAT)
    if config.remat != kept[-1]:
        found.append(Remedy({"remat": (kept[kept.index(config.remat) + 1], config.remat)}))
    if head == "row":
        found.append(Remedy({"head": ("token", config.head)}))
    return [*found, *_less_to_learn_from(config, mesh)]


def _smaller_parts(config: Config, mesh: Mapping[str, int]) -> Remedy | None:
    """Twice as many micro-batches, with half the rows or half a row's tokens in each where these are fixed.

    Where rows would be left without an example, half as many of them, each cut over twice as many devices.
    """
    packing, parts, multiple = config.packing, config.micro_batches, mesh["data"] * mesh["fsdp"]
    rows, length, twice = packing.rows, parse_row_length(packing.row_length), (2 * parts, parts)
    if 2 * parts * multiple > config.batch_size:
        fsdp, context = mesh["fsdp"], mesh["context"]
        if rows is not None or length is not None:
            return None
        if fsdp % 2 or parts * multiple > config.batch_size:
            return Remedy({"mesh.context": (2 * context, context)}, condition="with more devices, ")
        cut = {"mesh.fsdp": (fsdp // 2, fsdp), "mesh.context": (2 * context, context)}
        return Remedy({**cut, "micro_batches": twice})
    # Rows of one example each get fewer unless their number is fixed; rows of several get shorter unless that is.
    if (length is None) if packing.enabled else (rows is None):
        return Remedy({"micro_batches": twice})
    if rows is not None and (fewer := _half(rows, multiple)) < rows:
        return Remedy({"packing.rows": (fewer, rows), "micro_batches": twice})
    if packing.enabled and length is not None and (shorter := _half(length, _multiple(mesh))) < length:
        return Remedy({"packing.row_length": (shorter, length), "micro_batches": twice})
    return None


def _less_to_learn_from(config: Config, mesh: Mapping[str, int]) -> list[Remedy]:
    """Shorter examples, or fewer an update; nothing where rows are as long as is asked for, whatever is in them."""
    batch, longest, packing = config.batch_size, config.max_length, config.packing
    length, halved = parse_row_length(packing.row_length), (batch // 2, batch)
    fills_rows = batch // 2 >= config.micro_batches * mesh["data"] * mesh["fsdp"]
    if length is not None:
        shorter = _half(length, _multiple(mesh))
        fits = fills_rows and packing.enabled and shorter < length
        return [Remedy({"packing.row_length": (shorter, length), "batch_size": halved})] if fits else []
    found = [Remedy({"max_length": (longest // 2, longest)})] if longest >= 4 else []
    if fills_rows and (packing.enabled or packing.rows is None):
        found.append(Remedy({"batch_size": halved}))
    return found


def _of_state(config: Config, mesh: Mapping[str, int], platform: str, slices: int) -> list[Remedy]:
    """What makes smaller what a device holds for the whole run."""
    found, (data, fsdp) = [], (mesh["data"], mesh["fsdp"])
    if data > slices:
        found.append(Remedy({"mesh.data": (slices, data), "mesh.fsdp": (data // slices * fsdp, fsdp)}))
    if not has_adapters(config):  # whose moments are small
        options = config.optimizer
        optimizer = make_optimizer(
            options.name, optax.constant_schedule(0.0), max_grad_norm=None, hyperparameters=hyperparameters(config)
        )
        has_moments = holds_moments(optimizer)
        if has_moments and platform != "cpu" and not options.offload:  # a CPU's memory is the host's
            found.append(Remedy({"optimizer.offload": (True, False)}))
        takes_dtype = "mu_dtype" in inspect.signature(OPTIMIZERS[options.name]).parameters
        if has_moments and takes_dtype and options.mu_dtype is None:
            found.append(Remedy({"optimizer.mu_dtype": ("bfloat16", None)}))
        found.append(Remedy({"lora.rank": (16, 0)}))
    elif config.lora.quantization is None:
        found.append(Remedy({"lora.quantization": ("nf4", None)}))
    found.append(Remedy({"mesh.fsdp": (2 * fsdp, fsdp)}, condition="with more devices, "))
    return found


def _multiple(mesh: Mapping[str, int]) -> int:
    return length_multiple(mesh["context"])


def _half(value: int, multiple: int) -> int:
    """Half of it, up to a multiple."""
    return -(-value // (2 * multiple)) * multiple
