"""Objectives: from the log-probs of responses to a loss per example.

To add one: a function of `Responses` with keyword-only hyper-parameters, under its paper's name, that returns
`Losses`; and a line in `OBJECTIVES`. Nothing here reads a config, a mask or a batch; weights, counts and means are
`daajax.step`'s.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from daajax.losses import links, scores
from daajax.losses.scores import Responses, gap


class Losses(NamedTuple):
    """What an objective makes of n examples.

    Attributes:
        losses: Per example, before weights; the update divides their sum by its examples.
        rewards: Implicit rewards of the responses; None where the objective has none.
        metrics: Further numbers per example that are worth a log line.
        token_losses: A part that is summed over the tokens of response 0; the update divides it by all such tokens.
    """

    losses: Float[Array, " examples"]
    rewards: Float[Array, "examples responses"] | None
    metrics: dict[str, Float[Array, " examples"]]
    token_losses: Float[Array, " examples"] | None = None


@dataclasses.dataclass(frozen=True)
class Objective:
    """One line of `OBJECTIVES`.

    Attributes:
        function: From `Responses` to `Losses`.
        responses: K it is made for; 1 takes response 0 of any example, None takes any K.
        reference: Whether it needs `log_ratios`.
        coupled: Whether an example's loss depends on the others of the update; such an objective sees the whole update
            at once.
    """

    function: Callable[..., Losses]
    responses: int | None = 2
    reference: bool = True
    coupled: bool = False


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
    _need("beta", beta, beta > 0, "> 0")
    _need("label_smoothing", label_smoothing, 0 <= label_smoothing < 0.5, "in [0, 0.5)")
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


def ipo(responses: Responses, *, beta: float = 0.1) -> Losses:
    """Identity preference optimization: regresses the log-ratio gap onto 1 / (2 beta).

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
    _need("beta", beta, beta > 0, "> 0")
    log_ratios = scores.log_ratios(responses)
    return Losses(links.square(gap(log_ratios), 1 / (2 * beta)), beta * log_ratios, {})


def ipo_mean(responses: Responses, *, beta: float = 0.1) -> Losses:
    """IPO on log-ratios per token, as TRL 1.x and HALOs compute it; `ipo` is the paper's.

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
    _need("beta", beta, beta > 0, "> 0")
    ratios = scores.mean_log_ratios(responses)
    return Losses(links.square(gap(ratios), 1 / (2 * beta)), beta * ratios, {})


def simpo(responses: Responses, *, beta: float = 2.0, gamma: float = 0.5, label_smoothing: float = 0.0) -> Losses:
    """Simple preference optimization: -log σ(beta · (mean log-prob of chosen - of rejected) - gamma); no reference.

    Args:
        responses: Log-probs in nats, K = 2.
        beta: Scale of the reward, > 0, per nat and token.
        gamma: Target margin of the rewards, >= 0. The paper tunes gamma / beta: 0.25 here, 0.3 to 0.8 in its table.
        label_smoothing: Share of flipped labels, in [0, 0.5).

    Returns:
        Losses in nats.

    Raises:
        ValueError: If a hyper-parameter is out of range (at construction, never under jit).

    References:
        Eq. 6 of Meng et al. 2024, https://arxiv.org/abs/2405.14734
    """
    _need("beta", beta, beta > 0, "> 0")
    _need("gamma", gamma, gamma >= 0, ">= 0")
    _need("label_smoothing", label_smoothing, 0 <= label_smoothing < 0.5, "in [0, 0.5)")
    rewards = beta * scores.mean_logps(responses)
    return Losses(links.logistic(gap(rewards) - gamma, label_smoothing), rewards, {})


def sft(responses: Responses) -> Losses:
    """Supervised fine-tuning: the negative log-likelihood of response 0, per scored token of the update.

    Args:
        responses: Log-probs in nats, any K; only response 0 counts.

    Returns:
        Token losses in nats, summed over each response; the update divides them by its scored tokens, not by examples.
    """
    nll = -responses.logps[:, 0]
    return Losses(jnp.zeros_like(nll), None, {}, token_losses=nll)


def _need(name: str, value: float, condition: bool, needed: str) -> None:
    if not condition:
        raise ValueError(f"{name}={value} must be {needed}.")


OBJECTIVES: dict[str, Objective] = {
    "dpo": Objective(dpo),
    "ipo": Objective(ipo),
    "ipo_mean": Objective(ipo_mean),
    "simpo": Objective(simpo, reference=False),
    "sft": Objective(sft, responses=1, reference=False),
}
