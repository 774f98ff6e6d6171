"""How a model directory stores parameters."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jaxtyping import Int

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")


@dataclasses.dataclass(frozen=True)
class Later:
    """A parameter that is made when it is asked for, so that a model need not be there whole.

    Attributes:
        shape: Its shape.
        dtype: Its dtype.
        make: Makes it; nobody keeps it.
    """

    shape: tuple[int, ...]
    dtype: Any
    make: Callable[[], jax.Array]

    @classmethod
    def of(cls, array: jax.Array) -> "Later":
        """One that is there."""
        return cls(array.shape, array.dtype, lambda: array)

    def then(self, change: Callable[[jax.Array], jax.Array]) -> "Later":
        """The same, changed once it is made."""
        return dataclasses.replace(self, make=lambda: change(self.make()))


@dataclasses.dataclass(frozen=True)
class Columns:
    """Which outputs of a stored projection are a parameter's: runs of them at regular distances.

    Attributes:
        start: The first one.
        run: Outputs that lie together.
        every: From the beginning of a run to that of the next.
    """

    start: int
    run: int
    every: int

    def of(self, outputs: Int[np.ndarray, " outputs"]) -> Int[np.ndarray, " outputs"]:
        """Where these outputs of the parameter are stored."""
        return self.start + outputs // self.run * self.every + outputs % self.run


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor of a model directory that a parameter is, or is a part of.

    Attributes:
        name: Has `{layer}` where it is one of a stack, `{expert}` where it is one of a stack of stacks.
        transposed: Whether its axes are the parameter's in reverse.
        columns: Which part of it; None: all.
    """

    name: str
    transposed: bool = False
    columns: Columns | None = None


Modules = dict[str, str | tuple[str, Columns]]  # where each parameter's weight, and its bias, is stored
