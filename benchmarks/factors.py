"""What each technique is worth: the same update with one of them off at a time, side by side in one run.

    python -m benchmarks.factors [--pairs=16] [--repeats=5] [--data=made] [--model=DIR] [--dtype=float32]

An update of DPO on one device, from `benchmarks.workloads`: made-up pairs and a random Llama of 10 million parameters
unless others are given. `all` is what a trainer without any of them does: a row for each pair, with the prompt once for
each response, the reference's model beside the policy's, every layer computed again in the backward pass. `FLOPs` are
those that the update asks for (`daajax.flops`), over those of the first line. The first update's gradient norm and mean
log-prob of the chosen responses agree on all lines, or no time is printed; its loss is ln 2 whatever they compute.
Times are medians over the repeats, taken in turn; on a CPU they are those of its cores together, so that other work
counts little.
"""

import argparse
import pathlib
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax

from benchmarks import workloads
from benchmarks.ceiling import machine
from benchmarks.scaling import now
from configs import base
from daajax import command, inputs, policy, run, sharding, step
from daajax.config import losses, resolve
from daajax.errors import UserError
from daajax.gradient import Beside
from daajax.losses.terms import bind
from daajax.models.families import read_architecture

OFF: Mapping[str, Mapping[str, Any]] = {
    "": {},
    "packing": {"packing.enabled": False},
    "prefix sharing": {"packing.prefix_sharing": False},
    "head by row": {"head": "token"},
    "cached reference": {"reference.live": True},
    "kept products": {"remat": "full"},
}
# Of a mask of a row's length squared, which only CPUs build; elsewhere what serves on every platform.
PLAIN_ATTENTION = {"cpu": ("attention without a mask", "dense")}
COMPARED = ("grad_norm", "logps/chosen")  # of the first update
TOLERANCE = {"float32": 1e-3, "bfloat16": 3e-2}  # relative; by the dtype that is computed in


def lines_on(platform: str) -> dict[str, dict[str, Any]]:
    """Options of a run by what is off there: nothing first, all of them last."""
    name, attention = PLAIN_ATTENTION.get(platform, ("the platform's attention", "blockwise"))
    off = {**OFF, name: {"attention": attention}}
    return {**off, "all": {key: value for options in off.values() for key, value in options.items()}}


class Line(NamedTuple):
    """One line of the table, ready to run.

    Attributes:
        update: Compiled.
        state: Before it.
        beside: Parameters of a live reference.
        batch: On the device.
        keys: The plan's capacity.
        flops: That it asks for.
        memory: Bytes that its program works in.
    """

    update: step.Update
    state: step.TrainState
    beside: Beside
    batch: Mapping[str, jax.Array]
    keys: int
    flops: float
    memory: int


def prepare(work: workloads.Workload, given: argparse.Namespace, folder: str, options: Mapping[str, Any]) -> Line:
    """Plans, compiles and scores the reference as a run does."""
    config = base.get_config()
    config.model.path, config.data.path, config.model.dtype = str(work.model), str(work.pairs), given.dtype
    config.data.cache_dir, config.reference.cache_dir = f"{folder}/tokens", f"{folder}/reference"
    config.data.shuffle, config.max_length = False, given.max_length
    config.batch_size, config.steps, config.check_first_loss = given.pairs, 1, False
    config.update_from_flattened_dict(dict(options))
    config = resolve(config)
    terms, architecture = bind(losses(config)), read_architecture(config.model.path, length=config.max_length)
    mesh = sharding.make_mesh(config.mesh.to_dict(), jax.devices()[:1])
    data, plan = inputs.load_sets(config, architecture, terms, mesh)[0]
    scorer = policy.make_scorer(config, architecture, mesh)
    update = run.make_update(config, scorer, scorer, terms, updates=1)
    params = policy.load_initial_params(config, scorer, mesh)
    reference = run.load_reference(config, [(data, plan)], scorer, scorer, params, terms, mesh)
    batch, keys = inputs.make_batches(config, data, plan, reference.columns[0], terms)[0], plan.shape(0).keys
    analysis: Any = update.compile(batch, keys=keys).memory_analysis()
    counts = run.make_counts(config, scorer, scorer, terms, data, plan, update.head_for(batch))
    live = jax.tree.map(jax.numpy.copy, reference.live)
    return Line(
        update,
        step.init_state(params, update.optimizer, sharding.homes(update.state), terms),
        Beside({}, live),
        sharding.place(mesh, batch),
        keys,
        float(counts.steps["packing"][-1]),
        analysis.temp_size_in_bytes,
    )


def check(first: Mapping[str, Mapping[str, float]], tolerance: float) -> None:
    """Compares what was logged of the first update of each line.

    Args:
        first: What was logged, by line.
        tolerance: By how much it may differ from the first line's, relative.

    Raises:
        UserError: If that of a line differs by more: it computes something else, and no time means anything.
    """
    for name, logged in first.items():
        for key in COMPARED:
            found, wanted = logged[key], first[""][key]
            if not abs(found - wanted) <= tolerance * abs(wanted):
                raise UserError(
                    f"{name} off: {key} of the first update is {found:.6g}, with nothing off {wanted:.6g}, allowed are "
                    f"{tolerance:g} of it; the two do not compute the same, and no time is printed."
                )


def measure(lines: dict[str, Line], repeats: int, tolerance: float) -> dict[str, float]:
    """Seconds of each line's update, the median; see `check`."""
    seconds: dict[str, list[float]] = {name: [] for name in lines}
    first: dict[str, dict[str, float]] = {}
    for _ in range(1 + repeats):
        for name, line in lines.items():
            began = now()
            state, logged = jax.block_until_ready(line.update(line.state, line.batch, line.beside, keys=line.keys))
            seconds[name].append(now() - began)
            lines[name] = line._replace(state=state)
            if name not in first:
                first[name] = {key: float(logged[key]) for key in COMPARED}
        check(first, tolerance)
    return {name: statistics.median(values[1:]) for name, values in seconds.items()}


def main(argv: Sequence[str]) -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.factors")
    parser.add_argument("--data", default="made", help="made, hh, stories or a JSONL file, see benchmarks/workloads.py")
    parser.add_argument("--model", help="a model directory; not given: one is made")
    parser.add_argument("--pairs", type=int, default=16)
    parser.add_argument("--max_length", type=int, default=512)
    parser.add_argument("--dtype", choices=sorted(TOLERANCE), default="float32")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--tiny", action="store_true", help="a smaller model and shorter pairs")
    given = parser.parse_args(argv[1:])
    with tempfile.TemporaryDirectory() as folder:
        work = workloads.make(given.data, given.model, pathlib.Path(folder), tiny=given.tiny)
        lines = {
            name: prepare(work, given, folder, options) for name, options in lines_on(jax.default_backend()).items()
        }
        medians = measure(lines, given.repeats, TOLERANCE[given.dtype])
    print(f"\n{machine()}; {work.name}, {given.pairs} pairs of up to {given.max_length} tokens, {given.dtype}\n")
    print("| off | ms an update | times as long | FLOPs | works in MiB |\n|---|---|---|---|---|")
    for name, line in lines.items():
        cells = [
            name or "nothing",
            f"{1000 * medians[name]:.0f}",
            f"{medians[name] / medians['']:.2f}",
            f"{line.flops / lines[''].flops:.2f}",
            f"{line.memory / 2**20:,.0f}",
        ]
        print("|", " | ".join(cells), "|")


if __name__ == "__main__":
    command.end(main, str(__doc__))
