"""Arithmetic of further cases: elementary functions, rows of inputs, gradients by complex steps.

The imaginary part of a loss at x + 1e-30i, over 1e-30, is its slope with no error but rounding.
"""

import cmath
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

STEP = 1e-30

Number = float | complex
Hyperparameters = Mapping[str, Any]


class Row(dict):
    """The inputs of one example, and what formulas make of them: s, s0, n, q, m, m0 of a side, and h."""

    def __getattr__(self, name: str) -> Any:
        kind, _, side = name.partition("_")
        side = {"c": "chosen", "r": "rejected"}[side]
        s, s0, n = (self.get(key.format(side), 0.0) for key in ("policy_{}_logps", "ref_{}_logps", "{}_lengths"))
        return {"s": lambda: s, "n": lambda: n, "q": lambda: s - s0, "m": lambda: s / n, "m0": lambda: s0 / n}[kind]()

    @property
    def h(self) -> Number:
        return self.q_c - self.q_r


def stop(z: Number) -> float:
    """z without its gradient."""
    return z.real


def softplus(z: Number) -> Number:
    if isinstance(z, complex):
        return z + cmath.log(1 + cmath.exp(-z)) if z.real > 0 else cmath.log(1 + cmath.exp(z))
    return z + math.log1p(math.exp(-z)) if z > 0 else math.log1p(math.exp(z))


def sigmoid(z: Number) -> Number:
    exp = cmath.exp if isinstance(z, complex) else math.exp
    return 1 / (1 + exp(-z)) if z.real > 0 else exp(z) / (1 + exp(z))


def exponential(z: Number) -> Number:
    return cmath.exp(z) if isinstance(z, complex) else math.exp(z)


def relu(z: Number) -> Number:
    return z if z.real > 0 else 0 * z


def logistic(z: Number, smoothing: float = 0.0) -> Number:
    return (1 - smoothing) * softplus(-z) + smoothing * softplus(z)


def log_odds(m: Number, floor: float = 0.0) -> Number:
    """log(p / (1 - p)) of log p; 1 - p counts as at least `floor`."""
    rest = -complex(np.expm1(m)) if isinstance(m, complex) else -math.expm1(m)
    return m - (
        math.log(floor) if rest.real <= floor else cmath.log(rest) if isinstance(m, complex) else math.log(rest)
    )


def log_softmax(z: Sequence[Number]) -> list[Number]:
    largest = max(x.real for x in z)
    total = sum(exponential(x - largest) for x in z)
    log = cmath.log(total) if isinstance(total, complex) else math.log(total)
    return [x - largest - log for x in z]


def mean(values: Sequence[Number]) -> Number:
    return sum(values) / len(values)


def rows_of(inputs: Mapping[str, np.ndarray], first: int = 0, last: int | None = None) -> list[Row]:
    """Each example's inputs, as plain numbers and lists."""
    lists = {name: np.asarray(values)[first:last].tolist() for name, values in inputs.items()}
    return [Row({name: values[i] for name, values in lists.items()}) for i in range(len(next(iter(lists.values()))))]


def gradients(
    losses: Callable[[list[Row]], Sequence[Number]], rows: list[Row], names: Sequence[str]
) -> dict[str, list[Any]]:
    """The gradient of the sum of losses with respect to inputs that are a number, or a list of numbers, of each row."""

    def slope(i: int, name: str, place: int | None) -> float:  # every row again: they may be coupled
        value = rows[i][name]
        if place is None:
            moved: Any = complex(value, STEP)
        else:
            moved = [complex(x, STEP) if k == place else x for k, x in enumerate(value)]
        changed = [Row(row | {name: moved}) if k == i else row for k, row in enumerate(rows)]
        return complex(sum(losses(changed))).imag / STEP

    def of_row(i: int, name: str) -> Any:
        value = rows[i][name]
        return [slope(i, name, k) for k in range(len(value))] if isinstance(value, list) else slope(i, name, None)

    return {name: [of_row(i, name) for i in range(len(rows))] for name in names}
