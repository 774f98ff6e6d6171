"""Whether our numbers are the source's: in float64 to the case's tolerance, in float32 to what it rounds."""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from tests.golden.cases import Case, UnreadableError
from tests.golden.evaluation import Problem

DOUBLE, SINGLE = (float(jnp.finfo(dtype).eps) for dtype in (jnp.float64, jnp.float32))
DRAWS = 16
LARGEST, SMALLEST = 1e30, 1e-30  # beyond them a float32 on the way to a result may be infinite, or not be normal


def failures(case: Case, problem: Problem) -> Iterator[str]:
    """Compares a case in both dtypes.

    Yields:
        For each output that differs: the dtype, the output, where it differs most, and both numbers.

    Raises:
        UnreadableError: If it has an output that nothing is known of.
    """
    with jax.enable_x64(True):
        double, of_double, of_single = _in_double(problem)
    if unknown := sorted(set(case.wanted) - set(double)):
        raise UnreadableError(f"nothing is known of the outputs {unknown}; there are {sorted(double)}")
    numbers = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), problem.numbers)
    single = {name: np.asarray(values) for name, values in problem.outputs(numbers).items()}
    for dtype, found, spreads, rounding in (
        ("float64", double, of_double, DOUBLE),
        ("float32", single, of_single, SINGLE),
    ):
        for name, wanted in case.wanted.items():
            if found[name].size != wanted.size:
                yield f"{dtype} {name}: got the shape {found[name].shape}, expected {wanted.shape}"
                continue
            got, spread = (values[name].astype(np.float64).reshape(wanted.shape) for values in (found, spreads))
            tolerance = _tolerance(case, name, spread, rounding)
            if line := _difference(got, wanted, tolerance, _known(case, name, got, dtype), problem.finite):
                yield f"{dtype} {name}{line}"


def _in_double(problem: Problem) -> tuple[dict[str, np.ndarray], ...]:
    """Outputs in float64, and how far they move when the numbers move as far as float64 and float32 may round them.

    A log-prob is rounded to a share of itself, but to no less than the same share of one nat: neither the logits that
    it comes from nor the probability that some code makes of it are finer.
    """
    rng = np.random.default_rng(0)

    def moved(x: np.ndarray) -> jax.Array:
        moves = 2 * rng.uniform(-1, 1, (2, DRAWS, *x.shape)) * (1 + np.abs(x))
        return jnp.asarray(np.concatenate([x[None], x + DOUBLE * moves[0], x + SINGLE * moves[1]]), jnp.float64)

    outputs = jax.vmap(problem.outputs)(jax.tree.map(moved, problem.numbers))
    found = {name: np.asarray(values, np.float64) for name, values in outputs.items()}

    def spreads(first: int) -> dict[str, np.ndarray]:
        with np.errstate(invalid="ignore"):
            return {name: np.fmax.reduce(np.abs(x[first : first + DRAWS] - x[0])) for name, x in found.items()}

    return {name: x[0] for name, x in found.items()}, spreads(1), spreads(1 + DRAWS)


def _tolerance(case: Case, name: str, spread: np.ndarray, rounding: float) -> np.ndarray:
    """How far an output may be from the source's.

    The case's own tolerance; what one rounding of the numbers that go in makes of the results, eight times over for the
    operations in between; some roundings of the result; and of what formulas (the source's too: 1 - σ(z)) subtract from
    each other: ones, and in gradients numbers of the size of the largest.
    """
    wanted, size = case.wanted[name], 1.0
    if "grads." in name:
        alike = [x for other, x in case.wanted.items() if "grads." in other]
        size = min(size, max(np.abs(x[np.isfinite(x)]).max(initial=0) for x in alike))
    with np.errstate(invalid="ignore", over="ignore"):
        return (case.rtol + 32 * rounding) * np.abs(wanted) + 8 * (spread + rounding * size) + SMALLEST


def _known(case: Case, name: str, got: np.ndarray, dtype: str) -> np.ndarray:
    """Which of the source's numbers are there to compare with; of the others ours need only be finite."""
    wanted = case.wanted[name]
    known = np.isfinite(wanted)
    if "grads." in name:
        known[[row for row in case.ignored_rows if row < len(known)]] = False
    if dtype == "float32":
        known &= ~(np.isfinite(got) & (np.abs(wanted) > LARGEST))
    return known


def _difference(
    got: np.ndarray, wanted: np.ndarray, tolerance: np.ndarray, known: np.ndarray, finite: bool
) -> str | None:
    """Where the two differ most, and how many do; None where none does."""
    with np.errstate(invalid="ignore", over="ignore"):
        excess = np.nan_to_num(np.abs(got - wanted) / tolerance, nan=np.inf)
    excess = np.where(known, excess, np.where(np.isfinite(got) | (not finite), 0, np.inf))
    if not (excess > 1).any():
        return None
    place = np.unravel_index(np.argmax(excess), excess.shape)
    where = f"[{', '.join(map(str, place))}]" if place else ""
    others = f" ({(excess > 1).sum()} of {excess.size} differ)" if excess.size > 1 else ""
    return (
        f"{where}: got {float(got[place])!r}, expected {float(wanted[place])!r} within {tolerance[place]:.1e}{others}"
    )
