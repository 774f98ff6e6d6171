"""Weights in and out: safetensors to sharded parameters, and parameters to a directory that transformers loads.

Each device's part of a parameter is read from the files on its own, so that no whole tensor is held that is not needed
whole.
"""

import collections
import contextlib
import dataclasses
import itertools
import json
import pathlib
import tempfile
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import flax.traverse_util as traverse
import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from daajax import bucket, output, processes, sharding
from daajax.console import say
from daajax.data.tokenizer import TOKENIZER_FILES
from daajax.errors import UserError
from daajax.models.architecture import Architecture
from daajax.models.families import FAMILIES
from daajax.models.storage import Later, Tensor
from daajax.models.tensor_files import FLOATS, INDEX, SINGLE, Directory, differ, once

Params = dict[str, Any]
Flat = dict[str, Any]  # the leaves of Params by path

_SHARD_BYTES, _BUCKET_SHARD_BYTES = 5_000_000_000, 1_000_000_000  # in a bucket, where a file is one request
CONFIG = "config.json"
# What a model directory holds besides weights and what makes it loadable elsewhere; carried along.
COMPANIONS = (CONFIG, "generation_config.json", "LICENSE*", "NOTICE*")
SMALL = (*COMPANIONS, *TOKENIZER_FILES, "adapter_config.json")  # what is read of a directory besides weights


def load(
    path: str,
    architecture: Architecture,
    shapes: Params,
    shardings: Params,
    keep: Callable[[str, jax.Array], Any] = lambda name, value: value,
) -> Params:
    """Reads a model directory into sharded parameters.

    Args:
        path: The directory.
        architecture: What its `config.json` says.
        shapes: Shape and dtype wanted of every parameter.
        shardings: Where every parameter lives.
        keep: From a parameter's path, such as `layers/q_proj`, and itself, what there shall be of it; it comes before
            the next one is read.

    Raises:
        UserError: If tensors are missing, extra, of another shape, not floats, or differ from what they are tied to.
    """
    check(path, architecture, shapes)
    with Directory(path) as directory:
        stored = _stored(architecture, directory)
        _check_copies(path, directory, architecture)
        flat_shapes, flat_shardings = _flat(shapes), _flat(shardings)
        params = {}
        for name, shape in flat_shapes.items():
            read = _placed(directory, stored[name], shape, flat_shardings[name])
            params[name] = jax.block_until_ready(keep(name, read))
    return traverse.unflatten_dict(params, sep="/")


def later(path: str, architecture: Architecture, shapes: Params, shardings: Params) -> Params:
    """A model directory's parameters, each read when it is asked for, in the dtype of its tensors.

    Where they have several, or float64, it is float32. Arguments and errors are those of `load`.
    """
    check(path, architecture, shapes)
    dtypes, stored, where = _dtypes(path, architecture), _stored(architecture), _flat(shardings)

    def one(name: str, shape: tuple[int, ...]) -> Later:
        found = {np.dtype(dtypes[tensor.name]) for tensor in stored[name].tensors}
        dtype = found.pop() if len(found) == 1 and np.dtype(np.float64) not in found else np.dtype(np.float32)

        def make() -> jax.Array:
            with Directory(path) as directory:
                own = _stored(architecture, directory)[name]
                return jax.block_until_ready(_placed(directory, own, jax.ShapeDtypeStruct(shape, dtype), where[name]))

        return Later(shape, dtype, make)

    return traverse.unflatten_dict({name: one(name, leaf.shape) for name, leaf in _flat(shapes).items()}, sep="/")


def _placed(directory: Directory, stored: "_Stored", shape: jax.ShapeDtypeStruct, where: Any) -> jax.Array:
    """A parameter, read to where it lives."""
    return jax.make_array_from_callback(shape.shape, where, _reader(directory, stored, shape))


def check(path: str, architecture: Architecture, shapes: Params) -> None:
    """Refuses a model directory whose files cannot be these parameters; reads none of their values.

    Args:
        path: The directory.
        architecture: What its `config.json` says.
        shapes: Shape wanted of every parameter.

    Raises:
        UserError: If tensors are missing, extra, of another shape or not floats.
    """
    with Directory(path) as directory:
        stored, whole = _stored(architecture, directory), _shapes(architecture, shapes)
        _check_names(path, directory, architecture, _names(stored))
        for name, parameter in stored.items():
            for tensor in parameter.tensors:
                _check_shape(path, directory, tensor.name, whole[name])


@dataclasses.dataclass(frozen=True)
class _Stored:
    """The tensors that make up one parameter: one, a stack of one a layer, or a stack of stacks of one an expert.

    Attributes:
        tensors: All of them, stacks one after another.
        stacks: The parameter's leading axes, over which they are spread.
        pattern: Name of them all, with places for layer and expert.
    """

    tensors: tuple[Tensor, ...]
    stacks: tuple[int, ...]
    pattern: str


def _stored(architecture: Architecture, directory: Directory | None = None) -> dict[str, _Stored]:
    """How each parameter is stored: in that directory, or in one that we write."""
    stored = {}
    experts = architecture.experts.num_experts if architecture.experts is not None else 1
    for name, tensor in FAMILIES[architecture.model_type].tensors(architecture).items():
        axes = (("{layer}", architecture.num_hidden_layers), ("{expert}", experts))
        stacks, tensors = tuple(size for place, size in axes if place in tensor.name), []
        for index in np.ndindex(stacks):
            own = tensor.name.format(**dict(zip(("layer", "expert"), index, strict=False)))
            tensors.append(dataclasses.replace(tensor, name=_in(directory, architecture, own) or own))
        stored[name] = _Stored(tuple(tensors), stacks, tensor.name)
    return stored


def _in(directory: Directory | None, architecture: Architecture, name: str) -> str | None:
    """What a tensor is called in a directory, which may leave out the family's prefix; None if it is not there."""
    if directory is None:
        return name
    short = name.removeprefix(FAMILIES[architecture.model_type].prefix)
    return next((known for known in (name, short) if known in directory.file_of), None)


def _shapes(architecture: Architecture, shapes: Params) -> dict[str, tuple[int, ...]]:
    """Shape of the tensors that each parameter is stored in; parts of a tensor lie beside one another."""
    flat, stored = _flat(shapes), _stored(architecture)
    outputs = collections.Counter()
    for name, parameter in stored.items():
        outputs[parameter.pattern] += flat[name].shape[-1]
    whole = {}
    for name, parameter in stored.items():
        tensor, shape = parameter.tensors[0], flat[name].shape[len(parameter.stacks) :]
        if tensor.columns is not None:
            shape = (*shape[:-1], outputs[parameter.pattern])
        whole[name] = tuple(reversed(shape)) if tensor.transposed else shape
    return whole


def _flat(tree: Params) -> Flat:
    return traverse.flatten_dict(tree, sep="/")


def _names(stored: dict[str, _Stored]) -> set[str]:
    return {tensor.name for parameter in stored.values() for tensor in parameter.tensors}


def _check_names(path: str, directory: Directory, architecture: Architecture, needed: set[str]) -> None:
    family = FAMILIES[architecture.model_type]
    missing = sorted(needed - set(directory.file_of))
    spare = set(directory.file_of) - needed - set(family.copies(architecture))
    extra = sorted(name for name in spare if not name.endswith(family.ignored))
    for names, problem in ((missing, "lacks"), (extra, "has unexpected")):
        if names:
            shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            raise UserError(
                f"{path} {problem} tensors for its config.json: {shown}; fetch the model again or mend config.json."
            )


def _check_copies(path: str, directory: Directory, architecture: Architecture) -> None:
    """A copy that differs is another model, and transformers would load that one."""
    for name, original in FAMILIES[architecture.model_type].copies(architecture).items():
        if name not in directory.file_of:
            continue
        copy, kept = directory.slice(name), directory.slice(_in(directory, architecture, original) or original)
        if differ(copy, kept):
            raise UserError(
                f"{path}: tensor {name} differs from {original}, though config.json ties the two; "
                "set tie_word_embeddings to false there, or remove the one that is not meant."
            )


def _check_shape(path: str, directory: Directory, name: str, wanted: tuple[int, ...]) -> None:
    found = directory.slice(name)
    if tuple(found.get_shape()) != wanted:
        raise UserError(f"{path}: tensor {name} has shape {tuple(found.get_shape())}, config.json asks for {wanted}.")
    if found.get_dtype() not in FLOATS:
        raise UserError(f"{path}: tensor {name} is {found.get_dtype()}; {', '.join(FLOATS)} are read.")


def _reader(directory: Directory, stored: _Stored, parameter: jax.ShapeDtypeStruct) -> Callable[[Any], np.ndarray]:
    """What reads the part of a parameter that an index asks for."""
    leading, numbers = len(stored.stacks), np.arange(len(stored.tensors)).reshape(stored.stacks)

    def one(tensor: Tensor, index: tuple[slice, ...]) -> np.ndarray:
        picked = slice(None)
        if tensor.columns is not None:
            outputs = tensor.columns.of(np.arange(parameter.shape[-1])[index[-1]])
            index, picked = (*index[:-1], slice(int(outputs[0]), int(outputs[-1]) + 1)), outputs - outputs[0]
        part = directory.slice(tensor.name)[tuple(reversed(index)) if tensor.transposed else index]
        return (part.T if tensor.transposed else part)[..., picked].astype(parameter.dtype)

    def read(index: tuple[slice, ...]) -> np.ndarray:
        chosen = numbers[index[:leading]]
        parts = (one(stored.tensors[number], index[leading:]) for number in chosen.flat)
        first = next(parts)
        whole = np.empty((chosen.size, *first.shape), first.dtype)  # filled one by one: there is no second copy of all
        for place, part in enumerate(itertools.chain([first], parts)):
            whole[place] = part
        return whole.reshape(*chosen.shape, *first.shape)

    return once(read)


def save(path: str, params: Params, architecture: Architecture, *, model_path: str, tokenizer_path: str) -> None:
    """Writes a model directory that transformers loads; it appears whole or not at all.

    Weights take the dtype of the directory the model came from, so that a bfloat16 model stays one; without weights
    there, they keep theirs, as does a tensor that its dtype cannot hold. Config, tokenizer, chat template and
    generation config are copied unchanged, but for code that the config names.

    Args:
        path: Directory to make; an existing one is replaced.
        params: The parameters; those that are made later are, one at a time.
        architecture: What they are of.
        model_path: Directory the model came from.
        tokenizer_path: Directory the tokenizer came from.

    Raises:
        UserError: If the disk does not take it.
    """
    try:
        target = bucket.path_of(path, "--output")
        if isinstance(target, bucket.BucketPath):
            _save_to_bucket(target, params, architecture, model_path, tokenizer_path)
        else:
            _save(target, params, architecture, model_path, tokenizer_path)
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(f"{path} cannot be written ({error}); make room, or name another folder.") from None


def _save(
    target: pathlib.Path, params: Params, architecture: Architecture, model_path: str, tokenizer_path: str
) -> None:
    with contextlib.ExitStack() as stack:
        enter = output.replacing_folder(target, last=CONFIG)
        partial = pathlib.Path(processes.from_first(lambda: str(stack.enter_context(enter))))
        shards = _write_tensors(partial, tensors(params, architecture, _dtypes(model_path, architecture)), _SHARD_BYTES)

        def complete() -> None:
            _name_shards(partial, shards)
            _complete(partial, model_path, tokenizer_path)
            stack.close()

        processes.gathered(None)  # all have written
        processes.first_alone(complete)


def _save_to_bucket(
    target: bucket.BucketPath, params: Params, architecture: Architecture, model_path: str, tokenizer_path: str
) -> None:
    """As `_save`; each process copies what it has written, and the first one then what makes a model of it."""
    with tempfile.TemporaryDirectory(prefix="daajax-") as scratch:
        partial = pathlib.Path(scratch)
        found = tensors(params, architecture, _dtypes(model_path, architecture))
        _name_shards(partial, _write_tensors(partial, found, _BUCKET_SHARD_BYTES))
        processes.first_alone(lambda: output.void(target, CONFIG))
        if not processes.is_first():
            bucket.upload(partial, target)
        processes.gathered(None)  # all have written

        def complete() -> None:
            _complete(partial, model_path, tokenizer_path)
            bucket.upload(partial, target, CONFIG)

        processes.first_alone(complete)


def _complete(folder: pathlib.Path, model_path: str, tokenizer_path: str) -> None:
    """Adds what belongs to a model besides its weights."""
    output.copy(model_path, COMPANIONS, folder)
    output.copy(tokenizer_path, TOKENIZER_FILES, folder)
    _forget_code(folder / CONFIG)


def _forget_code(file: pathlib.Path) -> None:
    """Takes out of a `config.json` what names Python files: they are not carried along, and nobody needs them."""
    config = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    if config.pop("auto_map", None) is not None:
        file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        say(f"{file.name}: auto_map is left out, since the code that it names is not carried along")


def _dtypes(model_path: str, architecture: Architecture) -> dict[str, Any]:
    """Dtype of each stored tensor; empty where the directory holds no weights."""
    if not any((pathlib.Path(model_path) / name).is_file() for name in (SINGLE, INDEX)):
        return {}
    with Directory(model_path) as directory:
        names = ((name, _in(directory, architecture, name)) for name in _names(_stored(architecture)))
        return {ours: FLOATS[directory.slice(theirs).get_dtype()] for ours, theirs in names if theirs is not None}


def tensors(
    params: Params, architecture: Architecture, dtypes: Mapping[str, Any] = types.MappingProxyType({})
) -> Iterator[tuple[str, np.ndarray]]:
    """The tensors of a model directory, one at a time, on the host.

    Args:
        params: The parameters, or anything of their shapes; those that are made later are, one at a time.
        architecture: What they are of.
        dtypes: Of each tensor; one that is not there keeps its own, as does one that its dtype cannot hold.
    """
    flat, whole = _flat(params), _shapes(architecture, params)
    parts: dict[str, list[tuple[str, _Stored]]] = {}  # parameters that share tensors
    for name, stored in _stored(architecture).items():
        parts.setdefault(stored.pattern, []).append((name, stored))
    for shared in parts.values():
        there = {name: flat[name].make() if isinstance(flat[name], Later) else flat[name] for name, _ in shared}
        for number, index in enumerate(np.ndindex(shared[0][1].stacks)):
            values = [(stored.tensors[number], sharding.fetch(there[name][index])) for name, stored in shared]
            tensor, value = values[0]
            if tensor.columns is not None:
                shape = whole[shared[0][0]]
                value = np.empty(tuple(reversed(shape)) if tensor.transposed else shape, value.dtype)
                for part, outputs in values:
                    if part.columns is not None:
                        value[..., part.columns.of(np.arange(outputs.shape[-1]))] = outputs
            value = np.ascontiguousarray(value.T if tensor.transposed else value)
            dtype = np.dtype(dtypes.get(tensor.name, value.dtype))
            if float(np.abs(value).max(initial=0)) > float(jnp.finfo(dtype).max):
                say(f"tensor {tensor.name} is stored in {value.dtype}: it has values beyond {dtype}")
                dtype = value.dtype
            yield tensor.name, value.astype(dtype)


def _write_tensors(folder: pathlib.Path, tensors: Iterator[tuple[str, np.ndarray]], most: int) -> list[dict[str, int]]:
    """Writes files of tensors, each process every so many-th of them; of every file, bytes of each of its tensors.

    Args:
        folder: Where they go.
        tensors: Names and values.
        most: Bytes of a file, unless one tensor has more.
    """
    shards: list[dict[str, int]] = [{}]
    kept: dict[str, np.ndarray] = {}

    def flush() -> None:
        if kept:
            file = folder / f"part-{len(shards) - 1}"
            safetensors.numpy.save_file(kept, file, metadata={"format": "pt"})
            file.chmod(0o644)  # safetensors makes it the owner's alone
            kept.clear()

    for name, value in tensors:
        if shards[-1] and sum(shards[-1].values()) + value.nbytes > most:
            flush()
            shards.append({})
        shards[-1][name] = value.nbytes
        if processes.is_turn(len(shards) - 1):
            kept[name] = value
    flush()
    return shards


def _name_shards(folder: pathlib.Path, shards: list[dict[str, int]]) -> None:
    """Gives the files of tensors their names, those that are in this folder, and writes what lists them."""
    if len(shards) == 1:
        if (folder / "part-0").is_file():
            (folder / "part-0").rename(folder / SINGLE)
        return
    weight_map = {}
    for index, names in enumerate(shards):
        file = f"model-{index + 1:05d}-of-{len(shards):05d}.safetensors"
        if (folder / f"part-{index}").is_file():
            (folder / f"part-{index}").rename(folder / file)
        weight_map |= dict.fromkeys(names, file)
    total = sum(sum(shard.values()) for shard in shards)
    text = json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2, sort_keys=True)
    (folder / INDEX).write_text(text + "\n", encoding="utf-8")
