"""Memory of one update of Llama 3.1 8B on chips that are not there, from XLA's own compilation for them.

    make memory                                             # the table
    python -m benchmarks.memory --chips=v5e:2x2 --rank=16   # one line of it; see Makefile for what must be set

An update of DPO with the reference cached, float32 AdamW, computing in bfloat16; rows hold four pairs each, prompts a
quarter and responses three eighths of a pair. With `--rank`, adapters of all projections are trained over a frozen
base, else everything. Nothing is timed: without the chips there is no tuning of kernels.
"""

import argparse
import json
import pathlib
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies

from configs import base
from daajax import policy, run, sharding
from daajax.config import losses, resolve
from daajax.data.batches import Batches
from daajax.data.packing import pack
from daajax.data.sizes import Sizes
from daajax.data.tokens import Ids, TokenizedData
from daajax.losses.terms import bind
from daajax.models.families import architecture_of

LLAMA = {  # Llama 3.1 8B
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "tie_word_embeddings": False,
    "hidden_act": "silu",
}

# What XLA asks a GPU for; the memory is what an H200 reports.
H200 = """
gpu_device_info {
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: 233472
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: 4800000000000
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  device_memory_size: 150754820096
  shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 }
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 }
runtime_version { major: 13 }
device_description_str: "NVIDIA H200"
"""

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
    ("h200:8", 0, None, "none", 2),
)


def described(chips: str) -> tuple[Sequence[Any], dict[str, Any]]:
    """Devices that need not be there, and what their compiler is told.

    Args:
        chips: A topology of TPUs as XLA names it, such as `v5e:2x2`, or so many GPUs of one host, `h200:8`.
    """
    kind, count = chips.split(":")
    if kind != "h200":
        return topologies.get_topology_desc(platform="tpu", topology_name=chips).devices, {}
    topology = topologies.get_topology_desc(platform="cuda", target_config=H200, topology=f"1x1x{count}")
    return topology.devices, {"xla_gpu_autotune_level": "0"}  # which would run kernels


def make_data(pairs: int, length: int) -> TokenizedData:
    """Pairs of `length` tokens each."""
    response = 3 * length // 8
    lengths = np.tile(np.array([[length - 2 * response, response, response]], np.int32), (pairs, 1))
    return TokenizedData(
        tokens=np.ones(pairs * length, np.int32),
        scored=np.repeat(np.tile([False, True, True], pairs), lengths.ravel()),
        starts=np.arange(pairs + 1, dtype=np.int64) * length,
        lengths=lengths,
        weights=np.ones(pairs, np.float32),
        ids=Ids.of([str(pair) for pair in range(pairs)]),
        counters={},
        notices=[],
        digest="",
    )


def lower(
    chips: str, *, rank: int, quantization: str | None, remat: str, rows: int, length: int
) -> tuple[jax.stages.Lowered, Any]:
    """The update for these chips, parameters cut up over all of them, and the options to compile it with."""
    devices, options = described(chips)
    config = base.get_config()
    config.model.path, config.data.path = "Llama-3.1-8B", "pairs"
    config.lora.rank, config.lora.quantization, config.remat, config.steps = rank, quantization, remat, 1
    config.max_length, config.batch_size = length, 4 * rows * len(devices)
    config = resolve(config)
    terms, architecture = bind(losses(config)), architecture_of(LLAMA)
    mesh = sharding.make_mesh(config.mesh.to_dict(), devices)
    scorer = policy.make_scorer(config, architecture, mesh, adapters=policy.lora_of(config, architecture))
    update = run.make_update(config, scorer, scorer, terms, updates=config.steps)
    data = make_data(config.batch_size, length // 4)
    windows, sizes = np.arange(config.batch_size)[None], Sizes.of(data, prefix_sharing=True)
    plan = pack(windows, sizes, packing=True, micro_batches=1, row_multiple=len(devices), row_length=length)
    batch = Batches(data, plan, np.zeros(len(data.tokens), np.float32))[0]
    return update.lower(batch, keys=plan.shape(0).keys), options


def measure(folder: pathlib.Path | None, chips: str, **shape: Any) -> dict[str, Any]:
    """Bytes a chip, and seconds of compilation; with a folder, these and the program's texts are written to it."""
    lowered, options = lower(chips, **shape)
    began = time.perf_counter()
    compiled = lowered.compile(compiler_options=options)
    found: Any = compiled.memory_analysis()
    numbers = dict(
        arguments=found.argument_size_in_bytes,
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
    parser.add_argument("--remat", default="full")
    parser.add_argument("--rows", type=int, default=1, help="rows a chip")
    parser.add_argument("--length", type=int, default=4096, help="tokens a row")
    parser.add_argument("--output", type=pathlib.Path, help="folder for numbers.json, lowered.txt, compiled.txt")
    given = parser.parse_args()
    asked = (given.chips, given.rank, given.quantization, given.remat, given.rows)
    print(f"{time.strftime('%Y-%m-%d')}, jax {jax.__version__}, rows of {given.length} tokens, GiB a chip\n")
    print("| chips | trained | base | remat | rows a chip | arguments | temporaries | together | compiled in s |")
    print("|---|---|---|---|---|---|---|---|---|")
    for chips, rank, quantization, remat, rows in [asked] if given.chips else TABLE:
        shape = dict(rank=rank, quantization=quantization, remat=remat, rows=rows, length=given.length)
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
