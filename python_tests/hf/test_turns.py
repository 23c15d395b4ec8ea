"""Conversations of several turns with tools, and plain texts: which tokens a row has, and which of them are learnt."""

import json
from pathlib import Path

import pytest
import trl
from hf.words import TEMPLATE, llama, tokenizer, write_rows

from align_ext.data.encode import encode_example, features, fits, gold_tokens, token_rows
from align_ext.data.rows import Example, example_of
from align_ext.data.tasks import read_tasks, row_ids, select
from align_ext.evaluation.evaluate import evaluate

TEMPLATES = Path(trl.__file__).parent / "chat_templates"
MARKS = ["<|im_start|>", "<|im_end|>", "<think>", "</think>", "<tool_call>", "</tool_call>"]
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 2, "b": [3]}}}
TOOL = {"type": "function", "function": {"name": "add", "description": "adds", "parameters": {"type": "object"}}}
TALK = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "ho"},
    {"role": "user", "content": "2+3?"},
    {"role": "assistant", "content": "5 ho"},
]
CALLED = [
    {"role": "user", "content": "2+3?"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "5"},
    {"role": "assistant", "content": "five"},
    {"role": "user", "content": "and 1?"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
]


def words(template):
    made = tokenizer()
    made.add_special_tokens({"additional_special_tokens": MARKS, "eos_token": "<|im_end|>"})
    made.chat_template = (TEMPLATES / f"{template}.jinja").read_text()
    return made


def read(messages, **columns):
    return example_of({"messages": messages, **columns}, "x, row 1", "t")[0]


def row_of(made, example, turns="all"):
    (row,) = features(made, [example], {"t": 0}, turns)
    return row


def learnt(made, row):
    """The pieces of a row that are learnt."""
    pieces, last = [], -2
    for position, label in enumerate(row["labels"]):
        if label != -100:
            assert label == row["input_ids"][position]
            pieces.append([label]) if last < position - 1 else pieces[-1].append(label)
            last = position
    return [made.decode(piece) for piece in pieces]


def test_by_hand():
    made = tokenizer(chat=True)
    row = row_of(made, read(TALK))
    assert made.decode(row["input_ids"]) == "<system>Be kind.<user>hi<assistant>ho<user>2+3?<bot>5 ho[END]"
    assert learnt(made, row) == ["ho", "5 ho[END]"]
    assert learnt(made, row_of(made, read(TALK), "last")) == ["5 ho[END]"]


@pytest.mark.parametrize("template", ["qwen2_5", "qwen3", "qwen3_instruct_2507"])
def test_all_turns_are_learnt_in_the_tokens_that_the_template_renders(template):
    made = words(template)
    row = row_of(made, read(TALK))
    assert learnt(made, row) == ["ho<|im_end|>", "5 ho<|im_end|>"]
    whole = made.apply_chat_template(TALK, tokenize=False)
    ours = made.decode(row["input_ids"])
    if template == "qwen3":  # writes an empty thought into the last turn, for which generation leaves the room
        whole = whole.replace("<think>\n\n</think>\n\n", "")
    assert ours == whole.rstrip()
    assert row_of(made, read(TALK), "last")["input_ids"] == row["input_ids"]
    assert row_of(made, read(TALK[1:3]), "last") == row_of(made, read(TALK[1:3]))


@pytest.mark.parametrize("template", ["qwen2_5", "qwen3"])
def test_tool_calls_are_learnt_and_what_tools_say_is_not(template):
    made = words(template)
    row = row_of(made, read(CALLED, tools=[TOOL]))
    call = '<tool_call>\n{"name": "add", "arguments": {"a": 2, "b": [3]}}\n</tool_call><|im_end|>'
    last = "<think>\n\n</think>\n\n" * (template == "qwen3") + call
    assert learnt(made, row) == [call, "five<|im_end|>", last]
    assert '"description": "adds"' in made.decode(row["input_ids"])
    text = made.apply_chat_template(CALLED, tools=[TOOL], tokenize=False)
    assert made.decode(row["input_ids"]) == text.rstrip()
    stored = json.dumps(CALL["function"]["arguments"])
    as_text = [*CALLED[:-1], {**CALLED[-1], "tool_calls": [{"function": {"name": "add", "arguments": stored}}]}]
    assert row_of(made, read(as_text, tools=json.dumps([TOOL]))) == row


def test_turns_are_those_that_trl_marks_but_for_line_breaks():
    made, marked = words("qwen2_5"), words("qwen2_5_training")
    messages = [*CALLED[:4], *TALK[3:]]
    given = marked.apply_chat_template(messages, return_assistant_tokens_mask=True, return_dict=True)
    theirs = [
        token for token, mark in zip(given["input_ids"], given["assistant_masks"], strict=True)
        if mark and marked.decode([token]) != "\n"
    ]  # fmt: skip
    ours = [label for label in row_of(made, read(messages))["labels"] if label != -100]
    assert [token for token in ours if made.decode([token]) != "\n"] == theirs
    with_marks = row_of(marked, read(messages))["labels"]
    assert [x for x in with_marks if x != -100 and made.decode([x]) != "\n"] == theirs


def test_a_turn_is_found_where_others_say_the_same_and_where_the_template_writes_the_last_otherwise():
    made = tokenizer(chat=True)
    for word in ("ho", "user"):  # which the header of a turn holds too
        roles = ("system", "user", "assistant", "user", "assistant", "user")
        row = row_of(made, read([*({"role": role, "content": word} for role in roles), TALK[-1]]))
        text, begins = made.decode(row["input_ids"]), [i for i, x in enumerate(row["labels"]) if x != -100]
        assert [text[i - 11 : i] for i in begins[:: len(word)][:2]] == ["<assistant>"] * 2
        assert learnt(made, row) == [word, word, "5 ho[END]"]
    ended = "{% if m.role == 'user' %}[END]{% elif loop.last %}!{% endif %}"
    made.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}" + ended + "{% endfor %}<assistant>"
    assert learnt(made, row_of(made, read(TALK))) == ["ho", "5 ho[END]"]
    other = words("qwen2_5")
    other.eos_token = "[END]"  # not the mark that the template ends turns with
    assert learnt(other, row_of(other, read(CALLED[:4])))[0].endswith("</tool_call><|im_end|>")


def test_thinking_that_the_template_drops_is_neither_seen_nor_learnt():
    made = words("qwen3")
    thought = [TALK[1], {"role": "assistant", "content": "<think>\nwell\n</think>\n\nho"}, *TALK[3:]]
    row = row_of(made, read(thought))
    assert learnt(made, row) == ["ho<|im_end|>", "5 ho<|im_end|>"]
    assert "well" not in made.decode(row["input_ids"])
    with pytest.raises(ValueError, match="leaves out text of the user's turn"):
        row_of(tokenizer_without("user"), read(thought))


def tokenizer_without(role):
    made = tokenizer()
    made.chat_template = TEMPLATE.replace(
        "message['content'] }}", f"'' if message.role == '{role}' else message.content }}}}"
    )
    return made


@pytest.mark.parametrize(
    ("messages", "columns", "message"),
    [
        (CALLED, {}, "leaves out text of the assistant's turn"),
        (CALLED[:2], {}, "leaves out the tool 'add': it knows no tools"),
        ([{**TALK[1], "tool_calls": [CALL]}, TALK[2]], None, "a turn is a role and a text"),
        ([TALK[1], {"role": "assistant", "tool_calls": [{"arguments": {}}]}], None, "it must be an object"),
        ([TALK[1], {"role": "assistant", "tool_calls": [{"name": "f", "arguments": "{"}]}], None, "are no JSON"),
        ([TALK[1], {"role": "assistant", "tool_calls": [{"name": "f", "arguments": [1]}]}], None, "must be an object"),
        (CALLED, {"label": 1}, "ends with a tool call, which has no answer"),
    ],
)
def test_what_a_template_or_row_cannot_say_is_refused(messages, columns, message):
    with pytest.raises(ValueError, match=message):
        row_of(tokenizer(chat=True), read(messages, tools=[TOOL], **(columns or {})))


def test_an_answer_with_tool_calls_is_scored_by_its_calls():
    example = read(CALLED, tools=[TOOL])
    text = 'Sure.\n<tool_call>\n{"name": "add", "arguments": {"b": [3], "a": 2}}\n</tool_call>'
    assert example.score(text) == 1
    assert example.score('{"name": "add", "parameters": {"a": 2, "b": [3]}}') == 1
    for wrong in ("5", text + text, text.replace("2", "4"), '{"name": "add"', "{" * 9999):
        assert example.score(wrong) == 0
    assert row_ids([example]) != row_ids([read(CALLED[:4])])


def test_every_token_of_a_plain_text_is_learnt_and_it_is_scored_by_its_loss(tmp_path):
    made = tokenizer()
    example, unused = example_of({"text": "abc", "id": "7"}, "x", "t")
    assert (example.prompt, unused) == ((), {"id"})
    row = row_of(made, example)
    assert made.decode(row["input_ids"]) == "abc[END]"
    assert row["labels"] == [-100, *row["input_ids"][1:]]
    assert fits(made, example, 4)
    assert not fits(made, example, 3)
    chat = tokenizer(chat=True)
    assert row_of(chat, example)["input_ids"] == row["input_ids"], "no template is for it"
    assert list(token_rows(made, [example])) == [row["input_ids"]]
    assert encode_example(made, example)[1] == [gold_tokens(made, example)[1]]
    score = evaluate(llama(), made, [example, Example("q", "a", "b")], generate="all")
    assert score["t"].score is None
    assert score["t"].loss > 0
    assert score["q"].score is not None


def test_lines_of_a_text_file_are_texts_of_which_no_tested_one_is_trained_on(tmp_path):
    (tmp_path / "x.txt").write_text("one\n\ntwo \r\nthree\none\nfour\n")
    pools = read_tasks(str(tmp_path / "x.txt"))
    assert sorted(x.answer for x in pools.tasks["x"][""]) == ["four", "one", "one", "three", "two "]
    data = select(pools, 9, 2)
    assert not {x.answer for x in data.train} & {x.answer for x in data.test}
    assert len(data.train) in (2, 3)
    rows = write_rows(tmp_path / "y.jsonl", [{"text": "a"}, {"text": "b", "prompt": "c", "answer": "d"}])
    with pytest.raises(ValueError, match="line 2: the column text would be lost"):
        read_tasks(str(rows))
