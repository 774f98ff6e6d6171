"""Attention on packed rows with shared prompts, forward and backward: side by side in one run.

    python -m benchmarks.attention [--heads=8] [--kv_heads=4] [--head_dim=32] [--pairs=8] [--repeats=5]
                                   [--dtype=float32]

Every attention of `daajax.attention.ATTENTION` that serves on this platform is timed: `splash` on TPUs, `cudnn` on
NVIDIA GPUs (with --dtype=bfloat16), `blockwise` anywhere, and `dense`, which builds the whole mask, on CPUs. `padded`
is what a trainer without packing does: every response with its own copy of the prompt, padded to the longest. All
compute the same weighted sum of outputs and the same gradients as `dense`, or where that is not as `padded`, within a
share of the largest entry; that is checked first. What does not serve here is named, with why. Times are medians over
the repeats, taken in turn, of one layer's value and gradient.
"""

import argparse
import functools
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.preferences import MIXES, make_data
from daajax.attention import ATTENTION, make
from daajax.data.batches import Batches
from daajax.data.packing import pack
from daajax.data.sizes import Sizes
from daajax.data.tokens import TokenizedData
from daajax.data.windows import training_windows
from daajax.models.architecture import Architecture, Norm
from daajax.ops.devices import ONE_DEVICE

TOLERANCE = {"float32": 1e-4, "bfloat16": 3e-2}  # of the largest entry; bfloat16 rounds to 2**-8 many times over


def padded(q, k, v, index, lengths):
    """Causal attention over responses gathered one by one, `index` [responses, longest] into the row."""
    gathered = (x[0][index] for x in (q, k, v))
    return jax.nn.dot_product_attention(
        *gathered, is_causal=True, query_seq_lengths=lengths, key_value_seq_lengths=lengths
    )


def layer(heads: int, kv_heads: int, head_dim: int) -> Architecture:
    """A model of one layer with such heads; of the rest nothing is computed."""
    return Architecture(
        model_type="llama",
        vocab_size=1,
        hidden_size=heads * head_dim,
        intermediate_size=1,
        num_hidden_layers=1,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        max_position_embeddings=1,
        tie_word_embeddings=True,
        initializer_range=0.02,
        norm=Norm(1e-5),
    )


class Layer(NamedTuple):
    """What goes into a layer's attention, of one row.

    Attributes:
        operands: Queries, keys and values.
        cotangent: Weights of the outputs, whose sum is differentiated.
        batch: The row's positions, segments and branches.
        length: Tokens of the row.
        keys: Tokens that attention gathers.
    """

    operands: tuple[jax.Array, jax.Array, jax.Array]
    cotangent: jax.Array
    batch: Mapping[str, jax.Array]
    length: int
    keys: int


def make_layer(data: TokenizedData, model: Architecture, dtype: str) -> Layer:
    """One row of all pairs, and random operands for it.

    Args:
        data: The pairs.
        model: Whose heads.
        dtype: Of queries, keys and values.
    """
    sizes, pairs = Sizes.of(data, prefix_sharing=True), len(data.weights)
    windows = training_windows(sizes, batch_size=pairs, updates=1, shuffle=False, seed=0)
    plan = pack(windows, sizes, packing=True, micro_batches=1, row_multiple=1)
    batch = {name: jnp.asarray(value[0]) for name, value in Batches(data, plan)[0].items()}
    shape = plan.shape(0)
    keys = jax.random.split(jax.random.key(0), 4)
    counts = [model.num_attention_heads] * 2 + [model.num_key_value_heads] * 2
    q, cotangent, k, v = (
        jax.random.normal(key, (1, shape.length, heads, model.head_dim), dtype)
        for key, heads in zip(keys, counts, strict=True)
    )
    return Layer((q, k, v), cotangent, batch, shape.length, shape.keys)


def make_padded(layer: Layer, prompts: np.ndarray) -> tuple[Callable[..., jax.Array], jax.Array]:
    """What a trainer without packing computes of the same row, and the weights of its outputs.

    Args:
        layer: The row.
        prompts: Tokens of each pair's prompt.
    """
    segments, branches = (np.asarray(layer.batch[name])[0] for name in ("segments", "branches"))
    of = [
        np.nonzero((segments == s) & ((branches == 0) | (branches == b)))[0]
        for s in range(1, segments.max() + 1)
        for b in (1, 2)
    ]
    longest = max(map(len, of))
    index = np.stack([np.pad(where, (0, longest - len(where))) for where in of])
    lengths = np.array([len(where) for where in of], np.int32)
    # A shared prompt is computed twice here; its cotangent counts once.
    first = np.array([[b % 2 == 0 or p >= prompts[b // 2] for p in range(longest)] for b in range(len(of))])
    real = first & (np.arange(longest) < lengths[:, None])
    weights = jnp.where(real[:, :, None, None], layer.cotangent[0][index], 0)
    return lambda q, k, v: padded(q, k, v, index, lengths), weights


def check(results: Mapping[str, Any], wanted: str, tolerance: float) -> None:
    """Compares values and gradients of all ways with those of one.

    Args:
        results: A value, and gradients, by way.
        wanted: The way that is right.
        tolerance: Of the largest entry of each gradient. A value is a sum of as many terms of either sign as a gradient
            of the queries has entries, and may differ by what so many roundings come to: that times √entries.

    Raises:
        AssertionError: If they differ by more.
    """
    value, gradients = results[wanted]
    for name, (own_value, own) in results.items():
        for ours, theirs in zip(own, gradients, strict=True):
            theirs = np.asarray(theirs, np.float32)
            atol = tolerance * np.abs(theirs).max()
            np.testing.assert_allclose(np.asarray(ours, np.float32), theirs, atol=atol, rtol=0, err_msg=name)
        atol = tolerance * gradients[0].size ** 0.5
        np.testing.assert_allclose(float(own_value), float(value), atol=atol, rtol=0, err_msg=name)


def measure(mix: str, pairs: int, model: Architecture, names: Sequence[str], repeats: int, dtype: str) -> list[str]:
    """Rows of the table for one mix of lengths.

    Args:
        mix: Key of `MIXES`.
        pairs: Pairs of the one row.
        model: Whose layer.
        names: Keys of `ATTENTION`.
        repeats: Times that each is timed.
        dtype: Of queries, keys and values.
    """
    data = make_data(mix, examples=pairs, seed=0)
    layer = make_layer(data, model, dtype)

    def loss(attend: Callable[..., jax.Array], dot: jax.Array) -> Callable[..., jax.Array]:
        def weighted(q: jax.Array, k: jax.Array, v: jax.Array, dot: jax.Array) -> jax.Array:
            return (attend(q, k, v).astype(jnp.float32) * dot).sum()

        gradient = jax.jit(jax.value_and_grad(weighted, (0, 1, 2)))
        return lambda *operands: gradient(*operands, dot)  # an argument: constants are folded at length

    ways = {"padded": loss(*make_padded(layer, data.lengths[:, 0]))}
    longest = int((data.lengths[:, :1] + data.lengths[:, 1:]).max())
    for name in names:
        see, attend = make(name, model, ONE_DEVICE, longest=longest)
        seen = jax.jit(see, static_argnums=1)(layer.batch, layer.keys)
        ways[name] = loss(functools.partial(_seen, attend, seen), layer.cotangent)
    results = {name: jax.block_until_ready(way(*layer.operands)) for name, way in ways.items()}
    check(results, "dense" if "dense" in ways else "padded", TOLERANCE[dtype])
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, way in ways.items():
            began = time.perf_counter()
            jax.block_until_ready(way(*layer.operands))
            seconds[name].append(time.perf_counter() - began)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return [
        f"| {mix} | {layer.length} | {name} | {1000 * value:.3g} | {value / medians['blockwise']:.2f} |"
        for name, value in medians.items()
    ]


def _seen(attend: Callable[..., jax.Array], seen: Any, *operands: jax.Array) -> jax.Array:
    return attend(*operands, seen)


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser()
    for name, default in dict(heads=8, kv_heads=4, head_dim=32, pairs=8, repeats=5).items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--dtype", choices=sorted(TOLERANCE), default="float32")
    given, device = parser.parse_args(), jax.devices()[0]
    model = layer(given.heads, given.kv_heads, given.head_dim)
    lacking = {name: way.lacks(model, given.dtype, device, ONE_DEVICE) for name, way in ATTENTION.items()}
    print(f"{platform.machine()}, {device.device_kind}, jax {jax.__version__}, {vars(given)}")
    for name, lack in lacking.items():
        if lack is not None:
            print(f"not timed here: {name} {lack}")
    print("\n| lengths | row | attention | ms | of blockwise |\n|---|---|---|---|---|")
    names = [name for name, lack in lacking.items() if lack is None]
    for mix in MIXES:
        print("\n".join(measure(mix, given.pairs, model, names, given.repeats, given.dtype)))


if __name__ == "__main__":
    main()
