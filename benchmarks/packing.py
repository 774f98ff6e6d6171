"""How full rows are over an epoch, by pairs a row; and how long planning takes.

    python -m benchmarks.packing [--examples=6000] [--rows=8]

Real shares of the four capacities of a row (tokens, slots, scored tokens, gathered keys), empty rows counted, for one
static shape over the whole epoch. `padded` is what the same batches would be if every response were padded to the
longest of its batch.
"""

import argparse
import time

import numpy as np

from benchmarks.preferences import MIXES, make_data
from daajax.data.packing import pack
from daajax.data.sizes import Sizes
from daajax.data.windows import training_windows


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--examples", type=int, default=6000)
    parser.add_argument("--rows", type=int, default=8)
    arguments = parser.parse_args()
    print("| lengths | pairs a row | tokens % | slots % | scored % | keys % | scored visited % | padded % | plan s |")
    print("|---|---|---|---|---|---|---|---|---|")
    for mix in MIXES:
        data = make_data(mix, examples=arguments.examples, seed=0)
        sizes = Sizes.of(data, prefix_sharing=True)
        for pairs in (4, 8, 16):
            batch_size = pairs * arguments.rows
            began = time.perf_counter()
            windows = training_windows(
                sizes,
                batch_size=batch_size,
                updates=arguments.examples // batch_size,
                shuffle=True,
                seed=0,
            )
            plan = pack(windows, sizes, packing=True, micro_batches=1, row_multiple=arguments.rows)
            seconds = time.perf_counter() - began
            whole = data.lengths[:, :1] + data.lengths[:, 1:]  # prompt and response
            padded = sizes.tokens[windows].sum() / (whole[windows].max(axis=(1, 2)) * 2 * batch_size).sum()
            shares = [plan.efficiency[name] for name in ("length", "slots", "scored", "keys", "scored visited")]
            numbers = " | ".join(f"{100 * share:.1f}" for share in [*shares, padded])
            print(f"| {mix} | {pairs} | {numbers} | {seconds:.2f} |")
    np.testing.assert_array_equal(np.sort(windows.ravel()), np.unique(windows))  # each example once


if __name__ == "__main__":
    main()
