"""Links: from the logit of a preference to a loss. Pure functions of arrays; to add one, write another."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def logistic(z: Float[Array, " examples"], label_smoothing: float = 0.0) -> Float[Array, " examples"]:
    """-log σ(z), nats; a share `label_smoothing` of the labels is taken to be flipped."""
    return (1 - label_smoothing) * jax.nn.softplus(-z) + label_smoothing * jax.nn.softplus(z)


def square(z: Float[Array, " examples"], target: float) -> Float[Array, " examples"]:
    """(z - target)²."""
    return jnp.square(z - target)
