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
from jaxtyping import Array, Bool, Float, Int

QUERY_BLOCK = 64  # the fastest pair on CPU of 32 to 256 by 64 to 512
KEY_BLOCK = 64
_MASKED = -1e30  # finite, so that a row of masked scores stays finite


class KeyLayout(NamedTuple):
    """Where the keys of a row lie once gathered, and what each query sees of them.

    Attributes:
        source: Position in the row of each gathered key; 0 where there is none.
        copies: Gathered index of each position's copy in each branch; `keys` where there is none.
        first: First gathered key that each query sees.
        last: Last one, the query's own key; smaller than `first` for padding, which sees nothing.
    """

    source: Int[Array, "rows keys"]
    copies: Int[Array, "rows length responses"]
    first: Int[Array, "rows length"]
    last: Int[Array, "rows length"]


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
    precision = _precision(queries.dtype)
    scores = jnp.einsum("rqngd,rknd->rngqk", grouped, keys, precision=precision, preferred_element_type=jnp.float32)
    mask = mask[:, None, None]
    scores = _capped(scores * (head_dim**-0.5 if scale is None else scale), softcap)
    scores = jnp.where(mask, scores, _MASKED)
    weights = jnp.where(mask, jax.nn.softmax(scores, axis=-1), 0).astype(values.dtype)
    output = jnp.einsum("rngqk,rknd->rqngd", weights, values, precision=precision, preferred_element_type=jnp.float32)
    return output.reshape(queries.shape).astype(queries.dtype)


def _capped(scores: Array, softcap: float | None) -> Array:
    return scores if softcap is None else softcap * jnp.tanh(scores / softcap)


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
    return KeyLayout(source, copies, first, last)


def _exclusive_cumsum(x: Array, axis: int = 0) -> Array:
    x = x.astype(jnp.int32)
    return jnp.cumsum(x, axis=axis) - x


@jax.custom_vjp
def gather_keys(x: Float[Array, "rows length kv_heads head_dim"], layout: KeyLayout) -> Array:
    """Keys or values in gathered order, [rows, keys, kv_heads, head_dim]; its backward pass is a gather as well."""
    return jnp.take_along_axis(x, layout.source[:, :, None, None], axis=1)


def _gather_keys_forward(x, layout):
    return gather_keys(x, layout), layout


def _gather_keys_backward(layout, cotangent):
    total = 0
    for branch in range(layout.copies.shape[2]):
        copy = layout.copies[:, :, branch, None, None]
        total += jnp.take_along_axis(cotangent, copy, axis=1, mode="fill", fill_value=0)
    return total, None


gather_keys.defvjp(_gather_keys_forward, _gather_keys_backward)


def blockwise(
    queries: Float[Array, "rows length heads head_dim"],
    keys: Float[Array, "rows length kv_heads head_dim"],
    values: Float[Array, "rows length kv_heads head_dim"],
    layout: KeyLayout,
    *,
    scale: float | None = None,
    softcap: float | None = None,
) -> Float[Array, "rows length heads head_dim"]:
    """Grouped-query attention that visits only the keys a block of queries can see; plain XLA, any platform.

    A block of queries walks over its visible range of gathered keys, a block at a time, with a running softmax.
    Neither the mask nor the scores of a row ever exist; the backward pass recomputes them from the saved log-sum-exp
    (Dao et al. 2022, https://arxiv.org/abs/2205.14135).
    Arguments are those of `dense`, with the rule in gathered terms.
    """
    rows, length, heads, head_dim = queries.shape
    kv_heads = keys.shape[2]
    padding = -length % QUERY_BLOCK
    capacity = layout.source.shape[1]
    # One long row: blocks never straddle rows, and ranges of gathered keys shift by the row.
    shift = (jnp.arange(rows, dtype=jnp.int32) * capacity)[:, None]
    seen = layout.last >= layout.first
    first, last = jnp.where(seen, layout.first + shift, 0), jnp.where(seen, layout.last + shift, -1)
    first = jnp.pad(first, ((0, 0), (0, padding)))
    last = jnp.pad(last, ((0, 0), (0, padding)), constant_values=-1)
    queries = queries * (head_dim**-0.5 if scale is None else scale)
    queries = jnp.pad(queries, ((0, 0), (0, padding), (0, 0), (0, 0)))
    blocks = rows * (length + padding) // QUERY_BLOCK
    grouped = queries.reshape(blocks, QUERY_BLOCK, kv_heads, heads // kv_heads, head_dim)
    grouped = grouped.transpose(0, 2, 3, 1, 4).reshape(blocks, kv_heads, -1, head_dim)
    gathered = (_long_row(gather_keys(x, layout)) for x in (keys, values))
    output: Array = _walk(grouped, *gathered, first.reshape(blocks, -1), last.reshape(blocks, -1), softcap)
    output = output.reshape(blocks, kv_heads, heads // kv_heads, QUERY_BLOCK, head_dim).transpose(0, 3, 1, 2, 4)
    return output.reshape(rows, length + padding, heads, head_dim)[:, :length]


def _long_row(x: Float[Array, "rows keys kv_heads head_dim"]) -> Float[Array, "kv_heads all_keys head_dim"]:
    """All rows behind one another, heads in front, and one block of padding so that no slice is clamped."""
    x = x.transpose(2, 0, 1, 3).reshape(x.shape[2], -1, x.shape[3])
    return jnp.pad(x, ((0, 0), (0, KEY_BLOCK), (0, 0)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _walk(
    queries: Float[Array, "blocks kv_heads grouped_queries head_dim"],
    keys: Float[Array, "kv_heads all_keys head_dim"],
    values: Float[Array, "kv_heads all_keys head_dim"],
    first: Int[Array, "blocks query_block"],
    last: Int[Array, "blocks query_block"],
    softcap: float | None,
) -> Float[Array, "blocks kv_heads grouped_queries head_dim"]:
    return _walk_forward(queries, keys, values, first, last, softcap)[0]


def _walk_forward(queries, keys, values, first, last, softcap):
    def block(_, operands):
        query, first, last = operands

        def visit(step, carry):
            top, total, output = carry
            at = begin + step * KEY_BLOCK
            scores, _ = _scores(query, _slice(keys, at), at, first, last, softcap)
            new_top = jnp.maximum(top, scores.max(axis=-1))
            weights = jnp.exp(scores - new_top[..., None])
            keep = jnp.exp(top - new_top)
            total = total * keep + weights.sum(axis=-1)
            # Not rounded to the compute dtype: these weights are relative to a maximum that depends on where blocks
            # begin, and so on the layout.
            update = _matmul("nqk,nkd->nqd", weights, _slice(values, at).astype(jnp.float32))
            return new_top, total, output * keep[..., None] + update

        begin, steps = _range(first, last)
        start = (
            jnp.full(query.shape[:2], _MASKED / 2, jnp.float32),  # above a masked score, whose weight is then 0
            jnp.zeros(query.shape[:2], jnp.float32),
            jnp.zeros(query.shape, jnp.float32),
        )
        top, total, output = jax.lax.fori_loop(0, steps, visit, start)
        total = jnp.where(total > 0, total, 1.0)  # padding
        return None, ((output / total[..., None]).astype(query.dtype), top + jnp.log(total))

    _, (output, normalizer) = jax.lax.scan(block, None, (queries, first, last))
    return output, (queries, keys, values, first, last, output, normalizer)


def _walk_backward(softcap, residuals, cotangent):
    queries, keys, values, first, last, output, normalizer = residuals
    dots = (cotangent.astype(jnp.float32) * output.astype(jnp.float32)).sum(axis=-1)

    def block(carry, operands):
        query, first, last, cotangent, normalizer, dots = operands

        def visit(step, carry):
            d_query, d_keys, d_values = carry
            at = begin + step * KEY_BLOCK
            key, value = _slice(keys, at), _slice(values, at)
            scores, slope = _scores(query, key, at, first, last, softcap)
            weights = jnp.exp(scores - normalizer[..., None])
            d_value = _matmul("nqk,nqd->nkd", weights.astype(value.dtype), cotangent)
            d_weights = _matmul("nqd,nkd->nqk", cotangent, value)
            d_scores = (weights * (d_weights - dots[..., None]) * slope).astype(key.dtype)
            d_query += _matmul("nqk,nkd->nqd", d_scores, key)
            d_key = _matmul("nqk,nqd->nkd", d_scores, query)
            return d_query, _add_slice(d_keys, d_key, at), _add_slice(d_values, d_value, at)

        begin, steps = _range(first, last)
        start = (jnp.zeros(query.shape, jnp.float32), *carry)
        d_query, *carry = jax.lax.fori_loop(0, steps, visit, start)
        return tuple(carry), d_query.astype(query.dtype)

    zeros = jnp.zeros(keys.shape, jnp.float32), jnp.zeros(values.shape, jnp.float32)
    (d_keys, d_values), d_queries = jax.lax.scan(block, zeros, (queries, first, last, cotangent, normalizer, dots))
    return d_queries, d_keys.astype(keys.dtype), d_values.astype(values.dtype), None, None


_walk.defvjp(_walk_forward, _walk_backward)


def _range(first: Int[Array, " query_block"], last: Int[Array, " query_block"]) -> tuple[Array, Array]:
    """Where a block's visible keys begin, and how many key blocks cover them."""
    begin = jnp.where(last >= first, first, jnp.iinfo(jnp.int32).max).min()
    return begin, (last.max() - begin + KEY_BLOCK) // KEY_BLOCK  # 0 or fewer steps when all of it is padding


def _scores(query, key, at, first, last, softcap) -> tuple[Array, Array | float]:
    """Scores of a block, [kv_heads, grouped_queries, key_block], and their derivative by what they were uncapped."""
    scores = _capped(_matmul("nqd,nkd->nqk", query, key), softcap)
    slope = 1.0 if softcap is None else 1 - jnp.square(scores / softcap)
    index = at + jnp.arange(KEY_BLOCK, dtype=jnp.int32)
    mask = (first[:, None] <= index[None]) & (index[None] <= last[:, None])
    groups = query.shape[1] // len(first)
    return jnp.where(jnp.tile(mask, (groups, 1))[None], scores, _MASKED), slope


def _slice(x, at):
    return jax.lax.dynamic_slice_in_dim(x, at, KEY_BLOCK, axis=1)


def _add_slice(x, update, at):
    return jax.lax.dynamic_update_slice_in_dim(x, _slice(x, at) + update, at, axis=1)


def _matmul(equation: str, x: Array, y: Array) -> Array:
    return jnp.einsum(equation, x, y, precision=_precision(x.dtype), preferred_element_type=jnp.float32)


def _precision(dtype: jax.typing.DTypeLike) -> jax.lax.Precision:
    """Float32 means float32: without this, TPUs multiply it in bfloat16 and GPUs in TF32."""
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else jax.lax.Precision.DEFAULT
