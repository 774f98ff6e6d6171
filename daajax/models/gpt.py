"""GPT-2, GPT-NeoX and Nemotron: LayerNorm, and no gate."""

from daajax.errors import UserError
from daajax.models import fields
from daajax.models.architecture import Architecture, LayerKind, Norm
from daajax.models.config_reader import ConfigReader
from daajax.models.decoder import ACTIVATIONS
from daajax.models.storage import ATTENTION, MLP, Columns, Modules


def nemotron(reader: ConfigReader) -> Architecture:
    """Nemotron-3 and -4, Minitron; defaults as in transformers' NemotronConfig."""
    known = fields.read(reader, eps=("norm_eps", 1e-5), positions=4096, act=("hidden_act", "relu2"))
    reader.same("kv_channels", known["head_dim"], "head_dim")
    known["norm"] = Norm(known["norm"].eps, centered=True, unit_offset=True, bias=True)
    turn = fields.rope_parameters(reader, known, partial=0.5)
    return Architecture(**known, kinds=(LayerKind(None, turn),), gated=False, biases=fields.biases(reader))


def gpt_neox(reader: ConfigReader) -> Architecture:
    """GPT-NeoX, Pythia; defaults as in transformers' GPTNeoXConfig."""
    known = fields.read(reader, eps=("layer_norm_eps", 1e-5), act=("hidden_act", "gelu"))
    known["norm"] = Norm(known["norm"].eps, centered=True, bias=True)
    given = {"rope_theta": reader.take("rotary_emb_base", 10000.0)}
    given["partial_rotary_factor"] = reader.take("rotary_pct", 0.25)
    reader.same("rope_theta", given["rope_theta"], "rotary_emb_base")
    reader.same("partial_rotary_factor", given["partial_rotary_factor"], "rotary_pct")
    given |= fields.stretched(reader)
    biases = (*(ATTENTION if reader.boolean("attention_bias", True) else ()), *MLP)
    return Architecture(
        **known,
        kinds=(LayerKind(None, fields.rope_of(given, known, partial=True)),),
        gated=False,
        biases=biases,
        parallel=reader.boolean("use_parallel_residual", True),
    )


def gpt2(reader: ConfigReader) -> Architecture:
    """GPT-2; defaults as in transformers' GPT2Config."""
    hidden, heads, positions = (
        reader.integer(*given) for given in (("n_embd", 768), ("n_head", 12), ("n_positions", 1024))
    )
    if hidden % heads:
        raise UserError(f"n_embd={hidden} is not a multiple of n_head={heads}.")
    reader.same("max_position_embeddings", positions, "n_positions")
    for key in ("scale_attn_by_inverse_layer_idx", "add_cross_attention"):
        reader.expect(key, False)
    reader.ignore("n_ctx", "summary_type", "summary_use_proj", "summary_activation", "summary_proj_to_labels")
    reader.ignore("summary_first_dropout", "reorder_and_upcast_attn")  # softmax is float32 here anyway
    return Architecture(
        model_type="",
        vocab_size=reader.integer("vocab_size", 50257),
        hidden_size=hidden,
        intermediate_size=reader.integer("n_inner", 4 * hidden),
        num_hidden_layers=reader.integer("n_layer", 12),
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=hidden // heads,
        max_position_embeddings=positions,
        tie_word_embeddings=reader.boolean("tie_word_embeddings", True),
        initializer_range=reader.number("initializer_range", 0.02),
        norm=Norm(reader.number("layer_norm_epsilon", 1e-5), centered=True, bias=True),
        hidden_act=reader.choice("activation_function", "gelu_new", ACTIVATIONS),
        kinds=(LayerKind(None, None),),
        biases=(*ATTENTION, *MLP),
        gated=False,
        attention_scale=None if reader.boolean("scale_attn_weights", True) else 1.0,
        learned_positions=True,
    )


# ---------------------------------------------------------------------- where parameters are stored


def gpt_neox_modules(architecture: Architecture) -> Modules:
    """Queries, keys and values are stored as one projection, head by head."""
    layer, head = "gpt_neox.layers.{layer}.", architecture.head_dim
    fused = layer + "attention.query_key_value"
    return {
        "embed_tokens": "gpt_neox.embed_in",
        "norm": "gpt_neox.final_layer_norm",
        "lm_head": "embed_out",
        "pre_attention_norm": layer + "input_layernorm",
        "pre_mlp_norm": layer + "post_attention_layernorm",
        **{name: (fused, Columns(place * head, head, 3 * head)) for place, name in enumerate(ATTENTION[:3])},
        "o_proj": layer + "attention.dense",
        "up_proj": layer + "mlp.dense_h_to_4h",
        "down_proj": layer + "mlp.dense_4h_to_h",
    }


def gpt2_modules(architecture: Architecture) -> Modules:
    """Queries, keys and values are stored as one projection."""
    layer, width = "transformer.h.{layer}.", architecture.hidden_size
    fused = layer + "attn.c_attn"
    return {
        "embed_tokens": "transformer.wte",
        "position_embeddings": "transformer.wpe",
        "norm": "transformer.ln_f",
        "lm_head": "lm_head",
        "pre_attention_norm": layer + "ln_1",
        "pre_mlp_norm": layer + "ln_2",
        **{name: (fused, Columns(place * width, width, width)) for place, name in enumerate(ATTENTION[:3])},
        "o_proj": layer + "attn.c_proj",
        "up_proj": layer + "mlp.c_fc",
        "down_proj": layer + "mlp.c_proj",
    }
