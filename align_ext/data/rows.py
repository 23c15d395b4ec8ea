"""Reads one row of data as one example: each column is used, is known to be irrelevant to the model, or is refused."""

import json
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from align_ext.data.choices import Choices, Form, text_of
from align_ext.data.conversation import Prompt, Turn, append_text, calls_score, text_asked, tools_turn, turns_of
from align_ext.data.metadata import is_about, strings, text_lost
from align_ext.system.messages import shown
from align_ext.system.names import check_names

_CONVERSATION = ("messages", "conversations")
_SYSTEM = ("system", "system_prompt")
_PROMPTS = ("prompt", "instruction", "context", "passage", "input", "question")  # joined in this order
_OUTPUTS = ("completion", "output", "response")
_ANSWERS = ("answer", "answers")
_CHOICES = ("choices", "options")
_LABELS = ("label", "answerKey")
_MAX_COLUMNS = 1000
_LONG = 20  # a text with so many characters is not part of another text by chance

ROWS = (
    ("task", "the task's name; without it the file's (x of x.train.jsonl), or the hub dataset's"),
    ("prompt or instruction, context, passage, input, question",
     "what is asked: those that there are, in this order, a blank line between; none that another one holds"),
    ("completion or output or response, answer",
     "what the model learns to say; answer beside another one is the short form that a generated text is judged by"),
    ("answers", "several answers, of which the first is learnt and any is right: a list or SQuAD's {text: [...]}"),
    ("choices or options",
     "a list of texts, {text: [...], label: [...]} or {A: text, ...}; listed below a prompt that does not show them"),
    ("label or answerKey",
     "the right choice: its index from 0, its text, or its letter; not needed where the answer ends in its text, its "
     "number from 1 on (answer3) or its letter"),
    ("messages or conversations",
     "turns of {role, content} or {from, value}, of which those of the assistant are learnt (--trained-turns) and the "
     "last is scored; content may be a list of parts of type text; a turn may have tool_calls, or be a tool's; prompt "
     "and completion may be turns too"),
    ("system or system_prompt", "the turn before the prompt; like conversations, it needs a chat template"),
    ("tools", "the tools that the assistant may call: a list of objects, or its JSON text"),
    ("text", "where nothing else is asked or answered: a plain text, all of which is learnt, and scored by its loss"),
)  # fmt: skip
"""The columns of a row and their meaning, for --help and the guide."""


@dataclass(frozen=True)
class Example:
    """One prompt with its answer.

    Attributes:
        task: the task's name.
        prompt: the text that the model is asked, or the turns of a conversation; no turns: the answer is a plain text.
        answer: the text that it learns to answer.
        choices: the answers to choose from, all in the form of `answer`; empty for free text.
        label: the index of `answer` in `choices`, -1 for free text.
        scorer: scores a generated text in [0, 1]; None: the score is 1 if it holds `calls`, ends in one of `golds`, or
            without these equals `answer`, else 0.
        where: its file and line, for messages.
        also: the indices of other right choices.
        calls: the tool calls of the answer, JSON; "" if it is a text.
        ends: whether the end token follows the answer; False: it is a piece of a longer plain text.
        golds: the answers that a free text is judged by.
    """

    task: str
    prompt: Prompt
    answer: str
    choices: tuple[str, ...] = ()
    label: int = -1
    scorer: Callable[[str], float] | None = field(default=None, repr=False, compare=False)
    where: str = field(default="", repr=False, compare=False)
    also: tuple[int, ...] = ()
    calls: str = ""
    ends: bool = True
    golds: tuple[str, ...] = field(default=(), repr=False, compare=False)

    @property
    def is_text(self) -> bool:
        """Whether nothing is asked."""
        return self.prompt == ()

    @property
    def asked(self) -> str:
        """All text that is asked, or the plain text."""
        return self.answer if self.is_text else text_asked(self.prompt)

    def score(self, text: str) -> float:
        """Scores a generated text; a text on which the scorer fails gets 0."""
        text = text.strip()
        try:
            if self.scorer is not None:
                return float(self.scorer(text))
            if self.calls:
                return calls_score(self.calls, text)
            if self.golds:
                return final_answer_score(self.golds, text)
            return float(text in (self.answer.strip(), *(self.choices[i].strip() for i in self.also)))
        except Exception:  # generated text is arbitrary, and may raise anything in a scorer of another package
            return 0.0


def example_of(
    row: Mapping[Any, Any], where: str, task: str | None = None, ignore: Collection[str] = ()
) -> tuple[Example, set[str]]:
    """Reads one row.

    Args:
        row: its columns; null, blank text, empty lists and a label of -1 count as absent.
        where: the first words of the message of a ValueError.
        task: the task's name if the row has none.
        ignore: columns to ignore.

    Returns:
        The example, and the columns that it does not use.

    Raises:
        ValueError: a column is missing, has invalid content, or would be lost.
    """
    try:
        held = {name: value for name, value in row.items() if not is_empty(name, value)}
        if len(held) > _MAX_COLUMNS:
            raise ValueError(f"it has {len(held)} columns: a row has at most {_MAX_COLUMNS}")
        columns = _Columns(
            {name: value for name, value in held.items() if name not in ignore},
            [name for name in row if name not in held and name not in ignore],
        )
        example = replace(_build_example(columns, task), where=where)
        columns.check_asked(example)
        columns.check_unused(example)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    return example, held.keys() - columns.used


def final_answer_score(golds: tuple[str, ...], text: str) -> float:
    """1 if a generated text ends in a gold answer ("... The answer is X."), as a number or literally, else 0."""
    return max(_equal_answers(_final_answer(text), _final_answer(gold)) for gold in golds)


def _final_answer(text: str) -> str:
    """Returns the final answer of a rationale."""
    return re.split(r"(?i)\bthe (?:correct )?answer is\b|####", text)[-1].strip().rstrip(".").strip()


def _equal_answers(text: str, gold: str) -> float:
    try:
        return float(float(text.replace(",", "").lstrip("$")) == float(gold.replace(",", "").lstrip("$")))
    except ValueError:
        return float(text.casefold() == gold.casefold())


def is_empty(column: Any, value: Any) -> bool:
    """Whether the value of a column counts as absent."""
    if isinstance(value, str):
        return not value.strip()
    return value is None or value == [] or value == {} or (column == "label" and type(value) is int and value == -1)


def _is_or_are(names: Sequence[str]) -> str:
    return "is" if len(names) == 1 else "are"


class _Columns:
    """The columns of a row, and the names of those that are empty; keeps track of those that were used."""

    def __init__(self, values: dict[str, Any], empty: Sequence[str]) -> None:
        self.values, self.empty = values, empty
        self.used: set[str] = set()

    def present(self, names: Iterable[str]) -> dict[str, Any]:
        """Returns the columns with these names, and marks them as used."""
        found = {name: self.values[name] for name in names if name in self.values}
        self.used |= found.keys()
        return found

    def one(self, names: Iterable[str]) -> tuple[str, Any] | None:
        """Returns the only column with one of these names, or None; refuses several."""
        found = self.present(names)
        if len(found) > 1:
            raise ValueError(f"it has the columns {' and '.join(found)}, which mean the same: keep one")
        return next(iter(found.items()), None)

    def missing(self, names: Iterable[str]) -> ValueError:
        """Returns the error for a row with none of these columns, or with nothing in those that there are."""
        names = list(names)
        if empty := [name for name in names if name in self.empty]:
            return ValueError(f"the column{'s' * (len(empty) > 1)} {' and '.join(empty)} {_is_or_are(empty)} empty")
        found = ", ".join(shown(name, 40)[1:-1] for name in list(self.values)[:20]) or "none"
        empty = [shown(name, 40)[1:-1] for name in self.empty[:20]]
        also = f"; {', '.join(empty)} {_is_or_are(empty)} empty" if empty else ""
        return ValueError(f"no column {' or '.join(names)}; found {found}{also}")

    def check_unused(self, example: Example) -> None:
        """Refuses an unused column that a model might have to read; numbers and texts of the example are allowed."""
        asked = text_asked(example.prompt)
        for name, value in self.values.items():
            if name in self.used or isinstance(value, (bool, int, float)):
                continue
            if is_about(name, text_lost(value, asked)):
                continue
            whole = name == "text" and isinstance(value, str) and example.answer.strip() in value
            if whole and all(part.strip() in value for part in asked.split("\n\n")):
                continue  # the column repeats the prompt and the answer in one text
            raise ValueError(
                f"the column {shown(name, 40)[1:-1]} would be lost, with {shown(value, 40)}: put it into prompt or "
                "context, or leave it out with --ignore-columns"
            )

    def check_asked(self, example: Example) -> None:
        """Refuses a prompt column that holds the other prompt columns and ends in the answer."""
        values = {} if self.values.keys() & set(_CONVERSATION) else self.values
        parts = {name: str(values[name]).strip() for name in _PROMPTS if isinstance(values.get(name), (str, int))}
        answers = {example.answer, *strings([values.get(name) for name in (*_ANSWERS, *_LABELS)])}
        for name, text in parts.items():
            others = {other: part for other, part in parts.items() if part != text}
            for answer in answers if others else ():
                rest = _text_before(text, answer.strip())
                if not rest or not all(_holds(rest, part) for part in others.values()):
                    continue
                offered = next((Choices.read(column, values[column]) for column in _CHOICES if column in values), None)
                if offered is None or offered.shown_in(rest) or not offered.shown_in(text):
                    raise ValueError(
                        f"the column {name} holds {' and '.join(others)} and ends in the answer, {shown(answer, 40)}: "
                        f"leave it out with --ignore-columns {name}"
                    )


def _build_example(columns: _Columns, task: str | None) -> Example:
    """Builds the example from the columns of a row."""
    if named := columns.present(["task"]):
        task = text_of("task", named["task"])
    elif task is None:
        raise columns.missing(["task"])
    check_names([task], "the column task")
    asked = columns.values.keys() & {*_CONVERSATION, *_SYSTEM, *_PROMPTS, *_OUTPUTS, *_ANSWERS, *_CHOICES, *_LABELS}
    if not asked and (text := columns.present(["text"])):
        return Example(task, (), text_of("text", text["text"]))
    conversation, output, calls = _read_conversation(columns)
    prompt = _read_prompt(columns, conversation)
    answers = columns.present(_ANSWERS)
    if calls:
        if answers or columns.values.keys() & {*_CHOICES, *_LABELS}:
            raise ValueError("the conversation ends with a tool call, which has no answer, choices or label beside it")
        return Example(task, prompt, output, calls=calls)
    finals = tuple(text for name, value in answers.items() for text in _answer_texts(name, value))
    offered = columns.one(_CHOICES)
    labels = columns.present(_LABELS)
    if offered is not None:
        return _add_choices(Example(task, prompt, output), offered, labels | answers, finals)
    if labels:
        reason = str(columns.missing(_CHOICES)) if set(columns.empty) & set(_CHOICES) else "there is no column choices"
        raise ValueError(f"the column {next(iter(labels))} says which choice is right, but {reason}")
    if not output and not finals:
        raise columns.missing([*_OUTPUTS, "answer"])
    answer = output or finals[0]
    return Example(task, prompt, answer, golds=finals or (answer,))


def _read_conversation(columns: _Columns) -> tuple[tuple[Turn, ...], str, str]:
    """Returns the turns of the prompt (empty if it is a text), the answer ("": _ANSWERS alone may have one), its calls.

    The answer of a turn with tool calls alone is their JSON.
    """
    turns: tuple[Turn, ...] = ()
    outputs, calls = {}, ""
    if found := columns.one(_CONVERSATION):
        if isinstance(columns.values.get("prompt"), list):
            raise ValueError(f"the columns {found[0]} and prompt are both conversations: keep one")
        *before, (role, text, *rest) = turns_of(*found)
        if role != "assistant":
            raise ValueError(f"the column {found[0]} must end with a turn of the assistant, the answer")
        calls = json.dumps(json.loads(rest[0])["tool_calls"], ensure_ascii=False) if rest else ""
        turns, outputs[found[0]] = tuple(before), text if text.strip() else calls
    elif isinstance(columns.values.get("prompt"), list):
        turns = turns_of(*columns.present(["prompt"]).popitem())
    if (found or turns) and (not turns or turns[-1][0] not in ("user", "tool")):
        raise ValueError("a conversation must have a turn of the user before the answer")
    for name, value in columns.present(_OUTPUTS).items():
        answer = turns_of(name, value) if isinstance(value, list) else (("assistant", text_of(name, value)),)
        if len(answer) > 1 or answer[0][0] != "assistant" or len(answer[0]) > 2:
            raise ValueError(f"the column {name} must be a text or one turn of the assistant, a text")
        outputs[name] = answer[0][1]
    if len({text.strip() for text in outputs.values()}) > 1:
        raise ValueError(f"the columns {' and '.join(outputs)} say different things: keep one")
    return turns, next(iter(outputs.values()), ""), calls


def _read_prompt(columns: _Columns, turns: tuple[Turn, ...]) -> Prompt:
    """Returns the prompt with the turns of tools and system: the text columns, or a conversation that holds them."""
    system, tools = columns.one(_SYSTEM), columns.present(["tools"])
    held = columns.present(_PROMPTS)
    if isinstance(held.get("prompt"), list):
        del held["prompt"]  # it is the conversation
    parts = {name: text_of(name, value) for name, value in held.items()}
    if turns:
        for name, text in parts.items():
            if not any(_holds(turn[1], text) for turn in turns):
                raise ValueError(f"the column {name} stands beside a conversation that does not hold it: keep one")
    elif not parts:
        raise columns.missing([*_PROMPTS, "messages"])
    else:
        texts: list[str] = []
        for text in parts.values():
            if not any(_holds(other, text) for other in texts):
                texts.append(text)
        turns = (("user", "\n\n".join(texts)),)
        if system is None and not tools:
            return turns[0][1]
    if system is not None:
        turn = ("system", text_of(*system))
        if turns[0][0] == "system" and turns[0] != turn:
            raise ValueError(f"the column {system[0]} and the conversation's system turn say different things")
        turns = turns if turns[0][0] == "system" else (turn, *turns)
    return (tools_turn("tools", tools["tools"]), *turns) if tools else turns


def _holds(text: str, part: str) -> bool:
    """Whether a text holds another one as a separate line or field, or anywhere if the other one is long."""
    part = part.strip()
    if len(part) >= _LONG:
        return part in text
    return re.search(rf"(?:^|\n|: ){re.escape(part)}[ \t\r]*(?:\n|$)", text) is not None


def _text_before(text: str, end: str) -> str:
    """Returns the text before an ending that is a separate line or field or is long, or "" without such an ending."""
    rest = text.removesuffix(end)
    separate = rest != text and (len(end) >= _LONG or re.search(r"(?:\n|:[ \t])[ \t]*$", rest))
    return rest if separate else ""


def _answer_texts(name: str, value: Any) -> list[str]:
    """Returns one answer or several, from a text, a list, or SQuAD's format."""
    if isinstance(value, dict) and "text" in value and value.keys() <= {"text", "answer_start"}:
        value = value["text"]
    texts = [text_of(name, text) for text in (value if isinstance(value, list) else [value])]
    if not texts or not all(text.strip() for text in texts):
        raise ValueError(f"the column {name} holds an empty answer: {shown(value)}")
    return texts


def _add_choices(example: Example, offered: tuple[str, Any], hints: dict[str, Any], finals: tuple[str, ...]) -> Example:
    """Adds the choices to an example; the right one must agree with all columns that name one."""
    choices = Choices.read(*offered)
    numbers = set(range(len(choices.texts)))
    by_text = {i: Form("", "", choices.texts, "-") for i in numbers}
    named = []
    for name, value in hints.items():
        if name == "label" and type(value) is int:
            named.append(numbers & {value})
        elif name in _LABELS or example.answer or type(value) is int:
            values = value if isinstance(value, list) else [value]
            named.append({i for x in values for i in choices.matching(x, by_name=name in _LABELS)})
    learnt = example.answer or (finals[0] if finals and not isinstance(hints.get("answer"), int) else "")
    forms = choices.forms(learnt) if learnt else by_text
    right = set(forms).intersection(*named)
    label = min(right, default=0)
    if not right or not right <= choices.equal_to(label):
        given = {**hints, **({"the answer": example.answer} if example.answer else {})}
        words = ", ".join(f"{name} {shown(value, 40)}" for name, value in given.items()) or "other columns"
        raise ValueError(
            f"the column {offered[0]} holds {shown(offered[1])}, and which one is right does not follow from {words}: "
            "give label, an index from 0, and let the answer end in that choice's text, number or letter"
        )
    answers = forms[label].answers()
    prompt = example.prompt
    if not choices.shown_in(text_asked(prompt)):
        prompt = append_text(prompt, choices.listed(forms[label].mark))
    several = [] if hints.keys() & set(_LABELS) else [i for text in finals[1:] for i in choices.matching(text)]
    also = tuple(sorted(choices.equal_to(label).union(several) - {label}))
    return replace(example, prompt=prompt, answer=answers[label], choices=answers, label=label, also=also)
