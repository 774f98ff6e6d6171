"""Adapters as PEFT stores them: `adapter_config.json` and `adapter_model.safetensors`, in and out.

Where a family stores several projections as one module (Phi-3's `qkv_proj`), PEFT has one adapter for all of them. One
that PEFT trained becomes adapters of each with the same A. Ours become one of the sum of their ranks: A's lie under one
another, B's on a diagonal of blocks, alpha grows so that the scale stays, and the file's metadata has a note of it, so
that they are read again as they were.
"""

import contextlib
import dataclasses
import json
import math
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import flax.traverse_util as traverse
import jax
import numpy as np
import safetensors
import safetensors.numpy

from daajax import bucket, output, processes, sharding
from daajax.data.tokenizer import TOKENIZER_FILES
from daajax.errors import UserError
from daajax.models.architecture import Architecture
from daajax.models.families import FAMILIES
from daajax.models.lora import COLLECTION, Lora, targets_of
from daajax.models.peft_config import CONFIG, PeftConfig
from daajax.models.peft_modules import (
    copies_of,
    ending_of,
    module_of,
    modules_of,
    names_of,
    outputs_of,
    parameters_of,
    patterns_of,
    rows_of,
    stored_in,
    ties_of,
    whole_of,
)
from daajax.models.tensor_files import FLOATS, differ, once

Params = dict[str, Any]

WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_NOTE = "daajax.projections"  # in the metadata of our files: the projections whose adapters lie in blocks


def save(path: str, params: Params, architecture: Architecture, lora: Lora, *, base: str, tokenizer_path: str) -> None:
    """Writes what was trained as a directory that PEFT loads; it appears whole or not at all.

    Args:
        path: Directory to make; an existing one is replaced.
        params: What was trained; others among them are not read.
        architecture: Of the base.
        lora: What was trained.
        base: The base model as `model.path` names it; PEFT is given its name on the Hub where it has one.
        tokenizer_path: Directory the tokenizer came from.

    Raises:
        UserError: If PEFT cannot hold it, or the disk does not take it.
    """
    check(architecture, lora)
    found = tensors(params, architecture, lora)
    target = bucket.path_of(path, "--output")
    processes.first_alone(lambda: _write(target, found, architecture, lora, base, tokenizer_path))


def _write(
    path: bucket.Path,
    tensors: Mapping[str, np.ndarray],
    architecture: Architecture,
    lora: Lora,
    base: str,
    tokenizer_path: str,
) -> None:
    try:
        with output.replacing_folder(path, last=CONFIG) as folder:
            file = folder / WEIGHTS
            metadata = {"format": "pt", _NOTE: " ".join(lora.targets)}
            safetensors.numpy.save_file(dict(tensors), file, metadata=metadata)
            file.chmod(0o644)  # safetensors makes it the owner's alone
            text = json.dumps(_config(architecture, lora, base), indent=2)
            (folder / CONFIG).write_text(text + "\n", encoding="utf-8")
            output.copy(tokenizer_path, TOKENIZER_FILES, folder)
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(f"{path} cannot be written ({error}); make room, or name another folder.") from None


def check(architecture: Architecture, lora: Lora) -> None:
    """Refuses what no PEFT directory can hold.

    Raises:
        UserError: If a parameter that is trained whole is a part of a module, or is no module of its own.
    """
    for path, tensor in whole_of(architecture, lora).items():
        name = path.rsplit("/", 1)[-1]
        if tensor.columns is not None or "{expert}" in tensor.name:
            raise UserError(
                f"{name} is trained whole, but is no module of its own in a {architecture.model_type}, as PEFT needs "
                "it; leave it out."
            )


def tensors(params: Params, architecture: Architecture, lora: Lora) -> dict[str, np.ndarray]:
    """What a PEFT directory's file holds, by name, on the host; arguments as of `save`."""
    flat: dict[str, Any] = traverse.flatten_dict(params, sep="/")
    found: dict[str, np.ndarray] = {}
    for module, targets in modules_of(architecture, lora.targets).items():
        for layer in range(architecture.num_hidden_layers):
            a, b = (
                [sharding.fetch(flat[f"{COLLECTION}/layers/{target}_{side}"][layer]).T for target in targets]
                for side in "ab"
            )
            whole = np.zeros((outputs_of(architecture, module), lora.rank * len(targets)), b[0].dtype)
            for place, (target, part) in enumerate(zip(targets, b, strict=True)):
                whole[rows_of(architecture, target), place * lora.rank : (place + 1) * lora.rank] = part
            name = _PREFIX + module.format(layer=layer)
            found[f"{name}.lora_A.weight"] = np.ascontiguousarray(np.concatenate(a))
            found[f"{name}.lora_B.weight"] = whole
    for path, tensor in whole_of(architecture, lora).items():
        for layer, name in enumerate(names_of(architecture, tensor)):
            value = sharding.fetch(flat[path][layer] if "{layer}" in tensor.name else flat[path])
            found[_PREFIX + name] = np.ascontiguousarray(value.T if tensor.transposed else value)
    for copy, original in copies_of(architecture, lora).items():
        found[_PREFIX + copy] = found[_PREFIX + original]
    return found


def _config(architecture: Architecture, lora: Lora, base: str) -> dict[str, Any]:
    modules, stored = modules_of(architecture, lora.targets), stored_in(architecture)
    whole = {module_of(stored[path].name) for path in whole_of(architecture, lora)}
    whole |= {module_of(copy) for copy in copies_of(architecture, lora)}
    parts = {ending_of(architecture, module): len(targets) for module, targets in modules.items() if len(targets) > 1}
    name, _, revision = base.removeprefix("hf://").partition("@") if base.startswith("hf://") else (base, "", "")
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": name,
        "revision": revision or None,
        "r": lora.rank,
        "lora_alpha": int(lora.alpha) if lora.alpha == int(lora.alpha) else lora.alpha,
        "use_rslora": lora.rslora,
        "target_modules": sorted(ending_of(architecture, module) for module in modules),
        "rank_pattern": {module: lora.rank * count for module, count in parts.items()},
        "alpha_pattern": {
            module: lora.alpha * (math.sqrt(count) if lora.rslora else count) for module, count in parts.items()
        },
        "modules_to_save": sorted(ending_of(architecture, module) for module in whole) or None,
        "ensure_weight_tying": bool(copies_of(architecture, lora)),
        "fan_in_fan_out": not FAMILIES[architecture.model_type].transposed,
        "bias": "none",
        "lora_dropout": 0.0,
        "inference_mode": True,
    }


def read(path: str, architecture: Architecture) -> Lora:
    """What was trained, as a PEFT directory says; none of its values is read.

    Args:
        path: The directory.
        architecture: Of the base.

    Raises:
        UserError: If there is none, it asks for something that is not supported, or it is of another base.
    """
    config = PeftConfig.read(path)
    with _opened(path) as file:
        try:
            lora = _lora(config, _note(file), architecture)
            check(architecture, lora)
        except UserError as error:
            raise UserError(f"{path}: {error}") from None
        _check_tensors(path, file, _shapes(config, architecture, lora))
    return lora


def _lora(config: PeftConfig, note: tuple[str, ...], architecture: Architecture) -> Lora:
    """What a config asks for, given the projections whose adapters lie in blocks."""
    layers, targets, ranks = range(architecture.num_hidden_layers), [], []
    there = targets_of(architecture, ["all-linear"])
    if foreign := [name for name in note if name not in there]:
        raise UserError(
            f"it has an adapter of {foreign[0]}, but a {architecture.model_type} has {', '.join(there)}; it is of "
            "another base."
        )
    for module, parts in modules_of(architecture, note or there).items():
        names = [module.format(layer=layer) for layer in layers if config.targets(module.format(layer=layer))]
        if names and len(names) < len(layers):
            raise UserError(
                f"{module} has an adapter in {len(names)} of {len(layers)} layers; adapters in all of them are needed."
            )
        targets += parts if names else []
        blocks = len(parts) if note else 1
        for rank, scale in map(config.rank_and_scale, names):
            if rank % blocks:
                raise UserError(f"{module} has rank {rank}, which does not divide into its {blocks} projections.")
            ranks.append((rank // blocks, scale))
    if not targets:
        raise UserError(f"target_modules={config.targeted!r} names no projection of a {architecture.model_type}.")
    (rank, scale), scales = max(ranks), sorted(scale for _, scale in ranks)
    if not math.isclose(scales[0], scales[-1], rel_tol=1e-6):
        raise UserError(
            f"rank_pattern and alpha_pattern weigh adapters with {scales[0]:g} to {scales[-1]:g}; one scale is needed."
        )
    lora = Lora(rank, config.alpha, targets_of(architecture, targets), config.rslora, _saved(config, architecture))
    if not math.isclose(lora.scale, scale, rel_tol=1e-6):  # every module has a pattern
        lora = dataclasses.replace(lora, alpha=lora.alpha * scale / lora.scale)
    return lora


def _saved(config: PeftConfig, architecture: Architecture) -> tuple[str, ...]:
    """The parameters that are trained whole."""
    stored, layers = stored_in(architecture), range(architecture.num_hidden_layers)
    saved = config.saved(
        {pattern.format(layer=layer, expert="*") for pattern in patterns_of(architecture) for layer in layers}
    )
    for copy, original in ties_of(architecture).items():
        tied = {module_of(copy), module_of(original)}
        if len(tied & saved) == 1 and not config.ties:
            raise UserError(
                f"{(tied & saved).pop()} is trained whole, {(tied - saved).pop()} is not, though the base ties them; "
                "add it to modules_to_save with the same values, or untie the base."
            )
        saved |= tied if tied & saved else set()
    paths = [path for path, tensor in stored.items() if set(map(module_of, names_of(architecture, tensor))) & saved]
    return tuple(dict.fromkeys(path.rsplit("/", 1)[-1].removesuffix("_bias") for path in paths))


def _shapes(config: PeftConfig, architecture: Architecture, lora: Lora) -> dict[str, tuple[int, ...]]:
    """The tensors of a directory that was read."""
    parameters, stored = parameters_of(architecture), stored_in(architecture)
    found = {}
    for module, targets in modules_of(architecture, lora.targets).items():
        for layer in range(architecture.num_hidden_layers):
            name = module.format(layer=layer)
            rank, inputs = config.rank_and_scale(name)[0], parameters[f"layers/{targets[0]}"].shape[0]
            found[f"{_PREFIX}{name}.lora_A.weight"] = (rank, inputs)
            found[f"{_PREFIX}{name}.lora_B.weight"] = (outputs_of(architecture, module), rank)
    for path in whole_of(architecture, lora):
        shape = parameters[path].shape
        for name in names_of(architecture, stored[path]):
            found[_PREFIX + name] = tuple(reversed(shape)) if stored[path].transposed else shape
    return found | {_PREFIX + one: found[_PREFIX + other] for one, other in copies_of(architecture, lora).items()}


def _check_tensors(path: str, file: Any, shapes: Mapping[str, tuple[int, ...]]) -> None:
    there = set(file.keys())
    for names, problem in ((shapes.keys() - there, "lacks"), (there - shapes.keys(), "has unexpected")):
        if names:
            shown = ", ".join(sorted(names)[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            raise UserError(f"{path} {problem} tensors for its {CONFIG} and this base: {shown}.")
    for name, shape in shapes.items():
        found = file.get_slice(name)
        if tuple(found.get_shape()) != shape:
            raise UserError(
                f"{path}: tensor {name} has shape {tuple(found.get_shape())}, {CONFIG} and the base ask for {shape}; "
                "the adapter is of another base, or its rank is another one."
            )
        if found.get_dtype() not in FLOATS:
            raise UserError(f"{path}: tensor {name} is {found.get_dtype()}; {', '.join(FLOATS)} are read.")


def load(path: str, architecture: Architecture, lora: Lora, shapes: Params, shardings: Params) -> Params:
    """Reads what was trained into sharded parameters: adapters, and what was trained whole.

    Args:
        path: The directory.
        architecture: Of the base.
        lora: What `read` said of it.
        shapes: Shape and dtype wanted of every parameter, at least of those.
        shardings: Where every parameter lives.

    Raises:
        UserError: If the file cannot be read, or what the base ties has different values.
    """
    shapes, shardings = (traverse.flatten_dict(tree, sep="/") for tree in (shapes, shardings))
    found = {}

    def make(name: str, read: Callable[[Any], np.ndarray]) -> None:
        dtype = shapes[name].dtype
        placed = once(lambda index: read(index).astype(dtype))
        found[name] = jax.make_array_from_callback(shapes[name].shape, shardings[name], placed)

    with _opened(path) as file:
        note = _note(file)
        for copy, original in copies_of(architecture, lora).items():
            if differ(file.get_slice(_PREFIX + copy), file.get_slice(_PREFIX + original)):
                raise UserError(
                    f"{path}: {copy} and {original} were trained apart, though the base ties the two; merge the "
                    "adapter, with tie_word_embeddings false in config.json."
                )
        for module, targets in modules_of(architecture, lora.targets).items():
            names = [_PREFIX + module.format(layer=layer) for layer in range(architecture.num_hidden_layers)]
            if note:
                _check_blocks(path, file, architecture, names, targets)
            for place, target in enumerate(targets):
                block, rows = (place, len(targets)) if note else (0, 1), rows_of(architecture, target)
                for side in "ab":
                    name = f"{COLLECTION}/layers/{target}_{side}"
                    make(name, _reader(file, side, names, shapes[name].shape, block, rows))
        for name, tensor in whole_of(architecture, lora).items():
            slices = [file.get_slice(_PREFIX + one) for one in names_of(architecture, tensor)]
            make(name, _reader_of_whole(slices, tensor.transposed, stacked="{layer}" in tensor.name))
        jax.block_until_ready(found)
    return traverse.unflatten_dict(found, sep="/")


def _check_blocks(path: str, file: Any, architecture: Architecture, names: list[str], targets: list[str]) -> None:
    for name in (f"{name}.lora_B.weight" for name in names if stored_in(architecture)[f"layers/{targets[0]}"].columns):
        b = np.array(file.get_tensor(name))
        own = b.shape[1] // len(targets)
        for place, target in enumerate(targets):
            b[rows_of(architecture, target), place * own : (place + 1) * own] = 0
        if b.any():
            raise UserError(
                f"{path}: tensor {name} has values outside of the blocks that {_NOTE!r} in the file's metadata says it "
                "has; it was changed since: take that out of the metadata."
            )


def _reader(
    file: Any, side: str, names: list[str], shape: tuple[int, ...], block: tuple[int, int], rows: np.ndarray
) -> Callable[[Any], np.ndarray]:
    """What reads one projection's A, [layers, inputs, rank], or B, [layers, rank, outputs].

    Args:
        file: The file.
        side: `a` or `b`.
        names: Of the module that has the adapter, one a layer.
        shape: Of all of it; where the rank is larger than what is stored, there are zeros.
        block: Which part of what is stored along the rank, and how many parts there are.
        rows: Which of the module's outputs are the projection's.
    """

    def one(name: str, index: tuple[slice, slice]) -> np.ndarray:
        part = file.get_slice(f"{name}.lora_{side.upper()}.weight")
        own = part.get_shape()[side == "b"] // block[1]
        ranks = slice(block[0] * own, (block[0] + 1) * own)
        if side == "a":
            inputs, wanted = index
            return np.pad(part[ranks, inputs].T, ((0, 0), (0, shape[-1] - own)))[:, wanted]
        wanted, outputs = index
        own_rows = rows[outputs]
        first = int(own_rows[0])
        values = part[first : int(own_rows[-1]) + 1, ranks][own_rows - first]
        return np.pad(values.T, ((0, shape[-2] - own), (0, 0)))[wanted]

    return lambda index: np.stack([one(name, index[1:]) for name in names[index[0]]])


def _reader_of_whole(slices: list[Any], transposed: bool, *, stacked: bool) -> Callable[[Any], np.ndarray]:
    """What reads a parameter that is one tensor, or one a layer, stacked."""

    def one(part: Any, index: tuple[slice, ...]) -> np.ndarray:
        return part[tuple(reversed(index))].T if transposed else part[index]

    if not stacked:
        return lambda index: one(slices[0], index)
    return lambda index: np.stack([one(part, index[1:]) for part in slices[index[0]]])


@contextlib.contextmanager
def _opened(path: str) -> Iterator[Any]:
    file = pathlib.Path(path) / WEIGHTS
    if not file.is_file():
        others = sorted(other.name for other in file.parent.glob("adapter_model.*"))
        found = (
            f"found {', '.join(others)}, which is not opened; save it with save_pretrained"
            if others
            else "there is none"
        )
        raise UserError(f"{path} needs {WEIGHTS}; {found}.")
    try:
        opened = safetensors.safe_open(str(file), framework="numpy")
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{file} is not a readable safetensors file ({error}); fetch it again.") from None
    with opened as handle:
        yield handle


def _note(file: Any) -> tuple[str, ...]:
    """The projections whose adapters lie in blocks."""
    return tuple((file.metadata() or {}).get(_NOTE, "").split())
