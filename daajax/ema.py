"""A reference that follows the policy."""

import jax
from jaxtyping import Array

from daajax.models.decoder import Params


def follow(reference: Params, policy: Params, decay: float) -> Params:
    """One step of the reference: decay · reference + (1 - decay) · policy.

    Args:
        reference: Its parameters.
        policy: The policy's.
        decay: Share of itself that it keeps, in [0, 1]; 0 makes it the policy (a hard update).

    References:
        Eqs. 5 and 6 of Gorbatovski et al. 2024 (TR-DPO), https://arxiv.org/abs/2404.09656; their α is 1 - decay.
    """

    def one(old: Array, new: Array) -> Array:
        return (decay * old + (1 - decay) * new).astype(old.dtype)

    return jax.tree.map(one, reference, policy)
