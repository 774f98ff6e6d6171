"""Losses where the policy is the reference, which many objectives have in closed form."""

import math

import numpy as np
import pytest

from tests.losses.worlds import at_reference, losses_and_gradients, losses_of, result_of

LN2 = math.log(2)


@pytest.mark.parametrize(
    ("loss", "value"),
    [
        (dict(name="dpo", beta=0.1), LN2),
        (dict(name="cdpo", label_smoothing=0.2), LN2),
        (dict(name="robust", label_smoothing=0.3), LN2),
        (dict(name="dpo_unweighted"), 0),
        (dict(name="ipo", beta=0.1), 25),  # 1 / (4 beta²)
        (dict(name="ipo_mean", beta=0.5), 1),
        (dict(name="hinge", delta=1.5), 1.5),
        (dict(name="spin"), LN2),
        (dict(name="spin", link="hinge"), 1),
        (dict(name="dpo_norm"), LN2),
        (dict(name="discopop"), LN2 / 2 + 1 / 2),
        (dict(name="discopop", link="cell"), LN2 / 2 + 1 / 2),
        (dict(name="f_dpo", divergence="forward_kl"), LN2),
        (dict(name="f_dpo", divergence="js"), LN2),
        (dict(name="f_dpo", divergence="alpha"), LN2),
        (dict(name="dpop"), LN2),
        (dict(name="cal_dpo", beta=0.1, calibration_weight=0.5), LN2 + 25),  # w / (2 beta²)
        (dict(name="sppo_hard", beta=0.1), 50),  # ½ / beta²
        (dict(name="apo_zero"), 1),
        (dict(name="apo_zero", constant=0.0), 0),
        (dict(name="apo_down"), 1),
        (dict(name="dno"), LN2),
        (dict(name="aot"), LN2),
        (dict(name="aot_unpaired"), LN2),
        (dict(name="plackett_luce"), LN2),
        (dict(name="info_nca"), LN2),
        (dict(name="nca"), 2 * LN2),
        (dict(name="nca", target="first"), 2 * LN2),
        (dict(name="exo", target="pair", eps=0.1), -math.log(2 * math.sqrt(0.9 * 0.1))),  # KL((½, ½) ‖ (1-ε, ε))
        (dict(name="kto", desirable_weight=1.5, undesirable_weight=1.5), 0.75),
        (dict(name="apo_zero_unpaired"), 0.5),
        (dict(name="kto_pair", desirable_weight=1.5), 0.625),  # (λ_D + λ_U) / 4
        (dict(name="kto_pair", desirable_weight=1.5, anchor="rejected"), 1.25),
        (dict(name="bco_pair", delta="zero"), 2 * LN2),
        (dict(name="ld_dpo"), LN2),
        (dict(name="sampo"), LN2),
        (dict(name="tdpo1"), LN2),
        (dict(name="tdpo2"), LN2),
        (dict(name="mallows_dpo"), LN2),
        (dict(name="mallows_ipo", beta=0.5), 1),
        (dict(name="mallows_ipo", form="rainbow"), 0.25),
        (dict(name="rainbow", mixing=1.0), LN2),
        (dict(name="rainbow", mixing=None, home_advantage=0.0, link="cauchy"), LN2),
        (dict(name="online_dpo"), LN2),
        (dict(name="d2po", link="ipo", beta=0.5), 1),
        (dict(name="pairwise"), LN2),
    ],
    ids=str,
)
def test_losses_are_known_in_closed_form(loss, value):
    np.testing.assert_allclose(losses_of(at_reference(), **loss)[:, 0], value, rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("loss", "gradient"),
    [
        (dict(name="dpo", beta=0.1), 0.05),  # half of beta
        (dict(name="dpo", beta=0.5), 0.25),
        (dict(name="dpo", beta=0.1, label_smoothing=0.3), 0.02),  # beta (½ - ε)
        (dict(name="robust", beta=0.1, label_smoothing=0.1), 0.1 * (0.5 + 0.1 / 0.8)),
        (dict(name="dpo_unweighted", beta=0.3), 0.3),
        (dict(name="ipo", beta=0.1), 10.0),  # 1 / beta
        (dict(name="ipo", beta=0.5), 2.0),
        (dict(name="hinge", beta=0.2), 0.2),
        (dict(name="apo_zero", beta=0.4), 0.1),  # beta / 4
        (dict(name="sppo_hard", beta=0.5), 2.0),
        (dict(name="dpop", beta=0.1), 0.05),  # the kink, whose slope is 0
        (dict(name="plackett_luce", beta=0.1), 0.05),
        (dict(name="f_dpo", beta=0.1), 0.05),
        (dict(name="f_dpo", divergence="js", beta=0.1), 0.025),
    ],
    ids=str,
)
def test_gradients_are_known_in_closed_form(loss, gradient):
    found = losses_of(at_reference(), **loss)[:, 1:]
    np.testing.assert_allclose(found, gradient * np.broadcast_to([-1.0, 1.0], (6, 2)), rtol=2e-6)


def test_the_gradient_of_ipo_mean_is_shared_among_the_tokens():
    given = at_reference()
    _, gradients = losses_and_gradients(lambda r: result_of(r, "ipo_mean", beta=0.1), given)
    np.testing.assert_allclose(gradients, np.array([-10.0, 10.0]) / np.asarray(given.lengths), rtol=1e-6)


def test_values_that_hang_on_the_data_at_the_reference():
    given = at_reference()
    scores = np.asarray(given.scores, np.float64)
    margin = scores[:, 0] - scores[:, 1]
    np.testing.assert_allclose(losses_of(given, "rebel", eta=3.0)[:, 0], (3 * margin) ** 2, rtol=1e-5)
    np.testing.assert_allclose(losses_of(given, "rebel", eta=3.0, scale="paper")[:, 0], margin**2, rtol=1e-5)
    np.testing.assert_allclose(losses_of(given, "odpo")[:, 0], np.log1p(margin), rtol=1e-5)  # -log σ(-log margin)
    np.testing.assert_allclose(
        losses_of(given, "sppo", beta=0.1)[:, 0], 50 * ((scores - 0.5) ** 2).sum(axis=1), rtol=1e-5
    )
    p = 1 / (1 + np.exp(-margin))
    entropy = -p * np.log(p) - (1 - p) * np.log(1 - p)
    np.testing.assert_allclose(losses_of(given, "rpo_reward")[:, 0], LN2 - entropy, rtol=1e-3, atol=1e-7)
    weights = np.asarray(result_of(given, "wpo").metrics["weights"])
    np.testing.assert_allclose(losses_of(given, "wpo")[:, 0], weights * LN2, rtol=1e-6)


def test_lists_at_the_reference_are_as_likely_in_any_order():
    given = at_reference(responses=4)
    np.testing.assert_allclose(losses_of(given, "plackett_luce")[:, 0], math.log(24), rtol=1e-6)
    np.testing.assert_allclose(losses_of(given, "info_nca")[:, 0], math.log(4), rtol=1e-6)
    np.testing.assert_allclose(losses_of(given, "nca")[:, 0], 2 * LN2, rtol=1e-6)
