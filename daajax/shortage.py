"""Out of memory, in one line: which buffers are the largest, and up to three changes that help (`daajax.remedies`).

XLA lists buffers where it knows them, while it compiles for a TPU or runs on a GPU; else the arrays that a run holds
are listed, which are the largest that have a name.
"""

import contextlib
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import jax

from daajax.config import Config
from daajax.errors import UserError, one_line
from daajax.remedies import remedies
from daajax.sharding import device_of, slices_of

EXHAUSTED = "RESOURCE_EXHAUSTED"
NAMED = 4  # buffers
_GIB = 2**30
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_SIZE = re.compile(r"^\s*(?:\d+\. )?Size: ([\d.]+)\s*([KMGT]?)i?B?\s*$", re.MULTILINE)
_SHAPE = re.compile(r"\b(?:Shape|Subshape): (\w+\[[\d,]*\])")
_LONGEST = 60  # characters of an operation's name, its end


class Buffer(NamedTuple):
    """An array on a device.

    Attributes:
        name: What it is or where it comes from.
        shape: Dtype and shape as XLA writes them.
        size: Bytes on one device.
    """

    name: str
    shape: str
    size: int


class Shortage:
    """What to say when a run is out of memory.

    Args:
        config: The run's.
        mesh: Where it runs.
        held: What it holds as long as it runs: a tree of arrays, or of abstract ones, with their shardings.
        head: Form of the head that it takes; None: not known.
    """

    def __init__(self, config: Config, mesh: Any, held: Any, head: str | None = None):
        self._config, self._mesh, self._head, self._held = config, mesh, head, held_buffers(held)

    def advice(self, of_state: bool, listed: Iterable[Buffer] = ()) -> str:
        """The largest buffers, and what would make the run smaller.

        Args:
            of_state: Whether what is held for the whole run takes more than what an update works in.
            listed: Buffers that are known to be the largest; none: those that are held.
        """
        changes = remedies(
            self._config,
            dict(self._mesh.shape),
            of_state=of_state,
            platform=device_of(self._mesh).platform,
            head=self._head,
            slices=len(slices_of(list(self._mesh.devices.flat))),
        )
        largest = described(list(listed) or self._held)
        return f"the largest buffers on a device are {largest}; " + ", or ".join(change.words() for change in changes)

    @contextlib.contextmanager
    def explained(self, what: str) -> Iterator[None]:
        """Around what may run out of memory.

        Args:
            what: Its name, for the message.

        Raises:
            UserError: If it did.
        """
        try:
            yield
        except jax.errors.JaxRuntimeError as error:
            if EXHAUSTED not in str(error):
                raise
            listed = listed_in(str(error))
            of_state = not listed and "temporaries" not in str(error) and 2 * self._state() > (_limit() or math.inf)
            line = f"{what} is out of memory ({said_by_xla(error)}); {self.advice(of_state, listed)}."
            raise UserError(line) from None

    def _state(self) -> int:
        return sum(buffer.size for buffer in self._held)


def _limit() -> int | None:
    """Bytes of a device's memory; None where it does not say."""
    return (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")


def said_by_xla(error: Exception) -> str:
    """The first line of its message, without what every such message says."""
    first = str(error).partition("\n")[0].removeprefix(f"{EXHAUSTED}: ")
    return (
        one_line(type(error)(re.sub(r"\bXLA:TPU compile permanent error\. ", "", first))).partition(": ")[2].rstrip(".")
    )


def listed_in(message: str) -> list[Buffer]:
    """The buffers that a message of XLA lists, as its compilers for TPU and GPU do; none if it lists none."""
    starts = list(_SIZE.finditer(message))
    bounds = [*(start.start() for start in starts), len(message)]
    found = []
    for start, end in zip(starts, bounds[1:], strict=True):
        text = message[start.end() : end]
        if shape := _SHAPE.search(text):
            size = round(float(start[1]) * _UNITS[start[2]])
            found.append(Buffer(_name_in(text), shape[1], size))
    return found


def _name_in(text: str) -> str:
    """What a listed buffer is: the end of its operation's path, or XLA's label, or an argument."""
    if operator := re.search(r'op_name="([^"\[]*)', text):
        path = operator[1].split("/")
        while len("/".join(path)) > _LONGEST and len(path) > 1:
            path = path[1:]
        return "/".join(path)
    if label := re.search(r"XLA [Ll]abel: %?([\w.-]+)", text):
        return label[1]
    return "an argument" if "Parameter" in text else "a temporary"


def held_buffers(tree: Any) -> list[Buffer]:
    """Every array of a tree by its path, with its shape and size on one device."""
    found = []
    for path, leaf in jax.tree.leaves_with_path(tree):
        shape = leaf.sharding.shard_shape(leaf.shape)
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        words = f"{leaf.dtype}[{','.join(map(str, shape))}]"
        found.append(Buffer(name, words, math.prod(shape) * leaf.dtype.itemsize))
    return found


def described(buffers: Iterable[Buffer]) -> str:
    """The largest ones in words; those that are alike together."""
    alike = Counter(buffers)
    largest = sorted(alike, key=lambda buffer: -buffer.size)[:NAMED]
    return ", ".join(
        f"{f'{alike[buffer]} × ' if alike[buffer] > 1 else ''}{buffer.name} {buffer.shape} of {_amount(buffer.size)}"
        for buffer in largest
    )


def _amount(size: int) -> str:
    return f"{size / _GIB:.2f} GiB" if size >= _GIB / 100 else f"{size / 2**20:.2f} MiB"
