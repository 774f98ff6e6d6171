"""Adapters as PEFT stores them: `adapter_config.json` and `adapter_model.safetensors`.

Where a family stores several projections as one (Phi-3's `qkv_proj`), their adapters become one of the sum of their
ranks: A's lie under one another, B's on a diagonal of blocks, and alpha grows so that the scale stays.
"""

import json
import math
import pathlib

import jax
import numpy as np
import safetensors
import safetensors.numpy

from daajax import output
from daajax.errors import UserError
from daajax.models.architecture import Architecture
from daajax.models.decoder import Params
from daajax.models.families import FAMILIES
from daajax.models.lora import COLLECTION, Lora
from daajax.models.storage import Tensor

_CONFIG, _WEIGHTS, _PREFIX = "adapter_config.json", "adapter_model.safetensors", "base_model.model."


def _modules(architecture: Architecture, lora: Lora) -> dict[str, list[tuple[str, Tensor]]]:
    """The modules of a directory that have adapters, by pattern of their name: whose each is."""
    stored, found = FAMILIES[architecture.model_type].tensors(architecture), {}
    for target in lora.targets:
        tensor = stored[f"layers/{target}"]
        found.setdefault(tensor.name.removesuffix(".weight"), []).append((target, tensor))
    return found


def save(path: pathlib.Path, params: Params, architecture: Architecture, lora: Lora, *, base: str) -> None:
    """Writes the adapters of parameters as a PEFT directory.

    Args:
        path: Directory to make.
        params: With the collection of adapters; parameters that are trained whole beside them are not among these.
        architecture: Of the base.
        lora: What the adapters are.
        base: Path or name of the base model.

    Raises:
        UserError: If the disk does not take it.
    """
    adapters = jax.device_get(params[COLLECTION]["layers"])
    tensors: dict[str, np.ndarray] = {}
    ranks, alphas = {}, {}
    for pattern, parts in _modules(architecture, lora).items():
        rank = lora.rank * len(parts)
        if len(parts) > 1:
            name = pattern.rsplit(".", 1)[-1]
            ranks[name] = rank
            alphas[name] = lora.alpha * (math.sqrt(len(parts)) if lora.rslora else len(parts))
        for layer in range(architecture.num_hidden_layers):
            module = _PREFIX + pattern.format(layer=layer)
            a = [adapters[f"{target}_a"][layer].T for target, _ in parts]
            b = [adapters[f"{target}_b"][layer].T for target, _ in parts]
            whole = np.zeros((sum(len(part) for part in b), rank), b[0].dtype)
            for place, ((_, tensor), part) in enumerate(zip(parts, b, strict=True)):
                outputs = np.arange(len(part))
                rows = outputs if tensor.columns is None else tensor.columns.of(outputs)
                whole[rows, place * lora.rank : (place + 1) * lora.rank] = part
            tensors[f"{module}.lora_A.weight"] = np.ascontiguousarray(np.concatenate(a))
            tensors[f"{module}.lora_B.weight"] = whole
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "use_rslora": lora.rslora,
        "target_modules": sorted({pattern.rsplit(".", 1)[-1] for pattern in _modules(architecture, lora)}),
        "rank_pattern": ranks,
        "alpha_pattern": alphas,
        "fan_in_fan_out": not FAMILIES[architecture.model_type].transposed,
        "bias": "none",
        "lora_dropout": 0.0,
        "inference_mode": True,
        "modules_to_save": None,
    }
    try:
        path.mkdir(parents=True, exist_ok=True)
        with output.replacing(path / _WEIGHTS) as scratch:
            safetensors.numpy.save_file(tensors, scratch, metadata={"format": "pt"})
        (path / _CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(f"{path} cannot be written ({error}); make room, or name another folder.") from None
