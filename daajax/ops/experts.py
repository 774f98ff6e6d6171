"""Mixture of experts: each token through the few experts that it was sent to, and none dropped.

Tokens are sorted by expert and multiplied with the weights of each in one grouped product. Experts may be cut over
devices: each device then computes its own experts' part for all tokens it sees, and the parts add up.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


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
    count, each = gate.shape[0], chosen.shape[-1]
    tokens = x.reshape(-1, x.shape[-1])
    mine = chosen.reshape(-1) - (0 if ids is None else ids[0])
    mine = jnp.where((mine >= 0) & (mine < count), mine, count)  # those of others come last
    order = jnp.argsort(mine, stable=True)
    inverse = jnp.argsort(order)
    sizes = (mine[:, None] == jnp.arange(count, dtype=mine.dtype)[None]).sum(axis=0, dtype=jnp.int32)
    copies = jnp.broadcast_to(tokens[:, None], (len(tokens), each, tokens.shape[1]))
    sent = _permute(copies.reshape(-1, tokens.shape[1]), order, inverse)
    inner = act(_grouped(sent, gate, sizes)) * _grouped(sent, up, sizes)
    made = _grouped(inner, down, sizes).astype(jnp.float32)
    made = jnp.where((jnp.arange(len(sent)) < sizes.sum())[:, None], made, 0)
    made = _permute(made, inverse, order) * weights.reshape(-1, 1)
    return made.reshape(len(tokens), each, -1).sum(axis=1).reshape(x.shape)


@jax.custom_vjp
def _permute(
    x: Float[Array, "tokens width"], order: Int[Array, " tokens"], inverse: Int[Array, " tokens"]
) -> Float[Array, "tokens width"]:
    """Rows in another order; its backward pass is a gather as well."""
    del inverse
    return x[order]


_permute.defvjp(
    lambda x, order, inverse: (x[order], inverse), lambda inverse, cotangent: (cotangent[inverse], None, None)
)


def _grouped(
    x: Float[Array, "tokens inputs"], weights: Float[Array, "experts inputs outputs"], sizes: Int[Array, " experts"]
) -> Float[Array, "tokens outputs"]:
    """The first `sizes[0]` tokens times the first expert's weights, and so on, in the dtype of x."""
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else jax.lax.Precision.DEFAULT
    return jax.lax.ragged_dot(x, weights, sizes, precision=precision, preferred_element_type=x.dtype)
