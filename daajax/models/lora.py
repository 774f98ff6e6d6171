"""Low-rank adapters: what they are, which parameters they leave to train, and how they melt into the weights.

A projection W with an adapter computes x·W + s·(x·A)·B (Hu et al. 2021, https://arxiv.org/abs/2106.09685). A and B are
a collection of their own, `lora`, beside the base: the same model without it is the bare base.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import flax.traverse_util as traverse
import jax
import jax.numpy as jnp

from daajax.errors import UserError
from daajax.models.architecture import Architecture
from daajax.models.quantization import FORMATS
from daajax.models.storage import ATTENTION, MLP, Later

Tree = dict[str, Any]

COLLECTION = "lora"
PROJECTIONS = ATTENTION + MLP


@dataclasses.dataclass(frozen=True)
class Lora:
    """What of a model is trained where not all of it is: adapters of some projections in every layer, and some parts.

    Attributes:
        rank: Columns of A.
        alpha: What they are weighed with, over `rank`, or over its root if `rslora`.
        targets: Names of projections.
        rslora: Rank-stabilized scaling (Kalajdzievski 2023, https://arxiv.org/abs/2312.03732).
        whole: Names of parameters that are trained whole, in every layer if they are of layers; their biases belong to
            them.
        dtype: Of the parameters that are frozen.
        quantization: Key of `daajax.models.quantization.FORMATS` that frozen projections are kept in; None: in `dtype`.
    """

    rank: int
    alpha: float
    targets: tuple[str, ...]
    rslora: bool = False
    whole: tuple[str, ...] = ()
    dtype: str = "float32"
    quantization: str | None = None

    @property
    def scale(self) -> float:
        """What (x·A)·B is multiplied with."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    def trains(self, path: str) -> bool:
        """Whether a parameter is trained, by a path such as `layers/q_proj`."""
        return path.startswith(f"{COLLECTION}/") or path.rsplit("/", 1)[-1].removesuffix("_bias") in self.whole

    def quantizes(self, path: str) -> bool:
        """Whether a parameter is kept quantized."""
        return self.quantization is not None and path.rsplit("/", 1)[-1] in PROJECTIONS and not self.trains(path)


def targets_of(architecture: Architecture, names: Sequence[str]) -> tuple[str, ...]:
    """The projections that adapters are asked for, in the decoder's order.

    Args:
        architecture: Of the base.
        names: Names of projections; `all-linear` stands for all of them.

    Raises:
        UserError: If the model has no such projection, or experts in its place.
    """
    there = [name for name in PROJECTIONS if name != "gate_proj" or architecture.gated]
    if architecture.experts is not None:
        there = list(ATTENTION)
    asked = there if list(names) == ["all-linear"] else names
    if unknown := [name for name in asked if name not in there]:
        raise UserError(
            f"lora.targets has {unknown[0]!r}, which a {architecture.model_type} has no adapter for; it has "
            f"{', '.join(there)}, or 'all-linear' for all of them."
        )
    return tuple(name for name in there if name in asked)


def split(params: Tree, lora: Lora | None) -> tuple[Tree, Tree]:
    """A tree of parameters, or of anything in their place, in two: what is trained, and what is frozen."""
    flat = traverse.flatten_dict(params, sep="/")
    parts = (
        {path: leaf for path, leaf in flat.items() if (lora is None or lora.trains(path)) == trained}
        for trained in (True, False)
    )
    trained, frozen = (traverse.unflatten_dict(part, sep="/") for part in parts)
    return trained, frozen


def joined(one: Tree, other: Tree) -> Tree:
    """The tree that was split; where a leaf is in both, that of `one`."""
    flat = traverse.flatten_dict(other, sep="/") | traverse.flatten_dict(one, sep="/")
    return traverse.unflatten_dict(flat, sep="/")


def without(params: Tree) -> Tree:
    """The model with its adapters off."""
    return {name: value for name, value in params.items() if name != COLLECTION}


def merged(base: Tree, trained: Tree, lora: Lora) -> Tree:
    """The model that was trained, adapters melted into their projections, each in the dtype of the base.

    Frozen projections that are kept quantized become what their parts stand for, as they were computed with.

    Args:
        base: All parameters but adapters, each a `Later`; where they live does not change.
        trained: What `lora` leaves to train.
        lora: What the adapters are.

    Returns:
        Each parameter as a `Later`.
    """
    flat: dict[str, Any] = traverse.flatten_dict(base, sep="/")
    own: dict[str, Any] = traverse.flatten_dict(without(trained), sep="/")
    adapters = trained.get(COLLECTION, {}).get("layers", {})
    for path, weight in flat.items():
        name = path.rsplit("/", 1)[-1]
        if lora.quantizes(path):
            kept = functools.partial(_round, quantization=str(lora.quantization), dtype=lora.dtype)
            flat[path] = weight = weight.then(kept)
        if path.startswith("layers/") and name in lora.targets:
            a, b = adapters[f"{name}_a"], adapters[f"{name}_b"]
            flat[path] = weight.then(functools.partial(_melt, a=a, b=b, scale=jnp.float32(lora.scale)))
    return traverse.unflatten_dict(flat | {path: Later.of(leaf) for path, leaf in own.items()}, sep="/")


@functools.partial(jax.jit, static_argnames=("quantization", "dtype"))
def _round(weight: jax.Array, *, quantization: str, dtype: str) -> jax.Array:
    kept = FORMATS[quantization]

    def of_layer(weight: jax.Array) -> jax.Array:
        return kept.dequantize(kept.quantize(weight.astype(dtype)), jnp.dtype(dtype)).astype(weight.dtype)

    return jax.lax.map(of_layer, weight)


@jax.jit
def _melt(weight: jax.Array, a: jax.Array, b: jax.Array, scale: jax.Array) -> jax.Array:
    def of_layer(operands: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        weight, a, b = operands
        delta = jnp.dot(a.astype(jnp.float32), b.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST)
        return (weight.astype(jnp.float32) + scale * delta).astype(weight.dtype)

    return jax.lax.map(of_layer, (weight, a, b))
