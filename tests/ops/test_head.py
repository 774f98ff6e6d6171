"""The head's statistics against their definitions in float64, derivatives by autodiff of the definition."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from daajax.ops.head import STATISTICS, token_statistics

TOKENS, EMBED, VOCAB = 21, 8, 37
NAMES = tuple(STATISTICS)


def operands(scale=1.0, seed=0, tokens=TOKENS):
    """Hidden states and projection of policy and reference, targets, and a cotangent for each statistic."""
    rng = np.random.default_rng(seed)
    hidden, reference_hidden = scale * rng.normal(size=(2, tokens, EMBED))
    projection, reference_projection = rng.normal(size=(2, VOCAB, EMBED))
    arrays = (hidden, projection, reference_hidden, reference_projection)
    targets = rng.integers(0, VOCAB, tokens).astype(np.int32)
    cotangents = rng.normal(size=(len(NAMES), tokens)).astype(np.float32)
    return tuple(x.astype(np.float32) for x in arrays), targets, cotangents


def defined(hidden, projection, reference_hidden, reference_projection, targets, caps=(None, None)):
    """The definitions, in whatever precision the operands have; a softmax of all logits at once."""

    def distribution(states, weights, cap):
        logits = states @ weights.T
        return jax.nn.softmax(logits if cap is None else cap * jnp.tanh(logits / cap))

    probabilities = distribution(hidden, projection, caps[0])
    reference = distribution(reference_hidden, reference_projection, caps[1])
    return {
        "logps": jnp.log(probabilities[jnp.arange(len(targets)), targets]),
        "sum_squares": jnp.log((probabilities**2).sum(axis=1)),
        "entropies": -(probabilities * jnp.log(probabilities)).sum(axis=1),
        "kl": (reference * jnp.log(reference / probabilities)).sum(axis=1),
    }


def expected(arrays, targets, cotangents, names, count, caps=(None, None)):
    """Values, and gradients of hidden states and projection, in float64."""
    real = np.arange(len(targets)) < count
    with jax.enable_x64(True):
        hidden, projection, *reference = (jnp.asarray(x, jnp.float64) for x in arrays)

        def total(hidden, projection):
            values = defined(hidden, projection, *reference, targets, caps)
            kept = {name: jnp.where(real, values[name], 0) for name in names}
            return sum((kept[name] * c).sum() for name, c in zip(names, cotangents, strict=True)), kept

        gradients, values = jax.grad(total, (0, 1), has_aux=True)(hidden, projection)
        return jax.tree.map(np.asarray, (values, gradients))


@functools.partial(jax.jit, static_argnames=("names", "chunk", "caps"))
def computed(arrays, targets, cotangents, count, *, names, chunk, caps=(None, None)):
    hidden, projection, reference_hidden, reference_projection = arrays
    reference = dict(softcap=caps[0], reference_softcap=caps[1])
    if "kl" in names:
        reference |= dict(reference_hidden=reference_hidden, reference_projection=reference_projection)

    def statistics(hidden, projection):
        return token_statistics(hidden, projection, targets, count, names=names, chunk=chunk, **reference)

    values, pull = jax.vjp(statistics, hidden, projection)
    return values, pull({name: c.astype(jnp.float32) for name, c in zip(names, cotangents, strict=True)})


def assert_near(found, wanted, tolerance):
    jax.tree.map(
        lambda one, two: np.testing.assert_allclose(
            np.asarray(one, np.float64), two, rtol=tolerance, atol=tolerance * max(1, np.abs(two).max())
        ),
        *(jax.tree.map(np.asarray, x) for x in (found, wanted)),
    )


@pytest.mark.parametrize("name", NAMES)
def test_each_statistic_and_its_gradient_are_the_definition(name):
    arrays, targets, cotangents = operands()
    options = dict(names=(name,))
    found = computed(arrays, targets, cotangents[:1], np.int32(TOKENS), chunk=2048, **options)
    # Float32 rounds to 6e-8; 21 tokens are summed into the gradient of the projection.
    assert_near(found, expected(arrays, targets, cotangents[:1], (name,), TOKENS), 3e-6)
    assert all(value.dtype == jnp.float32 for value in found[0].values())


@pytest.mark.parametrize("caps", [(1.5, None), (4.0, 0.7)])
def test_statistics_of_capped_logits_and_their_gradients_are_the_definition(caps):
    arrays, targets, cotangents = operands(scale=2)
    found = computed(arrays, targets, cotangents, np.int32(TOKENS), names=NAMES, chunk=8, caps=caps)
    assert_near(found, expected(arrays, targets, cotangents, NAMES, TOKENS, caps), 5e-6)


@pytest.mark.parametrize("chunk", [4, 7, 21, 2048])
@pytest.mark.parametrize("count", [0, 1, 7, 8, 20, 21, 30])
def test_all_statistics_together_do_not_depend_on_chunks_and_end_at_the_count(chunk, count):
    arrays, targets, cotangents = operands(scale=2)
    values, gradients = computed(arrays, targets, cotangents, np.int32(count), names=NAMES, chunk=chunk)
    assert_near((values, gradients), expected(arrays, targets, cotangents, NAMES, count), 5e-6)
    for value in values.values():
        assert not value[count:].any()
    assert not gradients[0][count:].any()


def test_what_lies_behind_the_count_has_no_influence():
    arrays, targets, cotangents = operands()
    changed = [x.copy() for x in arrays]
    for index in (0, 2):
        changed[index][12:] = 1e6
    cotangents[:, 12:] = 1e6
    found = computed(tuple(changed), targets, cotangents, np.int32(12), names=NAMES, chunk=7)
    assert_near(found, expected(arrays, targets, cotangents, NAMES, 12), 5e-6)


def test_the_reference_passes_no_gradient():
    (hidden, projection, *reference), targets, _ = operands()

    def total(reference_hidden, reference_projection):
        return token_statistics(
            jnp.asarray(hidden),
            jnp.asarray(projection),
            jnp.asarray(targets),
            jnp.int32(TOKENS),
            names=("kl",),
            reference_hidden=reference_hidden,
            reference_projection=reference_projection,
        )["kl"].sum()

    for gradient in jax.grad(total, (0, 1))(*map(jnp.asarray, reference)):
        assert not gradient.any()


def test_a_distribution_with_two_certain_tokens_is_known_in_closed_form():
    # Two equal logits 1e4 above the rest: π = ½, ½, 0, …; every exponential of a difference over- or underflows.
    projection = np.zeros((VOCAB, EMBED), np.float32)
    projection[[3, 5], 0] = 1e4
    hidden = np.eye(1, EMBED, dtype=np.float32).repeat(2, axis=0)
    targets = np.array([3, 7], np.int32)  # likely; 1e4 nats unlikely
    reference = np.zeros((2, EMBED), np.float32)  # uniform
    arrays = (hidden, projection, reference, projection)
    cotangents = np.ones((4, 2), np.float32)
    values, gradients = computed(arrays, targets, cotangents, np.int32(2), names=NAMES, chunk=2048)
    half = np.log(0.5)
    wanted = {
        "logps": [half, half - 1e4],
        "sum_squares": [half, half],
        "entropies": [-half, -half],
        "kl": [-np.log(VOCAB) - half + 1e4 * (VOCAB - 2) / VOCAB] * 2,
    }
    for name in NAMES:
        np.testing.assert_allclose(values[name], wanted[name], rtol=1e-6, atol=1e-3)  # float32's spacing at 1e4
    assert all(np.isfinite(gradient).all() for gradient in gradients)


@pytest.mark.parametrize("scale", [1e3, 1e10, 1e30])
def test_extreme_logits_stay_finite(scale):
    arrays, targets, cotangents = operands(scale=scale)
    found = computed(arrays, targets, cotangents, np.int32(TOKENS), names=NAMES, chunk=2048)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(found))
    logits = arrays[0].astype(np.float64) @ arrays[1].astype(np.float64).T
    ahead = np.sort(logits)[:, -1] - np.sort(logits)[:, -2] > 30  # one token takes all to within e^-30
    assert ahead.sum() > TOKENS / 2
    wanted = (logits[np.arange(TOKENS), targets] - logits.max(axis=1))[ahead]
    np.testing.assert_allclose(found[0]["logps"][ahead], wanted, rtol=1e-5, atol=1e-5 * scale)
    np.testing.assert_allclose(found[0]["entropies"][ahead], 0, atol=1e-9 * 1e4)


def test_bfloat16_operands_give_float32_statistics_of_their_products():
    arrays, targets, cotangents = operands()
    rounded = tuple(x.astype(jnp.bfloat16) for x in arrays)
    values, gradients = computed(rounded, targets, cotangents, np.int32(TOKENS), names=NAMES, chunk=7)
    wanted = expected(tuple(x.astype(np.float32) for x in rounded), targets, cotangents, NAMES, TOKENS)
    # Products of bfloat16 are exact in float32, so that the statistics are as good as float32's …
    assert_near(values, wanted[0], 3e-6)
    # … while gradients come back rounded to bfloat16's 8 bits.
    assert {gradient.dtype for gradient in gradients} == {np.dtype(jnp.bfloat16)}
    assert_near(gradients, wanted[1], 2e-2)


def test_no_array_of_tokens_by_vocabulary_exists():
    tokens, chunk = 40, 8
    arrays, targets, cotangents = operands(tokens=tokens)
    jaxpr = jax.make_jaxpr(functools.partial(computed, names=NAMES, chunk=chunk))(
        arrays, targets, cotangents, np.int32(tokens)
    )

    def shapes(jaxpr):
        for equation in jaxpr.eqns:
            yield from (v.aval.shape for v in equation.outvars if hasattr(v.aval, "shape"))
            yield from (shape for inner in jaxprs_in_params(equation.params) for shape in shapes(inner))

    with_vocabulary = {shape for shape in shapes(jaxpr.jaxpr) if VOCAB in shape}
    assert (chunk, VOCAB) in with_vocabulary
    assert max(map(np.prod, with_vocabulary)) == max(chunk, EMBED) * VOCAB < tokens * VOCAB


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(names=("logps", "median")), r"unknown statistics \['median'\]; there are \['entropies', 'kl', "),
        (dict(names=("kl",)), "come together or not at all"),
        (dict(names=("kl",), reference_hidden=0), "come together or not at all"),
        (dict(names=("kl",), reference_projection=1), "come together or not at all"),
        (dict(names=("logps",), reference_hidden=0, reference_projection=1), "come together or not at all"),
    ],
    ids=str,
)
def test_operands_that_do_not_fit_are_refused(options, message):
    arrays, targets, _ = operands()
    hidden, projection = map(jnp.asarray, arrays[:2])
    reference = {key: (hidden, projection)[options[key]] for key in options if key != "names"}
    with pytest.raises(ValueError, match=message):
        token_statistics(
            hidden, projection, jnp.asarray(targets), jnp.int32(TOKENS), names=options["names"], **reference
        )
