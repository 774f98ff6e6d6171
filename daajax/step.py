"""One update: score, take the loss's gradient with respect to log-probs, pull it back, step the optimizer.

The loss is a function of `[examples, K]` log-probs, and its gradient is taken on those small arrays; the model's
vector-Jacobian product then pulls it back. With one micro-batch that is plain backpropagation. With several, an
objective that couples the examples of an update first sees all of them: one pass scores without gradient, a second one
pulls back. The others need one pass.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from daajax import metrics, sharding
from daajax.losses.scores import Responses
from daajax.losses.terms import Term
from daajax.models.decoder import Params
from daajax.scoring import Scorer, response_sums

Batch = Mapping[str, Array]


class TrainState(NamedTuple):
    """What an update reads and replaces."""

    step: Any  # updates done, int32 []; where state is shardings, so is every field
    params: Params
    optimizer: Any


def state_shardings(
    mesh: Any, optimizer: optax.GradientTransformation, shapes: Params, shardings: Params
) -> TrainState:
    """Where every part of a state lives.

    Args:
        mesh: The mesh.
        optimizer: Whose state lives where its parameters do.
        shapes: Of the parameters.
        shardings: Of the parameters.
    """
    moments = sharding.optimizer_shardings(mesh, optimizer, shapes, shardings)
    return TrainState(sharding.replicated(mesh), shardings, moments)


def init_state(
    params: Params, optimizer: optax.GradientTransformation, shardings: TrainState, *, updates: int = 0
) -> TrainState:
    """The state with a new optimizer; its part is made where it lives, never whole on one device.

    Args:
        params: The parameters.
        optimizer: Whose state is new.
        shardings: Where every part lives.
        updates: Done before, with another optimizer; the learning rate is that of the next one.
    """

    def init(params: Params) -> Any:
        return optax.tree.set(optimizer.init(params), _counts_for_schedule, count=jnp.int32(updates))

    moments = jax.jit(init, out_shardings=shardings.optimizer)(params)
    return TrainState(jax.device_put(jnp.int32(updates), shardings.step), params, moments)


def _counts_for_schedule(path: Any, value: Any) -> bool:
    """Whether a leaf of optimizer state counts updates for the learning rate, not for the bias of an average."""
    del value
    return getattr(path[-1], "tuple_name", "") == "ScaleByScheduleState"


def abstract_state(shapes: Params, optimizer: optax.GradientTransformation, shardings: TrainState) -> TrainState:
    """Shape, dtype and sharding of every leaf of a state, which is what a checkpoint is read into."""
    state = TrainState(jax.ShapeDtypeStruct((), jnp.int32), shapes, jax.eval_shape(optimizer.init, shapes))
    return sharding.abstract(state, shardings)


class Sums(NamedTuple):
    """Sums over the scored tokens of each response, nats; `log_ratios` is None without a reference."""

    logps: Float[Array, "*axes responses"]
    log_ratios: Float[Array, "*axes responses"] | None


class Counts(NamedTuple):
    """What sums over an update are divided by, known from the data."""

    examples: Float[Array, ""]
    tokens: Float[Array, ""]  # scored tokens of response 0

    @classmethod
    def of(cls, batch: Batch) -> "Counts":
        """Counts a whole update, every micro-batch."""
        return cls((batch["places"] >= 0).sum().astype(jnp.float32), batch["lengths"][..., 0].sum().astype(jnp.float32))


def sums_of(token_logps: Float[Array, "rows scored"], batch: Batch, *, reference: bool) -> Sums:
    """Sums one micro-batch's token log-probs; log-ratios are summed as differences, which float32 keeps exact."""
    _, slots, responses = batch["lengths"].shape

    def total(values: Array) -> Array:
        return response_sums(values, batch["owners"], slots, responses)

    return Sums(total(token_logps), total(token_logps - batch["reference"]) if reference else None)


def loss_of(
    sums: Sums, examples: Batch, terms: Sequence[Term], counts: Counts
) -> tuple[Float[Array, ""], metrics.Logged]:
    """The loss of some examples: their share of the update's.

    Args:
        sums: Of n examples, `[n, K]`.
        examples: `lengths` `[n, K]`, `weights` and `places` `[n]`; place -1 is no example.
        terms: What to add up.
        counts: Of the whole update.

    Returns:
        The loss, and what to log of these examples.
    """
    real = examples["places"] >= 0
    responses = Responses(sums.logps, sums.log_ratios, examples["lengths"])
    total, results = jnp.float32(0), []
    for term in terms:
        result = term.loss(responses)
        loss = jnp.where(real, examples["weights"] * result.losses, 0).sum() / counts.examples
        if result.token_losses is not None:
            loss += jnp.where(real, examples["weights"] * result.token_losses, 0).sum() / counts.tokens
        total += term.weight * loss
        results.append((term.name, loss, result))
    return total, metrics.of_examples(total, results, responses, real, counts.examples)


def all_finite(params: Params) -> Array:
    """Whether every parameter is a number, bool []."""
    return jnp.all(jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(params)]))


def loss_and_gradient(
    scorer: Scorer, params: Params, batch: Batch, terms: Sequence[Term], *, batch_size: int, keys: int
) -> tuple[Params, metrics.Logged]:
    """Gradient of an update's loss, float32, and what to log of it.

    Args:
        scorer: Scores rows.
        params: The policy's.
        batch: A whole update, `[micro_batches, rows, …]`.
        terms: The loss.
        batch_size: Examples an update.
        keys: The plan's capacity in gathered keys.
    """
    counts, reference = Counts.of(batch), any(term.objective.reference for term in terms)

    def score(params: Params, part: Batch) -> Sums:
        return sums_of(scorer.token_logps(params, part, keys=keys), part, reference=reference)

    def cotangents(sums: Sums, part: Batch) -> tuple[Sums, metrics.Logged]:
        """Gradient of the loss with respect to log-probs; the examples of other parts are absent from it."""
        order = Order(part["places"], batch_size)
        by_place = jax.tree.map(order.by_place, sums)
        gradient, logged = jax.grad(loss_of, has_aux=True)(by_place, order.examples(part), terms, counts)
        return jax.tree.map(order.by_slot, gradient), logged

    def pull_back(part: Batch, cotangents_of: Callable[[Sums], tuple[Sums, Any]]) -> tuple[Params, Any]:
        sums, pull = jax.vjp(lambda params: score(params, part), params)
        cotangent, logged = cotangents_of(sums)
        (gradient,) = pull(cotangent)
        return jax.tree.map(lambda g: g.astype(jnp.float32), gradient), logged

    if len(batch["places"]) == 1:
        part = {name: value[0] for name, value in batch.items()}
        return pull_back(part, lambda sums: cotangents(sums, part))

    zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params)
    if any(term.objective.coupled for term in terms):

        def pull(total: Params, operands: tuple[Batch, Sums]) -> tuple[Params, None]:
            part, cotangent = operands
            gradient, _ = pull_back(part, lambda _: (cotangent, None))
            return jax.tree.map(jnp.add, total, gradient), None

        _, sums = jax.lax.scan(lambda _, part: (None, score(params, part)), None, batch)
        cotangent, logged = cotangents(sums, batch)
        gradient, _ = jax.lax.scan(pull, zeros, (batch, cotangent))
        return gradient, logged

    def accumulate(total: Params, part: Batch) -> tuple[Params, metrics.Logged]:
        gradient, logged = pull_back(part, lambda sums: cotangents(sums, part))
        return jax.tree.map(jnp.add, total, gradient), logged

    gradient, logged = jax.lax.scan(accumulate, zeros, batch)
    return gradient, logged.combined()


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
        """What `loss_of` reads of a batch besides log-probs."""
        by_place = {name: self.by_place(batch[name]) for name in ("lengths", "weights")}
        return by_place | {"places": self.by_place(batch["places"] + 1) - 1}

    def by_slot(self, x: Array) -> Array:
        """Values by slot, `[…, rows, slots, …]`; zeros in empty slots."""
        real = (self._places >= 0).reshape(self._places.shape + (1,) * (x.ndim - 1))
        return jnp.where(real, x[jnp.maximum(self._places, 0)], 0)


class Update:
    """The compiled update: `state, logged = update(state, batch, keys=…)`.

    One `jax.jit` with explicit shardings; the state is donated. A batch of another shape compiles once more.

    Args:
        scorer: Scores rows.
        terms: The loss.
        optimizer: Steps the parameters; its gradient clipping sees the gradient whose norm is logged.
        learning_rate: The schedule, for the log.
        batch_size: Examples an update.
        state_shardings: Where the state lives.
        batch_sharding: Where every array of a batch lives.
        replicated: Where metrics live.
    """

    def __init__(
        self,
        scorer: Scorer,
        terms: Sequence[Term],
        optimizer: optax.GradientTransformation,
        learning_rate: optax.Schedule,
        *,
        batch_size: int,
        state_shardings: TrainState,
        batch_sharding: Any,
        replicated: Any,
    ):
        def update(state: TrainState, batch: Batch, keys: int) -> tuple[TrainState, dict[str, Array]]:
            gradient, logged = loss_and_gradient(scorer, state.params, batch, terms, batch_size=batch_size, keys=keys)
            changes, moments = optimizer.update(gradient, state.optimizer, state.params)
            params: Any = optax.apply_updates(state.params, changes)
            values = logged.values() | {
                "grad_norm": optax.tree.norm(gradient),
                "learning_rate": learning_rate(state.step),
            }
            return TrainState(state.step + 1, params, moments), values

        self._jitted = jax.jit(
            update,
            static_argnums=2,
            in_shardings=(state_shardings, batch_sharding),
            out_shardings=(state_shardings, replicated),
            donate_argnums=0,
        )
        self._compiled = {}

    def compile(self, state: TrainState, batch: Mapping[str, Any], *, keys: int) -> jax.stages.Compiled:
        """Compiles the update for this batch's shape; `__call__` does it by itself when it meets a new one.

        State and batch may be abstract: shapes, dtypes and shardings are enough.
        """
        compiled = self._compiled[_shapes(batch), keys] = self._jitted.lower(state, batch, keys).compile()
        return compiled

    def __call__(self, state: TrainState, batch: Batch, *, keys: int) -> tuple[TrainState, dict[str, Array]]:
        """Runs one update; `keys` is the plan's capacity for this batch's shape."""
        key = (_shapes(batch), keys)
        if key not in self._compiled:
            self.compile(state, batch, keys=keys)
        return self._compiled[key](state, batch)


def _shapes(batch: Mapping[str, Any]) -> tuple[tuple[str, tuple[int, ...]], ...]:
    return tuple(sorted((name, value.shape) for name, value in batch.items()))
