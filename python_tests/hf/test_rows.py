"""Rows: what each column becomes, in the layouts that public data has; what is not understood is refused."""

import json

import pytest

from align_ext.data.named_source import COLUMNS
from align_ext.data.rows import ROWS, example_of, final_answer_score

GOOD = {"prompt": "p", "completion": "c"}
RED = ["red", "blue", "green"]


def read(row, ignore=(), task="t"):
    return example_of(json.loads(json.dumps(row)), "x.jsonl, line 7", task, ignore)[0]


def refusal(row, **options):
    with pytest.raises(ValueError, match="line 7") as caught:
        read(row, **options)
    message = str(caught.value)
    assert message.startswith("x.jsonl, line 7: ")
    assert "\n" not in message
    assert len(message) < 500
    return message


@pytest.mark.parametrize(
    ("row", "prompt", "answer"),
    [
        (GOOD, "p", "c"),
        ({"instruction": "Add.", "input": "1 and 2", "output": "3"}, "Add.\n\n1 and 2", "3"),  # Alpaca
        ({"instruction": "Add.", "input": "", "output": "3"}, "Add.", "3"),
        ({"instruction": "Sum up.", "context": "Long.", "response": "Short.", "category": "x"}, "Sum up.\n\nLong.",
         "Short."),  # Dolly
        ({"context": "It is red.", "question": "Colour?", "answer": "red"}, "It is red.\n\nColour?", "red"),
        ({"id": "7", "context": "It is red.", "question": "Colour?",
          "answers": {"text": ["red", "dark red"], "answer_start": [6, 6]}}, "It is red.\n\nColour?", "red"),  # SQuAD
        ({"passage": "A b.", "question": "Is it?", "answer": "yes"}, "A b.\n\nIs it?", "yes"),
        ({"input": "one", "output": "two"}, "one", "two"),
        ({"prompt": "Q: why?", "question": "why?", "answer": "so"}, "Q: why?", "so"),
        ({"instruction": "Answer in one word", "question": "in one word", "answer": "so"},
         "Answer in one word\n\nin one word", "so"),  # not the same by accident
        ({"instruction": "Repeat the word below", "input": "below", "output": "o"}, "Repeat the word below\n\nbelow",
         "o"),
        ({"question": 7, "answer": -42}, "7", "-42"),
        ({"instruction": "Add.", "input": "1", "output": "3", "text": "Below.\n\n### Add.\n\n1\n\n### 3"}, "Add.\n\n1",
         "3"),  # Alpaca's text repeats the row
        ({**GOOD, "score": 0.5, "length": 3, "is_new": True, "source": "web", "doc_id": "a", "meta": {"a": [1]}}, "p",
         "c"),
        ({**GOOD, "hint": None, "input": "  ", "choices": [], "context": "", "label": -1, "tools": {}}, "p", "c"),
        ({**GOOD, "completion": "zero\0and \U0001f600 [/bold]"}, "p", "zero\0and \U0001f600 [/bold]"),
    ],
)  # fmt: skip
def test_a_text_prompt_is_made_of_every_column_that_says_something(row, prompt, answer):
    example = read(row)
    assert (example.prompt, example.answer, example.choices, example.label) == (prompt, answer, (), -1)
    assert example.score(answer) == 1.0
    assert (example.task, example.where) == ("t", "x.jsonl, line 7")


@pytest.mark.parametrize(
    ("row", "turns"),
    [
        ({"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "a"}]}, [("user", "hi")]),
        ({"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}, {"from": "human",
          "value": "so"}, {"from": "gpt", "value": "a"}]}, [("user", "hi"), ("assistant", "ho"), ("user", "so")]),
        ({"prompt": [{"role": "user", "content": "hi"}], "completion": [{"role": "assistant", "content": "a"}]},
         [("user", "hi")]),  # TRL's
        ({"prompt": [{"role": "user", "content": "hi", "name": None}], "completion": "a"}, [("user", "hi")]),
        ({"prompt": "hi", "completion": [{"role": "assistant", "content": "a"}]}, "hi"),
        ({"prompt": "hi", "system": "Be kind.", "answer": "a"}, [("system", "Be kind."), ("user", "hi")]),
        ({"system_prompt": "Be kind.", "question": "hi", "response": "a"}, [("system", "Be kind."), ("user", "hi")]),
        ({"system": "Be.", "messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "a"}]},
         [("system", "Be."), ("user", "hi")]),
        ({"prompt": "hi", "prompt_id": "x", "messages": [{"role": "user", "content": "hi"}, {"role": "assistant",
          "content": "a"}]}, [("user", "hi")]),  # UltraChat
    ],
)  # fmt: skip
def test_a_conversation_keeps_its_turns_and_the_last_one_is_the_answer(row, turns):
    example = read(row)
    assert example.prompt == (turns if isinstance(turns, str) else tuple(turns))
    assert example.answer == "a"


@pytest.mark.parametrize(
    ("row", "answers", "label", "prompt"),
    [
        ({"choices": RED, "label": 1}, RED, 1, "q\n- red\n- blue\n- green"),
        ({"choices": RED, "label": "B"}, RED, 1, "q\n- red\n- blue\n- green"),
        ({"choices": RED, "label": "blue"}, RED, 1, "q\n- red\n- blue\n- green"),
        ({"choices": {"text": RED, "label": ["1", "2", "3"]}, "answerKey": "2"}, RED, 1, "q\n- red\n- blue\n- green"),
        ({"choices": RED, "answer": 1}, RED, 1, "q\n- red\n- blue\n- green"),  # MMLU
        ({"choices": RED, "answer": "blue"}, RED, 1, "q\n- red\n- blue\n- green"),
        ({"options": dict(zip("ABC", RED, strict=True)), "answer": "B"}, "ABC", 1, "q\nA. red\nB. blue\nC. green"),
        ({"choices": RED, "answer": "blue", "output": "It is B."}, ["It is A.", "It is B.", "It is C."], 1,
         "q\nA. red\nB. blue\nC. green"),
        ({"choices": RED, "output": "It is answer3"}, [f"It is answer{i}" for i in (1, 2, 3)], 2,
         "q\n1. red\n2. blue\n3. green"),
        ({"choices": RED, "output": "It is green.", "label": 2}, ["It is red.", "It is blue.", "It is green."], 2,
         "q\n- red\n- blue\n- green"),
        ({"choices": ["red", "dark red"], "output": "it is dark red"}, ["it is red", "it is dark red"], 1,
         "q\n- red\n- dark red"),
        ({"choices": [1, 2, 40], "answer": "It is 40"}, ["It is 1", "It is 2", "It is 40"], 2, "q\n- 1\n- 2\n- 40"),
        ({"choices": ["1", "2", "23"], "label": 1, "output": "answer2"}, ["answer1", "answer2", "answer3"], 1,
         "q\n1. 1\n2. 2\n3. 23"),
    ],
)  # fmt: skip
def test_the_choice_that_all_columns_mean_is_found_and_the_prompt_shows_the_choices(row, answers, label, prompt):
    example = read({"question": "q", **row})
    assert (example.choices, example.label, example.prompt) == (tuple(answers), label, prompt)
    assert example.answer == answers[label]


def test_choices_that_a_prompt_shows_are_not_listed_again():
    shows = "Which? A) red B) blue C) green"
    assert read({"prompt": shows, "choices": RED, "answer": "B"}).prompt == shows
    assert read({"prompt": "Is redness blue-green?", "choices": RED, "label": 0}).prompt.endswith("\n- green")
    turns = [{"role": "user", "content": "q"}]
    assert read({"prompt": turns, "choices": RED, "label": 0}).prompt == (("user", "q\n- red\n- blue\n- green"),)


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        ({"hint": "think"}, "the column hint would be lost, with 'think'"),
        ({"tools": [{"nme": "f"}]}, "the column tools holds [{'nme': 'f'}]: it must be a list of tools"),
        ({"tools": "f(x)"}, "the column tools holds 'f(x)', which is no JSON"),
        ({"history": [["a", "b"]]}, "the column history would be lost"),
        ({"chosen": "x", "rejected": "y"}, "the column chosen would be lost"),
        ({"text": "something else"}, "the column text would be lost"),
        ({"source": "word " * 99}, "the column source would be lost"),
        ({"source": ["word " * 30] * 2}, "the column source would be lost, with ['word"),
        ({"meta": {"table": [["word " * 30], ["other " * 30]]}}, "the column meta would be lost, with {'table'"),
        ({"author": "Ann Smith, " * 20}, "the column author would be lost"),
        ({"tags": {f"a name that is a text {i}": 1 for i in range(9)}}, "the column tags would be lost"),
        ({"[/bold]\n\x1b": "x"}, r"the column [/bold]\n\x1b would be lost"),
        ({"completion": None}, ": the column completion is empty"),
        ({"completion": " ", "output": None, "answers": []}, ": the columns completion and output are empty"),
        ({"completion": None, "prompt": ""}, ": the column prompt is empty"),
        ({"completion": None, "prompt": None, "messages": []}, ": the columns prompt and messages are empty"),
        ({"completion": None, "text": "", "label": 0, "choices": []}, "right, but the column choices is empty"),
        ({"completion": True}, "the column completion holds True, a bool, not text: write it as text"),
        ({"completion": 1.5}, "the column completion holds 1.5, a float, not text: write it as text"),
        ({"completion": {"a": 1}}, "the column completion holds {'a': 1}, a dict, not text"),
        ({"completion": ["c"]}, "the column completion, turn 1, holds 'c'"),
        ({"prompt": {"role": "user"}}, "the column prompt holds {'role': 'user'}, a dict, not text"),
        ({"prompt": "\ud800"}, r"the column prompt holds '\ud800', with half of a character"),
        ({"input": ["a"]}, "the column input holds ['a'], a list, not text"),
        ({"output": "other"}, "the columns completion and output say different things"),
        ({"label": 1}, "the column label says which choice is right, but there is no column choices"),
        ({"answerKey": "A"}, "the column answerKey says which choice is right"),
        ({"choices": 5}, "the column choices holds 5: it must be a list of 2 to 1000 texts"),
        ({"choices": ["c"]}, "must be a list of 2 to 1000 texts"),
        ({"choices": ["c", None]}, "the column choices holds None, a NoneType, not text"),
        ({"choices": ["c", [1]]}, "the column choices holds [1], a list, not text"),
        ({"choices": ["c", " "]}, "the column choices holds an empty text"),
        ({"choices": {"text": ["c", "d"], "label": ["A"]}}, "has 2 texts, and labels ['A']"),
        ({"choices": ["c", "d"], "options": ["c", "d"]}, "choices and options, which mean the same"),
        ({"choices": RED}, "which one is right does not follow from the answer 'c'"),
        ({"choices": RED, "label": 3}, "does not follow from label 3, the answer 'c'"),
        ({"choices": ["c", "d"], "label": 1}, "does not follow from label 1, the answer 'c'"),
        ({"choices": ["c", "d"], "label": 0.0}, "does not follow from label 0.0, the answer 'c'"),
        ({"choices": ["c", "d"], "label": False}, "does not follow from label False, the answer 'c'"),
        ({"choices": ["c", "d"], "label": "Z"}, "does not follow from label 'Z', the answer 'c'"),
        ({"choices": ["c", "d"], "answer": "d"}, "does not follow from answer 'd', the answer 'c'"),
        ({"completion": None, "choices": ["1", "2", "3"], "answer": 2}, "does not follow from answer 2:"),
        ({"completion": None, "choices": RED, "answer": "2"}, "does not follow from answer '2':"),
        ({"completion": None, "choices": RED}, "does not follow from other columns:"),
        ({"completion": "it is infrared", "choices": RED, "label": 0}, "does not follow"),
        ({"answers": {"text": [" "]}}, "the column answers holds an empty answer"),
        ({"answer": {"value": "c"}}, "the column answer holds {'value': 'c'}, a dict, not text"),
        ({"messages": "hi"}, "the column messages holds 'hi': it must be a list"),
        ({"messages": [5]}, "the column messages, turn 1, holds 5: a turn is a role and a text"),
        ({"messages": [{"role": "tol", "content": "x"}]}, "the column messages, turn 1, is of 'tol'"),
        ({"messages": [{"role": "user", "content": "x", "tool_calls": [1]}]}, "and no more"),
        ({"messages": [{"role": "user", "content": " "}]}, "the column messages, turn 1, is empty"),
        ({"messages": [{"role": "user", "content": "p"}]}, "must end with a turn of the assistant"),
        ({"messages": [{"role": "assistant", "content": "c"}]}, "must have a turn of the user before the answer"),
        ({"messages": [{"role": "user", "content": "z"}, {"role": "assistant", "content": "c"}]},
         "the column prompt stands beside a conversation that does not hold it"),
        ({"messages": [{"role": "user", "content": "p"}, {"role": "assistant", "content": "d"}]},
         "the columns messages and completion say different things"),
        ({"system": "a", "prompt": [{"role": "system", "content": "b"}, {"role": "user", "content": "p"}]},
         "the column system and the conversation's system turn say different things"),
        ({"task": "a\nb"}, r"the column task: 'a\nb' is no name: a name is printable"),
        ({"task": ["a"]}, "the column task holds ['a'], a list, not text"),
        ({"task": "x" * 5000}, "is no name: a name has 1 to 1000 bytes"),
        ({f"c{i}": 1 for i in range(100_000)}, "it has 100002 columns: a row has at most 1000"),
    ],
)  # fmt: skip
def test_what_is_not_understood_is_refused_with_the_column_and_what_it_holds(columns, said):
    assert said in refusal({**GOOD, **columns})


ALPACA = {"instruction": "Make a list.", "input": "1 and 2", "output": "x = [1, 2]"}
MADE = "Below is a task.\n\n### Task:\nMake a list.\n\n### Input:\n1 and 2\n\n### Output:\n"


@pytest.mark.parametrize(
    ("row", "column", "others"),
    [
        ({**ALPACA, "prompt": MADE + "x = [1, 2]"}, "prompt", "instruction and input"),
        ({**ALPACA, "input": "", "prompt": MADE + "x = [1, 2]\n\n"}, "prompt", "instruction"),
        ({**ALPACA, "output": "1 and 2", "prompt": MADE + "1 and 2"}, "prompt", "instruction and input"),
        ({**ALPACA, "output": "a\n\nb", "prompt": MADE + "a\n\nb"}, "prompt", "instruction and input"),
        ({"question": "2 + 2?", "answer": 4, "prompt": "Question: 2 + 2?\nAnswer: 4"}, "prompt", "question"),
        ({"question": "2 + 2?", "answers": ["four", "4"], "prompt": "2 + 2?\n4"}, "prompt", "question"),
        ({"question": "2 + 2?", "answer": "4", "input": "Q: 2 + 2?\nA: 4"}, "input", "question"),
        ({"question": "q?", "choices": RED, "answerKey": "C", "prompt": "q?\nred\nblue\ngreen\nC"}, "prompt",
         "question"),
        ({"question": "q?", "choices": RED, "label": 2, "prompt": "q?\nred\nblue\ngreen\ngreen"}, "prompt", "question"),
        ({**ALPACA, "prompt": MADE + "x = [1, 2]", "system": "Be."}, "prompt", "instruction and input"),
    ],
)  # fmt: skip
def test_a_prompt_that_holds_the_answer_after_the_other_columns_is_refused(row, column, others):
    said = refusal(row)
    assert f"the column {column} holds {others} and ends in the answer, " in said
    assert said.endswith(f"leave it out with --ignore-columns {column}")
    assert read(row, [column]).answer == read({k: x for k, x in row.items() if k != column}).answer


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Repeat:\nhello", "completion": "hello"},
        {"instruction": "Repeat:", "input": "hello", "output": "hello"},
        {"prompt": "Repeat:\nhello", "instruction": "Repeat:", "input": "hello", "output": "hello"},
        {"prompt": "Say no:\nno", "question": "no", "output": "no"},
        {**ALPACA, "prompt": MADE},
        {**ALPACA, "prompt": "something else\nx = [1, 2]"},
        {"question": "q?", "choices": RED, "label": 2, "prompt": "q?\nred\nblue\ngreen"},
        {"context": "The town is\nRome", "question": "Which?", "answer": "Rome"},
    ],
)
def test_a_prompt_may_end_as_the_answer_does(row):
    assert str(row.get("prompt", row.get("context", row.get("instruction")))) in read(row).prompt


def test_a_column_is_left_out_on_request_and_named():
    row = {**GOOD, "hint": "think", "n": 3, "source": "web", "context": "c " * 40}
    assert "context" not in example_of(row, "", "t", ["hint"])[1]
    example, unused = example_of(row, "", "t", ["hint", "context"])
    assert example.prompt == "p"
    assert unused == {"hint", "n", "source", "context"}


def test_a_missing_column_is_told_from_an_empty_one():
    nothing = "no column completion or output or response or answer; found prompt"
    assert refusal({"prompt": "p"}).endswith(nothing)
    assert refusal({"prompt": "p", "context": " ", "label": -1}).endswith(f"{nothing}; context, label are empty")
    assert refusal({"text": ""}).endswith("found none; text is empty")
    assert refusal({**GOOD, "task": ""}, task=None).endswith("the column task is empty")


def test_a_list_of_parts_of_text_is_one_text():
    parts = [{"type": "text", "text": "one "}, {"type": "text", "text": "two", "image": None}]
    turns = [{"role": "user", "content": parts}, {"role": "assistant", "content": parts[:1]}]
    for row in ({"messages": turns}, {"prompt": turns[:1], "completion": turns[1:]}):
        assert (read(row).prompt, read(row).answer) == ((("user", "one two"),), "one ")


@pytest.mark.parametrize(
    ("part", "said"),
    [
        ({"type": "image", "url": "x"}, "turn 1, holds a part of type 'image': a model of texts"),
        ({"type": "image_url", "image_url": {"url": "x"}}, "a part of type 'image_url'"),
        ({"type": "text", "text": "a", "image": "x"}, "a part of type 'text' that is no text alone"),
        ({"type": "text"}, "a part of type 'text' that is no text alone"),
        ({"type": "text", "text": 1.5}, "turn 1, holds 1.5, a float, not text"),
        ({"text": "a"}, "turn 1, holds {'text': 'a'}: a part is an object with a type and a text"),
        ("a", "turn 1, holds 'a': a part is an object"),
        ({"type": "text", "text": " "}, "turn 1, is empty"),
    ],
)
def test_another_part_is_refused_by_its_type(part, said):
    answer = {"role": "assistant", "content": "a"}
    assert said in refusal({"messages": [{"role": "user", "content": [part]}, answer]})


def test_a_task_is_a_column_or_given_and_never_both_ways():
    assert read({**GOOD, "task": "own"}).task == "own"
    assert read({**GOOD, "task": 3}).task == "3"
    assert "no column task; found prompt, completion" in refusal(GOOD, task=None)


@pytest.mark.parametrize(
    ("gold", "text", "score"),
    [
        ("16", "8 + 8 = 16 miles.\nThe answer is 16.", 1),
        ("16", "The answer is 16.0", 1),
        ("1200", "the answer is $1,200.", 1),
        ("16", "The answer is 17. 16 was wrong", 0),
        ("16", "8 + 8 = 16 miles", 0),
        ("8 + 8 = 16\n#### 16", "It is 16.\n#### 16", 1),
        ("8 + 8 is 16. The answer is 16.", "8 + 8 is 16. The answer is 16.", 1),
        ("blue", "Blue", 1),
        ("blue", "blue whale", 0),
    ],
)
def test_a_generated_rationale_is_scored_by_its_final_answer(gold, text, score):
    assert final_answer_score((gold,), text) == score
    assert final_answer_score(("something else", gold), text) == score


def test_each_column_of_the_table_is_one_that_is_read():
    named = {word for columns, _ in ROWS for word in columns.replace(",", " or").split(" or ")}
    rows = [
        {"task": "t", "prompt": "a", "completion": "b"},
        {
            "instruction": "a",
            "context": "b",
            "passage": "c",
            "input": "d",
            "question": "e",
            "output": "f",
            "answer": "f",
        },
        {"prompt": "a", "response": "b", "answers": ["b"], "system": "s"},
        {"prompt": "a", "choices": ["b", "c"], "label": 0},
        {"prompt": "a", "options": ["b", "c"], "answerKey": "A", "system_prompt": "s"},
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
        {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}], "tools": [{"name": "f"}]},
        {"text": "a"},
    ]
    assert {column for row in rows for column in row} == {name.strip() for name in named} == set(COLUMNS)
    assert [example_of(row, "", "t")[1] for row in rows] == [set()] * len(rows)


@pytest.mark.parametrize("column", ["label", "answerKey"])
def test_a_label_that_is_text_means_a_name_that_the_row_itself_gives_before_a_choice_of_this_text(column):
    texts = ["2", "4", "1", "3"]
    for choices in ({"text": texts, "label": ["1", "2", "3", "4"]}, dict(zip("1234", texts, strict=True))):
        for key, text in zip("1234", texts, strict=True):
            example = read({"prompt": "q", "choices": choices, column: key})
            assert example.choices[example.label] == example.answer
            assert example.label == int(key) - 1, (choices, key, text)
    assert read({"prompt": "q", "choices": texts, column: "1"}).label == 2, "without names it is a text"
    assert read({"prompt": "q", "choices": {"text": ["a", "b"], "label": ["1", "2"]}, column: "b"}).label == 1


@pytest.mark.parametrize("column", ["answer", "answers"])
def test_of_several_right_choices_each_counts(column):
    example = read({"prompt": "q", "choices": ["x", "y", "z"], column: ["y", "x"]})
    assert (example.answer, example.label, example.also) == ("y", 1, (0,))
    assert [example.score(text) for text in ("x", " y", "z", "")] == [1, 1, 0, 0]
    one = read({"prompt": "q", "choices": ["x", "y", "z"], column: ["y", "x"], "label": 1})
    assert (one.label, one.also, one.score("x")) == (1, (), 0)


@pytest.mark.parametrize("choices", [["x", "x "], {"A": "x", "B": "x"}, {"text": ["x"] * 2, "label": ["1", "2"]}])
def test_choices_of_one_text_are_refused(choices):
    with pytest.raises(ValueError, match=r"offers nothing but 'x'"):
        read({"prompt": "q", "choices": choices, "label": 1})


@pytest.mark.parametrize(
    ("said", "label", "answer", "also"),
    [
        ({"label": 0}, 0, "sky", (2,)),
        ({"label": 2}, 2, "sky ", (0,)),
        ({"label": 1}, 1, "roots", ()),
        ({"answer": "sky"}, 0, "sky", (2,)),
        ({"answerKey": "C"}, 2, "sky ", (0,)),
        ({"output": "It is C."}, 2, "It is C.", (0,)),
        ({"output": "the sky", "label": 2}, 2, "the sky", (0,)),
    ],
)
def test_of_choices_with_one_text_each_is_as_right_as_the_other(said, label, answer, also):
    example = read({"prompt": "q", "choices": ["sky", "roots", "sky "], **said})
    assert (example.label, example.answer, example.also) == (label, answer, also)
    assert [example.score(example.choices[i]) for i in range(3)] == [float(i in (label, *also)) for i in range(3)]
