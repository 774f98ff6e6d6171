"""Several runs one after another in the same processes: `python -m tests.trainings SHARD_BYTES LINES.json`.

Joining and compiling are what a job of small runs costs. The file holds a list of command lines of `daajax.train`.
"""

import json
import pathlib
import sys

from daajax import command, processes
from daajax.models import weights
from daajax.train import train


def main(arguments: list[str]) -> None:
    """Trains by every line."""
    weights._SHARD_BYTES = weights._BUCKET_SHARD_BYTES = int(arguments[1])
    for line in json.loads(pathlib.Path(arguments[2]).read_text()):
        train(*command.parse(["train", *line], "train"))
    sys.stdout.write(f"process {processes.jax.process_index()} is done\n")


if __name__ == "__main__":
    command.end(main, str(__doc__), joins=True, stops=True)
    sys.exit(1)
