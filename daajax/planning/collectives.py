"""What devices send each other in a compiled program, read off its text.

    found = collectives_of(compiled.as_text())
    assert not [one for one in found if one.kind == "all-to-all" and one.in_loop]

A new form in which XLA writes its groups goes into `groups_of`.
"""

import dataclasses
import math
import re
from collections.abc import Iterator

import numpy as np

from daajax.planning.programs import Instruction, Program, Visit, closing

KINDS = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)
_BITS = {"pred": 8, "bf16": 16, "c64": 64, "c128": 128}
_ARRAY = re.compile(r"\b([a-z]+\d*\w*)\[([\d,]*)\]")
Groups = tuple[tuple[int, ...], ...]


@dataclasses.dataclass(frozen=True)
class Collective:
    """An array that a collective operation makes; one that makes several is as many of these.

    Attributes:
        kind: One of `KINDS`.
        dtype: As XLA writes it, `bf16`.
        shape: Of the result on one device.
        size: Bytes of it.
        times: How often it runs in one call of the program, as far as is known.
        in_loop: Whether it lies in one.
        is_counted: Whether every loop around it says how often it runs; otherwise such loops count once.
        groups: Devices that take part together, by their number in the program; of a permutation the pairs of sender
            and receiver; nothing if the text does not say.
        group_size: How many a group has; 0 if the text does not say. Of a permutation, the devices that receive.
        name: Of the operation in the program.
    """

    kind: str
    dtype: str
    shape: tuple[int, ...]
    size: int
    times: int
    in_loop: bool
    is_counted: bool
    groups: Groups
    group_size: int
    name: str

    @property
    def received(self) -> float:
        """Bytes that a device gets from the others in one run, at least."""
        others = self.group_size - 1
        share = others / max(self.group_size, 1)
        factors = {"all-gather": share, "all-reduce": 2 * share, "reduce-scatter": others, "all-to-all": share}
        return float(self.size * max(factors.get(self.kind, 1), 0))


def collectives_of(text: str) -> list[Collective]:
    """Every collective operation of a program, in the order in which it runs.

    An operation that a TPU's compiler cuts into steps of several fusions is one.

    Args:
        text: As `jax.stages.Compiled.as_text` has it.

    Raises:
        ValueError: If it is of no program.
    """
    found, seen = [], set()
    for visit in Program(text).visits():
        kind = visit.instruction.opcode.removesuffix("-start")
        if kind not in KINDS:
            continue
        channel = re.search(r"\bchannel_id=(\d+)", visit.instruction.rest)
        if visit.is_fused and channel:
            if channel[1] in seen:
                continue
            seen.add(channel[1])
        found.extend(_of(kind, visit))
    return found


def _of(kind: str, visit: Visit) -> Iterator[Collective]:
    instruction = visit.instruction
    groups = pairs_of(instruction.rest) if kind == "collective-permute" else groups_of(instruction.rest)
    size = len(groups) if kind == "collective-permute" else len(groups[0]) if groups else 0
    name = visit.computation
    if name.startswith("all-reduce-scatter") and kind == "all-reduce":  # as a TPU's compiler writes it
        kind = "reduce-scatter"
    for dtype, shape in _results(instruction):
        amount = math.prod(shape) * _bits(dtype) // 8
        if kind == "reduce-scatter" and instruction.opcode.startswith("all-reduce"):
            amount //= max(size, 1)
        yield Collective(
            kind, dtype, shape, amount, visit.times, visit.loops > 0, visit.is_counted, groups, size, instruction.name
        )


def _results(instruction: Instruction) -> list[tuple[str, tuple[int, ...]]]:
    """Dtypes and shapes of the arrays that an operation makes; one that is only started names its operands first."""
    text = instruction.type
    if instruction.opcode.endswith("-start") and instruction.opcode != "all-reduce-start":
        text = _parts(text)[1]
    return [(dtype, tuple(map(int, shape.split(","))) if shape else ()) for dtype, shape in _ARRAY.findall(text)]


def _parts(text: str) -> list[str]:
    """The elements of a tuple's type."""
    parts, begin, place = [], 1, 1
    while place < len(text):
        if text[place] in "({[":
            closes = {"{": "}", "[": "]"}.get(text[place])
            place = text.index(closes, place) if closes else closing(text, place)
        elif text[place] in ",)":
            parts.append(text[begin:place])
            begin = place + 1
        place += 1
    return parts


def _bits(dtype: str) -> int:
    if dtype in _BITS:
        return _BITS[dtype]
    digits = re.search(r"\d+", dtype)
    return int(digits[0]) if digits else 0


def pairs_of(attributes: str) -> Groups:
    """The senders and receivers of a permutation."""
    found = re.search(r"source_target_pairs=\{(.*?)\}\}", attributes)
    return _lists(found[1]) if found else ()


def groups_of(attributes: str) -> Groups:
    """The groups of devices of a collective operation, in each of the forms that XLA writes them in.

    `{{0,1},{2,3}}` · `[2,4]<=[8]`, `[4,2]<=[2,4]T(1,0)`: numbers counted through a shape, transposed, cut up ·
    `mesh['a'=2,'b'=4] {'b'}`: devices that differ in these axes alone.

    Args:
        attributes: Behind an operation's operands.
    """
    if found := re.search(r"replica_groups=\{(\{.*?\})\}", attributes):
        return _lists(found[1])
    if found := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes):
        shape, counted, order = (tuple(map(int, part.split(","))) if part else None for part in found.groups())
        numbers = np.arange(math.prod(counted or ())).reshape(counted or ())
        return _rows(np.transpose(numbers, order).reshape(shape or (1, -1)))
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", attributes):
        sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", found[1])}
        chosen = re.findall(r"'([^']+)'", found[2])
        if ":" in found[2] or "device_ids" in found[1] or any(name not in sizes for name in chosen):
            return ()
        axes = list(sizes)
        numbers = np.arange(math.prod(sizes.values())).reshape(tuple(sizes.values()))
        order = [axes.index(name) for name in axes if name not in chosen] + [axes.index(name) for name in chosen]
        return _rows(np.transpose(numbers, order).reshape(-1, math.prod(sizes[name] for name in chosen)))
    return ()


def _lists(text: str) -> Groups:
    return tuple(tuple(map(int, part.split(","))) for part in re.findall(r"\{?([\d,]+)\}?", text) if part.strip(","))


def _rows(numbers: np.ndarray) -> Groups:
    return tuple(tuple(map(int, row)) for row in numbers)
