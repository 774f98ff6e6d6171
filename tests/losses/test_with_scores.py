"""Pairs with the data's scores: what the scores do, and in which limits nothing is left of them."""

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


def gap(values):
    return np.asarray(values)[:, 0] - np.asarray(values)[:, 1]


@pytest.mark.parametrize("transform", ["log", "identity"])
@pytest.mark.parametrize("of", ["difference", "ratio"])
def test_odpo_asks_for_the_margin_of_the_scores(transform, of):
    responses = random_responses(np.float64)
    scores = np.asarray(responses.scores)
    margin = gap(scores) if of == "difference" else scores[:, 0] / scores[:, 1]
    offset = np.log(margin) if transform == "log" else margin
    found = result_of(responses, "odpo", beta=0.3, alpha=0.7, transform=transform, of=of)
    z = 0.3 * gap(responses.log_ratios) - 0.7 * offset
    np.testing.assert_allclose(found.losses, np.logaddexp(0, -z), rtol=1e-12)
    np.testing.assert_allclose(
        losses_of(responses, "odpo", alpha=0.0, transform=transform, of=of), losses_of(responses, "dpo"), rtol=1e-12
    )


@quick
@hypothesis.given(SEEDS, st.floats(0.1, 10))
def test_the_two_scales_of_rebel_differ_by_the_square_of_the_step(seed, eta):
    responses = random_responses(np.float64, seed=seed)
    code, paper = (losses_of(responses, "rebel", eta=eta, scale=scale) for scale in ("code", "paper"))
    np.testing.assert_allclose(code, eta**2 * paper, rtol=1e-9, atol=1e-12)
    swapped = jax.tree.map(lambda x: x[:, ::-1] if x.ndim == 2 else x, responses)
    np.testing.assert_allclose(losses_of(swapped, "rebel", eta=eta)[:, [0, 2, 1]], code, rtol=1e-12)


def test_rebel_loses_nothing_where_the_gap_is_that_of_the_scores():
    responses = random_responses(np.float64)
    fitted = responses._replace(log_ratios=3.0 * responses.scores)
    np.testing.assert_allclose(losses_of(fitted, "rebel", eta=3.0), 0, atol=1e-12)


def test_dno_of_a_sure_preference_is_dpo_and_of_none_pulls_the_gap_to_zero():
    responses = random_responses(np.float64)
    sure = responses._replace(scores=jnp.broadcast_to(jnp.array([[100.0, 0.0]]), (6, 2)))
    np.testing.assert_allclose(losses_of(sure, "dno", eta=0.3), losses_of(responses, "dpo", beta=0.3), rtol=1e-12)
    even = responses._replace(scores=jnp.ones((6, 2)), log_ratios=jnp.zeros((6, 2)))
    np.testing.assert_allclose(losses_of(even, "dno")[:, 1:], 0, atol=1e-15)


@quick
@hypothesis.given(SEEDS, st.floats(0.1, 3), st.floats(0.1, 3))
def test_rpo_is_the_divergence_of_two_coins(seed, beta, eta):
    responses = random_responses(np.float64, seed=seed)
    target, found = eta * gap(responses.scores), beta * gap(responses.log_ratios)
    p, log_p, log_rest = 1 / (1 + np.exp(-target)), -np.logaddexp(0, -target), -np.logaddexp(0, target)
    wanted = p * (log_p + np.logaddexp(0, -found)) + (1 - p) * (log_rest + np.logaddexp(0, found))
    losses = losses_of(responses, "rpo_reward", beta=beta, eta=eta)
    np.testing.assert_allclose(losses[:, 0], wanted, rtol=1e-9, atol=1e-12)
    assert (losses[:, 0] >= 0).all()
    # d/dz of the divergence is σ(z) - p
    np.testing.assert_allclose(losses[:, 1], beta * (1 / (1 + np.exp(-found)) - p), rtol=1e-8, atol=1e-12)
    fitted = responses._replace(log_ratios=eta / beta * responses.scores)
    np.testing.assert_allclose(losses_of(fitted, "rpo_reward", beta=beta, eta=eta), 0, atol=1e-12)


def test_sppo_pulls_each_log_ratio_to_its_own_win_rate():
    responses = random_responses(np.float64)
    fitted = responses._replace(log_ratios=(responses.scores - 0.5) / 0.2)
    np.testing.assert_allclose(losses_of(fitted, "sppo", beta=0.2), 0, atol=1e-12)
    wanted = np.square(np.asarray(responses.log_ratios) - np.asarray(fitted.log_ratios)).sum(axis=1) / 2
    np.testing.assert_allclose(result_of(responses, "sppo", beta=0.2).losses, wanted, rtol=1e-12)
