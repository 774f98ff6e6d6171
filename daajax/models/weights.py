"""Weights in and out: safetensors to sharded parameters, and parameters to a directory that transformers loads.

Each device's part of a parameter is read from the files on its own, so that no whole tensor is held that is not needed
whole. Only safetensors are opened.
"""

import contextlib
import dataclasses
import hashlib
import json
import pathlib
import shutil
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import flax.traverse_util as traverse
import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from daajax.console import say
from daajax.data.tokenizer import TOKENIZER_FILES
from daajax.errors import UserError
from daajax.models.families import FAMILIES, Architecture, Tensor

Params = dict[str, Any]
Flat = dict[str, Any]  # the leaves of Params by path

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_FLOATS = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": jnp.bfloat16}
_SHARD_BYTES = 5_000_000_000
_ROWS = 4096  # of a matrix, compared at once
# What a model directory holds besides weights and what makes it loadable elsewhere; carried along unchanged.
_COMPANIONS = ("config.json", "generation_config.json", "LICENSE*", "NOTICE*")


class Directory:
    """The safetensors of one model directory: one file, or several with an index.

    Args:
        path: The directory.

    Raises:
        UserError: If there are none, or the index is broken or points outside the directory.
    """

    def __init__(self, path: str):
        self._root = pathlib.Path(path)
        self._stack = contextlib.ExitStack()
        self._open: dict[str, Any] = {}
        self.file_of = self._files()

    def _files(self) -> dict[str, str]:
        if (self._root / _INDEX).is_file():
            try:
                text = (self._root / _INDEX).read_text(encoding="utf-8")
                weight_map = json.loads(text, object_pairs_hook=_without_duplicates)["weight_map"]
                names = {name: str(file) for name, file in weight_map.items()}
            except (ValueError, KeyError, TypeError, AttributeError):
                raise UserError(f"{self._root / _INDEX} is not an index of safetensors; fetch it again.") from None
            for file in sorted(set(names.values())):
                if pathlib.Path(file).name != file or not file.endswith(".safetensors"):
                    raise UserError(
                        f"{self._root / _INDEX} names {file!r}; only .safetensors files beside it are opened."
                    )
            for file in sorted(set(names.values())):
                listed, found = {name for name in names if names[name] == file}, set(self._handle(file).keys())
                if listed != found:
                    raise UserError(
                        f"{self._root / file} and {_INDEX} disagree on tensor {min(listed ^ found)!r}, which only one "
                        "of them has there; fetch both again."
                    )
            return names
        if (self._root / _SINGLE).is_file():
            return dict.fromkeys(self._handle(_SINGLE).keys(), _SINGLE)
        others = sorted(
            p.name for p in self._root.glob("*") if p.suffix in (".bin", ".pt", ".pth", ".gguf", ".msgpack")
        )
        found = (
            f"found {', '.join(others)}, which are not opened; convert them with save_pretrained"
            if others
            else "found none"
        )
        raise UserError(
            f"{self._root} needs {_SINGLE} or {_INDEX}; {found}. model.random_init=True draws fresh weights instead."
        )

    def _handle(self, file: str) -> Any:
        if file not in self._open:
            path = self._root / file
            if not path.is_file():
                raise UserError(f"{path} is missing, though {_INDEX} names it; fetch it again.")
            try:
                self._open[file] = self._stack.enter_context(safetensors.safe_open(str(path), framework="numpy"))
            except (safetensors.SafetensorError, OSError, ValueError) as error:
                raise UserError(f"{path} is not a readable safetensors file ({error}); fetch it again.") from None
        return self._open[file]

    def slice(self, name: str) -> Any:
        """A tensor as something that knows `get_shape`, `get_dtype` and slicing, and reads only what is sliced."""
        return self._handle(self.file_of[name]).get_slice(name)

    def __enter__(self) -> "Directory":
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object as a dict; of a key that comes twice, Python's json would keep the last."""
    if len(dict(pairs)) != len(pairs):
        raise ValueError("a key comes twice")
    return dict(pairs)


def load(path: str, architecture: Architecture, shapes: Params, shardings: Params) -> Params:
    """Reads a model directory into sharded parameters.

    Args:
        path: The directory.
        architecture: What its `config.json` says.
        shapes: Shape and dtype wanted of every parameter.
        shardings: Where every parameter lives.

    Raises:
        UserError: If tensors are missing, extra, of another shape, not floats, or differ from what they are tied to.
    """
    check(path, architecture, shapes)
    stored = _stored(architecture)
    with Directory(path) as directory:
        _check_copies(path, directory, architecture)
        flat_shapes, flat_shardings = _flat(shapes), _flat(shardings)
        params = {}
        for name, shape in flat_shapes.items():
            read = _reader(directory, stored[name], shape.dtype)
            params[name] = jax.make_array_from_callback(shape.shape, flat_shardings[name], read)
        jax.block_until_ready(params)
    return traverse.unflatten_dict(params, sep="/")


def check(path: str, architecture: Architecture, shapes: Params) -> None:
    """Refuses a model directory whose files cannot be these parameters; reads none of their values.

    Args:
        path: The directory.
        architecture: What its `config.json` says.
        shapes: Shape wanted of every parameter.

    Raises:
        UserError: If tensors are missing, extra, of another shape or not floats.
    """
    stored = _stored(architecture)
    with Directory(path) as directory:
        _check_names(path, directory, architecture, _names(stored))
        for name, shape in _flat(shapes).items():
            _check_shapes(path, directory, stored[name], shape.shape)


@dataclasses.dataclass(frozen=True)
class _Stored:
    """The tensors that make up one parameter: one, or a stack of one a layer."""

    tensors: list[Tensor]
    stacked: bool


def _stored(architecture: Architecture) -> dict[str, _Stored]:
    stored = {}
    for name, tensor in FAMILIES[architecture.model_type].tensors(architecture).items():
        stacked = "{layer}" in tensor.name
        layers = range(architecture.num_hidden_layers if stacked else 1)
        stored[name] = _Stored([Tensor(tensor.name.format(layer=n), tensor.transposed) for n in layers], stacked)
    return stored


def _flat(tree: Params) -> Flat:
    return traverse.flatten_dict(tree, sep="/")


def _names(stored: dict[str, _Stored]) -> set[str]:
    return {tensor.name for parameter in stored.values() for tensor in parameter.tensors}


def _check_names(path: str, directory: Directory, architecture: Architecture, needed: set[str]) -> None:
    family = FAMILIES[architecture.model_type]
    missing = sorted(needed - set(directory.file_of))
    spare = set(directory.file_of) - needed - set(family.copies(architecture))
    extra = sorted(name for name in spare if not family.ignored(name))
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
        copy, kept = directory.slice(name), directory.slice(original)
        rows = copy.get_shape()[0]
        blocks = (slice(row, min(row + _ROWS, rows)) for row in range(0, rows, _ROWS))
        if copy.get_shape() != kept.get_shape() or any((copy[block] != kept[block]).any() for block in blocks):
            raise UserError(
                f"{path}: tensor {name} differs from {original}, though config.json ties the two; "
                "set tie_word_embeddings to false there, or remove the one that is not meant."
            )


def _check_shapes(path: str, directory: Directory, stored: _Stored, shape: tuple[int, ...]) -> None:
    each = shape[1:] if stored.stacked else shape
    for tensor in stored.tensors:
        found = directory.slice(tensor.name)
        wanted = tuple(reversed(each)) if tensor.transposed else each
        if tuple(found.get_shape()) != wanted:
            raise UserError(
                f"{path}: tensor {tensor.name} has shape {tuple(found.get_shape())}, config.json asks for {wanted}."
            )
        if found.get_dtype() not in _FLOATS:
            raise UserError(f"{path}: tensor {tensor.name} is {found.get_dtype()}; {', '.join(_FLOATS)} are read.")


def _reader(directory: Directory, stored: _Stored, dtype: Any) -> Callable[[Any], np.ndarray]:
    """What reads the part of a parameter that an index asks for, once for all devices that hold it."""
    parts: dict[tuple[tuple[int | None, int | None], ...], np.ndarray] = {}

    def one(tensor: Tensor, index: tuple[slice, ...]) -> np.ndarray:
        part = directory.slice(tensor.name)[tuple(reversed(index)) if tensor.transposed else index]
        return (part.T if tensor.transposed else part).astype(dtype)

    def read(index: tuple[slice, ...]) -> np.ndarray:
        key = tuple((part.start, part.stop) for part in index)  # a slice itself is no key before Python 3.12
        if key not in parts:
            if stored.stacked:
                parts[key] = np.stack([one(tensor, index[1:]) for tensor in stored.tensors[index[0]]])
            else:
                parts[key] = one(stored.tensors[0], index)
        return parts[key]

    return read


def save(path: str, params: Params, architecture: Architecture, *, model_path: str, tokenizer_path: str) -> None:
    """Writes a model directory that transformers loads; it appears whole or not at all.

    Weights take the dtype of the directory the model came from, so that a bfloat16 model stays one; without weights
    there, they keep theirs, as does a tensor that its dtype cannot hold. Config, tokenizer, chat template and
    generation config are copied unchanged.

    Args:
        path: Directory to make; an existing one is replaced.
        params: The parameters.
        architecture: What they are of.
        model_path: Directory the model came from.
        tokenizer_path: Directory the tokenizer came from.

    Raises:
        UserError: If the disk does not take it.
    """
    try:
        _save(pathlib.Path(path), params, architecture, model_path, tokenizer_path)
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(f"{path} cannot be written ({error}); make room, or name another folder.") from None


def _save(
    target: pathlib.Path, params: Params, architecture: Architecture, model_path: str, tokenizer_path: str
) -> None:
    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    _write_tensors(partial, _tensors(params, architecture, _dtypes(model_path, architecture)))
    for source, patterns in ((model_path, _COMPANIONS), (tokenizer_path, TOKENIZER_FILES)):
        for file in (file for pattern in patterns for file in pathlib.Path(source).glob(pattern) if file.is_file()):
            copy = partial / file.relative_to(source)
            copy.parent.mkdir(exist_ok=True)
            shutil.copyfile(file, copy)
    aside = target.with_name(target.name + ".old")
    if target.exists():  # set aside first, so that there is always a whole one
        shutil.rmtree(aside, ignore_errors=True)
        target.rename(aside)
    partial.rename(target)
    shutil.rmtree(aside, ignore_errors=True)


def _dtypes(model_path: str, architecture: Architecture) -> dict[str, Any]:
    """Dtype of each stored tensor; empty where the directory holds no weights."""
    if not any((pathlib.Path(model_path) / name).is_file() for name in (_SINGLE, _INDEX)):
        return {}
    with Directory(model_path) as directory:
        names = _names(_stored(architecture)) & set(directory.file_of)
        return {name: _FLOATS[directory.slice(name).get_dtype()] for name in names}


def _tensors(params: Params, architecture: Architecture, dtypes: dict[str, Any]) -> Iterator[tuple[str, np.ndarray]]:
    """The tensors of a directory, one at a time, on the host."""
    flat = _flat(params)
    for name, stored in _stored(architecture).items():
        for layer, tensor in enumerate(stored.tensors):
            value = np.asarray(flat[name][layer] if stored.stacked else flat[name])
            value = np.ascontiguousarray(value.T if tensor.transposed else value)
            dtype = np.dtype(dtypes.get(tensor.name, value.dtype))
            if np.abs(value).max(initial=0) > float(jnp.finfo(dtype).max):
                say(f"tensor {tensor.name} is stored in {value.dtype}: it has values beyond {dtype}")
                dtype = value.dtype
            yield tensor.name, value.astype(dtype)


def _write_tensors(folder: pathlib.Path, tensors: Iterator[tuple[str, np.ndarray]]) -> None:
    shards: list[list[str]] = []
    shard: dict[str, np.ndarray] = {}
    size = total = 0

    def flush() -> None:
        file = folder / f"part-{len(shards)}"
        safetensors.numpy.save_file(shard, file, metadata={"format": "pt"})
        file.chmod(0o644)  # safetensors makes it the owner's alone
        shards.append(list(shard))
        shard.clear()

    for name, value in tensors:
        if shard and size + value.nbytes > _SHARD_BYTES:
            flush()
            size = 0
        shard[name] = value
        size += value.nbytes
        total += value.nbytes
    flush()
    if len(shards) == 1:
        (folder / "part-0").rename(folder / _SINGLE)
        return
    weight_map = {}
    for index, names in enumerate(shards):
        file = f"model-{index + 1:05d}-of-{len(shards):05d}.safetensors"
        (folder / f"part-{index}").rename(folder / file)
        weight_map |= dict.fromkeys(names, file)
    text = json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2, sort_keys=True)
    (folder / _INDEX).write_text(text + "\n", encoding="utf-8")


def digest(params: Params) -> str:
    """What the weights are, whatever files, shards or mesh they came through: equal digests mean equal values.

    Every element's bits are mixed with its position and summed modulo 2³², twice with different constants; such sums
    are the same in any order, so each device sums what it has.
    """
    flat = _flat(params)
    hashed = hashlib.sha256()
    for name, sums in sorted(leaf_digests(flat).items()):
        hashed.update(f"{name}:{flat[name].dtype}{flat[name].shape}:{sums};".encode())
    return hashed.hexdigest()


def leaf_digests(arrays: Mapping[str, jax.Array]) -> dict[str, str]:
    """The digest of each array's values; their types have two or four bytes."""
    sums = jax.device_get(_mix_all(dict(arrays)))
    return {name: "-".join(f"{int(value):08x}" for value in pair) for name, pair in sums.items()}


@jax.jit
def _mix_all(arrays: dict[str, jax.Array]) -> dict[str, jax.Array]:
    return {name: _mix(x) for name, x in arrays.items()}


def _mix(x: jax.Array) -> jax.Array:
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32 if x.dtype.itemsize == 4 else jnp.uint16).astype(jnp.uint32)
    position = jnp.zeros(x.shape, jnp.uint32)
    for axis, size in enumerate(x.shape):
        position = position * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
    sums = []
    for odd in (0x9E3779B1, 0x85EBCA77):
        mixed = (bits ^ (position * jnp.uint32(odd))) * jnp.uint32(0xC2B2AE3D)
        mixed = (mixed ^ (mixed >> 15)) * jnp.uint32(odd)
        sums.append((mixed ^ (mixed >> 13)).sum(dtype=jnp.uint32))
    return jnp.stack(sums)
