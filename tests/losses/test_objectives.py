"""Objectives: numbers that their authors' code produced, algebra, and what `bind` refuses.

`golden/*.json` hold inputs, losses and gradients of published code in float64; each case names repository, version and
callable. `rtol` is theirs.
"""

import json
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from daajax.errors import UserError
from daajax.losses import objectives, scores
from daajax.losses.objectives import OBJECTIVES
from daajax.losses.scores import Responses
from daajax.losses.terms import bind

GOLDEN = pathlib.Path(__file__).parent / "golden"


def golden_cases():
    for file in sorted(GOLDEN.glob("*.json")):
        content = json.loads(file.read_text(encoding="utf-8"))
        for index, case in enumerate(content["cases"]):
            yield pytest.param(content["name"], content["inputs"][case["inputs"]], case, id=f"{file.stem}-{index}")


def arguments(name, hyperparameters):
    """The objective that a golden case is of, and its hyper-parameters under our names."""
    given = dict(hyperparameters)
    given.pop("reference_free", None)
    if name == "ipo":
        name = {"sum": "ipo", "mean": "ipo_mean"}[given.pop("reduction")]
        given["beta"] = given.pop("tau")
    if name == "simpo":
        ratio = given.pop("gamma_beta_ratio", None)
        assert ratio is None or given["gamma"] == ratio * given["beta"]
    if name in ("cdpo", "halos_dpo_cdpo"):
        name = "dpo"
    return dict(name=name, **given)


def responses_of(inputs, dtype, reference=True):
    """Log-probs as the update hands them over: log-ratios are differences taken before any rounding."""

    def pair(kind):
        return np.stack([inputs[kind.format("chosen")], inputs[kind.format("rejected")]], axis=1)

    policy = pair("policy_{}_logps")
    lengths = pair("{}_lengths").astype(np.int32) if "chosen_lengths" in inputs else np.ones(policy.shape, np.int32)
    reference_logps = pair("ref_{}_logps") if reference and "ref_chosen_logps" in inputs else np.zeros_like(policy)
    return Responses(*(jnp.asarray(x, dtype) for x in (policy, policy - reference_logps)), jnp.asarray(lengths))


def losses_and_gradients(loss, responses):
    """Losses per example, and the gradient of their sum with respect to the policy's log-probs."""

    def total(change):
        ratios = None if responses.log_ratios is None else responses.log_ratios + change
        losses = loss(responses._replace(logps=responses.logps + change, log_ratios=ratios)).losses
        return losses.sum(), losses

    gradient, losses = jax.grad(total, has_aux=True)(jnp.zeros_like(responses.logps))
    return np.asarray(losses), np.asarray(gradient)


def assert_golden(case, losses, gradients, rtol, atol=0.0):
    outputs = case["outputs"]
    if "losses" in outputs:
        np.testing.assert_allclose(losses, outputs["losses"], rtol=rtol, atol=atol)
    mean = outputs.get("loss", outputs.get("loss_mean"))
    np.testing.assert_allclose(losses.mean(), mean, rtol=rtol, atol=atol)
    scale = {"sum": 1, "batch mean": 1 / len(losses)}[case["grad_of"]]
    wanted = [outputs["grads"][f"policy_{side}_logps"] for side in ("chosen", "rejected")]
    np.testing.assert_allclose(gradients * scale, np.stack(wanted, axis=1), rtol=rtol, atol=atol)


@pytest.mark.parametrize(("name", "inputs", "case"), list(golden_cases()))
def test_losses_and_gradients_are_those_of_published_code(name, inputs, case):
    (term,) = bind([arguments(name, case["hyperparameters"])])
    reference = not case["hyperparameters"].get("reference_free", False)
    with jax.enable_x64(True):
        found = losses_and_gradients(term.loss, responses_of(inputs, jnp.float64, reference))
        assert found[0].dtype == np.float64
        assert_golden(case, *found, rtol=case["rtol"], atol=1e-300)


@pytest.mark.parametrize(("name", "inputs", "case"), list(golden_cases()))
def test_float32_loses_only_its_own_rounding(name, inputs, case):
    (term,) = bind([arguments(name, case["hyperparameters"])])
    reference = not case["hyperparameters"].get("reference_free", False)
    found = losses_and_gradients(term.loss, responses_of(inputs, jnp.float32, reference))
    assert found[0].dtype == np.float32
    # Log-probs of up to 50 nats round by 4e-6 nats, which IPO doubles and SimPO's beta of 10 magnifies; below
    # e^-87 float32 has no normal numbers left.
    assert_golden(case, *found, rtol=3e-5, atol=1e-5 if name in ("ipo", "simpo") else 1e-30)


def random_responses(dtype=jnp.float32, examples=6, responses=2, seed=0):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 20, (examples, responses)).astype(np.int32)
    logps = -rng.uniform(0.5, 3, lengths.shape) * lengths
    ratios = 5 * rng.normal(size=lengths.shape)
    return Responses(jnp.asarray(logps, dtype), jnp.asarray(ratios, dtype), jnp.asarray(lengths))


@pytest.mark.parametrize("beta", [0.01, 0.1, 0.5])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1, 0.4])
def test_the_gradient_of_dpo_is_that_of_its_formula(beta, label_smoothing):
    def formula(ratios):
        z = beta * (ratios[:, 0] - ratios[:, 1])
        chosen, rejected = -jnp.log(1 / (1 + jnp.exp(-z))), -jnp.log(1 / (1 + jnp.exp(z)))
        return (1 - label_smoothing) * chosen + label_smoothing * rejected

    with jax.enable_x64(True):
        responses = random_responses(jnp.float64)
        cotangent = jnp.asarray(np.random.default_rng(1).normal(size=6))

        def ours(ratios):
            return objectives.dpo(
                responses._replace(log_ratios=ratios), beta=beta, label_smoothing=label_smoothing
            ).losses

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
    responses = random_responses()
    gradient = jax.grad(lambda r: objectives.dpo(responses._replace(log_ratios=r), beta=0.3).rewards.sum())(
        responses.log_ratios
    )
    np.testing.assert_allclose(gradient, np.full((6, 2), 0.3), rtol=1e-6)


def at_reference():
    return random_responses()._replace(log_ratios=jnp.zeros((6, 2)))


@pytest.mark.parametrize(
    ("loss", "value", "gradient"),
    [
        (dict(name="dpo", beta=0.1), math.log(2), 0.05),  # gradient: half of beta
        (dict(name="dpo", beta=0.5), math.log(2), 0.25),
        (dict(name="dpo", beta=0.1, label_smoothing=0.3), math.log(2), 0.02),  # beta (½ - ε)
        (dict(name="ipo", beta=0.1), 25.0, 10.0),  # 1 / (4 beta²); 1 / beta
        (dict(name="ipo", beta=0.5), 1.0, 2.0),
        (dict(name="ipo_mean", beta=0.1), 25.0, None),
    ],
    ids=str,
)
def test_losses_at_the_reference_are_known_in_closed_form(loss, value, gradient):
    (term,) = bind([loss])
    losses, gradients = losses_and_gradients(term.loss, at_reference())
    np.testing.assert_allclose(losses, value, rtol=1e-6)
    if gradient is None:
        gradient = 10.0 / np.asarray(at_reference().lengths)
    np.testing.assert_allclose(gradients, gradient * np.broadcast_to([-1.0, 1.0], (6, 2)), rtol=1e-6)


def test_the_gradient_weight_of_dpo_is_sigmoid_of_the_reward_gap():
    responses = random_responses()
    result = objectives.dpo(responses, beta=0.1)
    ratios = np.asarray(responses.log_ratios, np.float64)
    np.testing.assert_allclose(result.rewards, 0.1 * ratios, rtol=1e-6)
    np.testing.assert_allclose(
        result.metrics["gradient_weight"], 1 / (1 + np.exp(0.1 * (ratios[:, 0] - ratios[:, 1]))), rtol=1e-5
    )


def test_swapping_the_responses_is_flipping_the_labels():
    responses = random_responses()
    swapped = Responses(*(x[:, ::-1] for x in responses))
    with_smoothing = {e: objectives.dpo(responses, label_smoothing=e).losses for e in (0.0, 0.2)}
    plain, flipped = objectives.dpo(responses).losses, objectives.dpo(swapped).losses
    np.testing.assert_allclose(with_smoothing[0.0], plain)
    np.testing.assert_allclose(with_smoothing[0.2], 0.8 * plain + 0.2 * flipped, rtol=1e-5)
    # -log σ(z) + log σ(-z) = -z
    z = 0.1 * (responses.log_ratios[:, 0] - responses.log_ratios[:, 1])
    np.testing.assert_allclose(plain - flipped, -z, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["dpo", "ipo"])
def test_what_shifts_both_log_ratios_of_a_prompt_alike_changes_nothing(name):
    (term,) = bind([dict(name=name, beta=0.1)])
    # Eighths, which float32 adds without rounding.
    ratios = jnp.asarray(np.random.default_rng(0).integers(-80, 80, (6, 2)) / 8, jnp.float32)
    responses = random_responses()._replace(log_ratios=ratios)
    shifted = responses._replace(log_ratios=ratios + jnp.arange(6.0)[:, None])
    for one, two in zip(
        losses_and_gradients(term.loss, responses), losses_and_gradients(term.loss, shifted), strict=True
    ):
        np.testing.assert_array_equal(one, two)


def test_simpo_is_indifferent_to_the_reference_and_dpo_to_the_lengths():
    responses = random_responses()
    one, two = (objectives.simpo(responses._replace(log_ratios=r)).losses for r in (None, responses.log_ratios))
    np.testing.assert_array_equal(one, two)
    longer = responses._replace(lengths=2 * responses.lengths)
    np.testing.assert_array_equal(objectives.dpo(responses).losses, objectives.dpo(longer).losses)
    # Twice the tokens at the same sums are half the means, as half of beta would be.
    np.testing.assert_allclose(
        objectives.simpo(longer, beta=2.0).losses, objectives.simpo(responses, beta=1.0).losses, rtol=1e-6
    )


@pytest.mark.parametrize("responses", [1, 2, 3])
def test_sft_is_the_negative_log_likelihood_of_the_first_response(responses):
    given = random_responses(responses=responses)
    result = objectives.sft(given)
    np.testing.assert_array_equal(result.token_losses, -given.logps[:, 0])
    np.testing.assert_array_equal(result.losses, 0)
    assert result.rewards is None
    (term,) = bind([dict(name="sft")])
    assert (term.objective.reference, term.objective.responses) == (False, 1)


def test_scores_of_a_response_that_there_is_not_are_zero():
    responses = Responses(jnp.zeros((1, 2)), jnp.zeros((1, 2)), jnp.array([[0, 3]]))
    for score in (scores.mean_logps, scores.mean_log_ratios, scores.log_ratios):
        np.testing.assert_array_equal(score(responses), [[0, 0]])


@pytest.mark.parametrize("name", sorted(set(OBJECTIVES) - {"sft"}))
def test_extreme_log_probs_give_finite_losses_and_gradients(name):
    (term,) = bind([dict(name=name)])
    values = jnp.array([[-1e-9, -3e3], [-3e3, -1e-9], [-1e4, -1e4]])
    found = losses_and_gradients(term.loss, Responses(values, values, jnp.array([[1, 3000], [3000, 1], [10, 10]])))
    assert all(np.isfinite(x).all() for x in found)


def test_terms_carry_name_weight_and_hyperparameters():
    first, second = bind([dict(name="dpo", beta=0.5), dict(name="sft", weight=2)])
    assert (first.name, first.weight, second.name, second.weight) == ("dpo", 1.0, "sft", 2.0)
    responses = random_responses()
    np.testing.assert_array_equal(first.loss(responses).losses, objectives.dpo(responses, beta=0.5).losses)


def test_a_whole_number_is_a_number_too():
    (term,) = bind([dict(name="dpo", beta=1)])
    responses = random_responses()
    np.testing.assert_array_equal(term.loss(responses).losses, objectives.dpo(responses, beta=1.0).losses)


@pytest.mark.parametrize("name", ["dpo", "ipo", "ipo_mean"])
def test_an_objective_that_compares_with_a_reference_says_that_there_is_none(name):
    (term,) = bind([dict(name=name)])
    with pytest.raises(ValueError, match="there is no reference"):
        term.loss(random_responses()._replace(log_ratios=None))


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (dict(name="dpoo"), r"loss\.name='dpoo' is unknown; there are dpo, ipo, ipo_mean, .*simpo"),
        (dict(beta=0.1), r"loss\.name=None is unknown"),
        (dict(name="dpo", gamma=1.0), r"loss 'dpo' takes \['beta', 'label_smoothing'\], not \['gamma'\]"),
        (dict(name="sft", beta=0.1), r"loss 'sft' takes \[\], not \['beta'\]"),
        (dict(name="dpo", responses=0.1), r"loss 'dpo' takes .*not \['responses'\]"),
        (dict(name="dpo", beta=0.0), r"loss 'dpo': beta=0\.0 must be > 0"),
        (dict(name="dpo", beta=-1.0), r"loss 'dpo': beta=-1\.0 must be > 0"),
        (dict(name="dpo", beta=math.nan), r"loss 'dpo': beta=nan must be"),
        (dict(name="dpo", label_smoothing=0.5), r"label_smoothing=0\.5 must be in \[0, 0\.5\)"),
        (dict(name="dpo", label_smoothing=-0.1), r"label_smoothing=-0\.1 must be in \[0, 0\.5\)"),
        (dict(name="ipo", beta=0.0), r"loss 'ipo': beta=0\.0 must be > 0"),
        (dict(name="ipo_mean", beta=0.0), r"loss 'ipo_mean': beta=0\.0 must be > 0"),
        (dict(name="simpo", beta=0.0), r"loss 'simpo': beta=0\.0 must be > 0"),
        (dict(name="simpo", gamma=-0.1), r"loss 'simpo': gamma=-0\.1 must be >= 0"),
        (dict(name="simpo", label_smoothing=0.7), r"label_smoothing=0\.7 must be in \[0, 0\.5\)"),
        (dict(name="dpo", beta="0.1"), r"loss 'dpo': beta='0\.1' must be a finite number"),
        (dict(name="dpo", beta=True), r"loss 'dpo': beta=True must be a finite number"),
        (dict(name="dpo", beta=None), r"loss 'dpo': beta=None must be a finite number"),
        (dict(name="dpo", weight="heavy"), r"loss 'dpo': weight='heavy' must be a finite number"),
    ],
    ids=str,
)
def test_a_loss_that_cannot_be_is_refused_before_anything_is_compiled(loss, message):
    with pytest.raises(UserError, match=message) as error:
        bind([loss])
    assert "\n" not in str(error.value)
