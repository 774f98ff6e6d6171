"""Small models from a seed, and what transformers says of them: log-probs, gradients, rotary frequencies.

The models are drawn with NumPy, so that every test can write them; torch is needed only to compute the numbers again:

    python -m tests.oracle.make_values

writes one file a model to `tests/oracle/values/`. Parameters and sums are float64; transformers itself works in
float32 inside its norms and rotary angles, which leaves an error of about 1e-6 nats a token.
"""

import hashlib
import json
import math
import pathlib
from typing import Any

import numpy as np
import safetensors.numpy

VALUES = pathlib.Path(__file__).parent / "values"
DIRECTIONS = 4  # random directions that a gradient is projected on; a wrong entry anywhere shows in them

_COMMON = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# The contents of config.json.
MODELS: dict[str, dict[str, Any]] = {
    "llama2": _COMMON
    | {  # as Llama 2 was published: one key head a query head, its own head, rotary keys of the old style
        "num_key_value_heads": 4,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "rope_theta": 10000.0,
        "rope_scaling": None,
        "torch_dtype": "float32",
    },
    "llama31": _COMMON
    | {  # grouped keys, tied; of its four frequencies one is kept, one blended, two are stretched
        "max_position_embeddings": 2048,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True,
        "dtype": "float32",
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 256,
        },
    },
    "head_dim": _COMMON
    | {  # heads wider than hidden_size / heads
        "num_key_value_heads": 2,
        "head_dim": 24,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "dtype": "float32",
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    },
    "mistral": _COMMON
    | {  # most sequences are longer than the window
        "architectures": ["MistralForCausalLM"],
        "model_type": "mistral",
        "num_key_value_heads": 2,
        "head_dim": 16,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "rope_theta": 10000.0,
        "sliding_window": 24,
        "torch_dtype": "float32",
    },
}
# Tokens of prompt, chosen and rejected response, and how many of a response's first tokens are not scored.
LENGTHS = [
    *[(1, 9, 14, 0), (33, 12, 7, 0), (150, 60, 41, 0), (17, 26, 3, 2), (5, 1, 30, 0), (64, 8, 8, 0), (90, 35, 20, 0)],
    *[(12, 5, 48, 1), (2, 17, 11, 0), (27, 22, 22, 0), (8, 3, 2, 0), (41, 13, 19, 0), (19, 6, 1, 0), (120, 21, 34, 1)],
    *[(3, 28, 10, 0), (70, 4, 16, 0)],
]


def uniform(size: int, *seed: int) -> np.ndarray:
    """Numbers in [0, 1) from the raw bit stream, which no NumPy version may change, unlike its distributions."""
    return (np.random.PCG64(list(seed)).random_raw(size) >> np.uint64(11)) * 2.0**-53


def shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor of a model directory."""
    hidden, mlp, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    head_dim = config.get("head_dim", hidden // config["num_attention_heads"])
    heads, kv_heads = config["num_attention_heads"] * head_dim, config["num_key_value_heads"] * head_dim
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, hidden), "model.norm.weight": (hidden,)}
    for layer in range(config["num_hidden_layers"]):
        found |= {
            f"model.layers.{layer}.{name}.weight": shape
            for name, shape in {
                "input_layernorm": (hidden,),
                "self_attn.q_proj": (heads, hidden),
                "self_attn.k_proj": (kv_heads, hidden),
                "self_attn.v_proj": (kv_heads, hidden),
                "self_attn.o_proj": (hidden, heads),
                "post_attention_layernorm": (hidden,),
                "mlp.gate_proj": (mlp, hidden),
                "mlp.up_proj": (mlp, hidden),
                "mlp.down_proj": (hidden, mlp),
            }.items()
        }
    if not config["tie_word_embeddings"]:
        found["lm_head.weight"] = (vocab, hidden)
    return found


def tensors(config: dict[str, Any], seed: int = 0) -> dict[str, np.ndarray]:
    """The model's weights, float32: large enough that every part of the model shows in its log-probs."""
    drawn = {}
    for place, (name, shape) in enumerate(shapes(config).items()):
        values = 2 * uniform(math.prod(shape), seed, place).reshape(shape) - 1
        if name.endswith("norm.weight"):
            values = 1 + 0.3 * values
        elif name in ("model.embed_tokens.weight", "lm_head.weight"):
            values = 0.6 * values
        else:
            values = 2.5 / math.sqrt(shape[1]) * values
        drawn[name] = values.astype(np.float32)
    return drawn


def write_model(folder: pathlib.Path, config: dict[str, Any], weights: dict[str, np.ndarray] | None = None) -> str:
    """Writes a model directory.

    Args:
        folder: Made if need be.
        config: Contents of its config.json.
        weights: Its tensors; None: those of `tensors`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    weights = tensors(config) if weights is None else weights
    safetensors.numpy.save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return str(folder)


def examples(config: dict[str, Any]) -> list[tuple[np.ndarray, list[np.ndarray], int]]:
    """Prompt, two responses, and how many of a response's first tokens are not scored."""
    found = []
    for place, (prompt, chosen, rejected, unscored) in enumerate(LENGTHS):
        ids = (uniform(prompt + chosen + rejected, 99, place) * config["vocab_size"]).astype(np.int32)
        found.append((ids[:prompt], [ids[prompt : prompt + chosen], ids[prompt + chosen :]], unscored))
    return found


def coefficients() -> list[np.ndarray]:
    """What every scored token's log-prob is multiplied with in the sum that is differentiated; one array a response."""
    counts = [length - unscored for _, *lengths, unscored in LENGTHS for length in lengths]
    return [2 * uniform(count, 7, place) - 1 for place, count in enumerate(counts)]


def summarize(name: str, gradient: np.ndarray) -> dict[str, Any]:
    """Norm of a gradient, its projections on random directions (as large as the norm), and a few entries."""
    gradient = np.asarray(gradient, np.float64)
    flat, seed = gradient.reshape(-1), int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "little")
    directions = math.sqrt(12) * (uniform(DIRECTIONS * flat.size, 3, seed).reshape(DIRECTIONS, -1) - 0.5)
    entries = (uniform(4, 4, seed) * flat.size).astype(int)
    return {
        "norm": float(np.linalg.norm(flat)),
        "projections": [float(value) for value in directions @ flat],
        "entries": {str(place): float(flat[place]) for place in entries},
    }


def torch_model(path: str, dtype: str = "float64") -> Any:
    """A model directory in transformers; refuses one that does not hold exactly the model's tensors."""
    import torch
    import transformers

    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        path, dtype=getattr(torch, dtype), attn_implementation="eager", output_loading_info=True
    )
    problems = {kind: sorted(map(str, names)) for kind, names in report.items() if names}
    if problems:
        raise ValueError(f"{path}: {problems}")
    return model.eval()


def torch_logps(model: Any, config: dict[str, Any]) -> list[Any]:
    """Log-probs of the scored tokens of every response, nats, each response scored alone."""
    import torch

    found = []
    for prompt, responses, unscored in examples(config):
        for response in responses:
            ids = torch.tensor(np.concatenate([prompt, response])[None].astype(np.int64))
            logps = torch.log_softmax(model(ids).logits[0, :-1].double(), dim=-1)
            targets = ids[0, 1:, None]
            found.append(logps.gather(1, targets)[len(prompt) - 1 + unscored :, 0])
    return found


def compute(name: str, folder: pathlib.Path) -> dict[str, Any]:
    """The numbers of one model.

    Args:
        name: Key of `MODELS`.
        folder: Where its directory is written.
    """
    import torch
    import transformers

    config = MODELS[name]
    model = torch_model(write_model(folder, config))
    logps = torch_logps(model, config)
    sum((values * torch.tensor(c)).sum() for values, c in zip(logps, coefficients(), strict=True)).backward()
    return {
        "made_with": {"torch": torch.__version__.split("+")[0], "transformers": transformers.__version__},
        "rope_frequencies": [float(value) for value in model.model.rotary_emb.inv_freq],
        "logps": [[round(value, 9) for value in values.tolist()] for values in logps],
        "gradients": {key: summarize(key, value.grad.numpy()) for key, value in model.named_parameters()},
    }


def read(name: str) -> dict[str, Any]:
    """The committed numbers of a model."""
    return json.loads((VALUES / f"{name}.json").read_text(encoding="utf-8"))


def main() -> None:
    """Computes and writes the numbers of every model."""
    import tempfile

    for name in MODELS:
        with tempfile.TemporaryDirectory() as folder:
            values = compute(name, pathlib.Path(folder))
        VALUES.mkdir(exist_ok=True)
        lines = ",\n".join(f"{json.dumps(key)}: {json.dumps(value)}" for key, value in values.items())
        (VALUES / f"{name}.json").write_text("{\n" + lines + "\n}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
