"""The one scoring function: from parameters and rows to the log-prob of every scored token.

Policy, reference and evaluation call the same `Scorer`; what differs is only whose parameters it is given.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from daajax import sharding
from daajax.models.architecture import Architecture
from daajax.models.decoder import Decoder, Params, Routing, projection, variables
from daajax.models.lora import Lora
from daajax.ops import attention, experts
from daajax.ops.head import token_statistics

Batch = Mapping[str, Array]

SUM_CHUNK = 1024  # scored tokens whose masks exist at once

# How queries see keys: a function of (batch, gathered keys, window) made once per micro-batch, and the attention that
# reads it.
ATTENTION: dict[str, tuple[Callable[[Batch, int, int | None], Any], Callable[..., Array]]] = {
    "blockwise": (
        lambda batch, keys, window: attention.key_layout(
            batch["segments"], batch["branches"], responses=batch["lengths"].shape[-1], keys=keys, window=window
        ),
        attention.blockwise,
    ),
    "dense": (
        lambda batch, keys, window: attention.visible(batch["segments"], batch["branches"], batch["positions"], window),
        attention.dense,
    ),
}


@dataclasses.dataclass(frozen=True)
class Scorer:
    """Scores rows under a model.

    Attributes:
        model: The decoder.
        see: Makes what attention needs to know of the rows.
        mesh: Where it runs.
        attention: Name of the attention.
    """

    model: Decoder
    see: Callable[[Batch, int], Any]
    mesh: Any
    attention: str

    @classmethod
    def make(
        cls,
        architecture: Architecture,
        mesh: Any,
        *,
        attention: str,
        remat: str,
        dtype: jax.typing.DTypeLike,
        param_dtype: jax.typing.DTypeLike,
        lora: Lora | None = None,
    ) -> "Scorer":
        """Puts model, attention and head together for a mesh.

        Args:
            architecture: What the model computes.
            mesh: Where it runs.
            attention: Key of `ATTENTION`.
            remat: Key of `decoder.REMAT`.
            dtype: Compute dtype.
            param_dtype: Dtype of the parameters.
            lora: Adapters that it may have.

        Raises:
            UserError: If the mesh cuts the heads into unequal parts.
        """
        sharding.check_divides(mesh, "heads", architecture.num_attention_heads, "attention heads")
        sharding.check_divides(mesh, "kv_heads", architecture.num_key_value_heads, "key-value heads")
        see, attend = ATTENTION[attention]
        a = architecture
        attend = functools.partial(attend, scale=a.attention_scale, softcap=a.attn_logit_softcapping)
        queries, keys = ("rows", "length", "heads", "head_dim"), ("rows", "length", "kv_heads", "head_dim")
        model = Decoder(
            architecture,
            attend=sharding.local(attend, mesh, (queries, keys, keys, ("rows",)), queries),
            mix=functools.partial(_mix, mesh),
            constrain=sharding.constrain(mesh, ("rows", "length", None)),
            dtype=dtype,
            param_dtype=param_dtype,
            remat=remat,
            lora=lora,
        )
        return cls(model, lambda batch, keys: see_kinds(a, lambda window: see(batch, keys, window)), mesh, attention)

    def states(self, params: Params, batch: Batch, *, keys: int, routed: bool = False) -> "States":
        """The model's last hidden states of one micro-batch, with the projection that makes logits of them.

        Args:
            params: Whose.
            batch: One micro-batch, keys of `daajax.data.batches.LAYOUT`.
            keys: The plan's capacity in gathered keys.
            routed: Whether to sum how routers sent the tokens to experts.
        """
        apply: Any = self.model.apply
        architecture = self.model.architecture
        seen, weighed = self.see(batch, keys), responses_served(batch) if routed else None
        hidden, routing = apply(variables(params), batch["tokens"], batch["positions"], seen, weighed)
        return States(hidden, projection(params, architecture), architecture.final_logit_softcapping, routing)

    def statistics(
        self, states: "States", batch: Batch, names: tuple[str, ...], *, reference: "States | None" = None
    ) -> dict[str, Float[Array, "rows scored"]]:
        """Statistics of the distributions that scored tokens are drawn from, float32; 0 in empty slots.

        Args:
            states: What `states` returned.
            batch: The same micro-batch.
            names: Keys of `daajax.ops.head.STATISTICS`.
            reference: States of the reference's model; it is read by `kl`, and only by it.
        """
        rows, whole = ("rows",), ()
        given = [(states.hidden, rows), (states.weights, whole)]
        given += [(batch[name], rows) for name in ("sources", "targets", "owners")]
        if reference is not None:
            given += [(reference.hidden, rows), (reference.weights, whole)]
        arrays, axes = zip(*given, strict=True)
        score = functools.partial(
            _head_statistics,
            names=names,
            softcap=states.softcap,
            reference_softcap=None if reference is None else reference.softcap,
        )
        return sharding.local(score, self.mesh, axes, rows)(*arrays)

    def token_logps(self, params: Params, batch: Batch, *, keys: int) -> Float[Array, "rows scored"]:
        """Log-probs of the scored tokens, nats, float32; 0 in empty slots. Arguments are those of `states`."""
        return self.statistics(self.states(params, batch, keys=keys), batch, ("logps",))["logps"]


class States(NamedTuple):
    """What a model makes of rows.

    Attributes:
        hidden: Last hidden states.
        weights: The vocabulary projection.
        softcap: Where its logits are capped.
        routing: How routers sent the tokens to experts, if that was asked for.
    """

    hidden: Float[Array, "rows length embed"]
    weights: Float[Array, "vocab embed"]
    softcap: float | None
    routing: Routing | None


def responses_served(batch: Batch) -> Float[Array, "rows length"]:
    """How many responses each token serves: a shared prompt's all of its example, a response's one, padding none."""
    segments, branches = batch["segments"], batch["branches"]
    responses = (batch["lengths"] > 0).sum(axis=-1)  # of each slot; segment s is slot s - 1
    shared = jnp.take_along_axis(responses, jnp.maximum(segments - 1, 0), axis=1)
    return jnp.where(segments > 0, jnp.where(branches == 0, shared, 1), 0).astype(jnp.float32)


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


def _mix(mesh: Any, x: Array, chosen: Array, weights: Array, gate: Array, up: Array, down: Array, act: Any) -> Array:
    """`experts.mix` with the experts cut over devices: each computes its own experts' part for its rows."""

    def part(x, chosen, weights, gate, up, down, ids) -> Array:
        return experts.mix(x, chosen, weights, gate, up, down, act, ids)[None]

    rows, own, ids = ("rows",), ("experts",), jnp.arange(len(gate), dtype=jnp.int32)
    axes = (rows, rows, rows, own, own, own, own)
    return sharding.local(part, mesh, axes, (*own, *rows))(x, chosen, weights, gate, up, down, ids).sum(axis=0)


def _head_statistics(
    hidden: Float[Array, "rows length embed"],
    weights: Float[Array, "vocab embed"],
    sources: Int[Array, "rows scored"],
    targets: Int[Array, "rows scored"],
    owners: Int[Array, "rows scored"],
    reference_hidden: Float[Array, "rows length reference_embed"] | None = None,
    reference_weights: Float[Array, "vocab reference_embed"] | None = None,
    *,
    names: tuple[str, ...],
    softcap: float | None,
    reference_softcap: float | None = None,
) -> dict[str, Float[Array, "rows scored"]]:
    """Statistics at the scored slots; only hidden states that predict a scored token reach the projection."""
    rows, scored = sources.shape

    # Scored slots fill up from the front of each row: slot by slot through the rows, the empty ones come last.
    def in_turn(hidden: Array) -> Array:
        at_sources = jnp.take_along_axis(hidden, sources[:, :, None], axis=1)
        return at_sources.swapaxes(0, 1).reshape(rows * scored, -1)

    last = jnp.where(owners.T.reshape(-1) >= 0, jnp.arange(rows * scored), -1).max()
    statistics = token_statistics(
        in_turn(hidden),
        weights,
        targets.T.reshape(-1),
        last + 1,
        names=names,
        reference_hidden=None if reference_hidden is None else in_turn(reference_hidden),
        reference_projection=reference_weights,
        softcap=softcap,
        reference_softcap=reference_softcap,
    )
    return {name: jnp.where(owners >= 0, values.reshape(scored, rows).T, 0) for name, values in statistics.items()}


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def response_sums(
    values: Float[Array, "rows scored"], owners: Int[Array, "rows scored"], slots: int, responses: int
) -> Float[Array, "rows slots responses"]:
    """Sums values over the scored tokens of each response.

    Masked sums of a chunk of tokens at a time instead of a scatter: their order is fixed, so the result is the same on
    every run and platform. The backward pass is a gather.
    """
    rows, scored = values.shape
    padding = -scored % SUM_CHUNK
    chunks: Any = tuple(
        jnp.pad(x, ((0, 0), (0, padding)), constant_values=empty).reshape(rows, -1, SUM_CHUNK).swapaxes(0, 1)
        for x, empty in ((values, 0), (owners, -1))
    )

    def add(total: Array, chunk: tuple[Array, Array]) -> tuple[Array, None]:
        values, owners = chunk
        owned = owners[:, :, None] == jnp.arange(slots * responses)[None, None]
        return total + jnp.where(owned, values[:, :, None], 0).sum(axis=1), None

    total, _ = jax.lax.scan(add, jnp.zeros((rows, slots * responses), values.dtype), chunks)
    return total.reshape(rows, slots, responses)


def _response_sums_forward(values, owners, slots, responses):
    return response_sums(values, owners, slots, responses), owners


def _response_sums_backward(slots, responses, owners, cotangent):
    flat = cotangent.reshape(len(owners), slots * responses)
    return jnp.where(owners >= 0, jnp.take_along_axis(flat, jnp.maximum(owners, 0), axis=1), 0), None


response_sums.defvjp(_response_sums_forward, _response_sums_backward)
