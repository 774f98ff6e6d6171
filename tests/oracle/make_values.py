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

from daajax.models import decoder, weights
from daajax.models.families import architecture_of
from daajax.models.parameters import Parameter, layer_parameters, outer_parameters

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
_NEWER = {key: value for key, value in _COMMON.items() if key not in ("architectures", "model_type")}
# No padding token: where there is one, torch leaves its embedding without a gradient.
_NEWER |= {
    "pad_token_id": None,
    "num_key_value_heads": 2,
    "tie_word_embeddings": False,
    "rms_norm_eps": 1e-5,
    "dtype": "float32",
}
_DEFAULT = {"rope_type": "default", "rope_theta": 10000.0}
MODELS |= {
    "biased_linear": _NEWER  # every bias a Llama may have
    | {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "attention_bias": True, "mlp_bias": True}
    | {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}},
    "dynamic": _NEWER  # within the context it was made for
    | {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    | {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}},
    "yarn": _NEWER
    | {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "head_dim": 16}
    | {
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 64,
            "beta_fast": 8.0,
        }
    },
    "ministral": _NEWER  # one layer slides, one does not
    | {"model_type": "ministral", "architectures": ["MinistralForCausalLM"], "sliding_window": 24, "head_dim": 8}
    | {"layer_types": ["sliding_attention", "full_attention"], "rope_parameters": _DEFAULT},
    "mixtral": _NEWER
    | {"model_type": "mixtral", "architectures": ["MixtralForCausalLM"], "sliding_window": 40}
    | {"num_local_experts": 4, "num_experts_per_tok": 2, "rope_theta": 1e6},
    "qwen2": _NEWER  # the last layer slides
    | {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "tie_word_embeddings": True}
    | {"use_sliding_window": True, "sliding_window": 24, "max_window_layers": 1, "rope_theta": 1e6},
    "qwen3": _NEWER | {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "head_dim": 24, "rope_theta": 1e6},
    "qwen3_moe": _NEWER
    | {"model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], "head_dim": 16, "rope_theta": 1e6}
    | {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 24, "norm_topk_prob": True}
    | {"decoder_sparse_step": 1, "mlp_only_layers": []},
    "gemma": _NEWER
    | {"model_type": "gemma", "architectures": ["GemmaForCausalLM"], "hidden_act": "gelu_pytorch_tanh"}
    | {"num_key_value_heads": 1, "head_dim": 16, "tie_word_embeddings": True, "rope_theta": 10000.0},
    "gemma2": _NEWER
    | {"model_type": "gemma2", "architectures": ["Gemma2ForCausalLM"], "hidden_activation": "gelu_pytorch_tanh"}
    | {"head_dim": 16, "tie_word_embeddings": True, "query_pre_attn_scalar": 24, "sliding_window": 24}
    | {"attn_logit_softcapping": 3.0, "final_logit_softcapping": 4.0, "rope_theta": 10000.0},
    "gemma3": _NEWER  # layers of both kinds, each with a rotation of its own
    | {"model_type": "gemma3_text", "architectures": ["Gemma3ForCausalLM"], "sliding_window": 24}
    | {"hidden_activation": "gelu_pytorch_tanh", "head_dim": 16, "tie_word_embeddings": True}
    | {"query_pre_attn_scalar": 24, "sliding_window_pattern": 2, "rope_theta": 1e6, "rope_local_base_freq": 10000.0}
    | {"rope_scaling": {"rope_type": "linear", "factor": 8.0}},
    "phi3_long": _NEWER  # every sequence is longer than the original context
    | {"model_type": "phi3", "architectures": ["Phi3ForCausalLM"], "original_max_position_embeddings": 4}
    | {"partial_rotary_factor": 0.5, "rope_theta": 10000.0}
    | {"rope_scaling": {"type": "longrope", "short_factor": [1.0, 1.1], "long_factor": [1.5, 9.0]}},
    "phi3_short": _NEWER
    | {"model_type": "phi3", "architectures": ["Phi3ForCausalLM"], "original_max_position_embeddings": 256}
    | {"max_position_embeddings": 1024, "rope_theta": 10000.0, "sliding_window": 60}
    | {"rope_scaling": {"type": "longrope", "short_factor": [1.0, 1.1, 1.2, 3.0], "long_factor": [1.5, 2.0, 3.0, 9.0]}},
    "olmo2": _NEWER | {"model_type": "olmo2", "architectures": ["Olmo2ForCausalLM"], "rope_theta": 500000.0},
    "smollm3": _NEWER  # the last layer does not turn
    | {"model_type": "smollm3", "architectures": ["SmolLM3ForCausalLM"], "tie_word_embeddings": True}
    | {"no_rope_layers": [1, 0], "rope_theta": 10000.0},
    "nemotron": {key: value for key, value in _NEWER.items() if key != "rms_norm_eps"}
    | {"model_type": "nemotron", "architectures": ["NemotronForCausalLM"], "norm_eps": 1e-5, "hidden_act": "relu2"}
    | {"partial_rotary_factor": 0.5, "rope_theta": 10000.0, "head_dim": 16},
    "gpt_neox": {key: value for key, value in _NEWER.items() if key not in ("rms_norm_eps", "num_key_value_heads")}
    | {"model_type": "gpt_neox", "architectures": ["GPTNeoXForCausalLM"], "layer_norm_eps": 1e-5}
    | {"hidden_act": "gelu", "rotary_pct": 0.5, "rotary_emb_base": 10000, "use_parallel_residual": True},
    "gpt_neox_sequential": {
        key: value for key, value in _NEWER.items() if key not in ("rms_norm_eps", "num_key_value_heads")
    }
    | {"model_type": "gpt_neox", "architectures": ["GPTNeoXForCausalLM"], "layer_norm_eps": 1e-5}
    | {"hidden_act": "gelu_new", "rotary_pct": 1.0, "use_parallel_residual": False, "attention_bias": False},
    "gpt2": {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": 96,
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 256,
        "n_inner": 48,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "dtype": "float32",
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


def stored(config: dict[str, Any]) -> dict[str, tuple[Parameter, tuple[int, ...], bool]]:
    """Every tensor of a model directory: a parameter that it has a part of, its shape, whether inputs come last."""
    architecture = architecture_of(config)
    parameters: dict[str, Any] = {f"layers/{name}": one for name, one in layer_parameters(architecture).items()}
    parameters |= outer_parameters(architecture)
    found = {}
    shapes, _ = decoder.abstract_params(decoder.Decoder(architecture, attend=lambda queries, *_: queries))
    whole = weights._shapes(architecture, shapes)
    for path, stored_as in weights._stored(architecture).items():
        for tensor in stored_as.tensors:
            found.setdefault(tensor.name, (parameters[path], whole[path], tensor.transposed))
    return dict(sorted(found.items()))


def shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor of a model directory."""
    return {name: shape for name, (_, shape, _) in stored(config).items()}


def tensors(config: dict[str, Any], seed: int = 0) -> dict[str, np.ndarray]:
    """The model's weights, float32: large enough that every part of the model shows in its log-probs."""
    drawn = {}
    for place, (name, (parameter, shape, transposed)) in enumerate(stored(config).items()):
        values = 2 * uniform(math.prod(shape), seed, place).reshape(shape) - 1
        if parameter.start is not None:
            values = parameter.start + 0.3 * values
        elif parameter.axes[0] in ("vocab", "positions"):
            values = 0.6 * values
        else:
            values = 2.5 / math.sqrt(shape[-1 if transposed else -2]) * values
        drawn[name] = values.astype(np.float32)
    return drawn


def write_model(folder: pathlib.Path, config: dict[str, Any], drawn: dict[str, np.ndarray] | None = None) -> str:
    """Writes a model directory.

    Args:
        folder: Made if need be.
        config: Contents of its config.json.
        drawn: Its tensors; None: those of `tensors`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    drawn = tensors(config) if drawn is None else drawn
    safetensors.numpy.save_file(drawn, folder / "model.safetensors", metadata={"format": "pt"})
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

    torch.set_num_threads(1)  # tiny products: more threads only wait for one another
    loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
        path,
        dtype=getattr(torch, dtype),
        attn_implementation="eager",
        experts_implementation="eager",
        output_loading_info=True,
    )
    model, report = loaded
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
    torch.stack([(x * torch.tensor(c)).sum() for x, c in zip(logps, coefficients(), strict=True)]).sum().backward()
    values = {
        "made_with": {"torch": torch.__version__.split("+")[0], "transformers": transformers.__version__},
        "rope_frequencies": frequencies(model),
        "logps": [[round(value, 9) for value in values.tolist()] for values in logps],
        "gradients": {key: summarize(key, value) for key, value in gradients(model, folder / "gradients").items()},
    }
    if "num_experts_per_tok" in config:
        loss = torch_router_loss(model, config)
        loss.backward()
        values["router_loss"] = float(loss.detach())
        found = gradients(model, folder / "gradients")
        values["router_gradients"] = {key: summarize(key, value) for key, value in found.items()}
    return values


def frequencies(model: Any) -> list[list[float]]:
    """The rotary frequencies of its kinds of layer."""
    names = [name for name, _ in model.named_buffers() if name.endswith("inv_freq") and "original" not in name]
    return [[float(value) for value in model.get_buffer(name)] for name in names]


def gradients(model: Any, folder: pathlib.Path) -> dict[str, np.ndarray]:
    """What backpropagation left in the parameters, under the names and in the shapes of a model directory."""
    kept = [value.data for value in model.parameters()]
    for value in model.parameters():
        value.data = value.data * 0 if value.grad is None else value.grad
    model.save_pretrained(folder)
    for value, data in zip(model.parameters(), kept, strict=True):
        value.data, value.grad = data, None
    return safetensors.numpy.load_file(folder / "model.safetensors")


def torch_router_loss(model: Any, config: dict[str, Any]) -> Any:
    """The loss that balances experts, over every response behind its own copy of its prompt."""
    import torch
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    logits = []
    for prompt, responses, _ in examples(config):
        for response in responses:
            ids = torch.tensor(np.concatenate([prompt, response])[None].astype(np.int64))
            logits.append(model(ids, output_router_logits=True).router_logits)
    layers = tuple(torch.cat([one.reshape(-1, one.shape[-1]) for one in layer]) for layer in zip(*logits, strict=True))
    return load_balancing_loss_func(layers, layers[0].shape[-1], config["num_experts_per_tok"])


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
