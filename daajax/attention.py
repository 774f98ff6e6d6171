"""Which attention a model gets on a platform, and how it sees the rows of a batch.

To add one: a function in `daajax.ops`, and an entry of `ATTENTION` at the foot of this file.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from daajax import sharding
from daajax.data import parts
from daajax.errors import UserError
from daajax.models.architecture import Architecture
from daajax.ops import attention, sequences
from daajax.ops.attention import KeyLayout
from daajax.ops.blockwise import blockwise
from daajax.ops.devices import Devices

Batch = Mapping[str, Array]
See = Callable[
    [Batch, int], Any
]  # from a micro-batch and its gathered keys to what attention needs to know of the rows
Attend = Callable[[Array, Array, Array, Any], Array]  # queries, keys, values, what `See` made -> output
Order = Int[np.ndarray, " length"] | None  # which token of a row lies in each place; None: as they are counted

_READ = ("segments", "branches", "positions")  # of a batch
_ROWS, _QUERIES = ("rows",), ("rows", "length")


@dataclasses.dataclass(frozen=True)
class Attention:
    """One way to attend.

    Attributes:
        make: From an architecture and the most tokens of a prompt with one response, if known, to two functions: from
            whole rows, gathered keys and `Order` to what it needs to know of them, and the attention itself.
        seen: Leading logical axes of what it needs to know; of a tree, a tree of them.
        lacks: From an architecture, a compute dtype, a device and the devices that a row's length is cut over to why it
            does not serve there, with what to do.
        by_heads: Where a row's length is cut: whether devices exchange it for the heads, so that each has all tokens of
            some heads. Otherwise each keeps its queries, and gathers keys and values.
    """

    make: Callable[[Architecture, int | None], tuple[Callable[[Batch, int, Order], Any], Attend]]
    seen: Any
    lacks: Callable[[Architecture, jax.typing.DTypeLike, Any, Devices], str | None] = lambda *_: None
    by_heads: bool = False


def make(name: str, architecture: Architecture, devices: Devices, *, longest: int | None = None) -> tuple[See, Attend]:
    """What attention needs to know of the rows of a batch, and attention itself, over devices.

    Args:
        name: Key of `ATTENTION`.
        architecture: What the model computes.
        devices: That rows, their length and heads are cut up over.
        longest: Most tokens of a prompt with one response; None: as many as a row has.
    """
    way, cuts = ATTENTION[name], devices.parts("length")
    see, attend = way.make(architecture, longest)

    def see_rows(batch: Batch, keys: int) -> Any:
        if cuts == 1:
            return see(batch, keys, None)
        order = parts.order(batch["segments"].shape[1], cuts)
        # Every device has what is known of a row whole, and in the order of its tokens: a few numbers each.
        whole = {name: devices.keep(batch[name], _ROWS)[:, np.argsort(order)] for name in _READ}
        return see({**batch, **whole}, keys, order)

    def attend_part(queries: Array, keys: Array, values: Array, seen: Any) -> Array:
        if not way.by_heads:
            return attend(queries, devices.gather(keys, "length", 1), devices.gather(values, "length", 1), seen)
        queries, keys, values = (devices.exchange(x, "length", 2, 1) for x in (queries, keys, values))
        return devices.exchange(attend(queries, keys, values, seen), "length", 1, 2)

    queries, keys = ("rows", "length", "heads", "head_dim"), ("rows", "length", "kv_heads", "head_dim")
    return see_rows, devices.local(attend_part, (queries, keys, keys, way.seen), queries)


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
    device, devices = sharding.device_of(mesh), sharding.MeshDevices(mesh)
    lacking = {key: way.lacks(architecture, dtype, device, devices) for key, way in ATTENTION.items()}
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


def _gathered(attend: Callable[..., Array]) -> Callable[[Architecture, int | None], tuple[Any, Attend]]:
    """Attention over gathered keys."""

    def make(a: Architecture, longest: int | None) -> tuple[Any, Attend]:
        def see(batch: Batch, keys: int, order: Order) -> Any:
            responses = batch["lengths"].shape[-1]
            layout = functools.partial(attention.key_layout, responses=responses, keys=keys)
            rows = batch["segments"], batch["branches"]
            return see_kinds(a, lambda window: _in_order(layout(*rows, window=window), order))

        return see, functools.partial(attend, scale=a.attention_scale, softcap=a.attn_logit_softcapping)

    return make


def _in_order(layout: Any, order: Order) -> Any:
    return layout if order is None else layout.reordered(order)


def _masked(a: Architecture, longest: int | None) -> tuple[Any, Attend]:
    """Attention through the whole mask."""

    def see(batch: Batch, keys: int, order: Order) -> Any:
        segments, branches, positions = (batch[name] for name in _READ)

        def mask(window: int | None) -> Array:
            found = attention.visible(segments, branches, positions, window)
            return found if order is None else found[:, order][:, :, order]

        return see_kinds(a, mask)

    return see, functools.partial(attention.dense, scale=a.attention_scale, softcap=a.attn_logit_softcapping)


def _sequences(a: Architecture, longest: int | None) -> tuple[Any, Attend]:
    """Attention over sequences."""
    windows = tuple(dict.fromkeys(kind.sliding_window for kind in a.kinds))

    def see(batch: Batch, keys: int, order: Order) -> Any:
        slots, responses = batch["lengths"].shape[-2:]
        layout = functools.partial(sequences.sequences, slots=slots, responses=responses, keys=keys, longest=longest)
        rows = batch["segments"], batch["branches"]
        return see_kinds(a, lambda window: _in_order(layout(*rows, window=windows.index(window)), order))

    return see, functools.partial(sequences.attend, scale=a.attention_scale, windows=windows)


def _off_cpu(a: Architecture, dtype: jax.typing.DTypeLike, device: Any, devices: Devices) -> str | None:
    return None if device.platform == "cpu" else f"builds the whole mask, on CPUs only, and this is a {device.platform}"


def _off_tpu(a: Architecture, dtype: jax.typing.DTypeLike, device: Any, devices: Devices) -> str | None:
    return None if device.platform == "tpu" else f"runs on TPUs only and this is a {device.platform}"


def _off_cudnn(a: Architecture, dtype: jax.typing.DTypeLike, device: Any, devices: Devices) -> str | None:
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
    heads, tensor, context = a.num_key_value_heads, devices.parts("kv_heads"), devices.parts("length")
    if heads % (tensor * context):
        return (
            f"exchanges the length of rows for heads, and {heads} key-value heads do not divide over mesh.tensor="
            f"{tensor} × mesh.context={context}"
        )
    return None


def _splash(a: Architecture, longest: int | None) -> tuple[Any, Attend]:
    from daajax.ops.splash import check, splash  # here: a second of imports that only TPUs need

    see, attend = _gathered(splash)(a, longest)

    def see_checked(batch: Batch, keys: int, order: Order) -> Any:
        check(keys, [kind.sliding_window for kind in a.kinds])
        return see(batch, keys, order)

    return see_checked, attend


_GATHERED = KeyLayout(_ROWS, _ROWS, _ROWS, _QUERIES, _QUERIES)  # pyright: ignore[reportArgumentType] - axes in place of arrays

ATTENTION = {
    "splash": Attention(_splash, _GATHERED, _off_tpu),
    # It knows no queries that begin in the middle of their keys, so each device has all tokens of some heads.
    "cudnn": Attention(_sequences, _ROWS, _off_cudnn, by_heads=True),
    "blockwise": Attention(_gathered(blockwise), _GATHERED),
    "dense": Attention(_masked, _QUERIES, _off_cpu),
}

FASTEST = {"tpu": "splash", "gpu": "cudnn"}  # by platform; elsewhere, and where it does not serve, blockwise
