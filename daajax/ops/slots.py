"""Scored slots: where hidden states are taken for the head, and how its loops walk over them.

Slots fill up from the front of each row. Loops take as many of each row at a time and end behind the last real one.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from daajax.ops.attention import sum_copies
from daajax.ops.devices import ONE_DEVICE, Devices

_TOKENS, _SLOTS = ("rows", "length"), ("rows", "scored")


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def at_sources(
    hidden: Float[Array, "rows length embed"],
    sources: Int[Array, "rows scored"],
    owners: Int[Array, "rows scored"],
    responses: int,
    devices: Devices = ONE_DEVICE,
) -> Float[Array, "rows scored embed"]:
    """The hidden states that predict scored tokens: only they reach the projection.

    A state may predict one token of each response, and so the backward pass is a gather for each of them, not a scatter
    whose order would be left to the device.

    Args:
        hidden: Last hidden states.
        sources: Where the state lies that predicts each scored token.
        owners: slot · responses + response of each; -1 for none.
        responses: K.
        devices: That rows are cut up over, and their length; a state and what it predicts lie on one of them.
    """
    del responses

    def take(hidden: Array, sources: Array, owners: Array) -> Array:
        return jnp.take_along_axis(hidden, _here(hidden.shape[1], sources, owners, devices)[:, :, None], axis=1)

    return devices.local(take, (_TOKENS, _SLOTS, _SLOTS), _SLOTS)(hidden, sources, owners)


def _here(length: int, sources: Any, owners: Any, devices: Devices) -> Array:
    """Where states lie among the `length` that this device has of each row."""
    begin = devices.index("length") * length
    return jnp.where(owners >= 0, sources - begin, 0)


def _at_sources_forward(hidden, sources, owners, responses, devices):
    return at_sources(hidden, sources, owners, responses, devices), (sources, owners, hidden.shape[1])


def _at_sources_backward(responses, devices, residuals, cotangent):
    sources, owners, whole = residuals
    length = whole // devices.parts("length")

    def pull(cotangent, sources, owners):
        scored, here = sources.shape[1], _here(length, sources, owners, devices)
        where = jnp.where(owners >= 0, here * responses + owners % responses, length * responses)

        def slots_of(where):
            slots = jnp.full(length * responses, scored, jnp.int32)
            return slots.at[where].set(jnp.arange(scored, dtype=jnp.int32), mode="drop").reshape(length, responses)

        return sum_copies(cotangent, jax.vmap(slots_of)(where))

    return devices.local(pull, (_SLOTS, _SLOTS, _SLOTS), _TOKENS)(cotangent, sources, owners), None, None


at_sources.defvjp(_at_sources_forward, _at_sources_backward)


class Slots(NamedTuple):
    """Scored slots of rows, each [rows, scored, …]; in a chunk the two axes are one.

    Attributes:
        hidden: States that predict them.
        targets: The tokens.
        real: Which slots hold one.
        reference: The reference model's states, where a statistic reads them.
    """

    hidden: Array
    targets: Array
    real: Array
    reference: tuple[Array, ...] = ()


class Chunks(NamedTuple):
    """How loops walk over scored slots: as many of each row at a time.

    Attributes:
        size: Slots of each row.
        count: Chunks up to the last slot that is real; where devices have parts of the vocabulary, the same on all of
            them, since they meet in every chunk.
    """

    size: int
    count: Int[Array, ""]

    @classmethod
    def of(cls, real: Bool[Array, "rows scored"], limit: int, devices: Devices) -> "Chunks":
        """Over slots that are padded to whole chunks.

        Args:
            real: Which slots are.
            limit: Slots of a chunk, of all rows together, at most.
            devices: That rows and vocabulary are cut up over.
        """
        size = chunk_slots(real.shape[1], real.shape[0], limit)
        last = jnp.where(real, jnp.arange(1, real.shape[1] + 1)[None], 0).max()
        if devices.parts("vocab") > 1:
            last = devices.max(last, "tokens")
        return cls(size, (last + size - 1) // size)

    def take(self, values: Any, step: Array) -> Any:
        """One chunk of a tree of values, [chunk, …]."""

        def one(x: Array) -> Array:
            x = jax.lax.dynamic_slice_in_dim(x, step * self.size, self.size, axis=1)
            return x.reshape(-1, *x.shape[2:])

        return jax.tree.map(one, values)

    def put(self, values: Any, chunk: Any, step: Array) -> Any:
        """The same tree with new values in one chunk."""

        def one(x: Array, new: Array) -> Array:
            new = new.reshape(len(x), self.size, *x.shape[2:])
            return jax.lax.dynamic_update_slice_in_dim(x, new, step * self.size, axis=1)

        return jax.tree.map(one, values, chunk)


def chunk_slots(scored: int, rows: int, limit: int) -> int:
    """Slots of each row in a chunk: as even as whole tiles of 8 allow, so that little is padded.

    Args:
        scored: Slots of a row.
        rows: That are visited together.
        limit: Slots of a chunk, of all rows together, at most.
    """
    most = max(1, limit // rows)
    return min(most, 8 * -(-scored // (8 * -(-scored // most))), scored)


def padded(values: Any, rows: int, limit: int) -> Any:
    """A tree of [rows, scored, …] with room for whole chunks of so many rows, `limit` slots at most."""

    def one(x: Array) -> Array:
        padding = -x.shape[1] % chunk_slots(x.shape[1], rows, limit)
        return jnp.pad(x, ((0, 0), (0, padding), *((0, 0) for _ in x.shape[2:])))

    return jax.tree.map(one, values)
