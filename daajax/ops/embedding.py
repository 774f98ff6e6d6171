"""Rows of a table by their numbers, where both the table and the rows of a batch are cut up over devices.

A device has some of the table's rows, and of these some columns. It looks up what all devices want that share its
columns, whose tokens it is sent, and sends each of them its part: two exchanges of hidden states, and never a table.
Left to itself the partitioner gathers the hidden states of all rows on meshes of several axes.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from daajax.ops.devices import Devices

_TOKENS = ("rows", "length")


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def lookup(
    table: Float[Array, "entries embed"],
    numbers: Int[Array, "rows length"],
    axis: str,
    dtype: Any,
    devices: Devices,
) -> Float[Array, "rows length embed"]:
    """The table's row of each number; differentiable with respect to the table, whose gradient is summed in float32.

    Args:
        table: In any float dtype.
        numbers: Each from 0 up to and without `entries`.
        axis: Logical axis of the table's rows.
        dtype: Of the result.
        devices: Those that the table and the rows of the batch are cut up over.
    """

    def of_part(table: Array, numbers: Array) -> Array:
        here, is_mine = _own(table, devices.gather(numbers, "embed", 0), axis, devices)
        found = table[here].astype(dtype)
        if devices.parts(axis) > 1:
            found = devices.sum(jnp.where(is_mine[:, :, None], found, 0), axis)
        return devices.exchange(found, "embed", 0, 2)

    return devices.local(of_part, ((axis, "embed"), _TOKENS), _TOKENS)(table, numbers)


def _own(table: Array, numbers: Array, axis: str, devices: Devices) -> tuple[Array, Array]:
    """Where numbers lie in this device's part of a table, and which of them do."""
    here = numbers - devices.index(axis) * len(table) if devices.parts(axis) > 1 else numbers
    is_mine = (here >= 0) & (here < len(table))
    return jnp.clip(here, 0, len(table) - 1), is_mine


def _forward(table: Any, numbers: Any, axis: str, dtype: Any, devices: Devices) -> Any:
    return lookup(table, numbers, axis, dtype, devices), (table, numbers)


def _backward(axis: str, dtype: Any, devices: Devices, kept: Any, cotangent: Array) -> Any:
    table, numbers = kept

    def of_part(table: Array, numbers: Array, cotangent: Array) -> Array:
        here, is_mine = _own(table, devices.gather(numbers, "embed", 0), axis, devices)
        changes = devices.exchange(cotangent, "embed", 2, 0).astype(jnp.float32)
        total = jnp.zeros(table.shape, jnp.float32).at[jnp.where(is_mine, here, len(table))].add(changes, mode="drop")
        return devices.sum_others(total, "tokens", "embed").astype(table.dtype)

    run = devices.local(of_part, ((axis, "embed"), _TOKENS, _TOKENS), (axis, "embed"))
    return run(table, numbers, cotangent), None


lookup.defvjp(_forward, _backward)
