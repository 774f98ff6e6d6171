"""Terms of a loss: objectives by name, with their hyper-parameters and weights, checked before anything is compiled."""

import dataclasses
import functools
import inspect
import itertools
import math
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Array

from daajax.errors import UserError
from daajax.losses.objective import Losses, Objective
from daajax.losses.objectives import OBJECTIVES
from daajax.losses.scores import Responses
from daajax.losses.sums import SUMS

DRAWS = ("kept", "reference_kept")  # what sums read that is drawn for every token


@dataclasses.dataclass(frozen=True)
class Term:
    """An objective with its hyper-parameters, its weight in the loss, and whether it has rewards."""

    name: str
    objective: Objective  # what it needs with these hyper-parameters
    loss: Callable[[Responses], Losses]
    weight: float = 1.0
    has_rewards: bool = True


@dataclasses.dataclass(frozen=True)
class Needs:
    """What the terms of a loss need together.

    Attributes:
        reference: Whether any compares with the reference.
        coupled: Whether any sees the whole update at once.
        sums: Keys of `daajax.losses.sums.SUMS`.
        statistics: Keys of `daajax.ops.statistics.STATISTICS`, of the policy.
        fields: What they read of the data.
        may_read: What they read of it where the data have it.
        draws: Random numbers.
        of_reference: Keys of `daajax.ops.statistics.STATISTICS`, of the reference.
        live: Names of the terms that need the reference's model beside the policy's.
    """

    reference: bool
    coupled: bool
    sums: tuple[str, ...]
    statistics: tuple[str, ...]
    fields: tuple[str, ...]
    may_read: tuple[str, ...]
    draws: tuple[str, ...]
    of_reference: tuple[str, ...]
    live: tuple[str, ...]

    @classmethod
    def of(cls, terms: Sequence[Term]) -> "Needs":
        """Adds up what terms need."""

        def union(names: Iterable[Iterable[str]]) -> tuple[str, ...]:
            return tuple(dict.fromkeys(itertools.chain.from_iterable(names)))

        objectives = [term.objective for term in terms]
        sums = union(objective.sums for objective in objectives)
        reads = union(SUMS[name].reads for name in sums)
        return cls(
            reference=any(objective.reference for objective in objectives),
            coupled=any(objective.coupled for objective in objectives),
            sums=sums,
            statistics=union([("logps",), *(SUMS[name].statistics for name in sums)]),
            fields=union(objective.reads for objective in objectives),
            may_read=union(objective.may_read for objective in objectives),
            draws=union([*(objective.draws for objective in objectives), [n for n in DRAWS if n in reads]]),
            of_reference=("logps", "entropies") if "entropies" in reads else ("logps",),
            live=tuple(term.name for term in terms if any(SUMS[name].live for name in term.objective.sums)),
        )


def initial_state(terms: Sequence[Term]) -> dict[str, dict[str, float]]:
    """What the terms keep from update to update, before the first one; by name of the term."""
    return {term.name: dict(term.objective.state) for term in terms if term.objective.state}


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
        if any(term.name == name for term in terms):
            raise UserError(
                f"loss {name!r} occurs twice in config.loss and config.extra_losses; one term of it is enough."
            )
        weight = _checked(name, "weight", weight, float)
        if weight <= 0:
            raise UserError(f"loss {name!r}: weight={weight} must be > 0.")
        terms.append(_term(name, weight, arguments))
    labelled = [term.name for term in terms if "labels" in term.objective.reads]
    others = [term.name for term in terms if "labels" not in term.objective.reads]
    if labelled and others:
        raise UserError(
            f"loss {labelled[0]!r} reads labelled responses, wanted and unwanted; {others[0]!r} does not look at "
            "labels: the two cannot be added; choose one of them."
        )
    return tuple(terms)


def _term(name: str, weight: float, arguments: Mapping[str, Any]) -> Term:
    """An objective bound to hyper-parameters that it accepts."""
    objective = OBJECTIVES[name]
    known = dict(list(inspect.signature(objective.function).parameters.items())[1:])
    if unknown := sorted(set(arguments) - set(known)):
        raise UserError(
            f"loss {name!r} takes {list(known)}, not {unknown}; a loss of another name is set whole: "
            f"--config.loss=\"{{'name': {name!r}}}\""
        )
    arguments = {key: _checked(name, key, value, known[key].annotation) for key, value in arguments.items()}
    if objective.needs is not None:
        objective = dataclasses.replace(objective, **objective.needs(**arguments))
    if objective.refuses is not None:
        objective = dataclasses.replace(objective, refuses=functools.partial(objective.refuses, **arguments))
    function = functools.partial(objective.function, **arguments)
    try:
        traced = _trace(function, objective)
    except ValueError as error:
        raise UserError(f"loss {name!r}: {error}") from None
    return Term(name, objective, function, weight, traced.rewards is not None)


def _checked(name: str, key: str, value: Any, kind: Any) -> Any:
    """A hyper-parameter of the type that its function asks for; a whole number does for a float."""
    kinds = typing.get_args(kind) or (kind,)
    if value is None and type(None) in kinds:
        return None
    if float in kinds:
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise UserError(f"loss {name!r}: {key}={value!r} must be a finite number.")
        return float(value)
    if not isinstance(value, kinds):
        raise UserError(f"loss {name!r}: {key}={value!r} must be of type {kinds[0].__name__}.")
    return value


def _trace(function: Callable[[Responses], Losses], objective: Objective) -> Losses:
    """Traces an objective on nothing, so that a hyper-parameter out of range is known before anything is compiled."""
    shape = (1, objective.responses or 2)
    given = {name: np.zeros(shape, np.float32) for name in ("logps", "scores")}
    given |= {name: np.zeros(1, np.float32) for name in ("prompt_probabilities", "gumbel")}
    given |= {"labels": np.ones(1, np.int32), "finished": np.ones(shape, bool)}
    if objective.reference:
        given["log_ratios"] = np.zeros(shape, np.float32)
    asked = {"logps", "log_ratios", *objective.reads, *objective.draws}

    def traced(values: dict[str, Array]) -> Losses:
        return function(Responses(**{"log_ratios": None, **values}))

    values: dict[str, Any] = {name: value for name, value in given.items() if name in asked}
    values["lengths"] = np.ones(shape, np.int32)
    values["sums"] = {name: np.zeros(shape, np.float32) for name in objective.sums}
    values["state"] = {name: np.float32(value) for name, value in objective.state.items()}
    return jax.eval_shape(traced, values)
