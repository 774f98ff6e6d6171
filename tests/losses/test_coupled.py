"""Objectives in which the examples of an update meet, against loops over them."""

import hypothesis
import jax
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


@quick
@hypothesis.given(SEEDS, st.floats(0.01, 1), st.sampled_from([0.0, 0.1]))
def test_aot_pairs_the_ranks_of_both_sides(seed, beta, share):
    responses = random_responses(np.float64, seed=seed)
    policy, q = gap(responses.logps), np.asarray(responses.log_ratios)
    for name, left, right in (("aot", policy, policy - gap(q)), ("aot_unpaired", q[:, 0], q[:, 1])):
        found = result_of(responses, name, beta=beta, label_smoothing=share).losses
        for rank, example in enumerate(np.argsort(left)):
            z = beta * (left[example] - np.sort(right)[rank])
            wanted = (1 - share) * np.logaddexp(0, -z) + share * np.logaddexp(0, z)
            np.testing.assert_allclose(found[example], wanted, rtol=1e-9)


def test_where_both_sides_have_the_same_order_aot_is_dpo():
    responses = random_responses(np.float64)
    small = responses._replace(log_ratios=1e-6 * responses.log_ratios)  # which leaves the order of the gaps alone
    np.testing.assert_allclose(losses_of(small, "aot", beta=0.3), losses_of(small, "dpo", beta=0.3), rtol=1e-8)


def test_the_gradient_of_unpaired_aot_reaches_the_rejected_response_of_the_same_rank():
    responses = random_responses(np.float64)
    q = np.asarray(responses.log_ratios)
    found = losses_of(responses, "aot_unpaired", beta=0.3)[:, 1:]
    left, right = np.argsort(q[:, 0]), np.argsort(q[:, 1])
    weight = 0.3 / (1 + np.exp(0.3 * (q[left, 0] - q[right, 1])))
    np.testing.assert_allclose(found[left, 0], -weight, rtol=1e-9)
    np.testing.assert_allclose(found[right, 1], weight, rtol=1e-9)


@quick
@hypothesis.given(SEEDS)
def test_beta_dpo_that_follows_nothing_and_leaves_nothing_out_is_dpo(seed):
    responses = random_responses(np.float64, seed=seed)
    found = losses_of(responses, "beta_dpo", alpha=0.0, rho=0.0)
    np.testing.assert_allclose(found, losses_of(responses, "dpo"), rtol=1e-10, atol=1e-14)


@quick
@hypothesis.given(SEEDS, st.sampled_from([0.0, 0.2, 0.5, 0.7, 0.99]))
def test_beta_dpo_is_its_algorithm(seed, rho):
    responses = random_responses(np.float64, examples=10, seed=seed)
    h = gap(responses.log_ratios)
    mean, std = 0.9 * 0.1 + 0.1 * h.mean(), 0.9 * 2.0 + 0.1 * h.std(ddof=1)
    keys = -0.5 * ((h - mean) / std) ** 2 + np.asarray(responses.gumbel)
    count = {0.0: 10, 0.2: 8, 0.5: 5, 0.7: 3, 0.99: 1}[rho]
    kept = np.zeros(10)
    kept[np.argsort(-keys)[:count]] = 1
    beta = max(1e-3, 0.1 * (1 + 0.6 * (h[kept > 0].mean() - mean)))
    result = result_of(responses, "beta_dpo", rho=rho)
    np.testing.assert_array_equal(result.metrics["kept"], kept)
    np.testing.assert_allclose(result.metrics["beta"], beta, rtol=1e-10)
    np.testing.assert_allclose(result.losses, kept * np.logaddexp(0, -beta * h) * 10 / count, rtol=1e-10)
    np.testing.assert_allclose([result.state["mean"], result.state["std"]], [mean, std], rtol=1e-10)
    found = losses_of(responses, "beta_dpo", rho=rho)[:, 1:]
    weight = kept * beta / (1 + np.exp(beta * h)) * 10 / count  # neither beta nor the choice has a gradient
    np.testing.assert_allclose(found, np.stack([-weight, weight], axis=1), rtol=1e-9, atol=1e-15)


def test_pairs_are_drawn_in_proportion_to_their_weight():
    responses = random_responses(np.float64)
    h = gap(responses.log_ratios)
    mean, std = 0.9 * 0.1 + 0.1 * h.mean(), 0.9 * 2.0 + 0.1 * h.std(ddof=1)
    weights = np.exp(-0.5 * ((h - mean) / std) ** 2)
    draws = jax.random.gumbel(jax.random.key(0), (20_000, 6))
    kept = jax.jit(jax.vmap(lambda g: result_of(responses._replace(gumbel=g), "beta_dpo", rho=0.9).metrics["kept"]))
    # Of 20,000 draws of one pair each, a share p is off by sqrt(p (1 - p) / 20,000) < 0.0036; four times that.
    np.testing.assert_allclose(kept(draws).mean(axis=0), weights / weights.sum(), atol=0.0145)


def test_beta_dpo_of_a_single_pair_is_a_number():
    single = random_responses(np.float64, examples=1)
    result = result_of(single, "beta_dpo")
    assert np.isfinite(result.losses).all()
    np.testing.assert_array_equal(result.metrics["kept"], 1)
