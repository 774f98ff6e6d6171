"""Objectives of pairs against a reference that add something to DPO's logit or to its loss: length, likelihood."""

import jax

from daajax.losses import links, scores
from daajax.losses.likelihood import with_nll
from daajax.losses.objective import Losses, need_not_negative, need_positive
from daajax.losses.pairwise import dpo
from daajax.losses.scores import Responses, gap


def dpo_nll(responses: Responses, *, beta: float = 0.1, nll_weight: float = 1.0, nll_reduction: str = "seq") -> Losses:
    """DPO plus the likelihood of the chosen response: -log σ(beta · gap of log-ratios) - nll_weight · its log-prob.

    Iterative reasoning preference optimization (reduction `seq`), Llama 3's DPO (nll_weight 0.2), RPO of Liu et al.
    (nll_weight 0.005). TRL's `["sigmoid", "sft"]` has the reduction `batch`.

    Args:
        responses: Log-probs in nats, K = 2.
        beta: Strength of the KL constraint, > 0, per nat.
        nll_weight: Weight of the likelihood, >= 0.
        nll_reduction: What the chosen log-prob is divided by: its tokens (`seq`), nothing (`sum`), or all chosen tokens
            of the update (`batch`).

    Returns:
        Losses in nats; at the reference, ln 2 plus the likelihood's term.

    Raises:
        ValueError: If a hyper-parameter is out of range (at construction, never under jit).

    References:
        Pang et al. 2024, https://arxiv.org/abs/2404.19733; Liu et al. 2024, https://arxiv.org/abs/2405.16436
    """
    return with_nll(dpo(responses, beta=beta), responses, nll_weight, nll_reduction)


def dpop(responses: Responses, *, beta: float = 0.3, penalty: float = 50.0) -> Losses:
    """DPO-positive (Smaug): -log σ(beta · (gap of log-ratios - penalty · max(0, -log-ratio of chosen))).

    The chosen response may not become less likely than under the reference. The kink lies where policy and reference
    are equal, which is where training starts; the penalty's slope there is 0.

    Args:
        responses: Log-probs in nats, K = 2.
        beta: Strength of the KL constraint, > 0, per nat.
        penalty: lambda of the paper, >= 0.

    Returns:
        Losses in nats, ln 2 when the policy is the reference.

    Raises:
        ValueError: If a hyper-parameter is out of range (at construction, never under jit).

    References:
        Pal et al. 2024, https://arxiv.org/abs/2402.13228
    """
    need_positive(beta=beta)
    need_not_negative(penalty=penalty)
    log_ratios = scores.log_ratios(responses)
    fall = jax.nn.relu(-log_ratios[:, 0])
    return Losses(links.logistic(beta * (gap(log_ratios) - penalty * fall)), beta * log_ratios)


def r_dpo(responses: Responses, *, beta: float = 0.1, alpha: float = 0.01) -> Losses:
    """Length-regularized DPO: -log σ(beta · gap of log-ratios + alpha · (tokens of chosen - tokens of rejected)).

    Args:
        responses: Log-probs in nats, K = 2.
        beta: Strength of the KL constraint, > 0, per nat.
        alpha: Per token, >= 0; it is not multiplied by beta.

    Returns:
        Losses in nats, ln 2 when the policy is the reference and the lengths are equal.

    Raises:
        ValueError: If a hyper-parameter is out of range (at construction, never under jit).

    References:
        Park et al. 2024, https://arxiv.org/abs/2403.19159
    """
    need_positive(beta=beta)
    need_not_negative(alpha=alpha)
    rewards = beta * scores.log_ratios(responses)
    longer = gap(responses.lengths.astype(rewards.dtype))
    return Losses(links.logistic(gap(rewards) + alpha * longer), rewards)
