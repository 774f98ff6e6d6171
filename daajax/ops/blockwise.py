"""Attention that visits only the keys a block of queries can see, in plain XLA: for CPUs, and wherever no kernel is."""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from daajax.ops.attention import MASKED, KeyLayout, capped, gather_keys, precision_of

QUERY_BLOCK = 64  # the fastest pair on CPU of 32 to 256 by 64 to 512
KEY_BLOCK = 64


def blockwise(
    queries: Float[Array, "rows length heads head_dim"],
    keys: Float[Array, "rows row kv_heads head_dim"],
    values: Float[Array, "rows row kv_heads head_dim"],
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
            jnp.full(query.shape[:2], MASKED / 2, jnp.float32),  # above a masked score, whose weight is then 0
            jnp.zeros(query.shape[:2], jnp.float32),
            jnp.zeros(query.shape, jnp.float32),
        )
        top, total, output = jax.lax.fori_loop(0, steps, visit, start)
        total = jnp.where(total > 0, total, 1.0)  # padding
        return None, ((output / total[..., None]).astype(query.dtype), top + jnp.log(total))

    _, made = jax.lax.scan(block, None, (queries, first, last))
    output, normalizer = checkpoint_name(made, "attention")  # what the backward pass may keep, see models/remat.py
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
    scores = capped(_matmul("nqd,nkd->nqk", query, key), softcap)
    slope = 1.0 if softcap is None else 1 - jnp.square(scores / softcap)
    index = at + jnp.arange(KEY_BLOCK, dtype=jnp.int32)
    mask = (first[:, None] <= index[None]) & (index[None] <= last[:, None])
    groups = query.shape[1] // len(first)
    return jnp.where(jnp.tile(mask, (groups, 1))[None], scores, MASKED), slope


def _slice(x, at):
    return jax.lax.dynamic_slice_in_dim(x, at, KEY_BLOCK, axis=1)


def _add_slice(x, update, at):
    return jax.lax.dynamic_update_slice_in_dim(x, _slice(x, at) + update, at, axis=1)


def _matmul(equation: str, x: Array, y: Array) -> Array:
    return jnp.einsum(equation, x, y, precision=precision_of(x.dtype), preferred_element_type=jnp.float32)
