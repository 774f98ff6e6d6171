"""Scores: what an objective compares, one number per response.

Each is a pure function of sums over a response's scored tokens. To add one, write a function of `Responses`.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


class Responses(NamedTuple):
    """Log-probs of the responses of n examples, K each; nats, summed over scored tokens, float32.

    Attributes:
        logps: Under the policy.
        log_ratios: Policy minus reference, token differences summed; None where the run has no reference.
        lengths: Scored tokens; 0 where there is no such response.
    """

    logps: Float[Array, "examples responses"]
    log_ratios: Float[Array, "examples responses"] | None
    lengths: Int[Array, "examples responses"]


def log_ratios(responses: Responses) -> Float[Array, "examples responses"]:
    """Log-ratios, nats.

    Raises:
        ValueError: If the run has no reference (when traced).
    """
    if responses.log_ratios is None:
        raise ValueError("the objective reads log-ratios but there is no reference")
    return responses.log_ratios


def mean_logps(responses: Responses) -> Float[Array, "examples responses"]:
    """Log-probs per scored token, nats; 0 for a response that there is not."""
    return responses.logps / jnp.maximum(responses.lengths, 1)


def mean_log_ratios(responses: Responses) -> Float[Array, "examples responses"]:
    """Log-ratios per scored token, nats; 0 for a response that there is not."""
    return log_ratios(responses) / jnp.maximum(responses.lengths, 1)


def gap(scores: Float[Array, "examples responses"]) -> Float[Array, " examples"]:
    """How much the chosen response (0) scores above the rejected one (1)."""
    return scores[:, 0] - scores[:, 1]
