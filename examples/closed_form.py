"""What objectives converge to, where that is known, beside what they did converge to, as a Markdown table.

    python -m examples.closed_form

A reward and a reference are drawn for a table of prompts and responses (`examples.tabular`); pairs, rankings and labels
follow from the reward with exact probabilities, so that what is left of the difference is the optimizer's.
"""

from typing import Any, NamedTuple

import numpy as np
import optax

from examples.tabular import Data, Table, bradley_terry, labelled, pairs, rankings, train

FLIPPED = 0.3  # share of labels that are wrong, or taken to be


class Case(NamedTuple):
    """An objective, what it is given, and the policy that theory says it converges to."""

    loss: dict[str, Any]
    reference: Table
    data: Data
    formula: str
    target: Table


def tilted(reference: Table, by: Table) -> Table:
    """π ∝ π_ref exp(by)."""
    policy = reference * np.exp(by - by.max(axis=1, keepdims=True))
    return policy / policy.sum(axis=1, keepdims=True)


def kto_policy(reference: Table, wanted: Table, beta: float) -> Table:
    """Where KTO's gradient vanishes: π ∝ π_ref · max(0, 2p - 1) · σ'(beta log(π / π_ref)), p how probably wanted.

    Where some response is mostly unwanted its anchor z ends at 0, and for beta < 1 there is one such policy. Of two
    responses it gives all to the one that is wanted more often.
    """
    surplus = reference * np.maximum(2 * wanted - 1, 0)
    policy = surplus / surplus.sum(axis=1, keepdims=True)
    for _ in range(100):
        odds = (policy / reference) ** beta
        policy = surplus * odds / (1 + odds) ** 2
        policy /= policy.sum(axis=1, keepdims=True)
    return policy


def total_variation(policy: Table, target: Table) -> float:
    """½ Σ |π - target| of the prompt where it is largest."""
    return float(np.abs(policy - target).sum(axis=1).max() / 2)


def cases(reference: Table, reward: Table, beta: float) -> list[Case]:
    """What is known. cDPO's answer is known where one of two responses, here the first, is always preferred."""
    preference, optimum = bradley_terry(reward), tilted(reference, reward / beta)
    noisy = (1 - FLIPPED) * preference + FLIPPED * (1 - preference)
    wins = np.einsum("xij,xj->xi", preference, reference)  # p(y ≻ a response of the reference)
    two = reference[:, :2] / reference[:, :2].sum(axis=1, keepdims=True)
    certain = np.tile([[0.5, 1.0], [0.0, 0.5]], (len(two), 1, 1))
    gap = np.tile([np.log((1 - FLIPPED) / FLIPPED), 0], (len(two), 1))

    def case(formula: str, data: Data, target: Table, name: str, start: Table = reference, **options: float) -> Case:
        return Case({"name": name, "beta": beta} | options, start, data, formula, target)

    clean = pairs(reference, preference)
    return [
        case("π_ref exp(r / β)", clean, optimum, "dpo"),
        case("the same, of rankings", rankings(reward), optimum, "plackett_luce"),
        case("the same, of noisy labels", pairs(reference, noisy), optimum, "robust", label_smoothing=FLIPPED),
        case(
            "π_ref ((1 - ε) / ε)^(1/β) of the better",
            pairs(two, certain),
            tilted(two, gap / beta),
            "cdpo",
            two,
            label_smoothing=FLIPPED,
        ),
        case("π_ref exp(p(y ≻ π_ref) / β)", clean, tilted(reference, wins / beta), "ipo"),
        case(
            "π_ref max(0, 2p - 1) σ'(β log(π / π_ref))",
            labelled(reference, wins),
            kto_policy(reference, wins, beta),
            "kto",
        ),
    ]


def without_weight(reference: Table, reward: Table, steps: int) -> tuple[Table, Table]:
    """The policy after so many updates of DPO without the weight of its gradient, and where it goes: to one response.

    Its gradient is the same everywhere, so a response's logit moves on in proportion to how much more often it is
    chosen than rejected; the one that moves fastest takes all, whatever beta.
    """
    data = pairs(reference, bradley_terry(reward))
    policy = train(reference, data, {"name": "dpo_unweighted", "beta": 0.1}, optimizer=optax.sgd(10.0), steps=steps)
    surplus = np.zeros_like(reference)
    np.add.at(surplus, (data.prompts, data.responses[:, 0]), data.weights)
    np.subtract.at(surplus, (data.prompts, data.responses[:, 1]), data.weights)
    return policy, (surplus == surplus.max(axis=1, keepdims=True)).astype(float)


def main() -> None:
    """Prints the table."""
    rng = np.random.default_rng(0)
    reference, reward = rng.dirichlet([2.0] * 4, 3), rng.normal(scale=0.5, size=(3, 4))

    def row(name: str, beta: float, formula: str, *policies: Table, target: Table) -> None:
        before, after = (total_variation(policy, target) for policy in policies)
        print(f"| `{name}` | {beta} | {formula} | {before:.2f} | {after:.0e} |")

    print("| objective | beta | converges to π ∝ | total variation before | after |")
    print("|---|---|---|---|---|")
    for beta in (0.05, 0.2, 0.5):
        for loss, start, data, formula, target in cases(reference, reward, beta):
            row(loss["name"], beta, formula, start, train(start, data, loss), target=target)
    for steps in (100, 1000, 10000):
        policy, target = without_weight(reference, reward, steps)
        row("dpo_unweighted", 0.1, f"one response only; {steps} updates", reference, policy, target=target)


if __name__ == "__main__":
    main()
