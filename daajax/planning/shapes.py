"""Models whose shapes are published: `config.json` without the weights, for plans of models that are not here.

To add one, add what its `config.json` says to `SHAPES`.
"""

from typing import Any

_LLAMA_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
_LLAMA = {  # of all of Llama 3.1
    "model_type": "llama",
    "vocab_size": 128256,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "rope_scaling": _LLAMA_ROPE,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
}


def _llama(hidden_size: int, intermediate_size: int, layers: int, heads: int, **other: Any) -> dict[str, Any]:
    sizes = dict(hidden_size=hidden_size, intermediate_size=intermediate_size, num_hidden_layers=layers)
    return _LLAMA | sizes | dict(num_attention_heads=heads) | other


SHAPES: dict[str, dict[str, Any]] = {
    "llama-3.2-1b": _llama(
        2048, 8192, 16, 32, head_dim=64, tie_word_embeddings=True, rope_scaling=_LLAMA_ROPE | {"factor": 32.0}
    ),
    "llama-3.1-8b": _llama(4096, 14336, 32, 32),
    "llama-3.1-70b": _llama(8192, 28672, 80, 64),
    "llama-3.1-405b": _llama(16384, 53248, 126, 128),
}
