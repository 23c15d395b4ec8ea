"""Reads the turns of conversations in rows of data, in the formats of several datasets, and their tools."""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from align_ext.data.choices import text_of
from align_ext.system.messages import shown
from align_ext.system.reading import parse_json

Turn = tuple[str, ...]
"""Role (system, user, assistant, tool) and text; then, if the turn has more, the rest of the message as JSON.

The first turn of a prompt may have the role "tools": its text is the JSON list of the tools.
"""
Prompt = str | tuple[Turn, ...]
"""What is asked: a text, or turns; no turns at all: nothing is asked, and the answer is a plain text."""

TOOLS = "tools"
_ROLES = {"system": "system", "user": "user", "assistant": "assistant", "human": "user", "gpt": "assistant",
          "tool": "tool"}  # fmt: skip
_MAX_TURNS = 1000
_OF_TOOL = ("name", "tool_call_id")  # what a turn of a tool may have beside its text
_THINKING = re.compile(r"^\s*<think>.*?</think>", re.DOTALL)


def turns_of(column: str, value: Any) -> tuple[Turn, ...]:
    """Reads a list of turns, {"role": ..., "content": text} or {"from": ..., "value": text} each.

    The text may be a list of parts, {"type": "text", "text": text} each. A turn of the assistant may
    have tool_calls beside its text or in its place, a turn of a tool a name and a tool_call_id.

    Raises:
        ValueError: it is no such list, or a turn has other content than text, or an unknown role.
    """
    if not isinstance(value, list) or not 0 < len(value) <= _MAX_TURNS:
        raise ValueError(f"the column {column} holds {shown(value)}: it must be a list of 1 to {_MAX_TURNS} turns")
    return tuple(_turn(f"{column}, turn {number},", turn) for number, turn in enumerate(value, start=1))


def _turn(position: str, turn: Any) -> Turn:
    entries = {key: x for key, x in turn.items() if x not in (None, [])} if isinstance(turn, dict) else {}
    role, content = ("from", "value") if "from" in entries else ("role", "content")
    who = _ROLES.get(entries[role]) if isinstance(entries.get(role), str) else None
    allowed = {"assistant": ("tool_calls",), "tool": _OF_TOOL}.get(who or "", ())
    rest = {key: x for key, x in entries.items() if key in allowed}
    if set(entries) - set(rest) != {role, content} and not (
        set(entries) - set(rest) == {role} and "tool_calls" in rest
    ):
        raise ValueError(f"the column {position} holds {shown(turn)}: a turn is a role and a text, "
                         '{"role": "user", "content": ...}, with tool_calls of the assistant, and no more')  # fmt: skip
    if who is None:
        raise ValueError(f"the column {position} is of {shown(entries[role])}: it must be of {', '.join(_ROLES)}")
    text = text_of(position, _joined(position, entries.get(content, "")))
    if not text.strip() and "tool_calls" not in rest:
        raise ValueError(f"the column {position} is empty")
    if "tool_calls" in rest:
        rest["tool_calls"] = _calls(position, rest["tool_calls"])
    for key in _OF_TOOL:
        if key in rest:
            text_of(f"{position} {key},", rest[key])
    return (who, text, _json(rest)) if rest else (who, text)


def _joined(position: str, content: Any) -> Any:
    """Returns a list of parts {"type": "text", "text": ...} as one text, as chat templates join them."""
    if not isinstance(content, list):
        return content
    for part in content:
        if not isinstance(part, dict) or "type" not in part:
            raise ValueError(f"the column {position} holds {shown(part)}: a part is an object with a type and a text")
        held = {key for key, value in part.items() if value is not None}
        if part["type"] != "text" or held != {"type", "text"}:
            kind = shown(part["type"]) if part["type"] != "text" else "'text' that is no text alone"
            raise ValueError(f"the column {position} holds a part of type {kind}: a model of texts learns texts alone")
    return "".join(text_of(position, part["text"]) for part in content)


def _calls(position: str, calls: Any) -> list[Any]:
    """Checks tool_calls; arguments that are JSON text become an object, as chat templates want them."""
    found = []
    for call in calls if isinstance(calls, list) else [calls]:
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise ValueError(
                f"the column {position} holds the tool call {shown(call)}: it must be an object "
                '{"name": ..., "arguments": {...}}, or {"function": {...}} with such an object'
            )
        arguments = function.get("arguments", {})
        if isinstance(arguments, str):
            try:
                arguments = parse_json(arguments)
            except ValueError as error:
                raise ValueError(
                    f"the column {position} holds arguments that are no JSON, {shown(arguments)}"
                ) from error
        if not isinstance(arguments, dict):
            raise ValueError(f"the column {position} holds the arguments {shown(arguments)}: they must be an object")
        function = {**function, "arguments": arguments}
        found.append({**call, "function": function} if "function" in call else function)
    return found


def tools_turn(column: str, value: Any) -> Turn:
    """Reads a list of tools, or its JSON text, as the turn that stands before all others of a prompt.

    Raises:
        ValueError: it is no such list.
    """
    tools = value
    if isinstance(value, str):
        try:
            tools = parse_json(value)
        except ValueError as error:
            raise ValueError(f"the column {column} holds {shown(value)}, which is no JSON") from error
    if not isinstance(tools, list) or not all(isinstance(tool, dict) and _name_of(tool) for tool in tools):
        raise ValueError(f"the column {column} holds {shown(value)}: it must be a list of tools, each an object with a "
                         'name, or {"function": {...}} with such an object')  # fmt: skip
    return (TOOLS, _json(tools))


def messages_of(prompt: Sequence[Turn]) -> tuple[list[dict[str, Any]], list[dict[str, Any]] | None]:
    """Returns the messages of turns, and their tools or None, in the form that chat templates take."""
    tools = json.loads(prompt[0][1]) if prompt and prompt[0][0] == TOOLS else None
    messages = [
        {"role": role, "content": text, **(json.loads(rest[0]) if rest else {})}
        for role, text, *rest in (prompt if tools is None else prompt[1:])
    ]
    return messages, tools


def left_out(message: Mapping[str, Any], text: str) -> bool:
    """Whether a conversation's rendered text lacks the text or a tool call of a message.

    The thinking at the start of an assistant's turn may be left out, as some templates do with all but the last.
    """
    said = message["content"].strip()
    if message["role"] == "assistant" and said not in text:
        said = visible_text(message)
    written = (said, *(json.dumps(said, ensure_ascii=ascii)[1:-1] for ascii in (True, False)))
    return not any(form in text for form in written) or any(
        str(name) not in text for name in map(_name_of, message.get("tool_calls", ()))
    )


def visible_text(message: Mapping[str, Any]) -> str:
    """Returns the text of a message without the thinking at its start."""
    return _THINKING.sub("", message["content"]).strip()


def tool_names(tools: Sequence[Mapping[str, Any]]) -> list[str]:
    """Returns the names of tools."""
    return [_name_of(tool) for tool in tools]


def _name_of(tool: Mapping[str, Any]) -> str:
    """Returns the name of a tool or of a tool call, or "" if it has none."""
    function = tool.get("function", tool)
    name = function.get("name") if isinstance(function, Mapping) else None
    return name if isinstance(name, str) else ""


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def calls_score(gold: str, text: str) -> float:
    """1 if a generated text holds the tool calls of a gold answer, in its order and no others, else 0.

    Args:
        gold: the JSON list of the calls.
        text: the text, in which every object {"name": ..., "arguments" or "parameters": ...} counts as a call.
    """
    calls, decoder, position = [], json.JSONDecoder(), 0
    while (position := text.find("{", position)) >= 0:
        try:
            found, position = decoder.raw_decode(text, position)
        except (ValueError, RecursionError):
            position += 1
            continue
        function = found.get("function", found)
        if isinstance(function, dict) and "name" in function:
            calls.append((function["name"], function.get("arguments", function.get("parameters"))))
    functions = [call.get("function", call) for call in json.loads(gold)]
    return float(calls == [(function["name"], function["arguments"]) for function in functions])


def text_asked(prompt: Prompt) -> str:
    """Returns all text of a prompt."""
    return prompt if isinstance(prompt, str) else "\n".join(turn[1] for turn in prompt)


def text_with_roles(prompt: Prompt) -> str:
    """Returns a prompt for people: of a conversation each turn as "role: text", with what a turn has more as JSON."""
    if isinstance(prompt, str):
        return prompt
    return "\n".join(f"{role}: {' '.join(part for part in parts if part)}" for role, *parts in prompt)


def append_text(prompt: Prompt, text: str) -> Prompt:
    """Returns a prompt with a text appended, in the last turn of a conversation."""
    if isinstance(prompt, str):
        return f"{prompt}\n{text}"
    *before, (role, last, *rest) = prompt
    return (*before, (role, f"{last}\n{text}", *rest))
