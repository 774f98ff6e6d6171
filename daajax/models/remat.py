"""What the backward pass keeps of a layer, and what it computes once more.

A layer's large products carry names where they are made (`checkpoint_name`): those that a policy keeps are in memory
from the forward pass to the backward pass; all else, the elementwise parts between them included, is made again. So the
derivative of a gate costs its two inputs, [tokens, intermediate_size] each, and not also the sigmoid, the product and
what a float32 norm leaves behind. To add a policy, add a line to `REMAT`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from daajax.models.architecture import Architecture

PRODUCTS = {  # names of what is kept, in the order of a layer
    "qkv": "queries, keys and values, before norm and rotation",
    "attention": "attention's output and log-sum-exp; the attention itself names them",
    "o": "what attention adds to the residual stream",
    "mlp": "what goes into the activation: gate and up; of experts also the router's",
    "down": "what the MLP adds to the residual stream; kept only where the backward pass reads it",
}
PROJECTIONS = {  # which product a projection's output is part of
    "q_proj": "qkv",
    "k_proj": "qkv",
    "v_proj": "qkv",
    "o_proj": "o",
    "router": "mlp",
    "gate_proj": "mlp",
    "up_proj": "mlp",
    "down_proj": "down",
}
KERNELS = ("dot_product_attention_fwd_wrapper",)  # attention that is a primitive of jax, cuDNN's, and names nothing


class Remat(NamedTuple):
    """A policy.

    Attributes:
        recomputes: Products that the backward pass computes once more.
        meaning: For the documentation.
    """

    recomputes: tuple[str, ...]
    meaning: str


REMAT = {  # from the fastest to the one that needs least memory
    "none": Remat((), "keeps every product; only what is elementwise is computed again"),
    "dots": Remat(("attention",), "keeps the matrix products, attention is computed again"),
    "save_except_mlp": Remat(("mlp", "down"), "keeps all but the MLP's products, which are the widest"),
    "save_attention": Remat(("qkv", "o", "mlp", "down"), "keeps attention's output and log-sum-exp"),
    "full": Remat(tuple(PRODUCTS), "keeps the layer's input: one more forward pass"),
}


def policy(name: str) -> Callable[..., Any]:
    """What `jax.checkpoint` is told: whether a value stays.

    Args:
        name: Key of `REMAT`.
    """
    kept = frozenset(PRODUCTS) - frozenset(REMAT[name].recomputes)

    def stays(primitive: Any, *_: Any, **parameters: Any) -> bool:
        if primitive.name in KERNELS:
            return "attention" in kept
        return primitive.name == "name" and parameters["name"] in kept

    return stays if kept else jax.checkpoint_policies.nothing_saveable


def recomputed(name: str, architecture: Architecture) -> tuple[str, ...]:
    """Products that the backward pass of such a layer computes once more, in the order of a layer.

    The last product before the residual stream is not among them where nothing but a sum reads it.

    Args:
        name: Key of `REMAT`.
        architecture: Whose layers.
    """
    a = architecture
    is_read = dict.fromkeys(PRODUCTS, True)
    is_read["o"] = not a.parallel or "post_attention_norm" in a.norms
    is_read["down"] = a.experts is not None or "post_mlp_norm" in a.norms
    return tuple(product for product in PRODUCTS if product in REMAT[name].recomputes and is_read[product])
