"""RainbowPO, which combines what others found one at a time."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from daajax.losses import links, scores
from daajax.losses.likelihood import with_nll
from daajax.losses.objective import Losses, need, need_not_negative, need_one_of, need_positive
from daajax.losses.scores import Responses, gap

LINKS = {"logistic": links.logistic, "ipo": links.square, "cauchy": links.cauchy}


def rainbow(
    responses: Responses,
    *,
    beta: float = 10.0,
    home_advantage: float = 0.1,
    mixing: float | None = 0.25,
    dispersion_mean: float | None = 0.29,
    link: str = "logistic",
    length_normalization: bool = True,
    reference_free: bool = False,
    nll_weight: float = 0.0,
) -> Losses:
    """RainbowPO: -log σ(beta · φ · [gap of (m - a · m0) - (1 - a) · home_advantage]).

    m and m0 are the log-probs per token of policy and reference, a is `mixing`, and φ = -dispersion_mean · log of the
    reference's entropy, as in `mallows_dpo`. That its pairs are rejection-sampled is a matter of the data.

    Args:
        responses: Log-probs in nats, K = 2; the sum `reference_entropies`, unless dispersion_mean is None.
        beta: Scale of the reward, > 0, per nat (and token).
        home_advantage: Margin that the chosen response must have, >= 0, nats (per token).
        mixing: a, how much of the reference counts, in [0, 1]. None: all of it, and all of the home advantage.
        dispersion_mean: Scale of φ, > 0. None: φ is 1.
        link: `logistic`, `ipo`: (the same logit - ½)², or `cauchy`: -log(atan(logit) / π + ½).
        length_normalization: Whether log-probs are per token; False: summed.
        reference_free: Whether m0 counts as 0; the entropy is the reference's still.
        nll_weight: Weight of the likelihood of the chosen response, normalized as its log-prob is, >= 0.

    Returns:
        Losses, in nats if the link is not `ipo`. The metric `dispersion` is φ, unless it is 1.

    Raises:
        ValueError: If a hyper-parameter is out of range (at construction, never under jit).

    References:
        Zhao et al. 2024, https://arxiv.org/abs/2410.04203; CapitalOne-Research/RainbowPO
    """
    need_positive(beta=beta)
    need_not_negative(home_advantage=home_advantage)
    need("mixing", mixing, mixing is None or 0 <= mixing <= 1, "in [0, 1], or None")
    need("dispersion_mean", dispersion_mean, dispersion_mean is None or dispersion_mean > 0, "> 0, or None")
    need_one_of("link", link, LINKS)
    advantage = home_advantage * (1 if mixing is None else 1 - mixing)
    share = 0 if reference_free else 1 if mixing is None else mixing
    score = (1 - share) * responses.logps
    if share:
        score += share * scores.log_ratios(responses)
    if length_normalization:
        score = scores.mean_over_tokens(score, responses)
    phi, metrics = jnp.ones_like(score[:, 0]), {}
    if dispersion_mean is not None:
        phi = dispersion_mean * scores.dispersion(responses)
        metrics = {"dispersion": phi}
    rewards = beta * phi[:, None] * score
    result = Losses(LINKS[link](gap(rewards) - beta * phi * advantage), rewards, metrics)
    return with_nll(result, responses, nll_weight, "seq" if length_normalization else "sum")


def rainbow_needs(
    *, dispersion_mean: float | None = 0.29, reference_free: bool = False, mixing: float | None = 0.25, **_: Any
) -> Mapping[str, Any]:
    """What `rainbow` needs with these hyper-parameters."""
    if dispersion_mean is not None:
        return {}
    return {"sums": (), "reference": not (reference_free or mixing == 0)}
