"""The choices of a row: their texts, which of them is right, and every one in the form that the answer has."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from align_ext.system.reading import shown

_MOST = 1000  # choices of a row
_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_CLOSING = ".!)]\"' \t\r\n"  # what may follow a choice in an answer


def text_of(column: str, value: Any) -> str:
    """The text that a column holds; an integer is its digits.

    Raises:
        ValueError: it is something else, or no Unicode text.
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
    """What a row offers to choose from.

    Attributes:
        texts: each choice.
        names: what the row calls them: its own names, or A, B, C and so on.
        named: whether these are the row's own.
    """

    texts: tuple[str, ...]
    names: tuple[str, ...]
    named: bool = False

    @classmethod
    def read(cls, column: str, value: Any) -> Choices:
        """Reads a list of texts, {"text": [...], "label": [...]}, or {"A": text, ...}.

        Raises:
            ValueError: it is none of them.
        """
        names: Any = None
        if isinstance(value, dict) and set(value) == {"text", "label"} and isinstance(value["text"], list):
            value, names = value["text"], value["label"]
        elif isinstance(value, dict):  # without the names that other rows of a table have
            value = {name: text for name, text in value.items() if text is not None}
            names, value = list(value), list(value.values())
        if not isinstance(value, list) or not 2 <= len(value) <= _MOST:
            raise ValueError(f"the column {column} holds {shown(value)}: it must be a list of 2 to {_MOST} texts")
        if names is not None and (not isinstance(names, list) or len(names) != len(value)):
            raise ValueError(f"the column {column} has {len(value)} texts, and labels {shown(names)}")
        texts = tuple(text_of(column, text) for text in value)
        if not all(text.strip() for text in texts):
            raise ValueError(f"the column {column} holds an empty text: {shown(value)}")
        if len({text.strip() for text in texts}) == 1:
            raise ValueError(f"the column {column} offers nothing but {shown(texts[0])}: {shown(value)}")
        letters = _LETTERS if len(texts) <= len(_LETTERS) else ""
        called = tuple(letters[: len(texts)] if names is None else (text_of(column, x) for x in names))
        return cls(texts, called, names is not None)

    def called(self, value: Any, by_name: bool = False) -> set[int]:
        """The numbers, from 0 on, of the choices that an answer or label may mean: by text, by name or by number.

        Args:
            value: the answer or label.
            by_name: a text that is one of the row's own names means nothing else.
        """
        found = {value} if type(value) is int and 0 <= value < len(self.texts) else set()
        if type(value) is int or isinstance(value, str):
            word = str(value).strip()
            names = {i for i, name in enumerate(self.names) if name.strip() == word}
            if by_name and self.named and isinstance(value, str) and names:
                return names
            found |= {i for i, text in enumerate(self.texts) if text.strip() == word}
            found |= names
        return found

    def equal_to(self, number: int) -> set[int]:
        """The numbers of the choices with the same text, which nobody can tell apart."""
        return {i for i, text in enumerate(self.texts) if text.strip() == self.texts[number].strip()}

    def forms(self, answer: str) -> dict[int, Form]:
        """In which form an answer may end in which choice: by text, by number from 1 on ("... answer3"), or by name."""
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
        """Whether a prompt holds all choices, one after the other."""
        at = 0
        for text in map(str.strip, self.texts):
            edges = (r"(?<!\w)" if text[0].isalnum() else "", r"(?!\w)" if text[-1].isalnum() else "")
            found = re.compile(edges[0] + re.escape(text) + edges[1]).search(prompt, at)
            if found is None:
                return False
            at = found.end()
        return True

    def listed(self, mark: str) -> str:
        """The choices below each other, each behind "-", its number or its name."""
        marks = {"-": ["-"] * len(self.texts), "1.": [f"{i + 1}." for i in range(len(self.texts))]}
        named = marks.get(mark) or [f"{name}." for name in self.names]
        return "\n".join(f"{name} {text}" for name, text in zip(named, self.texts, strict=True))


@dataclass(frozen=True)
class Form:
    """How an answer names a choice: what stands before and after it, its place taken by each, and how lists mark it."""

    before: str
    after: str
    marks: Sequence[str]
    mark: str

    def answers(self) -> tuple[str, ...]:
        """Every choice in this form."""
        return tuple(self.before + text + self.after for text in self.marks)


def _ending(answer: str, text: str, marks: Sequence[str], mark: str) -> Form | None:
    """The form of an answer that ends in a text, which is no part of a longer word or number."""
    for after in dict.fromkeys(("", answer[len(answer.rstrip(_CLOSING)) :])):
        body = answer.removesuffix(after) if after else answer
        if not text or not body.endswith(text):
            continue
        before = body.removesuffix(text)
        if mark == "1.":  # a number alone may count from 0 as well
            apart = bool(before) and not before[-1].isdigit()
        else:
            apart = not (before[-1:].isalnum() and text[0].isalnum())
        if apart:
            return Form(before, after, marks, mark)
    return None
