"""Statistics over the examples of an update: those that are real; the others have no part in them."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def mean(values: Float[Array, " examples"], real: Bool[Array, " examples"]) -> Float[Array, ""]:
    """Mean; 0 of none."""
    return jnp.where(real, values, 0).sum() / jnp.maximum(real.sum(), 1)


def deviation(values: Float[Array, " examples"], real: Bool[Array, " examples"]) -> Float[Array, ""]:
    """Standard deviation, with n - 1 in the denominator; 0 of one or none."""
    squares = jnp.where(real, jnp.square(values - mean(values, real)), 0)
    return jnp.sqrt(squares.sum() / jnp.maximum(real.sum() - 1, 1))


def ascending(values: Float[Array, " examples"], real: Bool[Array, " examples"]) -> Int[Array, " examples"]:
    """The places of the values from the lowest to the highest, those that are not real last."""
    return jnp.argsort(jnp.where(real, values, jnp.inf))


def ranks(values: Float[Array, " examples"], real: Bool[Array, " examples"]) -> Int[Array, " examples"]:
    """The rank of every value, 0 the lowest; those that are not real come last."""
    return jnp.argsort(ascending(values, real))


def spread(value: Float[Array, ""], over: Float[Array, " examples"]) -> Float[Array, " examples"]:
    """A number of the update as a metric of each of its examples."""
    return jnp.broadcast_to(value, over.shape)
