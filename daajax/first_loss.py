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
from daajax.losses.terms import Term
from daajax.run import Reference
from daajax.scoring import Batch, response_sums
from daajax.step import Counts, Order, Sums, loss_of

# By compute dtype: the metric that is bounded, and its bound in nats. What rounding to bfloat16 does grows with the
# square root of the length, and XLA chooses per program where it rounds: on CPU the same rows of a real model scored
# with and without a gradient differ by up to 0.07 per such root, two layouts of one program by 0.001.
_BOUNDS = {
    "float32": ("log_ratios/largest", 1e-3),
    "bfloat16": ("log_ratios/largest_per_sqrt_token", 0.1),
}


def why_not_checked(config: Config, reference: Reference | None, updates: int) -> str:
    """The reason why nothing is promised of the loss after so many updates; empty where something is."""
    if not config.check_first_loss:
        return "check_first_loss is off"
    if updates:
        return f"the policy has done {updates} updates"
    if reference is None:
        return "the loss reads no reference"
    if not reference.is_initial_policy:
        return f"the reference {config.reference.path} is not the initial policy"
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
        ratios = f"{name} {values[name]:.2g} nats (at most {bound:g})"
        say(f"first loss: {values['loss']:.6f}, with the reference's log-probs {self.loss:.6f}; {ratios}")
        if not (abs(values["loss"] - self.loss) <= self.slack and values[name] <= bound):
            raise UserError(
                f"the first loss is {values['loss']:.6f} but {self.loss:.6f} with the cached reference log-probs, and "
                f"{ratios}, though policy and reference are the same model: the two were not computed alike. Remove "
                "reference.cache_dir and try again, or set check_first_loss=False to train all the same."
            )


def expect(batch: Batch, terms: Sequence[Term], *, batch_size: int, dtype: str) -> FirstLoss:
    """What the first update of a run must report whose reference is the initial policy.

    Args:
        batch: The first update, with reference log-probs.
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
    _, slots, responses = batch["lengths"].shape[1:]
    order = Order(batch["places"], batch_size)
    total = jax.vmap(lambda values, owners: response_sums(values, owners, slots, responses))
    logps = order.by_place(total(batch["reference"], batch["owners"]))
    at, examples = Sums(logps, jnp.zeros_like(logps)), order.examples(batch)
    loss, gradient = jax.value_and_grad(lambda sums: loss_of(sums, examples, terms, Counts.of(batch))[0])(at)
    return loss, ((jnp.abs(gradient.logps) + jnp.abs(gradient.log_ratios)) * tolerance).sum()
