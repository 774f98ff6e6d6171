"""Rows of a data set to examples: a prompt and its K responses, as text or as chat messages.

A source is a function from a path to (location, row), where a row is a dict of the data's own columns; what the columns
mean is the same for all of them. To add a source, write that function and give it a line in `SOURCES`.

A row holds its responses in the first of these forms that it has; each is text or a list of messages (role, content):

    chosen, rejected       a pair
    responses              a list, best first
    response | completion  a single one
    messages               a conversation: its last message is the response

The prompt is the column `prompt`. A pair may do without: its prompt is what both conversations begin with, in whole
messages or, for text, in whole turns of Anthropic's Human/Assistant form. `id` and `weight` are optional; null counts
as absent.
"""

import codecs
import dataclasses
import gzip
import itertools
import json
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from daajax.errors import UserError

Messages = list[dict[str, str]]

FORMS = (("chosen", "rejected"), ("responses",), ("response",), ("completion",), ("messages",))
ROLES = ("system", "developer", "user", "assistant", "tool")
NAMED_BAD_ROWS = 5
FLOAT32_MAX = float(np.finfo(np.float32).max)  # weights are kept as float32


class BadRow(Exception):  # noqa: N818 - it describes a row; `BadRows` decides whether it is an error
    """A row that cannot be used; its text is the reason."""


@dataclasses.dataclass
class BadRows:
    """Counts the rows that cannot be used, and ends the run once there are more than are tolerated.

    Attributes:
        tolerated: Rows, `data.max_bad_rows`.
        count: Rows so far.
        reasons: Place and reason of the first few.
    """

    tolerated: int = 0
    count: int = 0
    reasons: list[str] = dataclasses.field(default_factory=list)

    def add(self, location: str, reason: BadRow) -> None:
        """Counts one more.

        Raises:
            UserError: If it is one too many; names the first bad row.
        """
        self.count += 1
        if len(self.reasons) < NAMED_BAD_ROWS:
            self.reasons.append(f"{location}: {reason}")
        if self.count > self.tolerated:
            raise UserError(
                f"{self.reasons[0]}. {self.count} bad row(s), but data.max_bad_rows={self.tolerated}: "
                "mend or remove the row, or tolerate more with data.max_bad_rows"
            )


@dataclasses.dataclass(frozen=True)
class Example:
    """A prompt and K responses to it, all of them text or all of them messages.

    Attributes:
        prompt: What the responses continue.
        responses: 0 the chosen, 1 the rejected one; best first where there are more; a single one for SFT.
        weight: Multiplies the example's loss; finite, >= 0.
        id: The data's own id, or "<file>:<line>".
        location: Where the row is, for messages to the user.
    """

    prompt: str | Messages
    responses: tuple[str | Messages, ...]
    weight: float = 1.0
    id: str = ""
    location: str = ""


@dataclasses.dataclass(frozen=True)
class Examples:
    """What a source held.

    Attributes:
        examples: The good rows, in the order of the data.
        counters: `rows`, `bad_rows` and `examples_with_later_turns`, in which a response goes on to further user turns:
            they are scored with it.
        notices: One line each, to be printed: columns not used, bad rows tolerated.
        bad_rows: The account of bad rows, which tokenization continues.
    """

    examples: list[Example]
    counters: dict[str, int] = dataclasses.field(default_factory=dict)
    notices: list[str] = dataclasses.field(default_factory=list)
    bad_rows: BadRows = dataclasses.field(default_factory=BadRows)


def read(name: str, path: str | Path, *, limit: int | None = None, max_bad_rows: int = 0) -> Examples:
    """Reads a source's rows as examples.

    Args:
        name: A key of `SOURCES`, `data.name`.
        path: Where the data are, `data.path`.
        limit: Examples to stop after, `data.limit`; None reads all of them.
        max_bad_rows: Rows that may be unusable, `data.max_bad_rows`; they are skipped and counted, the first few named.

    Raises:
        UserError: If the data cannot be read, hold no example, or hold more bad rows than are tolerated.
    """
    if name not in SOURCES:
        raise UserError(f"data.name={name!r} is no source; known are {', '.join(sorted(SOURCES))}")
    check_count("data.limit", limit, least=1, optional=True)
    check_count("data.max_bad_rows", max_bad_rows, least=0)
    examples, bad_rows = [], BadRows(max_bad_rows)
    unused: dict[str, None] = {}  # in order of appearance
    rows = later_turns = 0
    for location, row in SOURCES[name](Path(path)):
        rows += 1
        try:
            if isinstance(row, BadRow):
                raise row
            example = parse(row, location)
        except BadRow as reason:
            bad_rows.add(location, reason)
            continue
        examples.append(example)
        unused.update(dict.fromkeys(_unused_names(row)))
        later_turns += _has_later_turns(example)
        if len(examples) == limit:
            break
    if not examples:
        found = f"{rows} rows, none of them good" if rows else "no rows"
        raise UserError(f"data.path={path} holds {found}; needed at least one example with a prompt and responses")
    notices = [f"columns not used: {', '.join(unused)}"] if unused else []
    notices += [f"bad row skipped: {reason}" for reason in bad_rows.reasons]
    counters = {"rows": rows, "bad_rows": bad_rows.count, "examples_with_later_turns": later_turns}
    return Examples(examples, counters, notices, bad_rows)


def check_count(name: str, value: int | None, *, least: int, optional: bool = False) -> None:
    """Refuses a number of things, named `name` in the config, that is not an integer of at least `least`."""
    if value is None and optional:
        return
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise UserError(f"{name}={value!r}: needed an integer >= {least}{' or None' if optional else ''}")


def parse(row: dict[str, Any], location: str) -> Example:
    """One row to an example.

    Args:
        row: The data's columns.
        location: "<path>:<line>"; without its folders it is the id of a row that has none.

    Raises:
        BadRow: If the row cannot be used.
    """
    row = {name: value for name, value in row.items() if value is not None}
    form = _form_of(row)
    if missing := [name for name in form if name not in row]:
        raise BadRow(f"no `{missing[0]}`; needed {' and '.join(f'`{name}`' for name in form)}")
    prompt, responses = _split_messages(row["messages"]) if form == ("messages",) else _split(row, form)
    names = form if len(form) == len(responses) else tuple(f"responses[{index}]" for index in range(len(responses)))
    _check_parts(prompt, dict(zip(names, responses, strict=True)))
    return Example(prompt, tuple(responses), _weight_of(row), _id_of(row, location), location)


def _form_of(row: dict[str, Any]) -> tuple[str, ...]:
    """The columns that hold a row's responses."""
    for form in FORMS:
        if any(row.get(name) is not None for name in form):
            return form
    columns = ", ".join(f"`{name}`" for name in row) or "none"
    raise BadRow(
        "no responses: needed `chosen` and `rejected`, `responses`, `response`, `completion` or `messages`, "
        f"got the columns {_shortened(columns)}"
    )


def _split(row: dict[str, Any], form: tuple[str, ...]) -> tuple[str | Messages, Sequence[str | Messages]]:
    """A row's prompt and its responses, either all text or all messages."""
    if form == ("responses",):
        if not isinstance(row["responses"], list) or not row["responses"]:
            raise BadRow(f"`responses` is {_described(row['responses'])}, needed a list of at least one response")
        values = {f"responses[{index}]": value for index, value in enumerate(row["responses"])}
    else:
        values = {name: row[name] for name in form}
    responses = [_text_or_messages(name, value) for name, value in values.items()]
    if "prompt" not in row:
        return _split_pair(responses)
    prompt = _text_or_messages("prompt", row["prompt"])
    if isinstance(prompt, str) and all(isinstance(response, str) for response in responses):
        return prompt, responses
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    responses = [[{"role": "assistant", "content": r}] if isinstance(r, str) else r for r in responses]
    # Some data repeat the prompt at the head of each response.
    return prompt, [r[len(prompt) :] if r[: len(prompt)] == prompt else r for r in responses]


def _split_pair(responses: list[str | Messages]) -> tuple[str | Messages, Sequence[str | Messages]]:
    """The prompt that the conversations of a pair without one have in common, and the rest of each."""
    if len(responses) != 2:
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
    messages = _text_or_messages("messages", value)
    if isinstance(messages, str):
        raise BadRow("`messages` is text, needed a list of messages")
    return messages[:-1], [messages[-1:]]


def _text_or_messages(name: str, value: Any) -> str | Messages:
    """Checks a column's type; of a message only role and content are kept."""
    if isinstance(value, str):
        _check_unicode(name, value)
        return value
    if not isinstance(value, list) or not value:
        raise BadRow(f"`{name}` is {_described(value)}, needed text or a list of messages")
    return [_message(f"{name}[{index}]", entry) for index, entry in enumerate(value)]


def _message(name: str, value: Any) -> dict[str, str]:
    """Checks one message."""
    if not isinstance(value, dict):
        raise BadRow(f"`{name}` is {_described(value)}, needed a message with `role` and `content`")
    for field in ("role", "content"):
        if not isinstance(value.get(field), str):
            raise BadRow(f"`{name}` has {_described(value.get(field))} as `{field}`, needed text")
        _check_unicode(name, value[field])
    if value["role"] not in ROLES:
        raise BadRow(f"`{name}` has the role {_shortened(repr(value['role']))}, known are {', '.join(ROLES)}")
    return {"role": value["role"], "content": value["content"]}


def _check_unicode(name: str, text: str) -> None:
    r"""Refuses half a surrogate pair, which JSON can spell (\ud800) and UTF-8 cannot."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise BadRow(f"`{name}` holds half a surrogate pair at character {error.start}, which is no text") from None


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
        if not (response if isinstance(response, str) else response[-1]["content"]).strip():
            raise BadRow(f"`{name}` is empty")
    for (name, response), (other, twin) in itertools.combinations(responses.items(), 2):
        if response == twin:
            raise BadRow(f"`{name}` and `{other}` are equal")


def _weight_of(row: dict[str, Any]) -> float:
    """The row's weight, 1 unless given."""
    weight = row.get("weight", 1.0)
    number = isinstance(weight, int | float) and not isinstance(weight, bool)
    if not number or not 0 <= weight <= FLOAT32_MAX:  # NaN fails both comparisons
        raise BadRow(f"`weight` is {_described(weight)}, needed a finite number >= 0")
    return float(weight)


def _id_of(row: dict[str, Any], location: str) -> str:
    """The row's id, or its file and line."""
    identity = row.get("id", "")
    if isinstance(identity, bool) or not isinstance(identity, str | int):
        raise BadRow(f"`id` is {_described(identity)}, needed text or an integer")
    _check_unicode("id", str(identity))
    return str(identity) or Path(location).name


def _has_later_turns(example: Example) -> bool:
    """Whether a response goes on beyond the assistant's turn."""
    if isinstance(example.prompt, str):
        return example.prompt.startswith("\n\nHuman:") and any("\n\nHuman:" in text for text in example.responses)
    messages = [entry for response in example.responses if isinstance(response, list) for entry in response]
    return any(entry["role"] == "user" for entry in messages)


def _unused_names(row: dict[str, Any]) -> list[str]:
    """What a good row holds beyond what an example needs."""
    form = _form_of(row)
    used = {"id", "weight", *form} | (set() if form == ("messages",) else {"prompt"})
    names = [name for name in row if name not in used]
    for name in used & row.keys():
        for entry in row[name] if isinstance(row[name], list) else []:
            if isinstance(entry, dict):
                names += [f"{name}[].{field}" for field in entry if field not in ("role", "content")]
    return names


def _described(value: Any) -> str:
    """A value in a message about it."""
    return "missing" if value is None else f"{type(value).__name__} {_shortened(repr(value))}"


def _shortened(text: str) -> str:
    """The beginning of a text, as one line that fits a message."""
    return text if len(text) <= 60 else text[:60] + "…"


def jsonl(path: Path) -> Iterator[tuple[str, dict[str, Any] | BadRow]]:
    """The lines of a JSONL file, or of one compressed by gzip; blank lines hold nothing.

    A line that is no JSON object comes as the reason. CRLF line ends and a byte order mark are taken as they come.
    """
    if not path.is_file():
        found = "is a folder" if path.is_dir() else "does not exist"
        raise UserError(f"data.path={path} {found}; needed a .jsonl or .jsonl.gz file")
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                content = line.removeprefix(codecs.BOM_UTF8).strip() if number == 1 else line.strip()
                if content:
                    yield f"{path}:{number}", _json_object(content)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"data.path={path} cannot be read to its end ({error}); copy or compress it again") from error


def _json_object(line: bytes) -> dict[str, Any] | BadRow:
    """One line's object, or why there is none."""
    try:
        row = json.loads(line.decode())
    except UnicodeDecodeError as error:
        return BadRow(f"not UTF-8 at byte {error.start} of the line")
    except json.JSONDecodeError as error:
        return BadRow(f"not JSON ({error.msg} at character {error.pos})")
    except (ValueError, RecursionError) as error:
        return BadRow(f"not JSON that can be read ({error})")
    if not isinstance(row, dict):
        return BadRow(f"{_described(row)}, needed a JSON object on each line")
    return row


SOURCES: dict[str, Callable[[Path], Iterator[tuple[str, dict[str, Any] | BadRow]]]] = {"jsonl": jsonl}
