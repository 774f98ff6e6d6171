"""Pairs against a reference with something added: to the logit, or to the loss."""

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


@quick
@hypothesis.given(SEEDS, st.floats(0, 100))
def test_the_penalty_of_dpop_falls_on_chosen_responses_that_became_less_likely(seed, penalty):
    responses = random_responses(np.float64, seed=seed)
    ratios = np.asarray(responses.log_ratios)
    shifted = responses._replace(log_ratios=responses.log_ratios.at[:, 0].add(penalty * np.minimum(ratios[:, 0], 0)))
    found, plain = losses_of(responses, "dpop", penalty=penalty), losses_of(shifted, "dpo", beta=0.3)
    np.testing.assert_allclose(found[:, 0], plain[:, 0], rtol=1e-12)
    steeper = np.where(ratios[:, 0] < 0, 1 + penalty, 1)
    np.testing.assert_allclose(found[:, 1], steeper * plain[:, 1], rtol=1e-12)


def test_r_dpo_counts_tokens_beside_beta():
    responses = random_responses(np.float64)
    lengths = np.asarray(responses.lengths)
    longer = lengths[:, 0] - lengths[:, 1]
    q = np.asarray(responses.log_ratios)
    z = 0.2 * (q[:, 0] - q[:, 1]) + 0.05 * longer
    np.testing.assert_allclose(
        result_of(responses, "r_dpo", beta=0.2, alpha=0.05).losses, np.logaddexp(0, -z), rtol=1e-12
    )


@pytest.mark.parametrize("reduction", ["seq", "sum", "batch"])
def test_dpo_nll_adds_the_likelihood_of_the_chosen_response_with_its_reduction(reduction):
    responses = random_responses(np.float64)
    found = result_of(responses, "dpo_nll", nll_weight=0.3, nll_reduction=reduction)
    logps, lengths = np.asarray(responses.logps)[:, 0], np.asarray(responses.lengths)[:, 0]
    plain = np.asarray(result_of(responses, "dpo").losses)
    nll = -0.3 * logps / (lengths if reduction == "seq" else 1)
    if reduction == "batch":
        np.testing.assert_array_equal(found.losses, plain)
        np.testing.assert_allclose(found.token_losses, nll, rtol=1e-12)
    else:
        np.testing.assert_allclose(found.losses, plain + nll, rtol=1e-12)
        assert found.token_losses is None
