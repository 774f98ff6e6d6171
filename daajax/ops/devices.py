"""What operations know of the devices they run on: logical axes, sums and maxima over what is cut along them."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

import jax.numpy as jnp
from jaxtyping import Array, Int

Axes = tuple[str | None, ...]


@runtime_checkable
class Devices(Protocol):
    """Devices that arrays are cut up over, by logical axes; `daajax.sharding.MeshDevices` are those of a mesh.

    All but `local`, `parts` and `keep` are for functions that `local` runs.
    """

    def local(self, function: Callable[..., Any], in_axes: Sequence[Any], out_axes: Any) -> Callable[..., Any]:
        """Runs a function on each device's part of its arguments; axes are the leading ones, out_axes one a result."""
        ...

    def parts(self, axis: str) -> int:
        """How many parts an axis is cut into."""
        ...

    def index(self, axis: str) -> Int[Array, ""]:
        """Which of them this device has."""
        ...

    def sum(self, x: Array, axis: str) -> Array:
        """The sum over the parts."""
        ...

    def sum_cut(self, x: Array, axis: str, place: int, along: str) -> Array:
        """The sum over the parts of `axis`, of which each device keeps what it has of `along`, the axis at `place`."""
        ...

    def sum_others(self, x: Array, axis: str, but: str) -> Array:
        """The sum over the parts of `axis` that are one part of `but`, which `axis` is cut into as well."""
        ...

    def max(self, x: Array, axis: str) -> Array:
        """The maximum over the parts."""
        ...

    def gather(self, x: Array, axis: str, place: int) -> Array:
        """What all parts have, one after another along the array's axis `place`."""
        ...

    def exchange(self, x: Array, axis: str, split: int, joined: int) -> Array:
        """Of the array's axis `split`, each part's piece of every part, one after another along the axis `joined`."""
        ...

    def keep(self, x: Array, axes: Axes) -> Array:
        """The same array, which stays cut up as these axes are until it is used; outside of `local`."""
        ...


class OneDevice:
    """One device, which has all of everything."""

    def local(self, function: Callable[..., Any], in_axes: Sequence[Any], out_axes: Any) -> Callable[..., Any]:
        """The function itself."""
        del in_axes, out_axes
        return function

    def parts(self, axis: str) -> int:
        """One."""
        del axis
        return 1

    def index(self, axis: str) -> Int[Array, ""]:
        """The only one."""
        del axis
        return jnp.int32(0)

    def sum(self, x: Array, axis: str) -> Array:
        """Nothing is added."""
        del axis
        return x

    def sum_cut(self, x: Array, axis: str, place: int, along: str) -> Array:
        """Likewise."""
        del axis, place, along
        return x

    def sum_others(self, x: Array, axis: str, but: str) -> Array:
        """Likewise."""
        del axis, but
        return x

    def max(self, x: Array, axis: str) -> Array:
        """Likewise."""
        del axis
        return x

    def gather(self, x: Array, axis: str, place: int) -> Array:
        """It has all."""
        del axis, place
        return x

    def exchange(self, x: Array, axis: str, split: int, joined: int) -> Array:
        """It keeps all."""
        del axis, split, joined
        return x

    def keep(self, x: Array, axes: Axes) -> Array:
        """It is nowhere else."""
        del axes
        return x


ONE_DEVICE = OneDevice()
