"""The head's three forms against plain autodiff, value and gradient of a weighted sum of log-probs: side by side.

    python -m benchmarks.head [--rows=2] [--scored=2048] [--embed=256] [--vocab=16384] [--dtype=float32] [--repeats=5]

`naive` multiplies all hidden states with the projection, takes a log-softmax and lets JAX differentiate it. `frozen`
makes no gradient of the projection, and is compared with `naive, frozen`, which makes none either. All agree; that is
checked first. Times are medians over the repeats, taken in turn; memory is what the compiled program holds besides its
arguments and results.
"""

import argparse
import functools
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from daajax.ops.head import token_statistics
from daajax.ops.logits import Head
from daajax.ops.row_head import row_gradients

TOLERANCE = {"float32": 1e-4, "bfloat16": 3e-2}  # of the largest entry: gradients come back in the dtype


def naive(hidden: jax.Array, projection: jax.Array, targets: jax.Array, cotangents: jax.Array) -> jax.Array:
    weights = projection.astype(hidden.dtype)
    logits = jnp.einsum("rsd,vd->rsv", hidden, weights, preferred_element_type=jnp.float32)
    logps = jnp.take_along_axis(jax.nn.log_softmax(logits), targets[:, :, None], axis=2)[:, :, 0]
    return (logps * cotangents).sum()


def of_head(
    hidden: jax.Array, projection: jax.Array, targets: jax.Array, cotangents: jax.Array, *, is_frozen: bool
) -> jax.Array:
    real = jnp.ones(targets.shape, bool)
    return (token_statistics(Head(is_frozen=is_frozen), hidden, projection, targets, real)["logps"] * cotangents).sum()


def by_row(hidden: jax.Array, projection: jax.Array, targets: jax.Array, cotangents: jax.Array) -> Any:
    def of_row(values: dict[str, jax.Array], cotangents: jax.Array, _: Any) -> tuple[dict[str, jax.Array], jax.Array]:
        return {"logps": cotangents}, (values["logps"] * cotangents).sum()

    real = jnp.ones(targets.shape, bool)
    losses, *gradients = row_gradients(
        Head(), hidden, projection, targets, real, of_row=of_row, columns=cotangents, shared=()
    )
    return losses.sum(), tuple(gradients)


WAYS: dict[str, Callable[..., Any]] = {
    "naive": jax.value_and_grad(naive, (0, 1)),
    "token": jax.value_and_grad(functools.partial(of_head, is_frozen=False), (0, 1)),
    "row": by_row,
    "naive, frozen": jax.value_and_grad(naive),
    "frozen": jax.value_and_grad(functools.partial(of_head, is_frozen=True)),
}


def measure(rows: int, scored: int, embed: int, vocab: int, dtype: str, repeats: int) -> list[str]:
    """Rows of the table."""
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(rng.normal(size=(rows, scored, embed)), dtype)
    projection = jnp.asarray(rng.normal(size=(vocab, embed)) / np.sqrt(embed), jnp.float32)
    targets = jnp.asarray(rng.integers(0, vocab, (rows, scored)), jnp.int32)
    cotangents = jnp.asarray(rng.normal(size=(rows, scored)), jnp.float32)
    operands = (hidden, projection, targets, cotangents)
    compiled = {name: jax.jit(way).lower(*operands).compile() for name, way in WAYS.items()}
    results = {name: jax.block_until_ready(run(*operands)) for name, run in compiled.items()}
    for name, (value, gradients) in results.items():
        wanted = results["naive, frozen" if "frozen" in name else "naive"]
        for one, other in zip(jax.tree.leaves((value, gradients)), jax.tree.leaves(wanted), strict=True):
            other = np.asarray(other, np.float32)
            atol = TOLERANCE[dtype] * np.abs(other).max()
            np.testing.assert_allclose(np.asarray(one, np.float32), other, atol=atol, rtol=0, err_msg=name)
    seconds: dict[str, list[float]] = {name: [] for name in compiled}
    for _ in range(repeats):
        for name, run in compiled.items():
            began = time.perf_counter()
            jax.block_until_ready(run(*operands))
            seconds[name].append(time.perf_counter() - began)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    lines = []
    for name, median in medians.items():
        memory: Any = compiled[name].memory_analysis()
        ratio = medians["naive, frozen" if "frozen" in name else "naive"] / median
        lines.append(f"| {name} | {1000 * median:.0f} | {ratio:.2f} | {memory.temp_size_in_bytes / 2**20:,.0f} |")
    return lines


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser()
    for name, default in dict(rows=2, scored=2048, embed=256, vocab=16384, repeats=5).items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--dtype", choices=sorted(TOLERANCE), default="float32")
    arguments = vars(parser.parse_args())
    device = jax.devices()[0].device_kind
    print(f"{time.strftime('%Y-%m-%d')}, {platform.machine()}, {device}, jax {jax.__version__}, {arguments}\n")
    print("| head | ms | times as fast as naive | temporaries MiB |\n|---|---|---|---|")
    print("\n".join(measure(**arguments)))


if __name__ == "__main__":
    main()
