"""A loss put together by name: those that have a name of their own, and the parts together."""

import jax
import numpy as np
import pytest

from daajax.losses.terms import bind
from tests.losses.worlds import losses_of, random_responses, result_of


@pytest.fixture(autouse=True, scope="module")
def x64():
    with jax.enable_x64(True):
        yield


@pytest.mark.parametrize(
    ("composed", "named"),
    [
        (dict(), dict(name="dpo")),
        (dict(beta=0.3, label_smoothing=0.2), dict(name="cdpo", beta=0.3, label_smoothing=0.2)),
        (dict(score="mean_logratio", beta=5.0), dict(name="dpo_norm")),
        (dict(score="mean_logp", beta=2.0, gamma=0.5), dict(name="simpo")),
        (dict(score="mean_logp", beta=2.0, gamma=0.5, link="hinge"), dict(name="simpo", link="hinge")),
        (dict(link="hinge", beta=0.05), dict(name="hinge")),
        (dict(link="linear"), dict(name="dpo_unweighted")),
        (dict(link="lrml", beta=0.05), dict(name="discopop")),
        (dict(link="cell", beta=0.05), dict(name="discopop", link="cell")),
        (dict(length_weight=0.01), dict(name="r_dpo")),
        (dict(margin_weight=0.7), dict(name="odpo", alpha=0.7, transform="identity")),
        (dict(tail_weight=0.3), dict(name="ld_dpo", alpha=0.3)),
        (dict(nll_weight=0.3), dict(name="dpo_nll", nll_weight=0.3)),
        (dict(score="logp", nll_weight=1.0, nll_reduction="sum"), dict(name="cpo", nll_reduction="sum")),
        (dict(score="logp", beta=1.0, link="hinge"), dict(name="slic_hf", sft_weight=0.0)),
        (
            dict(link="cauchy", beta=0.3),
            dict(
                name="rainbow",
                link="cauchy",
                beta=0.3,
                mixing=None,
                home_advantage=0.0,
                dispersion_mean=None,
                length_normalization=False,
            ),
        ),
    ],
    ids=str,
)
def test_a_composed_loss_is_the_named_one(composed, named):
    responses = random_responses(np.float64)
    found = losses_of(responses, "pairwise", **composed)
    np.testing.assert_allclose(found, losses_of(responses, **named), rtol=1e-10, atol=1e-13)
    rewards = result_of(responses, "pairwise", **composed).rewards
    np.testing.assert_allclose(rewards, result_of(responses, **named).rewards, rtol=1e-12)


def test_the_square_link_is_ipo_times_the_square_of_beta():
    responses = random_responses(np.float64)
    found = losses_of(responses, "pairwise", link="square", beta=0.3)
    np.testing.assert_allclose(found, 0.09 * losses_of(responses, "ipo", beta=0.3), rtol=1e-10, atol=1e-13)


def test_the_parts_of_the_logit_add_up():
    responses = random_responses(np.float64)

    def gap(values):
        return np.asarray(values)[:, 0] - np.asarray(values)[:, 1]

    lengths = np.asarray(responses.lengths)
    counted = (np.asarray(responses.log_ratios) - 0.4 * np.asarray(responses.sums["tail_log_ratios"])) / lengths
    z = 3.0 * gap(counted) - 0.2 - 0.5 * gap(responses.scores) + 0.03 * gap(lengths)
    wanted = 0.9 * np.maximum(0, 1 - z) + 0.1 * np.maximum(0, 1 + z)
    options = dict(beta=3.0, gamma=0.2, margin_weight=0.5, length_weight=0.03, tail_weight=0.6, label_smoothing=0.1)
    found = result_of(
        responses, "pairwise", score="mean_logratio", link="hinge", nll_weight=0.7, nll_reduction="batch", **options
    )
    np.testing.assert_allclose(found.losses, wanted, rtol=1e-10)
    np.testing.assert_allclose(found.token_losses, -0.7 * responses.logps[:, 0], rtol=1e-12)


@pytest.mark.parametrize(
    ("options", "reference", "reads", "sums"),
    [
        ({}, True, (), ()),
        (dict(score="mean_logp"), False, (), ()),
        (dict(margin_weight=0.1), True, ("scores",), ()),
        (dict(tail_weight=0.5), True, (), ("tail_log_ratios",)),
    ],
    ids=str,
)
def test_it_asks_for_what_its_parts_read(options, reference, reads, sums):
    (term,) = bind([dict(name="pairwise", **options)])
    assert (term.objective.reference, term.objective.reads, term.objective.sums) == (reference, reads, sums)
