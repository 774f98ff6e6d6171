"""Memory of the hosts while the processes of a job read a model: each reads its own slices, and never a whole one.

    python -m benchmarks.loading [--gigabytes=8] [--processes=2] [--files=4]

Writes a random Llama of that size in float32 to a temporary folder, starts that many processes of one CPU device, cuts
the model up over them as training does (`mesh.fsdp=-1`), and prints what each held at most: `own` is memory that is its
own, on a CPU that of its parameters as well; `mapped` are pages of the files, which the system takes back as it likes.
"""

import argparse
import json
import os
import pathlib
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import safetensors.numpy

from benchmarks import workloads

ROOT = pathlib.Path(__file__).resolve().parents[1]
GIB = 2**30
CONFIG = workloads.ARCHITECTURE | {
    "vocab_size": 32000,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_attention_heads": 16,
}


def write_model(folder: pathlib.Path, size: float, files: int, config: Mapping[str, Any] = CONFIG) -> int:
    """A model directory without a tokenizer, of about so many bytes in so many files; returns how many it is."""
    hidden, mlp, vocab = (config[name] for name in ("hidden_size", "intermediate_size", "vocab_size"))
    kv = hidden // config["num_attention_heads"] * config["num_key_value_heads"]
    matrices = {f"self_attn.{name}_proj": (hidden, hidden) for name in "qo"}
    matrices |= {f"self_attn.{name}_proj": (kv, hidden) for name in "kv"}
    matrices |= dict.fromkeys(("mlp.gate_proj", "mlp.up_proj"), (mlp, hidden)) | {"mlp.down_proj": (hidden, mlp)}
    vectors = {"input_layernorm": (hidden,), "post_attention_layernorm": (hidden,)}
    layer = {f"{name}.weight": shape for name, shape in (matrices | vectors).items()}
    bytes_of_layer = 4 * sum(int(np.prod(shape)) for shape in layer.values())
    layers = max(round((size - 4 * vocab * hidden) / bytes_of_layer), files)
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, hidden), "model.norm.weight": (hidden,)}
    shapes |= {f"model.layers.{at}.{name}": shape for at in range(layers) for name, shape in layer.items()}
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": layers}))
    random, index = np.random.default_rng(0), {}
    for number, names in enumerate(np.array_split(sorted(shapes), files)):
        file = f"model-{number + 1:05d}-of-{files:05d}.safetensors"
        tensors = {str(name): random.standard_normal(shapes[name], np.float32) for name in names}
        safetensors.numpy.save_file(tensors, folder / file)
        index |= dict.fromkeys(tensors, file)
    text = json.dumps({"metadata": {}, "weight_map": index})
    (folder / "model.safetensors.index.json").write_text(text)
    return 4 * sum(int(np.prod(shape)) for shape in shapes.values())


class Peak:
    """The most memory that this process has held since, in bytes, looked at every few milliseconds."""

    def __init__(self) -> None:
        self.own = self.mapped = 0
        self.before = self._now()[0]
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while True:
            own, mapped = self._now()
            self.own, self.mapped = max(self.own, own), max(self.mapped, mapped)
            time.sleep(0.005)

    @staticmethod
    def _now() -> tuple[int, int]:
        status = dict(line.split(":", 1) for line in pathlib.Path("/proc/self/status").read_text().splitlines())
        own, mapped = (int(status[name].split()[0]) * 1024 for name in ("RssAnon", "RssFile"))
        return own, mapped


def load(model: str) -> None:
    """What each process does: reads its part, says what it held."""
    from configs import base
    from daajax import policy, processes, sharding
    from daajax.config import resolve
    from daajax.models.families import read_architecture

    processes.join(stops=False)
    config = base.get_config().unlock()
    config.model.path, config.data.path, config.steps = model, "pairs.jsonl", 1
    config = resolve(config)
    mesh = sharding.make_mesh(config.mesh.to_dict())
    scorer = policy.make_scorer(config, read_architecture(model), mesh)
    peak = Peak()
    params = policy.load_params(model, scorer, mesh)
    time.sleep(0.05)
    found = processes.gathered({"own": peak.own, "before": peak.before, "mapped": peak.mapped})
    if processes.is_first():
        sys.stdout.write(json.dumps(found) + "\n")
    del params


def measure(folder: pathlib.Path, processes: int) -> list[dict[str, int]]:
    """What each of so many processes held while they read a model directory."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": "1",
        "PYTHONPATH": str(ROOT),
        "DAAJAX_NUM_PROCESSES": str(processes),
        "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
    }
    started = [
        subprocess.Popen(
            [sys.executable, "-m", "benchmarks.loading", f"--load={folder}"],
            env=common | {"DAAJAX_PROCESS_ID": str(number)},
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
        )
        for number in range(processes)
    ]
    said = [process.communicate()[0] for process in started]
    if any(process.returncode for process in started):
        raise RuntimeError(f"processes ended with {[process.returncode for process in started]}: {said}")
    return json.loads(next(line for line in said[0].splitlines() if line.startswith("[{")))


def main() -> None:
    """Measures and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=8.0)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--files", type=int, default=4)
    parser.add_argument("--load", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.load:
        load(options.load)
        return
    with tempfile.TemporaryDirectory() as name:
        size = write_model(pathlib.Path(name), options.gigabytes * GIB, options.files)
        found = measure(pathlib.Path(name), options.processes)
    share = size / options.processes
    rows = [
        "| process | model, GiB | its share | own, at most | of which before | mapped |",
        "|---|---|---|---|---|---|",
    ]
    for number, values in enumerate(found):
        cells = [size, share, values["own"], values["before"], values["mapped"]]
        rows.append(f"| {number} | " + " | ".join(f"{cell / GIB:.2f}" for cell in cells) + " |")
    sys.stdout.write("\n".join(rows) + "\n")


if __name__ == "__main__":
    main()
