"""What an `adapter_config.json` of PEFT asks for.

Every key is used, has the one value we support, or is known not to matter; anything else is refused by name. The keys
are those of PEFT 0.1 to 0.21.
"""

import dataclasses
import pathlib
import re
from collections.abc import Collection, Mapping
from typing import Any

from daajax.console import say
from daajax.errors import UserError
from daajax.models import config_reader
from daajax.models.config_reader import ConfigReader
from daajax.models.lora import Lora

CONFIG = "adapter_config.json"

_ONE_VALUE = {  # null is as good
    "alora_invocation_tokens": None,
    "arrow_config": None,
    "bias": "none",
    "enable_lora": None,
    "kasa_config": None,
    "layer_replication": None,
    "layers_pattern": None,
    "layers_to_transform": None,
    "lora_bias": False,
    "megatron_config": None,
    "monteclora_config": None,
    "target_parameters": None,
    "task_type": "CAUSAL_LM",
    "trainable_token_indices": None,
    "use_bdlora": None,
    "use_dora": False,
    "use_qalora": False,
    "velora_config": None,
}
_IRRELEVANT = (
    *("auto_mapping", "base_model_name_or_path", "inference_mode", "merge_weights", "peft_version", "revision"),
    "fan_in_fan_out",  # how the base is stored, which the base knows
    *("corda_config", "eva_config", "loftq_config", "lora_ga_config"),  # of `init_lora_weights`, if that says so
    "megatron_core",
    "qalora_group_size",
    "runtime_config",
)
_STARTS = ("gaussian", "eva", "orthogonal")  # values of `init_lora_weights` that leave the base as it is


@dataclasses.dataclass(frozen=True)
class PeftConfig:
    """An `adapter_config.json` that we can hold.

    Attributes:
        rank: Of modules that `ranks` does not name.
        alpha: Likewise.
        rslora: Whether alpha is divided by the root of the rank.
        ranks: By regular expression that a module's name ends with.
        alphas: Likewise.
        targeted: Modules with adapters: a regular expression, or endings of names.
        excluded: Modules without, though they are targeted.
        whole: Endings of names of modules that are trained whole.
        ties: Whether what is tied in the base is tied in what is trained whole.
    """

    rank: int
    alpha: float
    rslora: bool
    ranks: Mapping[str, int]
    alphas: Mapping[str, float]
    targeted: str | list[str]
    excluded: str | list[str]
    whole: list[str]
    ties: bool

    @classmethod
    def read(cls, path: str) -> "PeftConfig":
        """Of a directory.

        Raises:
            UserError: If it is not there, broken, or asks for something that is not supported.
        """
        file = pathlib.Path(path) / CONFIG
        if not file.is_file():
            raise UserError(f"{path} has no {CONFIG}; the directory of an adapter that PEFT saved is needed.")
        try:
            return cls._of(ConfigReader(config_reader.read(file, "an adapter's config")))
        except UserError as error:
            raise UserError(str(error) if str(file) in str(error) else f"{file}: {error}") from None

    @classmethod
    def _of(cls, reader: ConfigReader) -> "PeftConfig":
        reader.choice("peft_type", None, ("LORA",))
        for key, value in _ONE_VALUE.items():
            if (found := reader.take(key, value)) != value and found != []:
                raise UserError(f"{key}={found!r} is not supported, only {value!r}.")
        start = reader.take("init_lora_weights", True)
        if not isinstance(start, bool) and start not in _STARTS:
            raise UserError(
                f"init_lora_weights={start!r} belongs to a base that was changed for it, or is trained otherwise; save "
                "the adapter with save_pretrained(…, path_initial_model_for_weight_conversion=…), or merge it."
            )
        if (dropout := reader.take("lora_dropout", 0.0)) != 0:
            say(f"adapter: it was trained with lora_dropout={dropout}; it goes on without, since there is none here")
        whole = reader.take("modules_to_save", [])
        if not isinstance(whole, list):
            raise UserError(f"modules_to_save is {whole!r}; a list of names is needed.")
        tables = (reader.table("rank_pattern"), reader.table("alpha_pattern"))
        ranks = {key: ConfigReader({f"rank_pattern.{key}": value}) for key, value in tables[0].items()}
        alphas = {key: ConfigReader({f"alpha_pattern.{key}": value}) for key, value in tables[1].items()}
        config = cls(
            rank=reader.integer("r", 8),
            alpha=reader.number("lora_alpha", 8.0),
            rslora=reader.boolean("use_rslora", False),
            ranks={key: value.integer(f"rank_pattern.{key}") for key, value in ranks.items()},
            alphas={key: value.number(f"alpha_pattern.{key}") for key, value in alphas.items()},
            targeted=_names(reader, "target_modules"),
            excluded=_names(reader, "exclude_modules"),
            whole=whole,
            ties=reader.boolean("ensure_weight_tying", False),
        )
        reader.ignore(*_IRRELEVANT)
        reader.finish("an adapter", ())
        for pattern in (*config.ranks, *config.alphas, *config.whole, config.targeted, config.excluded):
            try:
                re.compile(pattern if isinstance(pattern, str) else "")
            except re.error as error:
                raise UserError(f"{pattern!r} is no regular expression ({error}).") from None
        return config

    def targets(self, module: str) -> bool:
        """Whether a module has an adapter; as PEFT decides it."""
        if _hits(self.excluded, module) or any(re.match(rf"(^|.*\.){name}($|\..*)", module) for name in self.whole):
            return False
        return _hits(self.targeted, module)

    def rank_and_scale(self, module: str) -> tuple[int, float]:
        """The rank of a module's adapter, and what it is multiplied with."""
        rank, alpha = _of_pattern(self.ranks, module, self.rank), _of_pattern(self.alphas, module, self.alpha)
        return rank, Lora(rank, alpha, (), self.rslora).scale

    def saved(self, modules: Collection[str]) -> set[str]:
        """Which of a model's modules are trained whole.

        Raises:
            UserError: If a name in `modules_to_save` is none of them.
        """
        for name in self.whole:
            if not any(module.endswith(name) for module in modules):
                raise UserError(f"{CONFIG}: modules_to_save has {name!r}, which the base model has not.")
        return {module for module in modules if module.endswith(tuple(self.whole))}


def _names(reader: ConfigReader, key: str) -> str | list[str]:
    value = reader.take(key, [])
    if not isinstance(value, str) and not (isinstance(value, list) and all(isinstance(one, str) for one in value)):
        raise UserError(f"{key} is {value!r}; a list of names or a regular expression is needed.")
    return value


def _hits(names: str | list[str], module: str) -> bool:
    if isinstance(names, str):
        return bool(names) and re.fullmatch(names, module) is not None
    return any(module == name or module.endswith(f".{name}") for name in names)


def _of_pattern(patterns: Mapping[str, Any], module: str, otherwise: Any) -> Any:
    return next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", module)), otherwise)
