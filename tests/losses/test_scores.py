"""Scores: what becomes of log-probs before they are compared, and of responses that there are not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from daajax.losses import scores
from daajax.losses.scores import Responses
from tests.losses.worlds import random_responses


@pytest.fixture(autouse=True, scope="module")
def x64():
    with jax.enable_x64(True):
        yield


def test_scores_of_a_response_that_there_is_not_are_zero():
    responses = Responses(jnp.zeros((1, 2)), jnp.zeros((1, 2)), jnp.array([[0, 3]]), scores=jnp.array([[jnp.nan, 2.0]]))
    for score in scores.SCORES.values():
        np.testing.assert_array_equal(score(responses), [[0, 0]])
    np.testing.assert_array_equal(scores.data_scores(responses), [[0, 2]])


def test_means_are_per_scored_token():
    responses = random_responses(np.float64)
    np.testing.assert_allclose(scores.mean_logps(responses) * responses.lengths, responses.logps)
    np.testing.assert_allclose(scores.mean_log_ratios(responses) * responses.lengths, responses.log_ratios)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_log_odds_are_those_of_the_probability(dtype):
    p = np.array([1e-4, 0.1, 0.5, 0.9, 0.999])
    logps = jnp.asarray(np.log(p), dtype)
    tolerance = 1e-4 if dtype == np.float32 else 1e-12  # log(0.999) in float32 leaves 1 - p four digits
    np.testing.assert_allclose(scores.log_odds(logps), np.log(p / (1 - p)), rtol=tolerance, atol=tolerance)
    slope = jax.vmap(jax.grad(scores.log_odds))(logps)
    np.testing.assert_allclose(slope, 1 / (1 - p), rtol=tolerance)


def test_log_odds_of_a_certain_response_end_where_the_dtype_does():
    certain = jnp.zeros((), jnp.float32)
    np.testing.assert_allclose(scores.log_odds(certain), -np.log(np.finfo(np.float32).eps), rtol=1e-6)
    assert jax.grad(scores.log_odds)(certain) == 1
    # a floor of 1e-7: log(p / 1e-7) with p = e^-1e-9
    np.testing.assert_allclose(scores.log_odds(jnp.float64(-1e-9), 1e-7), -1e-9 - np.log(1e-7), rtol=1e-12)
    np.testing.assert_allclose(scores.log_odds(jnp.float64(-1e-9)), -np.log(1e-9), rtol=1e-9)


@pytest.mark.parametrize("alpha", [-2.0, -0.3, 0.25, 1.0])
def test_the_power_is_that_of_the_formula_and_its_limit_the_argument(alpha):
    x = jnp.array([-5.0, -0.1, 0.0, 2.0])
    np.testing.assert_allclose(scores.power(x, alpha), (1 - np.exp(-alpha * np.asarray(x))) / alpha, rtol=1e-12)
    np.testing.assert_array_equal(scores.power(x, 0.0), x)
    np.testing.assert_allclose(scores.power(x, 1e-9), x, rtol=1e-8)


def test_exponentials_end_before_the_range_of_the_dtype():
    for dtype, end in ((np.float32, 79.8), (np.float64, 638.7)):
        values = scores.exponential(jnp.array([end, 1e4], dtype))
        np.testing.assert_allclose(values[0], np.exp(np.float64(end)), rtol=1e-5)
        assert values[0] < values[1] < np.inf
        for alpha in (1e-3, 1.0):
            assert np.isfinite(scores.power(jnp.array([-1e9], dtype), alpha)).all()


def test_dispersion_is_the_log_of_the_mean_share_of_entropy():
    sums = {"reference_entropies": jnp.array([[2.0, 1.0], [0.0, 0.0]])}
    responses = Responses(jnp.zeros((2, 2)), None, jnp.array([[4, 10], [3, 3]]), sums=sums)
    phi = scores.dispersion(responses)
    np.testing.assert_allclose(phi[0], -np.log((0.5 + 0.1) / 2), rtol=1e-12)
    assert np.isfinite(phi[1])
