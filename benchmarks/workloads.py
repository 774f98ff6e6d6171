"""What trainers are compared on: a model directory and preference pairs, given or made on the spot.

Made pairs have the lengths of hh's helpful dialogues and words of no language; all is drawn from a seed.
"""

import dataclasses
import gzip
import json
import os
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import safetensors.numpy
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from daajax.errors import UserError
from daajax.planning.shapes import SHAPES

Row = dict[str, str]

ASSETS = {"hh": "data/hh_helpful.train.jsonl.gz", "stories": "data/stories_sentiment.train.jsonl.gz"}
FIELDS = ("prompt", "chosen", "rejected")
BOS, EOS = "<bos>", "<eos>"
ARCHITECTURE = {  # 10 million parameters
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 16384,
    "hidden_size": 256,
    "intermediate_size": 1024,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "torch_dtype": "float32",
}
# Median and spread (of the logarithm) of prompts and responses in words. Those of hh under GPT-2's tokenizer are 115
# and 53 tokens; UltraFeedback's means under Llama's are about 200 and 310.
MADE = {"made": ((100, 0.83), (46, 0.86)), "feedback": ((150, 0.4), (235, 0.4))}
LARGEST_TOKENIZER = 16384  # tokens that are learned from the pairs, however many the model has


@dataclasses.dataclass(frozen=True)
class Workload:
    """A model directory and pairs of text, each with its line number as `id`."""

    name: str
    model: pathlib.Path
    pairs: pathlib.Path
    rows: Sequence[Row]


def make(
    data: str, model: str | None, folder: pathlib.Path, *, tiny: bool = False, shape: str | None = None
) -> Workload:
    """Reads or makes pairs and model.

    Args:
        data: A key of `MADE` or `ASSETS`, or a JSONL file with text in `FIELDS`.
        model: A model directory; None makes one, in `folder`, with a tokenizer trained on the pairs.
        folder: Where what is made is written.
        tiny: Makes less of both, for tests.
        shape: Of the model that is made, a key of `daajax.planning.shapes.SHAPES`; None: `ARCHITECTURE`.

    Raises:
        UserError: If the data are not there or not such pairs.
    """
    rows = made_rows(64 if tiny else 2000, *MADE[data], tiny=tiny) if data in MADE else read_rows(data)
    folder.mkdir(parents=True, exist_ok=True)
    pairs = write_rows(folder / "pairs.jsonl", [{"id": str(line), **row} for line, row in enumerate(rows)])
    if model is None:
        small = {"vocab_size": 512, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
        changes = SHAPES[shape] if shape else small if tiny else {}
        make_model(folder / "model", (row[name] for row in rows for name in FIELDS), **changes)
    what = pathlib.Path(model).name if model else f"a random {shape or 'Llama'}"
    return Workload(
        f"{pathlib.Path(data).name}, {what}", pathlib.Path(model) if model else folder / "model", pairs, rows
    )


def read_rows(data: str) -> list[Row]:
    """The text of a data set's pairs, without its other columns.

    Raises:
        UserError: If they are not there, or not text.
    """
    path = pathlib.Path(data)
    if data in ASSETS:
        if "DAAJAX_ASSETS" not in os.environ:
            raise UserError(f"--data={data} is found through the environment variable DAAJAX_ASSETS, which is not set.")
        path = pathlib.Path(os.environ["DAAJAX_ASSETS"]) / ASSETS[data]
    if not path.is_file():
        raise UserError(f"--data={data}: there is no file {path}; name {', '.join([*MADE, *ASSETS])}, or a JSONL file.")
    with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as lines:
        rows = [json.loads(line) for line in lines]
    for line, row in enumerate(rows, 1):
        if not all(isinstance(row.get(name), str) for name in FIELDS):
            raise UserError(f"--data={data}: line {line} of {path} needs text in {', '.join(FIELDS)}.")
    return [{name: row[name] for name in FIELDS} for row in rows]


def made_rows(
    count: int, prompt: tuple[float, float], response: tuple[float, float], *, tiny: bool = False
) -> list[Row]:
    """Pairs of made-up words, which follow Zipf's law; lengths as in `MADE`."""
    random = np.random.default_rng(0)
    syllables = [a + b for a in "bdfgklmnprstvz" for b in "aeiou"]
    words = [
        "".join(syllables[part] for part in parts[: 1 + word % 4])
        for word, parts in enumerate(random.integers(0, len(syllables), (20_000, 4)).tolist())
    ]
    share = np.cumsum(1 / np.arange(3, len(words) + 3))

    def text(median: float, spread: float) -> str:
        length = int(np.clip(random.lognormal(np.log(median / 8 if tiny else median), spread), 2, 600))
        drawn = np.searchsorted(share, random.uniform(0, share[-1], length))
        return " ".join(words[word] for word in drawn.tolist())

    return [
        {"prompt": text(*prompt) + ":", "chosen": f" {text(*response)}.", "rejected": f" {text(*response)}."}
        for _ in range(count)
    ]


def write_rows(path: pathlib.Path, rows: Iterable[Row]) -> pathlib.Path:
    """One JSON object a line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def in_order(rows: Sequence[Row], order: Iterable[Sequence[str]]) -> list[Row]:
    """The rows of all windows one after another; a row's id is its line number."""
    return [rows[int(name)] for window in order for name in window]


def make_model(folder: pathlib.Path, texts: Iterable[str], **changes: Any) -> None:
    """Writes a Llama with random weights, and a byte-level BPE trained on texts, as a Hugging Face directory."""
    config = ARCHITECTURE | changes
    bos, eos = make_tokenizer(folder, texts, min(config["vocab_size"], LARGEST_TOKENIZER))
    (folder / "config.json").write_text(json.dumps(config | {"bos_token_id": bos, "eos_token_id": eos}))
    safetensors.numpy.save_file(random_weights(config), folder / "model.safetensors", metadata={"format": "pt"})


def make_tokenizer(folder: pathlib.Path, texts: Iterable[str], vocab_size: int) -> tuple[int, int]:
    """Writes a byte-level BPE trained on texts; the ids of its first and its last token of a text."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    bos, eos = 0, 1  # special tokens come first
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, bos)])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": BOS, "eos_token": EOS, "pad_token": EOS}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return bos, eos


def random_weights(config: dict) -> dict[str, np.ndarray]:
    """As transformers draws them: normal, norms at 1."""
    random = np.random.default_rng(0)
    hidden, mlp = config["hidden_size"], config["intermediate_size"]
    keys = hidden // config["num_attention_heads"] * config["num_key_value_heads"]
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config["vocab_size"], hidden)}
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (config["vocab_size"], hidden)
    shapes["model.norm.weight"] = (hidden,)
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}."
        shapes |= {f"{at}{name}_layernorm.weight": (hidden,) for name in ("input", "post_attention")}
        shapes |= {f"{at}self_attn.{name}_proj.weight": (hidden, hidden) for name in "qo"}
        shapes |= {f"{at}self_attn.{name}_proj.weight": (keys, hidden) for name in "kv"}
        shapes |= {f"{at}mlp.{name}_proj.weight": (mlp, hidden) for name in ("gate", "up")}
        shapes[f"{at}mlp.down_proj.weight"] = (hidden, mlp)
    spread = config["initializer_range"]
    return {
        name: np.ones(shape, np.float32) if len(shape) == 1 else spread * random.standard_normal(shape, np.float32)
        for name, shape in shapes.items()
    }
