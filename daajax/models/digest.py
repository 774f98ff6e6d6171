"""What arrays hold, in a few characters that are the same on every mesh."""

import hashlib
from collections.abc import Mapping
from typing import Any

import flax.traverse_util as traverse
import jax
import jax.numpy as jnp

from daajax import sharding


def digest_of(params: Mapping[str, Any], scale: float | None = None) -> str:
    """What the weights are, whatever files, shards, mesh or dtype they are in: equal digests mean equal values.

    Every element's bits, those of a float in float32, are mixed with its position and summed modulo 2³², twice with
    different constants; such sums are the same in any order, so each device sums what it has.

    Args:
        params: The weights, adapters among them if there are any.
        scale: What adapters are weighed with.
    """
    flat: Any = traverse.flatten_dict(params, sep="/")
    hashed = hashlib.sha256(b"" if scale is None else f"scale {scale!r};".encode())
    for name, sums in sorted(digests_of(flat).items()):
        hashed.update(f"{name}:{flat[name].shape}:{sums};".encode())
    return hashed.hexdigest()


def digests_of(arrays: Mapping[str, jax.Array]) -> dict[str, str]:
    """The digest of each array's values; their types have up to four bytes."""
    sums = {name: sharding.fetch(pair) for name, pair in _mix_all(dict(arrays)).items()}
    return {name: "-".join(f"{int(value):08x}" for value in pair) for name, pair in sums.items()}


@jax.jit
def _mix_all(arrays: dict[str, jax.Array]) -> dict[str, jax.Array]:
    return {name: _mix(x) for name, x in arrays.items()}


def _mix(x: jax.Array) -> jax.Array:
    values = x.astype(jnp.float32 if jnp.issubdtype(x.dtype, jnp.floating) else jnp.int32)
    bits = jax.lax.bitcast_convert_type(values, jnp.uint32)
    position = jnp.zeros(x.shape, jnp.uint32)
    for axis, size in enumerate(x.shape):
        position = position * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
    sums = []
    for odd in (0x9E3779B1, 0x85EBCA77):
        mixed = (bits ^ (position * jnp.uint32(odd))) * jnp.uint32(0xC2B2AE3D)
        mixed = (mixed ^ (mixed >> 15)) * jnp.uint32(odd)
        sums.append((mixed ^ (mixed >> 13)).sum(dtype=jnp.uint32))
    return jnp.stack(sums)
