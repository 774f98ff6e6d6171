"""One update: the gradient of its loss, and a step of the optimizer."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int

from daajax import ema, heads, sharding
from daajax.gradient import NOTHING, Beside, Live, loss_and_gradient
from daajax.losses.terms import Term, initial_state
from daajax.models.decoder import Params
from daajax.scoring import Batch, Scorer


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
    params: Params,
    optimizer: optax.GradientTransformation,
    terms: Sequence[Term],
    mesh: Any,
    *,
    follows: bool = False,
    offload: bool = False,
) -> TrainState:
    """Shape, dtype and sharding of every leaf of a state: what it is compiled for, and what a checkpoint is read into.

    Args:
        params: The policy's that are trained, abstract.
        optimizer: Whose state lives where its parameters do.
        terms: The loss.
        mesh: The mesh.
        follows: Whether the state has a reference that follows the policy.
        offload: Whether the optimizer's moments lie in the memory of the hosts.

    Raises:
        UserError: If the devices' hosts have no such memory.
    """
    whole = sharding.replicated(mesh)
    moments = jax.eval_shape(optimizer.init, params)
    where = sharding.optimizer_shardings(mesh, optimizer, params, sharding.homes(params), offload=offload)
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
        head: Form of the head, a key of `daajax.heads.FORMS`, or auto.
        compiler_options: What its compiler is told, see `daajax.compiler_options`.
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
        head: str = "auto",
        compiler_options: Mapping[str, Any] | None = None,
    ):
        homes = sharding.homes(state)
        is_offloaded = any(map(sharding.is_in_host_memory, jax.tree.leaves(homes.optimizer)))

        def update(state: TrainState, batch: Batch, beside: Beside, keys: int) -> tuple[TrainState, dict[str, Array]]:
            live = None
            if reference_scorer is not None:
                live = Live.beside(scorer, reference_scorer, beside.following(state.reference))
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
                head=self.head_for(batch).form,
            )
            before = state.optimizer
            if is_offloaded:  # the moments come when the gradient is there, not while it is computed
                gradient, before = jax.lax.optimization_barrier((gradient, before))
                before = sharding.to_device_memory(before, homes.optimizer)
            changes, moments = optimizer.update(gradient, before, state.params)
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
        self._head = head
        self._choose = functools.partial(
            heads.choose,
            terms=terms,
            scorer=scorer,
            is_trained=scorer.model.architecture.projection in state.params,
            is_live=reference_scorer is not None,
            balances=router_loss_coef > 0,
        )
        self._mesh = scorer.mesh
        self._jitted = jax.jit(
            update,
            static_argnums=3,
            in_shardings=(homes, None, sharding.homes(beside)),  # a batch's are known with its keys, in `lower`
            out_shardings=(homes, sharding.replicated(scorer.mesh)),
            donate_argnums=0,
            compiler_options=dict(compiler_options or {}) or None,
        )
        self._compiled = {}

    def head_for(self, batch: Mapping[str, Any]) -> heads.Choice:
        """The form of the head for updates of this batch's shape.

        Raises:
            UserError: If the form that was asked for does not do.
        """
        return self.head_of(batch["owners"].shape[0], batch["owners"].shape[2])

    def head_of(self, micro_batches: int, scored: int, asked: str | None = None) -> heads.Choice:
        """Likewise, for so many micro-batches, and scored slots of a row; of another form, if one is asked for."""
        return self._choose(asked or self._head, micro_batches=micro_batches, scored=scored)

    def lower(self, batch: Mapping[str, Any], *, keys: int) -> jax.stages.Lowered:
        """The update as a program that is not compiled yet.

        Args:
            batch: What has the keys, shapes and dtypes of an update's.
            keys: The plan's capacity for this batch's shape.
        """
        shaped = sharding.abstract(batch, sharding.batch_shardings(self._mesh, batch))
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
