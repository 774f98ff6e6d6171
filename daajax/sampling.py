"""The choice of a next token: temperature, then top-k, then top-p, as in transformers and vLLM.

All of it is on rows of scores, each row by itself. A row's draw depends on its own key and scores only, never on the
rows beside it.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from daajax.errors import UserError

LEAST_TEMPERATURE = 1e-4  # below it scores divided by it leave float32


def check(*, temperature: float, top_k: int | None, top_p: float, samples: int) -> None:
    """Refuses numbers out of range, and those that could not act.

    Raises:
        UserError: If one of them is at fault.
    """
    if temperature != 0 and not LEAST_TEMPERATURE <= temperature < float("inf"):
        raise UserError(
            f"temperature={temperature}: at least {LEAST_TEMPERATURE} is needed, or 0, which takes the most probable "
            "token."
        )
    if top_k is not None and top_k < 1:
        raise UserError(f"top_k={top_k}: an integer >= 1 is needed, or none at all to keep every token.")
    if not 0 < top_p <= 1:
        raise UserError(f"top_p={top_p}: a number above 0 and at most 1 is needed; 1 keeps every token.")
    if samples < 1:
        raise UserError(f"samples={samples}: an integer >= 1 is needed.")
    if temperature == 0 and (top_k is not None or top_p < 1 or samples > 1):
        raise UserError(
            "temperature=0 takes the most probable token: top_k, top_p and further samples would change nothing; "
            "raise temperature or leave them out."
        )


def row_keys(key: Key[Array, ""], prompts: Int[Array, " rows"], samples: Int[Array, " rows"]) -> Key[Array, " rows"]:
    """A key for each row: a function of which prompt it answers and for the how-manieth time, not of its place."""

    def one(prompt: Array, sample: Array) -> Array:
        return jax.random.fold_in(jax.random.fold_in(key, prompt), sample)

    return jax.vmap(one)(prompts, samples)


def within_top_k(scores: Float[Array, "rows vocab"], k: int) -> Bool[Array, "rows vocab"]:
    """Whether a token is among the k best of its row; what equals the last of them is."""
    return scores >= jax.lax.top_k(scores, min(k, scores.shape[1]))[0][:, -1:]


def within_top_p(scores: Float[Array, "rows vocab"], p: Float[Array, ""]) -> Bool[Array, "rows vocab"]:
    """Whether a token is in the smallest set of best ones that together have probability p.

    The token that reaches p is in the set, the best one always is, and so is what equals the last one.
    """
    best = -jnp.sort(-scores, axis=1)
    probabilities = jax.nn.softmax(best, axis=1)
    before = jnp.cumsum(probabilities, axis=1) - probabilities
    least = jnp.where((before < p) | (jnp.arange(scores.shape[1]) == 0)[None], best, jnp.inf).min(axis=1)
    return scores >= least[:, None]


def draw(
    log_probs: Float[Array, "rows vocab"],
    keys: Key[Array, " rows"],
    *,
    temperature: Float[Array, ""] | None,
    top_k: int | None,
    top_p: Float[Array, ""] | None,
) -> Int[Array, " rows"]:
    """Draws a token for each row.

    Args:
        log_probs: Of the policy, nats.
        keys: One a row, used up.
        temperature: Divides the log-probs, > 0; None takes the most probable token, the first of equals.
        top_k: Only the k most probable tokens can be drawn; None: all.
        top_p: Of those, only the most probable ones that together reach this probability; None: all.
    """
    if temperature is None:
        return jnp.argmax(log_probs, axis=1)
    scores = log_probs / temperature
    if top_k is not None:
        scores = jnp.where(within_top_k(scores, top_k), scores, -jnp.inf)
    if top_p is not None:
        scores = jnp.where(within_top_p(scores, top_p), scores, -jnp.inf)
    return jax.vmap(jax.random.categorical)(keys, scores)
