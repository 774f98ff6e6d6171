"""Objectives of single responses that are wanted or not, and the same of pairs; all against a reference."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Real

from daajax.losses import links, scores, statistics
from daajax.losses.objective import Losses, need, need_not_negative, need_one_of, need_positive
from daajax.losses.scores import Responses


def kto(
    responses: Responses,
    *,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Losses:
    """Kahneman-Tversky optimization: λ_D · (1 - σ(beta (q - z))) if wanted, λ_U · (1 - σ(beta (z - q))) if not.

    q is the log-ratio of response 0 and z = max(0, mean over the update of that of response 1, which belongs to another
    example); z carries no gradient.

    Args:
        responses: Log-probs in nats, K = 2, the second mismatched; labels.
        beta: Strength of risk aversion, > 0, per nat.
        desirable_weight: λ_D, >= 0. With n_D and n_U examples of either label, the paper wants λ_D n_D / (λ_U n_U) in
            [1, 4/3].
        undesirable_weight: λ_U, >= 0.

    Returns:
        Losses without a unit; half of the weight when the policy is the reference. The metric `kl` is z, nats.

    Raises:
        ValueError: If a hyper-parameter is out of range (at construction, never under jit).

    References:
        Ethayarajh et al. 2024, https://arxiv.org/abs/2402.01306; ContextualAI/HALOs and TRL
    """
    need_positive(beta=beta)
    log_ratios = scores.log_ratios(responses)
    mismatched = statistics.mean(log_ratios[:, 1], responses.are_real())
    kl = jax.lax.stop_gradient(jax.nn.relu(mismatched))
    wanted, value = scores.wanted(responses), beta * (log_ratios[:, 0] - kl)
    losses = _weighted(wanted, value, desirable_weight, undesirable_weight)
    return Losses(losses, beta * log_ratios, {"kl": statistics.spread(kl, losses)})


def apo_zero_unpaired(
    responses: Responses,
    *,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Losses:
    """APO-zero of single responses: λ_D · (1 - σ(beta q)) if wanted, λ_U · σ(beta q) if not; q is the log-ratio.

    `kto` without its anchor.

    Args:
        responses: Log-probs in nats, any K; only response 0 counts; labels.
        beta: Strength of the KL constraint, > 0, per nat.
        desirable_weight: λ_D, >= 0.
        undesirable_weight: λ_U, >= 0.

    Returns:
        Losses without a unit; half of the weight when the policy is the reference.

    Raises:
        ValueError: If a hyper-parameter is out of range (at construction, never under jit).

    References:
        D'Oosterlinck et al. 2024, https://arxiv.org/abs/2408.06266; TRL's KTOTrainer
    """
    need_positive(beta=beta)
    rewards = beta * scores.log_ratios(responses)
    losses = _weighted(scores.wanted(responses), rewards[:, 0], desirable_weight, undesirable_weight)
    return Losses(losses, rewards)


def kto_pair(
    responses: Responses,
    *,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
    anchor: str = "other",
) -> Losses:
    """KTO of pairs: of λ_D · (1 - σ(beta (q of chosen - z))) and λ_U · (1 - σ(beta (z - q of rejected))).

    Args:
        responses: Log-probs in nats, K = 2.
        beta: Strength of risk aversion, > 0, per nat.
        desirable_weight: λ_D, >= 0.
        undesirable_weight: λ_U, >= 0.
        anchor: `other`, as in the first versions of TRL and in turbo-alignment: z of a side is max(0, mean q of the
            other side) over the update, with its gradient, and a pair's loss is the mean of the two. `rejected`, as in
            the RLHF book: z is max(0, mean q of rejected) for both, without gradient, and a pair's loss is the sum.

    Returns:
        Losses without a unit; (λ_D + λ_U) / 4 (`other`) or / 2 (`rejected`) when the policy is the reference. The
        metric `kl` is z of the chosen side, nats.

    Raises:
        ValueError: If a hyper-parameter is out of range (at construction, never under jit).

    References:
        Ethayarajh et al. 2024, https://arxiv.org/abs/2402.01306; natolambert/rlhf-book
    """
    need_positive(beta=beta)
    need_one_of("anchor", anchor, ("other", "rejected"))
    log_ratios, real = scores.log_ratios(responses), responses.are_real()
    chosen, rejected = log_ratios[:, 0], log_ratios[:, 1]
    of_chosen = jax.nn.relu(statistics.mean(rejected, real))
    of_rejected = jax.nn.relu(statistics.mean(chosen, real))
    if anchor == "rejected":
        of_chosen = of_rejected = jax.lax.stop_gradient(of_chosen)
    up = _weighted(jnp.ones_like(real), beta * (chosen - of_chosen), desirable_weight, undesirable_weight)
    down = _weighted(jnp.zeros_like(real), beta * (rejected - of_rejected), desirable_weight, undesirable_weight)
    losses = (up + down) / (2 if anchor == "other" else 1)
    return Losses(losses, beta * log_ratios, {"kl": statistics.spread(of_chosen, losses)})


def _weighted(
    wanted: Bool[Array, " examples"],
    value: Float[Array, " examples"],
    desirable_weight: float,
    undesirable_weight: float,
) -> Float[Array, " examples"]:
    """λ_D · σ(-value) where it is wanted, λ_U · σ(value) where it is not."""
    need_not_negative(desirable_weight=desirable_weight, undesirable_weight=undesirable_weight)
    sign = jnp.where(wanted, 1, -1)
    return jnp.where(wanted, desirable_weight, undesirable_weight) * jax.nn.sigmoid(-sign * value)


def bco(
    responses: Responses,
    *,
    beta: float = 0.01,
    delta: str = "running",
    min_density_ratio: float = 0.5,
    max_density_ratio: float = 10.0,
) -> Losses:
    """Binary classifier optimization: -log σ(r - δ) if wanted, -w · log σ(δ - r) if not, r = beta · log-ratio.

    δ carries no gradient. w is 1, unless the data have the probability p of the prompt in which a response is wanted:
    then it is p / (1 - p), clipped.

    Args:
        responses: Log-probs in nats, any K; only response 0 counts; labels; prompt_probabilities, if there are any.
        beta: Strength of the KL constraint, > 0, per nat.
        delta: `running`: the mean of all rewards so far, this update's with them, as in TRL; `paper`: the mean of the
            mean rewards of this update's two classes; of one of them if there is no other.
        min_density_ratio: Least w, >= 0.
        max_density_ratio: Largest w, at least the least.

    Returns:
        Losses in nats; ln 2 (times w) when the policy is the reference and has been. The metric `delta` is δ.

    Raises:
        ValueError: If a hyper-parameter is out of range (at construction, never under jit).

    References:
        Jung et al. 2024, https://arxiv.org/abs/2404.04656; TRL 1.9's BCOTrainer
    """
    need_positive(beta=beta)
    need_one_of("delta", delta, ("running", "paper"))
    need_not_negative(min_density_ratio=min_density_ratio)
    need("max_density_ratio", max_density_ratio, max_density_ratio >= min_density_ratio, ">= min_density_ratio")
    rewards, real, wanted = beta * scores.log_ratios(responses), responses.are_real(), scores.wanted(responses)
    seen = jax.lax.stop_gradient(rewards[:, 0])
    if delta == "running":
        state = _running(responses, statistics.mean(seen, real), real.sum())
        shift = state["mean"]
    else:
        state, classes = {}, (real & wanted, real & ~wanted)
        shift = sum(statistics.mean(seen, those) for those in classes) / jnp.maximum(
            sum(those.any() for those in classes), 1
        )
    sign, weight = jnp.where(wanted, 1, -1), 1.0
    if responses.prompt_probabilities is not None:
        probability = responses.prompt_probabilities
        ratio = jnp.clip(probability / (1 - probability + 1e-8), min_density_ratio, max_density_ratio)
        weight = jnp.where(wanted, 1, ratio)
    losses = weight * links.logistic(sign * (rewards[:, 0] - shift))
    return Losses(losses, rewards, {"delta": statistics.spread(shift, losses)}, state=state)


def bco_pair(responses: Responses, *, beta: float = 0.1, delta: str = "running") -> Losses:
    """BCO of pairs: -log σ(r of chosen - δ) - log σ(δ - r of rejected), r = beta · log-ratio.

    Args:
        responses: Log-probs in nats, K = 2.
        beta: Strength of the KL constraint, > 0, per nat.
        delta: `running`: the mean of the mean rewards of all updates so far, this one's with them, without gradient, as
            in LLaMA-Factory and TRL before 1.0; `zero`: 0, as in TRL 1.x.

    Returns:
        Losses in nats; 2 ln 2 when the policy is the reference and has been. The metric `delta` is δ.

    Raises:
        ValueError: If a hyper-parameter is out of range (at construction, never under jit).

    References:
        Jung et al. 2024, https://arxiv.org/abs/2404.04656
    """
    need_positive(beta=beta)
    need_one_of("delta", delta, ("running", "zero"))
    rewards, state, shift = beta * scores.log_ratios(responses), {}, 0.0
    if delta == "running":
        seen = jax.lax.stop_gradient(rewards.mean(axis=1))
        state = _running(responses, statistics.mean(seen, responses.are_real()), 1)
        shift = state["mean"]
    losses = links.logistic(rewards[:, 0] - shift) + links.logistic(shift - rewards[:, 1])
    return Losses(losses, rewards, {"delta": jnp.full_like(losses, shift)}, state=state)


def _running(responses: Responses, mean: Float[Array, ""], count: Real[Array, ""] | int) -> dict[str, Float[Array, ""]]:
    """The state after a further `count` values of this mean."""
    before = responses.state
    total = before["count"] + count
    return {"count": total, "mean": before["mean"] + (mean - before["mean"]) * count / jnp.maximum(total, 1)}
