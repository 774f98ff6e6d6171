"""The decoder's parts, each against an independent formula."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from daajax import sharding
from daajax.models import decoder, rope
from daajax.models.architecture import Norm, Rope, for_length
from daajax.models.families import architecture_of as architecture_from
from daajax.models.parameters import is_decayed, parameter_count
from daajax.models.remat import REMAT
from daajax.ops import attention, experts
from tests.oracle import make_values as oracle

NAMES = sorted(oracle.MODELS)


def architecture_of(name, **changes):
    return architecture_from(oracle.MODELS[name] | changes)


def model_of(name, *, architecture=None, **options):
    return decoder.Decoder(architecture or architecture_of(name), attend=attention.dense, **options)


def rows(vocab=96, *, count=2, length=24):
    """Two segments a row, the second with two branches, and padding behind: tokens, positions, mask."""
    tokens = jnp.asarray((oracle.uniform(count * length, 11).reshape(count, length) * vocab).astype(np.int32))
    segments, branches = np.zeros((2, count, length), np.int32)
    positions = np.zeros((count, length), np.int32)
    segments[:, :9], segments[:, 9:21] = 1, 2
    branches[:, 13:17], branches[:, 17:21] = 1, 2
    positions[:, :9], positions[:, 9:17], positions[:, 17:21] = np.arange(9), np.arange(8), np.arange(4, 8)
    positions = jnp.asarray(positions)
    return tokens, positions, attention.visible(jnp.asarray(segments), jnp.asarray(branches), positions)


def drawn(model, seed=0):
    """Parameters large enough that every part of the model shows."""
    params = decoder.init_params(model, jax.random.key(seed))
    return jax.tree.map(lambda x: (x if x.ndim == 1 or (x == 1).all() else 8 * x).astype(x.dtype), params)


# ---------------------------------------------------------------------- parameters


@pytest.mark.parametrize("name", NAMES)
def test_the_parameter_count_is_that_of_the_tree_and_of_the_directory(name):
    shapes, _ = decoder.abstract_params(model_of(name))
    count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))
    assert count == parameter_count(architecture_of(name))
    assert count == sum(math.prod(shape) for shape in oracle.shapes(oracle.MODELS[name]).values())


@pytest.mark.parametrize("name", NAMES)
def test_every_axis_of_every_parameter_is_in_the_sharding_table(name):
    shapes, axes = decoder.abstract_params(model_of(name))
    assert jax.tree.structure(shapes) == jax.tree.structure(axes)
    for shape, names in zip(jax.tree.leaves(shapes), jax.tree.leaves(axes), strict=True):
        assert len(names) == len(shape.shape)
        assert set(names) <= set(sharding.RULES)
    assert all(names[0] == "layers" for names in jax.tree.leaves(axes["layers"]))


@pytest.mark.parametrize("name", NAMES)
def test_weight_decay_is_for_matrices_only(name):
    shapes, _ = decoder.abstract_params(model_of(name))
    for path, shape in jax.tree.leaves_with_path(shapes):
        path = jax.tree_util.keystr(path, simple=True, separator="/")
        assert is_decayed(path) == (len(shape.shape) - path.startswith("layers/") >= 2), path


@pytest.mark.slow
def test_fresh_parameters_are_a_function_of_key_and_architecture_alone():
    plain = decoder.init_params(model_of("llama2"), jax.random.key(3))
    same = decoder.init_params(model_of("llama2", remat="full", dtype=jnp.bfloat16), jax.random.key(3))
    other = decoder.init_params(model_of("llama2"), jax.random.key(4))
    jax.tree.map(np.testing.assert_array_equal, plain, same)
    for path, leaf in jax.tree.leaves_with_path(plain):
        if "norm" in jax.tree_util.keystr(path):
            assert (leaf == 1).all()
    for name in ("q_proj", "down_proj"):
        assert (plain["layers"][name] != other["layers"][name]).mean() > 0.9
        assert (plain["layers"][name][0] != plain["layers"][name][1]).mean() > 0.9
    assert (plain["embed_tokens"] != plain["lm_head"]).mean() > 0.9


def test_fresh_matrices_have_the_deviation_of_the_config():
    architecture = architecture_of("llama2", initializer_range=0.05, hidden_size=64, head_dim=8)
    params = decoder.init_params(model_of("llama2", architecture=architecture), jax.random.key(0))
    for leaf in (params["embed_tokens"], params["lm_head"], params["layers"]["o_proj"]):
        deviation = 0.05 / math.sqrt(leaf.size)
        assert abs(leaf.mean()) < 5 * deviation
        assert abs(leaf.std() - 0.05) < 5 * deviation


# ---------------------------------------------------------------------- norm and rotary embedding


def test_rms_norm_is_that_of_float64():
    x = 30 * (oracle.uniform(2 * 5 * 32, 1).reshape(2, 5, 32) - 0.5)
    x[0, 0] = 0  # the epsilon's case
    scale = oracle.uniform(32, 2)
    for eps in (1e-5, 1.0):
        expected = x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + eps) * scale
        params = {"norm": jnp.asarray(scale, jnp.float32)}
        found = decoder.normalize(params, "norm", jnp.asarray(x, jnp.float32), Norm(eps))
        np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-7)


def test_layer_norm_is_that_of_float64():
    x = 30 * oracle.uniform(2 * 5 * 32, 1).reshape(2, 5, 32)
    scale, bias = oracle.uniform(32, 2), oracle.uniform(32, 3)
    expected = (x - x.mean(axis=-1, keepdims=True)) / np.sqrt(x.var(axis=-1, keepdims=True) + 1e-5) * (1 + scale) + bias
    params = {"norm": jnp.asarray(scale, jnp.float32), "norm_bias": jnp.asarray(bias, jnp.float32)}
    norm = Norm(1e-5, centered=True, unit_offset=True, bias=True)
    found = decoder.normalize(params, "norm", jnp.asarray(x, jnp.float32), norm)
    np.testing.assert_allclose(found, expected, rtol=2e-6, atol=2e-6)


def test_rms_norm_of_bfloat16_sums_in_float32():
    x = np.full(4096, 1.0, np.float32)
    x[0] = 64  # summed in bfloat16, 4096 + 1 would stay 4096
    params = {"norm": jnp.ones(4096, jnp.bfloat16)}
    found = decoder.normalize(params, "norm", jnp.asarray(x, jnp.bfloat16), Norm(1e-6))
    assert found.dtype == jnp.bfloat16
    np.testing.assert_allclose(found.astype(np.float32), x / np.sqrt((4096 + 4095) / 4096), rtol=2**-8)


def llama31_frequencies(rope, head_dim):
    """As in Meta's reference code: by wavelength, one frequency at a time."""
    found = []
    for pair in range(head_dim // 2):
        frequency = 1.0 / rope.rope_theta ** (2 * pair / head_dim)
        wavelength = 2 * math.pi / frequency
        if wavelength < rope.original_max_position_embeddings / rope.high_freq_factor:
            found.append(frequency)
        elif wavelength > rope.original_max_position_embeddings / rope.low_freq_factor:
            found.append(frequency / rope.factor)
        else:
            smooth = (rope.original_max_position_embeddings / wavelength - rope.low_freq_factor) / (
                rope.high_freq_factor - rope.low_freq_factor
            )
            found.append((1 - smooth) * frequency / rope.factor + smooth * frequency)
    return np.array(found)


@pytest.mark.parametrize(
    ("stretched", "head_dim"),
    [
        (Rope(500000.0, "llama3", 1.0, 8.0, 1.0, 4.0, 8192), 128),  # Llama 3.1
        (Rope(500000.0, "llama3", 1.0, 32.0, 1.0, 4.0, 8192), 64),  # Llama 3.2
        (Rope(10000.0, "llama3", 1.0, 2.0, 0.5, 8.0, 64), 24),
    ],
)
def test_stretched_frequencies_are_those_of_the_llama_31_reference_code(stretched, head_dim):
    expected = llama31_frequencies(stretched, head_dim)
    plain = stretched.rope_theta ** (-np.arange(0, head_dim, 2) / head_dim)
    bands = (np.isclose(expected, plain), np.isclose(expected, plain / stretched.factor))
    assert bands[0].any()
    assert bands[1].any()
    assert (~bands[0] & ~bands[1]).any()
    np.testing.assert_allclose(rope.frequencies(stretched, head_dim), expected, rtol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_frequencies_are_those_of_transformers(name):
    architecture = for_length(architecture_of(name), 210)
    turns = [kind.rope for kind in architecture.kinds if kind.rope is not None]
    found = sorted(rope.frequencies(turn, architecture.head_dim).tolist() for turn in dict.fromkeys(turns))
    expected = oracle.read(name)["rope_frequencies"]
    assert len(found) == len(expected)
    for ours, theirs in zip(found, sorted(expected), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-6)


def test_rotation_is_a_complex_product_of_features_half_a_head_apart():
    x = oracle.uniform(2 * 7 * 3 * 8, 1).reshape(2, 7, 3, 8) - 0.5
    angles = 50 * oracle.uniform(2 * 7 * 4, 2).reshape(2, 7, 4)
    turned = (x[..., :4] + 1j * x[..., 4:]) * np.exp(1j * angles)[:, :, None]
    rotation = rope.Rotation(jnp.asarray(np.cos(angles), jnp.float32), jnp.asarray(np.sin(angles), jnp.float32))
    found = rope.rotate(jnp.asarray(x, jnp.float32), rotation)
    np.testing.assert_allclose(found, np.concatenate([turned.real, turned.imag], axis=-1), atol=1e-6)


# ---------------------------------------------------------------------- the whole


@pytest.mark.parametrize("name", [pytest.param("llama31", marks=pytest.mark.slow), "head_dim"])
def test_the_scan_over_layers_is_a_loop_over_decoder_layer(name):
    model = model_of(name)
    params = drawn(model)
    tokens, positions, mask = rows()
    a = model.architecture
    x = params["embed_tokens"][tokens]
    rotation = rope.rotations(a.kinds, a.head_dim, positions)
    for layer in range(a.num_hidden_layers):
        weights = jax.tree.map(lambda stack, layer=layer: stack[layer], params["layers"])
        x, _ = decoder.decoder_layer(weights, x, rotation, mask, None, a, attention.dense, experts.mix)
    expected = decoder.normalize(params, "norm", x, a.norm)
    found, _ = model.apply({"params": params}, tokens, positions, mask)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    assert len({float(x) for x in np.abs(np.asarray(found)).sum(axis=-1).reshape(-1)[:9]}) == 9  # nothing is constant


@pytest.mark.slow
def test_what_the_backward_pass_recomputes_changes_neither_values_nor_gradients():
    tokens, positions, mask = rows()
    weights = jnp.asarray(oracle.uniform(2 * 24 * 32, 5).reshape(2, 24, 32) - 0.5, jnp.float32)
    results = {}
    for remat in REMAT:
        model = model_of("llama31", remat=remat)

        def weighted(params, model=model):
            return (model.apply({"params": params}, tokens, positions, mask)[0] * weights).sum()

        results[remat] = jax.jit(jax.value_and_grad(weighted))(drawn(model))
    value, gradients = results.pop("none")
    for other_value, other_gradients in results.values():
        np.testing.assert_allclose(other_value, value, rtol=1e-6)
        jax.tree.map(
            lambda x, y: np.testing.assert_allclose(y, x, atol=1e-5 * np.abs(x).max()), gradients, other_gradients
        )


def test_bfloat16_is_close_to_float32_and_the_parameters_may_be_either():
    tokens, positions, mask = rows()
    exact = model_of("llama31")
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), drawn(exact))
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), params)
    expected = np.asarray(exact.apply({"params": wide}, tokens, positions, mask)[0])
    model = model_of("llama31", dtype=jnp.bfloat16)
    found, _ = model.apply({"params": wide}, tokens, positions, mask)
    assert found.dtype == jnp.bfloat16
    # Eight bits of mantissa, two layers: a few rounding errors of 2**-8 on values of about 1.
    error = np.asarray(found, np.float32) - expected
    assert np.sqrt(np.mean(error**2)) < 4 * 2**-8 * np.sqrt(np.mean(expected**2))
    short, _ = model.clone(param_dtype=jnp.bfloat16).apply({"params": params}, tokens, positions, mask)
    np.testing.assert_array_equal(np.asarray(short, np.float32), np.asarray(found, np.float32))


def test_parameters_are_drawn_in_their_own_dtype():
    shapes, _ = decoder.abstract_params(model_of("llama2", param_dtype=jnp.bfloat16))
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {jnp.dtype(jnp.bfloat16)}


@pytest.mark.parametrize("name", ["llama2", "llama31"])
def test_the_projection_is_the_head_or_the_embedding_it_is_tied_to(name):
    model = model_of(name)
    params = decoder.init_params(model, jax.random.key(0))
    found = decoder.projection(params, model.architecture)
    np.testing.assert_array_equal(found, params["embed_tokens" if name == "llama31" else "lm_head"])
    assert ("lm_head" in params) == (name == "llama2")
