"""What a decoder computes, as data: `families` makes it of a `config.json`, `decoder` computes it.

Fields are named as in a Hugging Face `config.json` where they have one meaning there.
"""

import dataclasses

from daajax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Rope:
    """Rotary position embedding, fields as in `rope_parameters`.

    Attributes:
        rope_theta: Base of the frequencies.
        rope_type: Key of `daajax.models.rope.FREQUENCIES`.
        partial_rotary_factor: Share of a head's features that are rotated, the first ones.
        factor: By which positions are stretched.
        low_freq_factor: Of `llama3`.
        high_freq_factor: Of `llama3`.
        original_max_position_embeddings: Tokens of the context before it was stretched.
        beta_fast: Of `yarn`.
        beta_slow: Of `yarn`.
        truncate: Of `yarn`: whether the ramp begins and ends at whole features.
        attention_factor: Multiplies the rotated queries and keys each.
        short_factor: Of `longrope`, one a frequency: for sequences within the original context.
        long_factor: Likewise for longer ones.
        is_long: Whether the long factors are in force.
    """

    rope_theta: float = 10000.0
    rope_type: str = "default"
    partial_rotary_factor: float = 1.0
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float = 1.0
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()
    is_long: bool = False


@dataclasses.dataclass(frozen=True)
class LayerKind:
    """What one layer may do unlike another.

    Attributes:
        sliding_window: Tokens that a query sees, its own included; None: all earlier ones.
        rope: How queries and keys are rotated; None: not at all.
    """

    sliding_window: int | None = None
    rope: Rope | None = Rope()


@dataclasses.dataclass(frozen=True)
class Norm:
    """How activations are normalized.

    Attributes:
        eps: Added to the mean square or variance.
        centered: LayerNorm: the mean is subtracted; otherwise RMSNorm.
        unit_offset: The scale is 1 + its parameter.
        bias: Something is added at the end.
    """

    eps: float
    centered: bool = False
    unit_offset: bool = False
    bias: bool = False


@dataclasses.dataclass(frozen=True)
class Experts:
    """A mixture of experts in place of the feed-forward block.

    Attributes:
        num_experts: How many there are.
        num_experts_per_tok: How many a token is sent to, those that the router finds most probable.
        norm_topk_prob: Whether their weights are made to sum to 1.
    """

    num_experts: int
    num_experts_per_tok: int
    norm_topk_prob: bool


@dataclasses.dataclass(frozen=True)
class Architecture:
    """A decoder.

    Attributes:
        model_type: Key of `daajax.models.families.FAMILIES`.
        vocab_size: Rows of the vocabulary.
        hidden_size: Width of the residual stream.
        intermediate_size: Width of the feed-forward block, or of each expert.
        num_hidden_layers: Layers.
        num_attention_heads: Query heads.
        num_key_value_heads: Key-value heads; each serves as many query heads.
        head_dim: Features of a head.
        max_position_embeddings: Positions that the model was made for.
        tie_word_embeddings: Whether the vocabulary projection is the embedding.
        initializer_range: Standard deviation of fresh matrices.
        norm: Of every norm in it.
        hidden_act: Key of `daajax.models.decoder.ACTIVATIONS`.
        kinds: The kinds of layer there are.
        kind_of: Index into `kinds` of each layer; empty: all are of the first.
        norms: Which norms a layer has: before and after attention and feed-forward block.
        qk_norm: Whether queries and keys are normalized: each `head` for itself, or the whole `projection`; or not.
        biases: Projections that have a bias.
        gated: Whether the feed-forward block has a gate.
        parallel: Whether attention and feed-forward block read the same residual stream.
        attention_scale: Multiplies the scores; None: 1 / √head_dim.
        attn_logit_softcapping: Scores s become c·tanh(s/c); None: they stay.
        final_logit_softcapping: Likewise logits.
        embedding_scale: Multiplies embeddings.
        learned_positions: Whether each position has an embedding.
        experts: The mixture of experts; None: one feed-forward block.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    tie_word_embeddings: bool
    initializer_range: float
    norm: Norm
    hidden_act: str = "silu"
    kinds: tuple[LayerKind, ...] = (LayerKind(),)
    kind_of: tuple[int, ...] = ()
    norms: tuple[str, ...] = ("pre_attention_norm", "pre_mlp_norm")
    qk_norm: str | None = None
    biases: tuple[str, ...] = ()
    gated: bool = True
    parallel: bool = False
    attention_scale: float | None = None
    attn_logit_softcapping: float | None = None
    final_logit_softcapping: float | None = None
    embedding_scale: float = 1.0
    learned_positions: bool = False
    experts: Experts | None = None

    @property
    def projection(self) -> str:
        """Name of the parameter that makes logits of hidden states: the embedding itself where the two are tied."""
        return "embed_tokens" if self.tie_word_embeddings else "lm_head"


def for_length(architecture: Architecture, length: int) -> Architecture:
    """The architecture as it is for sequences of up to so many tokens.

    Some rotary embeddings depend on the length. `longrope` has two sets of frequencies: the longest sequence decides
    for all, as in vLLM, so that a prompt is the same in front of any response. `dynamic` has one set for every length,
    which no shared prompt can have.

    Raises:
        UserError: If there are no positions for that length.
    """
    a = architecture
    if a.learned_positions and length > a.max_position_embeddings:
        raise UserError(
            f"the model has {a.max_position_embeddings} learned positions, {length} tokens do not fit; "
            f"lower max_length to {a.max_position_embeddings}."
        )
    kinds = []
    for kind in a.kinds:
        rope = kind.rope
        if rope is not None and rope.rope_type == "dynamic" and length > a.max_position_embeddings:
            raise UserError(
                f"rope_type 'dynamic' turns every length beyond {a.max_position_embeddings} tokens differently, which "
                f"is not supported for {length} tokens; lower max_length to {a.max_position_embeddings}."
            )
        if rope is not None and rope.rope_type == "longrope":
            rope = dataclasses.replace(rope, is_long=length > rope.original_max_position_embeddings)
        kinds.append(dataclasses.replace(kind, rope=rope))
    return dataclasses.replace(a, kinds=tuple(kinds))


def describe_rope(architecture: Architecture) -> list[str]:
    """Lines that say which of two sets of rotary frequencies is in force, where there are two."""
    ropes = dict.fromkeys(kind.rope for kind in architecture.kinds)
    return [
        f"rotary embedding with the {'long' if rope.is_long else 'short'} factors of longrope for every sequence; the "
        f"original context is {rope.original_max_position_embeddings} tokens"
        for rope in ropes
        if rope is not None and rope.rope_type == "longrope"
    ]
