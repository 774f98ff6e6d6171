"""Statistics of next-token distributions, and their derivatives with respect to the logits.

A device may have a part of the vocabulary only: what is summed over tokens of the vocabulary is summed over devices.
To add one: a value, a derivative with respect to the logits, a line in `STATISTICS`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from daajax.ops.devices import ONE_DEVICE, Devices


class Normalizer(NamedTuple):
    """What makes log-probs of logits, in two numbers: their sum would round away what small logits add to large ones.

    Attributes:
        top: The largest logit.
        log_total: Log of the sum of exp(logit - top).
    """

    top: Float[Array, " tokens"]
    log_total: Float[Array, " tokens"]

    @classmethod
    def of(cls, logits: Float[Array, "tokens vocab"], devices: Devices) -> "Normalizer":
        """Over all of the vocabulary, of which these logits are this device's part."""
        top = devices.max(logits.max(axis=1), "vocab")
        return cls(top, jnp.log(devices.sum(jnp.exp(logits - top[:, None]).sum(axis=1), "vocab")))

    def log_probs(self, logits: Float[Array, "tokens vocab"]) -> Float[Array, "tokens vocab"]:
        """Log-probs, nats."""
        return (logits - self.top[:, None]) - self.log_total[:, None]


class Distributions(NamedTuple):
    """Next-token distributions, or a device's part of them; float32.

    Attributes:
        logits: Of this part of the vocabulary.
        normalizer: Of all of it.
        targets: Which token follows, counted from the first of this part; it may lie outside of it.
        reference: Log-probs of the reference model, like the logits; None unless a statistic compares the two.
        devices: That have the other parts.
    """

    logits: Float[Array, "tokens vocab"]
    normalizer: Normalizer
    targets: Int[Array, " tokens"]
    reference: Any = None
    devices: Devices = ONE_DEVICE

    @property
    def log_probs(self) -> Float[Array, "tokens vocab"]:
        """Log-probs, nats."""
        return self.normalizer.log_probs(self.logits)

    def total(self, values: Float[Array, "tokens vocab"]) -> Float[Array, " tokens"]:
        """Sum over all of the vocabulary."""
        return self.devices.sum(values.sum(axis=1), "vocab")


def _logps(d: Distributions) -> Array:
    size = d.logits.shape[1]
    own = jnp.take_along_axis(d.logits, jnp.clip(d.targets, 0, size - 1)[:, None], axis=1)[:, 0]
    logits = d.devices.sum(jnp.where((d.targets >= 0) & (d.targets < size), own, 0), "vocab")
    return (logits - d.normalizer.top) - d.normalizer.log_total


def _d_logps(d: Distributions, value: Array) -> Array:
    del value
    return (jnp.arange(d.logits.shape[1])[None] == d.targets[:, None]) - jnp.exp(d.log_probs)


def _sum_squares(d: Distributions) -> Array:
    log_probs = d.log_probs
    top = d.devices.max(log_probs.max(axis=1), "vocab")
    return 2 * top + jnp.log(d.total(jnp.exp(2 * (log_probs - top[:, None]))))


def _d_sum_squares(d: Distributions, value: Array) -> Array:
    return 2 * (jnp.exp(2 * d.log_probs - value[:, None]) - jnp.exp(d.log_probs))


def _entropies(d: Distributions) -> Array:
    return -d.total(jnp.exp(d.log_probs) * d.log_probs)


def _d_entropies(d: Distributions, value: Array) -> Array:
    return -jnp.exp(d.log_probs) * (d.log_probs + value[:, None])


def _kl(d: Distributions) -> Array:
    return d.total(jnp.exp(d.reference) * (d.reference - d.log_probs))


def _d_kl(d: Distributions, value: Array) -> Array:
    del value
    return jnp.exp(d.log_probs) - jnp.exp(d.reference)


STATISTICS: dict[str, tuple[Callable[[Distributions], Array], Callable[[Distributions, Array], Array]]] = {
    "logps": (_logps, _d_logps),  # log π(token), nats
    "sum_squares": (_sum_squares, _d_sum_squares),  # log Σ_v π(v)²
    "entropies": (_entropies, _d_entropies),  # -Σ_v π(v) log π(v), nats
    "kl": (_kl, _d_kl),  # Σ_v π_ref(v) log(π_ref(v) / π(v)), nats
}
