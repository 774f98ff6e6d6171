"""Pairs whose responses are held to something of their own each."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.losses.worlds import losses_of, random_responses, result_of


@pytest.fixture(autouse=True, scope="module")
def x64():
    with jax.enable_x64(True):
        yield


def test_squares_of_cal_dpo_and_of_sppo_are_the_same_ones():
    responses = random_responses(np.float64)
    hard = losses_of(responses, "sppo_hard", beta=0.2)
    wins = responses._replace(scores=jnp.broadcast_to(jnp.array([[1.0, 0.0]]), (6, 2)))
    np.testing.assert_allclose(losses_of(wins, "sppo", beta=0.2), hard / 2, rtol=1e-12)
    np.testing.assert_allclose(
        losses_of(responses, "cal_dpo", beta=0.2, calibration_weight=0.7),
        losses_of(responses, "dpo", beta=1.0) + 0.7 * hard,
        rtol=1e-10,
    )


def test_apo_is_its_formula():
    responses = random_responses(np.float64)
    q = 0.3 * np.asarray(responses.log_ratios)

    def sigmoid(x):
        return 1 / (1 + np.exp(-x))

    zero, down = (result_of(responses, name, beta=0.3).losses for name in ("apo_zero", "apo_down"))
    np.testing.assert_allclose(zero, 1 - sigmoid(q[:, 0]) + sigmoid(q[:, 1]), rtol=1e-12)
    np.testing.assert_allclose(down, sigmoid(q[:, 0]) + 1 - sigmoid(q[:, 0] - q[:, 1]), rtol=1e-12)
