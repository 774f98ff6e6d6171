"""Weights from a seed, and what bitsandbytes quantizes them to.

bitsandbytes and torch are needed only to compute the numbers again:

    python -m tests.oracle.make_quantized

writes `tests/oracle/quantized.json`. Its arrays are those of torch's layout, [outputs, inputs], as base64.
"""

import base64
import json
import pathlib
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

FILE = pathlib.Path(__file__).parent / "quantized.json"


class Case(NamedTuple):
    """Normal numbers with outliers, a block and an output of zeros."""

    seed: int
    inputs: int
    outputs: int
    dtype: str


CASES = {  # of NF4: 300 blocks, so that the second group of scales is a short one; less than one group
    "float32": Case(0, 192, 100, "float32"),
    "bfloat16": Case(1, 192, 100, "bfloat16"),
    "small": Case(2, 64, 5, "float32"),
}


def draw(case: Case) -> np.ndarray:
    """A case's weight, [inputs, outputs]."""
    weight = np.random.default_rng(case.seed).standard_normal((case.inputs, case.outputs)) * 0.02
    weight[5, 1], weight[-1, -1] = 3, -0.7
    weight[:64, 2], weight[:, 3] = 0, 0
    return weight.astype(ml_dtypes.bfloat16 if case.dtype == "bfloat16" else np.float32)


def tensor(weight: np.ndarray) -> Any:
    """A weight as torch has it, [outputs, inputs]."""
    import torch

    dtype = torch.bfloat16 if weight.dtype == ml_dtypes.bfloat16 else torch.float32
    return torch.from_numpy(weight.T.astype(np.float32)).to(dtype)


def nf4(weight: np.ndarray) -> dict[str, np.ndarray]:
    """What `quantize_4bit` with compressed statistics does, by the kernels that bitsandbytes has in PyTorch.

    Its CUDA kernels agree with them. The compiled one for CPUs looks the codes of scales up in a coarser table, and
    takes a neighbour of the nearest for up to one scale in a hundred.
    """
    import torch
    from bitsandbytes import functional

    packed, state = functional.quantize_4bit(tensor(weight), blocksize=64, quant_type="nf4")
    mean = state.absmax.mean()
    quantize = torch.ops.bitsandbytes.quantize_blockwise.default
    portable = torch._C.DispatchKey.CompositeExplicitAutograd
    numbers = functional.create_dynamic_map()
    scale_codes, group_scales = quantize._op_dk(portable, state.absmax - mean, numbers, 256)
    groups = functional.QuantState(absmax=group_scales, code=numbers, blocksize=256, dtype=torch.float32)
    outputs = weight.shape[1]
    return {
        "codes": packed.numpy().reshape(outputs, -1),
        "scale_codes": scale_codes.numpy().reshape(outputs, -1),
        "group_scales": group_scales.numpy(),
        "mean_scale": mean.numpy(),
        "scales": (functional.dequantize_blockwise(scale_codes, groups) + mean).numpy().reshape(outputs, -1),
    }


def unpacked(codes: np.ndarray) -> np.ndarray:
    """One code a byte of two, as bitsandbytes lays them: the first in the high half."""
    return np.stack([codes >> 4, codes & 15], axis=-1).reshape(len(codes), -1)


def int8(weight: np.ndarray) -> dict[str, np.ndarray]:
    """What `int8_vectorwise_quant` does, where nothing is set apart as an outlier; it divides 0 by 0, here left out."""
    from bitsandbytes import functional

    codes, absmax, _ = functional.int8_vectorwise_quant(tensor(weight[:, weight.any(axis=0)]))
    return {"codes": codes.numpy(), "absmax": absmax.numpy()}


def dynamic_map() -> np.ndarray:
    """The 256 numbers that a scale's code stands for."""
    from bitsandbytes import functional

    return functional.create_dynamic_map().numpy()


def write(array: np.ndarray) -> dict[str, Any]:
    """An array as JSON holds it."""
    return {"dtype": str(array.dtype), "shape": array.shape, "bytes": base64.b64encode(array.tobytes()).decode()}


def read() -> dict[str, Any]:
    """The committed arrays: `dynamic_map`, and by format and case those that the function of that name returns."""

    def array(found: dict[str, Any]) -> Any:
        if "bytes" not in found:
            return found
        values = np.frombuffer(base64.b64decode(found["bytes"]), found["dtype"])
        return values.reshape(found["shape"])

    return json.loads(FILE.read_text(encoding="utf-8"), object_hook=array)


def main() -> None:
    """Computes and writes the arrays of every case."""
    import bitsandbytes
    import torch

    weights = {name: draw(case) for name, case in CASES.items()}
    made = {
        "made_with": {"bitsandbytes": bitsandbytes.__version__, "torch": torch.__version__},
        "dynamic_map": write(dynamic_map()),
        "nf4": {name: {key: write(value) for key, value in nf4(weight).items()} for name, weight in weights.items()},
        "int8": {"small": {key: write(value) for key, value in int8(weights["small"]).items()}},
    }
    FILE.write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
