"""The head: statistics of the next-token distribution at scored tokens, without logits of size tokens × vocabulary.

`token_statistics` walks over the scored tokens in chunks. Within a chunk it multiplies hidden states with the
vocabulary projection once, reduces the logits to float32 numbers per token, and forgets them; its backward pass
recomputes them and applies the analytic derivative of every statistic, written beside the statistic in `STATISTICS`.
A projection that is not differentiated costs no third product, and no gradient of its size exists.
To add one: a value, a derivative with respect to the logits, a line in the table.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Float, Int

CHUNK = 2048  # tokens; each chunk reads the whole projection forward, and reads and writes its gradient backward


class _Logits(NamedTuple):
    """A chunk's distribution, all float32 [chunk, vocab] but for the targets."""

    log_probs: Array
    targets: Int[Array, " chunk"]
    reference: Array  # log-probs of the reference model; of no rows unless a statistic compares the two
    slope: Array | None = None  # derivative of these logits with respect to the projection's, where they are capped


def _logps(z: _Logits) -> Array:
    return jnp.take_along_axis(z.log_probs, z.targets[:, None], axis=1)[:, 0]


def _d_logps(z: _Logits, value: Array) -> Array:
    del value
    return (jnp.arange(z.log_probs.shape[1])[None] == z.targets[:, None]) - jnp.exp(z.log_probs)


def _sum_squares(z: _Logits) -> Array:
    return jax.nn.logsumexp(2 * z.log_probs, axis=1)


def _d_sum_squares(z: _Logits, value: Array) -> Array:
    return 2 * (jnp.exp(2 * z.log_probs - value[:, None]) - jnp.exp(z.log_probs))


def _entropies(z: _Logits) -> Array:
    return -(jnp.exp(z.log_probs) * z.log_probs).sum(axis=1)


def _d_entropies(z: _Logits, value: Array) -> Array:
    return -jnp.exp(z.log_probs) * (z.log_probs + value[:, None])


def _kl(z: _Logits) -> Array:
    return (jnp.exp(z.reference) * (z.reference - z.log_probs)).sum(axis=1)


def _d_kl(z: _Logits, value: Array) -> Array:
    del value
    return jnp.exp(z.log_probs) - jnp.exp(z.reference)


STATISTICS: dict[str, tuple[Callable[[_Logits], Array], Callable[[_Logits, Array], Array]]] = {
    "logps": (_logps, _d_logps),  # log π(token), nats
    "sum_squares": (_sum_squares, _d_sum_squares),  # log Σ_v π(v)²
    "entropies": (_entropies, _d_entropies),  # -Σ_v π(v) log π(v), nats
    "kl": (_kl, _d_kl),  # Σ_v π_ref(v) log(π_ref(v) / π(v)), nats
}


def log_probs(
    hidden: Float[Array, "tokens embed"], weights: Float[Array, "vocab embed"], softcap: float | None = None
) -> Float[Array, "tokens vocab"]:
    """Log-probs of every next token, nats, float32; both operands in the compute dtype.

    Args:
        hidden: States that predict a token.
        weights: The vocabulary projection.
        softcap: Logits z become c·tanh(z/c); None: they stay.
    """
    return jax.nn.log_softmax(_logits(hidden, weights, softcap), axis=1)


def _logits(hidden: Array, weights: Array, softcap: float | None) -> Array:
    logits = _product(hidden, weights, ((1,), (1,)))
    return logits if softcap is None else softcap * jnp.tanh(logits / softcap)


def token_statistics(
    hidden: Float[Array, "tokens embed"],
    projection: Float[Array, "vocab embed"],
    targets: Int[Array, " tokens"],
    count: Int[Array, ""],
    *,
    names: tuple[str, ...] = ("logps",),
    reference_hidden: Float[Array, "tokens reference_embed"] | None = None,
    reference_projection: Float[Array, "vocab reference_embed"] | None = None,
    softcap: float | None = None,
    reference_softcap: float | None = None,
    chunk: int = CHUNK,
) -> dict[str, Float[Array, " tokens"]]:
    """Named statistics of the distribution that each hidden state predicts, float32.

    Differentiable with respect to `hidden` and `projection` through every statistic; the reference gets no gradient.

    Args:
        hidden: States that predict a scored token, in the compute dtype.
        projection: Vocabulary projection, in the dtype of the parameters: it is cast once, and its gradient has that
            dtype, so that devices sum it in float32.
        targets: The scored tokens.
        count: Leading tokens that are real; the loops end behind them, and what lies behind is 0 and passes no
            gradient.
        names: Keys of `STATISTICS`.
        reference_hidden: States of the reference model at the same tokens; only with "kl".
        reference_projection: The reference model's projection; only with "kl".
        softcap: Logits z become c·tanh(z/c); None: they stay.
        reference_softcap: Likewise those of the reference.
        chunk: Tokens a chunk; a multiple of the device's tile, more than there are tokens is cut down.

    Raises:
        ValueError: If a name is unknown, or "kl" and the reference operands do not come together.
    """
    unknown = set(names) - set(STATISTICS)
    if unknown:
        raise ValueError(f"unknown statistics {sorted(unknown)}; there are {sorted(STATISTICS)}.")
    if ("kl" in names) != (reference_hidden is not None) or (reference_hidden is None) != (
        reference_projection is None
    ):
        raise ValueError('the statistic "kl" and both reference operands come together or not at all.')
    tokens = len(hidden)
    chunk = min(chunk, tokens)
    padding = -tokens % chunk
    hidden, targets = jnp.pad(hidden, ((0, padding), (0, 0))), jnp.pad(targets, (0, padding))
    reference = None
    if reference_hidden is not None and reference_projection is not None:
        reference_weights = reference_projection.astype(reference_hidden.dtype)
        reference = jax.lax.stop_gradient((jnp.pad(reference_hidden, ((0, padding), (0, 0))), reference_weights))
    caps, count = (softcap, reference_softcap), jnp.minimum(count, tokens)
    values: Any = _statistics(hidden, projection, targets, count, reference, names, caps, chunk)
    return {name: value[:tokens] for name, value in zip(names, values, strict=True)}


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7))
def _statistics(hidden, projection, targets, count, reference, names, caps, chunk):
    weights = projection.astype(hidden.dtype)

    def visit(step, values):
        at = step * chunk
        logits = _chunk_logits(hidden, weights, targets, reference, at, caps, chunk)
        real = at + jnp.arange(chunk) < count
        new = (jnp.where(real, STATISTICS[name][0](logits), 0) for name in names)
        return tuple(jax.lax.dynamic_update_slice(v, n, (at,)) for v, n in zip(values, new, strict=True))

    start = tuple(jnp.zeros(len(hidden), jnp.float32) for _ in names)
    return jax.lax.fori_loop(0, (count + chunk - 1) // chunk, visit, start)


def _forward(hidden, projection, targets, count, reference, names, caps, chunk):
    given = jax.tree.map(lambda x: x.value, (hidden, projection, targets, count, reference))
    values = _statistics(*given, names, caps, chunk)
    return values, (*given, values, () if projection.perturbed else None)


def _backward(names, caps, chunk, residuals, cotangents):
    hidden, projection, targets, count, reference, values, is_trained = residuals
    cotangents = [None if isinstance(c, SymbolicZero) else c for c in cotangents]
    weights = projection.astype(hidden.dtype)

    def visit(step, carry):
        d_hidden, d_projection = carry
        at = step * chunk
        logits = _chunk_logits(hidden, weights, targets, reference, at, caps, chunk)
        real = at + jnp.arange(chunk) < count
        d_logits = jnp.zeros_like(logits.log_probs)
        for name, value, cotangent in zip(names, values, cotangents, strict=True):
            if cotangent is None:
                continue
            value, cotangent = (jax.lax.dynamic_slice(x, (at,), (chunk,)) for x in (value, cotangent))
            d_logits += jnp.where(real, cotangent, 0)[:, None] * STATISTICS[name][1](logits, value)
        if logits.slope is not None:
            d_logits *= logits.slope
        d_logits = d_logits.astype(hidden.dtype)  # the two products below run in the compute dtype, summed in float32
        d_states = _product(d_logits, weights, ((1,), (0,))).astype(hidden.dtype)
        if d_projection is not None:
            states = jax.lax.dynamic_slice_in_dim(hidden, at, chunk)
            d_projection += _product(d_logits, states, ((0,), (0,)))
        return jax.lax.dynamic_update_slice_in_dim(d_hidden, d_states, at, axis=0), d_projection

    start = jnp.zeros_like(hidden), None if is_trained is None else jnp.zeros(projection.shape, jnp.float32)
    d_hidden, d_projection = jax.lax.fori_loop(0, (count + chunk - 1) // chunk, visit, start)
    d_projection = None if d_projection is None else d_projection.astype(projection.dtype)
    return d_hidden, d_projection, None, None, None


_statistics.defvjp(_forward, _backward, symbolic_zeros=True)


def _chunk_logits(hidden, projection, targets, reference, at, caps, chunk) -> _Logits:
    def chunk_of(states, weights, cap):
        return _logits(jax.lax.dynamic_slice_in_dim(states, at, chunk), weights, cap)

    logits = chunk_of(hidden, projection, caps[0])
    other = jnp.zeros((0, 0))
    if reference is not None:
        other = jax.nn.log_softmax(chunk_of(reference[0], reference[1], caps[1]), axis=1)
    return _Logits(
        jax.nn.log_softmax(logits, axis=1),
        jax.lax.dynamic_slice(targets, (at,), (chunk,)),
        other,
        None if caps[0] is None else 1 - jnp.square(logits / caps[0]),
    )


def _product(x: Array, y: Array, contract: tuple[tuple[int], tuple[int]]) -> Array:
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else jax.lax.Precision.DEFAULT
    return jax.lax.dot_general(x, y, (contract, ((), ())), precision=precision, preferred_element_type=jnp.float32)
