"""Attention on GPUs: every response behind its prompt as a sequence of its own, through cuDNN by JAX's public API.

cuDNN knows causal attention over sequences with padding behind, not rows with shared prompts. So queries, keys and
values are gathered into [prompt, response] sequences and the outputs gathered back; prompts attend once for each of
their responses, which is little beside the projections. How many sequences there are of which length is known only
when the batch is, while shapes must be static. Sorted from the longest on, the j-th sequence of a row has at most
1/j of its gathered keys: `classes` are shapes in which any row fits, of a few lengths, not of the longest alone.
"""

import functools
import itertools
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from daajax.ops.attention import gather, key_layout

LENGTH_MULTIPLE = 64  # of a class, tokens
RATIO = 2 / 3  # between the lengths of one class and the next


class Sequences(NamedTuple):
    """Where the tokens of a row lie in its sequences; places are counted through all classes.

    Attributes:
        source: Position in the row of each place of a class; beyond the row where there is none.
        lengths: Tokens of each sequence of a class; 1 where there is none, which nobody reads.
        copies: Place of each position in each branch; beyond all places where there is none.
        back: Place that each position's output is read from. Where there is none: one beyond the last for padding, and
            the one behind the last for what no plan allows, a sequence longer than its class, which puts out NaN.
        reader: Position that reads the output of each place; beyond the row where nobody does.
        window: Which of the windows of `attend` holds; each kind of layer has its own.
    """

    source: tuple[Int[Array, "rows _ _"], ...]
    lengths: tuple[Int[Array, "rows _"], ...]
    copies: Int[Array, "rows length responses"]
    back: Int[Array, "rows length"]
    reader: Int[Array, "rows places"]
    window: Int[Array, " rows"]

    def reordered(self, order: Int[np.ndarray, " length"]) -> "Sequences":
        """The same of rows whose tokens lie otherwise.

        Args:
            order: Which token lies in each place.
        """
        place = jnp.asarray([*np.argsort(order), len(order)], jnp.int32)
        return self._replace(
            source=tuple(place[part] for part in self.source),
            copies=self.copies[:, order],
            back=self.back[:, order],
            reader=place[self.reader],
        )


def classes(count: int, *, keys: int, longest: int) -> tuple[tuple[int, int], ...]:
    """Sequences and tokens of each, by class, the longest first: any row's sequences, sorted, fit into them.

    Args:
        count: Most sequences of a row.
        keys: Most tokens of all of them together.
        longest: Most tokens of one.
    """

    def most(done: int) -> int:
        """Tokens of the next sequence behind so many longer ones, rounded up."""
        tokens = min(longest, keys // (done + 1))
        return max(1, -(-tokens // LENGTH_MULTIPLE)) * LENGTH_MULTIPLE

    found, done = [], 0
    while done < count:
        size = most(done)
        end = next((place for place in range(done + 1, count) if most(place) <= size * RATIO), count)
        found.append((end - done, size))
        done = end
    return tuple(found)


def sequences(
    segments: Int[Array, "rows length"],
    branches: Int[Array, "rows length"],
    *,
    slots: int,
    responses: int,
    keys: int,
    longest: int | None = None,
    window: int = 0,
) -> Sequences:
    """The rule as causal sequences.

    Args:
        segments: Example of each position counted from 1, 0 for padding; examples lie one after another.
        branches: 0 for a shared prompt, else the response; responses lie in order behind their prompt.
        slots: Most examples of a row.
        responses: K.
        keys: Capacity in gathered keys; the plan guarantees that it suffices.
        longest: Most tokens of a prompt with one response; None: no less than the row has.
        window: Which of the windows of `attend` holds.
    """
    rows, length = segments.shape
    most = min(length, keys) if longest is None else min(length, keys, longest)
    layout = key_layout(segments, branches, responses=responses, keys=keys)
    # Gathered keys lie sequence by sequence in this very order: slot by slot, response by response.
    slot = jnp.arange(1, slots + 1, dtype=jnp.int32)
    member = (segments[:, :, None] == slot[None, None])[..., None] & (layout.copies < keys)[:, :, None]
    tokens = member.sum(axis=1, dtype=jnp.int32).reshape(rows, -1)
    shapes = classes(slots * responses, keys=keys, longest=most)
    places = jax.vmap(functools.partial(_places, shapes=shapes))(
        tokens, layout.source, layout.copies, layout.first, layout.last
    )
    return Sequences(*places, window=jnp.full(rows, window, jnp.int32))


def _places(
    tokens: Int[Array, " sequences"],
    source: Int[Array, " keys"],
    copies: Int[Array, "length responses"],
    first: Int[Array, " length"],
    last: Int[Array, " length"],
    shapes: Sequence[tuple[int, int]],
) -> tuple[Any, ...]:
    """Of one row, what `Sequences` says of it."""
    length, keys, places = len(first), len(source), sum(count * size for count, size in shapes)
    order = jnp.argsort(-tokens, stable=True)
    rank = jnp.argsort(order)
    room = jnp.concatenate([jnp.full(count, size, jnp.int32) for count, size in shapes])[rank]
    begin = (jnp.cumsum(room[order]) - room[order])[rank]
    ends = jnp.cumsum(tokens)

    def place_of(gathered: Array) -> Array:
        """Place of a gathered key; the one behind the last where there is none."""
        sequence = jnp.minimum(jnp.searchsorted(ends, gathered, side="right"), len(tokens) - 1)
        within = gathered - (ends - tokens)[sequence]
        fits = (gathered < ends[-1]) & (within < room[sequence])
        return jnp.where(fits, begin[sequence] + within, places)

    def at_places(where: Array, values: Array) -> Array:
        return jnp.full(places, length, jnp.int32).at[where].set(values, mode="drop")

    sources = at_places(place_of(jnp.arange(keys, dtype=jnp.int32)), source)
    back = jnp.where(last >= first, place_of(last), places + 1)
    counts, sizes = zip(*shapes, strict=True)
    bounds = list(itertools.accumulate((count * size for count, size in shapes[:-1])))
    parts = jnp.split(sources, bounds) if bounds else [sources]
    lengths = jnp.split(tokens[order], list(itertools.accumulate(counts[:-1]))) if bounds else [tokens[order]]
    return (
        tuple(part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)),
        tuple(jnp.clip(found, 1, size) for found, size in zip(lengths, sizes, strict=True)),
        jnp.where(copies < keys, place_of(copies), places),
        back,
        at_places(back, jnp.arange(length, dtype=jnp.int32)),
    )


def attend(
    queries: Float[Array, "rows length heads head_dim"],
    keys: Float[Array, "rows length kv_heads head_dim"],
    values: Float[Array, "rows length kv_heads head_dim"],
    layout: Sequences,
    *,
    scale: float | None = None,
    windows: Sequence[int | None] = (None,),
    implementation: Literal["cudnn", "xla"] = "cudnn",
) -> Float[Array, "rows length heads head_dim"]:
    """Grouped-query attention over sequences.

    Args:
        queries: Of every head.
        keys: Each key-value head serves as many query heads.
        values: Likewise.
        layout: Where every token lies in the sequences.
        scale: Multiplies the scores; None: 1 / √head_dim.
        windows: Sliding windows in tokens, or None; `layout.window` says which of them holds.
        implementation: Of `jax.nn.dot_product_attention`; `xla` is its twin on any platform, for tests.
    """
    attend = functools.partial(_attend, scale=scale, windows=tuple(windows), implementation=implementation)
    # What is gathered is gathered again in the backward pass instead of being kept; what cuDNN puts out is kept.
    return jax.checkpoint(attend, policy=lambda primitive, *_, **__: primitive.name.startswith("dot_product"))(
        queries, keys, values, layout
    )


def _attend(queries, keys, values, layout: Sequences, *, scale, windows, implementation) -> Array:
    source = jnp.concatenate([part.reshape(len(part), -1) for part in layout.source], axis=1)
    gathered = [gather(queries, source, layout.back[:, :, None])]
    gathered += [gather(x, source, layout.copies) for x in (keys, values)]

    def under(window: int | None, *gathered: Array) -> Array:
        outputs, done = [], 0
        for part, lengths in zip(layout.source, layout.lengths, strict=True):
            rows, count, size = part.shape
            whole = (x[:, done : done + count * size].reshape(rows * count, size, *x.shape[2:]) for x in gathered)
            output = jax.nn.dot_product_attention(
                *whole,
                scale=scale,
                is_causal=True,
                query_seq_lengths=lengths.reshape(-1),
                key_value_seq_lengths=lengths.reshape(-1),
                local_window_size=None if window is None or window >= size else (window - 1, 0),
                implementation=implementation,
            )
            outputs.append(output.reshape(rows, count * size, *output.shape[2:]))
            done += count * size
        return jnp.concatenate(outputs, axis=1)

    # The same for all rows: it is a property of the layer.
    attended = jax.lax.switch(layout.window[0], [functools.partial(under, window) for window in windows], *gathered)
    output: Array = gather(attended, layout.back, layout.reader[:, :, None], float("nan"))
    return jnp.where((layout.back <= source.shape[1])[:, :, None, None], output, 0)
