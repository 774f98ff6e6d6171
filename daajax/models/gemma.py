"""Gemma 1, 2 and 3; their parameters are stored as those of `daajax.models.llama`."""

import math
from typing import Any

from daajax.models import fields
from daajax.models.architecture import Architecture, LayerKind, Norm
from daajax.models.config_reader import ConfigReader

_GEMMA_NORMS = ("pre_attention_norm", "post_attention_norm", "pre_mlp_norm", "post_mlp_norm")


def _gemma_fields(reader: ConfigReader, *, act: str, kv_heads: int, positions: int) -> dict[str, Any]:
    """What the three have in common."""
    reader.expect("use_bidirectional_attention", False)
    known = fields.read(
        reader, kv_heads=kv_heads, head_dim=256, positions=positions, tied=True, act=(act, "gelu_pytorch_tanh")
    )
    reader.ignore("hidden_act", "hidden_activation")  # the other name of the activation, which nobody reads
    known["norm"] = Norm(known["norm"].eps, unit_offset=True)
    return known | dict(embedding_scale=math.sqrt(known["hidden_size"]), biases=fields.biases(reader, mlp=False))


def gemma(reader: ConfigReader) -> Architecture:
    """Gemma; defaults as in transformers' GemmaConfig, which takes gelu for its approximation."""
    known = _gemma_fields(reader, act="hidden_act", kv_heads=16, positions=8192)
    reader.words("layer_types", ["full_attention"] * known["num_hidden_layers"], ("full_attention",))
    if known["hidden_act"] == "gelu":
        known["hidden_act"] = "gelu_pytorch_tanh"
    return Architecture(**known, kinds=(LayerKind(None, fields.rope_parameters(reader, known)),))


def gemma2(reader: ConfigReader) -> Architecture:
    """Gemma 2: every other layer slides; defaults as in transformers' Gemma2Config."""
    known = _gemma_fields(reader, act="hidden_activation", kv_heads=4, positions=8192)
    window, turn = reader.nullable_integer("sliding_window", absent=4096), fields.rope_parameters(reader, known)
    reader.same("sliding_window_size", window, "sliding_window")
    slides = [layer % 2 == 0 for layer in range(known["num_hidden_layers"])]
    return Architecture(
        **known,
        **fields.layers(reader, known, slides, LayerKind(window, turn), LayerKind(None, turn)),
        norms=_GEMMA_NORMS,
        attention_scale=reader.number("query_pre_attn_scalar", 256.0) ** -0.5,
        attn_logit_softcapping=reader.nullable_number("attn_logit_softcapping", absent=50.0),
        final_logit_softcapping=reader.nullable_number("final_logit_softcapping", absent=30.0),
    )


def gemma3(reader: ConfigReader) -> Architecture:
    """Gemma 3's text models: five layers of six slide; defaults as in transformers' Gemma3TextConfig."""
    known = _gemma_fields(reader, act="hidden_activation", kv_heads=4, positions=131072)
    window = reader.nullable_integer("sliding_window", absent=4096)
    every = reader.integer("sliding_window_pattern", reader.integer("_sliding_window_pattern", 6))
    near = {"rope_theta": reader.take("rope_local_base_freq", 10000.0)}
    given = ConfigReader(reader.table("rope_parameters"))
    far = {"rope_theta": reader.take("rope_theta", 1e6)} | fields.stretched(reader)
    near, far = near | given.table("sliding_attention"), far | given.table("full_attention")
    given.finish()
    slides = [(layer + 1) % every != 0 for layer in range(known["num_hidden_layers"])]
    kinds = LayerKind(window, fields.rope_of(near, known)), LayerKind(None, fields.rope_of(far, known))
    reader.expect("attn_logit_softcapping", None)  # transformers would not apply it
    return Architecture(
        **known,
        **fields.layers(reader, known, slides, *kinds),
        norms=_GEMMA_NORMS,
        qk_norm="head",
        attention_scale=reader.number("query_pre_attn_scalar", 256.0) ** -0.5,
        final_logit_softcapping=reader.nullable_number("final_logit_softcapping", absent=None),
    )
