"""Responses with everything that an objective may read, and what is computed of them again and again."""

from typing import Any

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st

from daajax.losses.objective import Losses
from daajax.losses.objectives import OBJECTIVES
from daajax.losses.scores import Responses

SEEDS = st.integers(0, 10**6)  # of `random_responses`
quick = hypothesis.settings(max_examples=8, deadline=None, derandomize=True)

# Every objective, and those of its choices that compute something else.
LOSSES = [
    *(dict(name=name) for name in OBJECTIVES),
    *(dict(name="f_dpo", divergence=divergence) for divergence in ("reverse_kl", "js", "alpha")),
    dict(name="discopop", link="cell"),
    dict(name="spin", link="hinge"),
    dict(name="odpo", transform="identity"),
    dict(name="odpo", of="ratio"),
    dict(name="rebel", scale="paper"),
    dict(name="simpo", link="hinge"),
    dict(name="alphapo", alpha=-1.0),
    dict(name="cpo", link="ipo", nll_reduction="sum"),
    dict(name="slic_hf", sft_target="separate"),
    dict(name="sft", reduction="seq"),
    dict(name="exo", target="pair"),
    dict(name="exo", target="pair", log_eps=-10.0),
    dict(name="info_nca", target="first"),
    dict(name="nca", target="first"),
    dict(name="kto_pair", anchor="rejected"),
    dict(name="bco", delta="paper"),
    dict(name="bco_pair", delta="zero"),
    dict(name="sampo", subset="independent"),
    dict(name="wpo", clip_max=None),
    dict(name="mallows_ipo", form="rainbow"),
    dict(name="rainbow", link="ipo", nll_weight=0.1),
    dict(name="rainbow", link="cauchy", dispersion_mean=None, reference_free=True, length_normalization=False),
    dict(name="online_dpo", link="ipo", missing_eos_penalty=0.5),
    *(
        dict(name="pairwise", link=link, label_smoothing=0.1)
        for link in ("hinge", "square", "linear", "cauchy", "cell")
    ),
    dict(name="pairwise", score="mean_logratio", tail_weight=0.5, margin_weight=0.3, length_weight=0.01, gamma=0.2),
]


def responses_of(logps: Any, log_ratios: Any, lengths: Any, *, seed: int = 0, real: Any = None) -> Responses:
    """These log-probs with all else that an objective reads, drawn; where there is no response, what an update has."""
    rng = np.random.default_rng(seed)
    lengths = np.asarray(lengths, np.int32)
    (n, K), there = lengths.shape, lengths > 0
    dtype = np.asarray(logps).dtype

    def given(values: Any) -> jax.Array:
        return jnp.asarray(np.where(there, values, 0), dtype)

    ratios = np.asarray(log_ratios)
    sums = {
        "tail_log_ratios": ratios * rng.uniform(0, 1, (n, K)),
        "kept_log_ratios": ratios * rng.uniform(0, 1, (n, K)),
        "independently_kept_log_ratios": ratios * rng.uniform(-1, 1, (n, K)),
        "sum_squares": -rng.uniform(0, 10, (n, K)) * lengths,
        "kl": np.abs(ratios) * rng.uniform(0, 1, (n, K)),
        "reference_entropies": rng.uniform(0, 1, (n, K)) * lengths,
        "kl_surrogate": rng.normal(size=(n, K)) * lengths,
    }
    falling = np.sort(rng.uniform(0.01, 0.99, (n, K)))[:, ::-1]
    return Responses(
        given(logps),
        given(ratios),
        jnp.asarray(lengths),
        real=None if real is None else jnp.asarray(real),
        sums={name: given(values) for name, values in sums.items()},
        state={"mean": jnp.asarray(0.1, dtype), "std": jnp.asarray(2.0, dtype), "count": jnp.asarray(5.0, dtype)},
        scores=jnp.asarray(np.where(there, falling, np.nan), dtype),
        labels=jnp.asarray(rng.integers(0, 2, n), jnp.int32),
        prompt_probabilities=jnp.asarray(rng.uniform(0, 1, n), dtype),
        finished=jnp.asarray(rng.integers(0, 2, (n, K)) > 0),
        gumbel=jnp.asarray(rng.gumbel(size=n), dtype),
    )


def random_responses(dtype: Any = np.float32, examples: int = 6, responses: int = 2, seed: int = 0) -> Responses:
    """Responses of 1 to 19 tokens at 0.5 to 3 nats each, log-ratios of about 5 nats."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 20, (examples, responses)).astype(np.int32)
    logps = -rng.uniform(0.5, 3, lengths.shape) * lengths
    ratios = 5 * rng.normal(size=lengths.shape)
    return responses_of(logps.astype(dtype), ratios.astype(dtype), lengths, seed=seed + 1)


def at_reference(dtype: Any = np.float32, **size: int) -> Responses:
    """Responses that the policy finds as likely as the reference does, in all that can be summed of them."""
    given = random_responses(dtype, **size)
    zeros = jnp.zeros_like(given.logps)
    ratios = [name for name in given.sums if name.endswith("log_ratios") or name == "kl"]
    return given._replace(log_ratios=zeros, sums=dict(given.sums) | dict.fromkeys(ratios, zeros))


def result_of(responses: Responses, name: str, **hyperparameters: Any) -> Losses:
    """What an objective makes of responses."""
    return OBJECTIVES[name].function(responses, **hyperparameters)


def losses_of(responses: Responses, name: str, **hyperparameters: Any) -> np.ndarray:
    """Losses and gradients side by side, `[examples, 1 + responses]`: what two objectives that are the same share."""
    losses, gradients = losses_and_gradients(lambda r: result_of(r, name, **hyperparameters), responses)
    return np.concatenate([losses[:, None], gradients], axis=1)


def losses_and_gradients(loss: Any, responses: Responses) -> tuple[np.ndarray, np.ndarray]:
    """Losses per example, and the gradient of their sum with respect to the policy's log-probs."""

    def total(change: jax.Array) -> tuple[jax.Array, jax.Array]:
        ratios = None if responses.log_ratios is None else responses.log_ratios + change
        losses = loss(responses._replace(logps=responses.logps + change, log_ratios=ratios)).losses
        return losses.sum(), losses

    gradient, losses = jax.grad(total, has_aux=True)(jnp.zeros_like(responses.logps))
    return np.asarray(losses), np.asarray(gradient)
