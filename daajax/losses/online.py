"""Objectives of responses that the policy itself has sampled: their losses of given log-probs."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from daajax.losses import pairwise, scores
from daajax.losses.objective import Losses, need_not_negative, need_one_of, need_positive
from daajax.losses.scores import Responses

LINKS = {"logistic": pairwise.dpo, "ipo": pairwise.ipo}


def online_dpo(
    responses: Responses,
    *,
    beta: float = 0.1,
    link: str = "logistic",
    missing_eos_penalty: float | None = None,
) -> Losses:
    """Online DPO (OAIF): `dpo` or `ipo` of two responses of the policy, the one with the higher score chosen.

    Of equal scores the first response is chosen. No gradient flows through the sampling.

    Args:
        responses: Log-probs in nats, K = 2; scores; which are finished, if there is a penalty.
        beta: Strength of the KL constraint, > 0, per nat.
        link: `logistic` or `ipo`.
        missing_eos_penalty: Taken from the score of a response that did not end by itself, >= 0. None: 0.

    Returns:
        Losses; ln 2 nats, or 1 / (4 beta²), when the policy is the reference. Rewards are the chosen response's first.

    Raises:
        ValueError: If a hyper-parameter is out of range (at construction, never under jit).

    References:
        Guo et al. 2024, https://arxiv.org/abs/2402.04792; TRL's OnlineDPOTrainer
    """
    need_one_of("link", link, LINKS)
    given = scores.data_scores(responses)
    if missing_eos_penalty is not None:
        need_not_negative(missing_eos_penalty=missing_eos_penalty)
        given = given - missing_eos_penalty * ~scores.finished(responses)
    return LINKS[link](_chosen_first(responses, given), beta=beta)


def d2po(responses: Responses, *, beta: float = 0.05, link: str = "logistic") -> Losses:
    """Discriminator-guided DPO: `dpo` or `ipo` of two responses of the policy that a discriminator ranked.

    Its code adds up a micro-batch where we take the mean.

    Args:
        responses: Log-probs in nats, K = 2.
        beta: Strength of the KL constraint, > 0, per nat.
        link: `logistic` or `ipo`.

    Returns:
        Losses; ln 2 nats, or 1 / (4 beta²), when the policy is the reference.

    Raises:
        ValueError: If a hyper-parameter is out of range (at construction, never under jit).

    References:
        Singhal et al. 2024, https://arxiv.org/abs/2405.01511; PrasannS/d2po
    """
    need_one_of("link", link, LINKS)
    return LINKS[link](responses, beta=beta)


def xpo(responses: Responses, *, beta: float = 0.1, alpha: float = 1e-5, link: str = "logistic") -> Losses:
    """Exploratory preference optimization: `dpo` or `ipo`, plus alpha · log-prob of the reference's response.

    Response 0 is the policy's, response 1 the reference's; the one with the higher score is chosen, the first of equal
    ones. The bonus pushes the policy away from what the reference would say, whether that won or not.

    Args:
        responses: Log-probs in nats, K = 2; scores.
        beta: Strength of the KL constraint, > 0, per nat.
        alpha: Weight of the bonus, >= 0; 5e-6 in oat.
        link: `logistic` or `ipo`.

    Returns:
        Losses; ln 2 nats, or 1 / (4 beta²), plus the bonus when the policy is the reference. Rewards are the chosen
        response's first.

    Raises:
        ValueError: If a hyper-parameter is out of range (at construction, never under jit).

    References:
        Xie et al. 2024, https://arxiv.org/abs/2405.21046; TRL 1.9's XPOTrainer
    """
    need_one_of("link", link, LINKS)
    need_not_negative(alpha=alpha)
    result = LINKS[link](_chosen_first(responses, scores.data_scores(responses)), beta=beta)
    return result._replace(losses=result.losses + alpha * responses.logps[:, 1])


def nash_md(responses: Responses, *, beta: float = 0.1) -> Losses:
    """Nash-MD: a policy gradient, beta · Σ_t sg(log-ratio_t) · log-prob_t - (P - ½) · log-prob.

    P is the probability that the policy's response beats one of the mixture of policy and reference. Only the gradient
    means something; every token is weighted by its own log-ratio.

    Args:
        responses: Log-probs in nats, any K; only response 0 counts; scores, which are P; the sum `kl_surrogate`.
        beta: Strength of the KL constraint, > 0, per nat.

    Returns:
        Losses without meaning of their own.

    Raises:
        ValueError: If beta is not positive (at construction, never under jit).

    References:
        Munos et al. 2023, https://arxiv.org/abs/2312.00886; TRL 1.9's NashMDTrainer
    """
    need_positive(beta=beta)
    excess = scores.data_scores(responses)[:, 0] - 0.5
    return Losses(beta * responses.sums["kl_surrogate"][:, 0] - excess * responses.logps[:, 0], None)


def _chosen_first(responses: Responses, given: Float[Array, "examples 2"]) -> Responses:
    """The same with the higher score first in log-probs and log-ratios."""
    first = given[:, :1] >= given[:, 1:]

    def ordered(x: Float[Array, "examples 2"]) -> Float[Array, "examples 2"]:
        return jnp.where(first, x, x[:, ::-1])

    log_ratios = ordered(scores.log_ratios(responses))
    return responses._replace(logps=ordered(responses.logps), log_ratios=log_ratios)
