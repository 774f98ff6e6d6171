"""Terms of a loss: objectives by name, with their hyper-parameters and weights, checked before anything is compiled."""

import dataclasses
import functools
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Array

from daajax.errors import UserError
from daajax.losses.objectives import OBJECTIVES, Losses, Objective
from daajax.losses.scores import Responses


@dataclasses.dataclass(frozen=True)
class Term:
    """An objective with its hyper-parameters, its weight in the loss, and whether it has rewards."""

    name: str
    objective: Objective
    loss: Callable[[Responses], Losses]
    weight: float = 1.0
    has_rewards: bool = True


def bind(losses: Sequence[Mapping[str, Any]]) -> tuple[Term, ...]:
    """Makes terms from `config.loss` and `config.extra_losses`, and checks every hyper-parameter.

    Args:
        losses: Mappings with `name`, optionally `weight`, and the objective's own hyper-parameters.

    Raises:
        UserError: If a name is unknown, a hyper-parameter is not the objective's, or it is out of range.
    """
    terms = []
    for loss in losses:
        arguments = dict(loss)
        name, weight = arguments.pop("name", None), arguments.pop("weight", 1.0)
        if name not in OBJECTIVES:
            raise UserError(f"loss.name={name!r} is unknown; there are {', '.join(sorted(OBJECTIVES))}.")
        objective = OBJECTIVES[name]
        known = dict(list(inspect.signature(objective.function).parameters.items())[1:])
        unknown = sorted(set(arguments) - set(known))
        if unknown:
            raise UserError(
                f"loss {name!r} takes {list(known)}, not {unknown}; a loss of another name is set whole: "
                f"--config.loss=\"{{'name': {name!r}}}\""
            )
        for key, value in {"weight": weight, **arguments}.items():
            if key != "weight" and known[key].annotation is not float:
                continue  # text, switches: the objective checks them itself
            if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
                raise UserError(f"loss {name!r}: {key}={value!r} must be a finite number.")
            arguments |= {key: float(value)} if key != "weight" else {}
        if any(term.name == name for term in terms):
            raise UserError(
                f"loss {name!r} occurs twice in config.loss and config.extra_losses; one term of it is enough."
            )
        function = functools.partial(objective.function, **arguments)
        try:
            traced = _trace(function, objective)
        except ValueError as error:
            raise UserError(f"loss {name!r}: {error}") from None
        terms.append(Term(name, objective, function, float(weight), traced.rewards is not None))
    return tuple(terms)


def _trace(function: Callable[[Responses], Losses], objective: Objective) -> Losses:
    """Traces an objective on nothing, so that a hyper-parameter out of range is known before anything is compiled."""

    def traced(logps: Array, lengths: Array) -> Losses:
        return function(Responses(logps, logps if objective.reference else None, lengths))

    shape = (1, objective.responses or 2)
    return jax.eval_shape(traced, np.zeros(shape, np.float32), np.ones(shape, np.int32))
