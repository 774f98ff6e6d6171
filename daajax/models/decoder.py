"""The decoder: from tokens to the hidden states that predict their successors.

Layers are pure functions of (parameters, x, architecture). The linen modules below only declare parameters, each with
its logical axes, and call those functions under scan and remat; `decode` calls them on parameters that there are, and
returns what a key-value cache keeps. Nothing here knows where arrays live: `attend` and `constrain` come from outside.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from daajax.models import quantization, remat, rope
from daajax.models.architecture import Architecture, Norm
from daajax.models.lora import COLLECTION, Lora
from daajax.models.parameters import Parameter, adapter_parameters, kept, layer_parameters, outer_parameters
from daajax.models.quantization import Quantized
from daajax.models.rope import Rotation
from daajax.ops import embedding, experts
from daajax.ops.devices import ONE_DEVICE

Attend = Callable[[Array, Array, Array, Any], Array]  # queries, keys, values, what each may see -> output
Mix = Callable[..., Array]  # as `daajax.ops.experts.mix` without `ids`
Join = Callable[[Array], Array]  # as `joined`, or what leaves rows apart
Lookup = Callable[[Array, Array, str, Any], Array]  # as `daajax.ops.embedding.lookup` without `devices`
Params = dict[str, Any]
Memory = tuple[Array, Array]  # rotated keys, values: of a layer, or of all of them with their axis in front


class Routing(NamedTuple):
    """How a router sent tokens to experts, each token weighed.

    Attributes:
        probabilities: Sum of what the router gave each expert.
        chosen: Tokens that each expert got.
    """

    probabilities: Float[Array, "*layers experts"]
    chosen: Float[Array, "*layers experts"]


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {  # names as in transformers
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_fast": functools.partial(jax.nn.gelu, approximate=True),
    "gelu_new": functools.partial(jax.nn.gelu, approximate=True),
    "gelu_pytorch_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
    "relu2": lambda x: jnp.square(jax.nn.relu(x)),  # So et al. 2021, arXiv 2109.08668
}


def normalize(params: Params, name: str, x: Float[Array, "*axes width"], norm: Norm) -> Float[Array, "*axes width"]:
    """Root-mean-square normalization or LayerNorm over the last axis, computed in float32.

    References:
        Zhang & Sennrich 2019, https://arxiv.org/abs/1910.07467; Ba et al. 2016, https://arxiv.org/abs/1607.06450
    """
    y = x.astype(jnp.float32)
    if norm.centered:
        y = y - y.mean(axis=-1, keepdims=True)
    y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + norm.eps)
    scale = params[name].astype(jnp.float32)
    y = y * jnp.expand_dims(scale + 1 if norm.unit_offset else scale, range(x.ndim - 1))
    if f"{name}_bias" in params:
        y = y + jnp.expand_dims(params[f"{name}_bias"].astype(jnp.float32), range(x.ndim - 1))
    return y.astype(x.dtype)


def joined(x: Float[Array, "*axes inputs"]) -> Float[Array, "tokens inputs"]:
    """The tokens of all rows one after another: two-dimensional products are the fastest that CPUs have."""
    return x.reshape(-1, x.shape[-1])


def project(
    params: Params, name: str, x: Float[Array, "*axes inputs"], join: Join = joined
) -> Float[Array, "*axes outputs"]:
    """A linear layer, in the dtype of x; float32 is not rounded to a shorter format."""
    flat, precision, product = join(x), _precision(x.dtype), remat.PROJECTIONS[name]
    y = quantization.apply(lambda weights, x: jnp.dot(x, *weights, precision=precision), (params[name],), flat)
    if f"{name}_bias" in params:
        y = y + jnp.expand_dims(params[f"{name}_bias"], range(y.ndim - 1))
    if f"{name}_a" in params:
        down = checkpoint_name(jnp.dot(flat, params[f"{name}_a"], precision=precision), product)
        y = y + jnp.dot(down, params[f"{name}_b"], precision=precision)
    return checkpoint_name(y, product).reshape(*x.shape[:-1], y.shape[-1])


def _precision(dtype: jax.typing.DTypeLike) -> jax.lax.Precision:
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else jax.lax.Precision.DEFAULT


def attention_block(
    params: Params, x, rotation: Rotation | None, seen, architecture: Architecture, attend: Attend, join: Join
) -> tuple[Float[Array, "rows length embed"], Memory]:
    """Grouped-query self-attention, and the keys and values that it made.

    x is [rows, length, embed], `seen` is what `attend` needs to know of the rows.
    """
    a, (rows, length, _) = architecture, x.shape

    def heads(name: str, norm: str) -> Float[Array, "rows length heads head_dim"]:
        y = project(params, name, x, join)
        if a.qk_norm == "projection" and norm:
            y = normalize(params, norm, y, a.norm)
        y = y.reshape(rows, length, -1, a.head_dim)
        return normalize(params, norm, y, a.norm) if a.qk_norm == "head" and norm else y

    q, k, v = heads("q_proj", "q_norm"), heads("k_proj", "k_norm"), heads("v_proj", "")
    if rotation is not None:
        q, k = rope.rotate(q, rotation), rope.rotate(k, rotation)
    output = attend(q, k, v, seen)
    return project(params, "o_proj", output.reshape(rows, length, -1), join), (k, v)


def mlp_block(
    params: Params, x: Float[Array, "rows length embed"], architecture: Architecture, join: Join
) -> Float[Array, "rows length embed"]:
    """Feed-forward block, with a gate (Shazeer 2020, arXiv 2002.05202) or without."""
    act = ACTIVATIONS[architecture.hidden_act]
    up = project(params, "up_proj", x, join)
    inner = act(project(params, "gate_proj", x, join)) * up if architecture.gated else act(up)
    return project(params, "down_proj", inner, join)


def experts_block(
    params: Params,
    x: Float[Array, "rows length embed"],
    weighed: Float[Array, "rows length"] | None,
    architecture: Architecture,
    mix: Mix,
    join: Join,
) -> tuple[Float[Array, "rows length embed"], Routing | None]:
    """Mixture of experts: each token goes to the few that its router finds most probable, none is dropped.

    `weighed` is what each token counts in how the router sent them; None: nobody asks.

    References:
        Jiang et al. 2024, https://arxiv.org/abs/2401.04088
    """
    experts: Any = architecture.experts
    logits = project(params, "router", x, join).astype(jnp.float32)
    probabilities = jax.nn.softmax(logits, axis=-1)
    weights, chosen = jax.lax.top_k(probabilities, experts.num_experts_per_tok)
    if experts.norm_topk_prob:
        weights = weights / weights.sum(axis=-1, keepdims=True)
    projections, act = (
        [params[name] for name in ("gate_proj", "up_proj", "down_proj")],
        ACTIVATIONS[architecture.hidden_act],
    )
    output = quantization.apply(
        lambda projections, *sent: mix(*sent, *projections, act), projections, x, chosen, weights
    ).astype(x.dtype)
    if weighed is None:
        return output, None
    times = (chosen[..., None] == jnp.arange(experts.num_experts)[None, None, None]).sum(axis=2)
    sums = ((values * weighed[:, :, None]).sum(axis=(0, 1)) for values in (probabilities, times))
    return output, Routing(*sums)


def decoder_layer(
    params: Params,
    x,
    rotation: Rotation | None,
    seen,
    weighed,
    architecture: Architecture,
    attend: Attend,
    mix: Mix,
    join: Join = joined,
) -> tuple[Float[Array, "rows length embed"], tuple[Memory, Routing | None]]:
    """One transformer layer on the residual stream x, [rows, length, embed]; its keys and values; how it routed.

    Arguments are those of its blocks.
    """
    a = architecture

    def norm(name: str, y: Array) -> Array:
        return normalize(params, name, y, a.norm) if name in a.norms else y

    attended, memory = attention_block(params, norm("pre_attention_norm", x), rotation, seen, a, attend, join)
    attended = norm("post_attention_norm", attended)
    middle = x + attended
    inner, routing = norm("pre_mlp_norm", x if a.parallel else middle), None
    if a.experts is None:
        inner = mlp_block(params, inner, a, join)
    else:
        inner, routing = experts_block(params, inner, weighed, a, mix, join)
    return middle + norm("post_mlp_norm", inner), (memory, routing)


def layer_weights(stored: Params, adapters: Params, dtype: jax.typing.DTypeLike, lora: Lora | None) -> Params:
    """One layer's parameters in the compute dtype, with those of its adapters, B scaled; quantized ones as they are."""
    weights: Params = {}
    for name, value in stored.items():
        if lora is not None and lora.quantizes(name):
            weights[name] = Quantized(value, str(lora.quantization))
        else:
            weights[name] = value.astype(dtype)
    for name, value in adapters.items():
        weights[name] = (value * lora.scale if lora is not None and name.endswith("_b") else value).astype(dtype)
    return weights


def of_kind(values: Any, kind: Int[Array, ""] | None) -> Any:
    """What a layer of this kind reads of values whose leading axis is that of kinds; None: there is no such axis."""
    return (
        values
        if kind is None
        else jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, kind, keepdims=False), values)
    )


class _Layer(nn.Module):
    """Declares one layer's parameters and calls `decoder_layer`."""

    architecture: Architecture
    attend: Attend
    mix: Mix
    join: Join
    constrain: Callable[[Array], Array]
    dtype: jax.typing.DTypeLike
    param_dtype: jax.typing.DTypeLike
    lora: Lora | None

    @nn.compact
    def __call__(self, x, rotations, seen, weighed, kind):
        a, stored, adapters = self.architecture, kept(layer_parameters(self.architecture), self.lora), {}
        if self.lora is not None:
            adapters = adapter_parameters(a, self.lora)
            if not (self.is_initializing() or self.has_variable(COLLECTION, next(iter(adapters)))):
                adapters = {}
        params = layer_weights(
            {name: _declare(self, name, parameter) for name, parameter in stored.items()},
            {name: _declare(self, name, parameter, COLLECTION) for name, parameter in adapters.items()},
            self.dtype,
            self.lora,
        )
        rotation, sight = of_kind(rotations, kind), of_kind(seen, kind)
        x, (_, routing) = decoder_layer(params, x, rotation, sight, weighed, a, self.attend, self.mix, self.join)
        return self.constrain(x), routing


class Decoder(nn.Module):
    """The decoder as a linen module.

    Attributes:
        architecture: What to compute.
        attend: Attention over the rows, given what each query may see.
        mix: Sends tokens through their experts; `daajax.ops.experts.mix` on one device.
        join: Joins the rows of a batch before each product; leaves them apart where their length is cut over devices,
            whose parts would have to come together for it.
        lookup: Rows of a table; `daajax.ops.embedding.lookup` on one device.
        constrain: Says where the residual stream [rows, length, embed] lives; identity on one device.
        dtype: Compute dtype.
        param_dtype: Dtype of the parameters that are trained; they are cast inside the scan over layers.
        remat: Key of `daajax.models.remat.REMAT`.
        lora: Its adapters, which are on where their collection is among the variables; None: all of it is trained.
    """

    architecture: Architecture
    attend: Attend
    mix: Mix = experts.mix
    join: Join = joined
    lookup: Lookup = functools.partial(embedding.lookup, devices=ONE_DEVICE)
    constrain: Callable[[Array], Array] = lambda x: x
    dtype: jax.typing.DTypeLike = jnp.float32
    param_dtype: jax.typing.DTypeLike = jnp.float32
    remat: str = "none"
    lora: Lora | None = None

    @nn.compact
    def __call__(
        self,
        tokens: Int[Array, "rows length"],
        positions: Int[Array, "rows length"],
        seen: Any,
        weighed: Float[Array, "rows length"] | None = None,
    ) -> tuple[Float[Array, "rows length embed"], Routing | None]:
        """Hidden states after the last norm, in the compute dtype; how each layer's router sent the tokens.

        Args:
            tokens: Token ids.
            positions: Rotary positions.
            seen: What `attend` needs to know of the rows; where layers are of several kinds, an axis of kinds leads.
            weighed: What each token counts in how routers sent them; None: nobody asks.
        """
        a = self.architecture
        outer = {n: _declare(self, n, p) for n, p in kept(outer_parameters(a), self.lora).items()}
        layer = nn.remat(_Layer, policy=remat.policy(self.remat), prevent_cse=False)
        kinds = _kinds(a)
        layers = nn.scan(
            layer,
            variable_axes={"params": 0, COLLECTION: 0},
            split_rngs={"params": True},
            in_axes=(*[nn.broadcast] * 3, nn.broadcast if kinds is None else 0),  # pyright: ignore[reportArgumentType] - its own annotation forgets it
            length=a.num_hidden_layers,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        x = self.constrain(embed(outer, tokens, positions, a, self.dtype, self.lookup))
        rotations = rope.rotations(a.kinds, a.head_dim, positions)
        stack = layers(
            a, self.attend, self.mix, self.join, self.constrain, self.dtype, self.param_dtype, self.lora, name="layers"
        )
        x, routing = stack(x, rotations, seen, weighed, kinds)
        return normalize(outer, "norm", x, a.norm), routing


def _kinds(architecture: Architecture) -> Int[Array, " layers"] | None:
    """The kind of each layer; None where all are of one."""
    return jnp.asarray(architecture.kind_of, jnp.int32) if architecture.kind_of else None


def _declare(
    module: nn.Module, name: str, parameter: Parameter | dict[str, Parameter], collection: str = "params"
) -> Any:
    """A parameter, or the parts of one, in the dtype that is kept."""

    def one(key: Array, parameter: Parameter) -> Any:
        init: Any = nn.initializers.normal(module.architecture.initializer_range)
        if parameter.start is not None:
            init = nn.initializers.constant(parameter.start)
        elif parameter.spread is not None:
            init = _evenly(parameter.spread)
        dtype = module.param_dtype if parameter.dtype is None else parameter.dtype
        return nn.with_partitioning(init, parameter.axes)(key, parameter.shape, dtype)

    def start(key: Array) -> Any:
        if isinstance(parameter, Parameter):
            return one(key, parameter)
        return {name: one(key, part) for name, part in parameter.items()}

    if collection == "params":
        return module.param(name, start)
    return module.variable(collection, name, lambda: start(module.make_rng("params"))).value


def _evenly(spread: float) -> Callable[..., Array]:
    return lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, -spread, spread)


def embed(
    params: Params,
    tokens: Int[Array, "rows length"],
    positions: Int[Array, "rows length"],
    architecture: Architecture,
    dtype: jax.typing.DTypeLike,
    lookup: Lookup,
) -> Float[Array, "rows length embed"]:
    """Where the residual stream begins, in the compute dtype."""
    x = lookup(params["embed_tokens"], tokens, "vocab", dtype)
    if architecture.embedding_scale != 1:
        x = x * jnp.asarray(architecture.embedding_scale, dtype)
    if architecture.learned_positions:
        x = x + lookup(params["position_embeddings"], positions, "positions", dtype)
    return x


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
        seen: What `model.attend` needs to know of the rows, as in `Decoder.__call__`.
        memory: Keys and values of earlier tokens, [layers, …]; each layer's `attend` is then given (seen, its memory).

    Returns:
        Hidden states after the last norm, in the compute dtype; keys and values, [layers, rows, length, …].
    """
    a, dtype = model.architecture, model.dtype
    rotations = rope.rotations(a.kinds, a.head_dim, positions)

    def layer(x: Array, operands: tuple[Params, Params, Memory | None, Array | None]) -> tuple[Array, Memory]:
        stored, adapters, earlier, kind = operands
        weights = layer_weights(stored, adapters, dtype, model.lora)
        sight = of_kind(seen, kind)
        what = sight if earlier is None else (sight, earlier)
        x, (made, _) = decoder_layer(
            weights, x, of_kind(rotations, kind), what, None, a, model.attend, model.mix, model.join
        )
        return model.constrain(x), made

    x = model.constrain(embed(params, tokens, positions, a, dtype, model.lookup))
    adapters = params.get(COLLECTION, {}).get("layers", {})
    x, made = jax.lax.scan(layer, x, (params["layers"], adapters, memory, _kinds(a)))
    return normalize(params, "norm", x, a.norm), made


def projection(params: Params, architecture: Architecture) -> Float[Array, "vocab embed"]:
    """The vocabulary projection, in the dtype of the parameters: the embedding itself where the two are tied."""
    return params[architecture.projection]


def abstract_params(model: Decoder) -> tuple[Params, Params]:
    """Shapes and logical axes of the parameters, without making any: two trees of the same structure."""
    hashable: Any = _without_functions(model)  # flax makes the hash where type checkers do not see it
    boxed = _abstract(hashable)
    return nn.unbox(boxed), nn.get_partition_spec(boxed)


@functools.cache  # a run asks for them some eight times
def _abstract(model: Decoder) -> Params:
    return jax.eval_shape(lambda: init_params(model, jax.random.key(0), unbox=False))


def init_params(model: Decoder, key: Array, *, unbox: bool = True) -> Params:
    """Fresh parameters; which numbers is a function of the key and the architecture."""
    one = jnp.zeros((1, 1), jnp.int32)
    made: Any = _without_functions(model).init(key, one, one, None)
    params = {**made["params"], **{name: value for name, value in made.items() if name != "params"}}
    return nn.unbox(params) if unbox else params


def _without_functions(model: Decoder) -> Decoder:
    """What is called from outside is not part of the parameters: stand-ins let one token initialize any model."""
    return model.clone(attend=_first, mix=_first, constrain=_first, lookup=_nothing)


def _first(x: Any, *rest: Any) -> Any:
    return x


def _nothing(table: Any, numbers: Any, axis: str, dtype: Any) -> Any:
    return jnp.zeros((*numbers.shape, table.shape[1]), dtype)


def variables(params: Params) -> dict[str, Params]:
    """Parameters as the collections that `Decoder.apply` takes."""
    base = {name: value for name, value in params.items() if name != COLLECTION}
    return {"params": base} | ({COLLECTION: params[COLLECTION]} if COLLECTION in params else {})
