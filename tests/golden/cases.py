"""Golden files: inputs, hyper-parameters and outputs of published code, one JSON file for each objective."""

import dataclasses
import json
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

TOKEN_INPUTS = "token_inputs.json"  # logits behind the log-probs of the sets `main`; it has no cases
COMMITTED = pathlib.Path(__file__).parent / "cases"
_REQUIRED = object()


class UnreadableError(Exception):
    """A file or case outside the format or the vocabulary; the message says what."""


@dataclasses.dataclass
class Case:
    """One case of a file.

    Attributes:
        file: The file's name.
        index: The case's place in it.
        name: What the file is about.
        hyperparameters: Of the case, in the vocabulary of the files.
        set: The name of its inputs.
        inputs: Arrays by name; none where they are `TOKEN_INPUTS`.
        wanted: Outputs by dotted path, such as `grads.policy_logps`; NaN where the source's number is not finite.
        grad_of: The scalar that gradients are of.
        rtol: Relative tolerance in float64.
        batches: First and last row of each consecutive batch, where the case has several.
        ignored_rows: Rows whose gradients are not compared.
        notes: What the case and its file say about the source.
        folder: Where the file lies.
        left: Hyper-parameters that nothing has understood yet.
    """

    file: str
    index: int
    name: str
    hyperparameters: Mapping[str, Any]
    set: str
    inputs: Mapping[str, np.ndarray]
    wanted: Mapping[str, np.ndarray]
    grad_of: str
    rtol: float
    batches: list[list[int]]
    ignored_rows: list[int]
    notes: str
    folder: pathlib.Path
    left: dict[str, Any] = dataclasses.field(init=False)

    def __post_init__(self):
        self.left = dict(self.hyperparameters)

    def take(self, key: str, default: Any = _REQUIRED) -> Any:
        """Value of a hyper-parameter, which counts as understood from then on."""
        if key not in self.left and default is _REQUIRED:
            raise UnreadableError(f"hyper-parameter {key!r} is missing")
        return self.left.pop(key, default)

    def choose(self, key: str, values: Mapping[Any, Any], default: Any = _REQUIRED) -> Any:
        """What the value of a hyper-parameter stands for."""
        return self.one_of(key, self.take(key, default), values)

    def one_of(self, key: str, value: Any, values: Mapping[Any, Any]) -> Any:
        """What a value that was taken stands for."""
        if value not in values:
            raise UnreadableError(f"hyper-parameter {key}={value!r} is none of {list(values)}")
        return values[value]

    def named(self, **names: str) -> dict[str, Any]:
        """Those of some hyper-parameters that there are, under our names."""
        return {ours: self.left.pop(theirs) for theirs, ours in names.items() if theirs in self.left}

    def tokens(self) -> Mapping[str, np.ndarray]:
        """The logits behind the set `main`: the folder's own, or those committed here."""
        for folder in (self.folder, COMMITTED):
            if (folder / TOKEN_INPUTS).exists():
                return _arrays(_flat(_load(folder / TOKEN_INPUTS)))
        raise UnreadableError(f"{TOKEN_INPUTS} is missing")

    def __str__(self) -> str:
        return f"{self.file} case {self.index} {json.dumps(self.hyperparameters)} on {self.set}"


def read(path: pathlib.Path) -> Iterator[Case | UnreadableError]:
    """Reads the cases of a file; what cannot be read stands in a case's place.

    Raises:
        UnreadableError: If nothing of the file can be read.
    """
    content = _load(path)
    if not isinstance(content, dict) or not isinstance(content.get("cases"), list) or not content["cases"]:
        raise UnreadableError("there is no list of cases in it")
    for index, case in enumerate(content["cases"]):
        try:
            yield _case(path, index, content, case)
        except UnreadableError as error:
            yield UnreadableError(f"case {index}: {error}")
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            yield UnreadableError(f"case {index} is not of the format: {type(error).__name__}: {error}")


def _load(path: pathlib.Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UnreadableError(f"unreadable: {error}") from None


def _case(path: pathlib.Path, index: int, content: dict[str, Any], case: dict[str, Any]) -> Case:
    inputs = content["inputs"].get(case["inputs"])
    if inputs is None and "token" not in case["inputs"]:
        raise UnreadableError(f"there is no set of inputs {case['inputs']!r}")
    outputs = dict(case["outputs"])
    batches = outputs.pop("batches", [])
    nulls = bool(case.get("nonfinite_as_null", False))
    wanted = _arrays(_flat(outputs))
    if not nulls and not all(np.isfinite(values).all() for values in wanted.values()):
        raise UnreadableError("there are nulls among its outputs but it does not say nonfinite_as_null")
    return Case(
        file=path.name,
        index=index,
        name=content.get("name", path.stem),
        hyperparameters=case["hyperparameters"],
        set=case["inputs"],
        inputs=_arrays(_flat(inputs or {})),
        wanted=wanted,
        grad_of=case["grad_of"],
        rtol=float(case["rtol"]),
        batches=batches,
        ignored_rows=list(case.get("ignore_grad_rows", [])),
        notes=" ".join(filter(None, [case.get("note"), content.get("notes")])),
        folder=path.parent,
    )


def _flat(values: Any, prefix: str = "") -> dict[str, Any]:
    """Nested mappings, and lists of mappings, by dotted path."""
    if isinstance(values, list) and values and isinstance(values[0], dict):
        values = {str(place): value for place, value in enumerate(values)}
    if not isinstance(values, dict):
        return {prefix: values}
    paths = {}
    for key, value in values.items():
        paths |= _flat(value, f"{prefix}.{key}" if prefix else key)
    return paths


def _arrays(values: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Numbers as float64, or as integers where all are; null is NaN."""
    arrays = {name: np.asarray(value) for name, value in values.items()}
    return {name: x if x.dtype.kind in "iu" else x.astype(np.float64) for name, x in arrays.items()}
