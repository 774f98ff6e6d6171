import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from daajax import sharding
from daajax.errors import UserError
from daajax.models import quantization
from daajax.models.quantization import DYNAMIC, FORMATS, NF4
from tests.oracle import make_quantized as oracle

AXES = ("layers", "experts", "embed", "heads")
QUANTIZE = {name: jax.jit(kind.quantize) for name, kind in FORMATS.items()}
DEQUANTIZE = {name: jax.jit(kind.dequantize, static_argnums=1) for name, kind in FORMATS.items()}
GOLDEN = oracle.read()

# Where CUDA kernels of bitsandbytes go from one number to the next; a number there belongs below.
BOUNDS = [
    -0.8480964004993439,
    -0.6106329262256622,
    -0.4599952697753906,
    -0.33967943489551544,
    -0.23460740596055984,
    -0.13791173323988914,
    -0.045525018125772476,
    0.03979014977812767,
    0.1202552504837513,
    0.2035212516784668,
    0.2920137718319893,
    0.3893125355243683,
    0.5016634166240692,
    0.6427869200706482,
    0.8614784181118011,
]


def heavy(shape, seed=0, dtype=jnp.float32):
    """Numbers with tails, so that scales differ much."""
    return jnp.asarray(0.02 * np.random.default_rng(seed).standard_t(3, shape), dtype)


def codes_of(parts):
    """Of one matrix in NF4, the code of every weight: byte r of a block has inputs r and r + 32."""
    packed = np.asarray(parts["codes"])
    packed = packed.reshape(-1, 32, packed.shape[-1])
    return np.concatenate([packed >> 4, packed & 15], axis=1).reshape(-1, packed.shape[-1])


def bits(tree):
    return jax.tree.map(lambda x: np.asarray(x).tobytes(), tree)


@pytest.mark.parametrize("name", oracle.CASES)
def test_nf4_has_the_numbers_of_bitsandbytes(name):
    weight, expected = jnp.asarray(oracle.draw(oracle.CASES[name])), GOLDEN["nf4"][name]
    parts = QUANTIZE["nf4"](weight)
    codes = oracle.unpacked(expected["codes"]).T
    np.testing.assert_array_equal(codes_of(parts), codes)
    np.testing.assert_array_equal(parts["scale_codes"], expected["scale_codes"].T)
    # The mean is a sum of 300 numbers in another order; scales are of size 0.1.
    np.testing.assert_allclose(parts["mean_scale"], expected["mean_scale"], rtol=1e-6)
    np.testing.assert_allclose(parts["group_scales"], expected["group_scales"], rtol=1e-6)
    read = DEQUANTIZE["nf4"](parts, jnp.float32)
    scales = np.repeat(expected["scales"].T, 64, axis=0)
    np.testing.assert_allclose(read, NF4[codes] * scales, rtol=0, atol=1e-6)
    rounded = DEQUANTIZE["nf4"](parts, jnp.bfloat16)
    np.testing.assert_array_equal(rounded, read.astype(jnp.bfloat16))


def test_int8_has_the_numbers_of_bitsandbytes():
    weight, expected = oracle.draw(oracle.CASES["small"]), GOLDEN["int8"]["small"]
    parts = QUANTIZE["int8"](jnp.asarray(weight[:, weight.any(axis=0)]))
    np.testing.assert_array_equal(parts["codes"], expected["codes"].T)
    np.testing.assert_allclose(parts["scales"], expected["absmax"] / 127, rtol=1e-7)


def test_the_codes_of_scales_are_the_published_ones():
    decades = [10.0 ** (i - 6) * (0.1 + 0.9 * (np.arange(2**i) + 0.5) / 2**i) for i in range(7)]
    positive = np.concatenate(decades)
    published = np.concatenate([-positive[::-1], [0], positive, [1]])
    np.testing.assert_allclose(DYNAMIC, published, rtol=1.2e-7)
    # bitsandbytes rounds at each step of making them.
    np.testing.assert_allclose(DYNAMIC, GOLDEN["dynamic_map"], rtol=2.4e-7)
    on_device = jax.jit(quantization.dynamic)(jnp.arange(256, dtype=jnp.uint8))
    np.testing.assert_array_equal(on_device, DYNAMIC)


@pytest.mark.parametrize("place", range(len(BOUNDS)))
def test_a_number_between_two_goes_where_bitsandbytes_sends_it(place):
    bound = np.float32(BOUNDS[place])
    near = [np.nextafter(bound, np.float32(-2)), bound, np.nextafter(bound, np.float32(2))]
    block = np.zeros((64, 1), np.float32)
    block[:4, 0] = [*near, 1]
    assert codes_of(QUANTIZE["nf4"](jnp.asarray(block)))[:4, 0].tolist() == [place, place, place + 1, 15]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_nf4_is_a_loop_over_blocks_in_float64(dtype):
    weight = heavy((192, 100), dtype=dtype)
    parts, exact = QUANTIZE["nf4"](weight), np.asarray(weight, np.float64)
    found, scales = codes_of(parts), []
    for output in range(100):
        for block in range(3):
            rows = slice(block * 64, block * 64 + 64)
            scales.append(np.abs(exact[rows, output]).max())
            distances = np.abs(exact[rows, output, None] / scales[-1] - NF4.astype(np.float64))
            chosen = np.take_along_axis(distances, found[rows, output, None].astype(int), axis=1)[:, 0]
            np.testing.assert_allclose(chosen, distances.min(axis=1), rtol=0, atol=1e-7)  # ties within rounding
    mean = np.mean(scales)
    np.testing.assert_allclose(parts["mean_scale"], mean, rtol=1e-6)
    scale_codes = np.asarray(parts["scale_codes"]).T.reshape(-1)
    for group, scale in enumerate(parts["group_scales"]):
        here = slice(group * 256, group * 256 + 256)
        offsets = np.array(scales[here]) - mean
        np.testing.assert_allclose(scale, np.abs(offsets).max(), rtol=1e-5)
        distances = np.abs(offsets[:, None] / np.abs(offsets).max() - DYNAMIC.astype(np.float64))
        chosen = np.take_along_axis(distances, scale_codes[here, None].astype(int), axis=1)[:, 0]
        np.testing.assert_allclose(chosen, distances.min(axis=1), rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_int8_is_a_loop_over_outputs_in_float64(dtype):
    weight = heavy((70, 9), dtype=dtype)
    parts, exact = QUANTIZE["int8"](weight), np.asarray(weight, np.float64)
    for output in range(9):
        scale = np.abs(exact[:, output]).max() / 127
        np.testing.assert_allclose(parts["scales"][output], scale, rtol=1e-6)
        codes = np.asarray(parts["codes"])[:, output]
        assert (np.abs(codes - exact[:, output] / scale) <= 0.5 + 1e-5).all()  # the nearest; ties within rounding
        assert np.abs(codes).max() == 127


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_int8_errs_by_half_a_step_at_most(dtype):
    weight = heavy((256, 96), dtype=dtype)
    parts = QUANTIZE["int8"](weight)
    error = np.abs(np.asarray(DEQUANTIZE["int8"](parts, jnp.float32), np.float64) - np.asarray(weight, np.float64))
    assert (error <= 0.5 * np.asarray(parts["scales"], np.float64) * (1 + 1e-4)).all()
    assert error.max() > 0.49 * np.asarray(parts["scales"]).max()  # outputs reach it


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_nf4_errs_by_half_a_gap_and_what_its_scale_errs_by(dtype):
    weight = heavy((256, 96), dtype=dtype)
    parts, exact = QUANTIZE["nf4"](weight), np.asarray(weight, np.float64)
    absmax = np.abs(exact.reshape(4, 64, 96)).max(axis=1)
    groups = np.repeat(np.asarray(parts["group_scales"], np.float64), 256)[: 4 * 96].reshape(96, 4).T
    half_gap, half_step = np.diff(NF4).max() / 2, np.diff(DYNAMIC).max() / 2
    assert half_gap == pytest.approx((1 - 0.6961928) / 2)
    assert half_step == pytest.approx(0.9 / 64 / 2, rel=1e-5)
    bound = np.repeat(half_gap * absmax + half_step * groups, 64, axis=0)
    error = np.abs(np.asarray(DEQUANTIZE["nf4"](parts, jnp.float32), np.float64) - exact)
    assert (error <= bound * (1 + 1e-5)).all()
    assert (error > 0.8 * bound).any()


@pytest.mark.parametrize("name", FORMATS)
def test_zeros_stay_zeros(name):
    weight = heavy((128, 6)).at[:64, 1].set(0).at[:, 2].set(0).at[7, 4].set(0)
    read = DEQUANTIZE[name](QUANTIZE[name](weight), jnp.float32)
    assert np.isfinite(read).all()
    assert not np.asarray(read)[np.asarray(weight) == 0].any()
    nothing = QUANTIZE[name](jnp.zeros((64, 3)))
    assert not DEQUANTIZE[name](nothing, jnp.bfloat16).any()


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("broken", [np.nan, np.inf])
def test_what_is_not_finite_does_not_become_finite(name, broken):
    weight = heavy((128, 6)).at[3, 2].set(broken)
    assert not np.isfinite(DEQUANTIZE[name](QUANTIZE[name](weight), jnp.float32)[3, 2])


def test_equal_scales_are_their_mean():
    weight = jnp.full((128, 4), 0.25).at[3:9].set(-0.25)
    np.testing.assert_array_equal(DEQUANTIZE["nf4"](QUANTIZE["nf4"](weight), jnp.float32), weight)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("shape", [(64, 3), (2, 128, 5), (3, 2, 192, 100)])
def test_parts_say_what_quantize_makes(name, shape):
    parts = FORMATS[name].parts(shape, AXES[-len(shape) :])
    made = jax.eval_shape(FORMATS[name].quantize, jax.ShapeDtypeStruct(shape, jnp.bfloat16))
    assert {key: (part.shape, part.dtype) for key, part in parts.items()} == {
        key: (array.shape, array.dtype) for key, array in made.items()
    }
    assert all(len(part.axes) == len(part.shape) for part in parts.values())
    assert parts["codes"].axes == AXES[-len(shape) :]
    read = jax.eval_shape(lambda parts: FORMATS[name].dequantize(parts, jnp.bfloat16), made)
    assert (read.shape, read.dtype) == (shape, jnp.bfloat16)


@pytest.mark.parametrize(
    ("name", "of_each", "of_each_output"), [("int8", 1, 4), ("nf4", 1 / 2 + 1 / 64 + 4 / (64 * 256), 0)]
)
def test_bytes_of_a_weight(name, of_each, of_each_output):
    parts = FORMATS[name].parts((4096, 14336), ("embed", "mlp"))
    counted = sum(math.prod(part.shape) * np.dtype(part.dtype).itemsize for part in parts.values())
    alone = 4 if name == "nf4" else 0  # the mean
    assert counted == 4096 * 14336 * of_each + 14336 * of_each_output + alone


def test_inputs_that_are_no_blocks_are_refused():
    with pytest.raises(UserError, match=r"into blocks of 64, but one of them has 100: use int8\."):
        FORMATS["nf4"].parts((2, 100, 64), ("experts", "embed", "mlp"))


@pytest.mark.parametrize("name", FORMATS)
def test_layers_and_experts_are_each_quantized_on_their_own(name):
    weight = heavy((2, 3, 128, 70)) * jnp.array([1, 100])[:, None, None, None]
    parts = QUANTIZE[name](weight)
    read = DEQUANTIZE[name](parts, jnp.float32)
    for layer in range(2):
        for expert in range(3):
            one = QUANTIZE[name](weight[layer, expert])
            assert bits(one) == bits({key: array[layer, expert] for key, array in parts.items()})
            assert bits(DEQUANTIZE[name](one, jnp.float32)) == bits(read[layer, expert])


@pytest.mark.parametrize("name", FORMATS)
def test_compiled_and_not_are_the_same_bits(name):
    weight = heavy((192, 100), dtype=jnp.bfloat16)
    parts = QUANTIZE[name](weight)
    assert bits(FORMATS[name].quantize(weight)) == bits(parts)
    for dtype in (jnp.float32, jnp.bfloat16):
        assert bits(FORMATS[name].dequantize(parts, dtype)) == bits(DEQUANTIZE[name](parts, dtype))


def on_a_mesh(name, shape, axes, sizes):
    """Where a weight and its parts live."""
    mesh = sharding.make_mesh(sizes)
    parts = FORMATS[name].parts(shape, axes)
    shapes = {key: jax.ShapeDtypeStruct(part.shape, part.dtype) for key, part in parts.items()}
    homes = sharding.param_shardings(mesh, shapes, {key: P(*part.axes) for key, part in parts.items()})
    return sharding.sharding(mesh, axes), homes, shapes


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize(
    ("shape", "axes", "sizes"),
    [
        ((3, 512, 200), ("layers", "embed", "heads"), dict(data=1, fsdp=8, tensor=1)),
        ((3, 576, 200), ("layers", "embed", "heads"), dict(data=1, fsdp=4, tensor=2)),  # a cut goes through a block
        ((576, 512), ("mlp", "embed"), dict(data=2, fsdp=2, tensor=2)),
        ((4, 128, 96), ("experts", "embed", "expert_mlp"), dict(data=1, fsdp=2, tensor=4)),
    ],
)
def test_a_mesh_changes_no_bit(name, shape, axes, sizes):
    home, homes, _ = on_a_mesh(name, shape, axes, sizes)
    weight = heavy(shape, dtype=jnp.bfloat16)
    parts = jax.jit(FORMATS[name].quantize, out_shardings=homes)(jax.device_put(weight, home))
    assert bits(parts) == bits(QUANTIZE[name](weight))
    for dtype in (jnp.float32, jnp.bfloat16):
        dequantize = functools.partial(FORMATS[name].dequantize, dtype=dtype)
        read = jax.jit(dequantize, in_shardings=(homes,), out_shardings=home)(parts)
        assert bits(read) == bits(DEQUANTIZE[name](QUANTIZE[name](weight), dtype))


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("axes", [("embed", "heads"), ("mlp", "embed")])
def test_devices_with_whole_blocks_read_them_without_the_others(name, axes):
    home, homes, shapes = on_a_mesh(name, (512, 256), axes, dict(data=1, fsdp=4, tensor=2))
    dequantize = functools.partial(FORMATS[name].dequantize, dtype=jnp.bfloat16)
    program = jax.jit(dequantize, out_shardings=home).lower(sharding.abstract(shapes, homes)).compile().as_text()
    for communication in ("all-gather", "all-reduce", "all-to-all", "collective-permute"):
        assert communication not in program


@pytest.mark.parametrize("name", FORMATS)
def test_gradients_pass_through_a_quantized_weight(name):
    parts = QUANTIZE[name](heavy((2, 128, 128)))
    x = heavy((4, 128), seed=1)

    def last(x, read):
        layer = jax.checkpoint(lambda x, each: (jnp.dot(x, read(each)), None))
        return jnp.square(jax.lax.scan(layer, x, parts)[0]).sum()

    found = jax.jit(jax.grad(last), static_argnums=1)(x, lambda each: FORMATS[name].dequantize(each, jnp.float32))
    one, two = DEQUANTIZE[name](parts, jnp.float32)
    expected = 2 * (x @ one @ two) @ two.T @ one.T
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6 * np.abs(expected).max())
