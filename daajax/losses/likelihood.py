"""The negative log-likelihood of a response as a term of an objective, with its reduction said.

Code bases differ in it: `seq` divides a response's sum by its own tokens, `sum` does not divide, `batch` divides the
sum over the update by all its scored tokens of response 0.
"""

from daajax.losses.objective import Losses, need_not_negative, need_one_of
from daajax.losses.scores import Responses, mean_logps

REDUCTIONS = ("seq", "sum", "batch")


def with_nll(losses: Losses, responses: Responses, weight: float, reduction: str) -> Losses:
    """Adds `weight` times the negative log-likelihood of response 0.

    Args:
        losses: What it is added to.
        responses: Log-probs in nats.
        weight: >= 0.
        reduction: `seq`, `sum` or `batch`.

    Raises:
        ValueError: If a hyper-parameter is out of range.
    """
    need_not_negative(nll_weight=weight)
    need_one_of("nll_reduction", reduction, REDUCTIONS)
    if reduction == "batch":
        return losses._replace(token_losses=-weight * responses.logps[:, 0])
    logps = responses.logps if reduction == "sum" else mean_logps(responses)
    return losses._replace(losses=losses.losses - weight * logps[:, 0])
