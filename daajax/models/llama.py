"""Llama and its kin: Mistral, Ministral, Mixtral, Qwen, SmolLM, Phi, OLMo."""

from collections.abc import Mapping
from typing import Any

from daajax.errors import UserError
from daajax.models import fields
from daajax.models.architecture import Architecture, Experts, LayerKind
from daajax.models.config_reader import ConfigReader
from daajax.models.storage import ATTENTION, MLP, Columns, Modules


def llama(reader: ConfigReader) -> Architecture:
    """Llama 2, 3, 3.1, 3.2, 3.3, SmolLM 2; defaults as in transformers' LlamaConfig."""
    reader.expect("rope_interleaved", False)
    known = fields.read(reader)
    return Architecture(
        **known, kinds=(LayerKind(None, fields.rope_parameters(reader, known)),), biases=fields.biases(reader)
    )


def mistral(reader: ConfigReader) -> Architecture:
    """Mistral 7B v0.1 to v0.3, Nemo, Small; defaults as in transformers' MistralConfig."""
    known = fields.read(reader, kv_heads=8, positions=131072)
    window = reader.nullable_integer("sliding_window", absent=4096)
    return Architecture(**known, kinds=(LayerKind(window, fields.rope_parameters(reader, known)),))


def ministral(reader: ConfigReader) -> Architecture:
    """Ministral, whose layers slide as `layer_types` says; defaults as in transformers' MinistralConfig."""
    known = fields.read(reader, kv_heads=8, positions=131072)
    window, turn = reader.nullable_integer("sliding_window", absent=4096), fields.rope_parameters(reader, known)
    slides = [window is not None] * known["num_hidden_layers"]
    return Architecture(**known, **fields.layers(reader, known, slides, LayerKind(window, turn), LayerKind(None, turn)))


def mixtral(reader: ConfigReader) -> Architecture:
    """Mixtral 8x7B, 8x22B; defaults as in transformers' MixtralConfig."""
    known = fields.read(reader, eps=("rms_norm_eps", 1e-5), kv_heads=8, positions=131072)
    window = reader.nullable_integer("sliding_window", absent=None)
    reader.expect("router_jitter_noise", 0.0)
    experts = Experts(reader.integer("num_local_experts", 8), reader.integer("num_experts_per_tok", 2), True)
    return Architecture(
        **known, kinds=(LayerKind(window, fields.rope_parameters(reader, known, theta=1e6)),), experts=experts
    )


def qwen2(reader: ConfigReader) -> Architecture:
    """Qwen 2 and 2.5; defaults as in transformers' Qwen2Config."""
    reader.expect("use_mrope", False)
    known = fields.read(reader, kv_heads=32, positions=32768)
    return Architecture(**known, **_qwen_layers(reader, known), biases=("q_proj", "k_proj", "v_proj"))


def qwen3(reader: ConfigReader) -> Architecture:
    """Qwen 3; defaults as in transformers' Qwen3Config."""
    known = fields.read(reader, kv_heads=32, head_dim=128, positions=32768)
    layers = _qwen_layers(reader, known)
    return Architecture(**known, **layers, qk_norm="head", biases=fields.biases(reader, mlp=False))


def _qwen_layers(reader: ConfigReader, known: Mapping[str, Any]) -> dict[str, Any]:
    """Layers from `max_window_layers` on slide, if windows are used at all."""
    window = _qwen_window(reader)
    first, turn = reader.integer("max_window_layers", 28, least=0), fields.rope_parameters(reader, known)
    slides = [window is not None and layer >= first for layer in range(known["num_hidden_layers"])]
    return fields.layers(reader, known, slides, LayerKind(window, turn), LayerKind(None, turn))


def _qwen_window(reader: ConfigReader) -> int | None:
    window = reader.nullable_integer("sliding_window", absent=4096)
    return window if reader.boolean("use_sliding_window", False) else None


def qwen3_moe(reader: ConfigReader) -> Architecture:
    """Qwen 3 with experts; defaults as in transformers' Qwen3MoeConfig. In every layer, as all published ones."""
    reader.expect("decoder_sparse_step", 1)
    for key, value in dict(
        mlp_only_layers=[], qkv_bias=False, use_qk_norm=True, shared_expert_intermediate_size=0
    ).items():
        reader.expect(key, value)
    reader.ignore("max_window_layers")  # transformers slides in all layers or in none
    count = reader.integer("num_experts", 128)
    reader.same("num_local_experts", count, "num_experts")
    experts = Experts(
        count,
        reader.integer("num_experts_per_tok", 8),
        reader.boolean("norm_topk_prob", False),
    )
    known = fields.read(reader, kv_heads=4, positions=32768)
    known["intermediate_size"] = reader.integer("moe_intermediate_size", 768)
    kind = LayerKind(_qwen_window(reader), fields.rope_parameters(reader, known))
    return Architecture(
        **known, kinds=(kind,), qk_norm="head", biases=fields.biases(reader, mlp=False), experts=experts
    )


def smollm3(reader: ConfigReader) -> Architecture:
    """SmolLM 3, whose every fourth layer has no rotation; defaults as in transformers' SmolLM3Config."""
    known = fields.read(reader, kv_heads=4, positions=32768, tied=True)
    turn, count = fields.rope_parameters(reader, known, theta=2e6), known["num_hidden_layers"]
    interval = reader.integer("no_rope_layer_interval", 4)
    turns = reader.take("no_rope_layers", [int((layer + 1) % interval != 0) for layer in range(count)])
    if not isinstance(turns, list) or len(turns) < count or any(turn not in (0, 1) for turn in turns):
        raise UserError(f"no_rope_layers is {turns!r}; a list of {count} is needed, each 0 or 1.")
    window = reader.nullable_integer("sliding_window", absent=None)
    window = window if reader.boolean("use_sliding_window", False) else None
    reader.ignore("max_window_layers")
    slides = [bool(window) and not turns[layer] for layer in range(count)]
    names = ("full_attention", "sliding_attention")
    words = reader.words("layer_types", [names[slid] for slid in slides], names)
    kinds = [
        LayerKind(window if word == names[1] else None, turn if t else None)
        for word, t in zip(words, turns, strict=False)
    ]
    distinct = tuple(dict.fromkeys(kinds))
    return Architecture(
        **known, kinds=distinct, kind_of=tuple(map(distinct.index, kinds)), biases=fields.biases(reader)
    )


def phi3(reader: ConfigReader) -> Architecture:
    """Phi-3, Phi-3.5 and Phi-4 (mini too); defaults as in transformers' Phi3Config."""
    known = fields.read(reader, eps=("rms_norm_eps", 1e-5), positions=4096)
    given = {"rope_theta": reader.take("rope_theta", 10000.0)}
    given["partial_rotary_factor"] = reader.take("partial_rotary_factor", 1.0)
    given |= fields.stretched(reader)
    original = reader.integer("original_max_position_embeddings", 4096)
    if given.get("rope_type") in ("su", "yarn", "longrope"):  # the first two are what it was called before
        given |= {"rope_type": "longrope", "original_max_position_embeddings": original}
    for key in ("attention_bias", "mlp_bias", "lm_head_bias"):
        reader.expect(key, False)
    for key in ("full_attn_mod", "interpolate_factor"):
        reader.expect(key, 1)
    window = reader.nullable_integer("sliding_window", absent=None)
    return Architecture(**known, kinds=(LayerKind(window, fields.rope_of(given, known, partial=True)),))


def olmo2(reader: ConfigReader) -> Architecture:
    """OLMo 2; defaults as in transformers' Olmo2Config."""
    known = fields.read(reader, eps=("rms_norm_eps", 1e-5))
    return Architecture(
        **known,
        kinds=(LayerKind(None, fields.rope_parameters(reader, known)),),
        norms=("post_attention_norm", "post_mlp_norm"),
        qk_norm="projection",
        biases=fields.biases(reader, mlp=False),
    )


# ---------------------------------------------------------------------- where parameters are stored


def llama_modules(architecture: Architecture) -> Modules:
    """As most families store them."""
    del architecture
    layer = "model.layers.{layer}."
    return {
        "embed_tokens": "model.embed_tokens",
        "norm": "model.norm",
        "lm_head": "lm_head",
        "pre_attention_norm": layer + "input_layernorm",
        "pre_mlp_norm": layer + "post_attention_layernorm",
        "q_norm": layer + "self_attn.q_norm",
        "k_norm": layer + "self_attn.k_norm",
        **{name: f"{layer}self_attn.{name}" for name in ATTENTION},
        **{name: f"{layer}mlp.{name}" for name in MLP},
    }


def around_modules(architecture: Architecture) -> Modules:
    """Norms behind the blocks, or around them: Gemma 2 and 3, OLMo 2."""
    layer = "model.layers.{layer}."
    return llama_modules(architecture) | {
        "post_attention_norm": layer + "post_attention_layernorm",
        "pre_mlp_norm": layer + "pre_feedforward_layernorm",
        "post_mlp_norm": layer + "post_feedforward_layernorm",
    }


def mixtral_modules(architecture: Architecture) -> Modules:
    """Every expert on its own, its projections numbered."""
    block = "model.layers.{layer}.block_sparse_moe."
    names = zip(MLP, ("w1", "w3", "w2"), strict=True)
    experts = {ours: block + "experts.{expert}." + theirs for ours, theirs in names}
    return llama_modules(architecture) | experts | {"router": block + "gate"}


def qwen3_moe_modules(architecture: Architecture) -> Modules:
    """Every expert on its own."""
    block = "model.layers.{layer}.mlp."
    experts = {name: block + "experts.{expert}." + name for name in MLP}
    return llama_modules(architecture) | experts | {"router": block + "gate"}


def phi3_modules(architecture: Architecture) -> Modules:
    """Projections that read the same are stored as one."""
    a, layer = architecture, "model.layers.{layer}."
    heads, kv_heads, mlp = a.num_attention_heads * a.head_dim, a.num_key_value_heads * a.head_dim, a.intermediate_size
    qkv, gate_up = layer + "self_attn.qkv_proj", layer + "mlp.gate_up_proj"
    return llama_modules(a) | {
        "q_proj": (qkv, Columns(0, heads, heads)),
        "k_proj": (qkv, Columns(heads, kv_heads, kv_heads)),
        "v_proj": (qkv, Columns(heads + kv_heads, kv_heads, kv_heads)),
        "gate_proj": (gate_up, Columns(0, mlp, mlp)),
        "up_proj": (gate_up, Columns(mlp, mlp, mlp)),
    }
