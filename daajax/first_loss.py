"""The first update's proof that policy and reference are scored alike.

Where the reference is the initial policy, every log-ratio of the first update is 0 but for rounding, and its loss is
what the objective makes of the cached log-probs in place of the policy's.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array

from daajax import step
from daajax.config import Config
from daajax.console import say
from daajax.errors import UserError
from daajax.losses.objectives import Term
from daajax.run import Reference
from daajax.scoring import Batch

# By compute dtype: the metric that is bounded, and its bound in nats. Rounding to bfloat16 grows with the square root of
# the length: two layouts of one model differ by up to 0.06, transformers in bfloat16 from float64 by up to 0.11.
_BOUNDS = {
    "float32": ("log_ratios/largest", 1e-3),
    "bfloat16": ("log_ratios/largest_per_sqrt_token", 0.1),
}


def why_not_checked(config: Config, reference: Reference | None) -> str:
    """The reason why nothing is promised of the first loss; empty where something is."""
    if not config.check_first_loss:
        return "check_first_loss is off"
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
        say(
            f"first loss: {values['loss']:.6f}, with the reference's log-probs {self.loss:.6f}; "
            f"{name} {values[name]:.2g} nats (at most {bound:g})"
        )
        if not (abs(values["loss"] - self.loss) <= self.slack and values[name] <= bound):
            raise UserError(
                f"the first loss is {values['loss']:.6f} but {self.loss:.6f} with the cached reference log-probs, and "
                f"{name} is {values[name]:.2g} (at most {bound:g}), though policy and reference are the same model: "
                "the two were not computed alike. Remove reference.cache_dir and try again, or set "
                "check_first_loss=False to train all the same."
            )


def expect(batch: Batch, terms: Sequence[Term], *, batch_size: int, dtype: str) -> FirstLoss:
    """What the first update of a run must report whose reference is the initial policy.

    Args:
        batch: The first update, with reference log-probs.
        terms: The loss.
        batch_size: Examples an update.
        dtype: Compute dtype.
    """
    bound = _BOUNDS[dtype][1]

    def tolerance(lengths: Array) -> Array:
        return bound * (jnp.ones(lengths.shape) if dtype == "float32" else jnp.sqrt(lengths))

    promise = jax.jit(lambda batch: step.loss_at_reference(batch, terms, batch_size=batch_size, tolerance=tolerance))
    loss, slack = map(float, jax.device_get(promise(batch)))
    return FirstLoss(loss, 2 * slack + 1e-5 * max(1.0, abs(loss)), dtype)
