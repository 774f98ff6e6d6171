"""Which parameters a model has: shape, logical axes and start of each, those of its adapters among them."""

import dataclasses
import math
from collections.abc import Mapping

import jax

from daajax.models.architecture import Architecture
from daajax.models.lora import Lora
from daajax.models.quantization import FORMATS


@dataclasses.dataclass(frozen=True)
class Parameter:
    """A parameter of the decoder: shape, logical axes, and where it starts.

    Attributes:
        shape: Its shape.
        axes: Their logical names.
        start: One number; None: drawn.
        spread: Drawn evenly between -spread and spread; None: from the architecture's normal distribution.
        dtype: Its dtype; None: that of the parameters that are trained.
    """

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    start: float | None = None
    spread: float | None = None
    dtype: jax.typing.DTypeLike | None = None


def layer_parameters(architecture: Architecture) -> dict[str, Parameter]:
    """Parameters of one layer, by name."""
    a = architecture
    heads, kv_heads = a.num_attention_heads * a.head_dim, a.num_key_value_heads * a.head_dim
    mlp, stack, stacked = "mlp", (), ()
    if a.experts is not None:
        mlp, stack, stacked = "expert_mlp", (a.experts.num_experts,), ("experts",)
    matrices = {
        "q_proj": Parameter((a.hidden_size, heads), ("embed", "heads")),
        "k_proj": Parameter((a.hidden_size, kv_heads), ("embed", "kv_heads")),
        "v_proj": Parameter((a.hidden_size, kv_heads), ("embed", "kv_heads")),
        "o_proj": Parameter((heads, a.hidden_size), ("heads", "embed")),
        "gate_proj": Parameter((*stack, a.hidden_size, a.intermediate_size), (*stacked, "embed", mlp)),
        "up_proj": Parameter((*stack, a.hidden_size, a.intermediate_size), (*stacked, "embed", mlp)),
        "down_proj": Parameter((*stack, a.intermediate_size, a.hidden_size), (*stacked, mlp, "embed")),
    }
    if not a.gated:
        del matrices["gate_proj"]
    found: dict[str, Parameter] = {}
    for name in a.norms:
        found |= _norm_parameters(name, a)
    for name, matrix in matrices.items():
        found[name] = matrix
        if name in a.biases:
            axis = "norm" if matrix.axes[-1] == "embed" else matrix.axes[-1]
            found[f"{name}_bias"] = Parameter(matrix.shape[-1:], (axis,), start=0.0)
    if a.qk_norm is not None:
        start = 0.0 if a.norm.unit_offset else 1.0
        for name, axis, width in (("q_norm", "heads", heads), ("k_norm", "kv_heads", kv_heads)):
            each = a.qk_norm == "head"
            found[name] = Parameter((a.head_dim if each else width,), ("head_dim" if each else axis,), start)
    if a.experts is not None:
        found["router"] = Parameter((a.hidden_size, a.experts.num_experts), ("embed", "router"))
    return found


def outer_parameters(architecture: Architecture) -> dict[str, Parameter]:
    """Parameters outside the layers, by name."""
    a = architecture
    outer = {"embed_tokens": Parameter((a.vocab_size, a.hidden_size), ("vocab", "embed"))}
    if a.learned_positions:
        outer["position_embeddings"] = Parameter((a.max_position_embeddings, a.hidden_size), ("positions", "embed"))
    outer |= _norm_parameters("norm", a)
    if not a.tie_word_embeddings:
        outer["lm_head"] = Parameter((a.vocab_size, a.hidden_size), ("vocab", "embed"))
    return outer


def _norm_parameters(name: str, architecture: Architecture) -> dict[str, Parameter]:
    shape, norm = (architecture.hidden_size,), architecture.norm
    found = {name: Parameter(shape, ("norm",), start=0.0 if norm.unit_offset else 1.0)}
    return found | ({f"{name}_bias": Parameter(shape, ("norm",), start=0.0)} if norm.bias else {})


def kept(parameters: Mapping[str, Parameter], lora: Lora | None) -> dict[str, Parameter | dict[str, Parameter]]:
    """Parameters as they are kept where some are frozen: those in a dtype of their own, or in several parts.

    Raises:
        UserError: If one cannot be quantized as it is asked for.
    """
    found: dict[str, Parameter | dict[str, Parameter]] = {}
    for name, parameter in parameters.items():
        if lora is None or lora.trains(name):
            found[name] = parameter
        elif lora.quantizes(name):
            parts = FORMATS[str(lora.quantization)].parts(parameter.shape, parameter.axes)
            found[name] = {part: Parameter(p.shape, p.axes, 0.0, dtype=p.dtype) for part, p in parts.items()}
        else:
            found[name] = dataclasses.replace(parameter, dtype=lora.dtype)
    return found


def adapter_parameters(architecture: Architecture, lora: Lora) -> dict[str, Parameter]:
    """Parameters of one layer's adapters, by name: A is drawn as PEFT draws it, B is 0."""
    found = {}
    for name in lora.targets:
        projection = layer_parameters(architecture)[name]
        (inputs, outputs), (input_axis, output_axis) = projection.shape, projection.axes
        found[f"{name}_a"] = Parameter((inputs, lora.rank), (input_axis, "lora"), spread=inputs**-0.5)
        found[f"{name}_b"] = Parameter((lora.rank, outputs), ("lora", output_axis), start=0.0)
    return found


def parameter_count(architecture: Architecture) -> int:
    """Number of parameters."""
    layer, outer = (
        sum(math.prod(parameter.shape) for parameter in parameters(architecture).values())
        for parameters in (layer_parameters, outer_parameters)
    )
    return architecture.num_hidden_layers * layer + outer


def is_decayed(path: str) -> bool:
    """Whether weight decay applies to a parameter: to matrices, not to the scales of norms and to biases."""
    name = path.rsplit("/", 1)[-1]
    return not name.endswith(("norm", "_bias"))
