"""One update: score, take the loss's gradient with respect to log-probs, pull it back, step the optimizer.

The loss is a function of `[examples, K]` log-probs, and its gradient is taken on those small arrays; the model's
vector-Jacobian product then pulls it back. With one micro-batch that is plain backpropagation. With several, an
objective that couples the examples of an update first sees all of them: one pass scores without gradient, a second one
pulls back. So does a loss that balances experts over the update. The others need one pass.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from daajax import ema, metrics, sharding
from daajax.loss import Counts, Order, State, Sums, loss_of, router_loss, sums_of
from daajax.losses.terms import Needs, Term, initial_state
from daajax.models import lora
from daajax.models.decoder import Params, Routing
from daajax.scoring import Batch, Scorer, States

Scored = tuple[Sums, Routing | None]  # what the loss is a function of


class TrainState(NamedTuple):
    """What an update reads and replaces; where it is one of shapes or shardings, so is every part.

    Attributes:
        step: Updates done, int32 [].
        params: The policy's that are trained.
        optimizer: The optimizer's state.
        objectives: What objectives keep from update to update, float32 [], by name of the term and their own.
        reference: The same of a reference that follows the policy; empty where it does not.
    """

    step: Any
    params: Params
    optimizer: Any
    objectives: Any = ()
    reference: Any = ()


def init_state(
    params: Params,
    optimizer: optax.GradientTransformation,
    shardings: TrainState,
    terms: Sequence[Term],
    *,
    updates: int = 0,
    parts: Sequence[str] = ("optimizer", "objectives", "reference"),
) -> TrainState:
    """The state with new parts beside the parameters; each is made where it lives, never whole on one device.

    Args:
        params: The parameters; those of a reference that follows them begin as a copy.
        optimizer: Whose state is new.
        shardings: Where every part lives.
        terms: The loss.
        updates: Done before, with another optimizer; the learning rate is that of the next one.
        parts: Those to make; the others are empty.
    """
    make = {
        "optimizer": lambda p: optax.tree.set(optimizer.init(p), _counts_for_schedule, count=jnp.int32(updates)),
        "objectives": lambda _: jax.tree.map(jnp.float32, initial_state(terms)),
        "reference": lambda p: jax.tree.map(jnp.copy, p) if shardings.reference else (),
    }

    def init(params: Params) -> dict[str, Any]:
        return {name: make[name](params) for name in parts}

    made = jax.jit(init, out_shardings={name: getattr(shardings, name) for name in parts})(params)
    state = TrainState(jax.device_put(jnp.int32(updates), shardings.step), params, ())
    return state._replace(**made)


def _counts_for_schedule(path: Any, value: Any) -> bool:
    """Whether a leaf of optimizer state counts updates for the learning rate, not for the bias of an average."""
    del value
    return getattr(path[-1], "tuple_name", "") == "ScaleByScheduleState"


def abstract_state(
    params: Params, optimizer: optax.GradientTransformation, terms: Sequence[Term], mesh: Any, *, follows: bool = False
) -> TrainState:
    """Shape, dtype and sharding of every leaf of a state: what it is compiled for, and what a checkpoint is read into.

    Args:
        params: The policy's that are trained, abstract.
        optimizer: Whose state lives where its parameters do.
        terms: The loss.
        mesh: The mesh.
        follows: Whether the state has a reference that follows the policy.
    """
    whole = sharding.replicated(mesh)
    moments = jax.eval_shape(optimizer.init, params)
    where = sharding.optimizer_shardings(mesh, optimizer, params, sharding.homes(params))
    return TrainState(
        jax.ShapeDtypeStruct((), jnp.int32, sharding=whole),
        params,
        sharding.abstract(moments, where),
        jax.tree.map(lambda _: jax.ShapeDtypeStruct((), jnp.float32, sharding=whole), initial_state(terms)),
        params if follows else (),
    )


def all_finite(params: Params) -> Array:
    """Whether every parameter is a number, bool []."""
    return jnp.all(jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(params)]))


class Beside(NamedTuple):
    """Parameters beside the state, which no update changes.

    Attributes:
        frozen: The policy's that are not trained.
        reference: Those of a live reference that are neither frozen ones of the policy nor part of the state.
    """

    frozen: Params
    reference: Params

    def at(self, state: TrainState) -> "Beside":
        """The same with the reference of a state that has one."""
        return self._replace(reference=state.reference) if state.reference else self


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
    """
    compared = None
    if live is not None:
        states = live.scorer.states(jax.lax.stop_gradient(live.params), batch, keys=keys)
        batch = {**batch, **_columns(live.scorer, states, batch, needs)}
        compared = states if needs.live else None
    own = scorer.states(params, batch, keys=keys, routed=routed)
    found = scorer.statistics(own, batch, needs.statistics, reference=compared)
    return sums_of(found, batch, needs), own.routing


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
    """
    counts, needs, balances = Counts.of(batch), Needs.of(terms), router_loss_coef > 0

    def score(params: Params, part: Batch) -> Scored:
        policy = lora.joined(params, frozen or {})
        return sums_under(scorer, policy, part, needs, keys=keys, live=live, routed=balances)

    def cotangents(scored: Scored, part: Batch) -> tuple[Scored, tuple[metrics.Logged, State]]:
        """Gradient of the loss with respect to sums; the examples of other parts are absent from it."""
        (sums, routing), order = scored, Order(part["places"], batch_size)
        by_place = jax.tree.map(order.by_place, sums)
        gradient, (logged, kept) = jax.grad(loss_of, has_aux=True)(by_place, order.examples(part), terms, counts, state)
        d_routing = None
        if routing is not None:
            loss, d_routing = jax.value_and_grad(lambda r: router_loss_coef * router_loss(r))(routing)
            logged = logged.with_term("router", loss)
        return (jax.tree.map(order.by_slot, gradient), d_routing), (logged, kept)

    def pull_back(part: Batch, cotangents_of: Callable[[Scored], tuple[Scored, Any]]) -> tuple[Params, Any]:
        scored, pull = jax.vjp(lambda params: score(params, part), params)
        cotangent, rest = cotangents_of(scored)
        (gradient,) = pull(cotangent)
        return jax.tree.map(lambda g: g.astype(jnp.float32), gradient), rest

    if len(batch["places"]) == 1:
        part = {name: value[0] for name, value in batch.items()}
        gradient, (logged, kept) = pull_back(part, lambda scored: cotangents(scored, part))
        return gradient, logged, kept

    zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params)
    if needs.coupled or balances:

        def pull(total: Params, operands: tuple[Batch, Sums]) -> tuple[Params, None]:
            part, cotangent = operands
            gradient, _ = pull_back(part, lambda _: ((cotangent, d_routing), None))
            return jax.tree.map(jnp.add, total, gradient), None

        _, (sums, routing) = jax.lax.scan(lambda _, part: (None, score(params, part)), None, batch)
        whole = jax.tree.map(lambda x: x.sum(axis=0), routing)
        (cotangent, d_routing), (logged, kept) = cotangents((sums, whole), batch)
        gradient, _ = jax.lax.scan(pull, zeros, (batch, cotangent))
        return gradient, logged, kept

    def accumulate(total: Params, part: Batch) -> tuple[Params, metrics.Logged]:
        gradient, (logged, _) = pull_back(part, lambda scored: cotangents(scored, part))
        return jax.tree.map(jnp.add, total, gradient), logged

    gradient, logged = jax.lax.scan(accumulate, zeros, batch)
    return gradient, logged.combined(), {}


class Follow(NamedTuple):
    """How a reference follows the policy (TR-DPO).

    Attributes:
        decay: Share of itself that it keeps; 0 makes it the policy.
        every: Updates between two of its steps.
    """

    decay: float
    every: int

    def after(self, updates: Int[Array, ""], reference: Params, params: Params) -> Params:
        """The reference after so many updates; it was `reference` before the last one."""
        due = updates % self.every == 0
        return jax.lax.cond(due, lambda: ema.follow(reference, params, self.decay), lambda: reference)


class Update:
    """The compiled update: `state, logged = update(state, batch, keys=…)`.

    One `jax.jit` with explicit shardings; the state is donated. A batch of another shape compiles once more. What it
    reads is known as abstract arrays, so that it can be compiled before there are any, for devices that are elsewhere.

    Args:
        scorer: Scores rows.
        terms: The loss.
        optimizer: Steps the parameters; its gradient clipping sees the gradient whose norm is logged.
        learning_rate: The schedule, for the log.
        batch_size: Examples an update.
        state: What it is, abstract.
        beside: The parameters beside the state, abstract.
        reference_scorer: Scores rows under a reference whose model is there beside the policy's; None: none is.
        follow: How a reference that is part of the state follows the policy.
        router_loss_coef: What the loss that balances experts is added with.
    """

    def __init__(
        self,
        scorer: Scorer,
        terms: Sequence[Term],
        optimizer: optax.GradientTransformation,
        learning_rate: optax.Schedule,
        *,
        batch_size: int,
        state: TrainState,
        beside: Beside = NOTHING,
        reference_scorer: Scorer | None = None,
        follow: Follow | None = None,
        router_loss_coef: float = 0.0,
    ):
        def update(state: TrainState, batch: Batch, beside: Beside, keys: int) -> tuple[TrainState, dict[str, Array]]:
            live = None
            if reference_scorer is not None:
                live = Live.beside(scorer, reference_scorer, beside.at(state))
            gradient, logged, kept = loss_and_gradient(
                scorer,
                state.params,
                batch,
                terms,
                state.objectives,
                batch_size=batch_size,
                keys=keys,
                live=live,
                router_loss_coef=router_loss_coef,
                frozen=beside.frozen,
            )
            changes, moments = optimizer.update(gradient, state.optimizer, state.params)
            params: Any = optax.apply_updates(state.params, changes)
            moved = state.reference
            if follow is not None:
                moved = follow.after(state.step + 1, moved, params)
            values = logged.values() | {
                "grad_norm": optax.tree.norm(gradient),
                "learning_rate": learning_rate(state.step),
            }
            return TrainState(state.step + 1, params, moments, kept, moved), values

        self.optimizer, self.state, self.beside = optimizer, state, beside
        self._of_batch = sharding.sharding(scorer.mesh, ("micro_batches", "rows"))
        homes = sharding.homes(state)
        self._jitted = jax.jit(
            update,
            static_argnums=3,
            in_shardings=(homes, self._of_batch, sharding.homes(beside)),
            out_shardings=(homes, sharding.replicated(scorer.mesh)),
            donate_argnums=0,
        )
        self._compiled = {}

    def lower(self, batch: Mapping[str, Any], *, keys: int) -> jax.stages.Lowered:
        """The update as a program that is not compiled yet.

        Args:
            batch: What has the keys, shapes and dtypes of an update's.
            keys: The plan's capacity for this batch's shape.
        """
        shaped = sharding.abstract(batch, dict.fromkeys(batch, self._of_batch))
        return self._jitted.lower(self.state, shaped, self.beside, keys)

    def compile(self, batch: Mapping[str, Any], *, keys: int) -> jax.stages.Compiled:
        """Compiles the update for this batch's shape; `__call__` does it by itself when it meets a new one.

        Arguments are those of `lower`.
        """
        compiled = self.lower(batch, keys=keys).compile()
        self._compiled[_shapes(batch), keys] = compiled
        return compiled

    def __call__(
        self, state: TrainState, batch: Batch, beside: Beside = NOTHING, *, keys: int
    ) -> tuple[TrainState, dict[str, Array]]:
        """Runs one update.

        Args:
            state: Donated.
            batch: The update's.
            beside: The parameters beside the state.
            keys: The plan's capacity for this batch's shape.
        """
        key = (_shapes(batch), keys)
        if key not in self._compiled:
            self.compile(batch, keys=keys)
        return self._compiled[key](state, batch, beside)


def _shapes(batch: Mapping[str, Any]) -> tuple[tuple[str, tuple[int, ...]], ...]:
    return tuple(sorted((name, value.shape) for name, value in batch.items()))
