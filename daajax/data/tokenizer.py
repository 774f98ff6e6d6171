"""A model's tokenizer, loaded without trusting its folder, and the chat template that goes with it."""

import datetime
import json
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

import jinja2

from daajax.data.bad_rows import BadRow
from daajax.data.rows import Messages
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
FIXED_DATE = datetime.date(2024, 7, 26)  # what Llama's templates print where no clock is at hand


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


def template_text(template: str | None) -> str | None:
    """The text of `chat.template`: itself, if it is Jinja, or what the file of that name holds."""
    if template is None or "{{" in template or "{%" in template:
        return template
    try:
        return Path(template).read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"chat.template={template} cannot be read ({one_line(error)}); needed a Jinja file or its text"
        ) from error


def chat_template(tokenizer: "PreTrainedTokenizerFast", template: str | None) -> tuple[str, list[str]]:
    """The Jinja text that chat messages are rendered with.

    A template that prints today's date would make other data of the same rows tomorrow: it is given a fixed date.

    Args:
        tokenizer: Has a template of its own, or not.
        template: `chat.template`: None for the tokenizer's own, the path of a Jinja file, or the text itself.

    Returns:
        The template, and notices.

    Raises:
        UserError: If there is none.
    """
    text = template_text(template)
    if text is None:
        try:
            text = tokenizer.get_chat_template()
        except ValueError:
            raise UserError(
                "the data hold chat messages but the tokenizer has no (default) chat template; "
                "set chat.template to a Jinja file or its text"
            ) from None
    fixed = re.sub(
        r"""strftime_now\(\s*(["'])(.*?)\1\s*\)""",
        lambda call: repr(FIXED_DATE.strftime(call[2])),
        text,
        flags=re.DOTALL,
    )
    if "strftime_now(" in fixed:
        raise UserError("the chat template computes today's date in a way that cannot be fixed; set chat.template")
    notice = f"the chat template prints today's date: it is given {FIXED_DATE} so that the data stay the same every day"
    return fixed, [notice] if fixed != text else []


def render(tokenizer: "PreTrainedTokenizerFast", template: str, messages: Messages, *, generation_prompt: bool) -> str:
    """Messages as the text that the model sees.

    Args:
        tokenizer: Knows the special tokens that templates print.
        template: From `chat_template`.
        messages: At least one.
        generation_prompt: Whether the header of the assistant's answer follows.

    Raises:
        UserError: If the template is no Jinja.
        BadRow: If it cannot render these messages.
    """
    try:
        text = tokenizer.apply_chat_template(
            messages, chat_template=template, tokenize=False, add_generation_prompt=generation_prompt
        )
    except jinja2.TemplateSyntaxError as error:
        raise UserError(
            f"the chat template is not valid Jinja: {one_line(error)}; mend it or set chat.template"
        ) from error
    except (jinja2.TemplateError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise BadRow(f"the chat template cannot render it: {one_line(error)}") from error
    return str(text)
