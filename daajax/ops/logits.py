"""From hidden states to logits and back: the products with the vocabulary projection that every form of the head makes.

Operands are in the compute dtype, sums in float32. Each device has a part of the vocabulary, and of the logits.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from daajax.ops.devices import ONE_DEVICE, Devices
from daajax.ops.slots import Slots
from daajax.ops.statistics import STATISTICS, Distributions, Normalizer

CHUNK = 2048  # tokens; each chunk reads the whole projection forward, and reads and writes its gradient backward
ROWS, SLOTS, VOCAB, WHOLE = ("rows",), ("rows", "scored"), ("vocab",), ()  # leading axes
PROJECTION = ("vocab", "embed")


@dataclasses.dataclass(frozen=True)
class Head:
    """What is computed of hidden states, and how.

    Attributes:
        names: Keys of `STATISTICS`.
        softcap: Logits z become c·tanh(z/c); None: they stay.
        reference_softcap: Likewise those of the reference model.
        is_frozen: Whether to take the form for a projection that is not trained, where there is a gradient at all.
        chunk: Tokens a chunk, on each device.
        devices: That rows and vocabulary are cut up over.

    Raises:
        ValueError: If a name is unknown.
    """

    names: tuple[str, ...] = ("logps",)
    softcap: float | None = None
    reference_softcap: float | None = None
    is_frozen: bool = False
    chunk: int = CHUNK
    devices: Devices = ONE_DEVICE

    def __post_init__(self):
        if unknown := sorted(set(self.names) - set(STATISTICS)):
            raise ValueError(f"unknown statistics {unknown}; there are {sorted(STATISTICS)}.")


def operands_of(head: Head, hidden, projection, targets, real, reference) -> tuple[Slots, tuple[Array, ...]]:
    """Slots, and the projections in their compute dtypes.

    Raises:
        ValueError: If "kl" and the reference operands do not come together.
    """
    if ("kl" in head.names) != (len(reference) == 2):
        raise ValueError('the statistic "kl" and both reference operands come together or not at all.')
    weights = (weights_of(head, projection, hidden.dtype),)
    if reference:
        states, other = jax.lax.stop_gradient(reference)
        return Slots(hidden, targets, real, (states,)), (*weights, weights_of(head, other, states.dtype))
    return Slots(hidden, targets, real), weights


def weights_of(
    head: Head, projection: Float[Array, "vocab embed"], dtype: jax.typing.DTypeLike
) -> Float[Array, "vocab embed"]:
    """The projection in the compute dtype, cast where it lies: devices gather what is cast, not what is not."""
    return head.devices.keep(projection.astype(dtype), PROJECTION)


def gradient_over_tokens(head: Head, total: Float[Array, "vocab embed"]) -> Float[Array, "vocab part"]:
    """The gradient of the projection summed over the devices' tokens; each keeps its part of the features."""
    return head.devices.sum_cut(total, "tokens", 1, "embed")


def log_probs(
    hidden: Float[Array, "tokens embed"], weights: Float[Array, "vocab embed"], softcap: float | None = None
) -> Float[Array, "tokens vocab"]:
    """Log-probs of every next token, nats, float32; both operands in the compute dtype.

    Args:
        hidden: States that predict a token.
        weights: The vocabulary projection.
        softcap: Logits z become c·tanh(z/c); None: they stay.
    """
    return jax.nn.log_softmax(logits_of(hidden, weights, softcap), axis=1)


def logits_of(
    hidden: Float[Array, "tokens embed"], weights: Float[Array, "vocab embed"], softcap: float | None
) -> Float[Array, "tokens vocab"]:
    """Logits, float32; arguments are those of `log_probs`."""
    logits = product(hidden, weights, (1, 1))
    return logits if softcap is None else softcap * jnp.tanh(logits / softcap)


def distributions(
    head: Head, slots: Slots, weights: tuple[Array, ...], normalizer: Normalizer | None = None
) -> Distributions:
    """Of a chunk; the normalizer only where it is not known yet."""
    logits = logits_of(slots.hidden, weights[0], head.softcap)
    return around(head, logits, slots, weights, normalizer or Normalizer.of(logits, head.devices))


def around(
    head: Head, logits: Array, slots: Slots, weights: tuple[Array, ...], normalizer: Normalizer
) -> Distributions:
    """The distributions of logits that there are."""
    reference = None
    if slots.reference:
        other = logits_of(slots.reference[0], weights[1], head.reference_softcap)
        reference = Normalizer.of(other, head.devices).log_probs(other)
    first = head.devices.index("vocab") * logits.shape[1]
    return Distributions(logits, normalizer, slots.targets - first, reference, head.devices)


def values_of(head: Head, d: Distributions, real: Array) -> tuple[Array, ...]:
    """The head's statistics, each [tokens]; 0 in slots that are not real."""
    return tuple(jnp.where(real, STATISTICS[name][0](d), 0) for name in head.names)


def d_logits_of(
    head: Head, d: Distributions, values: tuple[Array, ...], cotangents: tuple[Array | None, ...], dtype: Any
) -> Array:
    """Gradient of the logits before they were capped; the products with it run in the compute dtype."""
    total = jnp.zeros_like(d.logits)
    for name, value, cotangent in zip(head.names, values, cotangents, strict=True):
        if cotangent is not None:
            total += cotangent[:, None] * STATISTICS[name][1](d, value)
    if head.softcap is not None:
        total *= 1 - jnp.square(d.logits / head.softcap)
    return total.astype(dtype)


def into_hidden(head: Head, d_logits: Array, weights: tuple[Array, ...]) -> Array:
    """The gradient of hidden states, [tokens, embed], of this gradient of the logits; in its dtype."""
    return head.devices.sum(product(d_logits, weights[0], (1, 0)), "vocab").astype(d_logits.dtype)


def product(x: Array, y: Array, contract: tuple[int, int]) -> Array:
    """The product of two matrices along an axis of each, in float32; float32 is not rounded to a shorter format."""
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else jax.lax.Precision.DEFAULT
    axes = (((contract[0],), (contract[1],)), ((), ()))
    return jax.lax.dot_general(x, y, axes, precision=precision, preferred_element_type=jnp.float32)
