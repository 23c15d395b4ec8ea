"""Reads the turns of conversations in rows of data, in the formats of several datasets."""

from typing import Any

from align_ext.data.choices import text_of
from align_ext.system.messages import shown

Turn = tuple[str, str]  # role (system, user or assistant) and text

_ROLES = {"system": "system", "user": "user", "assistant": "assistant", "human": "user", "gpt": "assistant"}
_MAX_TURNS = 1000


def turns_of(column: str, value: Any) -> tuple[Turn, ...]:
    """Reads a list of turns, {"role": ..., "content": text} or {"from": ..., "value": text} each.

    Raises:
        ValueError: it is no such list, or a turn has other content than text, or an unknown role.
    """
    if not isinstance(value, list) or not 0 < len(value) <= _MAX_TURNS:
        raise ValueError(f"the column {column} holds {shown(value)}: it must be a list of 1 to {_MAX_TURNS} turns")
    turns = []
    for number, turn in enumerate(value, start=1):
        position = f"{column}, turn {number},"
        entries = {key: x for key, x in turn.items() if x is not None} if isinstance(turn, dict) else {}
        role, content = ("from", "value") if "from" in entries else ("role", "content")
        if set(entries) != {role, content}:
            raise ValueError(f"the column {position} holds {shown(turn)}: a turn is a role and a text, "
                             '{"role": "user", "content": ...}, and no more')  # fmt: skip
        if not isinstance(entries[role], str) or entries[role] not in _ROLES:
            raise ValueError(f"the column {position} is of {shown(entries[role])}: it must be of {', '.join(_ROLES)}")
        text = text_of(position, entries[content])
        if not text.strip():
            raise ValueError(f"the column {position} is empty")
        turns.append((_ROLES[entries[role]], text))
    return tuple(turns)


def text_asked(prompt: str | tuple[Turn, ...]) -> str:
    """Returns all text of a prompt."""
    return prompt if isinstance(prompt, str) else "\n".join(text for _, text in prompt)


def append_text(prompt: str | tuple[Turn, ...], text: str) -> str | tuple[Turn, ...]:
    """Returns a prompt with a text appended, in the last turn of a conversation."""
    if isinstance(prompt, str):
        return f"{prompt}\n{text}"
    *before, (role, last) = prompt
    return (*before, (role, f"{last}\n{text}"))
