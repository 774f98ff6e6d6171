"""A `config.json` that is read key by key, so that what nobody took is known."""

import json
import math
import pathlib
from collections.abc import Collection
from typing import Any

from daajax.errors import UserError

# Keys that do not change what the decoder computes. Dropout is among them: alignment is deterministic here. So is
# what a router loss weighs: that is an option of the run.
_IRRELEVANT = frozenset(
    """_attn_implementation _attn_implementation_autoset _name_or_path _num_labels architectures
    attention_dropout attention_probs_dropout_prob attn_implementation attn_pdrop auto_map bos_token_id
    cache_implementation chunk_size_feed_forward classifier_dropout decoder_start_token_id do_sample dtype
    embd_pdrop eos_token_id finetuning_task gradient_checkpointing hidden_dropout hidden_dropout_prob id2label
    is_composition is_decoder is_encoder_decoder is_llama_config label2id max_length model_type n_special
    neftune_noise_alpha num_labels output_attentions output_hidden_states output_past output_router_logits
    pad_token_id predict_special_tokens prefix pretraining_tp problem_type resid_pdrop return_dict
    router_aux_loss_coef sep_token_id task_specific_params temperature tie_encoder_decoder tokenizer_class top_k
    top_p torch_dtype torchscript transformers.js_config transformers_version unk_token_id unsloth_fixed
    unsloth_version use_bfloat16 use_cache""".split()  # noqa: SIM905
)


def read(file: pathlib.Path, what: str = "a model's config.json") -> dict[str, Any]:
    """The contents of a `config.json`, or of another file of that kind.

    Raises:
        UserError: If it is not an object.
    """
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise TypeError("not an object")
    except (ValueError, TypeError) as error:
        raise UserError(f"{file}: not {what} ({type(error).__name__}: {error}).") from None
    return config


class ConfigReader:
    """Takes keys out of a config. A key whose value is null counts as absent, except where said.

    Args:
        config: Contents of the file, or an object in it.
    """

    def __init__(self, config: dict[str, Any]):
        self._config = dict(config)

    def take(self, key: str, default: Any = None) -> Any:
        """The value as it is."""
        value = self._config.pop(key, None)
        return default if value is None else value

    def integer(self, key: str, default: int | None = None, *, least: int = 1) -> int:
        """A positive integer, or one from `least` on."""
        value = self.take(key, default)
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise UserError(f"{key} is {value!r}; {'a positive integer' if least else 'an integer >= 0'} is needed.")
        return value

    def nullable_integer(self, key: str, *, absent: int | None) -> int | None:
        """None where the config says null, `absent` where it says nothing."""
        return self.integer(key) if self._config.setdefault(key, absent) is not None else None

    def number(self, key: str, default: float | None = None) -> float:
        """A positive number."""
        value = self.take(key, default)
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < math.inf:
            raise UserError(f"{key} is {value!r}; a positive number is needed.")
        return float(value)

    def nullable_number(self, key: str, *, absent: float | None) -> float | None:
        """None where the config says null, `absent` where it says nothing."""
        return self.number(key) if self._config.setdefault(key, absent) is not None else None

    def numbers(self, key: str) -> tuple[float, ...]:
        """A list of positive numbers."""
        values = self.take(key, [])
        if not isinstance(values, list):
            raise UserError(f"{key} is {values!r}; a list of numbers is needed.")
        return tuple(ConfigReader({key: value}).number(key) for value in values)

    def boolean(self, key: str, default: bool) -> bool:
        """True or false."""
        value = self.take(key, default)
        if not isinstance(value, bool):
            raise UserError(f"{key} is {value!r}; true or false is needed.")
        return value

    def choice(self, key: str, default: str | None, choices: Collection[str]) -> str:
        """One of several words."""
        value = self.take(key, default)
        if not isinstance(value, str) or value not in choices:
            raise UserError(f"{key} {value!r} is not supported; supported are {', '.join(sorted(choices))}.")
        return value

    def table(self, key: str) -> dict[str, Any]:
        """An object, empty where there is none."""
        value = self.take(key, {})
        if not isinstance(value, dict):
            raise UserError(f"{key} is {value!r}; an object is needed.")
        return value

    def words(self, key: str, default: list[str], choices: Collection[str]) -> list[str]:
        """A word for each of several things, as many as the default has."""
        values = self.take(key, default)
        if not isinstance(values, list) or len(values) != len(default):
            got = f"has {len(values)} entries" if isinstance(values, list) else f"is {values!r}"
            raise UserError(f"{key} {got}; a list of {len(default)} is needed, one a layer.")
        if wrong := [value for value in values if value not in choices]:
            raise UserError(f"{key} has {wrong[0]!r}; supported are {', '.join(sorted(choices))}.")
        return values

    def expect(self, key: str, supported: Any) -> None:
        """Refuses every other value than the one that is supported."""
        value = self.take(key, supported)
        if value != supported:
            raise UserError(f"{key}={value!r} is not supported, only {supported!r}.")

    def same(self, key: str, value: Any, other: str) -> None:
        """Refuses a second name of a value that says something else."""
        if (found := self.take(key, value)) != value:
            raise UserError(f"{key}={found!r} and {other}={value!r} disagree; make them the same, or remove one.")

    def ignore(self, *keys: str) -> None:
        """Takes keys that do not matter here."""
        for key in keys:
            self._config.pop(key, None)

    def finish(self, what: str = "this model_type", irrelevant: Collection[str] = _IRRELEVANT) -> None:
        """Refuses a config that has keys which nobody took, other than those that are irrelevant to it."""
        unknown = sorted(key for key, value in self._config.items() if key not in irrelevant and value is not None)
        if unknown:
            raise UserError(f"keys {unknown} are not known for {what}; what they ask for would be ignored.")
