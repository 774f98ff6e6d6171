"""From a recipe to a config that makes sense: every key known, every name in its table, every number in its range."""

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import optax
from ml_collections import config_dict

from configs import base
from daajax import compiler_options
from daajax.attention import ATTENTION
from daajax.checkpoint import BEST
from daajax.data.packing import parse_row_length
from daajax.data.sources import SOURCES
from daajax.data.tokenization import SCORES, TRUNCATIONS
from daajax.errors import UserError, one_line
from daajax.heads import FORMS
from daajax.losses.objectives import OBJECTIVES
from daajax.losses.terms import Needs, bind
from daajax.models.quantization import FORMATS
from daajax.models.remat import REMAT
from daajax.optimizer import OPTIMIZERS, SCHEDULES, holds_moments, make_optimizer

Config = Any  # a ConfigDict with the keys of configs/base.py; it types none of its attributes

DTYPES = ("float32", "bfloat16")
REFERENCE_MODES = ("snapshot", "path", "adapter_off", "ema", "none")


class _Range(NamedTuple):
    """Finite numbers from `low` to below `high`; `low` is among them unless the range is open."""

    low: int
    high: float | int = math.inf
    is_open: bool = False

    def holds(self, value: float | int) -> bool:
        return (self.low < value if self.is_open else self.low <= value) and value < self.high

    def words(self, value: float | int) -> str:
        """What is needed, for the message that refuses `value`."""
        words = f"{'above' if self.is_open else 'at least'} {self.low:g}"
        if self.high < math.inf:
            return f"{words} and below {self.high:g}"
        return words if math.isfinite(value) else f"{words} and finite"


_CHOICES = {
    "attention": ("auto", *ATTENTION),
    "head": ("auto", *FORMS),
    "chat.score": SCORES,
    "checkpoint.best": (None, *BEST),
    "data.name": tuple(SOURCES),
    "data.truncation": TRUNCATIONS,
    "eval_data.name": tuple(SOURCES),
    "eval_data.truncation": TRUNCATIONS,
    "lora.quantization": (None, *FORMATS),
    "model.dtype": DTYPES,
    "model.param_dtype": DTYPES,
    "optimizer.mu_dtype": (None, "bfloat16"),
    "optimizer.name": tuple(OPTIMIZERS),
    "optimizer.schedule": tuple(SCHEDULES),
    "reference.mode": REFERENCE_MODES,
    "remat": tuple(REMAT),
    "resume": ("auto", "never", "force"),
}
_RANGES = {
    "batch_size": _Range(1),
    "checkpoint.every": _Range(1),
    "checkpoint.keep": _Range(1),
    "data.limit": _Range(1),
    "data.max_bad_rows": _Range(0),
    "data.weight": _Range(0, is_open=True),
    "epochs": _Range(0, is_open=True),
    "eval.every": _Range(1),
    "eval_data.limit": _Range(1),
    "eval_data.max_bad_rows": _Range(0),
    "log.every": _Range(1),
    "lora.alpha": _Range(0, is_open=True),
    "lora.rank": _Range(0),
    "max_length": _Range(2),
    "max_prompt_length": _Range(1),
    "micro_batches": _Range(1),
    "model.router_aux_loss_coef": _Range(0),
    "optimizer.b1": _Range(0, 1),
    "optimizer.b2": _Range(0, 1),
    "optimizer.eps": _Range(0, is_open=True),
    "optimizer.learning_rate": _Range(0),
    "optimizer.max_grad_norm": _Range(0, is_open=True),
    "optimizer.warmup_steps": _Range(0),
    "optimizer.weight_decay": _Range(0),
    "packing.rows": _Range(1),
    "packing.shapes": _Range(1),
    "peak_flops": _Range(0, is_open=True),
    "profile.start": _Range(1),
    "profile.steps": _Range(1),
    "reference.ema.decay": _Range(0, 1),
    "reference.ema.every": _Range(1),
    "seed": _Range(0),
    "steps": _Range(1),
    "watchdog_minutes": _Range(0),
}
_REQUIRED = ("model.path", "data.path")
_CAN_BE_NONE = ("data.cache_dir", "eval_data.cache_dir")  # besides those whose default is None
_FREE = ("loss", "extra_losses")  # their keys are an objective's; `bind` checks them


def resolve(config: Config) -> Config:
    """Checks a config and locks all of it, also a dict that replaced another one.

    Raises:
        UserError: If a key is unknown or missing, or a value is out of place.
    """
    config = config_dict.ConfigDict(config)
    _check_values(dict(every_option(config.to_dict())), dict(every_option(base.get_config().to_dict())))
    parse_row_length(config.packing.row_length)
    if (config.steps is None) == (config.epochs is None):
        raise UserError(
            f"set exactly one of config.steps (got {config.steps}) and config.epochs (got {config.epochs}); "
            "--config.epochs=None or --config.steps=None unsets the other."
        )
    _check_optimizer(config)
    compiler_options.check(config.compiler_options)
    _check_lora(config)
    _check_reference(config)
    _check_evaluation(config)
    if config.profile.start is None and config.profile.steps != base.get_config().profile.steps:
        raise UserError(
            f"config.profile.steps={config.profile.steps} but config.profile.start is not set: name the first update "
            "to trace."
        )
    shares(data_sources(config.data, "data"))
    _check_eval_data(config)
    config.unlock().loss = _whole(config.loss)
    return config.unlock().lock()  # a config that is locked already would not look at its parts


def _check_values(found: Mapping[str, Any], known: Mapping[str, Any]) -> None:
    """Refuses options that there are none of, and values that are out of place whatever the others are.

    Args:
        found: Every option and its value.
        known: Every one that there is, and its default.
    """
    for names, problem in ((set(found) - set(known), "is not an option"), (set(known) - set(found), "is missing")):
        if names:
            raise UserError(f"config.{min(names)} {problem}; configs/base.py has them all, set its keys one by one.")
    for name, value in found.items():
        if value is None and (name in _REQUIRED or (known[name] is not None and name not in _CAN_BE_NONE)):
            raise UserError(f"config.{name} is not set; set it with --config.{name}=… .")
        if value == "":
            raise UserError(f"config.{name} is empty; give it a value, or None where it can do without.")
    for name, choices in _CHOICES.items():
        if found[name] not in choices:
            raise UserError(f"config.{name}={found[name]!r} is unknown; there are {', '.join(map(str, choices))}.")
    for name, allowed in _RANGES.items():
        value = found[name]
        if value is not None and not allowed.holds(value):
            raise UserError(f"config.{name}={value} must be {allowed.words(value)}.")


def _check_evaluation(config: Config) -> None:
    """Refuses what needs held-out data without any, and a best checkpoint by what the loss does not have."""
    for name, value in (("eval.every", config.eval.every), ("checkpoint.best", config.checkpoint.best)):
        if value is not None and config.eval_data.path is None:
            raise UserError(f"config.{name}={value!r} needs held-out data; set config.eval_data.path.")
    terms = bind(losses(config))
    if "rewards" in (config.checkpoint.best or "") and not any(term.has_rewards for term in terms):
        raise UserError(
            f"config.checkpoint.best={config.checkpoint.best!r}: loss {terms[0].name!r} has no rewards; "
            "set it to 'eval/loss'."
        )
    if config.checkpoint.best == "eval/rewards/accuracies" and "labels" in Needs.of(terms).fields:
        raise UserError(
            f"config.checkpoint.best='eval/rewards/accuracies': loss {terms[0].name!r} compares no two responses, it "
            "has no accuracy; set it to 'eval/loss' or 'eval/rewards/margins'."
        )


def restored(stored: Mapping[str, Any]) -> Config:
    """A run's stored config, not yet resolved, with today's defaults where it has no option of that name.

    Raises:
        UserError: If a value is not of its option's type.
    """
    config = base.get_config().unlock()
    try:
        _fill(config, stored)
    except (TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f"the run's config.json does not fit this version of daajax ({one_line(error)}); take the version that the "
            "run was made with."
        ) from None
    return config.lock()


def _fill(config: Config, stored: Mapping[str, Any]) -> None:
    """Puts the values of a stored config into one that has their types."""
    for key, value in stored.items():
        if key == "loss":
            config[key] = _whole(value)
        elif isinstance(value, Mapping) and isinstance(config.get(key), config_dict.ConfigDict):
            _fill(config[key], value)
        elif value is not None or config.get(key) is not None:
            config[key] = tuple(value) if isinstance(value, list) else value


def _whole(loss: Any) -> Config:
    """A loss with the defaults of the hyper-parameters that it does not name."""
    whole = base.loss(loss["name"]) if loss.get("name") in OBJECTIVES else config_dict.ConfigDict()
    whole.unlock().update(loss.to_dict() if isinstance(loss, config_dict.ConfigDict) else dict(loss))
    return whole


def losses(config: Config) -> list[dict[str, Any]]:
    """`loss` and `extra_losses` as plain dicts."""
    every = [config.loss, *config.extra_losses]
    wrong = next((loss for loss in every if not isinstance(loss, Mapping | config_dict.ConfigDict)), None)
    if wrong is not None:
        raise UserError(
            f"config.extra_losses holds {wrong!r}; it needs dicts, such as ({{'name': 'sft', 'weight': 0.2}},)."
        )
    return [dict(loss) for loss in every]


@dataclasses.dataclass(frozen=True)
class DataSource:
    """One of the sources that data come from.

    Attributes:
        option: What it is called in the config: `data`, `data.extra[0]`, …
        name: Its kind, a key of `SOURCES`.
        path: See configs/base.py, as the others.
        split: Likewise.
        limit: Likewise.
        max_bad_rows: Likewise.
        weight: Likewise.
    """

    option: str
    name: str
    path: str
    split: str | None = None
    limit: int | None = None
    max_bad_rows: int = 0
    weight: float | None = None


def data_sources(options: Config, option: str) -> list[DataSource]:
    """The source that the options name, and the further ones in `extra`.

    Args:
        options: `config.data` or `config.eval_data`.
        option: What they are called.

    Raises:
        UserError: If a further one has an unknown key, lacks one, or has a value that makes no sense.
    """
    fields = [field.name for field in dataclasses.fields(DataSource)[1:] if field.name in options]
    own: dict[str, Any] = {name: options[name] for name in fields}
    found = [DataSource(option, **own)]
    for index, extra in enumerate(options.extra):
        here = f"{option}.extra[{index}]"
        if not isinstance(extra, Mapping | config_dict.ConfigDict):
            raise UserError(
                f"config.{option}.extra holds {extra!r}; it needs dicts, such as ({{'name': 'jsonl', 'path': '…'}},)."
            )
        if unknown := sorted(set(extra) - set(fields)):
            raise UserError(f"config.{here} has the key {unknown[0]!r}; there are {', '.join(fields)}.")
        values: dict[str, Any] = {name: value for name, value in dict(extra).items() if value is not None}
        if lacking := [name for name in ("name", "path") if name not in values]:
            raise UserError(f"config.{here} has no {lacking[0]!r}; give it one.")
        for name, value in values.items():
            _check_extra(here, name, value)
        found.append(DataSource(here, **values))
    return found


def shares(sources: Sequence[DataSource]) -> list[float] | None:
    """Of each source in what is drawn; None: every example is drawn alike.

    Raises:
        UserError: If only some have a weight, or there is but one source.
    """
    weights = [source.weight for source in sources]
    if all(weight is None for weight in weights):
        return None
    if len(sources) == 1:
        raise UserError(
            f"config.data.weight={weights[0]} is a share among several sources, but config.data.extra names no other; "
            "unset it."
        )
    if lacking := [source.option for source in sources if source.weight is None]:
        raise UserError(f"config.{lacking[0]} has no weight but another source has; set it for all or for none.")
    return [float(weight) for weight in weights if weight is not None]


def _check_extra(option: str, name: str, value: Any) -> None:
    """Refuses a value of a further source that `resolve` would refuse of `data`."""
    kinds = {"limit": int, "max_bad_rows": int, "weight": int | float}
    if isinstance(value, bool) or not isinstance(value, kinds.get(name, str)) or value == "":
        needed = "text" if name not in kinds else "a number" if name == "weight" else "an integer"
        raise UserError(f"config.{option}.{name}={value!r} must be {needed}.")
    if name == "name" and value not in SOURCES:
        raise UserError(f"config.{option}.name={value!r} is unknown; there are {', '.join(SOURCES)}.")
    if name in kinds and not (allowed := _RANGES[f"data.{name}"]).holds(value):
        raise UserError(f"config.{option}.{name}={value} must be {allowed.words(value)}.")


def _check_eval_data(config: Config) -> None:
    """Refuses options of held-out data that there are none of."""
    found, known = config.eval_data.to_dict(), base.get_config().eval_data.to_dict()
    changed = [name for name, value in found.items() if value != known[name] and name != "cache_dir"]
    if config.eval_data.path is not None:
        data_sources(config.eval_data, "eval_data")
    elif changed:
        raise UserError(f"config.eval_data.{changed[0]} is set but config.eval_data.path is not; set both or neither.")


def tokenizer_path(config: Config) -> str:
    """Directory of the tokenizer: the model's unless another is named."""
    return config.tokenizer.path or config.model.path


def hyperparameters(config: Config) -> dict[str, float | str | None]:
    """What an optimizer may take besides its learning rate; None: not set."""
    return {name: config.optimizer[name] for name in ("b1", "b2", "eps", "weight_decay", "mu_dtype")}


def _check_optimizer(config: Config) -> None:
    options = config.optimizer
    optimizer = make_optimizer(
        options.name,
        optax.constant_schedule(0.0),
        max_grad_norm=options.max_grad_norm,
        hyperparameters=hyperparameters(config),
    )
    if options.offload and not holds_moments(optimizer):
        raise UserError(
            f"config.optimizer.offload=True but optimizer {options.name!r} as it is set keeps no moment of a matrix's "
            "size to move; leave it False."
        )


def has_adapters(config: Config) -> bool:
    """Whether it is adapters that a run trains."""
    return config.lora.rank > 0 or config.lora.path is not None


def _check_lora(config: Config) -> None:
    found, known = config.lora.to_dict(), base.get_config().lora.to_dict()
    changed = [name for name, value in found.items() if value != known[name]]
    if changed and not has_adapters(config):
        raise UserError(f"config.lora.{changed[0]} is set but config.lora.rank is 0: give adapters a rank.")
    if found["path"] is not None and (own := [name for name in changed if name not in ("path", "quantization")]):
        raise UserError(
            f"config.lora.{own[0]} is set but config.lora.path={found['path']} is an adapter that has its own; "
            "leave one of the two out."
        )
    if not found["targets"]:
        raise UserError("config.lora.targets is empty; name projections, or ('all-linear',) for all of them.")
    for name in ("targets", "modules_to_save"):
        if wrong := [one for one in found[name] if not isinstance(one, str)]:
            raise UserError(f"config.lora.{name} holds {wrong[0]!r}; it needs names, such as ('q_proj', 'v_proj').")


def _check_reference(config: Config) -> None:
    reference = config.reference
    if reference.mode == "adapter_off" and not has_adapters(config):
        raise UserError("config.reference.mode='adapter_off' but config.lora.rank is 0: there is no adapter.")
    if (reference.mode == "path") != (reference.path is not None):
        raise UserError(
            f"config.reference.path={reference.path!r} with reference.mode={reference.mode!r}: "
            "the path belongs to reference.mode='path', and only to it."
        )
    terms = bind(losses(config))
    needing = [term.name for term in terms if term.objective.reference]
    if needing and reference.mode == "none":
        raise UserError(
            f"loss {needing[0]!r} needs a reference but config.reference.mode='none'; use 'snapshot', 'path' or 'ema'."
        )
    if not needing and reference.mode != "none":
        raise UserError(
            f"loss {terms[0].name!r} reads no reference but config.reference.mode={reference.mode!r} asks for one; "
            "set --config.reference.mode=none."
        )
    if reference.live and reference.mode == "none":
        raise UserError("config.reference.live=True but config.reference.mode='none': there is none to keep.")
    known = base.get_config().reference.ema.to_dict()
    changed = [name for name, value in reference.ema.items() if value != known[name]]
    if changed and reference.mode != "ema":
        raise UserError(
            f"config.reference.ema.{changed[0]} is set but config.reference.mode={reference.mode!r}; set mode to 'ema'."
        )


def every_option(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Name, such as `data.path`, and value of every option of a config as plain dicts; a loss is one option."""
    for key, value in tree.items():
        if isinstance(value, Mapping) and prefix + key not in _FREE:
            yield from every_option(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value
