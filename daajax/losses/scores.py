"""Scores: what an objective compares, one number per response.

Each is a pure function of `Responses`, or of such numbers element by element. To add one, write another; those that
`SCORES` names can be chosen by name.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


class Responses(NamedTuple):
    """What is known of the responses of n examples, K each. Log-probs are in nats, summed over scored tokens, float32.

    Attributes:
        logps: Under the policy.
        log_ratios: Policy minus reference, token differences summed; None where the run has no reference.
        lengths: Scored tokens; 0 where there is no such response.
        real: Which are examples; the others have no part in anything that is taken over the update. None: all.
        sums: What else was summed over each response's tokens, by key of `daajax.losses.sums.SUMS`; those that the
            objective names.
        state: What the objective keeps from update to update, by name; what it returned the last time.
        scores: The data's, of each response, the higher the better; NaN where there is none.
        labels: The data's, of an example's first response: 1 wanted, 0 not.
        prompt_probabilities: The data's: the probability that a response to this prompt is wanted, in [0, 1].
        finished: Whether a response ended by itself, in EOS.
        gumbel: A draw of the standard Gumbel distribution for each example, fixed by (seed, update, place).
    """

    logps: Float[Array, "examples responses"]
    log_ratios: Float[Array, "examples responses"] | None
    lengths: Int[Array, "examples responses"]
    real: Bool[Array, " examples"] | None = None
    sums: Mapping[str, Float[Array, "examples responses"]] = {}
    state: Mapping[str, Float[Array, ""]] = {}
    scores: Float[Array, "examples responses"] | None = None
    labels: Int[Array, " examples"] | None = None
    prompt_probabilities: Float[Array, " examples"] | None = None
    finished: Bool[Array, "examples responses"] | None = None
    gumbel: Float[Array, " examples"] | None = None

    def are_real(self) -> Bool[Array, " examples"]:
        """Which are examples."""
        return jnp.ones(len(self.logps), bool) if self.real is None else self.real


def log_ratios(responses: Responses) -> Float[Array, "examples responses"]:
    """Log-ratios, nats.

    Raises:
        ValueError: If the run has no reference (when traced).
    """
    return _given(responses.log_ratios, "log-ratios", "reference")


def log_probs(responses: Responses) -> Float[Array, "examples responses"]:
    """Log-probs of the policy, nats."""
    return responses.logps


def mean_logps(responses: Responses) -> Float[Array, "examples responses"]:
    """Log-probs per scored token, nats; 0 for a response that there is not."""
    return mean_over_tokens(responses.logps, responses)


def mean_log_ratios(responses: Responses) -> Float[Array, "examples responses"]:
    """Log-ratios per scored token, nats; 0 for a response that there is not."""
    return mean_over_tokens(log_ratios(responses), responses)


def gap(scores: Float[Array, "examples responses"]) -> Float[Array, " examples"]:
    """How much the chosen response (0) scores above the rejected one (1)."""
    return scores[:, 0] - scores[:, 1]


def mean_over_tokens(
    sums: Float[Array, "examples responses"], responses: Responses
) -> Float[Array, "examples responses"]:
    """Sums over a response's tokens, per token; 0 for a response that there is not."""
    return sums / jnp.maximum(responses.lengths, 1)


def log_ratios_with_tail(responses: Responses, weight: float) -> Float[Array, "examples responses"]:
    """Log-ratios, nats, with the tokens behind the end of the example's shortest response counted `weight` times."""
    return log_ratios(responses) - (1 - weight) * responses.sums["tail_log_ratios"]


def dispersion(responses: Responses) -> Float[Array, " examples"]:
    """-log of the reference's entropy, a share of the largest there is, over tokens and responses; without gradient."""
    entropies = mean_over_tokens(responses.sums["reference_entropies"], responses).mean(axis=1)
    return -jnp.log(jax.lax.stop_gradient(jnp.maximum(entropies, jnp.finfo(entropies.dtype).eps)))


def exist(responses: Responses) -> Bool[Array, "examples responses"]:
    """Which responses there are."""
    return responses.lengths > 0


def data_scores(responses: Responses) -> Float[Array, "examples responses"]:
    """The data's scores; 0 for a response that there is not.

    Raises:
        ValueError: If there are none (when traced).
    """
    return jnp.where(exist(responses), _given(responses.scores, "scores", "score in the data"), 0)


def wanted(responses: Responses) -> Bool[Array, " examples"]:
    """Whether the data's label of an example says that its response is wanted.

    Raises:
        ValueError: If there are none (when traced).
    """
    return _given(responses.labels, "labels", "label in the data") == 1


def finished(responses: Responses) -> Bool[Array, "examples responses"]:
    """Which responses ended by themselves.

    Raises:
        ValueError: If it is not known (when traced).
    """
    return _given(responses.finished, "which responses are finished", "such mark in the data")


def gumbel(responses: Responses) -> Float[Array, " examples"]:
    """A draw of the standard Gumbel distribution for each example.

    Raises:
        ValueError: If there is none (when traced).
    """
    return _given(responses.gumbel, "random draws", "draw")


def _given(values: Any, what: str, missing: str) -> Any:
    if values is None:
        raise ValueError(f"the objective reads {what} but there is no {missing}")
    return values


def exponential(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """exp(x); a constant where the value leaves the range of the dtype, from 80 on in float32 and 639 in float64."""
    return jnp.exp(jnp.minimum(x, 0.9 * math.log(jnp.finfo(x.dtype).max)))


def log_odds(logps: Float[Array, "*shape"], floor: float = 0.0) -> Float[Array, "*shape"]:
    """log(p / (1 - p)) of log p, nats; 1 - p counts as at least `floor`, and as no less than the dtype resolves."""
    rest, floor = -jnp.expm1(logps), max(floor, float(jnp.finfo(logps.dtype).eps))
    return logps - jnp.log(jnp.where(rest > floor, rest, floor))


def power(x: Float[Array, "*shape"], alpha: float) -> Float[Array, "*shape"]:
    """(1 - exp(-αx)) / α, and x where α = 0; a constant where the value leaves the range of the dtype."""
    if alpha == 0:
        return x
    limit = 0.9 * math.log(jnp.finfo(x.dtype).max) + min(0.0, math.log(abs(alpha)))
    return -jnp.expm1(jnp.minimum(-alpha * x, limit)) / alpha


SCORES: dict[str, Callable[[Responses], Float[Array, "examples responses"]]] = {
    "logp": log_probs,
    "mean_logp": mean_logps,
    "logratio": log_ratios,
    "mean_logratio": mean_log_ratios,
}
