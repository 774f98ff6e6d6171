"""A pairwise objective put together by name: a score, a link, and what is added to the logit and to the loss."""

from collections.abc import Mapping
from typing import Any

from daajax.losses import links, scores
from daajax.losses.likelihood import with_nll
from daajax.losses.objective import Losses, need, need_flip_share, need_not_negative, need_one_of, need_positive
from daajax.losses.scores import Responses, gap


def pairwise(
    responses: Responses,
    *,
    score: str = "logratio",
    link: str = "logistic",
    beta: float = 0.1,
    gamma: float = 0.0,
    label_smoothing: float = 0.0,
    margin_weight: float = 0.0,
    length_weight: float = 0.0,
    tail_weight: float = 1.0,
    nll_weight: float = 0.0,
    nll_reduction: str = "seq",
) -> Losses:
    """One put together: link(beta · gap of a score - gamma - margin_weight · score gap + length_weight · token gap).

    `dpo` is score=`logratio`, link=`logistic`; what differs from it in one of these places is here without a line of
    code, and any two of them together.

    Args:
        responses: Log-probs in nats, K = 2; scores, if margin_weight is not 0; the sum `tail_log_ratios`, if
            tail_weight is not 1.
        score: What is compared, by name: `logp`, `logratio`, or either per token, `mean_logp`, `mean_logratio`.
        link: From the logit to the loss, by name: `logistic`, `hinge` (margin 1), `square` (target ½), `linear`,
            `cauchy`, `lrml` or `cell`.
        beta: Scale of the score, > 0.
        gamma: Margin that the chosen response must have, of beta · score.
        label_smoothing: Share of flipped labels, in [0, 0.5).
        margin_weight: Weight of the gap of the data's scores as a further margin, >= 0.
        length_weight: Added to the logit for each token that the chosen response is longer, >= 0.
        tail_weight: Weight of the tokens behind the end of the shorter response, in [0, 1]; of log-ratios.
        nll_weight: Weight of the likelihood of the chosen response, >= 0.
        nll_reduction: `seq`, `sum` or `batch`, as in `dpo_nll`.

    Returns:
        Losses, in nats if the link's are.

    Raises:
        ValueError: If a hyper-parameter is out of range (at construction, never under jit).

    References:
        Tang et al. 2024, who see the links as one family, https://arxiv.org/abs/2402.05749
    """
    need_one_of("score", score, scores.SCORES)
    need_one_of("link", link, links.LINKS)
    need_positive(beta=beta)
    need_flip_share(label_smoothing)
    need_not_negative(margin_weight=margin_weight, length_weight=length_weight)
    need("tail_weight", tail_weight, 0 <= tail_weight <= 1, "in [0, 1]")
    need("tail_weight", tail_weight, tail_weight == 1 or score in _OF_REFERENCE, "1 with a score of log-probs alone")
    compared = scores.SCORES[score](responses)
    if tail_weight != 1:
        compared = scores.log_ratios_with_tail(responses, tail_weight)
        if score == "mean_logratio":
            compared = scores.mean_over_tokens(compared, responses)
    rewards = beta * compared
    z = gap(rewards) - gamma + length_weight * gap(responses.lengths.astype(rewards.dtype))
    if margin_weight:
        z -= margin_weight * gap(scores.data_scores(responses))
    losses = (1 - label_smoothing) * links.LINKS[link](z)
    if label_smoothing:
        losses += label_smoothing * links.LINKS[link](-z)
    return with_nll(Losses(losses, rewards), responses, nll_weight, nll_reduction)


_OF_REFERENCE = ("logratio", "mean_logratio")


def pairwise_needs(
    *, score: str = "logratio", margin_weight: float = 0.0, tail_weight: float = 1.0, **_: Any
) -> Mapping[str, Any]:
    """What `pairwise` needs with these hyper-parameters."""
    return {
        "reference": score in _OF_REFERENCE,
        "reads": ("scores",) if margin_weight else (),
        "sums": ("tail_log_ratios",) if tail_weight != 1 else (),
    }
