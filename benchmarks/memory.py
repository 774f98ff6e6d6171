"""Memory of one update of Llama 3.1 8B on chips that are not there, from XLA's own compilation for them.

    make memory                                             # the table
    make memory ARGS=--record                               # what tests hold the step to: benchmarks/results/peaks.json
    python -m benchmarks.memory --chips=v5e:2x2 --rank=16   # one line of it; see Makefile for what must be set

An update of DPO with the reference cached, float32 AdamW, computing in bfloat16; rows hold four pairs each, prompts a
quarter and responses three eighths of a pair. With `--rank`, adapters of all projections are trained over a frozen
base, else everything. Nothing is timed: without the chips there is no tuning of kernels.
"""

import argparse
import ast
import functools
import json
import pathlib
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from configs import base
from daajax.config import Config, losses, resolve
from daajax.data.tokens import TokenizedData
from daajax.losses.terms import bind
from daajax.models.families import architecture_of
from daajax.planning import assumed, layouts, topologies
from daajax.planning.shapes import SHAPES

LLAMA = SHAPES["llama-3.1-8b"]
MODELS = {"8b": LLAMA, "1b": SHAPES["llama-3.2-1b"]}

TABLE = (  # chips, rank, quantization, remat, rows a chip
    ("v5e:2x2", 16, None, "full", 1),
    ("v5e:2x2", 16, None, "full", 2),
    ("v5e:2x2", 16, None, "full", 4),
    ("v5e:2x2", 16, None, "dots", 1),
    ("v5e:2x2", 16, "nf4", "full", 2),
    ("h200:1", 16, None, "full", 2),
    ("h200:1", 16, None, "dots", 2),
    ("h200:1", 16, None, "none", 2),
    ("h200:1", 16, "int8", "none", 2),
    ("h200:1", 16, "nf4", "none", 2),
    ("h200:8", 0, None, "full", 2),
    ("h200:8", 0, None, "save_attention", 2),
    ("h200:8", 0, None, "save_except_mlp", 2),
    ("h200:8", 0, None, "dots", 2),
    ("h200:8", 0, None, "none", 2),
)


PEAKS = pathlib.Path(__file__).parent / "results" / "peaks.json"
RECORDED: dict[str, dict[str, Any]] = {  # programs whose peak is held: arguments of `measure`
    "1b, all, remat none, on h200:8": dict(chips="h200:8", model="1b", rank=0, remat="none", rows=2),
    "8b, all, remat none, on h200:8": dict(chips="h200:8", model="8b", rank=0, remat="none", rows=2),
    "8b, rank 16, remat full, on v5e:2x2": dict(chips="v5e:2x2", model="8b", rank=16, remat="full", rows=2),
}


def make_data(pairs: int, length: int) -> TokenizedData:
    """Pairs of `length` tokens each."""
    response = 3 * length // 8
    return assumed.make_data((length - 2 * response, response, response), pairs)


def set_options(config: Config, options: Sequence[str]) -> None:
    """Sets options of a run, each as `optimizer.offload=True`; text is written as it is."""
    for option in options:
        name, _, value = option.partition("=")
        *groups, last = name.split(".")
        is_text = functools.reduce(lambda group, key: group[key], groups, config).get_type(last) is str
        config.update_from_flattened_dict({name: value if is_text else ast.literal_eval(value)})


def lower(
    chips: str,
    *,
    rank: int,
    quantization: str | None,
    remat: str,
    rows: int,
    length: int,
    options: Sequence[str] = (),
    model: str = "8b",
    attention: str = "auto",
) -> tuple[jax.stages.Lowered, Any]:
    """The update for these chips, parameters cut up over all of them, and what to compile it with.

    `options` are those of a run that differ besides, `optimizer.offload=True`.
    """
    topology = topologies.describe(chips)
    config = base.get_config()
    config.model.path, config.data.path = "Llama-3.1-8B", "pairs"
    config.lora.rank, config.lora.quantization, config.remat, config.steps = rank, quantization, remat, 1
    config.attention = attention
    config.max_length, config.batch_size = length // 4, 4 * rows * len(topology.devices)
    config.packing.row_length = str(length)
    set_options(config, options)
    config = resolve(config)
    terms, architecture = bind(losses(config)), architecture_of(MODELS[model])
    data = make_data(config.batch_size, length // 4)
    layout = layouts.make_layout(layouts.Subject(architecture, terms, data, topology, model), config)
    return layout.lower_update(), dict(topology.compiler_options)


def peak(numbers: Mapping[str, Any]) -> int:
    """Bytes a chip, of what `measure` found."""
    return numbers["arguments"] + numbers["temporaries"] + numbers["outputs"]


def record() -> None:
    """Measures what is recorded anew."""
    rest = dict(quantization=None, length=4096)
    found = {name: peak(measure(None, **{**shape, **rest})) for name, shape in RECORDED.items()}
    PEAKS.write_text(json.dumps(found, indent=2) + "\n")
    print(PEAKS.read_text())


def measure(folder: pathlib.Path | None, chips: str, **shape: Any) -> dict[str, Any]:
    """Bytes a chip, and seconds of compilation; with a folder, these and the program's texts are written to it."""
    lowered, options = lower(chips, **shape)
    began = time.perf_counter()
    compiled = lowered.compile(compiler_options=options)
    found: Any = compiled.memory_analysis()
    numbers = dict(
        arguments=found.argument_size_in_bytes,
        on_hosts=found.host_argument_size_in_bytes,
        temporaries=found.temp_size_in_bytes,
        outputs=found.output_size_in_bytes - found.alias_size_in_bytes,  # those that take no argument's place
        seconds=time.perf_counter() - began,
    )
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "numbers.json").write_text(json.dumps(numbers))
        (folder / "lowered.txt").write_text(lowered.as_text() or "")
        (folder / "compiled.txt").write_text(compiled.as_text() or "")
    return numbers


def main() -> None:
    """Prints the table, or one line of it."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--chips", help="one line of the table: v5e:2x2, h200:8, …")
    parser.add_argument("--rank", type=int, default=0, help="of adapters; 0: everything is trained")
    parser.add_argument("--quantization", help="of the base under adapters: int8, nf4; not given: bfloat16")
    parser.add_argument("--model", choices=MODELS, default="8b")
    parser.add_argument("--attention", default="auto", help="auto: the one for these chips")
    parser.add_argument("--remat", default="full")
    parser.add_argument("--rows", type=int, default=1, help="rows a chip")
    parser.add_argument("--length", type=int, default=4096, help="tokens a row")
    parser.add_argument("--option", action="append", default=[], help="of a run: optimizer.offload=True, …")
    parser.add_argument("--output", type=pathlib.Path, help="folder for numbers.json, lowered.txt, compiled.txt")
    parser.add_argument("--record", action="store_true", help="write benchmarks/results/peaks.json")
    given = parser.parse_args()
    if given.record:
        record()
        return
    asked = (given.chips, given.rank, given.quantization, given.remat, given.rows)
    today, what = time.strftime("%Y-%m-%d"), f"{given.model}, rows of {given.length} tokens"
    print(f"{today}, jax {jax.__version__}, {what}, GiB a chip\n")
    print("| chips | trained | base | remat | rows a chip | arguments | temporaries | together | compiled in s |")
    print("|---|---|---|---|---|---|---|---|---|")
    for chips, rank, quantization, remat, rows in [asked] if given.chips else TABLE:
        shape: dict[str, Any] = dict(
            rank=rank, quantization=quantization, remat=remat, rows=rows, length=given.length, options=given.option
        )
        shape |= dict(model=given.model, attention=given.attention)
        frozen = quantization or "bfloat16"
        cells = [chips, f"rank {rank}" if rank else "all", frozen if rank else "", remat, str(rows)]
        try:
            found = measure(given.output, chips, **shape)
        except jax.errors.JaxRuntimeError as error:
            if given.chips or "RESOURCE_EXHAUSTED" not in str(error):
                raise
            cells += ["", "", "does not fit", ""]
        else:
            sizes = [found["arguments"], found["temporaries"] + found["outputs"]]
            cells += [*(f"{size / 2**30:.2f}" for size in [*sizes, sum(sizes)]), f"{found['seconds']:.0f}"]
        print("|", " | ".join(cells), "|", flush=True)


if __name__ == "__main__":
    main()
