"""Attention on packed rows with shared prompts.

The rule, once: query i attends to key j of its row iff they lie in the same segment (not 0), j <= i, and key j belongs
to the prompt (branch 0) or to the branch of query i; under a window w also positions[i] - positions[j] < w. Padding
attends to nothing: its output is 0 and its gradients are finite.

`visible` states the rule as a mask; `dense` attends through that mask and is the oracle of every other implementation.
The others see the rule in gathered terms: `key_layout` lays the keys of a row out as [prompt, response 1 | prompt,
response 2 | …], where what a query may see is one contiguous range, `first[i] … last[i]`. Only keys and values of the
prompt are repeated.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

MASKED = -1e30  # finite, so that a row of masked scores stays finite


class KeyLayout(NamedTuple):
    """Where the keys of a row lie once gathered, and what each query sees of them.

    Attributes:
        source: Position in the row of each gathered key; 0 where there is none.
        begins: First gathered key of the sequence that each gathered key belongs to; 0 where there is none.
        copies: Gathered index of each position's copy in each branch; `keys` where there is none.
        first: First gathered key that each query sees.
        last: Last one, the query's own key; smaller than `first` for padding, which sees nothing.

    A device may have some of a row's queries only; all else is of the whole row.
    """

    source: Int[Array, "rows keys"]
    begins: Int[Array, "rows keys"]
    copies: Int[Array, "rows length responses"]
    first: Int[Array, "rows queries"]
    last: Int[Array, "rows queries"]

    def reordered(self, order: Int[np.ndarray, " length"]) -> "KeyLayout":
        """The same of rows whose tokens lie otherwise.

        Args:
            order: Which token lies in each place.
        """
        source = jnp.asarray(np.argsort(order), jnp.int32)[self.source]
        return KeyLayout(source, self.begins, *(x[:, order] for x in (self.copies, self.first, self.last)))


def visible(
    segments: Int[Array, "rows length"],
    branches: Int[Array, "rows length"],
    positions: Int[Array, "rows length"],
    window: int | None = None,
) -> Bool[Array, "rows length length"]:
    """The rule as a mask, true where query (axis 1) may attend to key (axis 2)."""
    query, key = (slice(None), slice(None), None), (slice(None), None, slice(None))
    index = jnp.arange(segments.shape[1])
    mask = (segments[query] == segments[key]) & (segments[query] > 0)
    mask &= (index[None, :] <= index[:, None])[None]
    mask &= (branches[key] == 0) | (branches[key] == branches[query])
    if window is not None:
        mask &= positions[query] - positions[key] < window
    return mask


def dense(
    queries: Float[Array, "rows length heads head_dim"],
    keys: Float[Array, "rows keys kv_heads head_dim"],
    values: Float[Array, "rows keys kv_heads head_dim"],
    mask: Bool[Array, "rows length keys"],
    *,
    scale: float | None = None,
    softcap: float | None = None,
) -> Float[Array, "rows length heads head_dim"]:
    """Grouped-query attention through a mask; the oracle. Costs and holds heads × length × keys scores.

    Args:
        queries: Of every head.
        keys: Each key-value head serves as many query heads.
        values: Likewise.
        mask: What each query sees.
        scale: Multiplies the scores; None: 1 / √head_dim.
        softcap: Scores s become c·tanh(s/c); None: they stay.
    """
    rows, length, heads, head_dim = queries.shape
    kv_heads = keys.shape[2]
    grouped = queries.reshape(rows, length, kv_heads, heads // kv_heads, head_dim)
    precision = precision_of(queries.dtype)
    scores = jnp.einsum("rqngd,rknd->rngqk", grouped, keys, precision=precision, preferred_element_type=jnp.float32)
    mask = mask[:, None, None]
    scores = capped(scores * (head_dim**-0.5 if scale is None else scale), softcap)
    scores = jnp.where(mask, scores, MASKED)
    weights = jnp.where(mask, jax.nn.softmax(scores, axis=-1), 0).astype(values.dtype)
    output = jnp.einsum("rngqk,rknd->rqngd", weights, values, precision=precision, preferred_element_type=jnp.float32)
    return checkpoint_name(output.reshape(queries.shape).astype(queries.dtype), "attention")


def key_layout(
    segments: Int[Array, "rows length"],
    branches: Int[Array, "rows length"],
    *,
    responses: int,
    keys: int,
    window: int | None = None,
) -> KeyLayout:
    """The rule in gathered terms.

    Args:
        segments: Example of each position, 0 for padding; examples lie one after another.
        branches: 0 for a shared prompt, else the response; responses lie in order behind their prompt.
        responses: K.
        keys: Capacity in gathered keys; the plan guarantees that it suffices.
        window: Sliding window in tokens, or None.
    """
    layout = functools.partial(_row_key_layout, responses=responses, keys=keys, window=window)
    return jax.vmap(layout)(segments, branches)


def _row_key_layout(segments, branches, *, responses, keys, window) -> KeyLayout:
    length = len(segments)
    index = jnp.arange(length, dtype=jnp.int32)
    branch = jnp.arange(1, responses + 1, dtype=jnp.int32)
    # Ends of each position's segment; padding in front of, between or behind examples is a segment of its own.
    opens = jnp.concatenate([jnp.ones(1, bool), segments[1:] != segments[:-1]])
    begin = jax.lax.cummax(jnp.where(opens, index, 0))
    closes = jnp.concatenate([opens[1:], jnp.ones(1, bool)])
    end = jax.lax.cummin(jnp.where(closes, index, length - 1), reverse=True)
    # A response has tokens of its branch; the prompt is copied in front of each response that there is.
    own = (branches[:, None] == branch[None]) & (segments > 0)[:, None]
    own_before = _exclusive_cumsum(own)
    exists = own_before[end] + own[end] - own_before[begin] > 0
    member = own | ((branches == 0) & (segments > 0))[:, None] & exists
    before = _exclusive_cumsum(member)
    in_segment = before[end] + member[end] - before[begin]
    group = before[begin].sum(axis=1, keepdims=True) + _exclusive_cumsum(in_segment, axis=1)
    copies = group + before - before[begin]
    # A response sees through its own branch, the prompt through the first response's copy.
    through = jnp.argmax(member, axis=1)[:, None]
    first = jnp.take_along_axis(group, through, axis=1)[:, 0]
    last = jnp.take_along_axis(copies, through, axis=1)[:, 0]
    if window is not None:
        first = jnp.maximum(first, last - window + 1)  # gathered neighbours are neighbours in position
    seen = member.any(axis=1)
    first, last = jnp.where(seen, first, 0), jnp.where(seen, last, -1)
    copies = jnp.where(member, copies, keys)
    source = jnp.zeros(keys, jnp.int32).at[copies].set(index[:, None], mode="drop")
    begins = jnp.zeros(keys, jnp.int32).at[copies].set(group, mode="drop")
    return KeyLayout(source, begins, copies, first, last)


def _exclusive_cumsum(x: Array, axis: int = 0) -> Array:
    x = x.astype(jnp.int32)
    return jnp.cumsum(x, axis=axis) - x


def gather_keys(x: Float[Array, "rows length kv_heads head_dim"], layout: KeyLayout) -> Array:
    """Keys or values in gathered order, [rows, keys, kv_heads, head_dim]; its backward pass is a gather as well."""
    return gather(x, layout.source, layout.copies)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def gather(
    x: Float[Array, "rows length heads head_dim"],
    source: Int[Array, "rows gathered"],
    copies: Int[Array, "rows length most"],
    empty: float = 0.0,
) -> Float[Array, "rows gathered heads head_dim"]:
    """Selects positions of each row, and sums cotangents by selecting as well: nothing is scattered.

    Args:
        x: What is selected from.
        source: Position of each that is wanted; one beyond the row stands for none.
        copies: Where each position went, at most so many times; one beyond all that is wanted stands for nowhere.
            What is wanted and stands in no copy gets no gradient.
        empty: What is put where there is none.
    """
    return jnp.take_along_axis(x, source[:, :, None, None], axis=1, mode="fill", fill_value=empty)


def _gather_forward(x, source, copies, empty):
    return gather(x, source, copies, empty), copies


def _gather_backward(empty, copies, cotangent):
    return sum_copies(cotangent, copies), None, None


gather.defvjp(_gather_forward, _gather_backward)


def sum_copies(
    x: Float[Array, "rows gathered *features"], copies: Int[Array, "rows length most"]
) -> Float[Array, "rows length *features"]:
    """Sums each position's copies: one selection for each of `most`, in place of a scatter that has no order.

    Args:
        x: Of what was selected.
        copies: Where each position went; one beyond all that was selected stands for nowhere.
    """
    total = jnp.zeros((*copies.shape[:2], *x.shape[2:]), x.dtype)
    for copy in range(copies.shape[2]):
        where = jnp.expand_dims(copies[:, :, copy], range(2, x.ndim))
        total += jnp.take_along_axis(x, where, axis=1, mode="fill", fill_value=0)
    return total


def capped(scores: Array, softcap: float | None) -> Array:
    """Scores s as c·tanh(s/c); None: as they are."""
    return scores if softcap is None else softcap * jnp.tanh(scores / softcap)


def precision_of(dtype: jax.typing.DTypeLike) -> jax.lax.Precision:
    """Float32 means float32: without this, TPUs multiply it in bfloat16 and GPUs in TF32."""
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else jax.lax.Precision.DEFAULT
