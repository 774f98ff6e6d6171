"""Fields of an architecture that families read alike from a `config.json`."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from daajax.errors import UserError
from daajax.models.architecture import LayerKind, Norm, Rope
from daajax.models.config_reader import ConfigReader
from daajax.models.decoder import ACTIVATIONS
from daajax.models.rope import FREQUENCIES
from daajax.models.storage import ATTENTION, MLP


def read(
    reader: ConfigReader,
    *,
    eps: tuple[str, float] = ("rms_norm_eps", 1e-6),
    kv_heads: int | None = None,
    head_dim: int | None = None,
    positions: int = 2048,
    tied: bool = False,
    act: tuple[str, str] = ("hidden_act", "silu"),
) -> dict[str, Any]:
    """Fields of an `Architecture` that nearly all families read alike.

    Args:
        reader: Of the config.
        eps: Key of the norms' epsilon, and its default.
        kv_heads: Key-value heads where the config has no such key; None, as null in a config: one a query head.
        head_dim: Default of `head_dim`; None: hidden_size / num_attention_heads.
        positions: Default of `max_position_embeddings`.
        tied: Default of `tie_word_embeddings`.
        act: Key of the activation, and its default.
    """
    heads, hidden = reader.integer("num_attention_heads"), reader.integer("hidden_size")
    width = reader.integer("head_dim", head_dim or hidden // heads)
    if width * heads != hidden and width == hidden // heads:
        raise UserError(f"hidden_size={hidden} is not a multiple of num_attention_heads={heads}; set head_dim.")
    return dict(
        model_type="",
        vocab_size=reader.integer("vocab_size"),
        hidden_size=hidden,
        intermediate_size=reader.integer("intermediate_size"),
        num_hidden_layers=reader.integer("num_hidden_layers"),
        num_attention_heads=heads,
        num_key_value_heads=reader.nullable_integer("num_key_value_heads", absent=kv_heads) or heads,
        head_dim=width,
        max_position_embeddings=reader.integer("max_position_embeddings", positions),
        tie_word_embeddings=reader.boolean("tie_word_embeddings", tied),
        initializer_range=reader.number("initializer_range", 0.02),
        norm=Norm(reader.number(*eps)),
        hidden_act=reader.choice(*act, ACTIVATIONS),
    )


def biases(reader: ConfigReader, *, mlp: bool = True) -> tuple[str, ...]:
    """Projections with a bias, where `attention_bias` and `mlp_bias` say so."""
    found = ATTENTION if reader.boolean("attention_bias", False) else ()
    return (*found, *MLP) if mlp and reader.boolean("mlp_bias", False) else found


# Keys of `rope_parameters` by type: those that there must be, those that there may be.
_ROPE_KEYS: dict[str, tuple[set[str], set[str]]] = {
    "default": (set(), set()),
    "dynamic": ({"factor"}, set()),
    "linear": ({"factor"}, set()),
    "llama3": ({"factor", "low_freq_factor", "high_freq_factor"}, {"original_max_position_embeddings"}),
    "yarn": (
        set(),
        {"factor", "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow", "mscale"}
        | {"mscale_all_dim", "truncate", "finetuned"},
    ),
    "longrope": ({"short_factor", "long_factor"}, {"factor", "original_max_position_embeddings", "attention_factor"}),
}


def rope_parameters(
    reader: ConfigReader, fields: Mapping[str, Any], *, theta: float = 10000.0, partial: float | None = None
) -> Rope:
    """Reads `rope_parameters`, or `rope_theta` with `rope_scaling` as transformers wrote them before version 5.

    Args:
        reader: Of the config.
        fields: Of the architecture.
        theta: Default of `rope_theta`.
        partial: Default of `partial_rotary_factor`; None: the family does not know it.
    """
    given: dict[str, Any] = {"rope_theta": reader.take("rope_theta", theta)}
    if partial is not None:
        given["partial_rotary_factor"] = reader.take("partial_rotary_factor", partial)
    return rope_of(given | stretched(reader), fields, partial=partial is not None)


def stretched(reader: ConfigReader) -> dict[str, Any]:
    """What `rope_parameters` say, or `rope_scaling`, as they were called before."""
    older, newer = reader.table("rope_scaling"), reader.table("rope_parameters")
    if wrong := sorted(key for key in set(older) & set(newer) if older[key] != newer[key]):
        raise UserError(
            f"{wrong[0]} is {older[wrong[0]]!r} in rope_scaling, {newer[wrong[0]]!r} in rope_parameters; make them "
            "the same, or remove one."
        )
    found = older | newer
    if "type" in found and found.setdefault("rope_type", found["type"]) != found["type"]:
        raise UserError(f"rope_type {found['rope_type']!r} and type {found['type']!r} disagree; remove one.")
    return {key: value for key, value in found.items() if key != "type"}


def rope_of(given: dict[str, Any], fields: Mapping[str, Any], *, partial: bool = False) -> Rope:
    """A rotary embedding from `rope_parameters` as they are.

    Args:
        given: The parameters; null counts as absent.
        fields: Of the architecture.
        partial: Whether the family knows `partial_rotary_factor`, which must then be there.

    Raises:
        UserError: If a parameter is missing, unknown or out of place.
    """
    given = {key: value for key, value in given.items() if value is not None}
    rope_type = given.pop("rope_type", "default")
    if not isinstance(rope_type, str) or rope_type not in FREQUENCIES:
        raise UserError(f"rope_type {rope_type!r} is not supported; supported are {', '.join(sorted(_ROPE_KEYS))}.")
    needed, optional = _ROPE_KEYS[rope_type]
    needed = needed | {"rope_theta"} | ({"partial_rotary_factor"} if partial else set())
    if wrong := (needed - set(given)) | (set(given) - needed - optional):
        raise UserError(
            f"rope_parameters of type {rope_type!r} need {sorted(needed)}; missing or extra: {sorted(wrong)}."
        )
    own, positions = ConfigReader(given), fields["max_position_embeddings"]
    found = Rope(own.number("rope_theta"), rope_type, own.number("partial_rotary_factor", 1.0))
    if rope_type in ("linear", "dynamic", "llama3"):
        found = dataclasses.replace(found, factor=own.number("factor"))
    if rope_type in ("llama3", "yarn", "longrope"):
        original = own.integer("original_max_position_embeddings", positions)
        found = dataclasses.replace(found, original_max_position_embeddings=original)
    if rope_type in ("yarn", "longrope"):
        factor = own.number("factor", positions / found.original_max_position_embeddings)
        found = dataclasses.replace(found, factor=factor)
    if rope_type == "llama3":
        found = dataclasses.replace(
            found, low_freq_factor=own.number("low_freq_factor"), high_freq_factor=own.number("high_freq_factor")
        )
        if found.high_freq_factor <= found.low_freq_factor:
            raise UserError(
                f"high_freq_factor={found.high_freq_factor} must exceed low_freq_factor={found.low_freq_factor}."
            )
    if rope_type == "yarn":
        found = dataclasses.replace(
            found,
            beta_fast=own.number("beta_fast", 32.0),
            beta_slow=own.number("beta_slow", 1.0),
            truncate=own.boolean("truncate", True),
            attention_factor=own.number("attention_factor", _yarn_attention(own, found.factor)),
        )
    if rope_type == "longrope":
        stretch, original = found.factor, found.original_max_position_embeddings
        wide = math.sqrt(1 + math.log(stretch) / math.log(original)) if stretch > 1 else 1.0
        found = dataclasses.replace(
            found,
            short_factor=own.numbers("short_factor"),
            long_factor=own.numbers("long_factor"),
            attention_factor=own.number("attention_factor", wide),
        )
        half = int(fields["head_dim"] * found.partial_rotary_factor) // 2
        for name in ("short_factor", "long_factor"):
            if len(getattr(found, name)) != half:
                raise UserError(f"{name} has {len(getattr(found, name))} numbers; {half} are needed, one a frequency.")
    return found


def _yarn_attention(own: ConfigReader, factor: float) -> float:
    """What YaRN multiplies rotated queries and keys with, where the config does not say."""

    def scale(mscale: float) -> float:
        return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0

    of_factor, over_all = (own.nullable_number(key, absent=None) for key in ("mscale", "mscale_all_dim"))
    return scale(of_factor) / scale(over_all) if of_factor and over_all else scale(1.0)


def layers(
    reader: ConfigReader, fields: Mapping[str, Any], slides: Sequence[bool], sliding: LayerKind, full: LayerKind
) -> dict[str, Any]:
    """Layers of two kinds.

    Args:
        reader: Of the config, whose `layer_types` overrules `slides`.
        fields: Of the architecture.
        slides: For each layer, whether it is of the sliding kind by default.
        sliding: Kind of `sliding_attention`.
        full: Kind of `full_attention`.
    """
    names = ("full_attention", "sliding_attention")
    default = [names[bool(slides[layer])] for layer in range(fields["num_hidden_layers"])]
    kinds = [sliding if name == names[1] else full for name in reader.words("layer_types", default, names)]
    distinct = tuple(dict.fromkeys(kinds))
    return dict(kinds=distinct, kind_of=tuple(distinct.index(kind) for kind in kinds) if len(distinct) > 1 else ())
