"""The head's statistics against their definitions in float64, derivatives by autodiff of the definition."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from daajax.ops.head import token_statistics
from daajax.ops.logits import Head
from daajax.ops.row_head import row_gradients
from daajax.ops.slots import at_sources
from daajax.ops.statistics import STATISTICS
from daajax.sharding import MeshDevices
from tests.test_scoring import mesh_of

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


@functools.partial(jax.jit, static_argnames=("names", "chunk", "caps", "form"))
def computed(arrays, targets, cotangents, count, *, names, chunk, caps=(None, None), form="token"):
    """In one row, so many slots of it real: values, gradients of hidden states and, but for `frozen`, of weights."""
    hidden, projection, *reference = arrays
    head = Head(names, softcap=caps[0], reference_softcap=caps[1], is_frozen=form == "frozen", chunk=chunk)
    behind = (targets[None], jnp.arange(len(targets))[None] < count)
    if "kl" in names:
        behind = (*behind, reference[0][None], reference[1])
    given = {name: c.astype(jnp.float32) for name, c in zip(names, cotangents, strict=True)}
    if form == "row":

        def of_row(values, columns, shared):
            return jax.tree.map(lambda c: c * shared, columns), values

        values, d_hidden, d_projection = row_gradients(
            head,
            hidden[None],
            projection,
            *behind,
            of_row=of_row,
            columns=jax.tree.map(lambda c: c[None] / 2, given),
            shared=jnp.float32(2),
        )
        return jax.tree.map(lambda x: x[0], values), (d_hidden[0], d_projection)

    def statistics(hidden, *trained):
        values = token_statistics(head, hidden[None], *(trained or (projection,)), *behind)
        return jax.tree.map(lambda x: x[0], values)

    values, pull = jax.vjp(statistics, hidden, *(() if form == "frozen" else (projection,)))
    return values, pull(given)


FORMS = ("token", "row", "frozen")


def without_what_is_frozen(wanted, form):
    values, gradients = wanted
    return values, gradients[:1] if form == "frozen" else gradients


def assert_near(found, wanted, tolerance):
    jax.tree.map(
        lambda one, two: np.testing.assert_allclose(
            np.asarray(one, np.float64), two, rtol=tolerance, atol=tolerance * max(1, np.abs(two).max())
        ),
        *(jax.tree.map(np.asarray, x) for x in (found, wanted)),
    )


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", NAMES)
def test_each_statistic_and_its_gradient_are_the_definition(name, form):
    arrays, targets, cotangents = operands()
    options = dict(names=(name,), form=form)
    found = computed(arrays, targets, cotangents[:1], np.int32(TOKENS), chunk=2048, **options)
    wanted = expected(arrays, targets, cotangents[:1], (name,), TOKENS)
    # Float32 rounds to 6e-8; 21 tokens are summed into the gradient of the projection.
    assert_near(found, without_what_is_frozen(wanted, form), 3e-6)
    assert all(value.dtype == jnp.float32 for value in found[0].values())


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("caps", [(1.5, None), (4.0, 0.7)])
def test_statistics_of_capped_logits_and_their_gradients_are_the_definition(caps, form):
    arrays, targets, cotangents = operands(scale=2)
    found = computed(arrays, targets, cotangents, np.int32(TOKENS), names=NAMES, chunk=8, caps=caps, form=form)
    wanted = expected(arrays, targets, cotangents, NAMES, TOKENS, caps)
    assert_near(found, without_what_is_frozen(wanted, form), 5e-6)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("chunk", [4, 7, 2048])
@pytest.mark.parametrize("count", [0, 1, 7, 8, 21, 30])
def test_all_statistics_together_do_not_depend_on_chunks_and_end_at_the_count(chunk, count, form):
    arrays, targets, cotangents = operands(scale=2)
    values, gradients = computed(arrays, targets, cotangents, np.int32(count), names=NAMES, chunk=chunk, form=form)
    wanted = expected(arrays, targets, cotangents, NAMES, count)
    assert_near((values, gradients), without_what_is_frozen(wanted, form), 5e-6)
    for value in values.values():
        assert not value[count:].any()
    assert not gradients[0][count:].any()


@pytest.mark.parametrize("form", FORMS)
def test_what_lies_behind_the_count_has_no_influence(form):
    arrays, targets, cotangents = operands()
    changed = [x.copy() for x in arrays]
    for index in (0, 2):
        changed[index][12:] = 1e6
    cotangents[:, 12:] = 1e6
    found = computed(tuple(changed), targets, cotangents, np.int32(12), names=NAMES, chunk=7, form=form)
    assert_near(found, without_what_is_frozen(expected(arrays, targets, cotangents, NAMES, 12), form), 5e-6)


def test_the_reference_passes_no_gradient():
    (hidden, projection, *reference), targets, _ = operands()

    def total(reference_hidden, reference_projection):
        return token_statistics(
            Head(("kl",)),
            jnp.asarray(hidden)[None],
            jnp.asarray(projection),
            jnp.asarray(targets)[None],
            jnp.ones((1, TOKENS), bool),
            reference_hidden[None],
            reference_projection,
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


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("scale", [1e3, 1e10, 1e30])
def test_extreme_logits_stay_finite(scale, form):
    arrays, targets, cotangents = operands(scale=scale)
    found = computed(arrays, targets, cotangents, np.int32(TOKENS), names=NAMES, chunk=2048, form=form)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(found))
    logits = arrays[0].astype(np.float64) @ arrays[1].astype(np.float64).T
    ahead = np.sort(logits)[:, -1] - np.sort(logits)[:, -2] > 30  # one token takes all to within e^-30
    assert ahead.sum() > TOKENS / 2
    wanted = (logits[np.arange(TOKENS), targets] - logits.max(axis=1))[ahead]
    np.testing.assert_allclose(found[0]["logps"][ahead], wanted, rtol=1e-5, atol=1e-5 * scale)
    np.testing.assert_allclose(found[0]["entropies"][ahead], 0, atol=1e-9 * 1e4)


@pytest.mark.parametrize("form", FORMS)
def test_bfloat16_operands_give_float32_statistics_of_their_products(form):
    arrays, targets, cotangents = operands()
    rounded = tuple(x.astype(jnp.bfloat16) for x in arrays)
    values, gradients = computed(rounded, targets, cotangents, np.int32(TOKENS), names=NAMES, chunk=7, form=form)
    wanted = expected(tuple(x.astype(np.float32) for x in rounded), targets, cotangents, NAMES, TOKENS)
    wanted = without_what_is_frozen(wanted, form)
    # Products of bfloat16 are exact in float32, so that the statistics are as good as float32's …
    assert_near(values, wanted[0], 3e-6)
    # … while gradients come back rounded to bfloat16's 8 bits.
    assert {gradient.dtype for gradient in gradients} == {np.dtype(jnp.bfloat16)}
    assert_near(gradients, wanted[1], 2e-2)


def shapes_and_products(jaxpr):
    """Shapes of all arrays of a program, and of the operands of its products."""
    for equation in jaxpr.eqns:
        yield from ((None, v.aval.shape) for v in equation.outvars if hasattr(v.aval, "shape"))
        if equation.primitive.name == "dot_general":
            yield "product", tuple(v.aval.shape for v in equation.invars)
        for inner in jaxprs_in_params(equation.params):
            yield from shapes_and_products(inner)


@pytest.mark.parametrize("form", ["token", "frozen"])
def test_no_array_of_tokens_by_vocabulary_exists(form):
    tokens, chunk = 40, 8
    arrays, targets, cotangents = operands(tokens=tokens)
    jaxpr = jax.make_jaxpr(functools.partial(computed, names=NAMES, chunk=chunk, form=form))(
        arrays, targets, cotangents, np.int32(tokens)
    )
    with_vocabulary = {shape for kind, shape in shapes_and_products(jaxpr.jaxpr) if kind is None and VOCAB in shape}
    assert (chunk, VOCAB) in with_vocabulary
    assert max(map(np.prod, with_vocabulary)) == max(chunk, EMBED) * VOCAB < tokens * VOCAB


@pytest.mark.parametrize(("form", "products"), [("token", 4), ("row", 3), ("frozen", 2)])
def test_each_form_makes_as_many_products_of_the_vocabulary_as_it_says(form, products):
    arrays, targets, cotangents = operands()
    jaxpr = jax.make_jaxpr(functools.partial(computed, names=("logps",), chunk=2048, form=form))(
        arrays, targets, cotangents[:1], np.int32(TOKENS)
    )
    found = [shapes for kind, shapes in shapes_and_products(jaxpr.jaxpr) if kind == "product"]
    assert len([shapes for shapes in found if any(VOCAB in shape for shape in shapes)]) == products


def test_a_frozen_head_refuses_to_make_a_gradient_of_the_projection():
    (hidden, projection, *_), targets, _ = jax.tree.map(jnp.asarray, operands())

    def total(projection):
        head, real = Head(is_frozen=True), jnp.ones((1, TOKENS), bool)
        return token_statistics(head, hidden[None], projection, targets[None], real)["logps"].sum()

    with pytest.raises(ValueError, match="a head with a frozen projection makes no gradient of it"):
        jax.grad(total)(projection)


# ---------------------------------------------------------------------- several rows, several devices


def of_rows(head, arrays, targets, real, cotangents, form):
    """Values and gradients of several rows; `real` may have holes."""
    hidden, projection, *reference = arrays
    given = dict(zip(head.names, cotangents, strict=True))
    if form == "row":
        return row_gradients(
            head,
            hidden,
            projection,
            targets,
            real,
            *reference,
            of_row=lambda values, columns, _: (columns, values),
            columns=given,
            shared=(),
        )
    values, pull = jax.vjp(
        lambda *trained: token_statistics(head, *trained, targets, real, *reference), hidden, projection
    )
    return values, *pull(given)


@pytest.mark.parametrize("form", ["token", "row", "frozen"])
@pytest.mark.parametrize("sizes", [None, (2, 2, 2), (1, 1, 8)], ids=str)
def test_rows_and_vocabulary_may_lie_on_several_devices(sizes, form):
    rows, scored, vocab = 8, 13, 40
    rng = np.random.default_rng(3)
    hidden, reference_hidden = rng.normal(size=(2, rows, scored, EMBED)).astype(np.float32)
    projection, reference_projection = rng.normal(size=(2, vocab, EMBED)).astype(np.float32)
    targets = rng.integers(0, vocab, (rows, scored)).astype(np.int32)
    real = rng.random((rows, scored)) < 0.7
    real[3] = False
    cotangents = rng.normal(size=(len(NAMES), rows, scored)).astype(np.float32)
    arrays = (hidden, projection, reference_hidden, reference_projection)
    options = {} if sizes is None else dict(devices=MeshDevices(mesh_of(*sizes)))
    head = Head(NAMES, softcap=3.0, chunk=16, is_frozen=form == "frozen", **options)

    def run(arrays, targets, real, cotangents):
        if form != "frozen":
            return of_rows(head, arrays, targets, real, cotangents, form)
        values, pull = jax.vjp(lambda x: token_statistics(head, x, arrays[1], targets, real, *arrays[2:]), arrays[0])
        return values, *pull(dict(zip(NAMES, cotangents, strict=True)))

    found = jax.jit(run)(arrays, targets, real, cotangents)
    flat = tuple(x.reshape(-1, EMBED) for x in arrays), targets.ravel(), real.ravel()
    with jax.enable_x64(True):
        double = [jnp.asarray(x, jnp.float64) for x in flat[0]]

        def total(hidden, projection):
            values = defined(hidden, projection, *double[2:], flat[1], (3.0, None))
            kept = {name: jnp.where(flat[2], values[name], 0) for name in NAMES}
            return sum((kept[name] * c.ravel()).sum() for name, c in zip(NAMES, cotangents, strict=True)), kept

        (d_hidden, d_projection), values = jax.grad(total, (0, 1), has_aux=True)(*double[:2])
    wanted = ({n: v.reshape(rows, scored) for n, v in values.items()}, d_hidden.reshape(hidden.shape), d_projection)
    assert_near(found, wanted[: len(found)], 5e-6)


@pytest.mark.parametrize("sizes", [None, (2, 2, 2)], ids=str)
def test_states_are_taken_where_they_predict_and_their_gradients_come_back_there(sizes):
    # One state, the last of the prompt, predicts the first token of both responses; the last slot is empty.
    hidden = np.arange(4 * 6 * 2, dtype=np.float32).reshape(4, 6, 2)
    sources = np.tile(np.array([[1, 2, 1, 4, 0]], np.int32), (4, 1))
    owners = np.tile(np.array([[0, 0, 1, 1, -1]], np.int32), (4, 1))
    cotangent = np.random.default_rng(0).normal(size=(4, 5, 2)).astype(np.float32)
    options = () if sizes is None else (MeshDevices(mesh_of(*sizes)),)

    @jax.jit
    def run(hidden, cotangent):
        found, pull = jax.vjp(lambda x: at_sources(x, sources, owners, 2, *options), hidden)
        return found, *pull(cotangent)

    found, gradient = run(hidden, cotangent)
    np.testing.assert_array_equal(found[:, :4], hidden[:, [1, 2, 1, 4]])
    wanted = np.zeros_like(hidden)
    wanted[:, 1], wanted[:, 2], wanted[:, 4] = cotangent[:, 0] + cotangent[:, 2], cotangent[:, 1], cotangent[:, 3]
    np.testing.assert_allclose(gradient, wanted, rtol=1e-6)


@pytest.mark.parametrize(
    ("names", "reference", "message"),
    [
        (("logps", "median"), "", r"unknown statistics \['median'\]; there are \['entropies', 'kl', "),
        (("kl",), "", "come together or not at all"),
        (("logps",), "both", "come together or not at all"),
    ],
    ids=str,
)
def test_operands_that_do_not_fit_are_refused(names, reference, message):
    (hidden, projection, *_), targets, _ = jax.tree.map(jnp.asarray, operands())
    other = (hidden[None], projection) if reference else ()
    with pytest.raises(ValueError, match=message):
        token_statistics(Head(names), hidden[None], projection, targets[None], jnp.ones((1, TOKENS), bool), *other)
