"""How fast the device at hand multiplies matrices: what `mfu` is measured against where nobody publishes a peak.

    python -m benchmarks.ceiling [--sizes=1024,2048,4096,8192] [--repeats=7] [--dtypes=bfloat16,float32]

Square matrices, one size after another, as training multiplies them: bfloat16 operands with sums in float32, which are
rounded in the product or behind it, whichever is faster; float32 operands in full precision. Each time is that of
enough products one after another to take a while, each reading the one before, so that what it costs to start one does
not count; medians over the repeats. At the end stands a line a dtype with the fastest of it, to paste behind a training
command.
"""

import argparse
import functools
import os
import platform
import statistics
import time

import jax
import jax.numpy as jnp

SECONDS = 0.2  # that one measurement takes at least


@functools.partial(jax.jit, static_argnames=("times", "asked"))
def multiply(x: jax.Array, y: jax.Array, times: int, asked: str) -> jax.Array:
    """The product x · y · y · …, rounded to the dtype of x each time; `asked`: what a product is asked for in."""
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else jax.lax.Precision.DEFAULT

    def once(_: int, x: jax.Array) -> jax.Array:
        return jnp.dot(x, y, precision=precision, preferred_element_type=asked).astype(x.dtype)

    return jax.lax.fori_loop(0, times, once, x)


def measure(size: int, dtype: str, repeats: int) -> float:
    """FLOP/s of products of square matrices: the median, of the faster of two ways to ask for them."""
    return max(_measure(size, dtype, repeats, asked) for asked in {dtype, "float32"})


def _measure(size: int, dtype: str, repeats: int, asked: str) -> float:
    keys = jax.random.split(jax.random.key(0))
    x, y = (jax.random.normal(key, (size, size), jnp.dtype(dtype)) for key in keys)
    y = (y / size**0.5).astype(y.dtype)  # so that products neither grow nor vanish

    def seconds(times: int) -> float:
        began = time.perf_counter()
        multiply(x, y, times, asked).block_until_ready()
        return time.perf_counter() - began

    seconds(1)
    times = max(1, round(SECONDS / seconds(1)))
    seconds(times)
    return 2 * size**3 * times / statistics.median(seconds(times) for _ in range(repeats))


def machine() -> str:
    """The device and what it was measured with."""
    device = jax.devices()[0]
    processor = f"{platform.machine()}, {os.cpu_count()} cores, " if device.platform == "cpu" else ""
    return f"{device.device_kind}, {processor}jax {jax.__version__}, {time.strftime('%Y-%m-%d')}"


def main() -> None:
    """Prints the table and the lines."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--sizes", default="1024,2048,4096,8192")
    parser.add_argument("--dtypes", default="bfloat16,float32")
    parser.add_argument("--repeats", type=int, default=7)
    given = parser.parse_args()
    dtypes = given.dtypes.split(",")
    print(f"{machine()}; TFLOP/s, medians of {given.repeats}\n")
    print(f"| size | {' | '.join(dtypes)} |\n|---|{'---|' * len(dtypes)}")
    best = dict.fromkeys(dtypes, 0.0)
    for size in map(int, given.sizes.split(",")):
        found = {dtype: measure(size, dtype, given.repeats) for dtype in dtypes}
        best = {dtype: max(best[dtype], found[dtype]) for dtype in dtypes}
        print(f"| {size} | {' | '.join(f'{value / 1e12:.3g}' for value in found.values())} |", flush=True)
    print()
    for dtype, value in best.items():
        print(f"--config.model.dtype={dtype} --config.peak_flops={value:.4g}")


if __name__ == "__main__":
    main()
