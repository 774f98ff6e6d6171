"""Plans of published models on machines that are not there: the README's table, from real compilations.

    python -m benchmarks.plans                     # compiles what the cache lacks: half an hour on two cores
    python -m benchmarks.plans --only=h200         # lines whose command has this text, the others as they are recorded

Every line is a command, `python -m daajax.plan …`, which is recorded with what came of it in
benchmarks/results/plans.json. Pairs of 1,024 tokens: a prompt of 256, responses of 384; `LONG` is one whose responses
end at token 131,072 each. Nothing is timed.
"""

import argparse
import json
import pathlib
import subprocess
import sys
import tempfile
from typing import Any

RESULTS = pathlib.Path(__file__).parent / "results" / "plans.json"
COMMON = ["--config=configs/dpo_llama.py", "--lengths=256,384,384"]
LORA = ["--config.lora.rank=16"]
LONG = ["--lengths=98304,32768,32768", "--config.max_length=131072"]


def options(
    batch_size: int, *, remat: str = "full", fsdp: int = -1, tensor: int = 1, context: int = 1, micro_batches: int = 1
) -> list[str]:
    """Options of a line that differ."""
    mesh = [f"--config.mesh.fsdp={fsdp}"] if max(tensor, context) > 1 else []
    mesh += [f"--config.mesh.tensor={tensor}"] if tensor > 1 else []
    mesh += [f"--config.mesh.context={context}"] if context > 1 else []
    parts = [f"--config.micro_batches={micro_batches}"] if micro_batches > 1 else []
    return [f"--config.batch_size={batch_size}", f"--config.remat={remat}", *mesh, *parts]


LINES = [
    ["--model=llama-3.1-8b", "--topology=v5e:4x4", *options(32)],
    ["--model=llama-3.1-8b", "--topology=v5e:4x4", *options(16, fsdp=8, tensor=2)],
    ["--model=llama-3.1-8b", "--topology=v5e:4x4", *options(64)],
    ["--model=llama-3.1-8b", "--topology=v6e:4x4", *options(64, remat="none")],
    ["--model=llama-3.1-8b", "--topology=h200:8", *options(64, remat="none")],
    ["--model=llama-3.1-8b", "--topology=h200:8", *options(1, fsdp=1, context=8), *LONG],
    ["--model=llama-3.1-70b", "--topology=h200:8x8", *options(256, remat="none")],
    ["--model=llama-3.1-70b", "--topology=v5p:4x4x4", *options(64, fsdp=16, tensor=4)],
    ["--model=llama-3.1-70b", "--topology=v6e:16x16", *options(256, fsdp=64, tensor=4)],
    ["--model=llama-3.1-405b", "--topology=v5p:8x8x16", *options(1024, fsdp=256, tensor=4)],
    ["--model=llama-3.1-8b", "--topology=h200:1", *LORA, *options(32, remat="none", micro_batches=4)],
    ["--model=llama-3.1-8b", "--topology=v5e:2x2", *LORA, *options(16)],
]


def run(line: list[str]) -> dict[str, Any]:
    """What a line's plan says."""
    with tempfile.TemporaryDirectory() as folder:
        file = pathlib.Path(folder, "plan.json")
        command = [sys.executable, "-m", "daajax.plan", *COMMON, *line, f"--output={file}"]
        subprocess.run(command, check=True, stdout=sys.stderr)
        return json.loads(file.read_text(encoding="utf-8"))


def table(recorded: dict[str, dict[str, Any]]) -> str:
    """The lines as a table of Markdown."""
    found = [
        "| model | machines | mesh | remat | rows a device | held | gradients | activations | peak | of | at least |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for line in LINES:
        if (values := recorded.get(" ".join(line))) is not None:
            found.append(f"| {' | '.join(cells(values))} |")
    return "\n".join(found)


def cells(values: dict[str, Any]) -> list[str]:
    """The cells of a line."""
    kinds, times, mesh = values["bytes"], values["seconds_at_least"], values["mesh"]
    held = sum(kinds.get(name, 0) for name in ("parameters", "optimizer", "frozen", "reference", "batch"))
    limit = max(times, key=times.__getitem__)
    model = values["model"] + (f", LoRA {values['lora_rank']}" if values["lora_rank"] else "")
    cut = f" / {mesh['context']}" if mesh.get("context", 1) > 1 else ""
    rows = f"{values['micro_batches'] * values['rows']} × {values['row_length']:,}{cut}"
    peak = f"{values['peak'] / 2**30:.1f}" if values["fits"] else "does not fit"
    return [
        model,
        values["topology"],
        " × ".join(str(mesh.get(axis, 1)) for axis in ("data", "fsdp", "tensor", "context")),  # older lines have three
        values["remat"],
        rows,
        f"{held / 2**30:.1f}",
        f"{kinds['gradients'] / 2**30:.1f}",
        f"{kinds['activations'] / 2**30:.1f}",
        peak,
        f"{values['memory'] / 2**30:.2f}",
        f"{times[limit]:.2f} s, {limit}",
    ]


def main() -> None:
    """Runs the lines and prints the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", help="lines whose command has this text; the others as they are recorded")
    given = parser.parse_args()
    recorded = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() else {}
    for line in LINES:
        if given.only is None or given.only in " ".join(line):
            recorded[" ".join(line)] = run(line)
            ordered = {name: recorded[name] for name in map(" ".join, LINES) if name in recorded}
            RESULTS.write_text(json.dumps(ordered, indent=1) + "\n", encoding="utf-8")
    print(table(recorded))


if __name__ == "__main__":
    main()
