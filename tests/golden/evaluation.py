"""What the project makes of a golden case: losses, gradients and further outputs, as functions of its numbers."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from daajax.loss import Counts, share_of
from daajax.losses.objective import Losses
from daajax.losses.scores import Responses
from daajax.losses.terms import Needs, Term, bind, initial_state
from tests.golden.cases import Case, UnreadableError
from tests.golden.layouts import Layout, slices


class Problem(NamedTuple):
    """A case as a function.

    Attributes:
        numbers: A tree of float64 arrays, in the dtype under test when `outputs` gets them.
        outputs: From numbers to outputs by dotted path, as in `Case.wanted`.
        finite: Whether they are finite where the source's are not; False where such data are refused before.
    """

    numbers: Any
    outputs: Callable[[Any], dict[str, Array]]
    finite: bool = True


class Evaluation(NamedTuple):
    """An update's loss of a layout.

    Attributes:
        term: The objective.
        examples: How many there are; behind them come rows that are none.
        responses: What it was given.
        result: What it made of them.
        loss: The update's loss.
        losses: Per example, each with its share of a part that is divided by tokens: their mean is the loss.
        gradient: Of the loss, by variable.
    """

    term: Term
    examples: int
    responses: Responses
    result: Losses
    loss: Array
    losses: Array
    gradient: Mapping[str, Array]


ROWS = 16
FIELDS = ("scores", "prompt_probabilities", "gumbel")  # of `Responses`, numbers of the data
Output = Callable[[Evaluation], Array]

# What a gradient of the mean is multiplied with, and what `loss` is of the mean, for n examples.
GRADIENTS: dict[str, Callable[[int], int]] = {
    "sum": lambda n: n,
    "batch sum": lambda n: n,
    "batch mean": lambda n: 1,
    "loss": lambda n: 1,
    "n/a": lambda n: 1,
}
LOSSES: dict[str, Callable[[int], int]] = GRADIENTS | {"sum": lambda n: 1}


def problem(
    case: Case,
    loss: Mapping[str, Any],
    layout: Layout,
    outputs: Mapping[str, Output] | None = None,
    *,
    state: Mapping[str, Array] | None = None,
    losses_of_an_example: int = 1,
) -> Problem:
    """A case that is one loss of one batch.

    Args:
        case: Which.
        loss: What `config.loss` would be.
        layout: Of its inputs.
        outputs: Further outputs, or ones that differ from the usual.
        state: What the objective kept before, where it does not begin.
        losses_of_an_example: How many losses the source has of each example, whose mean is ours.
    """
    (term,) = bind([loss])
    before = initial_state([term]).get(term.name, {}) if state is None else state

    def found(numbers: Mapping[str, Array]) -> dict[str, Array]:
        return _outputs(case, evaluate(term, layout, numbers, before), outputs or {}, losses_of_an_example)

    return Problem(layout.numbers, found)


def sequence(case: Case, loss: Mapping[str, Any], layouts: Sequence[Layout], outputs: Mapping[str, Output]) -> Problem:
    """A case of consecutive batches, through which the objective keeps its state."""
    (term,) = bind([loss])

    def found(numbers: Sequence[Mapping[str, Array]]) -> dict[str, Array]:
        state, steps = initial_state([term]).get(term.name, {}), {}
        for place, (layout, given) in enumerate(zip(layouts, numbers, strict=True)):
            evaluation = evaluate(term, layout, given, state)
            state = evaluation.result.state
            steps |= {f"steps.{place}.{name}": x for name, x in _outputs(case, evaluation, outputs).items()}
        return steps

    return Problem([layout.numbers for layout in layouts], found)


def batches(case: Case, layout: Layout) -> list[Layout]:
    """The consecutive batches of a case."""
    return [slices(layout, first, last) for first, last in case.batches]


def evaluate(term: Term, layout: Layout, numbers: Mapping[str, Array], state: Mapping[str, Any]) -> Evaluation:
    """The loss of an update that consists of the layout's examples.

    Small updates are filled up to `ROWS` with rows that are no examples, which must not matter.
    """
    dtype = next(iter(numbers.values())).dtype
    n = len(layout.examples["lengths"])
    fields = {name: x.astype(dtype) if x.dtype == np.float64 else x for name, x in layout.examples.items()}
    fields |= {name: x for name, x in numbers.items() if name in FIELDS}
    examples = {name: _filled(jnp.asarray(x)) for name, x in fields.items()}
    examples |= {"weights": jnp.ones(max(n, ROWS), dtype), "places": _filled(jnp.arange(1, n + 1)) - 1}
    counts = Counts.of({name: x[None] for name, x in examples.items()})
    needs = Needs.of([term])

    def loss(changes: Mapping[str, Array]) -> tuple[Array, Any]:
        sums = jax.tree.map(_filled, layout.sums(numbers, changes, needs))
        responses = Responses(
            sums.logps,
            sums.log_ratios,
            real=examples["places"] >= 0,
            sums=sums.further,
            state={name: jnp.asarray(x, dtype) for name, x in state.items()},
            **{name: examples[name] for name in fields},
        )
        result = term.loss(responses)
        return share_of(result, examples, counts), (responses, result)

    zeros = {name: jnp.zeros(shape, dtype) for name, shape in layout.variables.items()}
    (total, (responses, result)), gradient = jax.value_and_grad(loss, has_aux=True)(zeros)
    losses = result.losses
    if result.token_losses is not None:
        losses += result.token_losses.sum() / counts.tokens
    return Evaluation(term, n, responses, result, total, losses[:n], gradient)


def _filled(x: Array) -> Array:
    return jnp.pad(x, [(0, max(0, ROWS - len(x))), *[(0, 0)] * (x.ndim - 1)])


def _outputs(
    case: Case, found: Evaluation, further: Mapping[str, Output], losses_of_an_example: int = 1
) -> dict[str, Array]:
    if case.grad_of not in GRADIENTS:
        raise UnreadableError(f"grad_of={case.grad_of!r} is none of {list(GRADIENTS)}")
    n = losses_of_an_example * found.examples
    scale = GRADIENTS[case.grad_of](n)
    outputs = {"losses": found.losses, "per_example": found.losses, "loss_mean": found.loss}
    outputs["loss"] = LOSSES[case.grad_of](n) * found.loss
    outputs |= {f"grads.{name}": scale * gradient for name, gradient in found.gradient.items()}
    return outputs | {name: output(found) for name, output in further.items()}
