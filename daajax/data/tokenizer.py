"""A model's tokenizer, loaded without trusting its folder."""

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

from daajax.errors import UserError, one_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

TOKENIZER_FILES = (  # what a tokenizer consists of, beside its model's config.json
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates/*.jinja",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "vocab.txt",
)


def load_tokenizer(path: str | Path) -> "PreTrainedTokenizerFast":
    """Loads the tokenizer of a local Hugging Face directory; runs no code from it and asks no network.

    Raises:
        UserError: If there is none, it brings code of its own, has no offsets, no EOS, or is not deterministic.
    """
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # it misses PyTorch, which nobody needs here
    from transformers import AutoTokenizer  # seconds, which sources and packing need not pay

    folder = Path(path)
    if not (folder / "tokenizer.json").is_file():
        found = "has no tokenizer.json" if folder.is_dir() else "is not a folder"
        raise UserError(
            f"tokenizer.path={path} {found}; needed a local Hugging Face folder with a fast tokenizer "
            "(download the model, or save its fast tokenizer there with save_pretrained)"
        )
    try:
        for name in ("tokenizer_config.json", "config.json"):
            settings = json.loads((folder / name).read_bytes()) if (folder / name).is_file() else {}
            own_code = settings.get("auto_map") or {}
            if own_code and (name == "tokenizer_config.json" or "AutoTokenizer" in own_code):
                raise UserError(f"{folder / name} asks to run its own code (auto_map), which is never done; remove it")
        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except UserError:
        raise
    except Exception as error:  # transformers and tokenizers raise nearly anything here
        raise UserError(f"tokenizer.path={path} cannot be loaded: {one_line(error)}") from error
    if not tokenizer.is_fast:
        raise UserError(
            f"tokenizer.path={path} is a slow tokenizer, without offsets; needed a fast one (tokenizer.json)"
        )
    if tokenizer.eos_token_id is None:
        raise UserError(f"tokenizer.path={path} has no EOS token; name it as eos_token in its tokenizer_config.json")
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()  # a tokenizer.json may ask for either
    backend.no_padding()
    if getattr(backend.model, "dropout", None):
        raise UserError(f"tokenizer.path={path} tokenizes at random (dropout); set it to null in its tokenizer.json")
    spelled = backend.to_str()
    if '"trim_offsets":true' in spelled:
        # Offsets that leave out spaces would put the end of a token "word " before its space.
        untrimmed = spelled.replace('"trim_offsets":true', '"trim_offsets":false')
        backend.post_processor = type(backend).from_str(untrimmed).post_processor
    return tokenizer


def check_vocabulary(tokenizer: "PreTrainedTokenizerFast", vocab_size: int) -> None:
    """Refuses a tokenizer with ids that the model has no embedding for; a smaller one is fine.

    Raises:
        UserError: If an id can occur that is not below `vocab_size`.
    """
    largest = max(tokenizer.get_vocab().values())
    if largest >= vocab_size:
        raise UserError(
            f"vocabulary larger than the embedding: the tokenizer's largest id is {largest}, "
            f"but the model's vocab_size is {vocab_size}; set tokenizer.path to the model's own tokenizer"
        )
