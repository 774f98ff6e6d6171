"""Examples as strings: every response with the prompt before it, and which characters are scored.

What is scored after a prompt is what the model would have to write after the prompt that it is given when it answers,
`add_generation_prompt` included. That can be told only where the whole conversation begins with exactly that prompt.
Not all templates do so: some drop the thinking of earlier turns, or put the system message elsewhere once an answer
follows. A turn that they render otherwise is refused, and both renderings are shown.
"""

import collections
import contextlib
import dataclasses
import functools
import itertools
import re
from collections.abc import Callable, Iterable
from typing import Any

from daajax.data.bad_rows import BadRow
from daajax.data.chat import ChatTemplate
from daajax.data.messages import Messages
from daajax.data.rows import Example

SHOWN = 24  # characters of two renderings that differ


@dataclasses.dataclass(frozen=True)
class Rendering:
    """A response with its prompt as one string.

    Attributes:
        text: What is tokenized.
        spans: Where scored text begins and ends, in characters, in order; the last one ends with the text.
        chat: Whether a chat template made it, with all special tokens that it wants.
    """

    text: str
    spans: tuple[tuple[int, int], ...]
    chat: bool


def renderings(
    example: Example, template: ChatTemplate | None, counters: collections.Counter[str], *, score: str = "last"
) -> list[Rendering]:
    """An example's responses, each with the prompt before it.

    Args:
        example: Text or chat.
        template: From `load_template`; text needs none.
        counters: Counts what `render_prompt` finds, for responses too.
        score: `last`: what follows the prompt is scored. `all`: so are the assistant's turns in the prompt.

    Raises:
        BadRow: If the template cannot render it, or renders a scored turn otherwise than the model would write it.
    """
    prompt, findings = render_prompt(example, template)
    if isinstance(example.prompt, str) or template is None:
        wholes = [f"{prompt}{response}" for response in example.responses]
        return [Rendering(whole, ((len(prompt), len(whole)),), chat=False) for whole in wholes]

    render = functools.partial(template.render, tools=example.tools, template_kwargs=example.template_kwargs)
    rendered = []
    for response in example.responses:
        messages, turns = [*example.prompt, *response], len(example.prompt)
        whole = render(messages, generation_prompt=False)
        begin = _length_in(whole, prompt, turns)
        spans = []
        for turn, entry in enumerate(messages[:-1]):
            if entry["role"] == "assistant" and (turn >= turns or score == "all"):
                span = _turn(messages, turn, whole, render, str(template.tokenizer.eos_token))
                spans += [span] if turn < turns else []  # what follows the prompt is scored anyway
        rendered.append(Rendering(whole, (*spans, (begin, len(whole))), chat=True))
        if _leaves_out(
            messages, range(turns, len(messages)), whole, functools.partial(render, generation_prompt=False)
        ):
            findings.add("messages_not_rendered")
    counters.update(findings)
    return rendered


def render_prompt(example: Example, template: ChatTemplate | None) -> tuple[str, set[str]]:
    """The prompt that the model is given when it answers.

    Args:
        example: Text or chat.
        template: From `load_template`; text needs none.

    Returns:
        The prompt, and those of the counters `tools_not_rendered`, `messages_not_rendered` and
        `unknown_template_kwargs` that it adds to.

    Raises:
        BadRow: If the template cannot render it.
    """
    if isinstance(example.prompt, str) or template is None:
        return str(example.prompt), set()
    messages, names = example.prompt, example.template_kwargs
    render = functools.partial(template.render, generation_prompt=True, template_kwargs=names)
    prompt = render(messages, tools=example.tools)
    jinja = template.text_for_tools if example.tools else template.text
    found = {
        "tools_not_rendered": bool(example.tools) and render(messages) == prompt,
        "messages_not_rendered": _leaves_out(
            messages, range(len(messages)), prompt, functools.partial(render, tools=example.tools)
        ),
        "unknown_template_kwargs": not all(re.search(rf"\b{re.escape(name)}\b", jinja) for name in names),
    }
    return prompt, {name for name, happened in found.items() if happened}


def _leaves_out(messages: Messages, places: Iterable[int], text: str, render: Callable[[Messages], str]) -> bool:
    """Whether a template prints the same whatever some messages say: it does not know their role, or calls of tools."""
    for place in places:
        entry = messages[place]
        said = entry.get("content", "")
        changed: list[dict[str, Any]] = []
        if "tool_calls" in entry:
            changed.append({"tool_calls": [{"name": "other", "function": {"name": "other"}}]})
        changed += [{name: f"{entry[name]} other"} for name in ("reasoning_content", "thinking") if entry.get(name)]
        by_chance = len(said) < SHOWN and entry["role"] not in ("user", "assistant")  # as "21" is in a date
        if by_chance or said.strip() not in text:
            changed.append({"content": f"{said} other"})
        for change in changed:
            with contextlib.suppress(BadRow):  # it did read that
                if render([*messages[:place], entry | change, *messages[place + 1 :]]) == text:
                    return True
    return False


def _turn(messages: Messages, turn: int, whole: str, render: Callable[..., str], eos_token: str) -> tuple[int, int]:
    """Where an earlier answer lies in the whole conversation."""
    if turn == 0:
        raise BadRow(
            "the conversation begins with an assistant message, so nothing says where its header ends; "
            "remove it, or set chat.score to 'last'"
        )
    before = render(messages[:turn], generation_prompt=True)
    after = render(messages[: turn + 1], generation_prompt=False)
    if not whole.startswith(after):
        after = after.removesuffix(eos_token)  # some templates, such as Phi-3's, close every conversation with it
    return _length_in(whole, before, turn), _length_in(whole, after, turn + 1)


def _length_in(whole: str, beginning: str, count: int) -> int:
    """The length of a rendering of the first `count` messages that the whole conversation begins with."""
    if beginning and whole.startswith(beginning):
        return len(beginning)
    common = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(beginning, whole, strict=False))
    same = max(sum(1 for _ in common) - SHOWN // 2, 0)
    raise BadRow(
        f"the chat template renders the first {count} message(s) otherwise when more follow, "
        f"{beginning[same : same + SHOWN]!r} as {whole[same : same + SHOWN]!r}, so what the model would have to write "
        "is not certain; set chat.template to one that only ever appends, or score and answer the last turn only"
    )
