"""Quantized weights against bitsandbytes as installed."""

import jax.numpy as jnp
import numpy as np
import pytest

from daajax.models.quantization import DYNAMIC, FORMATS, NF4
from tests.models.test_quantization import DEQUANTIZE, QUANTIZE, codes_of
from tests.oracle import make_quantized as oracle

torch = pytest.importorskip("torch", reason="torch is not installed: make setup-oracle")
functional = pytest.importorskip("bitsandbytes", reason="it is not installed: make setup-oracle").functional
pytestmark = pytest.mark.oracle

REAL = [
    oracle.Case(3, inputs, outputs, dtype)
    for dtype in ("float32", "bfloat16")
    for inputs, outputs in [(256, 512), (576, 1536), (1536, 576)]
]


@pytest.mark.parametrize("name", oracle.CASES)
def test_the_committed_arrays_are_those_of_bitsandbytes(name):
    weight, committed = oracle.draw(oracle.CASES[name]), oracle.read()
    np.testing.assert_allclose(oracle.dynamic_map(), committed["dynamic_map"], rtol=1e-6)
    made = {"nf4": oracle.nf4(weight)} | ({"int8": oracle.int8(weight)} if name in committed["int8"] else {})
    for kind, arrays in made.items():
        assert arrays.keys() == committed[kind][name].keys()
        for key, array in arrays.items():
            expected = committed[kind][name][key]
            if array.dtype == np.float32:  # sums are in another order on another machine
                np.testing.assert_allclose(array, expected, rtol=1e-6, atol=1e-7)
            else:
                np.testing.assert_array_equal(array, expected)


@pytest.mark.parametrize("case", REAL, ids=str)
def test_nf4_of_a_weight_of_real_size(case):
    weight = oracle.draw(case)
    parts, expected = QUANTIZE["nf4"](jnp.asarray(weight)), oracle.nf4(weight)
    np.testing.assert_array_equal(codes_of(parts), oracle.unpacked(expected["codes"]).T)
    # The mean is a sum in another order: a scale as near to one code as to its neighbour may have either.
    moved = np.abs(np.asarray(parts["scale_codes"], int) - expected["scale_codes"].T)
    assert moved.max() <= 1
    assert moved.mean() < 5e-4
    np.testing.assert_allclose(parts["group_scales"], expected["group_scales"], rtol=1e-6)
    np.testing.assert_allclose(parts["mean_scale"], expected["mean_scale"], rtol=1e-6)


@pytest.mark.parametrize("case", REAL, ids=str)
def test_bitsandbytes_reads_our_nf4_as_we_do(case):
    parts = QUANTIZE["nf4"](jnp.asarray(oracle.draw(case)))
    codes = codes_of(parts).T.reshape(-1, 2)
    packed = torch.from_numpy(codes[:, :1] << 4 | codes[:, 1:])
    groups = functional.QuantState(
        absmax=torch.from_numpy(np.array(parts["group_scales"])),
        code=torch.from_numpy(DYNAMIC),
        blocksize=256,
        dtype=torch.float32,
    )
    for dtype in ("float32", "bfloat16"):
        state = functional.QuantState(
            absmax=torch.from_numpy(np.array(parts["scale_codes"]).T.reshape(-1)),
            shape=torch.Size((case.outputs, case.inputs)),
            dtype=getattr(torch, dtype),
            blocksize=64,
            code=torch.from_numpy(NF4),
            quant_type="nf4",
            offset=torch.from_numpy(np.array(parts["mean_scale"])),
            state2=groups,
        )
        read = functional.dequantize_4bit(packed, state).float().numpy().T
        np.testing.assert_array_equal(DEQUANTIZE["nf4"](parts, jnp.dtype(dtype)).astype(jnp.float32), read)


@pytest.mark.parametrize("case", REAL, ids=str)
def test_our_nf4_is_what_users_of_quantize_4bit_compute_with(case):
    weight = oracle.draw(case)
    packed, state = functional.quantize_4bit(
        oracle.tensor(weight), blocksize=64, compress_statistics=True, quant_type="nf4"
    )
    parts = QUANTIZE["nf4"](jnp.asarray(weight))
    read = np.asarray(DEQUANTIZE["nf4"](parts, jnp.float32))
    theirs = functional.dequantize_4bit(packed, state).float().numpy().T
    # Its kernel for CPUs takes a neighbour for some codes of scales, at most a step of a group's scale away.
    groups = np.repeat(parts["group_scales"], 256)[: weight.size // 64].reshape(case.outputs, -1).T
    step = np.repeat(np.diff(DYNAMIC).max() * groups, 64, axis=0)
    rounding = 2**-8 * np.abs(theirs) if case.dtype == "bfloat16" else 1e-6
    assert (np.abs(read - theirs) <= step + rounding).all()
    assert (np.abs(read - theirs) <= rounding).mean() > 0.98


@pytest.mark.parametrize("case", REAL, ids=str)
def test_int8_of_a_weight_of_real_size(case):
    weight = oracle.draw(case)
    weight = weight[:, weight.any(axis=0)]
    parts, expected = QUANTIZE["int8"](jnp.asarray(weight)), oracle.int8(weight)
    np.testing.assert_array_equal(parts["codes"], expected["codes"].T)
    read = functional.int8_vectorwise_dequant(
        torch.from_numpy(expected["codes"]), torch.from_numpy(expected["absmax"])
    ).numpy()
    np.testing.assert_allclose(FORMATS["int8"].dequantize(parts, jnp.float32), read.T, rtol=3e-7)
