"""Objectives of pairs against a reference that hold each response to something of its own, not only the two apart."""

import jax
from jaxtyping import Array, Float

from daajax.losses import links, scores
from daajax.losses.objective import Losses, need_not_negative, need_positive
from daajax.losses.scores import Responses, gap


def cal_dpo(responses: Responses, *, beta: float = 0.001, calibration_weight: float = 1.0) -> Losses:
    """Calibrated DPO: -log σ(gap of log-ratios) + w · [(q of chosen - 1/(2 beta))² + (q of rejected + 1/(2 beta))²].

    q is a log-ratio; there is no beta in the first term. Cal-DPO/Cal-DPO has w = 1; tengxiao1/Cal-DPO has ½.

    Args:
        responses: Log-probs in nats, K = 2.
        beta: > 0, per nat; the targets of the log-ratios are ±1 / (2 beta) nats.
        calibration_weight: w, >= 0.

    Returns:
        Losses in nats; ln 2 + w / (2 beta²) when the policy is the reference.

    Raises:
        ValueError: If a hyper-parameter is out of range (at construction, never under jit).

    References:
        Xiao et al. 2024, https://arxiv.org/abs/2412.14516
    """
    need_positive(beta=beta)
    need_not_negative(calibration_weight=calibration_weight)
    log_ratios = scores.log_ratios(responses)
    calibration = _to_opposite_targets(log_ratios, 1 / (2 * beta))
    return Losses(links.logistic(gap(log_ratios)) + calibration_weight * calibration, beta * log_ratios)


def sppo_hard(responses: Responses, *, beta: float = 0.001) -> Losses:
    """SPPO where the chosen response always wins: (q of chosen - 1/(2 beta))² + (q of rejected + 1/(2 beta))².

    TRL's `loss_type="sppo_hard"`, q a log-ratio; it lacks the ½ of the authors' loss, which is `sppo`.

    Args:
        responses: Log-probs in nats, K = 2.
        beta: 1 / eta of the paper, > 0, per nat.

    Returns:
        Losses in nats squared; 1 / (2 beta²) when the policy is the reference.

    Raises:
        ValueError: If beta is not positive (at construction, never under jit).

    References:
        Wu et al. 2024, https://arxiv.org/abs/2405.00675
    """
    need_positive(beta=beta)
    log_ratios = scores.log_ratios(responses)
    return Losses(_to_opposite_targets(log_ratios, 1 / (2 * beta)), beta * log_ratios)


def _to_opposite_targets(log_ratios: Float[Array, "examples 2"], target: float) -> Float[Array, " examples"]:
    return links.square(log_ratios[:, 0], target) + links.square(log_ratios[:, 1], -target)


def apo_zero(responses: Responses, *, beta: float = 0.1, constant: float = 1.0) -> Losses:
    """Anchored preference optimization, zero: 1 - σ(beta · q of chosen) + σ(beta · q of rejected), q a log-ratio.

    For a policy that is worse than the chosen responses: they become likelier, the rejected ones less likely.

    Args:
        responses: Log-probs in nats, K = 2.
        beta: Strength of the KL constraint, > 0, per nat.
        constant: The 1 of the formula, that some code drops (0); the gradient does not know it.

    Returns:
        Losses without a unit; `constant` when the policy is the reference.

    Raises:
        ValueError: If beta is not positive (at construction, never under jit).

    References:
        D'Oosterlinck et al. 2024, https://arxiv.org/abs/2408.06266
    """
    need_positive(beta=beta)
    rewards = beta * scores.log_ratios(responses)
    losses = jax.nn.sigmoid(-rewards[:, 0]) + jax.nn.sigmoid(rewards[:, 1])
    return Losses(losses + (constant - 1), rewards)


def apo_down(responses: Responses, *, beta: float = 0.1, constant: float = 1.0) -> Losses:
    """Anchored preference optimization, down: σ(beta · q of chosen) + 1 - σ(beta · gap of q), q a log-ratio.

    For a policy that is better than the chosen responses: both become less likely, the rejected ones more so.

    Args:
        responses: Log-probs in nats, K = 2.
        beta: Strength of the KL constraint, > 0, per nat.
        constant: The 1 of the formula, that some code drops (0); the gradient does not know it.

    Returns:
        Losses without a unit; `constant` when the policy is the reference.

    Raises:
        ValueError: If beta is not positive (at construction, never under jit).

    References:
        D'Oosterlinck et al. 2024, https://arxiv.org/abs/2408.06266
    """
    need_positive(beta=beta)
    rewards = beta * scores.log_ratios(responses)
    losses = jax.nn.sigmoid(rewards[:, 0]) + jax.nn.sigmoid(-gap(rewards))
    return Losses(losses + (constant - 1), rewards)
