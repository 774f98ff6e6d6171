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

from daajax import attention as attentions
from daajax import sharding
from daajax.models.architecture import Architecture
from daajax.models.decoder import Decoder, Params, Routing, joined, projection, variables
from daajax.models.lora import Lora
from daajax.ops import embedding, experts
from daajax.ops.devices import ONE_DEVICE, Devices
from daajax.ops.head import token_statistics
from daajax.ops.logits import ROWS, SLOTS, Head
from daajax.ops.row_head import row_gradients
from daajax.ops.slots import at_sources

Batch = Mapping[str, Array]

SUM_CHUNK = 1024  # scored tokens whose masks exist at once


@dataclasses.dataclass(frozen=True)
class Scorer:
    """Scores rows under a model.

    Attributes:
        model: The decoder.
        see: Makes what attention needs to know of the rows.
        mesh: Where it runs.
        attention: Which attention, and why.
    """

    model: Decoder
    see: Callable[[Batch, int], Any]
    mesh: Any
    attention: attentions.Choice

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
        longest: int | None = None,
    ) -> "Scorer":
        """Puts model, attention and head together for a mesh.

        Args:
            architecture: What the model computes.
            mesh: Where it runs.
            attention: Key of `daajax.attention.ATTENTION`, or `auto`.
            remat: Key of `daajax.models.remat.REMAT`.
            dtype: Compute dtype.
            param_dtype: Dtype of the parameters.
            lora: Adapters that it may have.
            longest: Most tokens of a prompt with one response; None: as many as a row has.

        Raises:
            UserError: If the mesh cuts the heads into unequal parts, or the attention does not serve there.
        """
        sharding.check_divides(mesh, "heads", architecture.num_attention_heads, "attention heads")
        sharding.check_divides(mesh, "kv_heads", architecture.num_key_value_heads, "key-value heads")
        chosen, devices = attentions.choose(attention, architecture, mesh, dtype), sharding.MeshDevices(mesh)
        see, attend = attentions.make(chosen.name, architecture, devices, longest=longest)
        model = Decoder(
            architecture,
            attend=attend,
            mix=functools.partial(_mix, mesh),
            join=joined if devices.parts("length") == 1 else lambda x: x,
            lookup=functools.partial(embedding.lookup, devices=devices),
            constrain=sharding.constrain(mesh, ("rows", "length", None)),
            dtype=dtype,
            param_dtype=param_dtype,
            remat=remat,
            lora=lora,
        )
        return cls(model, see, mesh, chosen)

    def states(self, params: Params, batch: Batch, *, keys: int, routed: bool = False) -> "States":
        """The model's last hidden states of one micro-batch, with the projection that makes logits of them.

        Args:
            params: Whose.
            batch: One micro-batch, keys of `daajax.data.batches.LAYOUT`.
            keys: The plan's capacity in gathered keys.
            routed: Whether to sum how routers sent the tokens to experts.
        """
        apply: Any = self.model.apply
        seen, weighed = self.see(batch, keys), responses_served(batch) if routed else None
        hidden, routing = apply(variables(params), batch["tokens"], batch["positions"], seen, weighed)
        return self.states_of(params, hidden, routing)

    def states_of(self, params: Params, hidden: Array, routing: Routing | None = None) -> "States":
        """Hidden states with what these parameters make logits of them with."""
        architecture = self.model.architecture
        return States(hidden, projection(params, architecture), architecture.final_logit_softcapping, routing)

    def statistics(
        self,
        states: "States",
        batch: Batch,
        names: tuple[str, ...],
        *,
        reference: "States | None" = None,
        is_frozen: bool = False,
    ) -> dict[str, Float[Array, "rows scored"]]:
        """Statistics of the distributions that scored tokens are drawn from, float32; 0 in empty slots.

        Args:
            states: What `states` returned.
            batch: The same micro-batch.
            names: Keys of `daajax.ops.statistics.STATISTICS`.
            reference: States of the reference's model; it is read by `kl`, and only by it.
            is_frozen: Whether the head may count on a projection that is not trained.
        """
        head, operands = self._head(states, batch, names, reference, is_frozen=is_frozen)
        return token_statistics(head, *operands)

    def row_gradients(
        self,
        states: "States",
        batch: Batch,
        names: tuple[str, ...],
        of_row: Callable[[dict[str, Array], Batch, Any], tuple[dict[str, Array], Any]],
        shared: Any,
        *,
        reference: "States | None" = None,
        is_trained: bool = True,
    ) -> tuple[Any, Array, Array | None]:
        """What a function of a row's statistics gives, and the gradients of hidden states and projection.

        Args:
            states: What `states` returned.
            batch: The same micro-batch.
            names: Keys of `daajax.ops.statistics.STATISTICS`.
            of_row: From a row's statistics, what the batch has of that row, and `shared`, to the gradient of the loss
                with respect to each statistic and whatever else is wanted.
            shared: What it reads besides.
            reference: As for `statistics`.
            is_trained: Whether to make a gradient of the projection.

        Returns:
            What else `of_row` gave, [rows, …]; the gradient of `states.hidden`; that of `states.weights`.
        """
        head, (hidden, *operands) = self._head(states, batch, names, reference)
        _, spread = jax.vjp(lambda hidden: self._at_sources(hidden, batch), states.hidden)
        found, d_hidden, d_weights = row_gradients(
            head, hidden, *operands, of_row=of_row, columns=dict(batch), shared=shared, is_trained=is_trained
        )
        return found, spread(d_hidden)[0], d_weights

    def _at_sources(self, hidden: Array, batch: Batch) -> Array:
        responses = batch["lengths"].shape[-1]
        return at_sources(hidden, batch["sources"], batch["owners"], responses, sharding.MeshDevices(self.mesh))

    def _head(
        self,
        states: "States",
        batch: Batch,
        names: tuple[str, ...],
        reference: "States | None",
        *,
        is_frozen: bool = False,
    ) -> tuple[Head, tuple[Array, ...]]:
        """The head of these states, and what it is given."""
        other = () if reference is None else (self._at_sources(reference.hidden, batch), reference.weights)
        head = Head(
            names,
            softcap=states.softcap,
            reference_softcap=None if reference is None else reference.softcap,
            is_frozen=is_frozen,
            devices=sharding.MeshDevices(self.mesh),
        )
        hidden = self._at_sources(states.hidden, batch)
        return head, (hidden, states.weights, batch["targets"], batch["owners"] >= 0, *other)

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


def _mix(mesh: Any, x: Array, chosen: Array, weights: Array, gate: Array, up: Array, down: Array, act: Any) -> Array:
    """`experts.mix` with the experts cut over devices: each computes its own experts' part for its rows."""

    def part(x, chosen, weights, gate, up, down, ids) -> Array:
        return experts.mix(x, chosen, weights, gate, up, down, act, ids)[None]

    tokens, own, ids = ("rows", "length"), ("experts",), jnp.arange(len(gate), dtype=jnp.int32)
    axes = (tokens, tokens, tokens, own, own, own, own)
    return sharding.local(part, mesh, axes, (*own, *tokens))(x, chosen, weights, gate, up, down, ids).sum(axis=0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def response_sums(
    values: Float[Array, "rows scored"],
    owners: Int[Array, "rows scored"],
    slots: int,
    responses: int,
    devices: Devices = ONE_DEVICE,
) -> Float[Array, "rows slots responses"]:
    """Sums values over the scored tokens of each response.

    Masked sums of a chunk of tokens at a time instead of a scatter: their order is fixed, so the result is the same on
    every run and platform. The backward pass is a gather.

    Args:
        values: Of scored tokens.
        owners: slot · responses + response of each; -1 for none.
        slots: Examples of a row.
        responses: K.
        devices: That rows and their scored slots are cut up over: a response's tokens may lie on several.
    """

    def of_part(values: Array, owners: Array) -> Array:
        return devices.sum(_sums_of_part(values, owners, slots, responses), "scored")

    return devices.local(of_part, (SLOTS, SLOTS), ROWS)(values, owners)


def _sums_of_part(values: Array, owners: Array, slots: int, responses: int) -> Array:
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


def _response_sums_forward(values, owners, slots, responses, devices):
    return response_sums(values, owners, slots, responses, devices), owners


def _response_sums_backward(slots, responses, devices, owners, cotangent):
    def of_part(cotangent: Array, owners: Array) -> Array:
        flat = cotangent.reshape(len(owners), slots * responses)
        return jnp.where(owners >= 0, jnp.take_along_axis(flat, jnp.maximum(owners, 0), axis=1), 0)

    return devices.local(of_part, (ROWS, SLOTS), SLOTS)(cotangent, owners), None


response_sums.defvjp(_response_sums_forward, _response_sums_backward)
