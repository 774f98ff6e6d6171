"""What objectives ask for beyond log-probs, in the update itself: against float64, one sequence at a time."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from daajax import gradient as gradients
from daajax import sharding
from daajax.data.batches import Batches
from daajax.data.labelled import with_mismatched
from daajax.losses.objective import Losses, Objective
from daajax.losses.objectives import dpo
from daajax.losses.scores import gap, log_ratios
from daajax.losses.terms import Needs, Term, bind
from tests.data.test_batches import planned, tokenized_data
from tests.test_scoring import (
    BATCH_SIZE,
    distributions,
    double,
    examples_of,
    host_params,
    mesh_of,
    one_by_one,
    placed_params,
    scorer_of,
    sequences,
    token_logps,
)
from tests.test_step import assert_gradients_near, reference_column

# Nats, and of each summed over up to some 20 tokens: float32 through two layers.
TOLERANCE = dict(rtol=3e-5, atol=3e-5)


@functools.partial(jax.jit, static_argnames=("scorer", "terms", "keys"))
def loss_and_gradient(scorer, params, batch, terms, state, live=None, *, keys):
    live = None if live is None else gradients.Live(scorer, live)
    return gradients.loss_and_gradient(scorer, params, batch, terms, state, batch_size=BATCH_SIZE, keys=keys, live=live)


@functools.partial(jax.jit, static_argnames=("scorer", "needs", "keys"))
def sums_under(scorer, params, part, needs, live=None, *, keys):
    live = None if live is None else gradients.Live(scorer, live)
    return gradients.sums_under(scorer, params, part, needs, keys=keys, live=live)[0]


def labelled():
    """Single responses, wanted and unwanted, each with another one's."""
    labels = (np.arange(BATCH_SIZE) % 3 > 0).astype(np.int8)
    return with_mismatched(dataclasses.replace(tokenized_data(examples_of(1)), labels=labels), seed=0, max_length=64)


def batch_of(data, sizes=(8, 1, 1), *, reference=None, fields=(), draws=(), **options):
    mesh = mesh_of(*sizes)
    plan = planned(data, batch_size=BATCH_SIZE, updates=1, row_multiple=sharding.row_multiple(mesh), **options)
    batch = Batches(data, plan, reference, fields=fields, draws=draws, seed=3)[0]
    return sharding.place(mesh, batch), plan.shape(0).keys


def placed(params, *sizes):
    """Parameters on a mesh, where the policy's are."""
    return jax.device_put(params, jax.tree.map(lambda x: x.sharding, placed_params(*sizes)))


# ---------------------------------------------------------------------- sums over tokens


@functools.cache
def other_params():
    """A reference: the policy with some noise."""
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda x: (x + 0.1 * rng.normal(size=x.shape)).astype(np.float32), host_params())


@functools.cache
def expected_sums():
    """By name, of every example and response, in float64; with `reference`, the sums of its log-probs."""
    examples = examples_of()
    tokens, scored = sequences(examples)
    with jax.enable_x64(True):
        policy, reference = (
            np.asarray(jax.jit(distributions)(double(params), tokens)) for params in (host_params(), other_params())
        )
    picked = [np.take_along_axis(np.log(p), tokens[:, 1:, None], axis=2)[:, :, 0] for p in (policy, reference)]
    of_tokens = {
        "logps": picked[0],
        "reference": picked[1],
        "sum_squares": np.log((policy**2).sum(axis=2)),
        "kl": (reference * np.log(reference / policy)).sum(axis=2),
        "reference_entropies": -(reference * np.log(reference)).sum(axis=2) / np.log(reference.shape[2]),
    }
    sums = {name: np.zeros((BATCH_SIZE, 2)) for name in (*of_tokens, "tail_log_ratios")}
    for example in range(BATCH_SIZE):
        places = [np.flatnonzero(scored[2 * example + k, 1:]) for k in range(2)]
        for k, mine in enumerate(places):
            row = 2 * example + k
            for name, values in of_tokens.items():
                sums[name][example, k] = values[row, mine].sum()
            for place in mine[min(map(len, places)) :]:
                sums["tail_log_ratios"][example, k] += picked[0][row, place] - picked[1][row, place]
    return sums


WHOLE = ("sum_squares", "kl", "reference_entropies", "tail_log_ratios")


def needs_of(*sums):
    """What a loss needs that reads these sums."""
    function = functools.partial(lambda responses: Losses(gap(log_ratios(responses)), None))
    return Needs.of([Term("all", Objective(function, sums=sums), function)])


@pytest.mark.parametrize("options", [{}, {"prefix_sharing": False, "packing": False}], ids=str)
def test_sums_over_whole_distributions_are_those_of_float64(options):
    batch, keys = batch_of(tokenized_data(examples_of()), **options)
    part = {name: value[0] for name, value in batch.items()}
    reference = placed(other_params())
    found = sums_under(scorer_of(), placed_params(), part, needs_of(*WHOLE), reference, keys=keys)
    wanted, ids = expected_sums(), np.asarray(part["ids"])
    real = ids >= 0
    assert set(found.further) == set(WHOLE)
    for name in WHOLE:
        np.testing.assert_allclose(np.asarray(found.further[name])[real], wanted[name][ids[real]], **TOLERANCE)
        assert not np.asarray(found.further[name])[~real].any()
    ratios = wanted["logps"] - wanted["reference"]
    np.testing.assert_allclose(np.asarray(found.log_ratios)[real], ratios[ids[real]], **TOLERANCE)


@pytest.mark.slow
@pytest.mark.parametrize("micro_batches", [1, 2])
def test_a_live_reference_gives_the_gradient_that_its_cached_log_probs_give(micro_batches):
    function = functools.partial(dpo, beta=0.3)
    # Coupled, so that several parts are scored in one pass and pulled back in another.
    terms = (Term("dpo", Objective(dpo, coupled=micro_batches > 1), function),)
    data = tokenized_data(examples_of())
    batch, keys = batch_of(data, reference=reference_column(), micro_batches=micro_batches)
    live = placed(other_params())
    parts = [{name: value[n] for name, value in batch.items()} for n in range(micro_batches)]
    known = jnp.stack([token_logps(scorer_of(), live, part, keys=keys) for part in parts])
    cached = {**batch, "reference": known}
    (one, logged, _), (two, wanted, _) = (
        loss_and_gradient(scorer_of(), placed_params(), given, terms, {}, reference, keys=keys)
        for given, reference in ((batch, live), (cached, None))
    )
    assert_gradients_near(jax.device_get(one), jax.device_get(two))
    for name, value in wanted.values().items():
        assert float(logged.values()[name]) == pytest.approx(float(value), rel=1e-5, abs=1e-5)


def test_what_a_live_reference_knows_is_what_would_have_been_cached():
    batch, keys = batch_of(tokenized_data(examples_of()), micro_batches=2)
    known = gradients.known_of_reference(
        gradients.Live(scorer_of(), placed_params()), batch, needs_of("reference_entropies"), keys=keys
    )
    assert set(known) == {"reference", "entropies"}
    part = {name: value[1] for name, value in batch.items()}
    wanted = token_logps(scorer_of(), placed_params(), part, keys=keys)
    np.testing.assert_allclose(known["reference"][1], wanted, rtol=1e-6, atol=1e-6)


def test_drawn_tokens_are_summed_for_policy_and_reference_alike():
    batch, keys = batch_of(
        tokenized_data(examples_of()), reference=reference_column(), draws=("kept", "reference_kept")
    )
    part = {name: value[0] for name, value in batch.items()}
    needs = needs_of("kept_log_ratios", "independently_kept_log_ratios")
    found = sums_under(scorer_of(), placed_params(), part, needs, keys=keys)
    logps = np.asarray(token_logps(scorer_of(), placed_params(), part, keys=keys), np.float64)
    host = {name: np.asarray(value) for name, value in part.items()}
    shared, independent = np.zeros((2, *host["lengths"].shape))
    for row, place in zip(*np.nonzero(host["owners"] >= 0), strict=True):
        slot, response = divmod(int(host["owners"][row, place]), 2)
        reference = float(host["reference"][row, place])
        if host["kept"][row, place]:
            shared[row, slot, response] += logps[row, place] - reference
            independent[row, slot, response] += logps[row, place]
        if host["reference_kept"][row, place]:
            independent[row, slot, response] -= reference
    np.testing.assert_allclose(found.further["kept_log_ratios"], shared, **TOLERANCE)
    np.testing.assert_allclose(found.further["independently_kept_log_ratios"], independent, **TOLERANCE)
    assert np.abs(shared - independent).max() > 0.1


# ---------------------------------------------------------------------- coupled objectives


KTO = dict(name="kto", beta=0.3, desirable_weight=1.0, undesirable_weight=1.3)


def as_examples(data):
    """Tokenized data as the lists they are made of."""
    found = []
    for example in range(len(data.weights)):
        bounds = np.cumsum([data.starts[example], *data.lengths[example]])
        spans = [slice(*pair) for pair in itertools.pairwise(bounds)]
        found.append(
            examples_of()[0]._replace(
                prompt=data.tokens[spans[0]].tolist(),
                responses=[data.tokens[span].tolist() for span in spans[1:]],
                scored=[data.scored[span].tolist() for span in spans[1:]],
                weight=float(data.weights[example]),
            )
        )
    return found


@functools.cache
def expected_kto():
    """Loss and gradient of KTO, written from the paper, one sequence at a time; the reference is some noise off."""
    data = labelled()
    tokens, scored = sequences(as_examples(data))
    labels, weights = np.asarray(data.labels), data.weights.astype(np.float64)
    with jax.enable_x64(True):
        fixed = jnp.where(scored[:, 1:], jax.jit(one_by_one)(double(other_params()), tokens), 0).sum(axis=1)

        def loss(params):
            sums = jnp.where(scored[:, 1:], one_by_one(params, tokens), 0).sum(axis=1)
            q = (sums - fixed)[: 2 * BATCH_SIZE].reshape(BATCH_SIZE, 2)
            z = jax.lax.stop_gradient(jnp.maximum(q[:, 1].mean(), 0))
            wanted = 1 - 1 / (1 + jnp.exp(-0.3 * (q[:, 0] - z)))
            unwanted = 1.3 * (1 - 1 / (1 + jnp.exp(-0.3 * (z - q[:, 0]))))
            return (weights * jnp.where(labels == 1, wanted, unwanted)).mean(), z

        (value, z), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(double(host_params()))
        return float(value), float(z), jax.device_get(gradient)


@pytest.mark.parametrize(
    ("sizes", "micro_batches"),
    [
        pytest.param((8, 1, 1), 1, marks=pytest.mark.slow),
        ((2, 2, 2), 4),
        pytest.param((8, 1, 1), 4, marks=pytest.mark.slow),
        pytest.param((1, 8, 1), 2, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_kto_is_that_of_the_whole_update_whatever_its_parts_and_the_mesh(sizes, micro_batches):
    value, z, wanted = expected_kto()
    assert z > 0.1  # or the anchor would not show
    scorer, needs = scorer_of(*sizes), Needs.of(bind([KTO]))
    batch, keys = batch_of(labelled(), sizes, fields=needs.fields, micro_batches=micro_batches)
    reference = placed(other_params(), *sizes)
    gradient, logged, _ = loss_and_gradient(scorer, placed_params(*sizes), batch, bind([KTO]), {}, reference, keys=keys)
    assert float(logged.values()["loss"]) == pytest.approx(value, rel=3e-5)
    assert_gradients_near(jax.device_get(gradient), wanted)
