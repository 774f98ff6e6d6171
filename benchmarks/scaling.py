"""Whether an update costs what its arithmetic does: time and compiled memory as one measure after another grows.

    python -m benchmarks.scaling [--repeats=5] [--axes=length,batch,vocabulary,layers,width,examples]

Each line is one update of DPO with a cached reference and a random Llama, in float32; one axis at a time differs from
the first line of its table. `of arithmetic` is the time over the FLOPs that the update asks for (`daajax.flops`),
relative to the first line: 1.0 grows as the arithmetic does, more grows faster. Planning has no arithmetic: its time is
given by the example. Times are medians over the repeats; on a CPU they are those of its cores together, so that other
work on the machine counts little.
"""

import argparse
import dataclasses
import statistics
import time
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from benchmarks.ceiling import machine
from benchmarks.preferences import make_data as make_pairs
from configs import base
from daajax import flops, policy, run, sharding, step
from daajax.config import losses, resolve
from daajax.data.batches import Batches
from daajax.data.packing import pack
from daajax.data.sizes import Sizes
from daajax.data.tokens import Ids, TokenizedData
from daajax.data.windows import training_windows
from daajax.losses.terms import bind
from daajax.models.families import architecture_of

LLAMA = {
    "model_type": "llama",
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "hidden_act": "silu",
}


@dataclasses.dataclass(frozen=True)
class Case:
    """One line.

    Attributes:
        length: Tokens of a pair; a quarter is the prompt, each response three eighths.
        batch: Pairs an update.
        vocabulary: Rows of the vocabulary.
        layers: Of the model.
        width: Of its residual stream; the feed-forward block is four times as wide.
    """

    length: int = 256
    batch: int = 4
    vocabulary: int = 4096
    layers: int = 2
    width: int = 128


AXES: Mapping[str, tuple[int, ...]] = {
    "length": (256, 512, 1024),
    "batch": (4, 8, 16),
    "vocabulary": (4096, 8192, 16384),
    "layers": (2, 4, 8),
    "width": (128, 256, 512),
}
EXAMPLES = (10_000, 30_000, 100_000)


def make_data(case: Case) -> TokenizedData:
    """Pairs that are all alike, so that nothing but the axis differs."""
    response = 3 * case.length // 8
    lengths = np.tile(np.array([[case.length - 2 * response, response, response]], np.int32), (case.batch, 1))
    tokens = np.random.default_rng(0).integers(1, case.vocabulary, case.batch * case.length).astype(np.int32)
    return TokenizedData(
        tokens=tokens,
        scored=np.repeat(np.tile([False, True, True], case.batch), lengths.ravel()),
        starts=np.arange(case.batch + 1, dtype=np.int64) * case.length,
        lengths=lengths,
        weights=np.ones(case.batch, np.float32),
        ids=Ids.of([str(pair) for pair in range(case.batch)]),
        counters={},
        notices=[],
        digest="",
    )


def now() -> float:
    """Seconds, of the cores of a CPU or of the clock on the wall."""
    return time.process_time() if jax.default_backend() == "cpu" else time.perf_counter()


def measure(case: Case, repeats: int) -> tuple[float, int, float]:
    """Seconds of one update, the median; bytes that its program works in; FLOPs that it asks for."""
    config = base.get_config()
    config.model.path, config.data.path, config.model.dtype = "random Llama", "pairs", "float32"
    config.batch_size, config.steps = case.batch, 1
    config = resolve(config)
    terms = bind(losses(config))
    sizes_of_model = dict(hidden_size=case.width, intermediate_size=4 * case.width, head_dim=case.width // 8)
    architecture = architecture_of(
        LLAMA | sizes_of_model | dict(vocab_size=case.vocabulary, num_hidden_layers=case.layers)
    )
    mesh = sharding.make_mesh(config.mesh.to_dict(), jax.devices()[:1])
    scorer = policy.make_scorer(config, architecture, mesh)
    update = run.make_update(config, scorer, scorer, terms, updates=1)
    data = make_data(case)
    sizes = Sizes.of(data, prefix_sharing=True)
    plan = pack(np.arange(case.batch)[None], sizes, packing=True, micro_batches=1, row_multiple=1)
    batch = Batches(data, plan, np.zeros(len(data.tokens), np.float32))[0]
    keys = plan.shape(0).keys
    analysis: Any = update.compile(batch, keys=keys).memory_analysis()
    params = policy.load_params("", scorer, mesh, random_seed=0)
    state = step.init_state(params, update.optimizer, sharding.homes(update.state), terms)
    placed, seconds = sharding.place(mesh, batch), []
    for _ in range(1 + repeats):
        began = now()
        state, _ = jax.block_until_ready(update(state, placed, keys=keys))
        seconds.append(now() - began)
    counts = flops.of_plan(
        plan,
        data.lengths,
        sizes.scored,
        architecture,
        remat="none",
        attention=scorer.attention.name,
        head=update.head_for(batch),
    )
    return statistics.median(seconds[1:]), analysis.temp_size_in_bytes, float(counts.steps["packing"][-1])


def print_axis(axis: str, repeats: int) -> None:
    """The table of one axis."""
    print(
        f"\n| {axis} | ms of time | GFLOP | of arithmetic | works in MiB | MiB, relative |\n|---|---|---|---|---|---|"
    )
    first = None
    for value in AXES[axis]:
        seconds, size, arithmetic = measure(dataclasses.replace(Case(), **{axis: value}), repeats)
        first = first or (seconds / arithmetic, size)
        cells = [
            str(value),
            f"{1000 * seconds:.0f}",
            f"{arithmetic / 1e9:.2f}",
            f"{seconds / arithmetic / first[0]:.2f}",
            f"{size / 2**20:.1f}",
            f"{size / first[1]:.2f}",
        ]
        print("|", " | ".join(cells), "|", flush=True)


def print_planning(repeats: int) -> None:
    """The table of what it takes to plan an epoch: updates of 64 pairs in 8 rows."""
    print("\n| examples | planned in s | µs an example | of the first line |\n|---|---|---|---|")
    first = None
    for examples in EXAMPLES:
        sizes = Sizes.of(make_pairs("dialogue", examples=examples, seed=0), prefix_sharing=True)
        seconds = []
        for _ in range(max(1, repeats // 2)):
            began = time.process_time()
            windows = training_windows(sizes, batch_size=64, updates=examples // 64, shuffle=True, seed=0)
            pack(windows, sizes, packing=True, micro_batches=1, row_multiple=8)
            seconds.append(time.process_time() - began)
        each = statistics.median(seconds) / examples
        first = first or each
        print(f"| {examples:,} | {each * examples:.2f} | {1e6 * each:.1f} | {each / first:.2f} |", flush=True)


def main() -> None:
    """Prints a table an axis."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--axes", default=",".join([*AXES, "examples"]))
    given = parser.parse_args()
    case = ", ".join(f"{name} {value}" for name, value in dataclasses.asdict(Case()).items())
    print(f"{machine()}; the first line of every axis: {case}")
    for axis in given.axes.split(","):
        if axis == "examples":
            print_planning(given.repeats)
        else:
            print_axis(axis, given.repeats)


if __name__ == "__main__":
    main()
