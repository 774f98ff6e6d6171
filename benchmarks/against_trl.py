"""TRL's DPOTrainer and daajax on the same pairs, side by side in one run: time, memory, and that they compute the same.

    make setup-trl && python -m benchmarks.against_trl      # on pairs that are made up
    DAAJAX_ASSETS=… python -m benchmarks.against_trl --data=hh --output=benchmarks/results/against_trl_hh.md
    python -m benchmarks.against_trl --device=cuda --shape=llama-3.2-1b --data=feedback      # both on the same GPU

Both train the same model directory with AdamW, a constant learning rate and gradients clipped to 1, on the same pairs
in the order that daajax plans for an epoch; pairs longer than `--max_length` are left out, because the two would cut
them differently. On a CPU they compute in float32; on a GPU in bfloat16, with parameters in float32. They are two
processes on the same device with the same allocator, and take turns: so many updates by one, as many by the other. If
the losses of the first 5 updates differ by more than `GATES` says (1e-3 in float32), or stay so near the first one,
ln 2, that this would show nothing, no speed is printed.

TRL is measured with its defaults and with whatever of its options may suit the device better: `VARIANTS`, one after the
other, each for `--rounds` × `--updates` updates from the initial model, the first of which is not counted. It computes
the reference anew in every update unless `precompute_ref_log_probs` is on; daajax scores it once. `cpu` seconds are
those of all threads together, which another program on the machine disturbs less. TRL's defaults compute activations
again in the backward pass (gradient checkpointing); `--remat=full` has daajax do so too.
"""

import argparse
import contextlib
import dataclasses
import json
import math
import os
import pathlib
import platform
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from benchmarks import workloads
from benchmarks.workers import DiedError, RefusedError, Worker
from daajax import command
from daajax.errors import UserError
from daajax.models.remat import REMAT
from daajax.planning.shapes import SHAPES

ROOT = pathlib.Path(__file__).parents[1]
GATE = 5  # updates whose losses must agree
LEARNING_RATE, TINY_LEARNING_RATE = 1e-4, 1e-2  # with the smaller, the losses of a tiny model do not move
MALLOC = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
# JAX takes its part of a GPU's memory at the start; the other part is for PyTorch.
ENVIRONMENTS = {"cpu": {"JAX_PLATFORMS": "cpu"}, "cuda": {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.35"}}
OUT_OF_MEMORY = "torch.OutOfMemoryError"
DTYPES = {"cpu": "float32", "cuda": "bfloat16"}


class Gate(NamedTuple):
    """What losses must do before a speed is printed.

    Attributes:
        within: How closely those of two trainers must agree, nats.
        moved: By how much one of them must differ from the first, or two that agree would show nothing.
    """

    within: float
    moved: float


# In bfloat16 a token's log-prob is off by 0.01 nats or so, and the mean loss of 16 pairs of hundreds of tokens as much.
GATES = {"float32": Gate(1e-3, 20e-3), "bfloat16": Gate(25e-3, 80e-3)}

WHOLE = {"gradient_checkpointing": False}
PRECOMPUTED = {"precompute_ref_log_probs": True}
VARIANTS: dict[
    str, dict[str, Any]
] = {  # arguments of DPOConfig; `at_once`: pairs of an update that are padded together
    "defaults": {},
    "no gradient checkpointing": WHOLE,
    "… pad_to_multiple_of=64": {**WHOLE, "pad_to_multiple_of": 64},
    "… reference precomputed": {**WHOLE, **PRECOMPUTED},
    "… 4 pairs at once": {**WHOLE, "at_once": 4},
    "… 1 pair at once": {**WHOLE, "at_once": 1},
    "… 1 pair at once, reference precomputed": {**WHOLE, **PRECOMPUTED, "at_once": 1},
}
LIGER = {"Liger's kernels": {"use_liger_kernel": True}}  # in Triton, for GPUs


@dataclasses.dataclass(frozen=True)
class Measured:
    """What one trainer took.

    Attributes:
        times: `wall` and `cpu` seconds by update, without the first.
        peak: The most memory it ever had, bytes: resident, or of the GPU.
        before: The most by stage, ahead of the updates.
        first: Wall seconds of the first update.
        reference: `wall` seconds of the pass over the reference of `passed` pairs; None where there was none.
        passed: See `reference`.
    """

    times: Sequence[dict[str, float]]
    peak: int
    before: dict[str, int]
    first: float
    reference: float | None = None
    passed: int = 0

    def median(self, clock: str) -> float:
        """Seconds an update."""
        return statistics.median(seconds[clock] for seconds in self.times)

    def extremes(self) -> str:
        """Wall seconds of the fastest and the slowest update, as text."""
        seconds = [seconds["wall"] for seconds in self.times]
        return f"{min(seconds):.2f} to {max(seconds):.2f}"

    def epoch(self, pairs: int, batch_size: int) -> float:
        """Wall seconds of an epoch with the pass over the reference, from the medians."""
        passes = 0.0 if self.reference is None else self.reference * pairs / self.passed
        return passes + self.median("wall") * (pairs // batch_size)


def check_losses(ours: Sequence[float], theirs: Sequence[float], what: str, gate: Gate = GATES["float32"]) -> float:
    """Compares the first losses; returns by how much they differ at most, nats.

    Raises:
        UserError: If that is more than the gate allows, there are fewer than `GATE`, or none differs from the first
            by as much as it asks for: then no speed means anything.
    """
    ours, theirs = ours[:GATE], theirs[:GATE]
    if len(ours) < GATE or len(theirs) < GATE:
        raise UserError(f"{what}: {len(ours)} and {len(theirs)} losses to compare, {GATE} are needed.")
    differences = [abs(a - b) for a, b in zip(ours, theirs, strict=True)]
    worst = max(differences, key=lambda difference: (math.isnan(difference), difference))
    if not worst <= gate.within:
        lines = ", ".join(f"{a:.6f} and {b:.6f}" for a, b in zip(ours, theirs, strict=True))
        raise UserError(
            f"{what}: the losses of the first {GATE} updates differ by {worst:.2g}, allowed is {gate.within:g} "
            f"(daajax and TRL: {lines}); the two do not compute the same, and no speed is printed."
        )
    moved = max(abs(loss - ours[0]) for loss in ours)
    if not moved > gate.moved:
        raise UserError(
            f"{what}: the losses of the first {GATE} updates agree, but all are within {moved:.2g} of the first; one "
            f"must be more than {gate.moved:g} away to tell two trainers apart; give a higher --learning_rate."
        )
    return worst


# ---------------------------------------------------------------------- the two sides


def start_daajax(given: argparse.Namespace, work: workloads.Workload, folder: pathlib.Path) -> Worker:
    """Starts daajax's worker; its first answer is the plan."""
    names = ("batch_size", "max_length", "learning_rate", "beta", "remat")
    options = {name: getattr(given, name) for name in names} | {"dtype": DTYPES[given.device], "set": given.option}
    told = dict(
        model=str(work.model.resolve()),
        pairs=str(work.pairs.resolve()),
        folder=str(folder),
        updates=given.rounds * given.updates,
        options=options,
    )
    line = [sys.executable, "-m", "benchmarks.daajax_worker", json.dumps(told)]
    return Worker(line, folder / "daajax.log", cwd=ROOT, environment=MALLOC | ENVIRONMENTS[given.device])


def start_trl(
    given: argparse.Namespace, work: workloads.Workload, pairs: pathlib.Path, variant: dict[str, Any]
) -> Worker:
    """Starts TRL's worker; its first answer says that the trainer is there."""
    at_once = variant.get("at_once", given.batch_size)
    arguments = {
        "per_device_train_batch_size": at_once,
        "gradient_accumulation_steps": given.batch_size // at_once,
        "max_length": given.max_length,
        "learning_rate": given.learning_rate,
        "beta": given.beta,
        "adam_beta1": 0.9,
        "adam_beta2": 0.999,
        "adam_epsilon": 1e-8,
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "use_cpu": given.device == "cpu",
        "bf16": DTYPES[given.device] == "bfloat16",
        **{name: value for name, value in variant.items() if name != "at_once"},
    }
    told = dict(
        model=str(work.model.resolve()), pairs=str(pairs), threads=len(os.sched_getaffinity(0)), arguments=arguments
    )
    line = [str(given.python), "-m", "benchmarks.trl_worker", json.dumps(told)]
    offline = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONWARNINGS": "ignore"}
    return Worker(line, pairs.parent / "trl.log", cwd=ROOT, environment=MALLOC | offline)


class Comparison:
    """One run: daajax's worker, which stays, and one of TRL's after the other.

    Args:
        given: The options.
        folder: For all that is written.
    """

    def __init__(self, given: argparse.Namespace, folder: pathlib.Path):
        self.given, self.folder = given, folder
        self.work = workloads.make(given.data, given.model, folder, tiny=given.tiny, shape=given.shape)
        self._daajax = start_daajax(given, self.work, folder)
        self._gate = GATES[DTYPES[given.device]]
        self._times: list[dict[str, float]] = []
        self._losses: list[float] = []
        self.versions: dict[str, str] = {}
        self.apart = 0.0  # the largest difference of two losses so far, nats

    def prepare(self) -> None:
        """Plans, writes the pairs in the plan's order, compiles, and scores the reference."""
        planned = self._daajax.answer()
        self.versions |= planned["versions"]
        self.layout, self.attention, self.device = planned["layout"], planned["attention"], planned["device"]
        self.epoch = planned["updates"] * self.given.batch_size
        self.left_out = len(self.work.rows) - planned["examples"]
        self.passed = len(planned["order"]) * self.given.batch_size
        rows = workloads.in_order(self.work.rows, planned["order"])
        self.pairs = workloads.write_rows(self.folder / "order.jsonl", rows)
        self.prepared = self._daajax.ask("prepare")
        stages = {"planned": planned, "compiled": self.prepared["compiled"], "reference": self.prepared["reference"]}
        self.peaks = {name: stage["peak"] for name, stage in stages.items()}

    def take_turns(self, name: str, variant: dict[str, Any]) -> Measured:
        """What TRL takes while it takes turns with daajax."""
        theirs = start_trl(self.given, self.work, self.pairs, variant)
        try:
            told = theirs.answer()
            times, losses = [], []
            for _ in range(self.given.rounds):
                times += self._said(f"TRL, {name}", theirs.update(self.given.updates), losses)
                self._times += self._said("daajax", self._daajax.update(self.given.updates), self._losses)
            self.apart = max(self.apart, check_losses(self._losses, losses, f"TRL, {name}", self._gate))
            peak = theirs.end()
        finally:
            theirs.kill()
        self.versions |= told["versions"]
        passes = told["reference"]
        passed = self.passed if passes else 0
        return Measured(times[1:], peak, {"ready": told["peak"]}, times[0]["wall"], passes and passes["wall"], passed)

    def _said(self, who: str, answer: dict[str, Any], losses: list[float]) -> list[dict[str, float]]:
        """The times of an answer, which go to stderr, as do the losses, which are kept."""
        losses += answer["losses"]
        for seconds, loss in zip(answer["times"], answer["losses"], strict=True):
            print(f"{who}: {seconds['wall']:.2f} s, {seconds['cpu']:.2f} cpu s, loss {loss:.6f}", file=sys.stderr)
        return answer["times"]

    def end(self) -> Measured:
        """Ends daajax's worker: what it took beside all of TRL's."""
        passes, times = self.prepared["reference"], self._times
        seconds = passes["wall"] - passes["compiling"]
        return Measured(times[1:], self._daajax.end(), self.peaks, times[0]["wall"], seconds, self.passed)

    def kill(self) -> None:
        """Ends it whatever it does."""
        self._daajax.kill()


# ---------------------------------------------------------------------- what is printed


def machine() -> str:
    """The processor's name and how many of its cores are used."""
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as lines:
        name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), name)
    return f"{name}, {len(os.sched_getaffinity(0))} of {os.cpu_count()} cores"


def table(ours: Measured, theirs: Mapping[str, Measured], *, epoch: int, batch_size: int) -> list[str]:
    """The result; behind each of TRL's numbers, how many times daajax's is better.

    Args:
        ours: daajax.
        theirs: TRL by its options.
        epoch: Pairs of an epoch.
        batch_size: Pairs of an update.
    """
    columns = {
        "s an update": (2, lambda side: side.median("wall")),
        "cpu s": (2, lambda side: side.median("cpu")),  # also of a GPU's host
        "pairs a second": (2, lambda side: batch_size / side.median("wall")),
        "s an epoch": (0, lambda side: side.epoch(epoch, batch_size)),
        "peak MiB": (0, lambda side: side.peak / 2**20),
    }
    lines = [f"| | {' | '.join(columns)} | fastest to slowest, s |", "|---" * (len(columns) + 2) + "|"]
    own = {name: number(ours) for name, (_, number) in columns.items()}
    for side, found in {"daajax": ours, **{f"TRL, {name}": side for name, side in theirs.items()}}.items():
        cells = []
        for name, (digits, number) in columns.items():
            value = number(found)
            ratio = own[name] / value if name == "pairs a second" else value / own[name]
            cells.append(f"{value:.{digits}f}" + ("" if found is ours else f" (**{ratio:.1f}×**)"))
        lines.append(f"| {side} | {' | '.join(cells)} | {found.extremes()} |")
    return lines


def variants_on(device: str) -> dict[str, dict[str, Any]]:
    """Those that serve there."""
    return VARIANTS | LIGER if device == "cuda" else VARIANTS


def divides(variant: Mapping[str, Any], batch_size: int) -> bool:
    """Whether an update can be made of the pairs that a variant pads together."""
    return batch_size % variant.get("at_once", 1) == 0


def compare(given: argparse.Namespace, folder: pathlib.Path) -> list[str]:
    """Runs it all; the lines of the result."""
    run, found, there = Comparison(given, folder), {}, variants_on(given.device)
    too_large: list[str] = []
    try:
        run.prepare()
        left_out = [] if given.variants else [name for name in there if not divides(there[name], given.batch_size)]
        for name in given.variants or there:
            if name not in left_out:
                try:
                    found[name] = run.take_turns(name, there[name])
                except DiedError as error:
                    if OUT_OF_MEMORY not in str(error):
                        raise
                    too_large.append(name)
        ours = run.end()
    except RefusedError as refused:
        raise UserError(str(refused)) from None
    finally:
        run.kill()
    versions = ", ".join(f"{name} {version}" for name, version in run.versions.items())
    where = machine() if given.device == "cpu" else f"{run.device}, {machine()}"
    measured = given.rounds * given.updates
    how = "all of it" if run.passed == run.epoch else f"from the medians, and the reference of {run.passed} pairs"
    compiling = [run.prepared["compiled"]["wall"], run.prepared["reference"]["compiling"]]
    return [
        f"# daajax and TRL: {run.work.name}",
        "",
        f"{time.strftime('%Y-%m-%d')}; {where}; Python {platform.python_version()}, {versions}.",
        f"`python -m benchmarks.against_trl {shlex.join(sys.argv[1:])}`",
        "",
        *table(ours, found, epoch=run.epoch, batch_size=given.batch_size),
        "",
        *([f"Not run, {given.batch_size} pairs do not divide: {'; '.join(left_out)}.", ""] if left_out else []),
        *([f"TRL ran out of the GPU's memory beside daajax: {'; '.join(too_large)}.", ""] if too_large else []),
        f"{DTYPES[given.device]}, {given.batch_size} pairs an update, max_length {given.max_length} ({run.left_out} of "
        f"{len(run.work.rows)} pairs are longer and left out). Medians of {measured - 1} updates, daajax's of all that "
        f"it did meanwhile. An epoch has {run.epoch} pairs and the scoring of the reference, {how}. Losses of the "
        f"first {GATE} updates agree to {run.apart:.1g}.",
        "",
        f"daajax: attention {run.attention}, remat {given.remat}, {run.layout[0]}; compiling took {compiling[0]:.1f} s "
        f"for the update and {compiling[1]:.1f} s for the reference pass, which are in no column; the first update "
        f"took {ours.first:.2f} s, TRL's {', '.join(f'{side.first:.2f}' for side in found.values())} s. Peak MiB "
        f"before the updates: daajax {', '.join(f'{name} {peak / 2**20:.0f}' for name, peak in ours.before.items())}; "
        f"TRL {', '.join(f'{peak / 2**20:.0f}' for side in found.values() for peak in side.before.values())}.",
    ]


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The options.

    Raises:
        UserError: If they do not fit together, or there is no TRL.
    """
    parser = argparse.ArgumentParser(prog="python -m benchmarks.against_trl")
    made = ", ".join([*workloads.MADE, *workloads.ASSETS])
    parser.add_argument("--device", choices=ENVIRONMENTS, default="cpu")
    parser.add_argument("--data", default="made", help=f"{made}, or a JSONL file")
    parser.add_argument("--model", help="model directory; not given: a random Llama is made")
    parser.add_argument("--shape", choices=SHAPES, help="of the Llama that is made; not given: 10M parameters")
    parser.add_argument("--tiny", action="store_true", help="make a smaller model and fewer pairs")
    for name, default in dict(batch_size=16, max_length=1024, updates=2, rounds=4).items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--learning_rate", type=float, help=f"{LEARNING_RATE:g}; with --tiny {TINY_LEARNING_RATE:g}")
    parser.add_argument("--beta", type=float, default=0.1)
    parser.add_argument("--remat", default="none", choices=REMAT, help="daajax's; TRL's defaults have checkpointing")
    parser.add_argument("--threads", type=int, help="processors for both; not given: all")
    parser.add_argument("--option", action="append", default=[], help="of daajax's run: packing.row_length=2048, …")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS | LIGER, help="of TRL's options; not given: all")
    parser.add_argument("--python", type=pathlib.Path, default=ROOT / ".venv-trl/bin/python", help="one that has TRL")
    parser.add_argument("--output", type=pathlib.Path, help="file for the result, beside the standard output")
    given = parser.parse_args(argv)
    if given.learning_rate is None:
        given.learning_rate = TINY_LEARNING_RATE if given.tiny else LEARNING_RATE
    for name, least in dict(batch_size=1, max_length=2, updates=1, rounds=1).items():
        if getattr(given, name) < least:
            raise UserError(f"--{name}={getattr(given, name)} must be at least {least}.")
    cores = len(os.sched_getaffinity(0))
    if given.threads is not None and not 1 <= given.threads <= cores:
        raise UserError(f"--threads={given.threads} must be from 1 to {cores}, the cores that there are.")
    if given.shape and given.model:
        raise UserError(
            f"--shape={given.shape} is of a model that is made, and --model={given.model} is given; drop one."
        )
    there = variants_on(given.device)
    if lacking := [name for name in given.variants or () if name not in there]:
        raise UserError(f"--variants {lacking[0]!r} needs --device=cuda.")
    if wrong := [name for name in given.variants or () if not divides(there[name], given.batch_size)]:
        raise UserError(
            f"--variants {wrong[0]!r} pads {there[wrong[0]]['at_once']} pairs together, which do not divide "
            f"--batch_size={given.batch_size}; take a multiple, or leave the variant out."
        )
    if given.rounds * given.updates < GATE:
        raise UserError(f"--rounds={given.rounds} × --updates={given.updates} must be at least {GATE}; raise one.")
    if not given.python.exists():
        raise UserError(f"there is no {given.python}; `make setup-trl` makes it.")
    return given


def main(argv: Sequence[str]) -> None:
    """Prints the result."""
    given = parse(argv[1:])
    if given.threads:
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: given.threads])
    with tempfile.TemporaryDirectory() as folder:
        lines = compare(given, pathlib.Path(folder))
    print("\n".join(lines))
    if given.output is not None:
        given.output.parent.mkdir(parents=True, exist_ok=True)
        given.output.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    command.end(main, str(__doc__))
