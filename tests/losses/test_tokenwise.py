"""Objectives that read more of the tokens: their weights, and in which case nothing is left but DPO."""

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


def gap(values):
    return np.asarray(values)[:, 0] - np.asarray(values)[:, 1]


def with_sums(responses, **sums):
    return responses._replace(sums=dict(responses.sums) | sums)


@quick
@hypothesis.given(SEEDS, st.floats(0.01, 2))
def test_with_their_further_part_at_rest_they_are_all_dpo(seed, beta):
    responses = random_responses(np.float64, seed=seed)
    plain = losses_of(responses, "dpo", beta=beta)
    still = with_sums(
        responses,
        kl=jnp.zeros((6, 2)),
        sum_squares=responses.logps,  # a weight of 1
        kept_log_ratios=responses.log_ratios,
        reference_entropies=np.exp(-1) * responses.lengths,  # φ = 1
    )
    for loss in (
        dict(name="ld_dpo", alpha=1.0),
        dict(name="tdpo1"),
        dict(name="tdpo2", alpha=0.7),
        dict(name="wpo"),
        dict(name="mallows_dpo"),
    ):
        np.testing.assert_allclose(losses_of(still, beta=beta, **loss), plain, rtol=1e-10, atol=1e-14)
    np.testing.assert_allclose(losses_of(still, "sampo", beta=beta)[:, 0], plain[:, 0], rtol=1e-12)
    np.testing.assert_allclose(
        losses_of(still, "mallows_ipo", beta=beta), losses_of(responses, "ipo", beta=beta), rtol=1e-10
    )


@pytest.mark.parametrize("share", [0.0, 0.1])
def test_ld_dpo_weighs_the_tail_of_the_log_ratios(share):
    responses = random_responses(np.float64)
    counted = responses.log_ratios - 0.7 * responses.sums["tail_log_ratios"]
    np.testing.assert_allclose(
        result_of(responses, "ld_dpo", alpha=0.3, label_smoothing=share).losses,
        result_of(responses._replace(log_ratios=counted), "dpo", label_smoothing=share).losses,
        rtol=1e-12,
    )


@pytest.mark.parametrize(
    ("subset", "name"), [("shared", "kept_log_ratios"), ("independent", "independently_kept_log_ratios")]
)
def test_sampo_compares_what_was_kept(subset, name):
    responses = random_responses(np.float64)
    found = result_of(responses, "sampo", beta=0.3, subset=subset)
    np.testing.assert_allclose(found.losses, np.logaddexp(0, -0.3 * gap(responses.sums[name])), rtol=1e-12)
    np.testing.assert_allclose(found.rewards, 0.3 * responses.sums[name], rtol=1e-12)
    (term,) = bind([dict(name="sampo", subset=subset)])
    assert term.objective.sums == (name,)


@pytest.mark.parametrize("clip_max", [None, 1.0, 0.01])
def test_the_weight_of_wpo_is_that_of_its_formula_and_has_no_gradient(clip_max):
    responses = random_responses(np.float64)
    lengths = np.asarray(responses.lengths)
    a = (np.asarray(responses.logps) - np.asarray(responses.sums["sum_squares"])) / lengths
    weights = np.exp(a.sum(axis=1))
    if clip_max is not None:
        weights = np.minimum(weights, clip_max)
    found = result_of(responses, "wpo", beta=0.3, clip_max=clip_max)
    np.testing.assert_allclose(found.metrics["weights"], weights, rtol=1e-10)
    plain = losses_of(responses, "dpo", beta=0.3)
    np.testing.assert_allclose(
        losses_of(responses, "wpo", beta=0.3, clip_max=clip_max), weights[:, None] * plain, rtol=1e-9
    )


def test_tdpo_adds_the_gap_of_divergences_with_the_gradients_of_its_authors():
    responses = random_responses(np.float64)
    kl, z = np.asarray(responses.sums["kl"]), gap(responses.log_ratios)

    def slopes(name, **hyperparameters):
        return jax.grad(lambda kl: result_of(with_sums(responses, kl=kl), name, **hyperparameters).losses.sum())(
            responses.sums["kl"]
        )

    first = result_of(responses, "tdpo1", beta=0.3).losses
    np.testing.assert_allclose(first, np.logaddexp(0, -0.3 * (z + gap(kl))), rtol=1e-12)
    second = result_of(responses, "tdpo2", beta=0.3, alpha=0.4).losses
    np.testing.assert_allclose(second, np.logaddexp(0, -0.3 * (z + 0.4 * gap(kl))), rtol=1e-12)
    weight = 0.3 / (1 + np.exp(0.3 * (z + gap(kl))))
    np.testing.assert_allclose(slopes("tdpo1", beta=0.3), np.stack([-weight, weight], axis=1), rtol=1e-10)
    weight = 0.4 * 0.3 / (1 + np.exp(0.3 * (z + 0.4 * gap(kl))))
    np.testing.assert_allclose(slopes("tdpo2", beta=0.3, alpha=0.4), np.stack([0 * z, weight], axis=1), rtol=1e-10)


def test_the_dispersion_of_mallows_multiplies_the_gap():
    responses = random_responses(np.float64)
    share = np.asarray(responses.sums["reference_entropies"]) / np.asarray(responses.lengths)
    phi = -0.6 * np.log(share.mean(axis=1))
    z = phi * gap(responses.log_ratios)
    dpo = result_of(responses, "mallows_dpo", beta=0.3, c=0.6)
    np.testing.assert_allclose(dpo.losses, np.logaddexp(0, -0.3 * z), rtol=1e-10)
    np.testing.assert_allclose(dpo.metrics["dispersion"], phi, rtol=1e-12)
    paper, rainbow = (result_of(responses, "mallows_ipo", beta=0.3, c=0.6, form=form) for form in ("paper", "rainbow"))
    np.testing.assert_allclose(paper.losses, (z - 1 / 0.6) ** 2, rtol=1e-10)
    np.testing.assert_allclose(rainbow.losses, (0.3 * z - 0.5) ** 2, rtol=1e-10)


@quick
@hypothesis.given(SEEDS, st.floats(0.1, 10), st.floats(0, 1))
def test_rainbow_at_its_ends_is_dpo_norm_and_simpo(seed, beta, advantage):
    responses = random_responses(np.float64, seed=seed)
    whole = losses_of(responses, "dpo_norm", beta=beta)
    for options in (dict(mixing=1.0, home_advantage=advantage), dict(mixing=None, home_advantage=0.0)):
        found = losses_of(responses, "rainbow", beta=beta, dispersion_mean=None, **options)
        np.testing.assert_allclose(found, whole, rtol=1e-9, atol=1e-13)
    none = losses_of(responses, "simpo", beta=beta, gamma=beta * advantage)
    for options in (dict(mixing=0.0), dict(mixing=None, reference_free=True)):
        found = losses_of(responses, "rainbow", beta=beta, dispersion_mean=None, home_advantage=advantage, **options)
        np.testing.assert_allclose(found, none, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("link", ["logistic", "ipo", "cauchy"])
@pytest.mark.parametrize("normalized", [True, False])
@pytest.mark.parametrize("free", [True, False])
def test_rainbow_is_its_formula(link, normalized, free):
    responses = random_responses(np.float64)
    lengths = np.asarray(responses.lengths) if normalized else 1
    m = np.asarray(responses.logps) / lengths
    m0 = (np.asarray(responses.logps) - np.asarray(responses.log_ratios)) / lengths
    share = np.asarray(responses.sums["reference_entropies"]) / np.asarray(responses.lengths)
    phi = -0.29 * np.log(share.mean(axis=1))
    z = 2.0 * phi * (gap(m) - (0 if free else 0.25 * gap(m0)) - 0.75 * 0.1)
    wanted = {
        "logistic": np.logaddexp(0, -z),
        "ipo": (z - 0.5) ** 2,
        "cauchy": -np.log(np.arctan(z) / np.pi + 0.5),
    }[link]
    options = dict(beta=2.0, link=link, length_normalization=normalized, reference_free=free, nll_weight=0.3)
    found = result_of(responses, "rainbow", **options).losses
    np.testing.assert_allclose(found, wanted - 0.3 * m[:, 0], rtol=1e-9)


@pytest.mark.parametrize(
    ("options", "reference", "sums"),
    [
        ({}, True, ("reference_entropies",)),
        (dict(reference_free=True), True, ("reference_entropies",)),
        (dict(dispersion_mean=None), True, ()),
        (dict(dispersion_mean=None, reference_free=True), False, ()),
        (dict(dispersion_mean=None, mixing=0.0), False, ()),
        (dict(dispersion_mean=None, mixing=None), True, ()),
    ],
    ids=str,
)
def test_rainbow_asks_for_no_more_than_it_reads(options, reference, sums):
    (term,) = bind([dict(name="rainbow", **options)])
    assert (term.objective.reference, term.objective.sums) == (reference, sums)
