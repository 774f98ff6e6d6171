"""Chat messages, and what a chat template is given beside them: tools and further arguments.

A message has a `role` and, as text, a `content`; an assistant's may have `tool_calls` in its place: objects with a
`function` (or themselves) of `name` and `arguments`, an object, also as JSON. Templates know further texts: `TEXTS`.
The column `tools` is a list of JSON schemas, `chat_template_kwargs` an object of further arguments of the template,
such as `{"enable_thinking": false}`; both may come as JSON. null counts as absent throughout, because tables fill up
with it what a row does not have; only JSON as text keeps it.
"""

import json
from typing import Any

from daajax.data.bad_rows import BadRow, described, shortened

Messages = list[dict[str, Any]]

ROLES = ("system", "developer", "user", "assistant", "tool")
TEXTS = ("name", "tool_call_id", "reasoning_content", "thinking")
FIELDS = {"role", "content", "tool_calls", *TEXTS}
CONTEXT = ("tools", "chat_template_kwargs")  # columns
# Arguments of `apply_chat_template` that are no business of the data.
RESERVED = (
    *("messages", "conversation", "conversations", "tools", "chat_template", "add_generation_prompt"),
    *("continue_final_message", "tokenize", "sanitize_control_tokens", "padding", "truncation", "max_length"),
    *("return_tensors", "return_dict", "return_assistant_tokens_mask", "tokenizer_kwargs"),
)


def text_or_messages(name: str, value: Any) -> str | Messages:
    """Checks a column's type; of a message only `FIELDS` are kept."""
    if isinstance(value, str):
        check_unicode(name, value)
        return value
    if not isinstance(value, list) or not value:
        raise BadRow(f"`{name}` is {described(value)}, needed text or a list of messages")
    return [_message(f"{name}[{index}]", entry) for index, entry in enumerate(value)]


def says_nothing(response: str | Messages) -> bool:
    """Whether a response ends in an empty answer."""
    if isinstance(response, str):
        return not response.strip()
    return not response[-1].get("content", "").strip() and "tool_calls" not in response[-1]


def tools_of(row: dict[str, Any]) -> list[dict[str, Any]] | None:
    """The column `tools`; None without, and if there are none in it."""
    tools = _given("tools", row, [])
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise BadRow(f"`tools` is {described(tools)}, needed a list of JSON schemas, or that list as JSON")
    return tools or None


def template_kwargs_of(row: dict[str, Any]) -> dict[str, Any]:
    """The column `chat_template_kwargs`; empty without."""
    given = _given("chat_template_kwargs", row, {})
    if not isinstance(given, dict):
        raise BadRow(f"`chat_template_kwargs` is {described(given)}, needed an object, or one as JSON")
    if refused := [name for name in given if name in RESERVED]:
        raise BadRow(f"`chat_template_kwargs` has {refused[0]!r}, which is not for the data to set")
    return given


def check_unicode(name: str, text: str) -> None:
    r"""Refuses half a surrogate pair, which JSON can spell (\ud800) and UTF-8 cannot."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise BadRow(f"`{name}` holds half a surrogate pair at character {error.start}, which is no text") from None


def _message(name: str, value: Any) -> dict[str, Any]:
    """Checks one message."""
    if not isinstance(value, dict):
        raise BadRow(f"`{name}` is {described(value)}, needed a message with `role` and `content`")
    found = {field: value[field] for field in value if field in FIELDS and value[field] is not None}
    if calls := found.pop("tool_calls", None):
        found["tool_calls"] = _tool_calls(f"{name}.tool_calls", calls)
    needed = {"role"} if calls else {"role", "content"}
    for field in ("role", "content", *TEXTS):
        if field in needed | found.keys() and not isinstance(found.get(field), str):
            raise BadRow(f"`{name}` has {described(found.get(field))} as `{field}`, needed text")
        check_unicode(name, found.get(field, ""))
    if found["role"] not in ROLES:
        raise BadRow(f"`{name}` has the role {shortened(repr(found['role']))}, known are {', '.join(ROLES)}")
    if calls and found["role"] != "assistant":
        raise BadRow(f"`{name}` has `tool_calls` but the role {found['role']!r}; only the assistant calls tools")
    return found


def _tool_calls(name: str, value: Any) -> list[dict[str, Any]]:
    """Checks the calls of a message; their arguments become objects."""
    if not isinstance(value, list):
        raise BadRow(f"`{name}` is {described(value)}, needed a list of calls")
    calls = []
    for place, call in enumerate(value):
        call = _without_nulls(call)
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise BadRow(f"`{name}[{place}]` is {described(call)}, needed a call with a `function` that has a `name`")
        if isinstance(function.get("arguments"), str):
            # Templates print an object as JSON, and would print JSON as quoted text.
            parsed = _parsed(f"{name}[{place}].arguments", function["arguments"] or "{}")
            if not isinstance(parsed, dict):
                raise BadRow(f"`{name}[{place}].arguments` is {described(parsed)}, needed an object")
            arguments = {"arguments": parsed}
            call = call | ({"function": function | arguments} if "function" in call else arguments)
        check_unicode(name, json.dumps(call, ensure_ascii=False, default=str))
        calls.append(call)
    return calls


def _given(column: str, row: dict[str, Any], absent: Any) -> Any:
    """A column that may be JSON."""
    value = row.get(column, absent)
    value = _parsed(column, value) if isinstance(value, str) else _without_nulls(value)
    check_unicode(column, json.dumps(value, ensure_ascii=False, default=str))
    return value


def _parsed(name: str, text: str) -> Any:
    """What JSON says."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadRow(f"`{name}` is text but not JSON ({error}): {shortened(repr(text))}") from None


def _without_nulls(value: Any) -> Any:
    """The same without the entries of objects that are null."""
    if isinstance(value, dict):
        return {name: _without_nulls(entry) for name, entry in value.items() if entry is not None}
    return [_without_nulls(entry) for entry in value] if isinstance(value, list) else value
