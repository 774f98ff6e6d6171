"""The head's form `row`: see `daajax.ops.head`."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from daajax.ops.logits import (
    PROJECTION,
    ROWS,
    VOCAB,
    WHOLE,
    Head,
    around,
    d_logits_of,
    distributions,
    gradient_over_tokens,
    into_hidden,
    operands_of,
    product,
    values_of,
)
from daajax.ops.slots import Chunks, Slots, padded
from daajax.ops.statistics import Normalizer


def row_gradients(
    head: Head,
    hidden: Float[Array, "rows scored embed"],
    projection: Float[Array, "vocab embed"],
    targets: Int[Array, "rows scored"],
    real: Bool[Array, "rows scored"],
    *reference: Float[Array, "..."],
    of_row: Callable[[dict[str, Array], Any, Any], tuple[dict[str, Array], Any]],
    columns: Any,
    shared: Any,
    is_trained: bool = True,
) -> tuple[Any, Float[Array, "rows scored embed"], Float[Array, "vocab embed"] | None]:
    """What a function of a row's statistics gives, and its gradient pulled back: each row's logits are made once.

    Args:
        head: What to compute; it holds the logits of a row, scored × vocabulary in float32.
        hidden: As for `token_statistics`.
        projection: Likewise.
        targets: Likewise.
        real: Likewise.
        *reference: Likewise.
        of_row: From the statistics of a row, each [scored], its columns and what is shared, to the gradient of the loss
            with respect to each statistic and whatever else is wanted.
        columns: What `of_row` reads of each row: a tree of [rows, …].
        shared: What it reads besides.
        is_trained: Whether to make a gradient of the projection.

    Returns:
        What else `of_row` gave, [rows, …]; gradients of hidden states and of the projection, None if it is not trained.
    """
    slots, weights = operands_of(head, hidden, projection, targets, real, reference)
    scored = real.shape[1]

    def one_row(shared: Any, weights: tuple[Array, ...], total: tuple[Array, ...], operands: Any) -> Any:
        slots, columns = jax.tree.map(lambda x: x[None], operands[0]), operands[1]
        chunks = Chunks.of(slots.real, head.chunk, head.devices)

        def score(step, found):
            mine = chunks.take(slots, step)
            d = distributions(head, mine, weights)
            new = (values_of(head, d, mine.real), d.normalizer)
            return chunks.put(found[0], new, step), jax.lax.dynamic_update_index_in_dim(found[1], d.logits, step, 0)

        nothing = jnp.zeros(slots.real.shape, jnp.float32)
        start = tuple(nothing for _ in head.names), Normalizer(nothing, nothing)
        room = jnp.zeros((nothing.shape[1] // chunks.size, chunks.size, len(weights[0])), jnp.float32)
        known, logits = jax.lax.fori_loop(0, chunks.count, score, (start, room))
        values = {name: value[0, :scored] for name, value in zip(head.names, known[0], strict=True)}
        gradient, found = of_row(values, columns, shared)
        cotangents = tuple(padded(gradient[name][None], 1, head.chunk) for name in head.names)

        def pull(step, carry):
            mine, (values, normalizer), given = (chunks.take(x, step) for x in (slots, known, cotangents))
            d = around(head, logits[step], mine, weights, normalizer)
            given = tuple(jnp.where(mine.real, c, 0) for c in given)
            d_logits = d_logits_of(head, d, values, given, mine.hidden.dtype)
            d_hidden = chunks.put(carry[0], into_hidden(head, d_logits, weights), step)
            return d_hidden, *(total + product(d_logits, mine.hidden, (0, 0)) for total in carry[1:])

        d_hidden, *totals = jax.lax.fori_loop(0, chunks.count, pull, (jnp.zeros_like(slots.hidden), *total))
        return tuple(totals), (found, d_hidden[0])

    def of_part(slots: Slots, columns: Any, weights: tuple[Array, ...], shared: Any) -> Any:
        start = tuple(jnp.zeros(weights[0].shape, jnp.float32) for _ in range(is_trained))
        total, found = jax.lax.scan(functools.partial(one_row, shared, weights), start, (slots, columns))
        return *found, *(gradient_over_tokens(head, x) for x in total)

    out = (ROWS, ROWS, PROJECTION) if is_trained else (ROWS, ROWS)
    run = head.devices.local(of_part, (ROWS, ROWS, VOCAB, WHOLE), out)
    found, d_hidden, *d_projection = run(padded(slots, 1, head.chunk), columns, weights, shared)
    return found, d_hidden[:, :scored], d_projection[0].astype(projection.dtype) if is_trained else None


def row_bytes(scored: int, vocab: int, parts: int) -> int:
    """What the row form holds of a row's logits on each device, bytes.

    Args:
        scored: Scored slots of a row.
        vocab: Size of the vocabulary.
        parts: Devices it is cut up over.
    """
    return -(-vocab // parts) * scored * 4
