"""Lists: rankings as probabilities, targets over a list, and lists that lack responses."""

import itertools
import math

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from tests.losses.worlds import SEEDS, losses_of, quick, random_responses, result_of


@pytest.fixture(autouse=True, scope="module")
def x64():
    with jax.enable_x64(True):
        yield


def softmax(x):
    e = np.exp(x - x.max(axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True)


@quick
@hypothesis.given(SEEDS, st.floats(0.01, 2))
def test_a_list_of_two_is_a_pair(seed, beta):
    responses = random_responses(np.float64, seed=seed)
    plain = losses_of(responses, "dpo", beta=beta)
    for loss in (dict(name="plackett_luce"), dict(name="info_nca", target="first")):
        np.testing.assert_allclose(losses_of(responses, beta=beta, **loss), plain, rtol=1e-9, atol=1e-13)


@quick
@hypothesis.given(SEEDS, st.integers(2, 4))
def test_the_rankings_of_a_list_have_the_probability_one(seed, size):
    ratios = random_responses(np.float64, responses=size, seed=seed).log_ratios[:1]
    orders = np.array(list(itertools.permutations(range(size))))
    lists = random_responses(np.float64, examples=len(orders), responses=size)
    ranked = lists._replace(log_ratios=ratios[0][orders])
    losses = result_of(ranked, "plackett_luce", beta=0.3).losses
    np.testing.assert_allclose(np.exp(-losses).sum(), 1, rtol=1e-12)


def test_plackett_luce_is_its_formula_on_what_there_is():
    responses = random_responses(np.float64, responses=4)
    lengths = np.array(responses.lengths)
    lengths[0, 3] = lengths[1, 2:] = lengths[2, 1] = 0  # also a gap, and a list of one below
    lengths[3, 1:] = 0
    found = result_of(responses._replace(lengths=jnp.asarray(lengths)), "plackett_luce", beta=0.3).losses
    for row, there, loss in zip(0.3 * np.asarray(responses.log_ratios), lengths > 0, found, strict=True):
        r = row[there]
        wanted = -sum(r[k] - np.log(np.exp(r[k:]).sum()) for k in range(len(r)))
        np.testing.assert_allclose(loss, wanted, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize(
    "loss",
    [
        dict(name="plackett_luce"),
        dict(name="exo"),
        dict(name="info_nca", score_temperature=0.5),
        dict(name="nca", score_temperature=0.5),
    ],
    ids=str,
)
def test_a_list_without_its_last_responses_is_a_shorter_list(loss):
    responses = random_responses(np.float64, responses=5)
    shorter = jax.tree.map(lambda x: x[:, :3] if x.ndim == 2 else x, responses)
    lacking = responses._replace(
        lengths=responses.lengths.at[:, 3:].set(0), scores=responses.scores.at[:, 3:].set(jnp.nan)
    )
    found = losses_of(lacking, **loss)
    np.testing.assert_allclose(found[:, :4], losses_of(shorter, **loss), rtol=1e-12)
    np.testing.assert_array_equal(found[:, 4:], 0)


def test_exo_is_the_reverse_divergence_from_the_target():
    responses = random_responses(np.float64, responses=4)
    p = softmax(0.3 * np.asarray(responses.log_ratios))
    t = softmax(np.asarray(responses.scores) / 0.2)
    found = result_of(responses, "exo", beta=0.3, score_temperature=0.2).losses
    np.testing.assert_allclose(found, (p * np.log(p / t)).sum(axis=1), rtol=1e-10)
    fitted = responses._replace(log_ratios=responses.scores / 0.2 / 0.3)
    np.testing.assert_allclose(losses_of(fitted, "exo", beta=0.3, score_temperature=0.2), 0, atol=1e-12)


@quick
@hypothesis.given(SEEDS, st.floats(0.001, 0.4))
def test_exo_of_a_pair_has_the_slope_of_its_link(seed, eps):
    responses = random_responses(np.float64, seed=seed)
    z = 0.3 * (np.asarray(responses.log_ratios)[:, 0] - np.asarray(responses.log_ratios)[:, 1])
    p = 1 / (1 + np.exp(-z))
    found = losses_of(responses, "exo", beta=0.3, target="pair", eps=eps)
    wanted = p * np.log(p / (1 - eps)) + (1 - p) * np.log((1 - p) / eps)
    np.testing.assert_allclose(found[:, 0], wanted, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(found[:, 1], 0.3 * p * (1 - p) * (z - np.log((1 - eps) / eps)), rtol=1e-8, atol=1e-12)


def test_the_official_target_of_exo_is_not_normalized():
    responses = random_responses(np.float64)
    normalized = result_of(responses, "exo", target="pair", eps=1 / (1 + math.exp(10))).losses
    official = result_of(responses, "exo", target="pair", log_eps=-10.0).losses
    np.testing.assert_allclose(official, normalized - np.log1p(np.exp(-10)), rtol=1e-10)


def test_info_nca_and_nca_are_their_formulas():
    responses = random_responses(np.float64, responses=3)
    bonus = np.array([0.2, 0, 0])
    t = softmax((np.asarray(responses.scores) + bonus) / 0.3)
    r = 0.5 * np.asarray(responses.log_ratios)
    options = dict(beta=0.5, score_temperature=0.3, score_bonus=0.2)
    np.testing.assert_allclose(
        result_of(responses, "info_nca", **options).losses, -(t * np.log(softmax(r))).sum(axis=1), rtol=1e-10
    )
    wanted = (t * np.logaddexp(0, -r) + np.logaddexp(0, r) / 3).sum(axis=1)
    np.testing.assert_allclose(result_of(responses, "nca", **options).losses, wanted, rtol=1e-12)


def test_nca_of_a_pair_is_that_of_the_authors_pairwise_code():
    responses = random_responses(np.float64)
    r = 0.5 * np.asarray(responses.log_ratios)
    wanted = np.logaddexp(0, -r[:, 0]) + np.logaddexp(0, r).sum(axis=1) / 2
    np.testing.assert_allclose(result_of(responses, "nca", beta=0.5, target="first").losses, wanted, rtol=1e-12)
