"""Aligns a small model on two CPU cores in three minutes, and shows what came of it: `make demo`, or `python -m demo`.

Every stage but the first is a command that you could type yourself, and is printed before it runs; the recipes are
those of configs/. All of it lies in runs/demo, which begins empty every time. Exit code 0 says that alignment worked
(`Results.shortcomings`); the exit code of a command that fails is passed on.
"""

import contextlib
import pathlib
import shutil
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator

from daajax.console import say
from demo import world
from demo.results import Estimate, Results
from demo.world import read_rows, write_rows

FOLDER = pathlib.Path("runs/demo")
STAGES = 7
SHOWN = 3  # samples before and after
# What a small model on a CPU asks for, beside the recipes.
SMALL = "--config.model.dtype=float32 --config.remat=none --config.max_length=96 --config.batch_size=32"


def main() -> int:
    """Runs the stages and prints what came of them; returns the exit code."""
    if FOLDER.exists():
        shutil.rmtree(FOLDER)  # what is left of another demo would be taken for this one's
    seconds: dict[str, float] = {}

    with stage("world", "film reviews with a known reward, a tokenizer, a model without weights", seconds):
        world.make(FOLDER / "world")
        held_out = {row["prompt"] for row in read_rows(FOLDER / "world/held_out.jsonl")}
        say(f"{FOLDER}/world holds them; {len(held_out)} prompts are held out: nothing is trained on them")

    with stage("language", "the model learns to write reviews, by supervised fine-tuning", seconds):
        run(f"""python -m daajax.train --config=configs/sft_llama.py --workdir={FOLDER}/sft
            --config.model.path={FOLDER}/world/model --config.model.random_init=True
            --config.data.path={FOLDER}/world/reviews.jsonl {SMALL}
            --config.optimizer.learning_rate=2e-3 --config.optimizer.warmup_steps=10 --config.log.every=20""")

    with stage("preferences", "it writes four reviews to each prompt, and the reward ranks them", seconds):
        run(f"""python -m daajax.generate --model={FOLDER}/sft/model --prompts={FOLDER}/world/prompts.jsonl
            --samples=4 --max_tokens=64 --batch_size=256 --output={FOLDER}/samples.jsonl""")
        samples = read_rows(FOLDER / "samples.jsonl")
        pairs = world.preferences(samples)
        write_rows(FOLDER / "pairs.jsonl", [pair for pair in pairs if pair["prompt"] not in held_out])
        write_rows(FOLDER / "held_out_pairs.jsonl", [pair for pair in pairs if pair["prompt"] in held_out])

    with stage("alignment", "it learns what is preferred, by direct preference optimization (DPO)", seconds):
        run(f"""python -m daajax.train --config=configs/dpo_llama.py --workdir={FOLDER}/dpo
            --config.model.path={FOLDER}/sft/model --config.data.path={FOLDER}/pairs.jsonl {SMALL}
            --config.epochs=2.0 --config.optimizer.learning_rate=2e-4 --config.optimizer.warmup_steps=10""")

    with stage("accuracy", "which of two reviews does it prefer, to prompts that nothing was trained on?", seconds):
        run(f"""python -m daajax.evaluate --workdir={FOLDER}/dpo
            --config.eval_data.path={FOLDER}/held_out_pairs.jsonl""")

    with stage("samples", "what does it write to those prompts now?", seconds):
        run(f"""python -m daajax.generate --model={FOLDER}/dpo/model --prompts={FOLDER}/world/held_out.jsonl
            --max_tokens=64 --batch_size=256 --seed=1 --output={FOLDER}/after.jsonl""")
        before = [row for row in samples if row["prompt"] in held_out and row["sample"] == 0]
        after = read_rows(FOLDER / "after.jsonl")

    with stage("divergence", "how much likelier has it made what it writes?", seconds):
        write_rows(FOLDER / "ended.jsonl", world.ended(after))
        run(f"""python -m daajax.evaluate --workdir={FOLDER}/dpo
            --config.eval_data.path={FOLDER}/ended.jsonl --output={FOLDER}/log_ratios.jsonl""")

    results = Results(
        accuracy=read_rows(FOLDER / "dpo/evaluations.jsonl")[0]["eval/rewards/accuracies"],
        before=Estimate.of(world.reward(row["response"]) for row in before),
        after=Estimate.of(world.reward(row["response"]) for row in after),
        divergence=Estimate.of(row["log_ratios"][0] for row in read_rows(FOLDER / "log_ratios.jsonl")),
        ended=len(read_rows(FOLDER / "ended.jsonl")),
    )
    return show(results, seconds, before, after)


def show(results: Results, seconds: dict[str, float], before: list[world.Row], after: list[world.Row]) -> int:
    """Prints results and samples; returns the exit code, 1 if alignment fell short."""
    say("\n".join(["", *results.table(seconds)]))
    for old, new in list(zip(before, after, strict=True))[:SHOWN]:
        say(f"\n{old['prompt']}")
        for name, text in (("before", old["response"]), ("after", new["response"])):
            head = f"  {name:<7} {world.reward(text):+5.1f}  "
            say(textwrap.fill(text.strip(), 110, initial_indent=head, subsequent_indent=" " * len(head)))
    missed = results.shortcomings()
    if missed:
        say(f"\nAlignment fell short: {'; '.join(missed)}.")
        return 1
    say(f"""
The aligned model is in {FOLDER}/dpo/model. Let it go on with a beginning of yours:

    python -m daajax.generate --model={FOLDER}/dpo/model \\
        --prompt="{after[0]["prompt"]}"

Your own pairs and model come next: the README, "From nothing to a trained model".""")
    return 0


@contextlib.contextmanager
def stage(name: str, what: str, seconds: dict[str, float]) -> Iterator[None]:
    """Announces a stage, and notes how long it took."""
    say(f"\n=== {len(seconds) + 1} of {STAGES} · {name}: {what}")
    began = time.perf_counter()
    yield
    seconds[name] = time.perf_counter() - began


def run(command: str) -> None:
    """Prints a command and runs it; if it fails, the demo ends with its exit code."""
    words = command.split()
    lines = textwrap.wrap(" ".join(words), 110, break_long_words=False, break_on_hyphens=False)
    say("\n$ " + " \\\n    ".join(lines) + "\n")
    code = subprocess.run([sys.executable, *words[1:]], check=False).returncode
    if code:
        say(f"the demo stops here: the command above ended with exit code {code}")
        sys.exit(code if code > 0 else 128 - code)  # a negative one is a signal, as a shell spells it


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
