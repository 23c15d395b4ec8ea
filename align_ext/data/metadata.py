"""Columns whose names say that they are about the row: whether what they hold is, or is somebody's text."""

from __future__ import annotations

import functools
import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

# Where a row is from and of which kind it is, nothing that a model would read.
_ABOUT = re.compile(
    r"(?:.*_)?(?:(?P<mark>id|idx|index|uid|uuid|guid|hash|url|timestamp)|(?P<person>author|annotator)|source|dataset|"
    r"split|license|version|category|subcategory|domain|subject|type|difficulty|level|quality|tags|meta|metadata)|title",
    re.IGNORECASE,
)
_SHORT = 200  # letters of a text in such a column; a longer one is somebody's text
_FEW = 8  # rows, of which nothing follows
_SENTENCE, _PHRASE = 8, 5  # words
# Thai, Lao, Tibetan, Burmese; Khmer; Tai; Javanese; kana, Chinese; Yi; Korean, whose words may be one letter.
_UNSPACED = re.compile(
    "[\u0e00-\u109f\u1100-\u11ff\u1780-\u17ff\u1950-\u19ff\u1a20-\u1aaf\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff"
    "\ua000-\ua4cf\ua980-\ua9df\uac00-\ud7af\uf900-\ufaff\uff66-\uff9f\U00020000-\U0003ffff]"
)


def is_about(name: Any, text: str) -> bool:
    """Whether a column may say something about the row, by its name and by how much text of it would be lost."""
    return _ABOUT.fullmatch(str(name)) is not None and len(text) <= _SHORT


def text_lost(value: Any, asked: str) -> str:
    """The text that a column holds, also in lists and objects, without what stands in the prompt."""
    return " ".join(text for text in strings(value) if text.strip() not in asked)


def strings(value: Any) -> Iterator[str]:
    """Every text in a value, and the names in an object that are texts rather than names."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from strings(item)
    elif isinstance(value, dict):
        yield from (name for name in value if isinstance(name, str) and words_in(name) > 1)
        yield from strings(list(value.values()))


def words_in(text: str) -> int:
    """About how many words a text has; addresses, ids, numbers and times are none, several lines are a sentence."""
    words = unspaced = 0
    for token in "".join(map(_kind, text)).split():
        token = token.strip(".,:-")
        if "/" in token or ":" in token:
            continue
        unspaced += re.sub("N+U?", "", token).count("U")  # without what is counted: "2024年"
        if "N" not in token and "." not in token:
            words += sum(part.count("L") > 1 for part in re.split("[U,]+", token))
    lines = len(text.strip().splitlines())
    return max(words + (unspaced + 1) // 2, _SENTENCE if lines > 1 else 0)


@functools.cache
def _kind(char: str) -> str:
    """A letter (U: two of them are a word), a digit (N), a space, or the mark that a character is like."""
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
    """What a column holds that no example uses: whether its texts are somebody's, or say what a row is.

    "category" may hold "high school history" in a hundred rows, and "source" a word to translate in each.
    """

    name: Any
    parts: dict[str, _Part] = field(default_factory=dict)

    def add(self, text: str, task: str) -> None:
        """Counts a text in all rows, in those of its task and, if it is a phrase, in those that hold one."""
        words = words_in(text)
        for part in ("", "of " + task, *(["phrases"] if words >= _PHRASE else [])):
            self.parts.setdefault(part, _Part()).add(text, words)

    def would_be_lost(self) -> str:
        """A text that would be, the longest; "" where none would."""
        found = _ABOUT.fullmatch(str(self.name))
        if found is None or found["person"]:
            return ""
        least = 3 if found["mark"] else 1
        return next((part.longest for part in self.parts.values() if part.would_be_lost(least)), "")


@dataclass
class _Part:
    longest: str = ""
    most: int = -1
    rows: int = 0
    words: int = 0
    distinct: set[int] = field(default_factory=set)

    def add(self, text: str, words: int) -> None:
        self.rows += 1
        self.words += words
        self.distinct.add(hash(text))
        if words > self.most:
            self.longest, self.most = text, words

    def would_be_lost(self, least: int) -> bool:
        """Another text in most rows, or sentences of which several rows share one."""
        another = 2 * len(self.distinct) > self.rows and self.words >= least * self.rows
        shared = len(self.distinct) >= 3 and self.words >= _SENTENCE * self.rows
        return self.rows >= _FEW and (another or shared)
