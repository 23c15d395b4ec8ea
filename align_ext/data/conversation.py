"""Conversations in rows of data: their turns, whatever the row calls them."""

from __future__ import annotations

from typing import Any

from align_ext.data.choices import text_of
from align_ext.system.reading import shown

Turn = tuple[str, str]  # role (system, user or assistant) and text

_ROLES = {"system": "system", "user": "user", "assistant": "assistant", "human": "user", "gpt": "assistant"}
_MOST_TURNS = 1000


def turns_of(column: str, value: Any) -> tuple[Turn, ...]:
    """Reads a list of turns, {"role": ..., "content": text} or {"from": ..., "value": text} each.

    Raises:
        ValueError: it is none, or a turn holds more than a text or is nobody's.
    """
    if not isinstance(value, list) or not 0 < len(value) <= _MOST_TURNS:
        raise ValueError(f"the column {column} holds {shown(value)}: it must be a list of 1 to {_MOST_TURNS} turns")
    turns = []
    for number, turn in enumerate(value, start=1):
        place = f"{column}, turn {number},"
        held = {key: x for key, x in turn.items() if x is not None} if isinstance(turn, dict) else {}
        role, content = ("from", "value") if "from" in held else ("role", "content")
        if set(held) != {role, content}:
            raise ValueError(f"the column {place} holds {shown(turn)}: a turn is a role and a text, "
                             '{"role": "user", "content": ...}, and no more')  # fmt: skip
        if not isinstance(held[role], str) or held[role] not in _ROLES:
            raise ValueError(f"the column {place} is of {shown(held[role])}: it must be of {', '.join(_ROLES)}")
        text = text_of(place, held[content])
        if not text.strip():
            raise ValueError(f"the column {place} is empty")
        turns.append((_ROLES[held[role]], text))
    return tuple(turns)


def text_asked(prompt: str | tuple[Turn, ...]) -> str:
    """All text of a prompt."""
    return prompt if isinstance(prompt, str) else "\n".join(text for _, text in prompt)


def with_more(prompt: str | tuple[Turn, ...], text: str) -> str | tuple[Turn, ...]:
    """A prompt with a text below it, in the last turn of a conversation."""
    if isinstance(prompt, str):
        return f"{prompt}\n{text}"
    *before, (role, last) = prompt
    return (*before, (role, f"{last}\n{text}"))
