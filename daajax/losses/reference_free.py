"""Objectives without a reference: of the policy's log-probs alone."""

import jax.numpy as jnp

from daajax.losses import links, scores
from daajax.losses.likelihood import with_nll
from daajax.losses.objective import Losses, need, need_flip_share, need_not_negative, need_one_of, need_positive
from daajax.losses.scores import Responses, gap


def simpo(
    responses: Responses,
    *,
    beta: float = 2.0,
    gamma: float = 0.5,
    label_smoothing: float = 0.0,
    link: str = "logistic",
) -> Losses:
    """Simple preference optimization: -log σ(beta · (mean log-prob of chosen - of rejected) - gamma); no reference.

    Args:
        responses: Log-probs in nats, K = 2.
        beta: Scale of the reward, > 0, per nat and token.
        gamma: Target margin of the rewards, >= 0. The paper tunes gamma / beta: 0.25 here, 0.3 to 0.8 in its table.
        label_smoothing: Share of flipped labels, in [0, 0.5); of the link `logistic`.
        link: `logistic`, or the code's other, `hinge`: max(0, 1 - the same logit).

    Returns:
        Losses, in nats if the link is logistic.

    Raises:
        ValueError: If a hyper-parameter is out of range (at construction, never under jit).

    References:
        Eq. 6 of Meng et al. 2024, https://arxiv.org/abs/2405.14734
    """
    need_positive(beta=beta)
    need_not_negative(gamma=gamma)
    need_flip_share(label_smoothing)
    need_one_of("link", link, ("logistic", "hinge"))
    need("label_smoothing", label_smoothing, link == "logistic" or label_smoothing == 0, "0 with link='hinge'")
    rewards = beta * scores.mean_logps(responses)
    z = gap(rewards) - gamma
    return Losses(links.logistic(z, label_smoothing) if link == "logistic" else links.hinge(z), rewards)


def alphapo(responses: Responses, *, beta: float = 2.5, gamma: float = 0.1, alpha: float = 0.25) -> Losses:
    """AlphaPO: -log σ(beta · (R of chosen - R of rejected) - gamma), R = (1 - exp(-alpha · mean log-prob)) / alpha.

    SimPO with a bent reward; alpha = 0 is `simpo`. An exponential that would leave the dtype's range stays at its end.

    Args:
        responses: Log-probs in nats, K = 2.
        beta: Scale of the reward, > 0.
        gamma: Target margin of the rewards, >= 0, as in TRL; the paper may mean its ratio to beta.
        alpha: Shape of the reward, any sign.

    Returns:
        Losses in nats.

    Raises:
        ValueError: If a hyper-parameter is out of range (at construction, never under jit).

    References:
        Gupta et al. 2025, https://arxiv.org/abs/2501.03884; TRL's CPOTrainer with `loss_type="alphapo"`
    """
    need_positive(beta=beta)
    need_not_negative(gamma=gamma)
    rewards = beta * scores.power(scores.mean_logps(responses), alpha)
    return Losses(links.logistic(gap(rewards) - gamma), rewards)


def cpo(
    responses: Responses,
    *,
    beta: float = 0.1,
    nll_weight: float = 1.0,
    nll_reduction: str = "batch",
    link: str = "logistic",
) -> Losses:
    """Contrastive preference optimization: -log σ(beta · (log-prob of chosen - of rejected)) - nll_weight · log-prob.

    The likelihood is that of the chosen response. The paper sums it over its tokens, its code divides by all chosen
    tokens of the update.

    Args:
        responses: Log-probs in nats, K = 2.
        beta: Scale of the reward, > 0, per nat.
        nll_weight: Weight of the likelihood, >= 0.
        nll_reduction: What the chosen log-prob is divided by: nothing (`sum`), all chosen tokens of the update
            (`batch`), or its own tokens (`seq`).
        link: `logistic`, or the code's other, `ipo`: (gap of log-probs per token - 1 / (2 beta))².

    Returns:
        Losses, in nats if the link is logistic.

    Raises:
        ValueError: If a hyper-parameter is out of range (at construction, never under jit).

    References:
        Xu et al. 2024, https://arxiv.org/abs/2401.08417; fe1ixxu/CPO_SIMPO
    """
    need_positive(beta=beta)
    need_one_of("link", link, ("logistic", "ipo"))
    if link == "ipo":
        logps = scores.mean_logps(responses)
        losses = Losses(links.square(gap(logps), 1 / (2 * beta)), beta * logps)
    else:
        rewards = beta * responses.logps
        losses = Losses(links.logistic(gap(rewards)), rewards)
    return with_nll(losses, responses, nll_weight, nll_reduction)


def cpo_simpo(
    responses: Responses,
    *,
    beta: float = 10.0,
    gamma: float = 5.4,
    nll_weight: float = 0.05,
    nll_reduction: str = "batch",
) -> Losses:
    """CPO-SimPO: `simpo` plus the likelihood of the chosen response, as `cpo` adds it.

    Args:
        responses: Log-probs in nats, K = 2.
        beta: Scale of the reward, > 0, per nat and token.
        gamma: Target margin of the rewards, >= 0.
        nll_weight: Weight of the likelihood, >= 0.
        nll_reduction: As in `cpo`; `batch` in its code.

    Returns:
        Losses in nats.

    Raises:
        ValueError: If a hyper-parameter is out of range (at construction, never under jit).

    References:
        fe1ixxu/CPO_SIMPO, whose Llama 3 8B Instruct has these defaults
    """
    return with_nll(simpo(responses, beta=beta, gamma=gamma), responses, nll_weight, nll_reduction)


def orpo(
    responses: Responses,
    *,
    odds_ratio_weight: float = 0.1,
    beta: float = 1.0,
    nll_weight: float = 1.0,
    nll_reduction: str = "seq",
    floor: float = 0.0,
) -> Losses:
    """Odds-ratio preference optimization: -nll_weight · log-prob - odds_ratio_weight · log σ(beta · gap of log-odds).

    The log-odds of a response are log(p / (1 - p)) of its p = exp(mean log-prob). The likelihood is that of the chosen
    response's tokens; the official code and TRL take the prompt's in with them.

    Args:
        responses: Log-probs in nats, K = 2.
        odds_ratio_weight: lambda of the paper, >= 0; TRL calls it beta.
        beta: Scale of the log-odds, > 0; 1 in the paper.
        nll_weight: Weight of the likelihood, >= 0.
        nll_reduction: What the chosen log-prob is divided by: its tokens (`seq`), all chosen tokens of the update
            (`batch`), or nothing (`sum`).
        floor: 1 - p counts as at least this, in [0, 1), and as no less than the dtype resolves. turbo-alignment: 1e-7.

    Returns:
        Losses in nats.

    Raises:
        ValueError: If a hyper-parameter is out of range (at construction, never under jit).

    References:
        Hong et al. 2024, https://arxiv.org/abs/2403.07691; LLaMA-Factory's likelihood
    """
    need_positive(beta=beta)
    need_not_negative(odds_ratio_weight=odds_ratio_weight)
    need("floor", floor, 0 <= floor < 1, "in [0, 1)")
    rewards = beta * scores.log_odds(scores.mean_logps(responses), floor)
    losses = Losses(odds_ratio_weight * links.logistic(gap(rewards)), rewards)
    return with_nll(losses, responses, nll_weight, nll_reduction)


def asft(
    responses: Responses,
    *,
    beta: float = 1.0,
    odds_weight: float = 1.0,
    nll_weight: float = 1.0,
    floor: float = 1e-7,
) -> Losses:
    """Aligned SFT: -nll_weight · m of chosen - odds_weight · [log σ(beta o of chosen) + log σ(-beta o of rejected)].

    m is a mean log-prob, o are the log-odds of `orpo`; each response is judged for itself.

    Args:
        responses: Log-probs in nats, K = 2.
        beta: Scale of the log-odds, > 0.
        odds_weight: Weight of the odds, >= 0.
        nll_weight: Weight of the likelihood, >= 0.
        floor: 1 - p counts as at least this, in [0, 1), and as no less than the dtype resolves.

    Returns:
        Losses in nats.

    Raises:
        ValueError: If a hyper-parameter is out of range (at construction, never under jit).

    References:
        Wang et al. 2024, https://arxiv.org/abs/2409.10571; turbo-alignment, whose authors compare it with ORPO in
        https://arxiv.org/abs/2502.01237
    """
    need_positive(beta=beta)
    need_not_negative(odds_weight=odds_weight)
    need("floor", floor, 0 <= floor < 1, "in [0, 1)")
    rewards = beta * scores.log_odds(scores.mean_logps(responses), floor)
    odds = links.logistic(rewards[:, 0]) + links.logistic(-rewards[:, 1])
    return with_nll(Losses(odds_weight * odds, rewards), responses, nll_weight, "seq")


def slic_hf(
    responses: Responses,
    *,
    delta: float = 1.0,
    beta: float = 1.0,
    sft_weight: float = 0.1,
    sft_target: str = "chosen",
) -> Losses:
    """SLiC-HF: max(0, delta - beta · (log-prob of chosen - of rejected)) - sft_weight · log-prob of the SFT target.

    Log-probs are summed over tokens, and there is no reference. TRL's `hinge` is not this but `hinge`.

    Args:
        responses: Log-probs in nats, K = 2, or 3 with a separate target.
        delta: Margin, > 0.
        beta: Scale of the log-probs, > 0; 1 in the paper.
        sft_weight: lambda of the paper, >= 0.
        sft_target: `chosen`, as HALOs has it, or `separate`: response 2, as in the paper.

    Returns:
        Losses in nats.

    Raises:
        ValueError: If a hyper-parameter is out of range (at construction, never under jit).

    References:
        Eq. 4 of Zhao et al. 2023, https://arxiv.org/abs/2305.10425
    """
    need_positive(delta=delta, beta=beta)
    need_not_negative(sft_weight=sft_weight)
    need_one_of("sft_target", sft_target, ("chosen", "separate"))
    rewards = beta * responses.logps
    target = responses.logps[:, 0 if sft_target == "chosen" else 2]
    return Losses(links.hinge(gap(rewards), delta) - sft_weight * target, rewards)


def unlikelihood(responses: Responses, *, alpha: float = 1.0) -> Losses:
    """Unlikelihood: -log-prob of chosen + alpha · log-prob of rejected; no reference.

    A baseline of the DPO paper; it has no lower bound and degenerates unless alpha is small.

    Args:
        responses: Log-probs in nats, K = 2.
        alpha: Weight of the rejected response, in [0, 1].

    Returns:
        Losses in nats.

    Raises:
        ValueError: If alpha is out of range (at construction, never under jit).

    References:
        Section 6 of Rafailov et al. 2023, https://arxiv.org/abs/2305.18290
    """
    need("alpha", alpha, 0 <= alpha <= 1, "in [0, 1]")
    return Losses(alpha * responses.logps[:, 1] - responses.logps[:, 0], responses.logps)


def sft(responses: Responses, *, reduction: str = "batch") -> Losses:
    """Supervised fine-tuning: the negative log-likelihood of response 0, per scored token of the update.

    Args:
        responses: Log-probs in nats, any K; only response 0 counts.
        reduction: What a log-prob is divided by: all such tokens of the update (`batch`), its own (`seq`), or nothing
            (`sum`).

    Returns:
        Losses in nats; with `batch` they are token losses, summed over each response, that the update divides by its
        scored tokens, not by examples.

    Raises:
        ValueError: If the reduction is none of these (at construction, never under jit).

    References:
        The first step of Ouyang et al. 2022, https://arxiv.org/abs/2203.02155
    """
    need_one_of("reduction", reduction, ("batch", "seq", "sum"))
    return with_nll(Losses(jnp.zeros_like(responses.logps[:, 0]), None), responses, 1.0, reduction)
