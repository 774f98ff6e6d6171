"""The chat template: it makes one text of messages, by transformers' own code."""

import dataclasses
import datetime
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2

from daajax.data.bad_rows import BadRow
from daajax.data.messages import Messages
from daajax.errors import UserError, one_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

FIXED_DATE = datetime.date(2024, 7, 26)  # what Llama's templates print where no clock is at hand


@dataclasses.dataclass(frozen=True)
class ChatTemplate:
    """What messages are rendered with.

    Attributes:
        tokenizer: Knows the special tokens that templates print.
        text: Jinja, with a fixed date in place of today's.
        text_for_tools: The same, for messages with tools; some tokenizers bring one of its own for them.
    """

    tokenizer: "PreTrainedTokenizerFast"
    text: str
    text_for_tools: str

    def render(
        self,
        messages: Messages,
        *,
        generation_prompt: bool,
        tools: list[dict[str, Any]] | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> str:
        """Messages as the text that the model sees.

        Args:
            messages: At least one.
            generation_prompt: Whether the header of the assistant's answer follows.
            tools: JSON schemas.
            template_kwargs: Further arguments of the template.

        Raises:
            UserError: If the template is no Jinja.
            BadRow: If it cannot render these messages.
        """
        try:
            text = self.tokenizer.apply_chat_template(
                messages,
                tools=[*tools] if tools else None,
                chat_template=self.text_for_tools if tools else self.text,
                tokenize=False,
                add_generation_prompt=generation_prompt,
                **(template_kwargs or {}),
            )
        except jinja2.TemplateSyntaxError as error:
            raise UserError(
                f"the chat template is not valid Jinja: {one_line(error)}; mend it or set chat.template"
            ) from error
        except (jinja2.TemplateError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            raise BadRow(f"the chat template cannot render it: {one_line(error)}") from error
        return str(text)


def load_template(tokenizer: "PreTrainedTokenizerFast", template: str | None) -> tuple[ChatTemplate, list[str]]:
    """The template that chat messages are rendered with.

    One that prints today's date would make other data of the same rows tomorrow: it is given a fixed date.

    Args:
        tokenizer: Has a template of its own, or not.
        template: `chat.template`: None for the tokenizer's own, the path of a Jinja file, or the text itself.

    Returns:
        The template, and notices.

    Raises:
        UserError: If there is none.
    """
    text = text_for_tools = template_text(template)
    if text is None or text_for_tools is None:
        try:
            text, text_for_tools = tokenizer.get_chat_template(), tokenizer.get_chat_template(tools=[{}])
        except ValueError:
            raise UserError(
                "the data hold chat messages but the tokenizer has no (default) chat template; "
                "set chat.template to a Jinja file or its text"
            ) from None
    fixed = ChatTemplate(tokenizer, _dated(text), _dated(text_for_tools))
    notice = f"the chat template prints today's date: it is given {FIXED_DATE} so that the data stay the same every day"
    return fixed, [notice] if (fixed.text, fixed.text_for_tools) != (text, text_for_tools) else []


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


def _dated(text: str) -> str:
    """A template with the fixed date wherever it computes today's."""
    fixed = re.sub(
        r"""strftime_now\(\s*(["'])(.*?)\1\s*\)""",
        lambda call: repr(FIXED_DATE.strftime(call[2])),
        text,
        flags=re.DOTALL,
    )
    if "strftime_now(" in fixed:
        raise UserError("the chat template computes today's date in a way that cannot be fixed; set chat.template")
    return fixed
