"""Prompts for sampling: read from a file, tokenized as training would, and their responses as text again."""

import collections
import dataclasses
import itertools
import pathlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from daajax import data_copies
from daajax.data.bad_rows import BadRow
from daajax.data.chat import load_template
from daajax.data.files import Address, json_rows
from daajax.data.messages import CONTEXT
from daajax.data.rendering import Rendering, render_prompt
from daajax.data.rows import Example, parse
from daajax.data.tokenization import encode
from daajax.data.tokens import COUNTERS
from daajax.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def read(path: str, limit: int | None = None) -> list[Example]:
    """The prompts of a .jsonl or .jsonl.gz file: its column `prompt`, and `tools` and `chat_template_kwargs` beside it.

    Args:
        path: Of the file.
        limit: Rows to stop after; None reads all of them.

    Raises:
        UserError: If there is no file, no row, or a row without a prompt that can be used.
    """
    path = data_copies.fetch(path, "--prompts")
    if not pathlib.Path(path).is_file():
        raise UserError(f"--prompts={path} is no file; a .jsonl or .jsonl.gz file is needed.")
    found = [_prompt_of(*entry) for entry in itertools.islice(json_rows(pathlib.Path(path), Address(path)), limit)]
    if not found:
        raise UserError(f"--prompts={path} holds no rows; at least one is needed.")
    return found


def _prompt_of(location: str, row: dict[str, Any] | BadRow) -> Example:
    """A row's prompt, as an example without responses."""
    if isinstance(row, BadRow):
        raise UserError(f"{location}: {row}; mend or remove the row.")
    if row.get("prompt") is None:
        raise UserError(f"{location}: no column `prompt`, there are {', '.join(row) or 'none'}.")
    columns = {name: row[name] for name in ("prompt", *CONTEXT) if name in row}
    try:  # any response will do: it is the prompt that is checked
        return dataclasses.replace(parse(columns | {"response": "."}, location), responses=())
    except BadRow as reason:
        raise UserError(f"{location}: {reason}; mend or remove the row.") from None


def tokenize(
    prompts: Sequence[Example],
    tokenizer: "PreTrainedTokenizerFast",
    template: str | None = None,
) -> tuple[list[list[int]], list[str]]:
    """Prompts as training sees them: text behind what the tokenizer puts there, chat as its template renders it.

    Args:
        prompts: Their responses do not matter.
        tokenizer: From `load_tokenizer`.
        template: A Jinja file or its text; None: the tokenizer's own. Text needs none.

    Returns:
        Token ids of each, and notices.

    Raises:
        UserError: If a prompt cannot be rendered.
    """
    chat = any(not isinstance(prompt.prompt, str) for prompt in prompts)
    loaded, notices = load_template(tokenizer, template) if chat else (None, [])
    counters: collections.Counter[str] = collections.Counter()
    rendered = []
    for index, prompt in enumerate(prompts, start=1):
        try:
            text, findings = render_prompt(prompt, loaded)
        except BadRow as reason:
            raise UserError(f"prompt {index}: {reason}.") from None
        counters.update(findings)
        rendered.append(Rendering(text, (), chat=not isinstance(prompt.prompt, str)))
    notices += [f"{count:,} {COUNTERS[name]}" for name, count in sorted(counters.items())]
    parts = encode(rendered, tokenizer, collections.Counter())
    # As a whole text it was given an EOS, which a prompt does not have.
    ids = [
        part.tokens[: len(part) - (not rendering.chat)].tolist()
        for part, rendering in zip(parts, rendered, strict=True)
    ]
    return ids, notices


def text_after(prompt: Sequence[int], response: Sequence[int], tokenizer: "PreTrainedTokenizerFast") -> str:
    """A response's text, without special tokens.

    It is decoded behind its prompt, because a tokenizer may take the space from what comes first.
    """
    before, whole = (
        str(tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))
        for ids in (prompt, [*prompt, *response])
    )
    common = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(before, whole, strict=False))
    return whole[sum(1 for _ in common) :]
