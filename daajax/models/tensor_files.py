"""The safetensors of a model directory, opened as they are needed. Nothing else is opened, so no file can run code."""

import contextlib
import json
import pathlib
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
import safetensors

from daajax.errors import UserError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
STORED = ("*.safetensors", "*.safetensors.index.json")  # files with weights
FLOATS = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": jnp.bfloat16}
_ROWS = 4096  # of a matrix, compared at once
SECOND_COPY = "consolidated*"  # the same weights once more, in some directories, for their authors' own programs


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
        if (self._root / INDEX).is_file():
            try:
                text = (self._root / INDEX).read_text(encoding="utf-8")
                weight_map = json.loads(text, object_pairs_hook=_without_duplicates)["weight_map"]
                names = {name: str(file) for name, file in weight_map.items()}
            except (ValueError, KeyError, TypeError, AttributeError):
                raise UserError(f"{self._root / INDEX} is not an index of safetensors; fetch it again.") from None
            for file in sorted(set(names.values())):
                if pathlib.Path(file).name != file or not file.endswith(".safetensors"):
                    raise UserError(
                        f"{self._root / INDEX} names {file!r}; only .safetensors files beside it are opened."
                    )
            for file in sorted(set(names.values())):
                listed, found = {name for name in names if names[name] == file}, set(self._handle(file).keys())
                if listed != found:
                    raise UserError(
                        f"{self._root / file} and {INDEX} disagree on tensor {min(listed ^ found)!r}, which only one "
                        "of them has there; fetch both again."
                    )
            return names
        if (self._root / SINGLE).is_file():
            return dict.fromkeys(self._handle(SINGLE).keys(), SINGLE)
        others = sorted(
            p.name for p in self._root.glob("*") if p.suffix in (".bin", ".pt", ".pth", ".gguf", ".msgpack")
        )
        found = (
            f"found {', '.join(others)}, which are not opened; convert them with save_pretrained"
            if others
            else "found none"
        )
        raise UserError(
            f"{self._root} needs {SINGLE} or {INDEX}; {found}. model.random_init=True draws fresh weights instead."
        )

    def _handle(self, file: str) -> Any:
        if file not in self._open:
            path = self._root / file
            if not path.is_file():
                raise UserError(f"{path} is missing, though {INDEX} names it; fetch it again.")
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


def differ(one: Any, other: Any) -> bool:
    """Whether two tensors, as `Directory.slice` gives them, hold different values; a few rows are read at a time."""
    if one.get_shape() != other.get_shape():
        return True
    rows = one.get_shape()[0]
    blocks = (slice(row, min(row + _ROWS, rows)) for row in range(0, rows, _ROWS))
    return any((one[block] != other[block]).any() for block in blocks)


def once(read: Callable[[Any], np.ndarray]) -> Callable[[Any], np.ndarray]:
    """What reads the part of an array that an index asks for once for all devices that hold it."""
    parts: dict[tuple[tuple[int | None, int | None], ...], np.ndarray] = {}

    def found(index: tuple[slice, ...]) -> np.ndarray:
        key = tuple((part.start, part.stop) for part in index)  # a slice itself is no key before Python 3.12
        if key not in parts:
            parts[key] = read(index)
        return parts[key]

    return found


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object as a dict; of a key that comes twice, Python's json would keep the last."""
    if len(dict(pairs)) != len(pairs):
        raise ValueError("a key comes twice")
    return dict(pairs)
