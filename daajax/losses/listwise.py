"""Objectives of lists of any length against a reference; a list may lack responses, whose length is 0."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from daajax.losses import scores
from daajax.losses.objective import Losses, need, need_one_of, need_positive
from daajax.losses.scores import Responses

ABSENT = -1e30  # a logit whose share is 0; infinite ones have no gradient


def plackett_luce(responses: Responses, *, beta: float = 0.1) -> Losses:
    """DPO of a ranking: -Σ_k [r_k - log Σ_{j >= k} exp(r_j)], r = beta · log-ratio, response 0 the best.

    Args:
        responses: Log-probs in nats, any K, best first.
        beta: Strength of the KL constraint, > 0, per nat.

    Returns:
        Losses in nats; with two responses those of `dpo`, and log K! when the policy is the reference.

    Raises:
        ValueError: If beta is not positive (at construction, never under jit).

    References:
        Eq. 20 of Rafailov et al. 2023, https://arxiv.org/abs/2305.18290
    """
    need_positive(beta=beta)
    rewards, there = beta * scores.log_ratios(responses), scores.exist(responses)
    above = rewards[:, None, :] - rewards[:, :, None]  # r_j - r_k
    later = jnp.triu(jnp.ones_like(above, bool), k=1) & there[:, None, :]
    odds_of_later = jax.nn.logsumexp(jnp.where(later, above, ABSENT), axis=2)
    return Losses(jnp.where(there, jax.nn.softplus(odds_of_later), 0).sum(axis=1), rewards)


def exo(
    responses: Responses,
    *,
    beta: float = 0.5,
    target: str = "scores",
    score_temperature: float = 0.5,
    eps: float = 0.001,
    log_eps: float | None = None,
) -> Losses:
    """Exact optimization: KL(softmax of beta · log-ratios ‖ target), the reverse KL over the responses of a list.

    Args:
        responses: Log-probs in nats; any K and scores, or K = 2 with the target `pair`.
        beta: beta_pi of the paper, > 0, per nat.
        target: `scores`: softmax(scores / score_temperature); `pair`: (1 - eps, eps).
        score_temperature: beta_r of the paper, > 0.
        eps: Share of the rejected response in the target `pair`, in (0, ½); TRL's 0.001.
        log_eps: In place of eps, the official code's target, which does not add up to 1: (0, log_eps) in logs; -10
            there. None: eps.

    Returns:
        Losses in nats, >= 0 where the target adds up to 1; KL(uniform ‖ target) when the policy is the reference.

    Raises:
        ValueError: If a hyper-parameter is out of range (at construction, never under jit).

    References:
        Ji et al. 2024, https://arxiv.org/abs/2402.00856; haozheji/exact-optimization
    """
    need_positive(beta=beta, score_temperature=score_temperature)
    need_one_of("target", target, ("scores", "pair"))
    need("eps", eps, 0 < eps < 0.5, "in (0, 0.5)")
    need("log_eps", log_eps, log_eps is None or log_eps < 0, "< 0, or None")
    if target == "scores":
        need("eps", eps, eps == 0.001, "left out: only target='pair' has one")
        need("log_eps", log_eps, log_eps is None, "left out: only target='pair' has one")
    else:
        need("eps", eps, log_eps is None or eps == 0.001, "left out where log_eps is set")
        need("score_temperature", score_temperature, score_temperature == 0.5, "left out: target='pair' has none")
    rewards, there = beta * scores.log_ratios(responses), scores.exist(responses)
    if target == "scores":
        wanted = _log_shares(scores.data_scores(responses) / score_temperature, there)
    else:
        pair = jnp.log(jnp.array([1 - eps, eps])) if log_eps is None else jnp.array([0.0, log_eps])
        wanted = jnp.where(there, pair.astype(rewards.dtype)[None], 0)
    found = _log_shares(rewards, there)
    return Losses(jnp.where(there, jnp.exp(found) * (found - wanted), 0).sum(axis=1), rewards)


def info_nca(
    responses: Responses,
    *,
    beta: float = 0.01,
    target: str = "scores",
    score_temperature: float = 0.001,
    score_bonus: float = 0.01,
) -> Losses:
    """InfoNCA: -Σ_k t_k log softmax(beta · log-ratios)_k, the cross entropy with a target over the list.

    Args:
        responses: Log-probs in nats, any K; scores, unless the target is `first`.
        beta: Strength of the KL constraint, > 0, per nat.
        target: `scores`: t = softmax(scores / score_temperature); `first`: all of t on response 0, which with two
            responses is `dpo`.
        score_temperature: alpha of the paper, > 0.
        score_bonus: Added to the score of response 0, as the official code does.

    Returns:
        Losses in nats, log K when the policy is the reference.

    Raises:
        ValueError: If a hyper-parameter is out of range (at construction, never under jit).

    References:
        Chen et al. 2024, https://arxiv.org/abs/2402.05369; thu-ml/Noise-Contrastive-Alignment
    """
    wanted, rewards = _wanted(responses, beta, target, score_temperature, score_bonus)
    there = scores.exist(responses)
    return Losses(-(wanted * _log_shares(rewards, there)).sum(axis=1), rewards)


def nca(
    responses: Responses,
    *,
    beta: float = 0.01,
    target: str = "scores",
    score_temperature: float = 0.001,
    score_bonus: float = 0.01,
) -> Losses:
    """Noise contrastive alignment: -Σ_k [t_k log σ(r_k) + (1/K) log σ(-r_k)], r = beta · log-ratio.

    Args:
        responses: Log-probs in nats, any K; scores, unless the target is `first`.
        beta: Strength of the KL constraint, > 0, per nat.
        target: `scores`: t = softmax(scores / score_temperature); `first`: all of t on response 0, which with two
            responses is TRL's `nca_pair`.
        score_temperature: alpha of the paper, > 0.
        score_bonus: Added to the score of response 0, as the official code does.

    Returns:
        Losses in nats, 2 ln 2 when the policy is the reference.

    Raises:
        ValueError: If a hyper-parameter is out of range (at construction, never under jit).

    References:
        Chen et al. 2024, https://arxiv.org/abs/2402.05369; thu-ml/Noise-Contrastive-Alignment
    """
    wanted, rewards = _wanted(responses, beta, target, score_temperature, score_bonus)
    there = scores.exist(responses)
    share = there / jnp.maximum(there.sum(axis=1, keepdims=True), 1)
    return Losses((wanted * jax.nn.softplus(-rewards) + share * jax.nn.softplus(rewards)).sum(axis=1), rewards)


def _wanted(
    responses: Responses, beta: float, target: str, temperature: float, bonus: float
) -> tuple[Float[Array, "examples responses"], Float[Array, "examples responses"]]:
    """The target over each list, 0 where there is no response, and the rewards."""
    need_positive(beta=beta, score_temperature=temperature)
    need_one_of("target", target, ("scores", "first"))
    if target == "first":
        need("score_temperature", temperature, temperature == 0.001, "left out: target='first' has none")
        need("score_bonus", bonus, bonus == 0.01, "left out: target='first' has none")
    rewards, there = beta * scores.log_ratios(responses), scores.exist(responses)
    first = jnp.zeros_like(rewards).at[:, 0].set(1)
    if target == "first":
        return jnp.where(there, first, 0), rewards
    given = scores.data_scores(responses) + bonus * first
    return jnp.where(there, jnp.exp(_log_shares(given / temperature, there)), 0), rewards


def _log_shares(
    logits: Float[Array, "examples responses"], there: Bool[Array, "examples responses"]
) -> Float[Array, "examples responses"]:
    """Logs of softmax over the responses that there are; 0 for the others."""
    return jnp.where(there, jax.nn.log_softmax(jnp.where(there, logits, ABSENT), axis=1), 0)
