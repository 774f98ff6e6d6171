"""The modules of transformers that PEFT has adapters of: where each of our parameters lies in them."""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

from daajax.models.architecture import Architecture
from daajax.models.families import FAMILIES
from daajax.models.lora import Lora
from daajax.models.parameters import Parameter, layer_parameters, outer_parameters
from daajax.models.storage import Tensor

# What modules of a model directory are called once transformers has loaded it.
_RENAMED = {"embed_out.": "lm_head.", ".block_sparse_moe.": ".mlp."}


def stored_in(architecture: Architecture) -> dict[str, Tensor]:
    """Where each parameter is, by a path such as `layers/q_proj`, in a model of transformers."""
    found = FAMILIES[architecture.model_type].tensors(architecture)
    return {path: dataclasses.replace(tensor, name=_in_memory(tensor.name)) for path, tensor in found.items()}


def ties_of(architecture: Architecture) -> dict[str, str]:
    """Tensors that are tied, and to which."""
    copies = FAMILIES[architecture.model_type].copies(architecture)
    return {_in_memory(copy): _in_memory(original) for copy, original in copies.items()}


def _in_memory(name: str) -> str:
    return next((name.replace(old, new) for old, new in _RENAMED.items() if old in name), name)


def parameters_of(architecture: Architecture) -> dict[str, Parameter]:
    """Parameters of one layer and outside the layers, by such paths."""
    layer = {f"layers/{name}": parameter for name, parameter in layer_parameters(architecture).items()}
    return outer_parameters(architecture) | layer


def module_of(name: str) -> str:
    """The module that a tensor belongs to."""
    return name.rsplit(".", 1)[0]


def names_of(architecture: Architecture, tensor: Tensor) -> list[str]:
    """The tensors that a parameter is, one a layer where it is a stack."""
    count = architecture.num_hidden_layers if "{layer}" in tensor.name else 1
    return [tensor.name.format(layer=layer, expert="{expert}") for layer in range(count)]


def modules_of(architecture: Architecture, targets: Sequence[str]) -> dict[str, list[str]]:
    """Which projections lie in each module that has an adapter, by pattern of its name."""
    stored, found = stored_in(architecture), {}
    for target in targets:
        found.setdefault(module_of(stored[f"layers/{target}"].name), []).append(target)
    return found


def outputs_of(architecture: Architecture, module: str) -> int:
    """Outputs of a module, with those of projections that have no adapter."""
    parameters, name = parameters_of(architecture), f"{module}.weight"
    return sum(parameters[path].shape[-1] for path, tensor in stored_in(architecture).items() if tensor.name == name)


def rows_of(architecture: Architecture, target: str) -> Int[np.ndarray, " outputs"]:
    """Which outputs of its module are a projection's."""
    outputs = np.arange(layer_parameters(architecture)[target].shape[-1])
    columns = stored_in(architecture)[f"layers/{target}"].columns
    return outputs if columns is None else columns.of(outputs)


def patterns_of(architecture: Architecture) -> set[str]:
    """Patterns of the names of all modules, that of a tied head among them."""
    return set(map(module_of, [*ties_of(architecture), *(tensor.name for tensor in stored_in(architecture).values())]))


def ending_of(architecture: Architecture, module: str) -> str:
    """The shortest end of a pattern that no other module's name ends with."""
    words, others = module.split("."), patterns_of(architecture) - {module}
    ends = (".".join(words[-count:]) for count in range(1, len(words) + 1))
    return next(end for end in ends if not any(other.endswith(end) for other in others))


def whole_of(architecture: Architecture, lora: Lora) -> dict[str, Tensor]:
    """Where what is trained whole is stored, by path."""
    return {path: tensor for path, tensor in stored_in(architecture).items() if lora.trains(path)}


def copies_of(architecture: Architecture, lora: Lora) -> dict[str, str]:
    """Tensors that are in a file a second time, as PEFT does not tie by itself, and the first of each."""
    return ties_of(architecture) if "embed_tokens" in lora.whole else {}
