"""Objectives of pairs against a reference that read more of the tokens than their log-probs' sum."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from daajax.losses import links, scores
from daajax.losses.objective import Losses, need, need_flip_share, need_one_of, need_positive
from daajax.losses.scores import Responses, gap


def ld_dpo(responses: Responses, *, beta: float = 0.1, alpha: float = 0.5, label_smoothing: float = 0.0) -> Losses:
    """Length-desensitized DPO: `dpo` with the tokens behind the end of the shorter response counted alpha times.

    Policy and reference alike.

    Args:
        responses: Log-probs in nats, K = 2; the sum `tail_log_ratios`.
        beta: Strength of the KL constraint, > 0, per nat.
        alpha: Weight of the tail, in [0, 1]; 1 is `dpo`, 0 cuts both responses at the length of the shorter.
        label_smoothing: Share of flipped labels, in [0, 0.5).

    Returns:
        Losses in nats, ln 2 when the policy is the reference.

    Raises:
        ValueError: If a hyper-parameter is out of range (at construction, never under jit).

    References:
        Liu et al. 2024, https://arxiv.org/abs/2409.06411; TRL's `ld_alpha`
    """
    need_positive(beta=beta)
    need("alpha", alpha, 0 <= alpha <= 1, "in [0, 1]")
    need_flip_share(label_smoothing)
    rewards = beta * scores.log_ratios_with_tail(responses, alpha)
    return Losses(links.logistic(gap(rewards), label_smoothing), rewards)


def sampo(responses: Responses, *, beta: float = 0.1, subset: str = "shared") -> Losses:
    """Down-sampled DPO: `dpo` on as many tokens of both responses, drawn at random, as the shorter one has.

    Args:
        responses: Log-probs in nats, K = 2; the sum `kept_log_ratios` or `independently_kept_log_ratios`.
        beta: Strength of the KL constraint, > 0, per nat.
        subset: `shared`: policy and reference keep the same tokens, as in the paper's formula; `independent`: each its
            own, as in its code.

    Returns:
        Losses in nats; ln 2 when the policy is the reference and the subset is shared.

    Raises:
        ValueError: If a hyper-parameter is out of range (at construction, never under jit).

    References:
        Lu et al. 2024, https://arxiv.org/abs/2406.10957; LuJunru/SamPO
    """
    need_positive(beta=beta)
    need_one_of("subset", subset, KEPT)
    rewards = beta * responses.sums[KEPT[subset]]
    return Losses(links.logistic(gap(rewards)), rewards)


KEPT = {"shared": "kept_log_ratios", "independent": "independently_kept_log_ratios"}  # subset to sum


def wpo(
    responses: Responses,
    *,
    beta: float = 0.01,
    clip_max: float | None = 1.0,
    label_smoothing: float = 0.0,
) -> Losses:
    """Weighted preference optimization: w · -log σ(beta · gap of log-ratios), w = exp(a of chosen + a of rejected).

    a is the mean over tokens of log π(token) - log Σ_v π(v)²: how likely the policy is to write the response, against
    what it is likely to write. w carries no gradient.

    Args:
        responses: Log-probs in nats, K = 2; the sum `sum_squares`.
        beta: Strength of the KL constraint, > 0, per nat.
        clip_max: Largest w, > 0; 1 in the official code. None: not clipped, as in TRL.
        label_smoothing: Share of flipped labels, in [0, 0.5).

    Returns:
        Losses in nats, w ln 2 when the policy is the reference. The metric `weights` is w.

    Raises:
        ValueError: If a hyper-parameter is out of range (at construction, never under jit).

    References:
        Zhou et al. 2024, https://arxiv.org/abs/2406.11827; wzhouad/WPO
    """
    need_positive(beta=beta)
    need("clip_max", clip_max, clip_max is None or clip_max > 0, "> 0, or None")
    need_flip_share(label_smoothing)
    rewards = beta * scores.log_ratios(responses)
    adherence = scores.mean_over_tokens(responses.logps - responses.sums["sum_squares"], responses).sum(axis=1)
    weights = jax.lax.stop_gradient(scores.exponential(adherence))
    if clip_max is not None:
        weights = jnp.minimum(weights, clip_max)
    return Losses(weights * links.logistic(gap(rewards), label_smoothing), rewards, {"weights": weights})


def tdpo1(responses: Responses, *, beta: float = 0.1) -> Losses:
    """Token-level DPO, first: -log σ(beta · (gap of log-ratios - (D of rejected - D of chosen))).

    D is the sum over a response's tokens of KL(reference ‖ policy) of the next one, with its gradient.

    Args:
        responses: Log-probs in nats, K = 2; the sum `kl`.
        beta: Strength of the KL constraint, > 0, per nat.

    Returns:
        Losses in nats, ln 2 when the policy is the reference. The metrics `kl/chosen` and `kl/rejected` are D, nats.

    Raises:
        ValueError: If beta is not positive (at construction, never under jit).

    References:
        Zeng et al. 2024, https://arxiv.org/abs/2404.11999; Vance0124/Token-level-Direct-Preference-Optimization
    """
    need_positive(beta=beta)
    return _tdpo(responses, beta, gap(responses.sums["kl"]))


def tdpo2(responses: Responses, *, beta: float = 0.1, alpha: float = 0.5) -> Losses:
    """Token-level DPO, second: -log σ(beta · (gap of log-ratios - alpha · (D of rejected - sg(D of chosen)))).

    D is that of `tdpo1`; that of the chosen response carries no gradient (sg).

    Args:
        responses: Log-probs in nats, K = 2; the sum `kl`.
        beta: Strength of the KL constraint, > 0, per nat.
        alpha: Weight of the difference of D, >= 0.

    Returns:
        Losses in nats, ln 2 when the policy is the reference. The metrics `kl/chosen` and `kl/rejected` are D, nats.

    Raises:
        ValueError: If a hyper-parameter is out of range (at construction, never under jit).

    References:
        Zeng et al. 2024, https://arxiv.org/abs/2404.11999; Vance0124/Token-level-Direct-Preference-Optimization
    """
    need_positive(beta=beta)
    need("alpha", alpha, alpha >= 0, ">= 0")
    kl = responses.sums["kl"]
    return _tdpo(responses, beta, alpha * (jax.lax.stop_gradient(kl[:, 0]) - kl[:, 1]))


def _tdpo(responses: Responses, beta: float, kl_gap: Float[Array, " examples"]) -> Losses:
    log_ratios, kl = scores.log_ratios(responses), responses.sums["kl"]
    metrics = {"kl/chosen": kl[:, 0], "kl/rejected": kl[:, 1]}
    return Losses(links.logistic(beta * (gap(log_ratios) + kl_gap)), beta * log_ratios, metrics)


def mallows_dpo(responses: Responses, *, beta: float = 0.1, c: float = 1.0) -> Losses:
    """Mallows-DPO: -log σ(beta · φ · gap of log-ratios), φ = -c · log of the reference's entropy.

    The entropy is a share of the largest there is, a mean over each response's tokens and over the two: where the
    reference is sure of itself the pair counts for more.

    Args:
        responses: Log-probs in nats, K = 2; the sum `reference_entropies`.
        beta: Strength of the KL constraint, > 0, per nat.
        c: Scale of φ, > 0.

    Returns:
        Losses in nats, ln 2 when the policy is the reference. The metric `dispersion` is φ.

    Raises:
        ValueError: If a hyper-parameter is out of range (at construction, never under jit).

    References:
        Chen et al. 2024, https://arxiv.org/abs/2405.14953; haoxian-chen/MallowsPO
    """
    need_positive(beta=beta, c=c)
    phi = c * scores.dispersion(responses)
    rewards = beta * phi[:, None] * scores.log_ratios(responses)
    return Losses(links.logistic(gap(rewards)), rewards, {"dispersion": phi})


def mallows_ipo(responses: Responses, *, beta: float = 0.1, c: float = 1.0, form: str = "paper") -> Losses:
    """Mallows-IPO: (φ · gap of log-ratios - 1 / (2 beta))², φ as in `mallows_dpo`.

    Args:
        responses: Log-probs in nats, K = 2; the sum `reference_entropies`.
        beta: > 0, per nat.
        c: Scale of φ, > 0.
        form: `paper`, the formula above, or `rainbow`, RainbowPO's copy: beta² times that.

    Returns:
        Losses in nats squared; 1 / (4 beta²) (`paper`) or ¼ (`rainbow`) when the policy is the reference. The metric
        `dispersion` is φ.

    Raises:
        ValueError: If a hyper-parameter is out of range (at construction, never under jit).

    References:
        Chen et al. 2024, https://arxiv.org/abs/2405.14953; haoxian-chen/MallowsPO
    """
    need_positive(beta=beta, c=c)
    need_one_of("form", form, ("paper", "rainbow"))
    phi = c * scores.dispersion(responses)
    scaled = phi[:, None] * scores.log_ratios(responses)
    losses = links.square(gap(scaled), 1 / (2 * beta)) * (1 if form == "paper" else beta**2)
    return Losses(losses, beta * scaled, {"dispersion": phi})
