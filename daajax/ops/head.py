"""The head: statistics of the distributions that scored tokens are drawn from, without logits of tokens × vocabulary.

One product of hidden states with the vocabulary projection makes logits, a second one their gradient into hidden
states, a third one into the projection. Three forms differ in what they keep between the first and the others:

- `token`: nothing but a few numbers a token. The backward pass makes the logits again: four products. For anything.
- `frozen`: for a projection that is not trained, the direction that each statistic moves the hidden state in, made
  beside the statistic. The backward pass multiplies it with one number a token: two products.
- `row`: the logits of one row, whole. A row holds whole examples, so that a loss which does not couple rows is
  differentiated with respect to the row's statistics while its logits are there: three products.

Scored slots fill up from the front of each row; loops over chunks of them end behind the last one that is real. The
vocabulary may be cut up over devices.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Bool, Float, Int

from daajax.ops.logits import (
    PROJECTION,
    SLOTS,
    VOCAB,
    Head,
    d_logits_of,
    distributions,
    gradient_over_tokens,
    into_hidden,
    operands_of,
    product,
    values_of,
    weights_of,
)
from daajax.ops.slots import Chunks, Slots, padded
from daajax.ops.statistics import Normalizer


def token_statistics(
    head: Head,
    hidden: Float[Array, "rows scored embed"],
    projection: Float[Array, "vocab embed"],
    targets: Int[Array, "rows scored"],
    real: Bool[Array, "rows scored"],
    *reference: Float[Array, "..."],
) -> dict[str, Float[Array, "rows scored"]]:
    """Named statistics of the distribution that each hidden state predicts, float32.

    Differentiable with respect to `hidden` and `projection` through every statistic; the reference gets no gradient. A
    projection that is not differentiated costs no third product, and no gradient of its size exists.

    Args:
        head: What to compute.
        hidden: States that predict a scored token, in the compute dtype.
        projection: Vocabulary projection, in the dtype of the parameters: it is cast once, and its gradient has that
            dtype, so that devices sum it in float32.
        targets: The scored tokens.
        real: Which slots hold one; the others are 0 and pass no gradient.
        *reference: With "kl", states of the reference model at the same tokens, and its projection.

    Raises:
        ValueError: If "kl" and the reference operands do not come together, or the projection is differentiated by a
            head that takes it as frozen.
    """
    slots, weights = operands_of(head, hidden, projection, targets, real, reference)
    values: Any = _statistics(head, slots, projection, weights[1:])
    return dict(zip(head.names, values, strict=True))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _statistics(head, slots, projection, others):
    return _score(head, slots, (weights_of(head, projection, slots.hidden.dtype), *others))[0]


def _forward(head, slots, projection, others):
    is_trained = projection.perturbed
    slots, projection, others = jax.tree.map(lambda x: x.value, (slots, projection, others))
    weights = (weights_of(head, projection, slots.hidden.dtype), *others)
    if not head.is_frozen:
        values, normalizer, _ = _score(head, slots, weights)
        return values, (slots, projection, others, (values, normalizer), () if is_trained else None)
    if is_trained:
        raise ValueError("a head with a frozen projection makes no gradient of it, and one is asked for.")
    values, _, directions = _score(head, slots, weights, with_directions=True)
    return values, (slots.real, directions)


def _backward(head, residuals, cotangents):
    cotangents = tuple(None if isinstance(c, SymbolicZero) else c for c in cotangents)
    if head.is_frozen:
        real, directions = residuals
        moved = jnp.zeros(directions[0].shape, jnp.float32)
        for cotangent, direction in zip(cotangents, directions, strict=True):
            if cotangent is not None:
                moved += jnp.where(real, cotangent, 0)[:, :, None] * direction
        return _d_slots(moved.astype(directions[0].dtype), "kl" in head.names), None, ("kl" in head.names) * (None,)
    slots, projection, others, known, is_trained = residuals
    weights = (weights_of(head, projection, slots.hidden.dtype), *others)
    d_hidden, *d_projection = _pull(head, slots, weights, known, cotangents, is_trained=is_trained is not None)
    d_weights = d_projection[0].astype(projection.dtype) if d_projection else None
    return _d_slots(d_hidden, bool(others)), d_weights, tuple(None for _ in others)


def _d_slots(d_hidden: Any, has_reference: bool) -> Any:
    nothing: Any = None
    return Slots(d_hidden, nothing, nothing, (nothing,) if has_reference else ())


_statistics.defvjp(_forward, _backward, symbolic_zeros=True)


def _score(
    head: Head, slots: Slots, weights: tuple[Array, ...], *, with_directions: bool = False
) -> tuple[tuple[Array, ...], Normalizer, tuple[Array, ...]]:
    """Values of the statistics, normalizer, and where asked for how each moves the hidden state; [rows, scored, …]."""

    def of_part(slots: Slots, weights: tuple[Array, ...]) -> Any:
        scored, slots = slots.real.shape[1], padded(slots, len(slots.real), head.chunk)
        chunks, names = Chunks.of(slots.real, head.chunk, head.devices), head.names if with_directions else ()

        def visit(step, found):
            mine = chunks.take(slots, step)
            d = distributions(head, mine, weights)
            values = values_of(head, d, mine.real)
            ones = tuple(jnp.ones(len(mine.real)) for _ in values)
            directions = tuple(
                into_hidden(head, d_logits_of(head, d, values, _only(ones, place), slots.hidden.dtype), weights)
                for place, _ in enumerate(names)
            )
            return chunks.put(found, (values, d.normalizer, directions), step)

        nothing = jnp.zeros(slots.real.shape, jnp.float32)
        start = (tuple(nothing for _ in head.names), Normalizer(nothing, nothing))
        start = (*start, tuple(jnp.zeros_like(slots.hidden) for _ in names))
        return jax.tree.map(lambda x: x[:, :scored], jax.lax.fori_loop(0, chunks.count, visit, start))

    return head.devices.local(of_part, (SLOTS, VOCAB), SLOTS)(slots, weights)


def _only(values: tuple[Any, ...], place: int) -> tuple[Any, ...]:
    """One of several values, and None in place of the others."""
    return tuple(value if here == place else None for here, value in enumerate(values))


def _pull(
    head: Head, slots: Slots, weights: tuple[Array, ...], known: Any, cotangents: Any, *, is_trained: bool
) -> tuple[Array, ...]:
    """Gradients of hidden states and, where it is trained, of the projection, float32."""

    def of_part(slots: Slots, known: Any, cotangents: Any, weights: tuple[Array, ...]) -> Any:
        rows, scored = slots.real.shape
        slots, known, cotangents = (padded(x, rows, head.chunk) for x in (slots, known, cotangents))
        chunks = Chunks.of(slots.real, head.chunk, head.devices)

        def visit(step, carry):
            mine, (values, normalizer), given = (chunks.take(x, step) for x in (slots, known, cotangents))
            d = distributions(head, mine, weights, normalizer)
            given = tuple(None if c is None else jnp.where(mine.real, c, 0) for c in given)
            d_logits = d_logits_of(head, d, values, given, mine.hidden.dtype)
            d_hidden = chunks.put(carry[0], into_hidden(head, d_logits, weights), step)
            return d_hidden, *(total + product(d_logits, mine.hidden, (0, 0)) for total in carry[1:])

        start = jnp.zeros_like(slots.hidden), *(jnp.zeros(weights[0].shape, jnp.float32) for _ in range(is_trained))
        d_hidden, *d_projection = jax.lax.fori_loop(0, chunks.count, visit, start)
        return d_hidden[:, :scored], *(gradient_over_tokens(head, total) for total in d_projection)

    out = (SLOTS, PROJECTION) if is_trained else (SLOTS,)
    return head.devices.local(of_part, (SLOTS, SLOTS, SLOTS, VOCAB), out)(slots, known, cotangents, weights)
