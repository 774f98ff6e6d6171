"""Optimizers and learning-rate schedules, by name. To add one, write a function and a table line.

Every function takes the learning rate and, keyword-only, the hyper-parameters that it has; one that it does not have
is refused.
"""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import flax.traverse_util as traverse
import jax
import jax.numpy as jnp
import optax

from daajax.errors import UserError
from daajax.models.parameters import is_decayed


def _adamw(learning_rate, *, b1=0.9, b2=0.999, eps=1e-8, weight_decay=0.0, mu_dtype=None):
    """`mu_dtype`, here and below, is the dtype that the first moment is kept in; None: float32."""
    return optax.adamw(
        learning_rate, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay, mu_dtype=mu_dtype, mask=_decayed
    )


def _rmsprop(learning_rate, *, b2=0.99, eps=1e-8):
    """`b2` is the decay of the squared gradients; defaults as torch's, which the DPO paper's code uses."""
    return optax.rmsprop(learning_rate, decay=b2, eps=eps, eps_in_sqrt=False, bias_correction=False)


def _sgd(learning_rate, *, b1=0.0, mu_dtype=None):
    """`b1` is the momentum."""
    if mu_dtype is not None and not b1:
        raise UserError(
            f"config.optimizer.mu_dtype={mu_dtype!r} but optimizer 'sgd' has no first moment without momentum; set "
            "config.optimizer.b1, or unset it."
        )
    return optax.sgd(learning_rate, momentum=b1 or None, accumulator_dtype=mu_dtype)


def _adafactor(learning_rate, *, b2=0.8, eps=1e-30, weight_decay=0.0):
    """Factored second moments alone, so that learning rates mean what they say; `b2` is the exponent of their decay."""
    return optax.chain(
        optax.scale_by_factored_rms(decay_rate=b2, epsilon=eps),
        optax.add_decayed_weights(weight_decay, mask=_decayed),
        optax.scale_by_learning_rate(learning_rate),
    )


def _lion(learning_rate, *, b1=0.9, b2=0.99, weight_decay=0.0, mu_dtype=None):
    return optax.lion(learning_rate, b1=b1, b2=b2, weight_decay=weight_decay, mu_dtype=mu_dtype, mask=_decayed)


OPTIMIZERS: dict[str, Callable[..., optax.GradientTransformation]] = {
    "adamw": _adamw,
    "rmsprop": _rmsprop,
    "sgd": _sgd,
    "adafactor": _adafactor,
    "lion": _lion,
}

SCHEDULES: dict[str, Callable[[float, int], optax.Schedule]] = {  # of the peak rate and the updates after warm-up
    "constant": lambda peak, steps: optax.constant_schedule(peak),
    "linear": lambda peak, steps: optax.linear_schedule(peak, 0.0, max(1, steps)),
    "cosine": lambda peak, steps: optax.cosine_decay_schedule(peak, max(1, steps)),
}


def make_schedule(*, learning_rate: float, schedule: str, warmup_steps: int, updates: int) -> optax.Schedule:
    """Learning rate by update, counted from 0: a linear warm-up from above 0, then the schedule to the last update.

    Args:
        learning_rate: Peak.
        schedule: Key of `SCHEDULES`.
        warmup_steps: Updates until the peak.
        updates: Length of the run.

    Raises:
        UserError: If the run ends before the warm-up does.
    """
    if warmup_steps >= updates and warmup_steps:
        raise UserError(
            f"optimizer.warmup_steps={warmup_steps} but the run has {updates} updates, so the peak rate is never "
            "reached; set --config.optimizer.warmup_steps lower."
        )
    after = SCHEDULES[schedule](learning_rate, updates - warmup_steps)
    if not warmup_steps:
        return after
    warmup = optax.linear_schedule(learning_rate / warmup_steps, learning_rate, max(1, warmup_steps - 1))
    return optax.join_schedules([warmup, after], [warmup_steps])


def make_optimizer(
    name: str, schedule: optax.Schedule, *, max_grad_norm: float | None, hyperparameters: Mapping[str, Any]
) -> optax.GradientTransformation:
    """An optimizer, its gradients clipped to a global norm first.

    Args:
        name: Key of `OPTIMIZERS`.
        schedule: Learning rate by update.
        max_grad_norm: Global norm to clip to; None does not clip.
        hyperparameters: By name; None takes the optimizer's default.

    Raises:
        UserError: If a hyper-parameter is set that the optimizer does not have.
    """
    chosen = {key: value for key, value in hyperparameters.items() if value is not None}
    known = list(inspect.signature(OPTIMIZERS[name]).parameters)[1:]
    unknown = sorted(set(chosen) - set(known))
    if unknown:
        raise UserError(f"optimizer {name!r} takes {known}, not {unknown}; unset config.optimizer.{unknown[0]}.")
    optimizer = OPTIMIZERS[name](schedule, **chosen)
    if max_grad_norm is not None:
        optimizer = optax.chain(optax.clip_by_global_norm(max_grad_norm), optimizer)

    def init(params: Any) -> Any:
        """State in float32, as the gradients are, whatever the dtype of the parameters."""
        return optimizer.init(jax.tree.map(lambda p: p.astype(jnp.float32), params))

    return optax.GradientTransformation(init, optimizer.update)


def holds_moments(optimizer: optax.GradientTransformation) -> bool:
    """Whether an optimizer keeps moments that are as large as the matrix that they are of: not counts or factors."""
    matrix = jax.ShapeDtypeStruct((1024, 1024), jnp.float32)
    state = jax.eval_shape(optimizer.init, {"q_proj": matrix})
    return any(leaf.shape == matrix.shape for leaf in jax.tree.leaves(state))


def _decayed(params: Any) -> Any:
    flat = traverse.flatten_dict(params, sep="/")
    return traverse.unflatten_dict({path: is_decayed(path) for path in flat}, sep="/")
