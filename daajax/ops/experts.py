"""Mixture of experts: each token through the few experts that it was sent to, and none dropped.

Tokens are laid out by expert, each expert's padded to whole blocks, and every block is multiplied with the weights of
its one expert: the cost is that of the tokens, not of tokens × experts. Experts may be cut over devices: each device
then computes its own experts' part for all tokens it sees, and the parts add up.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

BLOCK = 128  # tokens of one expert that are multiplied at once


class Layout(NamedTuple):
    """Where copies of tokens lie, one a token and expert that it was sent to.

    Attributes:
        slot: Where each copy lies; `slots` for those of experts that are not here.
        copy: Which copy lies in each slot; `copies` where there is none.
        expert: Whose each block is.
        blocks: How many there are; those behind them are empty.
    """

    slot: Int[Array, " copies"]
    copy: Int[Array, " slots"]
    expert: Int[Array, " capacity"]
    blocks: Int[Array, ""]


def layout(chosen: Int[Array, " copies"], count: int) -> Layout:
    """Lays copies out by expert.

    Args:
        chosen: The expert of each copy, from 0; others than `count` of them are left out.
        count: Experts here.
    """
    copies = len(chosen)
    capacity = -(-copies // BLOCK) + count
    here = (chosen >= 0) & (chosen < count)
    own = jnp.where(here, chosen, count)
    sizes = (own[:, None] == jnp.arange(count, dtype=own.dtype)[None]).sum(axis=0, dtype=jnp.int32)
    ends = jnp.cumsum(-(-sizes // BLOCK))  # in blocks
    order = jnp.argsort(own, stable=True)
    first = jnp.cumsum(sizes) - sizes  # of each expert's copies, in that order
    expert = jnp.minimum(own[order], count - 1)
    in_order = (ends - -(-sizes // BLOCK))[expert] * BLOCK + jnp.arange(copies, dtype=jnp.int32) - first[expert]
    slots = capacity * BLOCK
    slot = jnp.zeros(copies, jnp.int32).at[order].set(jnp.where(own[order] < count, in_order, slots))
    copy = jnp.full(slots, copies, jnp.int32).at[slot].set(jnp.arange(copies, dtype=jnp.int32), mode="drop")
    owner = jnp.searchsorted(ends, jnp.arange(capacity), side="right").astype(jnp.int32)
    return Layout(slot, copy, jnp.minimum(owner, count - 1), ends[-1])


def mix(
    x: Float[Array, "rows length embed"],
    chosen: Int[Array, "rows length chosen"],
    weights: Float[Array, "rows length chosen"],
    gate: Float[Array, "experts embed mlp"],
    up: Float[Array, "experts embed mlp"],
    down: Float[Array, "experts mlp embed"],
    act: Callable[[Array], Array],
    ids: Int[Array, " experts"] | None = None,
) -> Float[Array, "rows length embed"]:
    """The weighted sum of what its experts make of each token.

    Args:
        x: Tokens, in the compute dtype.
        chosen: The experts of each token.
        weights: Of each of them, float32.
        gate: Their gates.
        up: Their inner projections.
        down: Their outer projections.
        act: What the gates pass through.
        ids: Which experts these are, consecutive; what other experts would add is left out. None: all there are.

    Returns:
        The sum, float32.
    """
    tokens, each = x.reshape(-1, x.shape[-1]), chosen.shape[-1]
    where = checkpoint_name(layout(chosen.reshape(-1) - (0 if ids is None else ids[0]), len(gate)), "mlp")
    copies = jnp.broadcast_to(tokens[:, None], (len(tokens), each, tokens.shape[1])).reshape(-1, tokens.shape[1])
    sent = _moved(copies, where.copy, where.slot)
    # Named as `daajax.models.remat` has it: what the backward pass may keep.
    gates, ups = (checkpoint_name(grouped(sent, w, where.expert, where.blocks), "mlp") for w in (gate, up))
    inner = act(gates) * ups
    made = checkpoint_name(grouped(inner, down, where.expert, where.blocks), "down")
    made = _moved(made, where.slot, where.copy)
    weighed = made.astype(jnp.float32) * weights.reshape(-1, 1)
    return weighed.reshape(len(tokens), each, -1).sum(axis=1).reshape(x.shape)


@jax.custom_vjp
def _moved(
    x: Float[Array, "here width"], source: Int[Array, " there"], target: Int[Array, " here"]
) -> Float[Array, "there width"]:
    """Rows elsewhere, 0 where nothing comes from; where each goes makes the backward pass a gather as well."""
    del target
    return jnp.take(x, source, axis=0, mode="fill", fill_value=0)


_moved.defvjp(
    lambda x, source, target: (_moved(x, source, target), target),
    lambda target, cotangent: (jnp.take(cotangent, target, axis=0, mode="fill", fill_value=0), None, None),
)


@jax.custom_vjp
def grouped(
    x: Float[Array, "slots inputs"],
    weights: Float[Array, "experts inputs outputs"],
    expert: Int[Array, " capacity"],
    blocks: Int[Array, ""],
) -> Float[Array, "slots outputs"]:
    """Each block of rows times the weights of its expert, in the dtype of x; 0 behind the last block.

    Weights that are not differentiated get no gradient, and none is made.
    """

    def visit(block, y):
        product = _product(_block(x, block), weights[expert[block]], (1, 0)).astype(x.dtype)
        return jax.lax.dynamic_update_slice_in_dim(y, product, block * BLOCK, axis=0)

    return jax.lax.fori_loop(0, blocks, visit, jnp.zeros((len(x), weights.shape[2]), x.dtype))


def _grouped_forward(x, weights, expert, blocks):
    given = tuple(operand.value for operand in (x, weights, expert, blocks))
    return grouped(*given), (*given, () if weights.perturbed else None)


def _grouped_backward(residuals, cotangent):
    x, weights, expert, blocks, is_trained = residuals

    def visit(block, carry):
        d_x, d_weights = carry
        ct, own = _block(cotangent, block), expert[block]
        d_block = _product(ct, weights[own], (1, 1)).astype(x.dtype)
        d_x = jax.lax.dynamic_update_slice_in_dim(d_x, d_block, block * BLOCK, axis=0)
        if d_weights is not None:
            d_weights = d_weights.at[own].add(_product(_block(x, block), ct, (0, 0)))
        return d_x, d_weights

    start = jnp.zeros_like(x), None if is_trained is None else jnp.zeros(weights.shape, jnp.float32)
    d_x, d_weights = jax.lax.fori_loop(0, blocks, visit, start)
    return d_x, None if d_weights is None else d_weights.astype(weights.dtype), None, None


grouped.defvjp(_grouped_forward, _grouped_backward, symbolic_zeros=True)


def _block(x: Array, block: Array) -> Array:
    return jax.lax.dynamic_slice_in_dim(x, block * BLOCK, BLOCK, axis=0)


def _product(x: Array, y: Array, contract: tuple[int, int]) -> Array:
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else jax.lax.Precision.DEFAULT
    axes = (((contract[0],), (contract[1],)), ((), ()))
    return jax.lax.dot_general(x, y, axes, precision=precision, preferred_element_type=jnp.float32)
