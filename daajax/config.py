"""From a recipe to a config that makes sense: every key known, every name in its table, every number in its range."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

import optax
from ml_collections import config_dict

from configs import base
from daajax.data.sources import SOURCES
from daajax.errors import UserError
from daajax.losses.objectives import bind
from daajax.models.decoder import REMAT
from daajax.optimizer import OPTIMIZERS, SCHEDULES, make_optimizer
from daajax.scoring import ATTENTION

Config = Any  # a ConfigDict with the keys of configs/base.py; it types none of its attributes

DTYPES = ("float32", "bfloat16")
REFERENCE_MODES = ("snapshot", "path", "none")

_CHOICES = {
    "attention": ("auto", *ATTENTION),
    "chat.score": ("last", "all"),
    "data.name": tuple(SOURCES),
    "data.truncation": ("truncate", "drop"),
    "model.dtype": DTYPES,
    "model.param_dtype": DTYPES,
    "optimizer.name": tuple(OPTIMIZERS),
    "optimizer.schedule": tuple(SCHEDULES),
    "reference.mode": REFERENCE_MODES,
    "remat": tuple(REMAT),
}
_AT_LEAST = {
    "batch_size": 1,
    "data.limit": 1,
    "data.max_bad_rows": 0,
    "log.every": 1,
    "max_length": 2,
    "max_prompt_length": 1,
    "micro_batches": 1,
    "optimizer.learning_rate": 0.0,
    "optimizer.max_grad_norm": 0.0,
    "optimizer.warmup_steps": 0,
    "optimizer.weight_decay": 0.0,
    "packing.rows": 1,
    "packing.row_length": 128,
    "packing.shapes": 1,
    "seed": 0,
    "steps": 1,
}
_REQUIRED = ("model.path", "data.path")
_CAN_BE_NONE = ("data.cache_dir",)  # besides those whose default is None
_FREE = ("loss", "extra_losses")  # their keys are an objective's; `bind` checks them


def resolve(config: Config) -> Config:
    """Checks a config and locks it again, since a dict that replaced another one is not locked.

    Raises:
        UserError: If a key is unknown or missing, or a value is out of place.
    """
    config = config_dict.ConfigDict(config)
    known = dict(_leaves(base.get_config().to_dict()))
    found = dict(_leaves(config.to_dict()))
    for names, problem in ((set(found) - set(known), "is not an option"), (set(known) - set(found), "is missing")):
        if names:
            raise UserError(f"config.{min(names)} {problem}; configs/base.py has them all, set its keys one by one.")
    for name, value in found.items():
        if value is None and (name in _REQUIRED or (known[name] is not None and name not in _CAN_BE_NONE)):
            raise UserError(f"config.{name} is not set; set it with --config.{name}=… .")
    for name, choices in _CHOICES.items():
        if found[name] not in choices:
            raise UserError(f"config.{name}={found[name]!r} is unknown; there are {', '.join(choices)}.")
    for name, least in _AT_LEAST.items():
        value = found[name]
        if value is not None and not (value >= least and math.isfinite(value)):
            raise UserError(f"config.{name}={value} must be at least {least}.")
    if (config.steps is None) == (config.epochs is None):
        raise UserError(
            f"set exactly one of config.steps (got {config.steps}) and config.epochs (got {config.epochs}); "
            "--config.epochs=None or --config.steps=None unsets the other."
        )
    make_optimizer(
        config.optimizer.name,
        optax.constant_schedule(0.0),
        max_grad_norm=config.optimizer.max_grad_norm,
        hyperparameters=hyperparameters(config),
    )
    _check_reference(config)
    return config.lock()


def losses(config: Config) -> list[dict[str, Any]]:
    """`loss` and `extra_losses` as plain dicts."""
    every = [config.loss, *config.extra_losses]
    wrong = next((loss for loss in every if not isinstance(loss, Mapping | config_dict.ConfigDict)), None)
    if wrong is not None:
        raise UserError(
            f"config.extra_losses holds {wrong!r}; it needs dicts, such as ({{'name': 'sft', 'weight': 0.2}},)."
        )
    return [dict(loss) for loss in every]


def hyperparameters(config: Config) -> dict[str, float | None]:
    """What an optimizer may take besides its learning rate; None: not set."""
    return {name: config.optimizer[name] for name in ("b1", "b2", "eps", "weight_decay")}


def _check_reference(config: Config) -> None:
    reference = config.reference
    if (reference.mode == "path") != (reference.path is not None):
        raise UserError(
            f"config.reference.path={reference.path!r} with reference.mode={reference.mode!r}: "
            "the path belongs to reference.mode='path', and only to it."
        )
    terms = bind(losses(config))
    needing = [term.name for term in terms if term.objective.reference]
    if needing and reference.mode == "none":
        raise UserError(
            f"loss {needing[0]!r} needs a reference but config.reference.mode='none'; use 'snapshot' or 'path'."
        )
    if not needing and reference.mode != "none":
        raise UserError(
            f"loss {terms[0].name!r} reads no reference but config.reference.mode={reference.mode!r} asks for one; "
            "set --config.reference.mode=none."
        )


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping) and prefix + key not in _FREE:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value
