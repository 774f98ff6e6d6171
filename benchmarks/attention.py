"""Attention on packed rows with shared prompts, forward and backward: side by side in one run.

    python -m benchmarks.attention [--heads=8] [--kv_heads=4] [--head_dim=32] [--pairs=8] [--repeats=5]

`blockwise` is what a CPU trains with, `dense` builds the whole mask (the oracle), `padded` is what a trainer without
packing does: every response with its own copy of the prompt, padded to the longest. All three compute the same
outputs; that is checked first. Times are medians over the repeats, taken in turn, of one layer's value and gradient.
"""

import argparse
import platform
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.preferences import MIXES, make_data
from daajax.data.batches import Batches
from daajax.data.packing import pack
from daajax.data.sizes import Sizes
from daajax.data.windows import training_windows
from daajax.ops import attention


def padded(q, k, v, index, lengths):
    """Causal attention over responses gathered one by one, `index` [responses, longest] into the row."""
    gathered = (x[0][index] for x in (q, k, v))
    return jax.nn.dot_product_attention(
        *gathered, is_causal=True, query_seq_lengths=lengths, key_value_seq_lengths=lengths
    )


def measure(mix: str, pairs: int, heads: int, kv_heads: int, head_dim: int, repeats: int) -> list[str]:
    """Rows of the table for one mix of lengths."""
    data = make_data(mix, examples=pairs, seed=0)
    sizes = Sizes.of(data, prefix_sharing=True)
    windows = training_windows(sizes, batch_size=pairs, updates=1, shuffle=False, seed=0)
    plan = pack(windows, sizes, packing=True, micro_batches=1, row_multiple=1)
    batch = {name: jnp.asarray(value[0]) for name, value in Batches(data, plan)[0].items()}
    shape = plan.shape(0)
    layout = attention.key_layout(batch["segments"], batch["branches"], responses=2, keys=shape.keys)
    mask = attention.visible(batch["segments"], batch["branches"], batch["positions"])
    keys = jax.random.split(jax.random.key(0), 4)
    q, cotangent = (jax.random.normal(key, (1, shape.length, heads, head_dim)) for key in keys[:2])
    k, v = (jax.random.normal(key, (1, shape.length, kv_heads, head_dim)) for key in keys[2:])

    segments, branches = (np.asarray(batch[name])[0] for name in ("segments", "branches"))
    of = [
        np.nonzero((segments == s) & ((branches == 0) | (branches == b)))[0]
        for s in range(1, segments.max() + 1)
        for b in (1, 2)
    ]
    longest = max(map(len, of))
    index = np.stack([np.pad(where, (0, longest - len(where))) for where in of])
    lengths = np.array([len(where) for where in of], np.int32)
    # A shared prompt is computed twice here; its cotangent counts once.
    first = np.array([[b % 2 == 0 or p >= data.lengths[b // 2, 0] for p in range(longest)] for b in range(len(of))])
    real = first & (np.arange(longest) < lengths[:, None])

    def loss(attend: Callable[..., jax.Array], dot: jax.Array) -> Callable[..., jax.Array]:
        return jax.jit(jax.value_and_grad(lambda q, k, v: (attend(q, k, v) * dot).sum(), (0, 1, 2)))

    own = jnp.where(real[:, :, None, None], cotangent[0][index], 0)
    ways = {
        "blockwise": loss(lambda q, k, v: attention.blockwise(q, k, v, layout), cotangent),
        "dense": loss(lambda q, k, v: attention.dense(q, k, v, mask), cotangent),
        "padded": loss(lambda q, k, v: padded(q, k, v, index, lengths), own),
    }
    results = {name: jax.block_until_ready(way(q, k, v)) for name, way in ways.items()}
    for name, result in results.items():
        for ours, theirs in zip(jax.tree.leaves(results["dense"][1]), jax.tree.leaves(result[1]), strict=True):
            np.testing.assert_allclose(ours, theirs, atol=2e-4, err_msg=name)
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, way in ways.items():
            began = time.perf_counter()
            jax.block_until_ready(way(q, k, v))
            seconds[name].append(time.perf_counter() - began)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return [
        f"| {mix} | {shape.length} | {name} | {1000 * value:.0f} | {value / medians['blockwise']:.1f} |"
        for name, value in medians.items()
    ]


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser()
    for name, default in dict(heads=8, kv_heads=4, head_dim=32, pairs=8, repeats=5).items():
        parser.add_argument(f"--{name}", type=int, default=default)
    arguments = vars(parser.parse_args())
    print(f"{platform.machine()}, {jax.devices()[0].device_kind}, jax {jax.__version__}, {arguments}\n")
    print("| lengths | row | attention | ms | of blockwise |\n|---|---|---|---|---|")
    for mix in MIXES:
        print("\n".join(measure(mix, **arguments)))


if __name__ == "__main__":
    main()
