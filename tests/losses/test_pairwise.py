"""Pairs against a reference: DPO's gradient, and how the others follow from it."""

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from daajax.losses.pairwise import dpo
from tests.losses.worlds import SEEDS, losses_of, quick, random_responses, result_of

BETAS = st.floats(0.01, 2)


@pytest.fixture(autouse=True, scope="module")
def x64():
    with jax.enable_x64(True):
        yield


def swapped(responses):
    return jax.tree.map(lambda x: x[:, ::-1] if x.ndim == 2 else x, responses)


@pytest.mark.parametrize("beta", [0.01, 0.1, 0.5])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1, 0.4])
def test_the_gradient_of_dpo_is_that_of_its_formula(beta, label_smoothing):
    def formula(ratios):
        z = beta * (ratios[:, 0] - ratios[:, 1])
        chosen, rejected = -jnp.log(1 / (1 + jnp.exp(-z))), -jnp.log(1 / (1 + jnp.exp(z)))
        return (1 - label_smoothing) * chosen + label_smoothing * rejected

    responses = random_responses(np.float64)
    cotangent = jnp.asarray(np.random.default_rng(1).normal(size=6))

    def ours(ratios):
        return dpo(responses._replace(log_ratios=ratios), beta=beta, label_smoothing=label_smoothing).losses

    found, pull = jax.vjp(ours, responses.log_ratios)
    wanted, pull_wanted = jax.vjp(formula, responses.log_ratios)
    np.testing.assert_allclose(found, wanted, rtol=1e-12)
    (gradient,), (gradient_wanted,) = pull(cotangent), pull_wanted(cotangent)
    np.testing.assert_allclose(gradient, gradient_wanted, rtol=1e-10)
    # Central differences of step h: error h² · ℓ‴ / 6, below 1e-9 for h = 1e-4 nats.
    for place in np.ndindex(gradient.shape):
        step = jnp.zeros_like(responses.log_ratios).at[place].set(1e-4)
        difference = ours(responses.log_ratios + step) - ours(responses.log_ratios - step)
        np.testing.assert_allclose((cotangent * difference).sum() / 2e-4, gradient[place], rtol=1e-6, atol=1e-9)


def test_rewards_of_dpo_are_differentiable_beside_its_loss():
    responses = random_responses(np.float64)
    gradient = jax.grad(lambda r: dpo(responses._replace(log_ratios=r), beta=0.3).rewards.sum())(responses.log_ratios)
    np.testing.assert_allclose(gradient, np.full((6, 2), 0.3), rtol=1e-12)


def test_the_gradient_weight_of_dpo_is_sigmoid_of_the_reward_gap():
    responses = random_responses(np.float64)
    result, ratios = dpo(responses, beta=0.1), np.asarray(responses.log_ratios)
    np.testing.assert_allclose(result.rewards, 0.1 * ratios, rtol=1e-12)
    np.testing.assert_allclose(
        result.metrics["gradient_weight"], 1 / (1 + np.exp(0.1 * (ratios[:, 0] - ratios[:, 1]))), rtol=1e-12
    )


@quick
@hypothesis.given(SEEDS, BETAS, st.floats(0, 0.49))
def test_label_smoothing_mixes_the_losses_of_the_pair_and_of_the_pair_swapped(seed, beta, share):
    responses = random_responses(np.float64, seed=seed)
    plain = losses_of(responses, "dpo", beta=beta)
    flipped = losses_of(swapped(responses), "dpo", beta=beta)[:, [0, 2, 1]]
    for name in ("dpo", "cdpo"):
        found = losses_of(responses, name, beta=beta, label_smoothing=share)
        np.testing.assert_allclose(found, (1 - share) * plain + share * flipped, rtol=1e-9, atol=1e-12)
    robust = losses_of(responses, "robust", beta=beta, label_smoothing=share)
    np.testing.assert_allclose(robust, ((1 - share) * plain - share * flipped) / (1 - 2 * share), rtol=1e-8, atol=1e-10)
    mean = (1 - share) * robust
    mean += share * losses_of(swapped(responses), "robust", beta=beta, label_smoothing=share)[:, [0, 2, 1]]
    np.testing.assert_allclose(mean, plain, rtol=1e-8, atol=1e-10)


ON_LOG_RATIOS = [
    dict(name="dpo"),
    dict(name="cdpo"),
    dict(name="robust"),
    dict(name="dpo_unweighted"),
    dict(name="ipo"),
    dict(name="hinge"),
    dict(name="discopop"),
    dict(name="r_dpo"),
    dict(name="odpo"),
    dict(name="rebel"),
    dict(name="dno"),
    dict(name="rpo_reward"),
    dict(name="aot"),
    dict(name="beta_dpo"),
    dict(name="plackett_luce"),
    dict(name="exo"),
    dict(name="info_nca"),
    dict(name="wpo"),
    dict(name="tdpo1"),
    dict(name="mallows_dpo"),
    dict(name="mallows_ipo"),
    dict(name="online_dpo"),
    *(dict(name="pairwise", link=link) for link in ("hinge", "square", "linear", "cauchy", "lrml", "cell")),
]


@pytest.mark.parametrize("loss", ON_LOG_RATIOS, ids=str)
def test_what_shifts_all_log_ratios_of_a_prompt_alike_changes_nothing(loss):
    # Eighths, which are added without rounding.
    ratios = jnp.asarray(np.random.default_rng(0).integers(-80, 80, (6, 2)) / 8)
    responses = random_responses(np.float64)._replace(log_ratios=ratios)
    shifted = responses._replace(log_ratios=ratios + jnp.arange(6.0)[:, None])
    np.testing.assert_allclose(losses_of(shifted, **loss), losses_of(responses, **loss), rtol=1e-12, atol=1e-12)


@quick
@hypothesis.given(SEEDS, BETAS)
def test_f_dpo_goes_from_reverse_to_forward_kl(seed, beta):
    responses = random_responses(np.float64, seed=seed)
    plain = losses_of(responses, "dpo", beta=beta)
    np.testing.assert_allclose(losses_of(responses, "f_dpo", beta=beta, divergence="reverse_kl"), plain, rtol=1e-12)
    nearly = losses_of(responses, "f_dpo", beta=beta, divergence="alpha", alpha=1e-9)
    np.testing.assert_allclose(nearly, plain, rtol=1e-5, atol=1e-9)  # of order alpha q²
    forward = losses_of(responses, "f_dpo", beta=beta, divergence="forward_kl")
    np.testing.assert_array_equal(losses_of(responses, "f_dpo", beta=beta, divergence="alpha", alpha=1.0), forward)


def test_f_dpo_is_its_formula():
    responses = random_responses(np.float64)
    q = np.asarray(responses.log_ratios)
    for name, derivative in {
        "forward_kl": -np.exp(-q),
        "js": np.log(2) - np.logaddexp(0, -q),
        "alpha": -np.exp(-0.3 * q) / 0.3,
    }.items():
        alpha = dict(alpha=0.3) if name == "alpha" else {}
        found = result_of(responses, "f_dpo", beta=0.2, divergence=name, **alpha).losses
        z = 0.2 * (derivative[:, 0] - derivative[:, 1])
        np.testing.assert_allclose(found, np.logaddexp(0, -z), rtol=1e-10)


def test_spin_is_dpo_or_hinge_of_other_data():
    responses = random_responses(np.float64)
    np.testing.assert_array_equal(losses_of(responses, "spin", beta=0.3), losses_of(responses, "dpo", beta=0.3))
    np.testing.assert_array_equal(
        losses_of(responses, "spin", beta=0.3, link="hinge"), losses_of(responses, "hinge", beta=0.3, delta=1.0)
    )


def test_dpo_norm_is_dpo_of_means_and_both_agree_on_responses_of_one_token():
    responses = random_responses(np.float64)
    short = responses._replace(lengths=jnp.ones_like(responses.lengths))
    np.testing.assert_allclose(losses_of(short, "dpo_norm", beta=0.3), losses_of(short, "dpo", beta=0.3), rtol=1e-12)
    means = responses._replace(log_ratios=responses.log_ratios / responses.lengths)
    np.testing.assert_allclose(
        result_of(responses, "dpo_norm").losses, result_of(means, "dpo", beta=5.0).losses, rtol=1e-12
    )
