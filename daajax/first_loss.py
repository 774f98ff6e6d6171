"""The first update's proof that policy and reference are scored alike.

Where the reference is the initial policy, every log-ratio of the first update is 0 but for rounding, and its loss is
what the objective makes of the cached log-probs in place of the policy's.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from daajax.config import Config
from daajax.console import say
from daajax.errors import UserError
from daajax.loss import Counts, Order, Sums, loss_of, sums_of
from daajax.losses.sums import SUMS
from daajax.losses.terms import Needs, Term, initial_state
from daajax.run import Reference
from daajax.scoring import Batch

# By compute dtype: the metric that is bounded, and its bound in nats. What rounding to bfloat16 does grows with the
# square root of the length, and XLA chooses per program where it rounds: on CPU the same rows of a real model scored
# with and without a gradient differ by up to 0.07 per such root, two layouts of one program by 0.001.
_BOUNDS = {
    "float32": ("log_ratios/largest", 1e-3),
    "bfloat16": ("log_ratios/largest_per_sqrt_token", 0.1),
}

# What is known of the policy's distributions where it is the reference, from the reference's log-probs.
_AT_REFERENCE = {"logps": lambda logps: logps, "kl": jnp.zeros_like}


def why_not_checked(config: Config, reference: Reference | None, needs: Needs, updates: int) -> str:
    """The reason why nothing is promised of the loss after so many updates; empty where something is."""
    if not config.check_first_loss:
        return "check_first_loss is off"
    if updates:
        return f"the policy has done {updates} updates"
    if reference is None:
        return "the loss reads no reference"
    if unknown := sorted(set(needs.statistics) - set(_AT_REFERENCE)):
        return f"the loss reads {unknown[0]} of the policy, which is not kept of the reference"
    if not reference.is_initial_policy:
        return f"the reference, {config.reference.path or config.model.path}, is not the initial policy"
    return ""


@dataclasses.dataclass(frozen=True)
class FirstLoss:
    """What the first update must report.

    Attributes:
        loss: With the cached log-probs in place of the policy's.
        slack: By how much log-ratios within their bound can change it.
        dtype: Compute dtype.
    """

    loss: float
    slack: float
    dtype: str

    def check(self, values: Mapping[str, float]) -> None:
        """Compares the first update's metrics with the promise, and prints both.

        Raises:
            UserError: If the loss or a log-ratio is off.
        """
        name, bound = _BOUNDS[self.dtype]
        found = values["loss"] - values.get("loss/router", 0.0)  # which no log-prob tells
        ratios = f"{name} {values[name]:.2g} nats (at most {bound:g})"
        say(f"first loss: {found:.6f}, with the reference's log-probs {self.loss:.6f}; {ratios}")
        if not (abs(found - self.loss) <= self.slack and values[name] <= bound):
            raise UserError(
                f"the first loss is {found:.6f} but {self.loss:.6f} with the cached reference log-probs, and "
                f"{ratios}, though policy and reference are the same model: the two were not computed alike. Remove "
                "reference.cache_dir and try again, or set check_first_loss=False to train all the same."
            )


def expect(batch: Batch, terms: Sequence[Term], *, batch_size: int, dtype: str) -> FirstLoss:
    """What the first update of a run must report whose reference is the initial policy.

    Args:
        batch: The first update, with what is known of the reference.
        terms: The loss.
        batch_size: Examples an update.
        dtype: Compute dtype.
    """
    lengths = Order(batch["places"], batch_size).examples(batch)["lengths"]
    tolerance = _BOUNDS[dtype][1] * (jnp.ones(lengths.shape) if dtype == "float32" else jnp.sqrt(lengths))
    promise = jax.jit(functools.partial(loss_at_reference, terms=terms, batch_size=batch_size))
    loss, slack = map(float, jax.device_get(promise(batch, tolerance=tolerance)))
    return FirstLoss(loss, 2 * slack + 1e-5 * max(1.0, abs(loss)), dtype)


def loss_at_reference(
    batch: Batch, *, terms: Sequence[Term], batch_size: int, tolerance: Float[Array, "batch_size responses"]
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """An update's loss with the reference's log-probs in place of the policy's.

    Args:
        batch: The update.
        terms: The loss.
        batch_size: Examples an update.
        tolerance: Nats by which the log-ratio of each response may differ from 0, in order of place.

    Returns:
        The loss, and how much log-ratios of the size of `tolerance` change it, to first order.
    """
    needs, order = Needs.of(terms), Order(batch["places"], batch_size)
    at_reference = {name: value(batch["reference"]) for name, value in _AT_REFERENCE.items()}
    sums = jax.vmap(functools.partial(sums_of, needs=needs))(at_reference, batch)
    examples, counts, state = order.examples(batch), Counts.of(batch), jax.tree.map(jnp.float32, initial_state(terms))
    by_place = jax.tree.map(order.by_place, sums)

    fixed = {name: values for name, values in by_place.further.items() if not SUMS[name].of_policy}
    free = by_place._replace(further={name: x for name, x in by_place.further.items() if name not in fixed})

    def at(change: float) -> tuple[Float[Array, ""], Sums]:
        def loss(sums: Sums) -> Float[Array, ""]:
            whole = sums._replace(further={**sums.further, **fixed})
            return loss_of(whole, examples, terms, counts, state)[0]

        return jax.value_and_grad(loss)(jax.tree.map(lambda x: x + change * tolerance, free))

    # The steepest of three places: some objectives have a kink right where policy and reference are one.
    (_, below), (loss, here), (_, above) = at(-1.0), at(0.0), at(1.0)
    slopes = jax.tree.map(lambda *x: jnp.max(jnp.abs(jnp.stack(x)), axis=0), below, here, above)
    return loss, jnp.stack([(slope * tolerance).sum() for slope in jax.tree.leaves(slopes)]).sum()
