"""How full rows are over an epoch, by pairs a row; and what planning and filling them takes.

    python -m benchmarks.packing [--examples=6000] [--rows=8]
    python -m benchmarks.packing --data=pairs.jsonl.gz [--tokenizer=DIR] [--max_length=1024] [--rows=8]

Without `--data` lengths are made up, the same on every machine; without `--tokenizer` a byte-pair tokenizer of 16,384
tokens is trained on the data. For one static shape over the whole epoch, empty rows counted, real shares of the four
capacities of a row (tokens, slots, scored tokens, gathered keys); besides

- best: the share of tokens if rows were filled perfectly, into lengths that are multiples of 128 and hold the longest
  example;
- visited: scored tokens of the scored slots that the head visits; it skips those behind the fullest row's last;
- padded: what the same batches would be if every response were padded to the longest of its batch;
- plan: sizes, windows and rows, in seconds of this machine and of its processor, and MiB at most beside the data;
- fill: the arrays of one update, milliseconds of the processor.
"""

import argparse
import datetime
import os
import pathlib
import platform
import tempfile
import time
import tracemalloc

import numpy as np

from benchmarks import workloads
from benchmarks.preferences import MIXES, make_data
from daajax.data.batches import Batches
from daajax.data.packing import LENGTH_MULTIPLE, pack
from daajax.data.sizes import Sizes
from daajax.data.sources import open_source
from daajax.data.token_cache import tokenized
from daajax.data.tokens import TokenizedData
from daajax.data.windows import training_windows

PAIRS = (4, 8, 16)
FILLED = 5  # updates that are filled, if there are as many


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--examples", type=int, default=6000)
    parser.add_argument("--data")
    parser.add_argument("--tokenizer")
    parser.add_argument("--max_length", type=int, default=1024)
    parser.add_argument("--rows", type=int, default=8)
    arguments = parser.parse_args()
    print(
        f"{datetime.date.today()}, {os.cpu_count()} cores of {platform.machine()}, Python {platform.python_version()}, "
        f"NumPy {np.__version__}, rows: {arguments.rows}\n"
    )
    print(
        "| lengths | pairs | pairs a row | row | tokens % | best % | slots % | scored % | keys % | visited % "
        "| padded % | plan s | plan CPU s | plan MiB | fill ms |\n|" + "---|" * 15
    )
    if arguments.data is None:
        for mix in MIXES:
            report(mix, make_data(mix, examples=arguments.examples, seed=0), arguments.rows)
    else:
        data = read(arguments.data, arguments.tokenizer, arguments.max_length)
        name = f"{pathlib.Path(arguments.data).name.split('.')[0]}, at most {arguments.max_length}"
        report(name, data, arguments.rows)


def read(path: str, tokenizer: str | None, max_length: int) -> TokenizedData:
    """The data, tokenized by the tokenizer of a folder or by one trained on them."""
    with tempfile.TemporaryDirectory() as scratch:
        return tokenized("jsonl", path, tokenizer or train_tokenizer(path, scratch), max_length=max_length)


def train_tokenizer(path: str, folder: str) -> str:
    """Trains a byte-pair tokenizer on all texts of the data and saves it in a folder, which is returned."""
    texts = [
        text
        for example in open_source("jsonl", path).read().examples
        for text in (example.prompt, *example.responses)
        if isinstance(text, str)
    ]
    workloads.make_tokenizer(pathlib.Path(folder), texts, workloads.ARCHITECTURE["vocab_size"])
    return folder


def report(name: str, data: TokenizedData, rows: int) -> None:
    """Prints the lines of one data set."""
    examples = len(data.weights)
    for pairs in PAIRS:
        batch_size = pairs * rows
        tracemalloc.start()
        began, worked = time.perf_counter(), time.process_time()
        sizes = Sizes.of(data, prefix_sharing=True)
        windows = training_windows(sizes, batch_size=batch_size, updates=examples // batch_size, shuffle=True, seed=0)
        plan = pack(windows, sizes, packing=True, micro_batches=1, row_multiple=rows)
        seconds, processor = time.perf_counter() - began, time.process_time() - worked
        peak = tracemalloc.get_traced_memory()[1] / 2**20
        tracemalloc.stop()
        np.testing.assert_array_equal(np.sort(windows.ravel()), np.unique(windows))  # each example once
        totals = sizes.length[windows].sum(axis=1)
        needed = max(totals.max() / rows, sizes.length[windows].max())
        best = totals.mean() / rows / (np.ceil(needed / LENGTH_MULTIPLE) * LENGTH_MULTIPLE)
        whole = data.lengths[:, :1] + data.lengths[:, 1:]  # prompt and response
        padded = sizes.tokens[windows].sum() / (whole[windows].max(axis=(1, 2)) * 2 * batch_size).sum()
        batches, worked = Batches(data, plan), time.process_time()
        filled = min(FILLED, plan.updates)
        for update in range(filled):
            batches.fill(update)
        fill = 1000 * (time.process_time() - worked) / filled
        real = plan.efficiency
        shares = [real["length"], best, *(real[part] for part in ("slots", "scored", "keys", "scored visited")), padded]
        numbers = " | ".join(f"{100 * share:.1f}" for share in shares)
        print(
            f"| {name} | {examples:,} | {pairs} | {plan.shapes[0].length} | {numbers} | {seconds:.2f} | "
            f"{processor:.2f} | {peak:,.0f} | {fill:.1f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
