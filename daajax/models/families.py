"""Model families: how a Hugging Face `config.json` and its tensors become our decoder's architecture and parameters.

A new family is one function from `config.json` to `Architecture`, one table of tensor names, and one line in
`FAMILIES`. Every key of a `config.json` is used, has the one value we support, or is known not to matter; anything
else is refused by name, because a feature that is ignored is a different model.
"""

import dataclasses
import json
import math
import pathlib
from collections.abc import Callable
from typing import Any

from daajax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Rope:
    """Rotary position embedding, field names as in `rope_parameters`."""

    rope_theta: float = 10000.0
    rope_type: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192


@dataclasses.dataclass(frozen=True)
class Architecture:
    """What the decoder computes; field names and meaning as in a Hugging Face `config.json`."""

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    max_position_embeddings: int
    tie_word_embeddings: bool
    initializer_range: float
    rope: Rope
    sliding_window: int | None = None  # tokens, the query's own included; None: all earlier ones


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor of a model directory; its name has `{layer}` where it is one of a stack."""

    name: str
    transposed: bool = False


@dataclasses.dataclass(frozen=True)
class Family:
    """One entry of `FAMILIES`.

    Attributes:
        architecture: From the contents of `config.json`.
        tensors: Where each of the decoder's parameters, by path, is stored.
        ignored: Whether a directory may hold a tensor of this name although the model does not need it.
        copies: Tensors that a directory may hold a second time, by name, and which tensor each must equal.
    """

    architecture: Callable[[dict[str, Any]], Architecture]
    tensors: Callable[[Architecture], dict[str, Tensor]]
    ignored: Callable[[str], bool]
    copies: Callable[[Architecture], dict[str, str]]


# Keys that do not change what the decoder computes. Dropout is among them: alignment is deterministic here.
_IRRELEVANT = frozenset(
    """_name_or_path architectures attention_dropout auto_map bos_token_id chunk_size_feed_forward dtype eos_token_id
    id2label initializer_range is_decoder is_encoder_decoder label2id max_position_embeddings model_type
    output_attentions output_hidden_states pad_token_id pretraining_tp problem_type return_dict torch_dtype
    transformers_version use_cache unsloth_fixed unsloth_version""".split()  # noqa: SIM905
)
_ROPE_KEYS = {
    "default": {"rope_theta"},
    "llama3": {"rope_theta", "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"},
}


def read_architecture(path: str, option: str = "model.path") -> Architecture:
    """The architecture of a model directory.

    Args:
        path: The directory.
        option: Which names it, for messages.

    Raises:
        UserError: If the directory or its `config.json` is missing or broken, or asks for something that is not
        supported.
    """
    file = pathlib.Path(path) / "config.json"
    if not pathlib.Path(path).is_dir():
        raise UserError(
            f"{option}={path!r} is not a directory; it must be a Hugging Face model directory "
            "(config.json, *.safetensors, tokenizer.json). Download one with: "
            f"hf download ORGANIZATION/{pathlib.Path(path).name} --local-dir {path}"
        )
    if not file.is_file():
        raise UserError(f"{path} has no config.json; {option} must be a Hugging Face model directory.")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        if isinstance(config, dict) and isinstance(config.get("model"), dict):
            raise UserError(f"{option}={path} is the folder of a run; the model that it made is in {path}/model.")
        model_type = config["model_type"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file}: not a model's config.json ({type(error).__name__}: {error}).") from None
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise UserError(
            f"{file}: model_type {model_type!r} is not supported; supported are {', '.join(sorted(FAMILIES))}."
        )
    try:
        return FAMILIES[model_type].architecture(config)
    except UserError as error:
        raise UserError(f"{file}: {error}") from None


def _llama(config: dict[str, Any]) -> Architecture:
    """Llama 2, 3, 3.1, 3.2, 3.3; defaults as in transformers' LlamaConfig."""
    reader = _Reader(config)
    return _decoder(reader, "llama", kv_heads=None, positions=2048, sliding_window=None)


def _mistral(config: dict[str, Any]) -> Architecture:
    """Mistral 7B v0.1 to v0.3 and its kin; defaults as in transformers' MistralConfig."""
    reader = _Reader(config)
    window = reader.nullable_integer("sliding_window", absent=4096)
    return _decoder(reader, "mistral", kv_heads=8, positions=131072, sliding_window=window)


def _decoder(
    reader: "_Reader", model_type: str, *, kv_heads: int | None, positions: int, sliding_window: int | None
) -> Architecture:
    """What Llama and its descendants have in common.

    Args:
        reader: Has the keys that no family reads by itself.
        model_type: The family.
        kv_heads: Key-value heads where the config has no such key; None, as null in a config: one a query head.
        positions: Default of `max_position_embeddings`.
        sliding_window: Tokens that a query sees; None: all earlier ones.
    """
    reader.expect("hidden_act", "silu")
    reader.expect("attention_bias", False)
    reader.expect("mlp_bias", False)
    heads = reader.integer("num_attention_heads")
    hidden = reader.integer("hidden_size")
    architecture = Architecture(
        model_type=model_type,
        vocab_size=reader.integer("vocab_size"),
        hidden_size=hidden,
        intermediate_size=reader.integer("intermediate_size"),
        num_hidden_layers=reader.integer("num_hidden_layers"),
        num_attention_heads=heads,
        num_key_value_heads=reader.nullable_integer("num_key_value_heads", absent=kv_heads) or heads,
        head_dim=reader.integer("head_dim", hidden // heads),
        rms_norm_eps=reader.number("rms_norm_eps", 1e-6),
        max_position_embeddings=reader.integer("max_position_embeddings", positions),
        tie_word_embeddings=reader.boolean("tie_word_embeddings", False),
        initializer_range=reader.number("initializer_range", 0.02),
        rope=_rope(reader),
        sliding_window=sliding_window,
    )
    reader.finish()
    if heads % architecture.num_key_value_heads:
        raise UserError(
            f"num_attention_heads={heads} is not a multiple of num_key_value_heads={architecture.num_key_value_heads}."
        )
    if architecture.head_dim % 2:
        raise UserError(f"head_dim={architecture.head_dim} is odd; rotary embedding needs an even one.")
    return architecture


def _rope(reader: "_Reader") -> Rope:
    """Reads `rope_parameters`, or `rope_theta` with `rope_scaling` as transformers wrote them before version 5."""
    theta = reader.take("rope_theta", 10000.0)
    parameters = {"rope_theta": theta} | reader.table("rope_scaling") | reader.table("rope_parameters")
    rope_type = parameters.pop("rope_type", parameters.pop("type", "default"))
    parameters.pop("type", None)
    if not isinstance(rope_type, str) or rope_type not in _ROPE_KEYS:
        raise UserError(f"rope_type {rope_type!r} is not supported; supported are {', '.join(sorted(_ROPE_KEYS))}.")
    wrong = set(parameters) ^ _ROPE_KEYS[rope_type]
    if wrong:
        raise UserError(
            f"rope_parameters of type {rope_type!r} need {sorted(_ROPE_KEYS[rope_type])}; "
            f"missing or extra: {sorted(wrong)}."
        )
    own = _Reader(parameters)
    rope = Rope(own.number("rope_theta"), rope_type)
    if rope_type == "llama3":
        rope = dataclasses.replace(
            rope,
            factor=own.number("factor"),
            low_freq_factor=own.number("low_freq_factor"),
            high_freq_factor=own.number("high_freq_factor"),
            original_max_position_embeddings=own.integer("original_max_position_embeddings"),
        )
        if rope.high_freq_factor <= rope.low_freq_factor:
            raise UserError(
                f"high_freq_factor={rope.high_freq_factor} must exceed low_freq_factor={rope.low_freq_factor}."
            )
    return rope


class _Reader:
    """Takes keys out of a `config.json`, so that what nobody took is known."""

    def __init__(self, config: dict[str, Any]):
        self._config = dict(config)

    def take(self, key: str, default: Any = None) -> Any:
        value = self._config.pop(key, None)
        return default if value is None else value

    def integer(self, key: str, default: int | None = None) -> int:
        value = self.take(key, default)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise UserError(f"{key} is {value!r}; a positive integer is needed.")
        return value

    def nullable_integer(self, key: str, *, absent: int | None) -> int | None:
        """None where the config says null, `absent` where it says nothing."""
        return self.integer(key) if self._config.setdefault(key, absent) is not None else None

    def number(self, key: str, default: float | None = None) -> float:
        value = self.take(key, default)
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < math.inf:
            raise UserError(f"{key} is {value!r}; a positive number is needed.")
        return float(value)

    def boolean(self, key: str, default: bool) -> bool:
        value = self.take(key, default)
        if not isinstance(value, bool):
            raise UserError(f"{key} is {value!r}; true or false is needed.")
        return value

    def table(self, key: str) -> dict[str, Any]:
        value = self.take(key, {})
        if not isinstance(value, dict):
            raise UserError(f"{key} is {value!r}; an object is needed.")
        return value

    def expect(self, key: str, supported: Any) -> None:
        value = self.take(key, supported)
        if value != supported:
            raise UserError(f"{key}={value!r} is not supported, only {supported!r}.")

    def finish(self) -> None:
        unknown = sorted(key for key, value in self._config.items() if key not in _IRRELEVANT and value is not None)
        if unknown:
            raise UserError(f"keys {unknown} are not known for this model_type; what they ask for would be ignored.")


def _llama_tensors(architecture: Architecture) -> dict[str, Tensor]:
    layer = "model.layers.{layer}."
    tensors = {
        "embed_tokens": Tensor("model.embed_tokens.weight"),
        "norm": Tensor("model.norm.weight"),
        "layers/input_layernorm": Tensor(layer + "input_layernorm.weight"),
        "layers/post_attention_layernorm": Tensor(layer + "post_attention_layernorm.weight"),
    }
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        tensors[f"layers/{name}"] = Tensor(f"{layer}self_attn.{name}.weight", transposed=True)
    for name in ("gate_proj", "up_proj", "down_proj"):
        tensors[f"layers/{name}"] = Tensor(f"{layer}mlp.{name}.weight", transposed=True)
    if not architecture.tie_word_embeddings:
        tensors["lm_head"] = Tensor("lm_head.weight")
    return tensors


def _llama_ignored(name: str) -> bool:
    """Old exports store rotary frequencies."""
    return name.endswith("rotary_emb.inv_freq")


def _llama_copies(architecture: Architecture) -> dict[str, str]:
    """Some exports store the tied head a second time."""
    return {"lm_head.weight": "model.embed_tokens.weight"} if architecture.tie_word_embeddings else {}


FAMILIES: dict[str, Family] = {
    "llama": Family(_llama, _llama_tensors, _llama_ignored, _llama_copies),
    "mistral": Family(_mistral, _llama_tensors, _llama_ignored, _llama_copies),
}
