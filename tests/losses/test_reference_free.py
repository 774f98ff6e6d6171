"""Objectives without a reference: what they make of log-probs alone."""

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from daajax.losses.terms import bind
from tests.losses.worlds import SEEDS, losses_of, quick, random_responses, result_of


@pytest.fixture(autouse=True, scope="module")
def x64():
    with jax.enable_x64(True):
        yield


def means(responses):
    return np.asarray(responses.logps) / np.asarray(responses.lengths)


def test_simpo_is_indifferent_to_the_reference_and_hangs_on_the_lengths():
    responses = random_responses(np.float64)
    without = result_of(responses._replace(log_ratios=None), "simpo").losses
    np.testing.assert_array_equal(without, result_of(responses, "simpo").losses)
    # Twice the tokens at the same sums are half the means, as half of beta would be.
    longer = responses._replace(lengths=2 * responses.lengths)
    np.testing.assert_allclose(
        losses_of(longer, "simpo", beta=2.0), losses_of(responses, "simpo", beta=1.0), rtol=1e-12
    )


def test_the_hinge_of_simpo_is_that_of_the_same_logit():
    responses = random_responses(np.float64)
    m = means(responses)
    found = result_of(responses, "simpo", beta=2.0, gamma=0.3, link="hinge").losses
    np.testing.assert_allclose(found, np.maximum(0, 1 - (2.0 * (m[:, 0] - m[:, 1]) - 0.3)), rtol=1e-12)


@quick
@hypothesis.given(SEEDS, st.floats(0.5, 10), st.floats(0, 2))
def test_alphapo_without_a_bend_is_simpo(seed, beta, gamma):
    responses = random_responses(np.float64, seed=seed)
    plain = losses_of(responses, "simpo", beta=beta, gamma=gamma)
    np.testing.assert_array_equal(losses_of(responses, "alphapo", beta=beta, gamma=gamma, alpha=0.0), plain)
    for alpha in (-1e-8, 1e-8):
        nearly = losses_of(responses, "alphapo", beta=beta, gamma=gamma, alpha=alpha)
        np.testing.assert_allclose(nearly, plain, rtol=1e-5, atol=1e-12)  # of order alpha m²


@pytest.mark.parametrize("alpha", [-0.5, 0.25, 1.0])
def test_alphapo_is_its_formula(alpha):
    responses = random_responses(np.float64)
    reward = (1 - np.exp(-alpha * means(responses))) / alpha
    z = 2.5 * (reward[:, 0] - reward[:, 1]) - 0.1
    found = result_of(responses, "alphapo", beta=2.5, gamma=0.1, alpha=alpha).losses
    np.testing.assert_allclose(found, np.logaddexp(0, -z), rtol=1e-12)


@pytest.mark.parametrize("reduction", ["seq", "sum", "batch"])
def test_cpo_is_dpo_without_a_reference_plus_the_likelihood(reduction):
    responses = random_responses(np.float64)
    free = responses._replace(log_ratios=responses.logps)
    found = result_of(responses, "cpo", beta=0.2, nll_weight=0.3, nll_reduction=reduction)
    wanted = result_of(free, "dpo_nll", beta=0.2, nll_weight=0.3, nll_reduction=reduction)
    np.testing.assert_allclose(found.losses, wanted.losses, rtol=1e-12)
    assert (found.token_losses is None) == (reduction != "batch")
    if reduction == "batch":
        np.testing.assert_array_equal(found.token_losses, wanted.token_losses)


def test_cpo_with_the_link_of_ipo_compares_means():
    responses = random_responses(np.float64)
    free = responses._replace(log_ratios=responses.logps)
    np.testing.assert_allclose(
        losses_of(responses, "cpo", beta=0.2, nll_weight=0.0, link="ipo"),
        losses_of(free, "ipo_mean", beta=0.2),
        rtol=1e-12,
    )


def test_cpo_simpo_is_simpo_plus_the_likelihood():
    responses = random_responses(np.float64)
    found = losses_of(responses, "cpo_simpo", beta=3.0, gamma=1.0, nll_weight=0.4, nll_reduction="seq")
    wanted = losses_of(responses, "simpo", beta=3.0, gamma=1.0)
    np.testing.assert_allclose(found[:, 0], wanted[:, 0] - 0.4 * means(responses)[:, 0], rtol=1e-12)


@pytest.mark.parametrize("floor", [0.0, 1e-7])
def test_orpo_and_asft_are_their_formulas(floor):
    responses = random_responses(np.float64)
    m = means(responses)
    odds = m - np.log(1 - np.exp(m))
    orpo = result_of(responses, "orpo", odds_ratio_weight=0.3, beta=0.7, nll_weight=0.5, floor=floor).losses
    np.testing.assert_allclose(
        orpo, -0.5 * m[:, 0] + 0.3 * np.logaddexp(0, -0.7 * (odds[:, 0] - odds[:, 1])), rtol=1e-12
    )
    asft = result_of(responses, "asft", odds_weight=0.3, beta=0.7, nll_weight=0.5, floor=floor).losses
    terms = np.logaddexp(0, -0.7 * odds[:, 0]) + np.logaddexp(0, 0.7 * odds[:, 1])
    np.testing.assert_allclose(asft, -0.5 * m[:, 0] + 0.3 * terms, rtol=1e-12)


def test_slic_has_its_target_in_the_chosen_response_or_in_a_third():
    responses = random_responses(np.float64, responses=3)
    logps = np.asarray(responses.logps)
    calibration = np.maximum(0, 2.0 - 0.5 * (logps[:, 0] - logps[:, 1]))
    for target, index in (("chosen", 0), ("separate", 2)):
        found = result_of(responses, "slic_hf", delta=2.0, beta=0.5, sft_weight=0.3, sft_target=target).losses
        np.testing.assert_allclose(found, calibration - 0.3 * logps[:, index], rtol=1e-12)
    (chosen,), (separate,) = bind([dict(name="slic_hf")]), bind([dict(name="slic_hf", sft_target="separate")])
    assert (chosen.objective.responses, separate.objective.responses) == (2, 3)


def test_unlikelihood_has_a_constant_gradient():
    found = losses_of(random_responses(np.float64), "unlikelihood", alpha=0.3)
    np.testing.assert_allclose(found[:, 1:], np.broadcast_to([-1.0, 0.3], (6, 2)), rtol=1e-12)


@pytest.mark.parametrize("responses", [1, 2, 3])
def test_sft_is_the_negative_log_likelihood_of_the_first_response(responses):
    given = random_responses(np.float64, responses=responses)
    result = result_of(given, "sft")
    np.testing.assert_array_equal(result.token_losses, -given.logps[:, 0])
    np.testing.assert_array_equal(result.losses, 0)
    assert result.rewards is None
    (term,) = bind([dict(name="sft")])
    assert (term.objective.reference, term.objective.responses) == (False, 1)
    np.testing.assert_array_equal(result_of(given, "sft", reduction="sum").losses, -given.logps[:, 0])
    np.testing.assert_allclose(result_of(given, "sft", reduction="seq").losses, -means(given)[:, 0], rtol=1e-12)


def test_a_certain_response_has_finite_odds():
    certain = random_responses(np.float32)._replace(logps=jnp.zeros((6, 2), jnp.float32))
    for name in ("orpo", "asft"):
        assert np.isfinite(losses_of(certain, name)).all()
