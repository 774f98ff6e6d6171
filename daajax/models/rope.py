"""Rotary position embedding (Su et al. 2021, https://arxiv.org/abs/2104.09864) and the ways to stretch it.

A way to stretch it is a function from its parameters to the frequencies; to add one, write it and a table line.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from daajax.models.architecture import LayerKind, Rope

Frequencies = Float[np.ndarray, " half"]  # radians per position of each pair of features, float64


class Rotation(NamedTuple):
    """Cosines and sines of the angles by which each token's pairs of features are turned."""

    cos: Float[Array, "*kinds rows length half"]
    sin: Float[Array, "*kinds rows length half"]


def _plain(rope: Rope, frequencies: Frequencies) -> Frequencies:
    del rope
    return frequencies


def _linear(rope: Rope, frequencies: Frequencies) -> Frequencies:
    """Positions divided by a factor (Chen et al. 2023, https://arxiv.org/abs/2306.15595)."""
    return frequencies / rope.factor


def _llama3(rope: Rope, frequencies: Frequencies) -> Frequencies:
    """Llama 3.1's rule, which stretches the slow ones."""
    turns = rope.original_max_position_embeddings * frequencies / (2 * np.pi)  # within the original context
    smooth = np.clip((turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor), 0, 1)
    return frequencies * (smooth + (1 - smooth) / rope.factor)


def _yarn(rope: Rope, frequencies: Frequencies) -> Frequencies:
    """YaRN: a ramp from kept to stretched, by turns within the original context (https://arxiv.org/abs/2309.00071)."""
    dim = 2 * len(frequencies)

    def feature(turns: float) -> float:
        return (
            dim
            * math.log(rope.original_max_position_embeddings / (turns * 2 * math.pi))
            / (2 * math.log(rope.rope_theta))
        )

    low, high = feature(rope.beta_fast), feature(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    ramp = np.clip((np.arange(len(frequencies)) - low) / max(high - low, 0.001), 0, 1)
    return frequencies * (1 - ramp) + frequencies / rope.factor * ramp


def _longrope(rope: Rope, frequencies: Frequencies) -> Frequencies:
    """LongRoPE: every frequency has a factor of its own (https://arxiv.org/abs/2402.13753)."""
    return frequencies / np.array(rope.long_factor if rope.is_long else rope.short_factor)


FREQUENCIES: dict[str, Callable[[Rope, Frequencies], Frequencies]] = {
    "default": _plain,
    "dynamic": _plain,  # within the context that the model was made for; beyond it, see `architecture.for_length`
    "linear": _linear,
    "llama3": _llama3,
    "yarn": _yarn,
    "longrope": _longrope,
}


def frequencies(rope: Rope, head_dim: int) -> Float[np.ndarray, " half"]:
    """Radians per position of each pair of features that is turned, float32."""
    dim = int(head_dim * rope.partial_rotary_factor)
    plain = rope.rope_theta ** -(np.arange(0, dim, 2, dtype=np.float64) / dim)
    return FREQUENCIES[rope.rope_type](rope, plain).astype(np.float32)


def rotations(kinds: Sequence[LayerKind], head_dim: int, positions: Int[Array, "rows length"]) -> Rotation | None:
    """How layers turn queries and keys.

    Args:
        kinds: The kinds of layer; where there are several, their axis leads.
        head_dim: Features of a head.
        positions: Of the tokens.

    Returns:
        None if no layer turns anything; a kind that does not, among others that do, turns by 0.
    """
    halves = {len(frequencies(kind.rope, head_dim)) for kind in kinds if kind.rope is not None}
    if not halves:
        return None
    (half,) = halves
    found = []
    for kind in kinds:
        speed = np.zeros(half, np.float32) if kind.rope is None else frequencies(kind.rope, head_dim)
        scale = 1.0 if kind.rope is None else kind.rope.attention_factor
        angles = positions[:, :, None] * speed[None, None, :]
        found.append(Rotation(jnp.cos(angles) * scale, jnp.sin(angles) * scale))
    if len(found) == 1:
        return found[0]
    return Rotation(*(jnp.stack(values) for values in zip(*found, strict=True)))


def rotate(
    x: Float[Array, "rows length heads head_dim"], rotation: Rotation
) -> Float[Array, "rows length heads head_dim"]:
    """Turns the leading features of every head; the features of a pair lie half of those apart."""
    cos, sin = (values[:, :, None] for values in rotation)
    half = cos.shape[-1]
    first, second, rest = jnp.split(x, (half, 2 * half), axis=-1)
    first, second = first.astype(jnp.float32), second.astype(jnp.float32)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return jnp.concatenate([turned.astype(x.dtype), rest], axis=-1)
