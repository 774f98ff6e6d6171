"""Objectives of pairs against a reference: one logit of the two log-ratios, and a link.

To add one: a function of `Responses` with keyword-only hyper-parameters, under its paper's name, that returns
`Losses`; and a line in `daajax.losses.objectives.OBJECTIVES`. Nothing here reads a config, a mask or a batch; weights,
counts and means are `daajax.loss`'s.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from daajax.losses import links, scores
from daajax.losses.objective import Losses, need, need_flip_share, need_one_of, need_positive
from daajax.losses.scores import Responses, gap


def dpo(responses: Responses, *, beta: float = 0.1, label_smoothing: float = 0.0) -> Losses:
    """Direct preference optimization: -log σ(beta · (log-ratio of chosen - log-ratio of rejected)).

    With `label_smoothing` it is conservative DPO (cDPO): that share of the preferences is taken to be flipped.

    Args:
        responses: Log-probs in nats, K = 2.
        beta: Strength of the KL constraint, > 0, per nat.
        label_smoothing: Share of flipped labels, in [0, 0.5).

    Returns:
        Losses in nats, ln 2 when the policy is the reference. The metric `gradient_weight` is σ(reward of rejected -
        reward of chosen), the paper's weight of an example's gradient; smoothing lowers the weight itself by
        `label_smoothing`.

    Raises:
        ValueError: If a hyper-parameter is out of range (at construction, never under jit).

    References:
        Eq. 7 of Rafailov et al. 2023, https://arxiv.org/abs/2305.18290; cDPO: https://ericmitchell.ai/cdpo.pdf
    """
    need_positive(beta=beta)
    need_flip_share(label_smoothing)
    log_ratios = scores.log_ratios(responses)
    rewards = beta * log_ratios
    losses = jnp.asarray(_dpo(log_ratios, beta, label_smoothing))
    return Losses(losses, rewards, {"gradient_weight": jax.nn.sigmoid(-gap(rewards))})


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _dpo(log_ratios: Float[Array, "examples 2"], beta: float, label_smoothing: float) -> Float[Array, " examples"]:
    return links.logistic(beta * gap(log_ratios), label_smoothing)


def _dpo_forward(log_ratios, beta, label_smoothing):
    return _dpo(log_ratios, beta, label_smoothing), log_ratios


def _dpo_backward(beta, label_smoothing, log_ratios, cotangent):
    """The paper's gradient (its section 4): -β σ(r̂_rejected - r̂_chosen) [∇ log π(chosen) - ∇ log π(rejected)].

    Under label smoothing ε the weight σ(-z) becomes (1 - ε) σ(-z) - ε σ(z).
    """
    z = beta * gap(log_ratios)
    weight = (1 - label_smoothing) * jax.nn.sigmoid(-z) - label_smoothing * jax.nn.sigmoid(z)
    chosen = -beta * weight * cotangent
    return (jnp.stack([chosen, -chosen], axis=1),)


_dpo.defvjp(_dpo_forward, _dpo_backward)


def cdpo(responses: Responses, *, beta: float = 0.1, label_smoothing: float = 0.2) -> Losses:
    """Conservative DPO: (1 - ε) · -log σ(z) + ε · -log σ(-z), z = beta · (log-ratio of chosen - of rejected).

    It is `dpo` with label smoothing ε, under the name that its note gives it; TRL 1.x dropped the option silently.

    Args:
        responses: Log-probs in nats, K = 2.
        beta: Strength of the KL constraint, > 0, per nat.
        label_smoothing: ε, the share of flipped labels, in [0, 0.5); the best gap of rewards is log((1 - ε) / ε).

    Returns:
        Losses in nats, ln 2 when the policy is the reference. The metric is that of `dpo`.

    Raises:
        ValueError: If a hyper-parameter is out of range (at construction, never under jit).

    References:
        Eq. 3 of Mitchell 2023, https://ericmitchell.ai/cdpo.pdf
    """
    return dpo(responses, beta=beta, label_smoothing=label_smoothing)


def robust(responses: Responses, *, beta: float = 0.1, label_smoothing: float = 0.1) -> Losses:
    """Robust DPO: [(1 - ε) · -log σ(z) - ε · -log σ(-z)] / (1 - 2ε), z = beta · (log-ratio of chosen - of rejected).

    Its mean over labels of which a share ε is flipped is DPO's loss of the true labels.

    Args:
        responses: Log-probs in nats, K = 2.
        beta: Strength of the KL constraint, > 0, per nat.
        label_smoothing: ε, the share of flipped labels, in [0, 0.5).

    Returns:
        Losses in nats, ln 2 when the policy is the reference; they can be negative and have no lower bound.

    Raises:
        ValueError: If a hyper-parameter is out of range (at construction, never under jit).

    References:
        Chowdhury et al. 2024, https://arxiv.org/abs/2403.00409
    """
    need_positive(beta=beta)
    need_flip_share(label_smoothing)
    rewards = beta * scores.log_ratios(responses)
    return Losses(links.robust(gap(rewards), label_smoothing), rewards)


def dpo_unweighted(responses: Responses, *, beta: float = 0.1) -> Losses:
    """DPO whose gradient lacks its weight: -beta · (log-ratio of chosen - log-ratio of rejected).

    An ablation: it has no lower bound, and the DPO paper shows that it degenerates.

    Args:
        responses: Log-probs in nats, K = 2.
        beta: > 0, per nat; it only scales the loss.

    Returns:
        Losses in nats, 0 when the policy is the reference.

    Raises:
        ValueError: If beta is not positive (at construction, never under jit).

    References:
        Section 4 of Rafailov et al. 2023, https://arxiv.org/abs/2305.18290; without a reference it is `unlikelihood`
    """
    need_positive(beta=beta)
    rewards = beta * scores.log_ratios(responses)
    return Losses(links.linear(gap(rewards)), rewards)


def ipo(responses: Responses, *, beta: float = 0.1) -> Losses:
    """Identity preference optimization: (gap of log-ratios - 1 / (2 beta))², a regression of the gap.

    The paper sums over tokens; TRL and HALOs average per token. This is the paper's; `ipo_mean` is the other.

    Args:
        responses: Log-probs in nats, K = 2.
        beta: tau of the paper, > 0; the target gap is 1 / (2 beta) nats.

    Returns:
        Losses in nats squared; 1 / (4 beta²) when the policy is the reference.

    Raises:
        ValueError: If beta is not positive (at construction, never under jit).

    References:
        Eq. 17 of Azar et al. 2023, https://arxiv.org/abs/2310.12036
    """
    need_positive(beta=beta)
    log_ratios = scores.log_ratios(responses)
    return Losses(links.square(gap(log_ratios), 1 / (2 * beta)), beta * log_ratios)


def ipo_mean(responses: Responses, *, beta: float = 0.1) -> Losses:
    """IPO per token: (gap of log-ratios per token - 1 / (2 beta))², as TRL 1.x and HALOs have it; `ipo` is the paper's.

    Args:
        responses: Log-probs in nats, K = 2.
        beta: tau of the paper, > 0; the target gap is 1 / (2 beta) nats per token.

    Returns:
        Losses in (nats per token)²; 1 / (4 beta²) when the policy is the reference.

    Raises:
        ValueError: If beta is not positive (at construction, never under jit).

    References:
        Azar et al. 2023, https://arxiv.org/abs/2310.12036, with the per-token mean of TRL's `loss_type="ipo"`
    """
    need_positive(beta=beta)
    ratios = scores.mean_log_ratios(responses)
    return Losses(links.square(gap(ratios), 1 / (2 * beta)), beta * ratios)


def hinge(responses: Responses, *, beta: float = 0.05, delta: float = 1.0) -> Losses:
    """Hinge loss of RSO: max(0, delta - beta · (log-ratio of chosen - log-ratio of rejected)).

    TRL's `loss_type="hinge"`. SLiC-HF has no reference: `slic_hf`.

    Args:
        responses: Log-probs in nats, K = 2.
        beta: gamma of the paper, > 0, per nat.
        delta: Gap of rewards from which on nothing is lost, > 0; 1 in the paper.

    Returns:
        Losses without a unit, delta when the policy is the reference.

    Raises:
        ValueError: If a hyper-parameter is out of range (at construction, never under jit).

    References:
        Liu et al. 2023 (RSO), https://arxiv.org/abs/2309.06657
    """
    need_positive(beta=beta, delta=delta)
    rewards = beta * scores.log_ratios(responses)
    return Losses(links.hinge(gap(rewards), delta), rewards)


def spin(responses: Responses, *, beta: float = 0.1, link: str = "logistic") -> Losses:
    """Self-play fine-tuning: -log σ(beta · (log-ratio of the data's answer - of the last policy's own)), or its hinge.

    The loss of given log-probs: `dpo` or `hinge` where response 0 is the data's and response 1 was sampled from the
    reference, which is the policy of the round before.

    Args:
        responses: Log-probs in nats, K = 2.
        beta: lambda of the paper, > 0, per nat.
        link: `logistic` or `hinge` (margin 1), the two of its code.

    Returns:
        Losses; ln 2 nats (`logistic`) or 1 (`hinge`) when the policy is the reference.

    Raises:
        ValueError: If a hyper-parameter is out of range (at construction, never under jit).

    References:
        Chen et al. 2024, https://arxiv.org/abs/2401.01335
    """
    need_one_of("link", link, ("logistic", "hinge"))
    return dpo(responses, beta=beta) if link == "logistic" else hinge(responses, beta=beta)


def dpo_norm(responses: Responses, *, beta: float = 5.0, label_smoothing: float = 0.0) -> Losses:
    """Length-normalized DPO: -log σ(beta · (log-ratio per token of chosen - of rejected)).

    Args:
        responses: Log-probs in nats, K = 2.
        beta: Strength of the KL constraint, > 0, per nat and token; Tülu 3 trains with 5.
        label_smoothing: Share of flipped labels, in [0, 0.5).

    Returns:
        Losses in nats, ln 2 when the policy is the reference.

    Raises:
        ValueError: If a hyper-parameter is out of range (at construction, never under jit).

    References:
        Lambert et al. 2024 (Tülu 3), https://arxiv.org/abs/2411.15124; `dpo_norm` of allenai/open-instruct
    """
    need_positive(beta=beta)
    need_flip_share(label_smoothing)
    rewards = beta * scores.mean_log_ratios(responses)
    return Losses(links.logistic(gap(rewards), label_smoothing), rewards)


def discopop(responses: Responses, *, beta: float = 0.05, tau: float = 0.05, link: str = "lrml") -> Losses:
    """DiscoPOP: (1 - σ(z / tau)) · -log σ(z) + σ(z / tau) · exp(-z), z = beta · (log-ratio of chosen - of rejected).

    The log-ratio modulated loss, found by a language model; it is not convex. Where the authors' code has 0 · inf, at
    z far below 0, this has the value.

    Args:
        responses: Log-probs in nats, K = 2.
        beta: Strength of the KL constraint, > 0, per nat.
        tau: Temperature of the modulation, > 0.
        link: `lrml`, the formula above, or `cell`, ½ exp(-z) + ½ · -log σ(z), which has no tau.

    Returns:
        Losses in nats; ½ ln 2 + ½ when the policy is the reference.

    Raises:
        ValueError: If a hyper-parameter is out of range (at construction, never under jit).

    References:
        Lu et al. 2024, https://arxiv.org/abs/2406.08414
    """
    need_positive(beta=beta, tau=tau)
    need("tau", tau, link == "lrml" or tau == 0.05, "left out: only link='lrml' has one")
    need_one_of("link", link, ("lrml", "cell"))
    rewards = beta * scores.log_ratios(responses)
    z = gap(rewards)
    losses = links.log_ratio_modulated(z, tau) if link == "lrml" else links.exponential_logistic(z)
    return Losses(losses, rewards)


def f_dpo(responses: Responses, *, beta: float = 0.1, divergence: str = "forward_kl", alpha: float = 0.5) -> Losses:
    """DPO under another divergence: -log σ(beta · (f'(u of chosen) - f'(u of rejected))), u = exp(log-ratio).

    f'(u) but for a constant, q = log u: q (`reverse_kl`, which is `dpo`), -exp(-q) (`forward_kl`), log σ(q) (`js`),
    -exp(-alpha q) / alpha (`alpha`). An exponential that would leave the dtype's range is held at its end.

    Args:
        responses: Log-probs in nats, K = 2.
        beta: Strength of the divergence constraint, > 0.
        divergence: `reverse_kl`, `forward_kl`, `js` or `alpha`.
        alpha: Of the divergence `alpha`, in (0, 1]: the paper's, between reverse KL (0) and forward KL (1). TRL 1.x
            counts the other way, its alpha is 1 - this one.

    Returns:
        Losses in nats, ln 2 when the policy is the reference.

    Raises:
        ValueError: If a hyper-parameter is out of range (at construction, never under jit).

    References:
        Wang et al. 2023, https://arxiv.org/abs/2309.16240
    """
    need_positive(beta=beta)
    need_one_of("divergence", divergence, _DERIVATIVES)
    need("alpha", alpha, 0 < alpha <= 1, "in (0, 1]")
    need("alpha", alpha, divergence == "alpha" or alpha == 0.5, "left out: only divergence='alpha' has one")
    rewards = beta * _DERIVATIVES[divergence](scores.log_ratios(responses), alpha)
    return Losses(links.logistic(gap(rewards)), rewards)


_DERIVATIVES: dict[str, Callable[[Float[Array, "examples 2"], float], Float[Array, "examples 2"]]] = {
    "reverse_kl": lambda q, alpha: q,
    "forward_kl": lambda q, alpha: scores.power(q, 1.0),
    "js": lambda q, alpha: jax.nn.log_sigmoid(q),
    "alpha": scores.power,
}
