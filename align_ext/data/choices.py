"""Reads the choices of a row, finds the right one, and writes every choice in the form of the answer."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from align_ext.system.messages import shown

_LIMIT = 1000  # the most choices of a row
_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_CLOSING = ".!)]\"' \t\r\n"  # characters that may follow a choice in an answer


def text_of(column: str, value: Any) -> str:
    """Returns the text of a column; an integer becomes its digits.

    Raises:
        ValueError: the value is of another type, or no valid Unicode text.
    """
    if type(value) is int:
        return str(value)
    if not isinstance(value, str):
        cure = ": write it as text, in quotes" if isinstance(value, (bool, float)) else ""
        raise ValueError(f"the column {column} holds {shown(value)}, a {type(value).__name__}, not text{cure}")
    if re.search(r"[\ud800-\udfff]", value):
        raise ValueError(f"the column {column} holds {shown(value)}, with half of a character (a lone surrogate)")
    return value


@dataclass(frozen=True)
class Choices:
    """The choices of a row.

    Attributes:
        texts: the text of each choice.
        names: the names of the choices: those in the row, or A, B, C and so on.
        named: whether the row has names for them.
    """

    texts: tuple[str, ...]
    names: tuple[str, ...]
    named: bool = False

    @classmethod
    def read(cls, column: str, value: Any) -> Choices:
        """Reads a list of texts, {"text": [...], "label": [...]}, or {"A": text, ...}.

        Raises:
            ValueError: the value is none of them.
        """
        names: Any = None
        if isinstance(value, dict) and set(value) == {"text", "label"} and isinstance(value["text"], list):
            value, names = value["text"], value["label"]
        elif isinstance(value, dict):  # names that only other rows of a table have are None here
            value = {name: text for name, text in value.items() if text is not None}
            names, value = list(value), list(value.values())
        if not isinstance(value, list) or not 2 <= len(value) <= _LIMIT:
            raise ValueError(f"the column {column} holds {shown(value)}: it must be a list of 2 to {_LIMIT} texts")
        if names is not None and (not isinstance(names, list) or len(names) != len(value)):
            raise ValueError(f"the column {column} has {len(value)} texts, and labels {shown(names)}")
        texts = tuple(text_of(column, text) for text in value)
        if not all(text.strip() for text in texts):
            raise ValueError(f"the column {column} holds an empty text: {shown(value)}")
        if len({text.strip() for text in texts}) == 1:
            raise ValueError(f"the column {column} offers nothing but {shown(texts[0])}: {shown(value)}")
        letters = _LETTERS if len(texts) <= len(_LETTERS) else ""
        matching = tuple(letters[: len(texts)] if names is None else (text_of(column, x) for x in names))
        return cls(texts, matching, names is not None)

    def matching(self, value: Any, by_name: bool = False) -> set[int]:
        """Returns the indices of the choices that an answer or label may mean: by text, by name or by index.

        Args:
            value: the answer or label.
            by_name: whether a text that is one of the row's names can only be that name.
        """
        found = {value} if type(value) is int and 0 <= value < len(self.texts) else set()
        if type(value) is int or isinstance(value, str):
            text_given = str(value).strip()
            names = {i for i, name in enumerate(self.names) if name.strip() == text_given}
            if by_name and self.named and isinstance(value, str) and names:
                return names
            found |= {i for i, text in enumerate(self.texts) if text.strip() == text_given}
            found |= names
        return found

    def equal_to(self, number: int) -> set[int]:
        """Returns the indices of the choices with the same text as one choice."""
        return {i for i, text in enumerate(self.texts) if text.strip() == self.texts[number].strip()}

    def forms(self, answer: str) -> dict[int, Form]:
        """Returns, by choice, the form in which an answer ends in it: its text, number from 1 ("answer3") or name."""
        found: dict[int, Form] = {}
        numbers = tuple(str(i + 1) for i in range(len(self.texts)))
        texts = tuple(text.strip() for text in self.texts)
        for marks, mark in ((texts, "-"), (numbers, "1."), (self.names, "A.")):
            ends = {i: form for i, text in enumerate(marks) if (form := _ending(answer, text, marks, mark))}
            longest = max((len(marks[i]) for i in ends), default=0)  # "dark red", not "red"
            found = {i: form for i, form in ends.items() if len(marks[i]) == longest} | found
            if mark == "-" and found:
                break
        return found

    def shown_in(self, prompt: str) -> bool:
        """Whether a prompt holds all choices in their order."""
        position = 0
        for text in map(str.strip, self.texts):
            edges = (r"(?<!\w)" if text[0].isalnum() else "", r"(?!\w)" if text[-1].isalnum() else "")
            found = re.compile(edges[0] + re.escape(text) + edges[1]).search(prompt, position)
            if found is None:
                return False
            position = found.end()
        return True

    def listed(self, mark: str) -> str:
        """Returns the choices as lines that begin with "-", the number or the name."""
        marks = {"-": ["-"] * len(self.texts), "1.": [f"{i + 1}." for i in range(len(self.texts))]}
        named = marks.get(mark) or [f"{name}." for name in self.names]
        return "\n".join(f"{name} {text}" for name, text in zip(named, self.texts, strict=True))


@dataclass(frozen=True)
class Form:
    """The form of an answer that names a choice: text before and after, marks of all choices, list mark."""

    before: str
    after: str
    marks: Sequence[str]
    mark: str

    def answers(self) -> tuple[str, ...]:
        """Returns the answer for every choice in this form."""
        return tuple(self.before + text + self.after for text in self.marks)


def _ending(answer: str, text: str, marks: Sequence[str], mark: str) -> Form | None:
    """Returns the form of an answer that ends in a text, unless the text is part of a longer word or number."""
    for after in dict.fromkeys(("", answer[len(answer.rstrip(_CLOSING)) :])):
        body = answer.removesuffix(after) if after else answer
        if not text or not body.endswith(text):
            continue
        before = body.removesuffix(text)
        if mark == "1.":  # a number without a text before it may also count from 0
            separate = bool(before) and not before[-1].isdigit()
        else:
            separate = not (before[-1:].isalnum() and text[0].isalnum())
        if separate:
            return Form(before, after, marks, mark)
    return None
