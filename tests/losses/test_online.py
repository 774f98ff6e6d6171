"""Losses of the policy's own samples: which of the two is chosen, and what is added."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from daajax.losses.terms import bind
from tests.losses.worlds import losses_of, random_responses, result_of


@pytest.fixture(autouse=True, scope="module")
def x64():
    with jax.enable_x64(True):
        yield


LINKS = {"logistic": "dpo", "ipo": "ipo"}


def swapped(responses):
    return jax.tree.map(lambda x: x[:, ::-1] if x.ndim == 2 else x, responses)


@pytest.mark.parametrize("link", LINKS)
def test_the_response_with_the_higher_score_is_chosen_wherever_it_stands(link):
    responses = random_responses(np.float64)
    plain = losses_of(responses, LINKS[link], beta=0.3)
    np.testing.assert_array_equal(losses_of(responses, "online_dpo", beta=0.3, link=link), plain)
    found = losses_of(swapped(responses), "online_dpo", beta=0.3, link=link)
    np.testing.assert_array_equal(found[:, [0, 2, 1]], plain)
    rewards = result_of(swapped(responses), "online_dpo", beta=0.3, link=link).rewards
    np.testing.assert_array_equal(rewards, result_of(responses, LINKS[link], beta=0.3).rewards)
    np.testing.assert_array_equal(losses_of(responses, "d2po", beta=0.3, link=link), plain)


def test_of_equal_scores_the_first_response_is_chosen():
    even = random_responses(np.float64)._replace(scores=jnp.ones((6, 2)))
    np.testing.assert_array_equal(losses_of(even, "online_dpo"), losses_of(even, "dpo"))


def test_a_response_that_did_not_end_may_lose_for_it():
    responses = random_responses(np.float64)
    cut = responses._replace(finished=jnp.broadcast_to(jnp.array([[False, True]]), (6, 2)))
    plain, other = losses_of(responses, "dpo"), losses_of(swapped(responses), "dpo")[:, [0, 2, 1]]
    np.testing.assert_array_equal(losses_of(cut, "online_dpo", missing_eos_penalty=0.0), plain)
    np.testing.assert_array_equal(losses_of(cut, "online_dpo", missing_eos_penalty=2.0), other)
    both = cut._replace(finished=jnp.zeros((6, 2), bool))
    np.testing.assert_array_equal(losses_of(both, "online_dpo", missing_eos_penalty=2.0), plain)
    (with_penalty,), (without,) = (
        bind([dict(name="online_dpo", missing_eos_penalty=1.0)]),
        bind([dict(name="online_dpo")]),
    )
    assert (with_penalty.objective.reads, without.objective.reads) == (("scores", "finished"), ("scores",))


@pytest.mark.parametrize("link", LINKS)
def test_xpo_adds_the_log_prob_of_the_references_response_whoever_won(link):
    responses = random_responses(np.float64)
    lost = responses._replace(scores=responses.scores[:, ::-1])
    for given in (responses, lost):
        bonus = np.concatenate([0.3 * np.asarray(given.logps)[:, 1:], np.zeros((6, 1)), np.full((6, 1), 0.3)], axis=1)
        found = losses_of(given, "xpo", beta=0.3, alpha=0.3, link=link)
        np.testing.assert_allclose(found, losses_of(given, "online_dpo", beta=0.3, link=link) + bonus, rtol=1e-12)


def test_nash_md_follows_the_excess_of_the_preference():
    responses = random_responses(np.float64, responses=1)
    found = losses_of(responses, "nash_md", beta=0.3)
    preference = np.asarray(responses.scores)[:, 0]
    np.testing.assert_allclose(found[:, 1], 0.5 - preference, rtol=1e-12)
    slope = jax.grad(
        lambda s: result_of(responses._replace(sums={"kl_surrogate": s}), "nash_md", beta=0.3).losses.sum()
    )(responses.sums["kl_surrogate"])
    np.testing.assert_allclose(slope, 0.3, rtol=1e-12)
