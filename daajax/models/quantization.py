"""How the frozen weights of a model are kept in 8 or 4 bits, and how they are read.

A weight [inputs, outputs] becomes a few named arrays: codes, and the scales that they are multiplied with. It is
computed with as if it had never been anything but what these arrays stand for: `dequantize` gives it back in the
compute dtype, layer by layer. Layers and experts, the axes in front, are each quantized on their own.

To add a format, write its three functions and add it to `FORMATS`.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from daajax.errors import UserError

Parts = dict[str, Array]


@dataclasses.dataclass(frozen=True)
class Part:
    """One of the arrays that stand for a weight.

    Attributes:
        shape: Its shape.
        dtype: Its dtype.
        axes: Logical names of its axes; None: never cut.
    """

    shape: tuple[int, ...]
    dtype: jax.typing.DTypeLike
    axes: tuple[str | None, ...]


@dataclasses.dataclass(frozen=True)
class Format:
    """A way to keep a weight.

    Attributes:
        parts: From its shape and logical axes, the arrays that stand for it, by name; a UserError if it has no such.
        quantize: Makes them of a weight of any float dtype, in float32.
        dequantize: From them, the weight that they stand for: products of float32 numbers, rounded to a dtype.
    """

    parts: Callable[[Sequence[int], Sequence[str | None]], dict[str, Part]]
    quantize: Callable[[Float[Array, "*leading inputs outputs"]], Parts]
    dequantize: Callable[[Parts, jax.typing.DTypeLike], Float[Array, "*leading inputs outputs"]]


@functools.partial(jax.tree_util.register_dataclass, data_fields=["parts"], meta_fields=["format"])
@dataclasses.dataclass(frozen=True)
class Quantized:
    """A weight in its parts.

    Attributes:
        parts: The arrays that stand for it.
        format: Key of `FORMATS`.
    """

    parts: Parts
    format: str

    def dense(self, dtype: jax.typing.DTypeLike) -> Float[Array, "*leading inputs outputs"]:
        """The weight itself."""
        return FORMATS[self.format].dequantize(self.parts, dtype)


def apply(function: Callable[..., Any], weights: Sequence[Array | Quantized], *operands: Array) -> Any:
    """Calls a function of weights and other operands, the first of which has the compute dtype.

    What quantized weights stand for is made once more in the backward pass, instead of being kept for it.
    """
    if not any(isinstance(weight, Quantized) for weight in weights):
        return function(weights, *operands)

    def read(weights: Sequence[Array | Quantized], *operands: Array) -> Any:
        dtype = operands[0].dtype
        dense = [weight.dense(dtype) if isinstance(weight, Quantized) else weight for weight in weights]
        return function(dense, *operands)

    return jax.checkpoint(read, prevent_cse=False)(weights, *operands)


# int8: symmetric, one scale an output.


def int8_parts(shape: Sequence[int], axes: Sequence[str | None]) -> dict[str, Part]:
    """The arrays of an int8 weight: as many codes as numbers, and a scale for each output."""
    *leading, _, outputs = shape
    *leading_axes, _, output_axis = axes
    return {
        "codes": Part(tuple(shape), jnp.int8, tuple(axes)),
        "scales": Part((*leading, outputs), jnp.float32, (*leading_axes, output_axis)),
    }


def quantize_int8(weight: Float[Array, "*leading inputs outputs"]) -> Parts:
    """Rounds every output's weights to the nearest of 255 steps between minus and plus their largest.

    The codes are those of `int8_vectorwise_quant` in bitsandbytes, with no outliers set apart; it keeps the largest
    number itself, here it is divided by 127.

    References:
        Section 2.1 of Dettmers et al. 2022, https://arxiv.org/abs/2208.07339
    """
    weight = weight.astype(jnp.float32)
    absmax = jnp.abs(weight).max(axis=-2, keepdims=True)
    codes = jnp.rint(weight * (127 * (1 / _nonzero(absmax)))).astype(jnp.int8)
    return {"codes": codes, "scales": absmax[..., 0, :] / 127}


def dequantize_int8(parts: Parts, dtype: jax.typing.DTypeLike) -> Float[Array, "*leading inputs outputs"]:
    """The weight that the parts stand for."""
    return (parts["codes"].astype(jnp.float32) * parts["scales"][..., None, :]).astype(dtype)


# nf4: 4 bits, blocks of 64 inputs of one output, their scales quantized in turn.

BLOCK = 64  # inputs that have one scale
GROUP = 256  # scales that have one scale

# Quantiles of the normal distribution, as Appendix E of QLoRA prints them.
NF4 = np.array(
    [
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ],
    np.float32,
)

# What a scale's code means: 127 is 0, and n above or below it is ± (18 n + shift) unit, of the last line that begins at
# n or before. Decade i lies from 10**(i - 7) to 10**(i - 6) and is cut into 2**i steps, whose middles these are.
DECADES = [(2**i, 9 - 16 * 2**i, 10.0 ** (i - 7) / 2 ** (i + 1)) for i in range(7)] + [(128, 1 - 18 * 128, 1.0)]


def dynamic(codes: Any, xp: Any = jnp) -> Any:
    """The numbers between -1 and 1 that codes of scales stand for, float32, in NumPy or JAX.

    Selects and one rounded product: a gather would cost a TPU more than all else that reading a weight takes.

    References:
        Section 1.3 of Dettmers et al. 2022, https://arxiv.org/abs/2110.02861
    """
    signed = codes.astype(xp.int32) - 127
    size = xp.abs(signed)
    shift, unit = xp.float32(0), xp.float32(0)
    for first, its_shift, its_unit in DECADES:
        shift = xp.where(size >= first, xp.float32(its_shift), shift)
        unit = xp.where(size >= first, xp.float32(its_unit), unit)
    return xp.sign(signed).astype(xp.float32) * (((18 * size).astype(xp.float32) + shift) * unit)


DYNAMIC = dynamic(np.arange(256), np)


def nf4_parts(shape: Sequence[int], axes: Sequence[str | None]) -> dict[str, Part]:
    """The arrays of an NF4 weight: two codes a byte; the codes of its scales, their groups' scales and their mean.

    A byte has input i of a block in its high half and input i + 32 in its low one, so that reading them moves rows
    that lie together. Scales are not cut along the inputs: there are 64 times fewer.

    Raises:
        UserError: If its inputs cannot be cut into blocks.
    """
    *leading, inputs, outputs = shape
    *leading_axes, _, output_axis = axes
    if inputs % BLOCK:
        raise UserError(f"nf4 cuts a weight's inputs into blocks of {BLOCK}, but one of them has {inputs}: use int8.")
    blocks = inputs // BLOCK
    return {
        "codes": Part((*leading, inputs // 2, outputs), jnp.uint8, tuple(axes)),
        "scale_codes": Part((*leading, blocks, outputs), jnp.uint8, (*leading_axes, None, output_axis)),
        "group_scales": Part((*leading, -(-blocks * outputs // GROUP)), jnp.float32, (*leading_axes, None)),
        "mean_scale": Part(tuple(leading), jnp.float32, tuple(leading_axes)),
    }


def quantize_nf4(weight: Float[Array, "*leading inputs outputs"]) -> Parts:
    """Rounds to the nearest of 16 numbers times the block's largest, and those largest to 8 bits about their mean.

    The codes are those of `quantize_4bit` in bitsandbytes with blocks of 64 and compressed statistics, of the same
    weight as torch has it, [outputs, inputs].

    References:
        Section 3 of Dettmers et al. 2023, https://arxiv.org/abs/2305.14314
    """
    *leading, inputs, outputs = weight.shape
    blocks = weight.reshape(*leading, inputs // BLOCK, BLOCK, outputs)
    absmax = jnp.abs(blocks).max(axis=-2).astype(jnp.float32)
    # The barrier keeps XLA from a float32 copy of what is the same for all numbers of a block.
    inverse = jax.lax.optimization_barrier(1 / _nonzero(absmax))[..., None, :]
    high, low = (_nearest(half.astype(jnp.float32) * inverse, NF4) for half in jnp.split(blocks, 2, axis=-2))

    scales = jnp.swapaxes(absmax, -1, -2).reshape(*leading, -1)  # groups run over the blocks of output after output
    mean = _mean(scales)
    count = scales.shape[-1]
    padding = [(0, 0)] * len(leading) + [(0, -count % GROUP)]
    groups = jnp.pad(scales - mean[..., None], padding).reshape(*leading, -1, GROUP)
    group_scales = jnp.abs(groups).max(axis=-1)
    scale_codes = _nearest(groups * (1 / _nonzero(group_scales))[..., None], DYNAMIC)
    scale_codes = scale_codes.reshape(*leading, -1)[..., :count].reshape(*leading, outputs, inputs // BLOCK)
    return {
        "codes": (high << 4 | low).reshape(*leading, inputs // 2, outputs),
        "scale_codes": jnp.swapaxes(scale_codes, -1, -2),
        "group_scales": group_scales,
        "mean_scale": mean,
    }


def dequantize_nf4(parts: Parts, dtype: jax.typing.DTypeLike) -> Float[Array, "*leading inputs outputs"]:
    """The weight that the parts stand for."""
    *leading, blocks, outputs = parts["scale_codes"].shape
    groups = jnp.repeat(parts["group_scales"], GROUP, axis=-1)[..., : blocks * outputs]
    groups = jnp.swapaxes(groups.reshape(*leading, outputs, blocks), -1, -2)
    scales = _rounded(dynamic(parts["scale_codes"]) * groups) + jnp.expand_dims(parts["mean_scale"], (-1, -2))
    # The barriers keep XLA from decoding a scale again for each of its weights, and from a float32 copy of scales
    # spread over their inputs.
    scales = jax.lax.optimization_barrier(scales)
    pairs = parts["codes"].reshape(*leading, blocks, 1, BLOCK // 2, outputs)
    halves = jnp.array([4, 0], jnp.uint8)[:, None, None]
    codes = pairs >> jnp.expand_dims(halves, range(len(leading) + 1)) & 15
    weight = (_pick(codes, NF4) * jnp.expand_dims(scales, (-2, -3))).astype(dtype)
    return jax.lax.optimization_barrier(weight).reshape(*leading, blocks * BLOCK, outputs)


def _rounded(product: Array) -> Array:
    """A product as it is, but no operand of a fused multiply-add, which the program of one mesh has, another's not."""
    return jnp.maximum(product, np.finfo(np.float32).min)


def _nonzero(absmax: Array) -> Array:
    """What a block is divided by: 0 / 0 has no code."""
    return jnp.maximum(absmax, np.finfo(np.float32).tiny)


def _nearest(values: Array, table: np.ndarray) -> Array:
    """The place of the nearest number in an ascending table; the lower one where two are."""
    bounds = (table[:-1] + table[1:]) / 2
    return sum(((values > bound).astype(jnp.uint8) for bound in bounds), start=jnp.zeros(values.shape, jnp.uint8))


def _pick(codes: Array, table: np.ndarray) -> Array:
    """The table's numbers at codes, by selects on one bit after another: a gather is slow on a TPU."""
    # The barrier ties the numbers to the codes: a scan over layers would else spread each of them over the shape of a
    # weight, once for all layers, and keep that.
    codes, numbers = jax.lax.optimization_barrier((codes, [jnp.asarray(number) for number in table]))
    bit = 0
    while len(numbers) > 1:
        odd = (codes >> bit) & 1 == 1
        numbers = [jnp.where(odd, high, low) for low, high in zip(numbers[::2], numbers[1::2], strict=True)]
        bit += 1
    return numbers[0]


def _mean(values: Float[Array, "*leading count"]) -> Float[Array, "*leading"]:
    """The mean over the last axis, in an order that does not depend on where its parts live."""
    count = values.shape[-1]
    sums = jnp.pad(values, [(0, 0)] * (values.ndim - 1) + [(0, 2 ** (count - 1).bit_length() - count)])
    while sums.shape[-1] > 1:
        first, second = jnp.split(sums, 2, axis=-1)
        sums = first + second
    return _rounded(sums[..., 0] / count)  # XLA divides by a constant as it multiplies


FORMATS = {
    "int8": Format(int8_parts, quantize_int8, dequantize_int8),
    "nf4": Format(nf4_parts, quantize_nf4, dequantize_nf4),
}
