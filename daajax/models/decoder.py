"""The decoder: from tokens to the hidden states that predict their successors.

Layers are pure functions of (parameters, x, architecture). The linen modules below only declare parameters, each with
its logical axes, and call those functions under scan and remat; `decode` calls them on parameters that there are, and
returns what a key-value cache keeps. Nothing here knows where arrays live: `attend` and `constrain` come from outside.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from daajax.models.families import Architecture, Rope

Attend = Callable[[Array, Array, Array, Any], Array]  # queries, keys, values, what each may see -> output
Params = dict[str, Any]
Memory = tuple[Array, Array]  # rotated keys, values: of a layer, or of all of them with their axis in front

REMAT = {  # what the backward pass keeps of a layer
    "none": None,  # everything: fastest
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,  # matmul outputs; the rest is recomputed
    "full": jax.checkpoint_policies.nothing_saveable,  # the layer's input only: one more forward pass
}


@dataclasses.dataclass(frozen=True)
class Parameter:
    """A parameter of the decoder: shape, logical axes, and whether it starts at 1, as a norm's scale does, or drawn."""

    shape: tuple[int, ...]
    axes: tuple[str, ...]
    ones: bool = False


def layer_parameters(architecture: Architecture) -> dict[str, Parameter]:
    """Parameters of one layer, by name."""
    a = architecture
    heads, kv_heads = a.num_attention_heads * a.head_dim, a.num_key_value_heads * a.head_dim
    return {
        "input_layernorm": Parameter((a.hidden_size,), ("norm",), ones=True),
        "q_proj": Parameter((a.hidden_size, heads), ("embed", "heads")),
        "k_proj": Parameter((a.hidden_size, kv_heads), ("embed", "kv_heads")),
        "v_proj": Parameter((a.hidden_size, kv_heads), ("embed", "kv_heads")),
        "o_proj": Parameter((heads, a.hidden_size), ("heads", "embed")),
        "post_attention_layernorm": Parameter((a.hidden_size,), ("norm",), ones=True),
        "gate_proj": Parameter((a.hidden_size, a.intermediate_size), ("embed", "mlp")),
        "up_proj": Parameter((a.hidden_size, a.intermediate_size), ("embed", "mlp")),
        "down_proj": Parameter((a.intermediate_size, a.hidden_size), ("mlp", "embed")),
    }


def outer_parameters(architecture: Architecture) -> dict[str, Parameter]:
    """Parameters outside the layers, by name."""
    a = architecture
    outer = {
        "embed_tokens": Parameter((a.vocab_size, a.hidden_size), ("vocab", "embed")),
        "norm": Parameter((a.hidden_size,), ("norm",), ones=True),
    }
    if not a.tie_word_embeddings:
        outer["lm_head"] = Parameter((a.vocab_size, a.hidden_size), ("vocab", "embed"))
    return outer


def parameter_count(architecture: Architecture) -> int:
    """Number of parameters."""
    layer, outer = (
        sum(math.prod(parameter.shape) for parameter in parameters(architecture).values())
        for parameters in (layer_parameters, outer_parameters)
    )
    return architecture.num_hidden_layers * layer + outer


def rms_norm(x: Float[Array, "*axes embed"], scale: Float[Array, " embed"], eps: float) -> Float[Array, "*axes embed"]:
    """Root-mean-square normalization, computed in float32 (Zhang & Sennrich 2019, https://arxiv.org/abs/1910.07467)."""
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + eps)
    return y.astype(x.dtype) * jnp.expand_dims(scale, range(x.ndim - 1))


def rope_frequencies(rope: Rope, head_dim: int) -> Float[np.ndarray, " half"]:
    """Radians per position of each pair of features; `llama3` is Llama 3.1's rule, which stretches the slow ones."""
    frequencies = rope.rope_theta ** -(np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    if rope.rope_type == "llama3":
        turns = rope.original_max_position_embeddings * frequencies / (2 * np.pi)  # within the original context
        smooth = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
        smooth = np.clip(smooth, 0, 1)
        frequencies = frequencies * (smooth + (1 - smooth) / rope.factor)
    return frequencies.astype(np.float32)


def rope_angles(architecture: Architecture, positions: Int[Array, "rows length"]) -> Float[Array, "rows length half"]:
    """Radians by which each token's pairs of features are turned."""
    frequencies = rope_frequencies(architecture.rope, architecture.head_dim)
    return positions[:, :, None] * frequencies[None, None, :]


def rotate(
    x: Float[Array, "rows length heads head_dim"], angles: Float[Array, "rows length half"]
) -> Float[Array, "rows length heads head_dim"]:
    """Rotary position embedding (Su et al. 2021, arXiv 2104.09864); the features of a pair lie half a head apart."""
    cos, sin = jnp.cos(angles)[:, :, None], jnp.sin(angles)[:, :, None]
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)


def project(x: Float[Array, "*axes inputs"], weight: Float[Array, "inputs outputs"]) -> Float[Array, "*axes outputs"]:
    """A linear layer as one two-dimensional product, in the dtype of x; float32 is not rounded to a shorter format."""
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else jax.lax.Precision.DEFAULT
    flat = jnp.dot(x.reshape(-1, x.shape[-1]), weight, precision=precision)
    return flat.reshape(*x.shape[:-1], weight.shape[-1])


def attention_block(
    params: Params, x, angles, seen, architecture: Architecture, attend: Attend
) -> tuple[Float[Array, "rows length embed"], Memory]:
    """Grouped-query self-attention, and the keys and values that it made.

    x is [rows, length, embed], `seen` is what `attend` needs to know of the rows.
    """
    rows, length, _ = x.shape
    q, k, v = (
        project(x, params[name]).reshape(rows, length, -1, architecture.head_dim)
        for name in ("q_proj", "k_proj", "v_proj")
    )
    k = rotate(k, angles)
    output = attend(rotate(q, angles), k, v, seen)
    return project(output.reshape(rows, length, -1), params["o_proj"]), (k, v)


def mlp_block(params: Params, x: Float[Array, "rows length embed"]) -> Float[Array, "rows length embed"]:
    """Gated feed-forward block (Shazeer 2020, arXiv 2002.05202)."""
    return project(jax.nn.silu(project(x, params["gate_proj"])) * project(x, params["up_proj"]), params["down_proj"])


def decoder_layer(
    params: Params, x, angles, seen, architecture: Architecture, attend: Attend
) -> tuple[Float[Array, "rows length embed"], Memory]:
    """One pre-norm transformer layer on the residual stream x, [rows, length, embed], and its keys and values."""
    eps = architecture.rms_norm_eps
    normed = rms_norm(x, params["input_layernorm"], eps)
    attended, memory = attention_block(params, normed, angles, seen, architecture, attend)
    x = x + attended
    return x + mlp_block(params, rms_norm(x, params["post_attention_layernorm"], eps)), memory


class _Layer(nn.Module):
    """Declares one layer's parameters and calls `decoder_layer`."""

    architecture: Architecture
    attend: Attend
    constrain: Callable[[Array], Array]
    dtype: jax.typing.DTypeLike
    param_dtype: jax.typing.DTypeLike

    @nn.compact
    def __call__(self, x, angles, seen):
        parameters = layer_parameters(self.architecture)
        params = {name: _declare(self, name, parameter).astype(self.dtype) for name, parameter in parameters.items()}
        x, _ = decoder_layer(params, x, angles, seen, self.architecture, self.attend)
        return self.constrain(x), None


class Decoder(nn.Module):
    """The decoder as a linen module.

    Attributes:
        architecture: What to compute.
        attend: Attention over the rows, given what each query may see.
        constrain: Says where the residual stream [rows, length, embed] lives; identity on one device.
        dtype: Compute dtype.
        param_dtype: Dtype of the parameters; they are cast inside the scan over layers.
        remat: Key of `REMAT`.
    """

    architecture: Architecture
    attend: Attend
    constrain: Callable[[Array], Array] = lambda x: x
    dtype: jax.typing.DTypeLike = jnp.float32
    param_dtype: jax.typing.DTypeLike = jnp.float32
    remat: str = "none"

    @nn.compact
    def __call__(
        self, tokens: Int[Array, "rows length"], positions: Int[Array, "rows length"], seen: Any
    ) -> Float[Array, "rows length embed"]:
        """Hidden states after the last norm, in the compute dtype."""
        outer = {n: _declare(self, n, p).astype(self.dtype) for n, p in outer_parameters(self.architecture).items()}
        layer = _Layer if self.remat == "none" else nn.remat(_Layer, policy=REMAT[self.remat], prevent_cse=False)
        layers = nn.scan(
            layer,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=nn.broadcast,  # pyright: ignore[reportArgumentType] - its own annotation forgets it
            length=self.architecture.num_hidden_layers,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        x = self.constrain(outer["embed_tokens"][tokens])
        angles = rope_angles(self.architecture, positions)
        stack = layers(self.architecture, self.attend, self.constrain, self.dtype, self.param_dtype, name="layers")
        x, _ = stack(x, angles, seen)
        return rms_norm(x, outer["norm"], self.architecture.rms_norm_eps)


def _declare(module: nn.Module, name: str, parameter: Parameter) -> Array:
    normal = nn.initializers.normal(module.architecture.initializer_range)
    init = nn.initializers.ones if parameter.ones else normal
    value: Any = module.param(name, nn.with_partitioning(init, parameter.axes), parameter.shape, module.param_dtype)
    return value


def decode(
    model: Decoder,
    params: Params,
    tokens: Int[Array, "rows length"],
    positions: Int[Array, "rows length"],
    seen: Any,
    memory: Memory | None = None,
) -> tuple[Float[Array, "rows length embed"], Memory]:
    """What the decoder computes, and with it the keys and values of these tokens in every layer.

    Args:
        model: The decoder; not differentiated, so its `remat` does not matter.
        params: Its parameters.
        tokens: Token ids.
        positions: Rotary positions.
        seen: What `model.attend` needs to know of the rows.
        memory: Keys and values of earlier tokens, [layers, …]; each layer's `attend` is then given (seen, its memory).

    Returns:
        Hidden states after the last norm, in the compute dtype; keys and values, [layers, rows, length, …].
    """
    architecture, dtype = model.architecture, model.dtype
    angles = rope_angles(architecture, positions)

    def layer(x: Array, operands: tuple[Params, Memory | None]) -> tuple[Array, Memory]:
        stored, earlier = operands
        weights = {name: value.astype(dtype) for name, value in stored.items()}
        what = seen if earlier is None else (seen, earlier)
        x, made = decoder_layer(weights, x, angles, what, architecture, model.attend)
        return model.constrain(x), made

    x = model.constrain(params["embed_tokens"][tokens].astype(dtype))
    x, made = jax.lax.scan(layer, x, (params["layers"], memory))
    return rms_norm(x, params["norm"].astype(dtype), architecture.rms_norm_eps), made


def projection(params: Params, architecture: Architecture) -> Float[Array, "vocab embed"]:
    """The vocabulary projection, in the dtype of the parameters: the embedding itself where the two are tied."""
    return params["embed_tokens" if architecture.tie_word_embeddings else "lm_head"]


def abstract_params(model: Decoder) -> tuple[Params, Params]:
    """Shapes and logical axes of the parameters, without making any: two trees of the same structure."""
    boxed = jax.eval_shape(lambda: init_params(model, jax.random.key(0), unbox=False))
    return nn.unbox(boxed), nn.get_partition_spec(boxed)


def init_params(model: Decoder, key: Array, *, unbox: bool = True) -> Params:
    """Fresh parameters; which numbers is a function of the key and the architecture."""
    # Attention is not part of the parameters: a stand-in lets one token initialize any model.
    model = model.clone(attend=lambda queries, keys, values, seen: queries, constrain=lambda x: x)
    one = jnp.zeros((1, 1), jnp.int32)
    params: Any = model.init(key, one, one, None)["params"]
    return nn.unbox(params) if unbox else params


def is_decayed(path: str) -> bool:
    """Whether weight decay applies to a parameter: to matrices, not to the scales of norms."""
    return not path.rsplit("/", 1)[-1].endswith("norm")
