"""Responses that are wanted or not: anchors over the update, and what is kept from one update to the next."""

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


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


@quick
@hypothesis.given(SEEDS, st.floats(0.01, 1))
def test_kto_is_its_formula(seed, beta):
    responses = random_responses(np.float64, seed=seed)
    q, labels = np.asarray(responses.log_ratios), np.asarray(responses.labels)
    kl = max(0.0, q[:, 1].mean())
    value = beta * (q[:, 0] - kl)
    wanted = np.where(labels == 1, 1.3 * (1 - sigmoid(value)), 0.8 * (1 - sigmoid(-value)))
    found = result_of(responses, "kto", beta=beta, desirable_weight=1.3, undesirable_weight=0.8)
    np.testing.assert_allclose(found.losses, wanted, rtol=1e-10)
    np.testing.assert_allclose(found.metrics["kl"], kl, rtol=1e-12)


def test_nothing_is_learned_from_the_mismatched_responses():
    assert not losses_of(random_responses(np.float64), "kto")[:, 2].any()


def test_a_negative_estimate_of_the_divergence_counts_as_zero():
    responses = random_responses(np.float64)
    worse = responses._replace(log_ratios=responses.log_ratios.at[:, 1].set(-3.0))
    np.testing.assert_allclose(losses_of(worse, "kto"), losses_of(responses, "apo_zero_unpaired"), rtol=1e-12)


def test_apo_zero_of_a_pair_is_that_of_its_two_responses():
    responses = random_responses(np.float64)
    labels = {0: jnp.ones(6, jnp.int32), 1: jnp.zeros(6, jnp.int32)}
    sides = [
        result_of(
            responses._replace(labels=label, log_ratios=responses.log_ratios[:, side, None]),
            "apo_zero_unpaired",
            beta=0.3,
        ).losses
        for side, label in labels.items()
    ]
    np.testing.assert_allclose(sides[0] + sides[1], result_of(responses, "apo_zero", beta=0.3).losses, rtol=1e-12)


@pytest.mark.parametrize("anchor", ["other", "rejected"])
def test_kto_of_pairs_is_its_formula(anchor):
    responses = random_responses(np.float64, seed=4)
    q = np.asarray(responses.log_ratios)
    of_chosen = max(0.0, q[:, 1].mean())
    of_rejected = max(0.0, q[:, 0].mean()) if anchor == "other" else of_chosen
    up = 1.3 * (1 - sigmoid(0.1 * (q[:, 0] - of_chosen)))
    down = 0.8 * (1 - sigmoid(0.1 * (of_rejected - q[:, 1])))
    found = result_of(responses, "kto_pair", desirable_weight=1.3, undesirable_weight=0.8, anchor=anchor).losses
    np.testing.assert_allclose(found, (up + down) / (2 if anchor == "other" else 1), rtol=1e-10)


@pytest.mark.parametrize(("anchor", "flows"), [("other", True), ("rejected", False)])
def test_the_anchor_of_the_other_side_carries_a_gradient_and_that_of_the_book_none(anchor, flows):
    responses = random_responses(np.float64)
    raised = responses._replace(log_ratios=jnp.abs(responses.log_ratios))  # so that the anchors are not cut off

    def total(step):
        changed = raised._replace(log_ratios=raised.log_ratios.at[0, 1].add(step))
        return float(result_of(changed, "kto_pair", anchor=anchor).losses.sum())

    found, step = losses_of(raised, "kto_pair", anchor=anchor)[0, 2], 1e-5
    assert math.isclose(found, (total(step) - total(-step)) / (2 * step), rel_tol=1e-6) == flows


def running(name, batches, **hyperparameters):
    state = {"count": jnp.float64(0), "mean": jnp.float64(0)}
    for batch in batches:
        result = result_of(batch._replace(state=state), name, **hyperparameters)
        state = result.state
        yield result


def test_the_shift_of_bco_is_the_mean_of_all_rewards_so_far():
    batches = [random_responses(np.float64, examples=n, seed=n) for n in (4, 6, 3)]
    seen = np.zeros(0)
    for batch, result in zip(batches, running("bco", batches, beta=0.3), strict=True):
        u, labels = 0.3 * np.asarray(batch.log_ratios)[:, 0], np.asarray(batch.labels)
        seen = np.concatenate([seen, u])
        p = np.asarray(batch.prompt_probabilities)
        weight = np.where(labels == 1, 1, np.clip(p / (1 - p + 1e-8), 0.5, 10))
        wanted = weight * np.logaddexp(0, np.where(labels == 1, -1, 1) * (u - seen.mean()))
        np.testing.assert_allclose(result.losses, wanted, rtol=1e-10)
        np.testing.assert_allclose(result.metrics["delta"], seen.mean(), rtol=1e-10)
        np.testing.assert_allclose(result.state["count"], len(seen))


def test_without_prompt_probabilities_bco_weighs_all_alike():
    responses = random_responses(np.float64)
    even = responses._replace(prompt_probabilities=jnp.full(6, 0.5))  # p / (1 - p) = 1
    without = responses._replace(prompt_probabilities=None)
    np.testing.assert_allclose(losses_of(without, "bco"), losses_of(even, "bco"), rtol=1e-7)


@pytest.mark.parametrize("labels", [[1, 0, 1, 1, 0, 0], [1] * 6, [0] * 6])
def test_the_shift_of_the_paper_is_the_mean_of_the_means_of_its_classes(labels):
    responses = random_responses(np.float64)._replace(labels=jnp.array(labels, jnp.int32), prompt_probabilities=None)
    u, labels = 0.01 * np.asarray(responses.log_ratios)[:, 0], np.array(labels)
    delta = np.mean([u[labels == label].mean() for label in np.unique(labels)])
    result = result_of(responses, "bco", delta="paper")
    np.testing.assert_allclose(result.metrics["delta"], delta, rtol=1e-10)
    np.testing.assert_allclose(result.losses, np.logaddexp(0, np.where(labels == 1, -1, 1) * (u - delta)), rtol=1e-10)


def test_the_shift_of_bco_pairs_is_the_mean_of_the_means_of_updates():
    batches = [random_responses(np.float64, examples=n, seed=n) for n in (4, 6, 3)]
    means = []
    for batch, result in zip(batches, running("bco_pair", batches, beta=0.3), strict=True):
        u = 0.3 * np.asarray(batch.log_ratios)
        means.append(u.mean())
        delta = np.mean(means)
        wanted = np.logaddexp(0, -(u[:, 0] - delta)) + np.logaddexp(0, u[:, 1] - delta)
        np.testing.assert_allclose(result.losses, wanted, rtol=1e-10)
        np.testing.assert_allclose(result.metrics["delta"], delta, rtol=1e-10)


def test_the_shift_of_bco_carries_no_gradient():
    responses = random_responses(np.float64)._replace(prompt_probabilities=None)
    u, labels = np.asarray(responses.log_ratios)[:, 0], np.asarray(responses.labels)
    for delta in ("running", "paper"):
        shift = np.asarray(result_of(responses, "bco", beta=1.0, delta=delta).metrics["delta"])[0]
        sign = np.where(labels == 1, 1, -1)
        found = losses_of(responses, "bco", beta=1.0, delta=delta)[:, 1]
        np.testing.assert_allclose(found, -sign * sigmoid(-sign * (u - shift)), rtol=1e-9)
