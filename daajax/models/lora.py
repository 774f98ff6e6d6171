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

Tree = dict[str, Any]

COLLECTION = "lora"
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
ATTENTION = PROJECTIONS[:4]


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


def rounded(base: Tree, lora: Lora) -> Tree:
    """A base with those projections that are kept quantized replaced by what their parts stand for, in their dtype."""
    layers = dict(base["layers"])
    for name in filter(lora.quantizes, layers):
        layers[name] = _round(layers[name], str(lora.quantization), jnp.dtype(lora.dtype))
    return {**base, "layers": layers}


@functools.partial(jax.jit, static_argnums=(1, 2))
def _round(weight: jax.Array, quantization: str, dtype: Any) -> jax.Array:
    kept = FORMATS[quantization]
    return kept.dequantize(kept.quantize(weight.astype(dtype)), dtype).astype(weight.dtype)


def merged(base: Tree, trained: Tree, lora: Lora) -> Tree:
    """The weights with their adapters melted in, in the dtype that they have; where they live does not change.

    Args:
        base: All parameters but adapters.
        trained: What `lora` leaves to train.
        lora: What the adapters are.
    """
    adapters, params = trained[COLLECTION]["layers"], joined(without(trained), base)
    for name in lora.targets:
        weight, a, b = params["layers"][name], adapters[f"{name}_a"], adapters[f"{name}_b"]
        params["layers"][name] = _melt(weight, a, b, jnp.float32(lora.scale))
    return params


@jax.jit
def _melt(weight: jax.Array, a: jax.Array, b: jax.Array, scale: jax.Array) -> jax.Array:
    a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    delta = jnp.einsum("lir,lro->lio", a, b, precision=jax.lax.Precision.HIGHEST)
    return (weight.astype(jnp.float32) + scale * delta).astype(weight.dtype)
