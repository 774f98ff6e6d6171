"""A trial of a machine or a job: `python -m demo.smoke [--workdir=DIR] [--config.key=value …]`; launchers have --smoke.

3 updates of a tiny random model on every device that the processes have, by `python -m daajax.train`. The first loss of
DPO is ln 2 whatever the model, if every device computes what it should. Each process makes model, tokenizer and pairs
for itself, alike. A trial that was interrupted begins again in its folder. Exit code 0 says that it worked; the
trainer's own code is passed on.
"""

import json
import math
import os
import pathlib
import random
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence

from daajax import bucket, folder, output
from daajax.console import say
from daajax.errors import UserError
from demo import world

BATCH, UPDATES = 64, 3
TOLERANCE = 0.01  # nats of the first loss: the model computes in bfloat16
# Cut up over up to 256 devices; heads as large as every attention kernel takes them.
SHAPE = dict(hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2)
# Who of several processes this is, by who started it; the first that is set holds.
NUMBERS = ("DAAJAX_PROCESS_ID", "JOB_COMPLETION_INDEX", "SLURM_PROCID", "DAAJAX_HOST")
CONFIG = pathlib.Path(__file__).resolve().parents[1] / "configs/dpo_llama.py"


def main(arguments: Sequence[str]) -> int:
    """Makes what is trained on, trains, and looks at the first loss; returns the exit code."""
    given = [word.removeprefix("--workdir=") for word in arguments if word.startswith("--workdir=")]
    others = [word for word in arguments if not word.startswith("--workdir=")]
    if strange := [word for word in others if not word.startswith("--config.")]:
        say(f"error: {strange[0]!r} is not understood; there are --workdir=DIR and --config.key=value.")
        return 1
    if "DAAJAX_NUM_PROCESSES" in os.environ and not given:
        say("error: several processes need one folder for the run: --workdir=DIR, on a disk that they share.")
        return 1
    with tempfile.TemporaryDirectory(prefix="daajax-smoke-") as folder:
        home = pathlib.Path(folder)
        is_first = next((os.environ[name] for name in NUMBERS if name in os.environ), "0") == "0"
        try:
            workdir = bucket.path_of(given[0], "--workdir").absolute() if given else home / "run"
            if is_first:
                clear(workdir)
        except UserError as error:
            say(f"error: {error}")
            return 1
        make(home)
        # Paths in a folder of its own, so that the line is the same in every process.
        line = f"""-m daajax.train --config={CONFIG} --workdir={workdir} --config.model.path=model
            --config.model.random_init=True --config.data.path=pairs.jsonl --config.data.cache_dir=tokens
            --config.reference.cache_dir={workdir}/reference --config.max_length=128 --config.batch_size={BATCH}
            --config.steps={UPDATES} --config.epochs=None --config.remat=none --config.log.every=1"""
        environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(CONFIG.parents[1]), *sys.path[1:]])}
        trainer = subprocess.Popen([sys.executable, *line.split(), *others], cwd=home, env=environment)
        signal.signal(signal.SIGTERM, lambda number, _: trainer.send_signal(number))
        if code := trainer.wait():
            return code if code > 0 else 128 - code  # a negative one is a signal, as a shell spells it
        if not is_first:
            return 0
        metrics = workdir / "metrics.jsonl"
        rows = map(json.loads, metrics.read_text(encoding="utf-8").splitlines()) if metrics.exists() else []
    return judge([row["loss"] for row in rows])


def clear(workdir: bucket.Path) -> None:
    """Removes what a trial that was interrupted left in a folder, so that this one begins afresh.

    Raises:
        UserError: If there is anything else, or another trial is at work there.
    """
    if not workdir.exists():
        return
    with folder.locked(workdir):
        left = [path for path in workdir.iterdir() if path.name != folder.LOCK]
        if not {path.name for path in left} <= {"reference"}:  # which comes before the run begins to be one
            config = folder.read_config(workdir)
            is_trial = (config["model"].get("path"), config.get("data", {}).get("path")) == ("model", "pairs.jsonl")
            if not is_trial or (workdir / "finished").exists():
                raise UserError(f"--workdir={workdir} holds a run already; name a folder that is not there yet.")
        if left:
            say(f"smoke: {workdir} holds a trial that was interrupted: it begins again")
        for path in left:
            output.remove_folder(path) if path.is_dir() else path.unlink()


def judge(losses: Sequence[float]) -> int:
    """Says what the losses of the updates show; returns the exit code."""
    if len(losses) == UPDATES and abs(losses[0] - math.log(2)) <= TOLERANCE:
        found = f"the first loss is {losses[0]:.6f}, ln 2 is {math.log(2):.6f}, {UPDATES} updates were made"
        say(f"smoke: {found}: it works")
        return 0
    say(f"smoke: the losses are {losses}, where {UPDATES} were to come and the first to be ln 2, {math.log(2):.6f}")
    return 1


def make(folder: pathlib.Path) -> None:
    """Writes pairs.jsonl, and model/, a model directory without weights: the same in every process."""
    draw = random.Random(0)
    rows = []
    for _ in range(BATCH * UPDATES):
        chosen, rejected = (world.write("response", mood, draw) for mood in ("happy", "angry"))
        rows.append({"prompt": world.write("prompt", "mixed", draw), "chosen": chosen, "rejected": rejected})
    world.write_rows(folder / "pairs.jsonl", rows)
    world.make_model(folder / "model", (" ".join(row.values()) for row in rows), **SHAPE)


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(130)
