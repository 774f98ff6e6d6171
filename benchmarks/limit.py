"""How much an update makes of what the devices at hand can do: models of published shapes, pairs of usual lengths.

    python -m benchmarks.limit [--model=llama-3.2-1b] [--lengths=feedback,short,long] [--option=remat=dots] …
    python -m benchmarks.limit --vary=remat=full --vary=packing.prefix_sharing=False …    # one more line each
    python -m benchmarks.limit --topology=h200:1 …       # compiled for a chip that is not there: memory and no times

Updates of DPO in bfloat16 with the reference cached and float32 AdamW, over random weights and made-up pairs. The limit
is the least arithmetic that the pairs ask for (prompts once, the head on responses only, attention by queries and the
keys that they see: `daajax.flops`) at the rate at which the same devices multiply matrices in the same run
(`benchmarks.ceiling`, the fastest of its sizes). `of the limit` is the share of it that is reached; the columns behind
it say where the rest goes, and their product is that share: `head`, `remat`, `sharing` and `packing` are the least
arithmetic over what is asked for, `kernels` is how fast that is done, over the rate of matrices. `pass` is what the
reference pass takes for as many pairs. Times are medians, of the updates of a run but the first; compilation is apart.
"""

import argparse
import statistics
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from benchmarks import ceiling
from benchmarks.memory import peak, set_options
from benchmarks.preferences import GOALS, make_data
from configs import base
from daajax import command, inputs, policy, run, sharding, step
from daajax.chips import Chip, chip_of
from daajax.config import Config, losses, resolve
from daajax.data.batches import Batches
from daajax.gradient import Beside
from daajax.losses.terms import Needs, bind
from daajax.models import lora
from daajax.models.families import architecture_of
from daajax.planning import layouts, topologies
from daajax.planning.shapes import SHAPES
from daajax.train import IN_FLIGHT

SIZES = (4096, 8192, 16384)  # of the matrices whose products are the ceiling
COLUMNS = (
    "lengths", "pairs in rows", "remat, head", "compiled in s", "GiB", "ms an update", "ms pass", "pairs/s a chip",
    "limit", "of the limit", "tokens/s a chip", "head %", "remat %", "sharing %", "packing %", "kernels %",
)  # fmt: skip


def make_config(given: argparse.Namespace, lengths: str, pairs: int, options: Sequence[str]) -> Config:
    """A run's; options beside those of all runs."""
    config = base.get_config()
    config.model.path, config.data.path, config.model.random_init = given.model, lengths, True
    config.batch_size, config.steps, config.max_length = pairs, given.updates, GOALS[lengths][-1]
    config.optimizer.warmup_steps = 0
    set_options(config, [*given.option, *options])
    return resolve(config)


def make_layout(given: argparse.Namespace, config: Config, topology: topologies.Topology) -> layouts.Layout:
    """The run of a config on machines."""
    lengths, architecture = config.data.path, architecture_of(SHAPES[given.model])
    data = make_data(lengths, examples=config.batch_size * given.updates, seed=0)
    subject = layouts.Subject(architecture, bind(losses(config)), data, topology, given.model)
    return layouts.make_layout(subject, config)


def at_hand() -> topologies.Topology:
    """The devices at hand, described as those are that are not."""
    devices = jax.devices()
    chip, share = chip_of(devices[0])
    memory = (devices[0].memory_stats() or {}).get("bytes_limit", 0)
    return topologies.Topology(
        "here", devices, memory, chip or Chip(0.0, 0.0, 0.0), share, len(devices), {}, f"jax {jax.__version__}"
    )


class Compiled(NamedTuple):
    """What compiling an update took.

    Attributes:
        size: Bytes of a device that it needs, its arguments included.
        seconds: Wall seconds.
    """

    size: int
    seconds: float


def compile_update(layout: layouts.Layout) -> Compiled:
    """Compiles the update; at hand, it is then ready to run."""
    began, topology = time.perf_counter(), layout.subject.topology
    if topology.compiler_options:
        program = layout.lower_update().compile(compiler_options=dict(topology.compiler_options))
    else:
        program = layout.update.compile(layout.batch, keys=layout.keys)
    found: Any = program.memory_analysis()
    outputs = found.output_size_in_bytes - found.alias_size_in_bytes
    numbers = dict(arguments=found.argument_size_in_bytes, temporaries=found.temp_size_in_bytes, outputs=outputs)
    return Compiled(peak(numbers), time.perf_counter() - began)


def time_updates(layout: layouts.Layout, params: Any) -> list[float]:
    """Wall seconds of every update of the plan but the first, queued as in a run; `params` are used up."""
    plan, mesh, update, terms = layout.plan, layout.mesh, layout.update, layout.subject.terms
    unknown = {name: np.zeros(len(layout.subject.data.tokens), np.float32) for name in Needs.of(terms).of_reference}
    batches = inputs.make_batches(layout.config, layout.subject.data, plan, unknown, terms)
    own, frozen = lora.split(params, layout.scorer.model.lora)
    state = step.init_state(own, update.optimizer, sharding.homes(update.state), terms)
    beside, queued, times = Beside(frozen, {}), [], [time.perf_counter()]
    for t in range(plan.updates):
        state, logged = update(state, sharding.place(mesh, batches[t]), beside, keys=plan.shape(t).keys)
        queued.append(logged["loss"])
        while queued and (len(queued) > IN_FLIGHT or t + 1 == plan.updates):
            queued.pop(0).block_until_ready()
            times.append(time.perf_counter())
    return np.diff(times)[1:].tolist()


def time_pass(layout: layouts.Layout, params: Any) -> float:
    """Wall seconds that the reference pass takes for the pairs of an update, the median of three."""
    config, data, mesh, scorer = layout.config, layout.subject.data, layout.mesh, layout.reference_scorer
    sweep = inputs.plan_sweep(config, data, mesh, most_tokens=layout.plan.most_tokens)
    score = run.make_reference_pass(config, scorer, Needs.of(layout.subject.terms).of_reference)
    at, params = sweep.largest_update(), policy.at_start(config, params)
    part = sharding.place(mesh, {name: value[0] for name, value in Batches(data, sweep)[at].items()}, ("rows",))
    seconds = []
    for _ in range(4):
        began = time.perf_counter()
        jax.block_until_ready(score(params, part, keys=sweep.shape(at).keys))
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds[1:]) * config.batch_size / int((sweep.windows[at] >= 0).sum())


def measure(layout: layouts.Layout, rate: float | None) -> list[str]:
    """One line of the table, as cells but the first.

    Args:
        layout: What is compiled, and run.
        rate: FLOP/s of a device that multiplies matrices; None: nothing is run.
    """
    config, plan, subject = layout.config, layout.plan, layout.subject
    compiled, shape = compile_update(layout), plan.shape(plan.largest_update())
    cells = [
        f"{config.batch_size} in {plan.micro_batches} × {plan.rows} × {shape.length}",
        f"{config.remat}, {layout.head.form}",
        f"{compiled.seconds:.0f}",
        f"{compiled.size / 2**30:.1f}",
    ]
    if rate is None:
        return cells
    params = policy.load_initial_params(config, layout.scorer, layout.mesh)
    passed = time_pass(layout, params)
    seconds = statistics.median(time_updates(layout, params))
    counts = run.make_counts(
        config, layout.scorer, layout.reference_scorer, subject.terms, subject.data, plan, layout.head
    )
    chips, each = len(subject.topology.devices), counts.least[-1] / plan.updates / config.batch_size
    pairs, limit = config.batch_size / seconds / chips, rate / each
    factors = counts.factors(0, plan.updates)
    shares = [*factors.values(), pairs / limit / float(np.prod(list(factors.values())))]
    return [
        *cells,
        f"{1000 * seconds:.0f}",
        f"{1000 * passed:.0f}",
        f"{pairs:.1f}",
        f"{limit:.1f}",
        f"**{100 * pairs / limit:.0f} %**",
        f"{subject.data.lengths.sum() / plan.updates / seconds / chips:,.0f}",
        *(f"{100 * share:.0f}" for share in shares),
    ]


def main(argv: Sequence[str]) -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.limit")
    parser.add_argument("--model", choices=SHAPES, default="llama-3.2-1b")
    parser.add_argument("--lengths", default=",".join(GOALS), help="keys of GOALS in benchmarks/preferences.py")
    parser.add_argument("--pairs", default="32", help="an update: of all lengths, or one number each")
    parser.add_argument("--updates", type=int, default=8)
    parser.add_argument(
        "--option", action="append", default=[], help="of a run: packing.row_length=4096, remat=full, …"
    )
    parser.add_argument("--vary", action="append", default=[], help="an option that a further line of each lengths has")
    parser.add_argument("--topology", help="machines that are not there, as `python -m daajax.plan` takes them")
    given = parser.parse_args(argv[1:])
    topology = topologies.describe(given.topology) if given.topology else at_hand()
    names, pairs = given.lengths.split(","), [int(count) for count in given.pairs.split(",")]
    options = " ".join([f"{given.pairs} pairs an update", *given.option])
    rate = None
    if given.topology:
        print(f"{given.topology}, {topology.compiler}, {time.strftime('%Y-%m-%d')}; {given.model}, {options}\n")
    else:
        rate = max(ceiling.measure(size, "bfloat16", 5) for size in SIZES)
        print(f"{ceiling.machine()}: {rate / 1e12:.0f} TFLOP/s in products of matrices; {given.model}, {options}\n")
    columns = COLUMNS if rate else COLUMNS[:5]
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}", flush=True)
    for lengths, count in zip(names, pairs * (len(names) if len(pairs) == 1 else 1), strict=True):
        for options in [(), *((option,) for option in given.vary)]:
            layout = make_layout(given, make_config(given, lengths, count, options), topology)
            print(f"| {' '.join([lengths, *options])} | {' | '.join(measure(layout, rate))} |", flush=True)


if __name__ == "__main__":
    command.end(main, str(__doc__))
