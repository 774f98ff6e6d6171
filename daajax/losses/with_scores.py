"""Objectives of pairs against a reference that read the data's scores of the responses."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Real

from daajax.losses import links, scores
from daajax.losses.objective import Losses, need_not_negative, need_one_of, need_positive
from daajax.losses.scores import Responses, gap


def odpo(
    responses: Responses,
    *,
    beta: float = 0.1,
    alpha: float = 1.0,
    transform: str = "log",
    of: str = "difference",
) -> Losses:
    """DPO with an offset: -log σ(beta · gap of log-ratios - alpha · f(score of chosen, score of rejected)).

    The authors' code has the log of the difference, or of the ratio, always; `transform="identity"` is DPO with the
    margin itself, as in Llama 2's reward model.

    Args:
        responses: Log-probs in nats, K = 2; scores.
        beta: Strength of the KL constraint, > 0, per nat.
        alpha: Scale of the offset, >= 0.
        transform: `log` or `identity` of the margin; the log needs a positive one, and of one below 1 it is negative.
        of: What the margin is, `difference` or `ratio` of the two scores.

    Returns:
        Losses in nats; -log σ(-alpha · f) when the policy is the reference.

    Raises:
        ValueError: If a hyper-parameter is out of range (at construction, never under jit).

    References:
        Amini et al. 2024, https://arxiv.org/abs/2402.10571; rycolab/odpo
    """
    need_positive(beta=beta)
    need_not_negative(alpha=alpha)
    need_one_of("transform", transform, ("log", "identity"))
    need_one_of("of", of, ("difference", "ratio"))
    rewards, given = beta * scores.log_ratios(responses), scores.data_scores(responses)
    there = scores.exist(responses).all(axis=1)  # of what is no example, 1 is the margin
    margin = gap(given) if of == "difference" else given[:, 0] / jnp.where(there, given[:, 1], 1)
    offset = jnp.log(jnp.where(there, margin, 1)) if transform == "log" else margin
    return Losses(links.logistic(gap(rewards) - alpha * offset), rewards)


def refuse_margins(
    scores: Real[np.ndarray, "examples 2"], *, transform: str = "log", of: str = "difference", **_: float
) -> str | None:
    """Says how many margins `odpo` cannot use: a log is of a positive number, and so are scores that are divided."""
    if of == "ratio":
        return _said(scores <= 0, "scores <= 0, whose ratio is no margin")
    if transform == "log":
        return _said(
            scores[:, :1] <= scores[:, 1:],
            "no margin whose log there is: the chosen score is not above the rejected one",
        )
    return None


def _said(bad: Bool[np.ndarray, "examples _"], what: str) -> str | None:
    count = int(bad.any(axis=1).sum())
    return f"{count} of {len(bad)} examples have {what}" if count else None


def rebel(responses: Responses, *, eta: float = 1.0, scale: str = "code") -> Losses:
    """REBEL: regresses the gap of log-ratios onto eta times the gap of scores, (gap - eta · score gap)².

    The reference is the policy that sampled the pair; the order of the two responses does not matter.

    Args:
        responses: Log-probs in nats, K = 2; scores.
        eta: Step size, > 0, nats per unit of score.
        scale: `code`, the formula above, or `paper`, that divided by eta².

    Returns:
        Losses in nats squared (`code`) or units of score squared (`paper`); (eta · score gap)² or (score gap)² when the
        policy is the reference.

    Raises:
        ValueError: If a hyper-parameter is out of range (at construction, never under jit).

    References:
        Algorithm 1 of Gao et al. 2024, https://arxiv.org/abs/2404.16767; ZhaolinGao/REBEL
    """
    need_positive(eta=eta)
    need_one_of("scale", scale, ("code", "paper"))
    log_ratios, margin = scores.log_ratios(responses), gap(scores.data_scores(responses))
    unit = eta if scale == "paper" else 1.0
    return Losses(links.square(gap(log_ratios) / unit, eta * margin / unit), log_ratios / eta)


def dno(responses: Responses, *, eta: float = 0.1) -> Losses:
    """Direct Nash optimization: -p log σ(z) - (1 - p) log σ(-z), z = eta · gap of log-ratios, p = σ(score gap).

    The scores are expected win rates against the policy of the round before, which is the reference. DNO-Prct, on
    pairs of large margin, is `dpo`.

    Args:
        responses: Log-probs in nats, K = 2; scores.
        eta: Strength of the KL constraint, > 0, per nat.

    Returns:
        Losses in nats, ln 2 when the policy is the reference.

    Raises:
        ValueError: If eta is not positive (at construction, never under jit).

    References:
        Algorithm 1 of Rosset et al. 2024, https://arxiv.org/abs/2404.03715; its code is not public
    """
    need_positive(eta=eta)
    rewards = eta * scores.log_ratios(responses)
    losing = jax.nn.sigmoid(-gap(scores.data_scores(responses)))
    return Losses(links.logistic(gap(rewards), losing), rewards)


def rpo_reward(responses: Responses, *, beta: float = 0.1, eta: float = 1.0) -> Losses:
    """Reward-aware preference optimization: KL(σ(eta · score gap) ‖ σ(beta · gap of log-ratios)) of two coins.

    Nemotron-4's RPO. Once the gap of the implicit rewards is that of the scores, nothing is lost; DPO drives it on.

    Args:
        responses: Log-probs in nats, K = 2; scores.
        beta: Strength of the KL constraint, > 0, per nat.
        eta: Scale of the scores, > 0.

    Returns:
        Losses in nats, >= 0; ln 2 less the entropy of σ(eta · score gap) when the policy is the reference.

    Raises:
        ValueError: If a hyper-parameter is out of range (at construction, never under jit).

    References:
        Adler et al. 2024 (Nemotron-4 340B), https://arxiv.org/abs/2406.11704
    """
    need_positive(beta=beta, eta=eta)
    rewards, target = beta * scores.log_ratios(responses), eta * gap(scores.data_scores(responses))
    losing = jax.nn.sigmoid(-target)
    return Losses(links.logistic(gap(rewards), losing) - links.logistic(target, losing), rewards)


def sppo(responses: Responses, *, beta: float = 0.001) -> Losses:
    """Self-play preference optimization: ½ Σ over both of (log-ratio - (win rate - ½) / beta)².

    The authors' loss; TRL's `sppo_hard` is `sppo_hard`. Their `sppo_single` has the scores P and 1 - P, P the
    probability that the chosen response wins. The reference is the policy of the round before.

    Args:
        responses: Log-probs in nats, K = 2; scores, each a response's mean win rate, in [0, 1].
        beta: 1 / eta of the paper, > 0, per nat.

    Returns:
        Losses in nats squared; ½ Σ ((win rate - ½) / beta)² when the policy is the reference.

    Raises:
        ValueError: If beta is not positive (at construction, never under jit).

    References:
        Wu et al. 2024, https://arxiv.org/abs/2405.00675; uclaml/SPPO
    """
    need_positive(beta=beta)
    log_ratios = scores.log_ratios(responses)
    targets = (scores.data_scores(responses) - 0.5) / beta
    return Losses(jnp.square(log_ratios - targets).sum(axis=1) / 2, beta * log_ratios)


def refuse_win_rates(scores: Real[np.ndarray, "examples responses"], **_: float) -> str | None:
    """Says how many scores are no win rates: outside [0, 1]."""
    return _said((scores < 0) | (scores > 1), "scores outside [0, 1], which are no win rates")
