"""Objectives of pairs against a reference in which the examples of an update meet: sorted, or chosen among."""

import jax
import jax.numpy as jnp

from daajax.losses import links, scores, statistics
from daajax.losses.objective import Losses, need, need_flip_share, need_not_negative, need_positive
from daajax.losses.scores import Responses, gap


def aot(responses: Responses, *, beta: float = 0.01, label_smoothing: float = 0.0) -> Losses:
    """Alignment by optimal transport, paired: -log σ(beta · (k-th gap of the policy - k-th gap of the reference)).

    The gaps of log-probs, chosen less rejected, are sorted over the update, the policy's and the reference's apart; the
    loss of a rank is that of the example whose policy gap has it. TRL's `aot`; in TRL 0.x `aot_pair` was the other one.

    Args:
        responses: Log-probs in nats, K = 2.
        beta: Strength of the KL constraint, > 0, per nat.
        label_smoothing: Share of flipped labels, in [0, 0.5).

    Returns:
        Losses in nats, ln 2 when the policy is the reference.

    Raises:
        ValueError: If a hyper-parameter is out of range (at construction, never under jit).

    References:
        Melnyk et al. 2024, https://arxiv.org/abs/2406.05882
    """
    need_positive(beta=beta)
    need_flip_share(label_smoothing)
    log_ratios, real = scores.log_ratios(responses), responses.are_real()
    policy = gap(responses.logps)
    reference = jax.lax.stop_gradient(policy - gap(log_ratios))
    partner = statistics.ascending(reference, real)[statistics.ranks(policy, real)]
    return Losses(links.logistic(beta * (policy - reference[partner]), label_smoothing), beta * log_ratios)


def aot_unpaired(responses: Responses, *, beta: float = 0.01, label_smoothing: float = 0.0) -> Losses:
    """Alignment by optimal transport, unpaired: -log σ(beta · (k-th log-ratio of chosen - k-th of rejected)).

    The log-ratios of the chosen and of the rejected responses are sorted over the update, apart; the loss of a rank is
    that of the example whose chosen response has it.

    Args:
        responses: Log-probs in nats, K = 2.
        beta: Strength of the KL constraint, > 0, per nat.
        label_smoothing: Share of flipped labels, in [0, 0.5).

    Returns:
        Losses in nats, ln 2 when the policy is the reference.

    Raises:
        ValueError: If a hyper-parameter is out of range (at construction, never under jit).

    References:
        Melnyk et al. 2024, https://arxiv.org/abs/2406.05882; TRL's `aot_unpaired`, in TRL 0.x `aot_pair`
    """
    need_positive(beta=beta)
    need_flip_share(label_smoothing)
    log_ratios, real = scores.log_ratios(responses), responses.are_real()
    chosen, rejected = log_ratios[:, 0], log_ratios[:, 1]
    partner = statistics.ascending(rejected, real)[statistics.ranks(chosen, real)]
    return Losses(links.logistic(beta * (chosen - rejected[partner]), label_smoothing), beta * log_ratios)


def beta_dpo(
    responses: Responses, *, beta: float = 0.1, alpha: float = 0.6, rho: float = 0.2, decay: float = 0.9
) -> Losses:
    """β-DPO: DPO whose beta follows the update's gaps of log-ratios, on those pairs whose gap is near the usual.

    With M and S the moving mean and standard deviation of the gaps, this update's with them, a share 1 - rho of the
    pairs is drawn without replacement, in proportion to exp(-½ ((gap - M) / S)²); beta of the update is
    beta · (1 + alpha · (mean gap of those - M)), at least 0.001. Neither carries a gradient.

    Args:
        responses: Log-probs in nats, K = 2; a Gumbel draw for each example.
        beta: Strength of the KL constraint where the mean gap is the usual one, > 0, per nat.
        alpha: How far beta follows the gaps, >= 0, per nat.
        rho: Share of the pairs that is left out, in [0, 1); at least one pair is kept.
        decay: Of the moving averages, in [0, 1); they start from 0.

    Returns:
        Losses in nats, whose mean over the update is that over the pairs kept: 0 for those left out, the others times
        pairs over pairs kept. ln 2 is that mean when the policy is the reference. The metrics are `beta` of the update
        and `kept`, 1 or 0.

    Raises:
        ValueError: If a hyper-parameter is out of range (at construction, never under jit).

    References:
        Wu et al. 2024, https://arxiv.org/abs/2407.08639; junkangwu/beta-DPO
    """
    need_positive(beta=beta)
    need_not_negative(alpha=alpha)
    need("rho", rho, 0 <= rho < 1, "in [0, 1)")
    need("decay", decay, 0 <= decay < 1, "in [0, 1)")
    log_ratios, real = scores.log_ratios(responses), responses.are_real()
    gaps, seen = gap(log_ratios), jax.lax.stop_gradient(gap(log_ratios))
    now = {"mean": statistics.mean(seen, real), "std": statistics.deviation(seen, real)}
    state = {name: decay * responses.state[name] + (1 - decay) * value for name, value in now.items()}

    distance = (seen - state["mean"]) / jnp.maximum(state["std"], jnp.finfo(seen.dtype).eps)
    pairs = real.sum().astype(seen.dtype)
    count = jnp.maximum(jnp.floor((1 - rho) * pairs + 1e-3), 1)  # 1e-3: a whole number that rounding left below itself
    kept = real & (statistics.ranks(jnp.square(distance) / 2 - scores.gumbel(responses), real) < count)
    followed = beta * (1 + alpha * (statistics.mean(seen, kept) - state["mean"]))
    of_update = jnp.maximum(followed, 1e-3)
    losses = kept * links.logistic(of_update * gaps) * (pairs / count)
    metrics = {"beta": statistics.spread(of_update, losses), "kept": kept.astype(losses.dtype)}
    return Losses(losses, beta * log_ratios, metrics, state=state)
