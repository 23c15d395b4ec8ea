"""Rows of every shape and files with damaged bytes: each row is understood whole, or is one line that says where."""

import gzip
import json
import tempfile
from pathlib import Path

import pytest
from hf.words import rows, tokenizer
from hostile import check_line
from hypothesis import example, given
from hypothesis import strategies as st

from align_ext.data.choices import Choices
from align_ext.data.conversation import text_asked
from align_ext.data.encode import encode, fits
from align_ext.data.rows import ROWS, example_of
from align_ext.data.sources import read_source

COLUMNS = sorted({w for columns, _ in ROWS for w in columns.replace(",", " or").split() if w != "or"})
OTHERS = ["id", "source", "meta", "hint", "text", "history", "score", "Prompt", "", "[/bold]", "a\nb", "\ud800"]
WORDS = [
    "a",
    "B",
    "2",
    "red",
    "dark red",
    "answer2",
    "the answer is red.",
    "which? red dark red a B",
    "p\n\nq",
    "-",
    " x ",
]
TEXT = st.sampled_from(WORDS) | st.text(st.characters(exclude_categories=()), max_size=8)
NUMBER = st.integers(-2, 4) | st.integers() | st.floats() | st.booleans() | st.none()
SHAPE = st.recursive(
    TEXT | NUMBER, lambda x: st.lists(x, max_size=4) | st.dictionaries(TEXT, x, max_size=3), max_leaves=8
)
ROLE = st.sampled_from(["user", "assistant", "system", "human", "gpt", "tool"])
TURN = st.fixed_dictionaries({"role": ROLE, "content": TEXT}) | st.fixed_dictionaries({"from": ROLE, "value": TEXT})
TALK = st.lists(TURN, min_size=1, max_size=4) | TEXT.map(
    lambda text: [{"role": "user", "content": text}, {"role": "assistant", "content": "red"}]
)
OFFER = st.lists(TEXT, min_size=2, max_size=4)
NAMED = OFFER.map(lambda texts: {"text": texts, "label": list("ABCD")[: len(texts)]})
LIKELY = {
    "choices": OFFER | NAMED,
    "options": OFFER | OFFER.map(lambda texts: dict(zip("ABCD", texts, strict=False))),
    "label": st.integers(-1, 3) | st.sampled_from("AB"),
    "answerKey": st.sampled_from("AB"),
    "messages": TALK,
    "conversations": TALK,
    "answers": st.fixed_dictionaries({"text": OFFER, "answer_start": st.just([0])}) | OFFER,
    "prompt": TEXT | TALK,
}
CELL = {name: st.one_of(LIKELY.get(name, TEXT), TEXT | NUMBER, SHAPE) for name in [*COLUMNS, *OTHERS]}
PAIR = st.fixed_dictionaries({}, optional={name: CELL[name] for name in COLUMNS + OTHERS})
USUAL = st.builds(
    lambda asked, said, more: {**asked, **said, **more},
    st.fixed_dictionaries({"prompt": TEXT}) | st.fixed_dictionaries({"instruction": TEXT, "input": TEXT}),
    st.fixed_dictionaries({"completion": TEXT}) | st.fixed_dictionaries({"output": TEXT, "answer": TEXT}),
    st.dictionaries(st.sampled_from(COLUMNS + OTHERS), st.none(), max_size=2).flatmap(
        lambda names: st.fixed_dictionaries({name: CELL[name] for name in names})
    ),
)
CHOOSING = st.builds(
    lambda texts, right, more: {"question": "q", "choices": texts, "label": right % len(texts), **more},
    OFFER, st.integers(0, 3), st.fixed_dictionaries({}, optional={"output": TEXT, "answer": TEXT}),
)  # fmt: skip


SPOKEN = st.builds(
    lambda before, asked, said, more: {"messages": [*before, {"role": "user", "content": asked},
                                                    {"role": "assistant", "content": said}], **more},
    st.lists(TURN, max_size=2), TEXT, TEXT,
    st.fixed_dictionaries({}, optional={"system": TEXT, "prompt": TEXT, "id": SHAPE, "choices": OFFER}),
)  # fmt: skip


def check_refusal(error, where, *words):
    """One line that says where, and one of the words."""
    check_line(error)
    assert str(error).startswith(where)
    assert any(word in str(error) for word in words)


def strings(value):
    """Every text in a value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from strings(item)
    elif isinstance(value, dict):
        yield from strings(list(value.values()))


def check_whole(row, found, unused):
    """Nothing of a row is lost, and nothing is in the example that the row does not hold."""
    golds = found.golds
    held = [found.task, text_asked(found.prompt), found.answer, *found.choices, *golds]
    offered = next((Choices.read(name, row[name]) for name in ("choices", "options") if row.get(name)), None)
    names = {*offered.texts, *offered.names, *map(str, range(len(offered.texts)))} if offered else set()
    for column, value in row.items():
        if column in unused:
            parts = [found.answer, *text_asked(found.prompt).split("\n\n")]
            again = not isinstance(value, str) or all(part.strip() in value for part in parts)
            assert column not in COLUMNS or (column == "text" and again)  # all of it in one text, or a number
            continue
        roles = ("messages", "conversations", "prompt", "completion", "output", "response")
        turns = value if isinstance(value, list) and column in roles else []
        texts = [turn.get("content", turn.get("value")) for turn in turns] if turns else list(strings(value))
        texts += [str(value)] if type(value) is int and column not in ("label", "answerKey") else []
        for text in texts:
            whole = any(text.strip() in part for part in held)
            named = column in ("label", "answerKey", "answer", "answers", "choices", "options") and offered
            assert whole or (named and text.strip() in {name.strip() for name in names}), (column, text)
            if column in roles and column != "prompt" and not turns:
                assert found.answer.strip() == text.strip()
    rest = text_asked(found.prompt)
    known = [*(str(x) for x in row.values() if type(x) is int), *strings(list(row.values())), *names]
    for text in sorted({text.strip() for text in known} - {""}, key=len, reverse=True):
        rest = rest.replace(text, "")
    assert set(rest) <= set(" \t\r\n-.0123456789\x0b\x0c\x1c\x1d\x1e\x1f\x85\xa0") or rest.isspace(), rest


@given(USUAL | CHOOSING | SPOKEN | PAIR)
@example({"question": "q", "choices": ["a", "b"], "answer": "B"})
@example({"prompt": "a", "completion": "a", "text": "a"})
@example({"prompt": "a", "completion": "a", "answer": 0, "choices": ["a", "a"]})  # the number of either choice
@example(
    {
        "prompt": [{"role": "user", "content": "which?"}],
        "choices": {"text": ["a", "b"], "label": ["A", "B"]},
        "label": 1,
    }
)
def test_fuzz_a_row_is_understood_whole_or_is_one_line(row):
    try:
        found, unused = example_of(row, "x.jsonl, line 7", "t")
    except ValueError as error:
        return check_refusal(error, "x.jsonl, line 7: ", "column", "conversation")
    present = {name: value for name, value in row.items() if value not in (None, "", [], {})}
    check_whole({name: x for name, x in present.items() if not (isinstance(x, str) and not x.strip())}, found, unused)
    return check_tokens(found)


def check_tokens(found):
    """It becomes tokens that hold all of it, or is one line."""
    for words in (tokenizer(), tokenizer(chat=True)):
        try:
            if not fits(words, found, 200):
                continue
        except ValueError as error:
            check_refusal(error, "x.jsonl, line 7: ", "template", "token")
            continue
        prompt, answer = encode(words, found.prompt, found.answer)
        letters = {"[UNK]"} & set(words.convert_ids_to_tokens(prompt + answer))
        learnt = prompt + answer if found.is_text else answer  # of a plain text the prompt is the first token
        assert letters or words.decode(learnt) == found.answer + "[END]"
        turns = [found.prompt] if isinstance(found.prompt, str) else [text for _, text in found.prompt]
        assert letters or all(text in words.decode(prompt) for text in turns)


GOOD = "".join(json.dumps(row) + "\n" for row in rows(4)).encode()
ARRAY = json.dumps(list(rows(3)), indent=1).encode()
BYTES = [b"\0", b"\xff", b"\xed\xa0\x80", b"\xef\xbb\xbf", b"\r", b"\n", b"{", b"[", b'"', b"\\", b"\\ud800", b":",
         b"1e999", b"NaN", b"null", b"[" * 200, b"9" * 400, b"\xe2\x80\xa8", b'"task": 3, ', b"\x1f\x8b"]  # fmt: skip
EDIT = st.tuples(st.integers(0, 4000), st.integers(0, 60), st.sampled_from(BYTES) | st.binary(max_size=3))


@given(st.sampled_from([GOOD, ARRAY]), st.lists(EDIT, min_size=1, max_size=3), st.booleans(), st.booleans())
def test_fuzz_a_damaged_file_is_read_or_is_one_line_that_names_it(content, edits, packed, inside):
    def damaged(data):
        for at, length, put in edits:
            at %= len(data) + 1
            data = data[:at] + put + data[at + length :]
        return data

    if packed:
        data = gzip.compress(damaged(content), 1) if inside else damaged(gzip.compress(content, 1))
    else:
        data = damaged(content)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "x.jsonl.gz" if packed else "x.jsonl")
        file.write_bytes(data)
        try:
            source = read_source(str(file))
        except ValueError as error:
            check_refusal(error, f"'{file.name}'", ", line ", ", row ", "holds no rows", "cannot be read")
            return
    for found in source.splits[""]:
        assert found.where.startswith(f"'{file.name}', ")
        assert found.answer.strip()
        assert text_asked(found.prompt).strip()


def test_fuzz_the_check_itself_sees_what_is_lost():
    row = {"prompt": "p", "completion": "c", "input": "i"}
    found, unused = example_of({"prompt": "p", "completion": "c"}, "", "t")
    with pytest.raises(AssertionError):
        check_whole(row, found, unused)
