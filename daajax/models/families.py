"""Model families: how a Hugging Face `config.json` and its tensors become our decoder's architecture and parameters.

A new family is one function from `config.json` to `Architecture`, one table of module names, and one line in
`FAMILIES`. Every key of a `config.json` is used, has the one value we support, or is known not to matter; anything
else is refused by name, because a feature that is ignored is a different model.
"""

import dataclasses
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

from daajax.errors import UserError
from daajax.models import config_reader, gemma, gpt, llama
from daajax.models.architecture import Architecture, for_length
from daajax.models.config_reader import ConfigReader
from daajax.models.parameters import layer_parameters, outer_parameters
from daajax.models.storage import Modules, Tensor


@dataclasses.dataclass(frozen=True)
class Family:
    """One entry of `FAMILIES`.

    Attributes:
        architecture: From the contents of `config.json`.
        modules: Where each of the decoder's parameters is stored.
        transposed: Whether projections are stored with their outputs first.
        ignored: Endings of names of tensors that a directory may hold although the model does not need them.
        prefix: Beginning of names that a directory may leave out in all of them.
    """

    architecture: Callable[[ConfigReader], Architecture]
    modules: Callable[[Architecture], Modules]
    transposed: bool = True
    ignored: tuple[str, ...] = ("rotary_emb.inv_freq",)  # old exports store rotary frequencies
    prefix: str = ""

    def tensors(self, architecture: Architecture) -> dict[str, Tensor]:
        """Where each of the decoder's parameters, by path, is stored."""
        modules, found = self.modules(architecture), {}
        layer = {f"layers/{name}": parameter for name, parameter in layer_parameters(architecture).items()}
        for path, parameter in (outer_parameters(architecture) | layer).items():
            name = path.removeprefix("layers/")
            kind = "bias" if name.endswith("_bias") else "weight"
            module = modules[name.removesuffix("_bias")]
            module, columns = (module, None) if isinstance(module, str) else module
            is_projection = path in layer and len(parameter.shape) > 1
            found[path] = Tensor(f"{module}.{kind}", is_projection and self.transposed, columns)
        return found

    def copies(self, architecture: Architecture) -> dict[str, str]:
        """Tensors that a directory may hold a second time, by name, and which tensor each must equal: a tied head."""
        modules = self.modules(architecture)
        copy, original = (f"{modules[name]}.weight" for name in ("lm_head", "embed_tokens"))
        return {copy: original} if architecture.tie_word_embeddings else {}


def read_architecture(path: str, option: str = "model.path", *, length: int | None = None) -> Architecture:
    """The architecture of a model directory.

    Args:
        path: The directory.
        option: Which names it, for messages.
        length: Tokens of the longest sequence, on which some rotary embeddings depend; None: it does not matter.

    Raises:
        UserError: If the directory or its `config.json` is missing or broken, or asks for something that is not
        supported.
    """
    file = pathlib.Path(path) / "config.json"
    if not pathlib.Path(path).is_dir():
        raise UserError(
            f"{option}={path!r} is not a directory; it must be a Hugging Face model directory "
            "(config.json, *.safetensors, tokenizer.json). Name one of the Hub as "
            f"hf://ORGANIZATION/{pathlib.Path(path).name}, or download it: "
            f"hf download ORGANIZATION/{pathlib.Path(path).name} --local-dir {path}"
        )
    if file.with_name("adapter_config.json").is_file() and not file.is_file():
        raise UserError(f"{option}={path} is an adapter; name it with lora.path, and its base with {option}.")
    if not file.is_file():
        raise UserError(f"{path} has no config.json; {option} must be a Hugging Face model directory.")
    config = config_reader.read(file)
    if isinstance(config.get("model"), dict):
        raise UserError(f"{option}={path} is the folder of a run; the model that it made is in {path}/model.")
    try:
        architecture = architecture_of(config)
        return architecture if length is None else for_length(architecture, length)
    except UserError as error:
        raise UserError(f"{file}: {error}") from None


def architecture_of(config: Mapping[str, Any]) -> Architecture:
    """The architecture that the contents of a `config.json` ask for.

    Raises:
        UserError: If they ask for something that is not supported.
    """
    reader = ConfigReader(dict(config))
    model_type = reader.choice("model_type", None, FAMILIES)
    if config.get("quantization_config"):
        raise UserError(
            "quantization_config says that the weights are quantized; take the model whose weights are floats."
        )
    reader.expect("pruned_heads", {})
    architecture = FAMILIES[model_type].architecture(reader)
    reader.finish()
    a = architecture
    if a.num_attention_heads % a.num_key_value_heads:
        raise UserError(
            f"num_attention_heads={a.num_attention_heads} is not a multiple of "
            f"num_key_value_heads={a.num_key_value_heads}."
        )
    for rope in (kind.rope for kind in a.kinds if kind.rope is not None):
        width = int(a.head_dim * rope.partial_rotary_factor)
        if width % 2 or not 0 < width <= a.head_dim:
            raise UserError(
                f"head_dim={a.head_dim} with partial_rotary_factor={rope.partial_rotary_factor:g} rotates {width} "
                f"features of a head; an even number up to {a.head_dim} is needed."
            )
    if a.experts is not None and a.experts.num_experts_per_tok > a.experts.num_experts:
        raise UserError(
            f"num_experts_per_tok={a.experts.num_experts_per_tok} but there are {a.experts.num_experts} experts."
        )
    return dataclasses.replace(architecture, model_type=model_type)


FAMILIES: dict[str, Family] = {
    "llama": Family(llama.llama, llama.llama_modules),
    "mistral": Family(llama.mistral, llama.llama_modules),
    "ministral": Family(llama.ministral, llama.llama_modules),
    "mixtral": Family(llama.mixtral, llama.mixtral_modules),
    "qwen2": Family(llama.qwen2, llama.llama_modules),
    "qwen3": Family(llama.qwen3, llama.llama_modules),
    "qwen3_moe": Family(llama.qwen3_moe, llama.qwen3_moe_modules),
    "gemma": Family(gemma.gemma, llama.llama_modules),
    "gemma2": Family(gemma.gemma2, llama.around_modules),
    "gemma3_text": Family(gemma.gemma3, llama.around_modules),
    "phi3": Family(llama.phi3, llama.phi3_modules),
    "olmo2": Family(llama.olmo2, llama.around_modules),
    "smollm3": Family(llama.smollm3, llama.llama_modules),
    "nemotron": Family(gpt.nemotron, llama.llama_modules),
    "gpt_neox": Family(
        gpt.gpt_neox, gpt.gpt_neox_modules, ignored=("rotary_emb.inv_freq", ".attention.bias", ".attention.masked_bias")
    ),
    "gpt2": Family(
        gpt.gpt2, gpt.gpt2_modules, transposed=False, ignored=(".attn.bias", ".attn.masked_bias"), prefix="transformer."
    ),
}
