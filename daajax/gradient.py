"""The gradient of an update's loss: score, differentiate the loss with respect to log-probs, pull it back.

The loss is a function of `[examples, K]` log-probs, and its gradient is taken on those small arrays; the model's
vector-Jacobian product then pulls it back. With one micro-batch that is plain backpropagation. With several, an
objective that couples the examples of an update first sees all of them: one pass scores without gradient, a second one
pulls back. So does a loss that balances experts over the update. The others need one pass.

A loss that takes each row by itself may be differentiated inside the head, while a row's logits are there
(`daajax.ops.head`): only the gradient of the hidden states is pulled back then.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from daajax import metrics, sharding
from daajax.loss import Counts, Order, State, Sums, loss_of, router_loss, sums_of
from daajax.losses.terms import Needs, Term
from daajax.models import lora
from daajax.models.decoder import Params, Routing
from daajax.scoring import Batch, Scorer, States

Scored = tuple[Sums, Routing | None]  # what the loss is a function of


class Beside(NamedTuple):
    """Parameters beside the state, which no update changes.

    Attributes:
        frozen: The policy's that are not trained.
        reference: Those of a live reference that are neither frozen ones of the policy nor part of the state.
    """

    frozen: Params
    reference: Params

    def following(self, reference: Any) -> "Beside":
        """The same with the reference of a state that has one."""
        return self._replace(reference=reference) if reference else self


NOTHING = Beside({}, {})


class Live(NamedTuple):
    """A reference whose model is there beside the policy's.

    Attributes:
        scorer: Scores rows under it.
        params: Its parameters.
    """

    scorer: Scorer
    params: Params

    @classmethod
    def beside(cls, policy: Scorer, scorer: Scorer, beside: Beside) -> "Live":
        """The reference beside a policy, which shares its frozen parameters where it is the same model.

        Args:
            policy: Scores rows under the policy.
            scorer: Scores rows under the reference.
            beside: The parameters of both that no update changes.
        """
        return cls(scorer, lora.joined(beside.reference, beside.frozen) if scorer is policy else beside.reference)


def sums_under(
    scorer: Scorer,
    params: Params,
    batch: Batch,
    needs: Needs,
    *,
    keys: int,
    live: Live | None = None,
    routed: bool = False,
    is_frozen: bool = False,
) -> tuple[Sums, Routing | None]:
    """Scores one micro-batch, sums what the terms need of it, and how routers sent its tokens, if `routed`.

    Args:
        scorer: The policy's.
        params: The policy's.
        batch: The micro-batch; what it says of the reference counts only if that is not live.
        needs: What the terms need.
        keys: The plan's capacity in gathered keys.
        live: The reference, where it is; it gets no gradient.
        routed: Whether to sum how routers sent the tokens to experts.
        is_frozen: Whether the head may count on a projection that is not trained.
    """
    batch, compared = _with_reference(live, batch, needs, keys)
    own = scorer.states(params, batch, keys=keys, routed=routed)
    found = scorer.statistics(own, batch, needs.statistics, reference=compared, is_frozen=is_frozen)
    return sums_of(found, batch, needs, sharding.MeshDevices(scorer.mesh)), own.routing


def _with_reference(live: Live | None, batch: Batch, needs: Needs, keys: int) -> tuple[Batch, States | None]:
    """The batch with what a live reference makes of it; its states, where whole distributions are read."""
    if live is None:
        return batch, None
    states = live.scorer.states(jax.lax.stop_gradient(live.params), batch, keys=keys)
    return {**batch, **_columns(live.scorer, states, batch, needs)}, states if needs.live else None


def known_of_reference(
    live: Live, batch: Batch, needs: Needs, *, keys: int
) -> dict[str, Float[Array, "parts rows scored"]]:
    """What a live reference makes of a whole update, under the keys of a batch that it is cached under otherwise."""

    @jax.jit
    def of_part(params: Params, part: Batch) -> dict[str, Array]:
        return _columns(live.scorer, live.scorer.states(params, part, keys=keys), part, needs)

    parts = [{name: value[n] for name, value in batch.items()} for n in range(len(batch["places"]))]
    found = [of_part(live.params, part) for part in parts]
    return jax.tree.map(lambda *values: jnp.stack(values), *found)


def _columns(scorer: Scorer, states: States, part: Batch, needs: Needs) -> dict[str, Float[Array, "rows scored"]]:
    """The reference's log-probs, and its entropies as a share of the largest there is."""
    found = scorer.statistics(states, part, needs.of_reference)
    columns = {"reference": found["logps"]}
    if "entropies" in found:
        columns["entropies"] = found["entropies"] / math.log(scorer.model.architecture.vocab_size)
    return columns


def loss_and_gradient(
    scorer: Scorer,
    params: Params,
    batch: Batch,
    terms: Sequence[Term],
    state: State,
    *,
    batch_size: int,
    keys: int,
    live: Live | None = None,
    router_loss_coef: float = 0.0,
    frozen: Params | None = None,
    head: str = "token",
) -> tuple[Params, metrics.Logged, State]:
    """Gradient of an update's loss, float32; what to log of it; what the objectives keep after it.

    Args:
        scorer: Scores rows.
        params: The policy's that are trained.
        batch: A whole update, `[micro_batches, rows, …]`.
        terms: The loss.
        state: What the objectives keep, after the update before.
        batch_size: Examples an update.
        keys: The plan's capacity in gathered keys.
        live: The reference, where its model is there.
        router_loss_coef: What `daajax.loss.router_loss` is added with.
        frozen: The policy's that are not trained; they get no gradient.
        head: One of `daajax.heads.FORMS`, which `daajax.heads.choose` finds to do for this loss.
    """
    update = _Update(
        scorer,
        terms,
        Needs.of(terms),
        Counts.of(batch),
        state,
        batch_size,
        keys,
        live,
        router_loss_coef,
        frozen or {},
        head,
    )
    if len(batch["places"]) == 1:
        gradient, (logged, kept) = update.of_part(params, {name: value[0] for name, value in batch.items()})
        return gradient, logged, kept
    if update.needs.coupled or update.balances:
        update, batch = update.with_known_reference(batch)
        return update.in_two_passes(params, batch)

    def accumulate(total: Params, part: Batch) -> tuple[Params, metrics.Logged]:
        gradient, (logged, _) = update.of_part(params, part)
        return jax.tree.map(jnp.add, total, gradient), logged

    gradient, logged = jax.lax.scan(accumulate, _zeros(params), batch)
    return gradient, logged.combined(), {}


def _zeros(params: Params) -> Params:
    return jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params)


def _in_float32(gradient: Params) -> Params:
    return jax.tree.map(lambda g: g.astype(jnp.float32), gradient)


class _Update(NamedTuple):
    """One update's loss, and the ways to its gradient; attributes are the arguments of `loss_and_gradient`.

    Attributes:
        needs: What the terms need.
        counts: Of the whole update.
    """

    scorer: Scorer
    terms: Sequence[Term]
    needs: Needs
    counts: Counts
    state: State
    batch_size: int
    keys: int
    live: Live | None
    router_loss_coef: float
    frozen: Params
    head: str

    @property
    def balances(self) -> bool:
        """Whether a loss that balances experts is added."""
        return self.router_loss_coef > 0

    def of_part(self, params: Params, part: Batch) -> tuple[Params, tuple[metrics.Logged, State]]:
        """Gradient of a micro-batch's share of the loss, what to log of it, and what objectives keep after it."""
        if self.head == "row":
            return self.pulled_back_by_row(params, part)
        return self.pulled_back(params, part, lambda scored: self.cotangents(scored, part))

    def with_known_reference(self, batch: Batch) -> tuple["_Update", Batch]:
        """The same with a live reference scored once for both passes, unless its whole distributions are read."""
        if self.live is None or self.needs.live:
            return self, batch

        def score(_: None, part: Batch) -> tuple[None, Batch]:
            return None, _with_reference(self.live, part, self.needs, self.keys)[0]

        return self._replace(live=None), jax.lax.scan(score, None, batch)[1]

    def in_two_passes(self, params: Params, batch: Batch) -> tuple[Params, metrics.Logged, State]:
        """All micro-batches are scored before any is pulled back; see `loss_and_gradient`."""
        _, (sums, routing) = jax.lax.scan(lambda _, part: (None, self.scored(params, part)), None, batch)
        whole = jax.tree.map(lambda x: x.sum(axis=0), routing)
        (cotangent, d_routing), (logged, kept) = self.cotangents((sums, whole), batch)

        def pull(total: Params, operands: tuple[Batch, Sums]) -> tuple[Params, None]:
            part, cotangent = operands
            gradient, _ = self.pulled_back(params, part, lambda _: ((cotangent, d_routing), None))
            return jax.tree.map(jnp.add, total, gradient), None

        gradient, _ = jax.lax.scan(pull, _zeros(params), (batch, cotangent))
        return gradient, logged, kept

    def scored(self, params: Params, part: Batch) -> Scored:
        """What the loss is a function of, of one micro-batch."""
        return sums_under(
            self.scorer,
            lora.joined(params, self.frozen),
            part,
            self.needs,
            keys=self.keys,
            live=self.live,
            routed=self.balances,
            is_frozen=self.head == "frozen",
        )

    def cotangents(self, scored: Scored, part: Batch) -> tuple[Scored, tuple[metrics.Logged, State]]:
        """Gradient of the loss with respect to sums; the examples of other parts are absent from it."""
        (sums, routing), order = scored, Order(part["places"], self.batch_size)
        by_place = jax.tree.map(order.by_place, sums)
        differentiate = jax.grad(loss_of, has_aux=True)
        gradient, (logged, kept) = differentiate(by_place, order.examples(part), self.terms, self.counts, self.state)
        d_routing, logged = self.of_routing(routing, logged)
        return (jax.tree.map(order.by_slot, gradient), d_routing), (logged, kept)

    def of_routing(self, routing: Routing | None, logged: metrics.Logged) -> tuple[Routing | None, metrics.Logged]:
        """Gradient of the loss that balances experts, and the log with it."""
        if routing is None:
            return None, logged
        loss, gradient = jax.value_and_grad(lambda routing: self.router_loss_coef * router_loss(routing))(routing)
        return gradient, logged.with_term("router", loss)

    def pulled_back(
        self, params: Params, part: Batch, cotangents_of: Callable[[Scored], tuple[Scored, Any]]
    ) -> tuple[Params, Any]:
        """The gradient, from that of the sums."""
        scored, pull = jax.vjp(lambda params: self.scored(params, part), params)
        cotangent, rest = cotangents_of(scored)
        return _in_float32(pull(cotangent)[0]), rest

    def pulled_back_by_row(self, params: Params, part: Batch) -> tuple[Params, tuple[metrics.Logged, State]]:
        """The gradient, from that of hidden states, which the head makes row by row."""
        part, compared = _with_reference(self.live, part, self.needs, self.keys)

        def states(params: Params) -> tuple[Array, Routing | None]:
            whole = lora.joined(params, self.frozen)
            own = self.scorer.states(whole, part, keys=self.keys, routed=self.balances)
            return own.hidden, own.routing

        (hidden, routing), pull = jax.vjp(states, params)
        name = self.scorer.model.architecture.projection
        logged, d_hidden, d_weights = self.scorer.row_gradients(
            self.scorer.states_of(lora.joined(params, self.frozen), hidden),
            part,
            self.needs.statistics,
            self.of_row,
            self.counts,
            reference=compared,
            is_trained=name in params,
        )
        d_routing, logged = self.of_routing(routing, logged.combined())
        gradient = _in_float32(pull((d_hidden, d_routing))[0])
        if d_weights is not None:  # tied, that of the embeddings is there already
            gradient = {**gradient, name: gradient[name] + d_weights.astype(jnp.float32)}
        return gradient, (logged, {})

    def of_row(self, values: dict[str, Array], row: Batch, counts: Counts) -> tuple[dict[str, Array], metrics.Logged]:
        """Gradient of a row's share of the loss with respect to its tokens' statistics, and what to log of it."""

        def loss(values: dict[str, Array]) -> tuple[Array, tuple[metrics.Logged, State]]:
            statistics, rows = ({name: x[None] for name, x in given.items()} for given in (values, row))
            sums = jax.tree.map(lambda x: x[0], sums_of(statistics, rows, self.needs))
            return loss_of(sums, row, self.terms, counts, {})

        gradient, (logged, _) = jax.grad(loss, has_aux=True)(values)
        return gradient, logged
