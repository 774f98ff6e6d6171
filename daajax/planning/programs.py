"""The text of a compiled program, taken apart: its computations, what calls what, and how often loops run."""

import dataclasses
import functools
import re
from collections.abc import Iterator, Mapping, Sequence

_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_NAMES = re.compile(r"%([\w.\-]+)")
_CALLED = re.compile(r"(?:calls|to_apply|true_computation|false_computation)=%([\w.\-]+)")
_SEVERAL = re.compile(r"(?:branch_computations|called_computations|calls)=\{([^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_FORWARDS = ("copy", "bitcast", "convert", "copy-done", "copy-start")  # what gives on the number that it is given


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a program.

    Attributes:
        name: Of its result.
        type: Of its result, as XLA writes it.
        opcode: What it does.
        given: Between its parentheses.
        rest: Behind them.
    """

    name: str
    type: str
    opcode: str
    given: str
    rest: str

    @functools.cached_property
    def operands(self) -> list[str]:
        """Names of what it reads."""
        return _NAMES.findall(self.given)

    def named(self, attribute: str) -> str | None:
        """The computation that an attribute names."""
        found = re.search(rf"\b{attribute}=%([\w.\-]+)", self.rest)
        return found[1] if found else None


@dataclasses.dataclass(frozen=True)
class Visit:
    """An instruction where it is run.

    Attributes:
        instruction: Which.
        computation: The name of the computation that it lies in.
        times: How often it is run, as far as is known.
        loops: How many loops it lies in.
        is_counted: Whether all of them say how often they run; each that does not counts once.
        is_fused: Whether a fusion holds it.
    """

    instruction: Instruction
    computation: str
    times: int
    loops: int
    is_counted: bool
    is_fused: bool


class Program:
    """A compiled program.

    Args:
        text: As `jax.stages.Compiled.as_text` has it.

    Raises:
        ValueError: If it has no entry.
    """

    def __init__(self, text: str):
        self.computations: dict[str, dict[str, Instruction]] = {}
        self.roots: dict[str, Instruction] = {}
        self.entry = name = ""
        current: dict[str, Instruction] = {}
        for line in text.splitlines():
            if not line.startswith(" "):
                if head := _HEAD.match(line):
                    name = head[2]
                    current = self.computations[name] = {}
                    self.entry = name if head[1] else self.entry
            elif found := _instruction(line):
                current[found.name] = found
                if line.lstrip().startswith("ROOT "):
                    self.roots[name] = found
        if not self.entry:
            raise ValueError("the text is of no program: it has no ENTRY")

    def visits(self) -> Iterator[Visit]:
        """Every instruction that is run, where it is run; of a condition's branches all."""
        yield from self._visits(self.entry, 1, 0, True, False)

    def _visits(self, name: str, times: int, loops: int, is_counted: bool, is_fused: bool) -> Iterator[Visit]:
        for instruction in self.computations[name].values():
            yield Visit(instruction, name, times, loops, is_counted, is_fused)
            if instruction.opcode == "while":
                count = self.trips(instruction, name)
                body = instruction.named("body")
                if body in self.computations:
                    counted = is_counted and count is not None
                    yield from self._visits(body, times * (1 if count is None else count), loops + 1, counted, is_fused)
            elif instruction.opcode not in ("all-reduce", "reduce-scatter", "all-reduce-start", "reduce", "scatter"):
                fused = is_fused or instruction.opcode == "fusion"
                for called in _called(instruction.rest):
                    if called in self.computations:
                        yield from self._visits(called, times, loops, is_counted, fused)

    def trips(self, loop: Instruction, computation: str) -> int | None:
        """How often a loop runs; None if it does not say.

        Args:
            loop: A `while`.
            computation: Which it lies in.
        """
        if found := _TRIPS.search(loop.rest):
            return int(found[1])
        condition, body = loop.named("condition"), loop.named("body")
        if condition not in self.computations or body not in self.computations:
            return None
        counter, limit = self._counter(condition)
        if counter is None or limit is None:
            return None
        begin, step = self._begin(loop, computation, counter), self._step(body, counter)
        if begin is None or not step or limit < begin:
            return None
        return -(-(limit - begin) // step)

    def _counter(self, condition: str) -> tuple[int | None, int | None]:
        """Which element of a loop's tuple is compared with a constant, and that."""
        inside, root = self.computations[condition], self.roots[condition]
        operands = [inside.get(name) for name in root.operands]
        if root.opcode == "fusion" and (called := _called(root.rest)):
            root = self.roots[called[0]]
        if root.opcode != "compare" or len(operands) != 2 or "direction=LT" not in root.rest:
            return None, None
        indices = [_index(operand) for operand in operands]
        limits = [_constant(operand) for operand in operands]
        return next((i for i in indices if i is not None), None), next((i for i in limits if i is not None), None)

    def _begin(self, loop: Instruction, computation: str, counter: int) -> int | None:
        """What an element of a loop's tuple is before it runs."""
        inside = self.computations[computation]
        given = inside.get(loop.operands[0])
        if given is None or given.opcode != "tuple" or counter >= len(given.operands):
            return None
        return _constant(self._source(inside, given.operands[counter]))

    def _source(self, inside: Mapping[str, Instruction], name: str) -> Instruction | None:
        """Where a number comes from."""
        found = inside.get(name)
        while found is not None and found.opcode in _FORWARDS and found.operands:
            found = inside.get(found.operands[0])
        return found

    def _step(self, body: str, counter: int) -> int | None:
        """What a loop adds to an element of its tuple; None if that is not a constant."""
        inside, root = self.computations[body], self.roots[body]
        if root.opcode != "tuple" or counter >= len(root.operands):
            return None
        found, step = self._source(inside, root.operands[counter]), 0
        while found is not None:
            if found.opcode == "get-tuple-element":
                return step if _index(found) == counter else None
            added, found = self._added(inside, found)
            if added is None:
                return None
            step += added
        return None

    def _added(self, inside: Mapping[str, Instruction], found: Instruction) -> tuple[int | None, Instruction | None]:
        """What is added to what."""
        operands = [self._source(inside, name) for name in found.operands]
        if found.opcode == "fusion" and (called := _called(found.rest)):
            fused, root = self.computations[called[0]], self.roots[called[0]]
            if root.opcode != "add":
                return None, None
            parts = [self._source(fused, name) for name in root.operands]
            given = [operands[_parameter(part)] if _parameter(part) < len(operands) else part for part in parts]
            return _sum_of(given)
        return _sum_of(operands) if found.opcode == "add" else (None, None)


def _sum_of(operands: Sequence[Instruction | None]) -> tuple[int | None, Instruction | None]:
    """The constant among two operands, and the other one."""
    constants = [_constant(operand) for operand in operands]
    known = next((value for value in constants if value is not None), None)
    others = [operand for operand, value in zip(operands, constants, strict=True) if value is None]
    return known, others[0] if len(others) == 1 else None


def _parameter(found: Instruction | None) -> int:
    """Which of a computation's parameters; beyond all if it is none."""
    is_one = found is not None and found.opcode == "parameter"
    return int(found.given) if found is not None and is_one else 2**31


def _constant(found: Instruction | None) -> int | None:
    if found is None or found.opcode != "constant" or not re.fullmatch(r"-?\d+", found.given):
        return None
    return int(found.given)


def _index(found: Instruction | None) -> int | None:
    if found is None or found.opcode != "get-tuple-element":
        return None
    index = re.search(r"\bindex=(\d+)", found.rest)
    return int(index[1]) if index else None


def _called(rest: str) -> list[str]:
    """Names of the computations that an instruction calls, each once."""
    found = _CALLED.findall(rest)
    for several in _SEVERAL.findall(rest):
        found += _NAMES.findall(several)
    return list(dict.fromkeys(found))


def _instruction(line: str) -> Instruction | None:
    """A line as `%name = type opcode(operands), attributes`; None if it is not of this form."""
    name, equals, rest = line.strip().removeprefix("ROOT ").partition(" = ")
    if not equals:
        return None
    end = closing(rest, 0) + 1 if rest.startswith("(") else rest.find(" ")
    opcode, _, _ = rest[end:].lstrip().partition("(")
    begin = rest.find(opcode + "(", end) + len(opcode)
    last = closing(rest, begin)
    return Instruction(name.removeprefix("%"), rest[:end], opcode, rest[begin + 1 : last], rest[last + 1 :])


def closing(text: str, begin: int) -> int:
    """Where the parenthesis that opens at `begin` closes."""
    depth = 0
    for found in re.finditer(r"[()]", text[begin:]):
        depth += 1 if found[0] == "(" else -1
        if not depth:
            return begin + found.start()
    return len(text)
