"""What an objective is: a function from what is known of the responses to a loss per example, and what it needs."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from jaxtyping import Array, Float


class Losses(NamedTuple):
    """What an objective makes of n examples.

    Attributes:
        losses: Per example, before weights; the update divides their sum by its examples.
        rewards: Implicit rewards of the responses; None where the objective has none.
        metrics: Further numbers per example that are worth a log line.
        token_losses: A part that is summed over the tokens of response 0; the update divides it by all such tokens.
        state: What it keeps for the next update, with the names of `Objective.state`.
    """

    losses: Float[Array, " examples"]
    rewards: Float[Array, "examples responses"] | None
    metrics: Mapping[str, Float[Array, " examples"]] = {}
    token_losses: Float[Array, " examples"] | None = None
    state: Mapping[str, Float[Array, ""]] = {}


@dataclasses.dataclass(frozen=True)
class Objective:
    """One line of `OBJECTIVES`.

    Attributes:
        function: From `Responses` to `Losses`.
        responses: K it is made for; 1 takes response 0 of any example, None takes any K.
        reference: Whether it needs `log_ratios`.
        coupled: Whether an example's loss depends on the others of the update; such an objective sees the whole update
            at once. One with a state is always coupled.
        sums: Keys of `daajax.losses.sums.SUMS` that it reads.
        reads: What it reads of the data: `scores`, `labels`, `prompt_probabilities`, `finished`.
        may_read: Of the same, what it reads where the data have it.
        draws: Random numbers that it reads: `gumbel`.
        state: What it keeps from update to update, by name, and its value before the first.
        roles: Whether the places of the responses mean more than which is better, so that none may be moved.
        mismatched: Whether response 1 is another example's response, that nothing is learned from.
        needs: From the hyper-parameters to what they change of the above, as fields of this class.
        refuses: From the data's scores of real examples, NumPy `[n, K]`, and the hyper-parameters to what is wrong with
            those scores, in words; None where nothing is.
    """

    function: Callable[..., Losses]
    responses: int | None = 2
    reference: bool = True
    coupled: bool = False
    sums: tuple[str, ...] = ()
    reads: tuple[str, ...] = ()
    may_read: tuple[str, ...] = ()
    draws: tuple[str, ...] = ()
    state: Mapping[str, float] = dataclasses.field(default_factory=dict, hash=False)
    roles: bool = False
    mismatched: bool = False
    needs: Callable[..., Mapping[str, Any]] | None = None
    refuses: Callable[..., str | None] | None = None


def need(name: str, value: object, condition: bool, needed: str) -> None:
    """Refuses a hyper-parameter.

    Raises:
        ValueError: If the condition does not hold.
    """
    if not condition:
        raise ValueError(f"{name}={value!r} must be {needed}.")


def need_positive(**values: float) -> None:
    """Refuses hyper-parameters that are not positive.

    Raises:
        ValueError: If one is not.
    """
    for name, value in values.items():
        need(name, value, value > 0, "> 0")


def need_not_negative(**values: float) -> None:
    """Refuses hyper-parameters that are negative.

    Raises:
        ValueError: If one is.
    """
    for name, value in values.items():
        need(name, value, value >= 0, ">= 0")


def need_flip_share(label_smoothing: float) -> None:
    """Refuses a share of flipped labels of which nothing can be learned.

    Raises:
        ValueError: If it is not in [0, 0.5).
    """
    need("label_smoothing", label_smoothing, 0 <= label_smoothing < 0.5, "in [0, 0.5)")


def need_one_of(name: str, value: str, choices: Iterable[str]) -> None:
    """Refuses a choice that there is not.

    Raises:
        ValueError: If the value is none of the choices.
    """
    need(name, value, value in choices, f"one of {', '.join(map(repr, choices))}")
