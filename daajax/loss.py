"""The loss of an update: from log-probs per token to sums per response, and from those to one number.

Everything is a function of small arrays. The examples of an update stand in order of place when an objective sees them,
whatever rows and micro-batches they were scored in.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from daajax import metrics
from daajax.losses.objective import Losses
from daajax.losses.scores import Responses
from daajax.losses.sums import SUMS, Tokens
from daajax.losses.terms import Needs, Term
from daajax.models.decoder import Routing
from daajax.ops.devices import ONE_DEVICE, Devices
from daajax.scoring import Batch, response_sums

State = Mapping[str, Mapping[str, Float[Array, ""]]]  # what objectives keep from update to update, by the term's name


class Sums(NamedTuple):
    """Sums over the scored tokens of each response, nats.

    Attributes:
        logps: Log-probs under the policy.
        log_ratios: Of the same minus those under the reference, subtracted token by token: float32 keeps that exact.
            None without a reference.
        further: What else the terms need, by key of `SUMS`.
    """

    logps: Float[Array, "*axes responses"]
    log_ratios: Float[Array, "*axes responses"] | None
    further: Mapping[str, Float[Array, "*axes responses"]] = {}


def sums_of(
    statistics: Mapping[str, Float[Array, "rows scored"]], batch: Batch, needs: Needs, devices: Devices = ONE_DEVICE
) -> Sums:
    """Sums one micro-batch's statistics of tokens.

    Args:
        statistics: The policy's, by key of `daajax.ops.statistics.STATISTICS`.
        batch: The micro-batch.
        needs: What the terms need.
        devices: That its rows are cut up over.
    """
    _, slots, responses = batch["lengths"].shape

    def total(values: Array) -> Array:
        return response_sums(values, batch["owners"], slots, responses, devices)

    logps = statistics["logps"]
    tokens = Tokens(
        logps=logps,
        offsets=batch["offsets"],
        shortest=_shortest(batch["lengths"], batch["owners"]),
        statistics=statistics,
        **{name: batch.get(name) for name in ("reference", "entropies", "kept", "reference_kept")},
    )
    return Sums(
        total(logps),
        total(logps - batch["reference"]) if needs.reference else None,
        {name: total(SUMS[name].of(tokens)) for name in needs.sums},
    )


def _shortest(
    lengths: Int[Array, "rows slots responses"], owners: Int[Array, "rows scored"]
) -> Int[Array, "rows scored"]:
    """Of each scored token, the length of the shortest response that its example has."""
    least = jnp.where(lengths > 0, lengths, jnp.iinfo(lengths.dtype).max).min(axis=2)
    return jnp.take_along_axis(least, jnp.maximum(owners, 0) // lengths.shape[2], axis=1)


class Counts(NamedTuple):
    """What sums over an update are divided by, known from the data.

    Attributes:
        examples: All of them.
        tokens: Scored tokens of their response 0.
        wanted: Examples with label 1; None where the terms read no labels.
    """

    examples: Float[Array, ""]
    tokens: Float[Array, ""]
    wanted: Float[Array, ""] | None

    @classmethod
    def of(cls, batch: Batch) -> "Counts":
        """Counts a whole update, every micro-batch."""
        real = batch["places"] >= 0
        wanted = (real & (batch["labels"] == 1)).sum().astype(jnp.float32) if "labels" in batch else None
        tokens = jnp.where(real, batch["lengths"][..., 0], 0).sum()
        return cls(real.sum().astype(jnp.float32), tokens.astype(jnp.float32), wanted)


def loss_of(
    sums: Sums, examples: Batch, terms: Sequence[Term], counts: Counts, state: State
) -> tuple[Float[Array, ""], tuple[metrics.Logged, State]]:
    """The loss of some examples: their share of the update's.

    Args:
        sums: Of n examples, `[n, K]`.
        examples: `lengths` `[n, K]`, `weights` and `places` `[n]`; place -1 is no example. Beside them what the terms
            read of the data and of draws.
        terms: What to add up.
        counts: Of the whole update.
        state: What the terms keep, as it was after the last update.

    Returns:
        The loss; and what to log of these examples, and the state after this update.
    """
    real = examples["places"] >= 0
    given: dict[str, Any] = {name: value for name, value in examples.items() if name in Responses._fields}
    responses = Responses(logps=sums.logps, log_ratios=sums.log_ratios, real=real, sums=sums.further, **given)
    total, results, kept = jnp.float32(0), [], {}
    for term in terms:
        result = term.loss(responses._replace(state=state.get(term.name, {})))
        loss = share_of(result, examples, counts)
        total += term.weight * loss
        results.append((term.name, loss, result))
        if result.state:
            kept[term.name] = dict(result.state)
    return total, (metrics.of_examples(total, results, responses, real, counts.examples, counts.wanted), kept)


def share_of(result: Losses, examples: Batch, counts: Counts) -> Float[Array, ""]:
    """What a term's result for some examples adds to the update's loss, but for the term's weight.

    Args:
        result: Of n examples.
        examples: `weights` and `places` `[n]`.
        counts: Of the whole update.
    """

    def total(losses: Float[Array, " examples"]) -> Float[Array, ""]:
        return jnp.where(examples["places"] >= 0, examples["weights"] * losses, 0).sum()

    loss = total(result.losses) / counts.examples
    return loss if result.token_losses is None else loss + total(result.token_losses) / counts.tokens


def router_loss(routing: Routing) -> Float[Array, ""]:
    """What balances experts: least, k of k experts a token, where each gets as many tokens as every other.

    Args:
        routing: Sums over the tokens of a whole update; layers count alike.

    References:
        Eqs. 4 to 6 of Fedus et al. 2021, https://arxiv.org/abs/2101.03961, over k experts a token and all layers as in
        transformers' `load_balancing_loss_func`.
    """
    sent, given = (sums.reshape(-1, sums.shape[-1]).sum(axis=0) for sums in (routing.chosen, routing.probabilities))
    tokens = jax.lax.stop_gradient(given.sum())  # what a router gives a token sums to 1
    return len(given) * (sent / tokens * given / tokens).sum()


class Order:
    """The way from slots `[…, rows, slots]` to the examples of an update in order of place, and back."""

    def __init__(self, places: Int[Array, "*parts rows slots"], batch_size: int):
        self._places, self._batch_size = places, batch_size

    def by_place(self, x: Array) -> Array:
        """Values by place, `[batch_size, …]`; zeros where a place does not occur."""
        where = jnp.where(self._places < 0, self._batch_size, self._places).reshape(-1)
        values = x.reshape(where.size, *x.shape[self._places.ndim :])
        return jnp.zeros((self._batch_size, *values.shape[1:]), x.dtype).at[where].set(values, mode="drop")

    def examples(self, batch: Batch) -> Batch:
        """What `loss_of` reads of a batch besides sums."""
        names = [name for name in ("weights", *Responses._fields) if name in batch]
        by_place = {name: self.by_place(batch[name]) for name in names}
        return by_place | {"places": self.by_place(batch["places"] + 1) - 1}

    def by_slot(self, x: Array) -> Array:
        """Values by slot, `[…, rows, slots, …]`; zeros in empty slots."""
        real = (self._places >= 0).reshape(self._places.shape + (1,) * (x.ndim - 1))
        return jnp.where(real, x[jnp.maximum(self._places, 0)], 0)
