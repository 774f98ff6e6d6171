"""Attention on TPUs: the stock splash kernel over gathered keys, with masks of blocks that are made at run time.

The kernel is given no mask. It visits the blocks of keys that `_visits` marks, and inside a block computes who sees
what from one number a query: the range of gathered keys `first … last` of `daajax.ops.attention.KeyLayout`, packed
into 32 bits. That is the whole rule, windows included, so that the kernel needs no segment ids. Only where a row
gathers so many keys that a range of any two does not fit, ids of sequences say where queries without a window begin.

Its interfaces are semi-public: `MaskInfo` is filled by hand here, which the tests do in interpret mode as well.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_mask_info import MaskInfo
from jaxtyping import Array, Bool, Float, Int

from daajax.errors import UserError
from daajax.ops.attention import KeyLayout, gather_keys

BLOCK = 512  # queries and keys of a block; not tuned: no TPU was at hand
LANES = 128  # blocks are multiples of it
BITS = 32  # that a range of keys is packed into


def splash(
    queries: Float[Array, "rows length heads head_dim"],
    keys: Float[Array, "rows row kv_heads head_dim"],
    values: Float[Array, "rows row kv_heads head_dim"],
    layout: KeyLayout,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    interpret: bool = False,
) -> Float[Array, "rows length heads head_dim"]:
    """Grouped-query attention by the splash kernel.

    Args:
        queries: Of every head.
        keys: Each key-value head serves as many query heads; they are not repeated.
        values: Likewise.
        layout: What each query sees.
        scale: Multiplies the scores; None: 1 / √head_dim.
        softcap: Scores s become c·tanh(s/c); None: they stay.
        interpret: Whether XLA computes what the kernel would, on any platform: slow, for tests.
    """
    rows, length, _, head_dim = queries.shape
    capacity = layout.source.shape[1]
    bits = capacity.bit_length()
    block, key_block = _block(length), _block(capacity)
    attend = _by_kernel(bits, block, key_block, softcap, interpret, queries.dtype == jnp.float32)

    def heads_first(x: Array, multiple: int) -> Array:
        return jnp.pad(x.transpose(0, 2, 1, 3), ((0, 0), (0, 0), (0, -x.shape[1] % multiple), (0, 0)))

    seen = layout.last >= layout.first
    padding = ((0, 0), (0, -length % block))
    first, last = (jnp.pad(jnp.where(seen, x, 0), padding) for x in (layout.first, layout.last))
    queries = heads_first(queries * (head_dim**-0.5 if scale is None else scale), block)
    keys, values = (heads_first(gather_keys(x, layout), key_block) for x in (keys, values))
    visits = jax.vmap(functools.partial(_visits, block=block, key_block=key_block, keys=keys.shape[2]))
    ranges = jnp.minimum(last - first, _widest(bits)) << bits | last
    segments = None
    if _needs_segments(bits):
        of_queries = jnp.take_along_axis(layout.begins, last, axis=1)
        of_keys = jnp.pad(layout.begins, ((0, 0), (0, -capacity % key_block)), constant_values=-1)
        segments = kernel.SegmentIds(of_queries, of_keys)
    each = (queries, keys, values, ranges, visits(first, last, jnp.pad(seen, padding)), segments)
    # One row at a time, as the chip would take them anyway.
    if rows == 1:
        output = attend(*jax.tree.map(lambda x: x[0], each))[None]
    else:
        output = jax.lax.map(lambda row: attend(*row), each)
    output = output.transpose(0, 2, 1, 3)[:, :length]
    return jnp.where(seen[:, :, None, None], output, 0)


def check(capacity: int, windows: Sequence[int | None]) -> None:
    """Refuses a window that cannot be told from none in rows of so many gathered keys.

    Args:
        capacity: Gathered keys of a row.
        windows: Of the layers, tokens; None: there is none.

    Raises:
        UserError: If there is such a one.
    """
    bits = capacity.bit_length()
    widest = max((window for window in windows if window is not None), default=0)
    if _needs_segments(bits) and widest > _widest(bits):
        raise UserError(
            f"rows gather {capacity:,} keys, beside which attention=splash tells windows of at most "
            f"{_widest(bits):,} tokens, not {widest:,}; use more and shorter rows (packing.rows, packing.row_length, "
            "micro_batches), or attention=blockwise."
        )


def _needs_segments(bits: int) -> bool:
    """Whether a range of any two keys that take so many bits is more than can be packed."""
    return 2 * bits > BITS


def _widest(bits: int) -> int:
    """Keys that the widest range has before its last one; where segments are needed, it stands for wider ones too."""
    return 2 ** (BITS - bits) - 1


def _block(size: int) -> int:
    """Of queries or keys: as many as fill a block, or all of them."""
    return min(BLOCK, -(-size // LANES) * LANES)


def _visits(
    first: Int[Array, " length"],
    last: Int[Array, " length"],
    seen: Bool[Array, " length"],
    block: int,
    key_block: int,
    keys: int,
) -> Bool[Array, "blocks key_blocks"]:
    """Which blocks of keys a block of queries visits: those in which one of its queries sees a key.

    A block of padding visits one, that of the first key: without any, the kernel would divide by zero. What padding
    makes of it is dropped, and its cotangent is zero.
    """
    begin = jnp.arange(0, keys, key_block, dtype=jnp.int32)[None]
    reaches = (first[:, None] < begin + key_block) & (last[:, None] >= begin)
    blocks = (reaches & seen[:, None]).reshape(-1, block, begin.size).any(axis=1)
    return blocks | ~blocks.any(axis=1, keepdims=True) & (begin == 0)


def _by_kernel(bits: int, block: int, key_block: int, softcap: float | None, interpret: bool, exact: bool) -> Any:
    """Attention of one row: of queries, keys and values with heads in front, packed ranges, visits and segments."""
    sizes = kernel.BlockSizes(
        block_q=block,
        block_kv=key_block,
        block_kv_compute=key_block,
        block_q_dkv=block,
        block_kv_dkv=key_block,
        block_kv_dkv_compute=key_block,
        block_q_dq=block,
        block_kv_dq=key_block,
    )

    def attend(queries: Array, keys: Array, values: Array, ranges: Array, visits: Array, segments: Any) -> Any:
        by_query = _mask_info(visits, ranges, axis=1)
        return kernel.SplashAttentionKernel(
            by_query,
            by_query,
            _mask_info(visits, ranges, axis=0),
            block_sizes=sizes,
            is_mqa=False,
            save_residuals=False,
            mask_value=kernel.DEFAULT_MASK_VALUE,
            attn_logits_soft_cap=softcap,
            residual_checkpoint_name="attention",
            mask_function=_sees(bits),
            interpret=interpret,
        )(queries, keys, values, segments)

    if not exact:
        return attend

    # Float32 means float32 in both directions, and the kernel asks the context; the backward pass is traced in another.
    @jax.custom_vjp
    def exactly(*operands: Any) -> Array:
        with jax.default_matmul_precision("highest"):
            return attend(*operands)

    def forward(*operands: Any) -> tuple[Array, Any]:
        with jax.default_matmul_precision("highest"):
            return jax.vjp(lambda *arrays: attend(*arrays, *operands[3:]), *operands[:3])

    def backward(pull: Any, cotangent: Array) -> tuple[Array | None, ...]:
        with jax.default_matmul_precision("highest"):
            return (*pull(cotangent), None, None, None)

    exactly.defvjp(forward, backward)
    return exactly


@functools.cache
def _sees(bits: int) -> Any:
    """The rule inside a block: from a packed range and the index of a gathered key; one function for each width."""
    widest = _widest(bits) if _needs_segments(bits) else None

    def sees(ranges: Array, index: Array) -> Array:
        last, before = ranges & (1 << bits) - 1, jax.lax.shift_right_logical(ranges, jnp.full_like(ranges, bits))
        begins = index >= last - before
        return (index <= last) & (begins if widest is None else begins | (before == widest))

    return sees


def _mask_info(visits: Bool[Array, "blocks key_blocks"], ranges: Any, axis: int) -> MaskInfo:
    """What the kernel does block by block, walking along `axis` of `visits`.

    Attributes of a block that is not visited: the nearest one that is, so that nothing is fetched for it.
    """
    count = visits.shape[axis]
    index = jnp.arange(count, dtype=jnp.int32)
    index = index[None] if axis == 1 else index[:, None]
    low = jnp.where(visits, index, count - 1).min(axis=axis, keepdims=True)
    high = jnp.where(visits, index, 0).max(axis=axis, keepdims=True)
    # The minimum last: where nothing is visited, low is above high.
    nearest = jnp.minimum(jnp.maximum(index, low), high)
    return MaskInfo(
        data_next=jnp.broadcast_to(nearest, visits.shape)[None],
        mask_next=None,
        block_mask=visits.astype(jnp.int32)[None],
        partial_mask_blocks=None,
        q_sequence=ranges,
        is_dynamic_mask=None,
    )
