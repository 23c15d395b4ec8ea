"""Decides whether a column holds metadata about its row, or text that a model might have to read."""

from __future__ import annotations

import functools
import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

# Names of columns about the origin and kind of a row, which a model does not have to read.
_ABOUT = re.compile(
    r"(?:.*_)?(?:(?P<mark>id|idx|index|uid|uuid|guid|hash|url|timestamp)|(?P<person>author|annotator)|source|dataset|"
    r"split|license|version|category|subcategory|domain|subject|type|difficulty|level|quality|tags|meta|metadata)|title",
    re.IGNORECASE,
)
_MAX_LENGTH = 200  # the most characters of metadata; a longer text is content
_MIN_ROWS = 8  # the fewest rows that allow a decision
_SENTENCE, _PHRASE = 8, 5  # the fewest words of a sentence, and of a phrase
# Thai, Lao, Tibetan, Burmese; Khmer; Tai; Javanese; kana, Chinese; Yi; Korean: words may have one character.
_UNSPACED = re.compile(
    "[\u0e00-\u109f\u1100-\u11ff\u1780-\u17ff\u1950-\u19ff\u1a20-\u1aaf\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff"
    "\ua000-\ua4cf\ua980-\ua9df\uac00-\ud7af\uf900-\ufaff\uff66-\uff9f\U00020000-\U0003ffff]"
)


def is_about(name: Any, text: str) -> bool:
    """Whether a column may be metadata, judged by its name and by the length of the text that would be lost."""
    return _ABOUT.fullmatch(str(name)) is not None and len(text) <= _MAX_LENGTH


def text_lost(value: Any, asked: str) -> str:
    """Returns the text of a column, also in lists and objects, without texts that are part of the prompt."""
    return " ".join(text for text in strings(value) if text.strip() not in asked)


def strings(value: Any) -> Iterator[str]:
    """Yields every text in a value, and the keys of an object that have several words."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from strings(item)
    elif isinstance(value, dict):
        yield from (name for name in value if isinstance(name, str) and words_in(name) > 1)
        yield from strings(list(value.values()))


def words_in(text: str) -> int:
    """Estimates the number of words, without addresses, ids, numbers and times; several lines count as a sentence."""
    words = unspaced = 0
    for token in "".join(map(_character_class, text)).split():
        token = token.strip(".,:-")
        if "/" in token or ":" in token:
            continue
        unspaced += re.sub("N+U?", "", token).count("U")  # without numbers and their units, such as "2024年"
        if "N" not in token and "." not in token:
            words += sum(group.count("L") > 1 for group in re.split("[U,]+", token))
    lines = len(text.strip().splitlines())
    return max(words + (unspaced + 1) // 2, _SENTENCE if lines > 1 else 0)


@functools.cache
def _character_class(char: str) -> str:
    """Classifies a character: letter (L, or U if two make a word), digit (N), space, or kind of punctuation."""
    category = unicodedata.category(char)
    if category[0] in "LM":
        return "U" if category[0] == "L" and _UNSPACED.match(char) else "L"
    if char in "/\\_@":
        return "/"
    if char in ".:":
        return char
    if char in "-'\u2010\u2011\u2019\u200c\u200d\u00ad":
        return "-"
    if category[0] == "N":
        return "N"
    return " " if char.isspace() or (category[0] == "P" and char > "\x7f") else ","


@dataclass
class Texts:
    """Collects the texts of an unused column to decide whether they are content or metadata.

    For example, "category" may hold "high school history" in a hundred rows, and "source" a word to translate in each.
    """

    name: Any
    groups: dict[str, _Group] = field(default_factory=dict)

    def add(self, text: str, task: str) -> None:
        """Counts a text in the groups of all rows, of the rows of its task and, if it is a phrase, of phrases."""
        words = words_in(text)
        for group in ("", "of " + task, *(["phrases"] if words >= _PHRASE else [])):
            self.groups.setdefault(group, _Group()).add(text, words)

    def would_be_lost(self) -> str:
        """Returns the longest text that would be lost, or "" if the texts are metadata."""
        match = _ABOUT.fullmatch(str(self.name))
        if match is None or match["person"]:
            return ""
        minimum = 3 if match["mark"] else 1
        return next((group.longest for group in self.groups.values() if group.would_be_lost(minimum)), "")


@dataclass
class _Group:
    longest: str = ""
    most_words: int = -1
    rows: int = 0
    words: int = 0
    distinct: set[int] = field(default_factory=set)

    def add(self, text: str, words: int) -> None:
        self.rows += 1
        self.words += words
        self.distinct.add(hash(text))
        if words > self.most_words:
            self.longest, self.most_words = text, words

    def would_be_lost(self, minimum: int) -> bool:
        """Whether the texts are content: mostly different texts, or at least three different sentences."""
        differing = 2 * len(self.distinct) > self.rows and self.words >= minimum * self.rows
        sentences = len(self.distinct) >= 3 and self.words >= _SENTENCE * self.rows
        return self.rows >= _MIN_ROWS and (differing or sentences)
