"""Sums over a response's scored tokens, besides its log-prob and log-ratio, that some objectives ask for.

Each is a function from what is known of every token to the number that is summed. To add one: a function of `Tokens`
and a line in `SUMS`; an objective names it in its line of `OBJECTIVES` and finds it in `Responses.sums`.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


class Tokens(NamedTuple):
    """What is known of the scored tokens of some rows; nats, float32.

    Attributes:
        logps: Under the policy.
        offsets: A token's place among its response's scored tokens.
        shortest: Scored tokens of the shortest response of its example.
        statistics: Further statistics of the policy's distributions, by key of `daajax.ops.statistics.STATISTICS`.
        reference: Log-probs under the reference.
        entropies: Of the reference's distributions, as a share of the largest there is, the log of the vocabulary.
        kept: Whether a draw keeps the token: of every response as many as the shortest one has.
        reference_kept: Another such draw.
    """

    logps: Float[Array, "rows scored"]
    offsets: Int[Array, "rows scored"]
    shortest: Int[Array, "rows scored"]
    statistics: Mapping[str, Float[Array, "rows scored"]]
    reference: Any = None  # each [rows, scored], and there where a sum reads it
    entropies: Any = None
    kept: Any = None
    reference_kept: Any = None


def _tail(tokens: Tokens) -> Array:
    return tokens.offsets >= tokens.shortest


def _log_ratios(tokens: Tokens) -> Array:
    return tokens.logps - tokens.reference


@dataclasses.dataclass(frozen=True)
class Sum:
    """One line of `SUMS`.

    Attributes:
        of: The number of each token that is summed.
        statistics: Keys of `daajax.ops.statistics.STATISTICS` that it reads.
        reads: Fields of `Tokens` that it reads besides.
        live: Whether it needs the reference's whole distributions, and so its model beside the policy's.
    """

    of: Callable[[Tokens], Array]
    statistics: tuple[str, ...] = ()
    reads: tuple[str, ...] = ()
    live: bool = False

    @property
    def of_policy(self) -> bool:
        """Whether it depends on the policy: through its distributions, or by what the reference is compared with."""
        return bool(self.statistics) or "reference" in self.reads


SUMS: dict[str, Sum] = {
    # of the tokens behind the end of the example's shortest response
    "tail_log_ratios": Sum(lambda t: jnp.where(_tail(t), _log_ratios(t), 0), reads=("reference",)),
    # of as many tokens, drawn at random, as the shortest response has
    "kept_log_ratios": Sum(lambda t: jnp.where(t.kept, _log_ratios(t), 0), reads=("reference", "kept")),
    # the same with the policy's tokens and the reference's drawn independently
    "independently_kept_log_ratios": Sum(
        lambda t: jnp.where(t.kept, t.logps, 0) - jnp.where(t.reference_kept, t.reference, 0),
        reads=("reference", "kept", "reference_kept"),
    ),
    # log Σ_v π(v)²
    "sum_squares": Sum(lambda t: t.statistics["sum_squares"], statistics=("sum_squares",)),
    # KL(reference ‖ policy) of the next token
    "kl": Sum(lambda t: t.statistics["kl"], statistics=("kl",), live=True),
    # entropy of the reference, as a share of the largest there is
    "reference_entropies": Sum(lambda t: t.entropies, reads=("entropies",)),
    # its gradient is that of KL(policy ‖ reference), token by token, where the tokens are the policy's samples
    "kl_surrogate": Sum(lambda t: jax.lax.stop_gradient(_log_ratios(t)) * t.logps, reads=("reference",)),
}
