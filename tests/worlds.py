"""Small worlds for tests: a model directory with random weights, a tokenizer of its own, preferences to learn from.

Everything is drawn from seeds with NumPy, so that a world is the same on every machine. `train` and `precompute` go
through the front door: an argument list, `daajax.command.parse`, the command's function.
"""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import unittest.mock
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import safetensors.numpy
from tokenizers import Tokenizer, decoders, models, normalizers, processors, trainers

ROOT = pathlib.Path(__file__).resolve().parents[1]
STORIES = str(ROOT / "configs" / "stories.py")

TEXT = """once upon a time there was a little girl named Lily who loved to play in the park with her red ball.
one day she saw a big dog under the old tree and she was very happy and not afraid at all.
the dog was sad because he had lost his bone so they looked for it all day until the sun went down.
her mom said thank you for being kind and they went home to eat a warm cake with the cat and the bird.
"""
WORDS = sorted(set(TEXT.replace(".", " ").split()))

ARCHITECTURE = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "hidden_act": "silu",
    "torch_dtype": "float32",
}


@dataclasses.dataclass(frozen=True)
class World:
    """A model, preferences and a folder for what is made of them."""

    folder: pathlib.Path
    model: pathlib.Path
    data: pathlib.Path

    @property
    def flags(self) -> list[str]:
        """What sends `configs/stories.py` here: 5 updates of 8 pairs in file order."""
        return [
            f"--config.model.path={self.model}",
            f"--config.data.path={self.data}",
            f"--config.data.cache_dir={self.folder / 'tokens'}",
            f"--config.reference.cache_dir={self.folder / 'reference'}",
            "--config.max_length=128",
            "--config.steps=5",
            "--config.optimizer.learning_rate=1e-3",
        ]


def make_world(folder: pathlib.Path, *, count: int = 40) -> World:
    """A whole one."""
    return World(folder, make_model(folder / "model"), write_rows(folder / "pairs.jsonl", pairs(count)))


def make_model(
    folder: pathlib.Path, *, seed: int = 0, dtype: Any = np.float32, files: int = 1, **changes: Any
) -> pathlib.Path:
    """A Llama with random weights and a tokenizer as a Hugging Face directory; `changes` go into its config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    config = ARCHITECTURE | changes
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    save_tensors(folder, {name: value.astype(dtype) for name, value in tensors(config, seed).items()}, files=files)
    save_tokenizer(folder)
    return folder


def tensors(config: dict[str, Any], seed: int = 0) -> dict[str, np.ndarray]:
    """Random weights under Hugging Face names; large enough that log-probs are far from uniform."""
    random = np.random.default_rng(seed)
    hidden, mlp = config["hidden_size"], config["intermediate_size"]
    kv = hidden // config["num_attention_heads"] * config["num_key_value_heads"]
    shapes = {"model.embed_tokens.weight": (config["vocab_size"], hidden), "model.norm.weight": (hidden,)}
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (config["vocab_size"], hidden)
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}."
        shapes |= {f"{at}{name}_layernorm.weight": (hidden,) for name in ("input", "post_attention")}
        shapes |= {f"{at}self_attn.{name}_proj.weight": (hidden, hidden) for name in "qo"}
        shapes |= {f"{at}self_attn.{name}_proj.weight": (kv, hidden) for name in "kv"}
        shapes |= {f"{at}mlp.{name}_proj.weight": (mlp, hidden) for name in ("gate", "up")}
        shapes[f"{at}mlp.down_proj.weight"] = (hidden, mlp)
    draws = {}
    for name, shape in shapes.items():
        noise = random.standard_normal(shape) * (0.1 if len(shape) == 1 else 1 / np.sqrt(shape[1]))
        draws[name] = (noise + (len(shape) == 1)).astype(np.float32)
    return draws


def load_tensors(folder: pathlib.Path) -> dict[str, np.ndarray]:
    """The tensors of a model directory."""
    return {
        name: value
        for file in sorted(folder.glob("*.safetensors"))
        for name, value in safetensors.numpy.load_file(file).items()
    }


def save_tensors(folder: pathlib.Path, values: dict[str, np.ndarray], *, files: int = 1) -> None:
    """Writes them as one file, or as several with an index."""
    if files == 1:
        safetensors.numpy.save_file(values, folder / "model.safetensors")
        return
    weight_map = {name: f"model-{i % files + 1:05d}-of-{files:05d}.safetensors" for i, name in enumerate(values)}
    for file in set(weight_map.values()):
        safetensors.numpy.save_file({n: v for n, v in values.items() if weight_map[n] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def save_tokenizer(folder: pathlib.Path, *, vocab_size: int = 128, **config: Any) -> None:
    """A BPE like Llama 2's, trained on `TEXT`: "▁" for spaces and before the text, BOS in front."""
    folder.mkdir(parents=True, exist_ok=True)
    backend = Tokenizer(models.BPE(unk_token="<unk>"))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    specials = ["<unk>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=specials, show_progress=False)
    backend.train_from_iterator(TEXT.split(" "), trainer)
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    backend.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "<unk>", "bos_token": "<s>"}
    settings |= {"eos_token": "</s>"} | config
    (folder / "tokenizer_config.json").write_text(json.dumps({k: v for k, v in settings.items() if v is not None}))


def pairs(count: int, *, seed: int = 0) -> list[dict[str, Any]]:
    """Prompts with two answers of unequal length, no two alike."""
    random = np.random.default_rng(seed)

    def sentence(low: int, high: int) -> str:
        return " ".join(random.choice(WORDS, random.integers(low, high)).tolist())

    return [{"prompt": sentence(4, 14), "chosen": " " + sentence(6, 18), "rejected": " " + sentence(3, 22)}
            for _ in range(count)]  # fmt: skip


def write_rows(path: pathlib.Path, rows: Sequence[Any]) -> pathlib.Path:
    """One JSON value a line; text is written as it is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def parse(*arguments: str, recipe: str = STORIES, workdir: pathlib.Path | str | None = None) -> tuple[Any, str]:
    """The config and the folder that a command line comes to."""
    from daajax import command

    folder = [] if workdir is None else [f"--workdir={workdir}"]
    return command.parse(["train", f"--config={recipe}", *folder, *arguments], "train")


def visible(devices: int) -> Any:
    """Lets a run see only so many devices: a context. On one of them it compiles in half the time."""
    import jax  # here: what a process of its own imports of this module needs no devices

    shown = jax.devices()[:devices]
    return unittest.mock.patch.multiple("jax", device_count=lambda: len(shown), devices=lambda *_: shown)


def train(workdir: pathlib.Path, *arguments: str, recipe: str = STORIES, devices: int = 1) -> list[dict[str, float]]:
    """Runs `python -m daajax.train` in this process; returns the metrics it wrote."""
    from daajax.train import train

    with visible(devices):
        train(*parse(*arguments, recipe=recipe, workdir=workdir))
    return read_metrics(workdir)


def precompute(*arguments: str, recipe: str = STORIES, devices: int = 1) -> None:
    """Runs `python -m daajax.precompute` in this process."""
    from daajax.precompute import precompute

    with visible(devices):
        precompute(*parse(*arguments, recipe=recipe))


def at(main: Callable[..., None], workdir: pathlib.Path | str, *arguments: str, devices: int = 1) -> None:
    """Runs a command that starts from a run's folder, `evaluate` or `export`, in this process."""
    from daajax import command

    line, options = [main.__name__, f"--workdir={workdir}", *arguments], {"step": int, "output": str}
    if main.__name__ == "export":
        options["form"] = str
    with visible(devices):
        config, where, values = command.parse_at(line, main.__name__, options)
        main(config, where, **values)


def read_metrics(workdir: pathlib.Path) -> list[dict[str, float]]:
    """The lines of a run's metrics.jsonl."""
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def command(
    module: str, *arguments: str, cwd: pathlib.Path = ROOT, timeout: float = 300, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Runs `python -m daajax.<module>` as a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", f"daajax.{module}", *arguments],
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": str(ROOT)} | environment,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def column(history: Sequence[dict[str, float]], name: str) -> np.ndarray:
    """One metric by update."""
    return np.array([values[name] for values in history])


def deviation(one: Sequence[float] | np.ndarray, other: Sequence[float] | np.ndarray) -> float:
    """Largest relative difference of two columns."""
    one, other = np.asarray(one), np.asarray(other)
    return float(np.max(np.abs(one - other) / np.maximum(np.abs(other), 1e-12)))
