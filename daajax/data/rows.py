"""What the columns of a data set mean: one row to a prompt and its K responses, as text or as chat messages.

A row holds its responses in the first of these forms that it has; each is text or a list of `messages`:

    chosen, rejected         a pair; beside it may be `score_chosen` and `score_rejected`
    responses | completions  a list, best first; in any order where they are scored
    response | completion    a single one; beside it may be a `label`, true where it is wanted, else false, and a
                             `prompt_probability`: how probable it is that a response to this prompt is wanted
    messages                 a conversation: its last message is the response; the same may be beside it

A list is scored by `scores`, numbers in the order of the responses; or its entries are objects, each with the response
as `content`, `text` or `response` and its number as `score` or `overall_score` (so does UltraFeedback). Scored
responses are put in order, best first, equal ones as they came.

The prompt is the column `prompt`, or `instruction` beside `completions`. A pair may do without: its prompt is what both
conversations begin with, in whole messages or, for text, in whole turns of Anthropic's Human/Assistant form. `id` and
`weight` are optional, and beside messages `tools` and `chat_template_kwargs`; null counts as absent. A list of objects
may also come as an object of lists.
"""

import dataclasses
import itertools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from daajax.data.bad_rows import BadRow, described, shortened
from daajax.data.messages import (
    CONTEXT,
    FIELDS,
    Messages,
    check_unicode,
    says_nothing,
    template_kwargs_of,
    text_or_messages,
    tools_of,
)

# The columns that hold a row's responses, and those that are read beside them.
FORMS = {
    ("chosen", "rejected"): ("prompt", "score_chosen", "score_rejected"),
    ("responses",): ("prompt", "scores"),
    ("completions",): ("prompt", "scores"),
    ("response",): ("prompt", "label", "prompt_probability"),
    ("completion",): ("prompt", "label", "prompt_probability"),
    ("messages",): ("label", "prompt_probability"),
}
LISTS = (("responses",), ("completions",))
TEXTS = ("content", "text", "response")  # of an entry of a list
SCORES = ("score", "overall_score")
FLOAT32_MAX = float(np.finfo(np.float32).max)  # weights and scores are kept as float32


@dataclasses.dataclass(frozen=True)
class Example:
    """A prompt and K responses to it, all of them text or all of them messages.

    Attributes:
        prompt: What the responses continue.
        responses: 0 the chosen, 1 the rejected one; best first where there are more; a single one for SFT.
        weight: Multiplies the example's loss; finite, >= 0.
        id: The data's own id, or "<file>:<row>".
        location: Where the row is, for messages to the user.
        scores: Of the responses, in any unit, the higher the better; finite. None: not scored.
        label: Whether a single response is wanted. None: not labelled.
        prompt_probability: Of a response to this prompt being wanted, in [0, 1]. None: not given.
        tools: JSON schemas of the tools that the chat template prints. None: there are none.
        template_kwargs: Further arguments of the chat template.
        oddities: Counters of `sources.Examples` that it adds to.
    """

    prompt: str | Messages
    responses: tuple[str | Messages, ...]
    weight: float = 1.0
    id: str = ""
    location: str = ""
    scores: tuple[float, ...] | None = None
    label: bool | None = None
    prompt_probability: float | None = None
    tools: list[dict[str, Any]] | None = None
    template_kwargs: dict[str, Any] = dataclasses.field(default_factory=dict)
    oddities: tuple[str, ...] = ()


def parse(row: dict[str, Any], location: str, name: str = "") -> Example:
    """One row to an example.

    Args:
        row: The data's columns.
        location: "<path>:<row>".
        name: What a row without an id is called; "": by its location without the folders.

    Raises:
        BadRow: If the row cannot be used.
    """
    row = _present(row)
    form = _form_of(row)
    if missing := [column for column in form if column not in row]:
        raise BadRow(f"no `{missing[0]}`; needed {' and '.join(f'`{column}`' for column in form)}")
    values, scores = _entries_of(row, form) if form in LISTS else ({n: row[n] for n in form}, _pair_scores(row))
    prompt, responses = _split_messages(row["messages"]) if form == ("messages",) else _split(row, form, values)
    tools, template_kwargs = tools_of(row), template_kwargs_of(row)
    _check_parts(prompt, dict(zip(values, responses, strict=True)))
    if isinstance(prompt, str) and (tools or template_kwargs):
        raise BadRow(f"`{CONTEXT[0 if tools else 1]}` beside text; it is for chat messages, which a template renders")
    oddities = ["examples_with_later_turns"] if _has_later_turns(prompt, responses) else []
    if scores is not None and form in LISTS:
        ranked = sorted(zip(scores, responses, strict=True), key=lambda pair: -pair[0])  # stable
        oddities += ["examples_sorted_by_score"] if [score for score, _ in ranked] != scores else []
        scores, responses = zip(*ranked, strict=True)
    elif scores is not None and scores[0] < scores[1]:
        oddities.append("pairs_scored_against_their_order")
    return Example(
        prompt,
        tuple(responses),
        weight=_weight_of(row),
        id=_id_of(row, name or Path(location).name),
        location=location,
        scores=None if scores is None else tuple(scores),
        label=_label_of(row) if "label" in FORMS[form] else None,
        prompt_probability=_prompt_probability_of(row) if "prompt_probability" in FORMS[form] else None,
        tools=tools,
        template_kwargs=template_kwargs,
        oddities=tuple(oddities),
    )


def unused_names(row: dict[str, Any]) -> list[str]:
    """What a good row holds beyond what an example needs."""
    row = _present(row)
    form = _form_of(row)
    used = {"id", "weight", *CONTEXT, *form, *FORMS[form], _prompt_column(row, form)}
    names = [column for column in row if column not in used]
    for column in row.keys() & used - {*CONTEXT}:
        fields = FIELDS
        for entry in row[column] if isinstance(row[column], list) else []:
            if isinstance(entry, dict):
                if (column,) in LISTS:
                    message = FIELDS - {*TEXTS} if "role" in entry else set()
                    fields = message | {_first(entry, TEXTS), _first(entry, SCORES)}
                names += [f"{column}[].{field}" for field in entry if field not in fields and entry[field] is not None]
    return names


def _present(row: dict[str, Any]) -> dict[str, Any]:
    """A row's columns that are not null, lists as lists."""
    return {
        column: value if column == "chat_template_kwargs" else _listed(value)
        for column, value in row.items()
        if value is not None
    }


def _listed(value: Any) -> Any:
    """An object of equally long lists as the list of objects that it stands for; everything else as it is."""
    if not isinstance(value, dict) or not value or not all(isinstance(column, list) for column in value.values()):
        return value
    if len({len(column) for column in value.values()}) > 1:
        return value
    return [dict(zip(value, entries, strict=True)) for entries in zip(*value.values(), strict=True)]


def _form_of(row: dict[str, Any]) -> tuple[str, ...]:
    """The columns that hold a row's responses."""
    for form in FORMS:
        if any(row.get(name) is not None for name in form):
            return form
    columns = ", ".join(f"`{name}`" for name in row) or "none"
    raise BadRow(
        "no responses: needed `chosen` and `rejected`, `responses`, `completions`, `response`, `completion` or "
        f"`messages`, got the columns {shortened(columns)}"
    )


def _prompt_column(row: dict[str, Any], form: tuple[str, ...]) -> str:
    """What the prompt's column is called."""
    return "instruction" if form == ("completions",) and "prompt" not in row else "prompt"


def _entries_of(row: dict[str, Any], form: tuple[str, ...]) -> tuple[dict[str, Any], list[float] | None]:
    """A list's responses, each under a name for messages, and their scores."""
    (column,) = form
    entries = row[column]
    if not isinstance(entries, list) or not entries:
        raise BadRow(f"`{column}` is {described(entries)}, needed a list of at least one response")
    values, scores = {}, {}
    for place, entry in enumerate(entries):
        name = f"{column}[{place}]"
        if isinstance(entry, dict):
            if (found := entry.get(_first(entry, SCORES))) is not None:
                scores[place] = _number(f"{name}.{_first(entry, SCORES)}", found)
            entry = [entry] if "role" in entry else entry.get(_first(entry, TEXTS))
        values[name] = entry
    if scores and ("scores" in row or len(scores) < len(entries)):
        both = "and so does `scores`" if "scores" in row else f"the other {len(entries) - len(scores)} do not"
        raise BadRow(f"{len(scores)} of {len(entries)} `{column}` bring a score, {both}")
    if "scores" not in row:
        return values, list(scores.values()) or None
    if not isinstance(row["scores"], list) or len(row["scores"]) != len(entries):
        raise BadRow(f"`scores` is {described(row['scores'])}, needed a list of {len(entries)} numbers, one a response")
    return values, [_number(f"scores[{place}]", score) for place, score in enumerate(row["scores"])]


def _pair_scores(row: dict[str, Any]) -> list[float] | None:
    """The scores of a pair; None without, and for a single response."""
    found = [name for name in ("score_chosen", "score_rejected") if name in row and "chosen" in row]
    if len(found) == 1:
        raise BadRow(f"`{found[0]}` alone; needed both of `score_chosen` and `score_rejected`, or neither")
    return [_number(name, row[name]) for name in found] or None


def _first(entry: dict[str, Any], names: Sequence[str]) -> str:
    """The first of the names that an object has; the first of all if it has none."""
    return next((name for name in names if entry.get(name) is not None), names[0])


def _split(
    row: dict[str, Any], form: tuple[str, ...], values: dict[str, Any]
) -> tuple[str | Messages, Sequence[str | Messages]]:
    """A row's prompt and its responses, either all text or all messages."""
    responses = [text_or_messages(name, value) for name, value in values.items()]
    column = _prompt_column(row, form)
    if column not in row:
        return _split_pair(responses, form)
    prompt = text_or_messages(column, row[column])
    if isinstance(prompt, str) and all(isinstance(response, str) for response in responses):
        return prompt, responses
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    responses = [[{"role": "assistant", "content": r}] if isinstance(r, str) else r for r in responses]
    # Some data repeat the prompt at the head of each response.
    return prompt, [r[len(prompt) :] if r[: len(prompt)] == prompt else r for r in responses]


def _split_pair(
    responses: list[str | Messages], form: tuple[str, ...]
) -> tuple[str | Messages, Sequence[str | Messages]]:
    """The prompt that the conversations of a pair without one have in common, and the rest of each."""
    if form != ("chosen", "rejected"):
        raise BadRow("no `prompt`; only a pair may do without")
    chosen, rejected = responses
    if isinstance(chosen, str) and isinstance(rejected, str):
        return split_turns(chosen, rejected)
    if isinstance(chosen, str) or isinstance(rejected, str):
        raise BadRow("no `prompt`, and one of `chosen` and `rejected` is text, the other messages")
    common = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(chosen, rejected, strict=False)))
    if not common:
        raise BadRow("no `prompt`, and `chosen` and `rejected` have no leading message in common")
    if chosen != rejected and common == min(len(chosen), len(rejected)):
        raise BadRow("no `prompt`, and one of `chosen` and `rejected` is the beginning of the other")
    if chosen == rejected:
        common -= 1
    return chosen[:common], [chosen[common:], rejected[common:]]


def split_turns(chosen: str, rejected: str) -> tuple[str, list[str]]:
    r"""Splits two Human/Assistant conversations after the last "\n\nAssistant:" up to which they are equal.

    Never after their last common character: that would eat the words with which both answers begin.
    """
    prompt = ""
    for turn in re.finditer("\n\nAssistant:", chosen):
        if not rejected.startswith(chosen[: turn.end()]):
            break
        prompt = chosen[: turn.end()]
    if not prompt.startswith("\n\nHuman:"):
        raise BadRow(
            r"no `prompt`, and `chosen` and `rejected` do not begin with a common \n\nHuman: … \n\nAssistant:; "
            "needed a column `prompt`"
        )
    return prompt, [chosen[len(prompt) :], rejected[len(prompt) :]]


def _split_messages(value: Any) -> tuple[Messages, Sequence[str | Messages]]:
    """A conversation's prompt and its last message."""
    messages = text_or_messages("messages", value)
    if isinstance(messages, str):
        raise BadRow("`messages` is text, needed a list of messages")
    return messages[:-1], [messages[-1:]]


def _check_parts(prompt: str | Messages, responses: dict[str, str | Messages]) -> None:
    """Refuses what no objective can learn from."""
    if isinstance(prompt, list) and not prompt:
        raise BadRow("the conversation is a single message: needed a prompt before the response")
    if isinstance(prompt, list) and prompt[-1]["role"] == "assistant":
        raise BadRow("the prompt ends in an assistant message: needed one that the assistant answers")
    for name, response in responses.items():
        roles = [entry["role"] for entry in response] if isinstance(response, list) else ["assistant"]
        if not roles or roles[0] != "assistant" or roles[-1] != "assistant":
            raise BadRow(f"`{name}` does not begin and end in an assistant message after the prompt")
        if says_nothing(response):
            raise BadRow(f"`{name}` is empty")
    for (name, response), (other, twin) in itertools.combinations(responses.items(), 2):
        if response == twin:
            raise BadRow(f"`{name}` and `{other}` are equal")


def _weight_of(row: dict[str, Any]) -> float:
    """The row's weight, 1 unless given."""
    weight = row.get("weight", 1.0)
    if not _is_number(weight) or not 0 <= weight <= FLOAT32_MAX:  # NaN fails both comparisons
        raise BadRow(f"`weight` is {described(weight)}, needed a finite number >= 0")
    return float(weight)


def _number(name: str, value: Any) -> float:
    """A score."""
    if not _is_number(value) or not abs(value) <= FLOAT32_MAX:
        raise BadRow(f"`{name}` is {described(value)}, needed a finite number")
    return float(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _label_of(row: dict[str, Any]) -> bool | None:
    """Whether the response is wanted; None if the row does not say."""
    label = row.get("label")
    if label is not None and not isinstance(label, bool):
        raise BadRow(f"`label` is {described(label)}, needed true (wanted) or false")
    return label


def _prompt_probability_of(row: dict[str, Any]) -> float | None:
    """How probable it is that a response to the row's prompt is wanted; None if the row does not say."""
    probability = row.get("prompt_probability")
    if probability is not None and (not _is_number(probability) or not 0 <= probability <= 1):
        raise BadRow(f"`prompt_probability` is {described(probability)}, needed a number from 0 to 1")
    return None if probability is None else float(probability)


def _id_of(row: dict[str, Any], name: str) -> str:
    """The row's id, or else its name."""
    identity = row.get("id", "")
    if isinstance(identity, bool) or not isinstance(identity, str | int):
        raise BadRow(f"`id` is {described(identity)}, needed text or an integer")
    check_unicode("id", str(identity))
    return str(identity) or name


def _has_later_turns(prompt: str | Messages, responses: Sequence[str | Messages]) -> bool:
    """Whether a response goes on beyond the assistant's turn."""
    if isinstance(prompt, str):
        return prompt.startswith("\n\nHuman:") and any("\n\nHuman:" in text for text in responses)
    messages = [entry for response in responses if isinstance(response, list) for entry in response]
    return any(entry["role"] != "assistant" for entry in messages)
