"""Links: from the logit of a preference to a loss. Pure functions of arrays; to add one, write another.

A logit is positive where the chosen response is preferred. The links of one argument are in `LINKS`, by name.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from daajax.losses.scores import exponential


def logistic(
    z: Float[Array, "*examples"], label_smoothing: float | Float[Array, "*examples"] = 0.0
) -> Float[Array, "*examples"]:
    """-log σ(z), nats; a share `label_smoothing` of the labels is taken to be flipped."""
    return (1 - label_smoothing) * jax.nn.softplus(-z) + label_smoothing * jax.nn.softplus(z)


def robust(z: Float[Array, " examples"], label_smoothing: float) -> Float[Array, " examples"]:
    """The function of noisy labels whose mean is `logistic` of the true ones, `label_smoothing` of them flipped."""
    return logistic(z, -label_smoothing / (1 - 2 * label_smoothing))


def hinge(z: Float[Array, " examples"], margin: float = 1.0) -> Float[Array, " examples"]:
    """max(0, margin - z); its slope at the kink is 0."""
    return jax.nn.relu(margin - z)


def square(z: Float[Array, " examples"], target: float | Float[Array, " examples"] = 0.5) -> Float[Array, " examples"]:
    """(z - target)²; with z = β · gap and the target ½ it is β² times IPO."""
    return jnp.square(z - target)


def linear(z: Float[Array, " examples"]) -> Float[Array, " examples"]:
    """-z."""
    return -z


def cauchy(z: Float[Array, " examples"]) -> Float[Array, " examples"]:
    """-log(atan(z) / π + ½), nats: the preferences have Cauchy noise in place of logistic noise."""
    share = (
        jnp.arctan2(jnp.ones_like(z), jnp.where(z > 0, z, -z)) / jnp.pi
    )  # the smaller of the two, exact in the tails
    return -jnp.where(z > 0, jnp.log1p(-share), jnp.log(share))


def log_ratio_modulated(z: Float[Array, " examples"], tau: float = 0.05) -> Float[Array, " examples"]:
    """(1 - σ(z/τ)) · -log σ(z) + σ(z/τ) · exp(-z): DiscoPOP's."""
    return jax.nn.sigmoid(-z / tau) * logistic(z) + exponential(-z - jax.nn.softplus(-z / tau))


def exponential_logistic(z: Float[Array, " examples"]) -> Float[Array, " examples"]:
    """½ exp(-z) + ½ · -log σ(z): the second of DiscoPOP's paper."""
    return 0.5 * exponential(-z) + 0.5 * logistic(z)


LINKS: dict[str, Callable[[Float[Array, " examples"]], Float[Array, " examples"]]] = {
    "logistic": logistic,
    "hinge": hinge,
    "square": square,
    "linear": linear,
    "cauchy": cauchy,
    "lrml": log_ratio_modulated,
    "cell": exponential_logistic,
}
