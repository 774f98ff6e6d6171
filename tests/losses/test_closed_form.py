"""Where objectives converge to, in `examples.closed_form`, and that what it holds for theory is.

Each claim about a minimum is checked by another way to it: least squares, a grid, the log-odds of two responses.
"""

import subprocess
import sys

import numpy as np
import optax
import pytest

from examples.closed_form import FLIPPED, cases, tilted, total_variation, without_weight
from examples.tabular import bradley_terry, labelled, pairs, rankings, train
from tests.worlds import ROOT

BETAS = (0.05, 0.3, 0.9)
OBJECTIVES = ("dpo", "plackett_luce", "robust", "cdpo", "ipo", "kto")


def world(prompts=2, responses=4):
    rng = np.random.default_rng(5)
    return rng.dirichlet(np.full(responses, 2.0), prompts), rng.normal(scale=0.5, size=(prompts, responses))


def case_of(name, beta):
    (case,) = (case for case in cases(*world(), beta) if case.loss["name"] == name)
    return case


def converged(name, beta):
    case = case_of(name, beta)
    return train(case.reference, case.data, case.loss)


def logit(p):
    return np.log(p / (1 - p))


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def gap(policy, reference):
    """Of the log-ratios of two responses."""
    return np.diff(np.log(reference / policy), axis=1)[:, 0]


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_policy_converges_to_the_closed_form(name, beta):
    case = case_of(name, beta)
    assert total_variation(case.reference, case.target) > 0.02  # there is something to learn
    # KTO takes a response's last probability away ever more slowly; the others end within rounding.
    assert total_variation(converged(name, beta), case.target) < (1e-3 if name == "kto" else 1e-9)


def test_every_case_is_tested():
    assert tuple(case.loss["name"] for case in cases(*world(), 0.1)) == OBJECTIVES


@pytest.mark.parametrize("beta", [0.1, 0.9])
def test_dpo_recovers_the_reward_from_the_policy(beta):
    reference, reward = world()
    implied = beta * np.log(converged("dpo", beta) / reference)
    np.testing.assert_allclose(np.diff(implied, axis=1), np.diff(reward, axis=1), atol=1e-9)


def test_of_a_ranking_each_pair_is_in_bradley_and_terrys_order():
    _, reward = world()
    data = rankings(reward)
    np.testing.assert_allclose(np.bincount(data.prompts, data.weights), 1)
    before = np.zeros((*reward.shape, reward.shape[1]))
    for x, order, weight in zip(data.prompts, data.responses, data.weights, strict=True):
        for place, better in enumerate(order):
            before[x, better, order[place + 1 :]] += weight
    off_diagonal = ~np.eye(reward.shape[1], dtype=bool)
    np.testing.assert_allclose(before[:, off_diagonal], bradley_terry(reward)[:, off_diagonal])


def test_ipo_is_the_least_squares_solution_of_its_targets():
    """(p - ½) / τ for every pair; with four responses, and Bradley–Terry, no policy has all of them."""
    reference, reward = world()
    found = np.log(converged("ipo", 0.1) / reference)
    first, second = np.triu_indices(4, 1)
    for x in range(len(reference)):
        target = (bradley_terry(reward)[x, first, second] - 0.5) / 0.1
        weight = np.sqrt(reference[x, first] * reference[x, second])
        gaps = np.eye(4)[first] - np.eye(4)[second]
        solution, *_ = np.linalg.lstsq(weight[:, None] * gaps, weight * target)
        np.testing.assert_allclose(found[x] - found[x].mean(), solution - solution.mean(), atol=1e-9)
        assert np.abs(gaps @ solution - target).max() > 1e-3


def two_responses():
    reference, reward = world(prompts=3, responses=2)
    return reference, bradley_terry(reward), bradley_terry(reward)[:, 0, 1]


def test_ipo_of_two_responses_has_the_gap_of_its_target():
    reference, preference, p = two_responses()
    policy = train(reference, pairs(reference, preference), {"name": "ipo", "beta": 0.2})
    np.testing.assert_allclose(gap(policy, reference), (p - 0.5) / 0.2, atol=1e-9)


def test_cdpo_of_two_responses_has_the_log_odds_of_the_smoothed_preference():
    reference, preference, p = two_responses()
    policy = train(reference, pairs(reference, preference), {"name": "cdpo", "beta": 0.2, "label_smoothing": 0.1})
    np.testing.assert_allclose(0.2 * gap(policy, reference), logit(0.9 * p + 0.1 * (1 - p)), atol=1e-9)


def test_cdpo_keeps_a_finite_gap_where_the_labels_are_certain():
    case = case_of("cdpo", 0.3)
    h = gap(converged("cdpo", 0.3), case.reference)
    np.testing.assert_allclose(0.3 * h, np.log((1 - FLIPPED) / FLIPPED), atol=1e-9)


def test_cdpo_is_dpo_of_flipped_labels_and_only_robust_undoes_the_flips():
    reference, reward = world()
    p = bradley_terry(reward)
    noisy = pairs(reference, 0.8 * p + 0.2 * (1 - p))
    smoothed = train(reference, pairs(reference, p), {"name": "cdpo", "beta": 0.2, "label_smoothing": 0.2})
    np.testing.assert_allclose(train(reference, noisy, {"name": "dpo", "beta": 0.2}), smoothed, atol=1e-9)
    optimum = case_of("dpo", 0.2).target
    undone = train(reference, noisy, {"name": "robust", "beta": 0.2, "label_smoothing": 0.2})
    assert total_variation(undone, optimum) < 1e-9
    assert total_variation(smoothed, optimum) > 0.05


def test_kto_follows_the_majority_where_dpo_follows_the_reference():
    """Of two responses KTO gives all to the one wanted more often, however improbable, as its paper proves."""
    reference, p = np.array([[0.1, 0.9]]), 0.6
    preference = np.array([[[0.5, p], [1 - p, 0.5]]])
    kto = train(reference, labelled(reference, np.array([[p, 1 - p]])), {"name": "kto", "beta": 1.0})
    dpo = train(reference, pairs(reference, preference), {"name": "dpo", "beta": 1.0})
    assert total_variation(kto, np.array([[1.0, 0.0]])) < 1e-3
    np.testing.assert_allclose(logit(dpo[0, 0]), logit(p) + logit(0.1), atol=1e-9)  # below 0: the minority's
    assert dpo[0, 0] < 0.5


def test_kto_has_the_least_loss_of_all_policies():
    """On a grid, with z = 0: nothing on the response that is mostly unwanted, and the best share of the other two."""
    reference, wanted, beta = np.array([0.2, 0.3, 0.5]), np.array([0.7, 0.6, 0.3]), 0.3

    def loss(policy):
        value = sigmoid(beta * np.log(np.maximum(policy, 1e-300) / reference))
        return (reference * (wanted * (1 - value) + (1 - wanted) * value)).sum(axis=-1)

    first, second = np.meshgrid(np.linspace(0, 1, 201), np.linspace(0, 1, 201))
    grid = np.stack([first, second, 1 - first - second], axis=-1)[first + second <= 1 + 1e-9]
    assert grid[loss(grid).argmin(), 2] < 1e-9
    share = np.linspace(0, 1, 10001)
    edge = np.stack([share, 1 - share, 0 * share], axis=-1)
    best = edge[loss(edge).argmin()]
    policy = train(reference[None], labelled(reference[None], wanted[None]), {"name": "kto", "beta": beta})
    assert total_variation(policy, best[None]) < 1e-3
    assert (beta * np.log(policy[0] / reference)).mean() < 0  # so that z, of the mismatched responses, is 0


@pytest.mark.parametrize("steps", [1, 40, 400])
def test_without_its_weight_the_gradient_moves_every_gap_by_the_same_amount_each_step(steps):
    reference, reward = world()
    data = pairs(reference, bradley_terry(reward))
    policy = train(reference, data, {"name": "dpo_unweighted", "beta": 0.3}, optimizer=optax.sgd(2.0), steps=steps)
    wins = (bradley_terry(reward) * reference[:, None, :]).sum(axis=2)
    slope = reference * (2 * wins - 1)  # chosen less rejected, of pairs of the reference's responses
    moved = np.log(policy / reference)
    moved -= moved.mean(axis=1, keepdims=True)
    expected = steps * 2.0 * 0.3 / len(data.weights) * (slope - slope.mean(axis=1, keepdims=True))
    np.testing.assert_allclose(moved, expected, rtol=1e-9, atol=1e-12)


def test_without_its_weight_the_policy_degenerates():
    """All but one response lose their probability; the best one too, where the reference seldom draws it."""
    reference, reward = np.array([[0.05, 0.45, 0.5]]), np.array([[1.0, 0.5, 0.0]])
    trained = [without_weight(reference, reward, steps) for steps in (100, 1000, 10000, 100000)]
    distances = [total_variation(policy, target) for policy, target in trained]
    assert distances == sorted(distances, reverse=True)
    assert distances[-1] < 1e-3
    policy, _ = trained[-1]
    assert policy[0, 0] < 1e-3
    assert tilted(reference, reward / 0.1)[0, 0] > 0.8  # what DPO gives it


@pytest.mark.slow
def test_the_example_prints_its_table():
    command = [sys.executable, "-m", "examples.closed_form"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stderr
    rows = [line.strip("| ").split(" | ") for line in result.stdout.splitlines()[2:]]
    assert {row[0].strip("`") for row in rows} == {*OBJECTIVES, "dpo_unweighted"}
    assert all(float(row[-1]) < 1e-3 for row in rows if row[0] != "`dpo_unweighted`")
