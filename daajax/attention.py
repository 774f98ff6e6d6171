"""Which attention a model gets on a platform, and how it sees the rows of a batch.

To add one: a function in `daajax.ops`, and an entry of `ATTENTION` at the foot of this file.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from daajax import sharding
from daajax.errors import UserError
from daajax.models.architecture import Architecture
from daajax.ops import attention, sequences
from daajax.ops.blockwise import blockwise

Batch = Mapping[str, Array]
See = Callable[
    [Batch, int], Any
]  # from a micro-batch and its gathered keys to what attention needs to know of the rows
Attend = Callable[[Array, Array, Array, Any], Array]  # queries, keys, values, what `See` made -> output


@dataclasses.dataclass(frozen=True)
class Attention:
    """One way to attend.

    Attributes:
        make: From an architecture and the most tokens of a prompt with one response, if known, to its two functions.
        lacks: From an architecture, a compute dtype and a device to why it does not serve there, with what to do.
    """

    make: Callable[[Architecture, int | None], tuple[See, Attend]]
    lacks: Callable[[Architecture, jax.typing.DTypeLike, Any], str | None] = lambda architecture, dtype, device: None


class Choice(NamedTuple):
    """The attention of a run.

    Attributes:
        name: Key of `ATTENTION`.
        why: Why this one, in a few words.
    """

    name: str
    why: str


def choose(name: str, architecture: Architecture, mesh: Any, dtype: jax.typing.DTypeLike) -> Choice:
    """The attention of a model on a mesh, whose devices need not be there.

    Args:
        name: Key of `ATTENTION`, or `auto`.
        architecture: What the model computes.
        mesh: Where.
        dtype: In which dtype.

    Raises:
        UserError: If it does not serve there.
    """
    device = sharding.device_of(mesh)
    lacking = {key: way.lacks(architecture, dtype, device) for key, way in ATTENTION.items()}
    if name != "auto":
        if (lack := lacking[name]) is None:
            return Choice(name, "as asked for")
        there = ", ".join(key for key, lack in lacking.items() if lack is None)
        raise UserError(f"attention={name} {lack}; there is {there}.")
    best = FASTEST.get(device.platform, "blockwise")
    if (lack := lacking[best]) is None:
        return Choice(best, f"the one for {device.platform}")
    return Choice("blockwise", f"{best} {lack}")


def see_kinds(architecture: Architecture, see: Callable[[int | None], Any]) -> Any:
    """What layers of every kind see; where there are several kinds, their axis leads.

    Args:
        architecture: Whose layers.
        see: From a window to what attention needs to know of the rows.
    """
    windows = [kind.sliding_window for kind in architecture.kinds]
    seen = {window: see(window) for window in windows}
    if len(windows) == 1:
        return seen[windows[0]]
    return jax.tree.map(lambda *values: jnp.stack(values), *(seen[window] for window in windows))


def _gathered(attend: Callable[..., Array]) -> Callable[[Architecture, int | None], tuple[See, Attend]]:
    """Attention over gathered keys."""

    def make(a: Architecture, longest: int | None) -> tuple[See, Attend]:
        def see(batch: Batch, keys: int) -> Any:
            responses = batch["lengths"].shape[-1]
            layout = functools.partial(attention.key_layout, responses=responses, keys=keys)
            return see_kinds(a, lambda window: layout(batch["segments"], batch["branches"], window=window))

        return see, functools.partial(attend, scale=a.attention_scale, softcap=a.attn_logit_softcapping)

    return make


def _masked(a: Architecture, longest: int | None) -> tuple[See, Attend]:
    """Attention through the whole mask."""

    def see(batch: Batch, keys: int) -> Any:
        rows = (batch[name] for name in ("segments", "branches", "positions"))
        return see_kinds(a, functools.partial(attention.visible, *rows))

    return see, functools.partial(attention.dense, scale=a.attention_scale, softcap=a.attn_logit_softcapping)


def _sequences(a: Architecture, longest: int | None) -> tuple[See, Attend]:
    """Attention over sequences."""
    windows = tuple(dict.fromkeys(kind.sliding_window for kind in a.kinds))

    def see(batch: Batch, keys: int) -> Any:
        slots, responses = batch["lengths"].shape[-2:]
        layout = functools.partial(sequences.sequences, slots=slots, responses=responses, keys=keys, longest=longest)
        rows = batch["segments"], batch["branches"]
        return see_kinds(a, lambda window: layout(*rows, window=windows.index(window)))

    return see, functools.partial(sequences.attend, scale=a.attention_scale, windows=windows)


def _off_cpu(a: Architecture, dtype: jax.typing.DTypeLike, device: Any) -> str | None:
    return None if device.platform == "cpu" else f"builds the whole mask, on CPUs only, and this is a {device.platform}"


def _off_tpu(a: Architecture, dtype: jax.typing.DTypeLike, device: Any) -> str | None:
    return None if device.platform == "tpu" else f"runs on TPUs only and this is a {device.platform}"


def _off_cudnn(a: Architecture, dtype: jax.typing.DTypeLike, device: Any) -> str | None:
    """What cuDNN's fused attention cannot do, as `jax.nn.dot_product_attention` has it."""
    if device.platform != "gpu" or "rocm" in device.client.platform_version.lower():
        return f"runs on NVIDIA GPUs only and this is a {device.platform}"
    if jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float16):
        return f"does not compute in {jnp.dtype(dtype)}: set model.dtype=bfloat16 for it"
    widest = 256 if float(getattr(device, "compute_capability", 0)) >= 9 else 128
    if a.head_dim % 8 or a.head_dim > widest:
        return (
            f"needs a head_dim that is a multiple of 8 and at most {widest} on {device.device_kind}, not {a.head_dim}"
        )
    if a.attn_logit_softcapping is not None:
        return f"cannot cap scores, and this model caps them at {a.attn_logit_softcapping:g}"
    return None


def _splash(a: Architecture, longest: int | None) -> tuple[See, Attend]:
    from daajax.ops.splash import splash  # here: a second of imports that only TPUs need

    return _gathered(splash)(a, longest)


ATTENTION = {
    "splash": Attention(_splash, _off_tpu),
    "cudnn": Attention(_sequences, _off_cudnn),
    "blockwise": Attention(_gathered(blockwise)),
    "dense": Attention(_masked, _off_cpu),
}

FASTEST = {"tpu": "splash", "gpu": "cudnn"}  # by platform; elsewhere, and where it does not serve, blockwise
