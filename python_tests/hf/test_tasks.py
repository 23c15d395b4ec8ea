"""Tasks: the built-in ones, rows of files, tokens with labels on the answer alone, and the order that mixes them."""

import gzip
import json
import re
from collections import Counter

import datasets
import huggingface_hub
import pytest
from hf.words import rows, tokenizer, write_rows

from align_ext.hf import tasks
from align_ext.hf.tasks import Example, read_tasks, scored_examples, select

FORMS = {
    "chain_sum": r"-?\d+",
    "syllogism": r"Yes|No",
    "calendar_arithmetic": r"[A-Z][a-z]+day",
    "time_intervals": r"\d+:\d\d:\d\d",
    "prime_factorization": "\\d+( \N{MULTIPLICATION SIGN} \\d+)*",
}


def load_tasks(data=None, tasks=(), train_per_task=2000, test_per_task=16, seed=0, **options):
    pools = read_tasks(data, tasks, count=min(train_per_task, 60), seed=seed)
    return select(pools, train_per_task, test_per_task, **options)


@pytest.fixture(scope="module")
def builtin():
    return load_tasks(train_per_task=60, test_per_task=12)


def test_five_built_in_tasks_each_answer_in_a_form_of_their_own(builtin):
    assert set(builtin.names) == set(FORMS)
    for example in builtin.train + builtin.test:
        others = [name for name, form in FORMS.items() if re.fullmatch(form, example.answer) and name != example.task]
        assert re.fullmatch(FORMS[example.task], example.answer), example
        assert others == [] or example.answer.lstrip("-").isdigit(), "a prime is its own factorization"


def test_a_built_in_task_scores_its_own_answer_right_and_rubbish_wrong(builtin):
    for example in builtin.test:
        assert example.score(example.answer) == 1.0
        assert example.score("\N{SNOWMAN} no idea") < 0.2
        assert example.choices == () or example.choices[example.label] == example.answer


def test_what_is_tested_is_never_trained_on_and_depends_on_no_seed(builtin):
    train = {(x.task, x.prompt) for x in builtin.train}
    assert not train & {(x.task, x.prompt) for x in builtin.test}
    assert Counter(x.task for x in builtin.train)["time_intervals"] == 60, "their generators' seeds do not overlap"
    other = load_tasks(train_per_task=60, test_per_task=12, seed=7)
    assert other.test == builtin.test
    assert other.train != builtin.train
    assert load_tasks(train_per_task=60, test_per_task=12).train == builtin.train


def test_a_scorer_that_stumbles_over_generated_text_means_wrong():
    def scorer(text):
        return 1 / len(text)

    assert Example("t", "p", "a", scorer=scorer).score("") == 0.0


def test_a_choice_is_put_into_the_form_of_the_gold_answer():
    def choices(**row):
        base = {"task": "t", "instruction": "i", "label": 2, "choices": ["red", "blue", "green"]}
        return tasks.example_of(base | row, "row").choices

    assert choices(output="the correct answer is answer3") == tuple(
        f"the correct answer is answer{i}" for i in (1, 2, 3)
    )
    assert choices(output="It is green") == ("It is red", "It is blue", "It is green")
    assert choices(output="the correct answer is answer1") == ()
    assert choices(output="it is answer3", label=-1) == ()
    assert choices(output="it is answer3", label=3) == ()


def test_a_question_without_an_instruction_shows_its_choices():
    row = {"task": "t", "question": "which?", "choices": ["red", "blue"], "label": 1, "answer": "blue"}
    example = tasks.example_of(row, "row")
    assert example.prompt == "which?\n- red\n- blue"
    assert (example.choices, example.label) == (("red", "blue"), 1)


@pytest.mark.parametrize(
    ("gold", "text", "score"),
    [
        ("16", "8 + 8 = 16 miles.\nThe answer is 16.", 1),
        ("16", "The answer is 16.0", 1),
        ("1200", "the answer is $1,200.", 1),
        ("16", "The answer is 17. 16 was wrong", 0),
        ("16", "8 + 8 = 16 miles", 0),
        ("blue", "Blue", 1),
        ("blue", "blue whale", 0),
    ],
)
def test_a_generated_rationale_is_scored_by_its_final_answer(gold, text, score):
    assert tasks.final_answer_score(gold, text) == score


def test_a_file_without_splits_keeps_some_examples_of_each_task_apart(tmp_path):
    data = load_tasks(str(write_rows(tmp_path / "x.jsonl")), test_per_task=5)
    assert data.names == ("next", "threes")
    assert Counter(x.task for x in data.test) == {"next": 5, "threes": 5}
    assert Counter(x.task for x in data.train) == {"next": 19, "threes": 19}
    assert not {x.prompt for x in data.train} & {x.prompt for x in data.test}


def test_a_folder_is_split_by_the_names_of_its_files_and_reads_gzip(tmp_path):
    everything = list(rows())
    write_rows(tmp_path / "tiny.train.jsonl", everything[:40])
    with gzip.open(tmp_path / "tiny.test.jsonl.gz", "wt") as file:
        file.writelines(json.dumps(row) + "\n" for row in everything[30:])
    data = load_tasks(str(tmp_path), test_per_task=100)
    assert {x.prompt for x in data.test} == {row.get("prompt") or row["instruction"] for row in everything[30:]}
    assert len(data.train) == 30, "what stands in the test file is not trained on"


def test_the_examples_chosen_do_not_depend_on_the_order_of_the_rows(tmp_path):
    write_rows(tmp_path / "a.jsonl", list(rows()))
    write_rows(tmp_path / "b.jsonl", list(rows())[::-1])
    one, two = (load_tasks(str(tmp_path / name), test_per_task=4, train_per_task=6) for name in ("a.jsonl", "b.jsonl"))
    assert one == two
    assert load_tasks(str(tmp_path / "a.jsonl"), test_per_task=4, seed=1).test != one.test


def test_some_tasks_can_be_chosen_and_an_unknown_one_is_named_with_the_nearest(tmp_path):
    file = str(write_rows(tmp_path / "x.jsonl"))
    assert load_tasks(file, tasks=["threes"]).names == ("threes",)
    with pytest.raises(ValueError, match=r"'three'.*'threes'"):
        load_tasks(file, tasks=["three"])


GOOD = '{"task": "t", "prompt": "p", "completion": "c"}\n'


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"prompt": "p", "completion": "c"}\n', r"x\.jsonl, line 1: no column task; found prompt, completion"),
        (
            GOOD + '{"task": "t", "text": "p"}\n',
            r"line 2: no column prompt or instruction or question; found task, text",
        ),
        ('{"task": "t", "prompt": "p"}\n', "line 1: no column completion or output or answer; found task, prompt"),
        (GOOD + GOOD + "{broken\n", r"x\.jsonl, line 3: cannot be read"),
        ("[1, 2]\n", "line 1: cannot be read .not a JSON object"),
        ("\n", "holds no examples"),
        (GOOD, "the task 't' has no examples to train on"),
    ],
)
def test_a_file_that_cannot_be_used_says_where_and_why(content, message, tmp_path):
    (tmp_path / "x.jsonl").write_text(content)
    with pytest.raises(ValueError, match=message) as caught:
        load_tasks(str(tmp_path / "x.jsonl"))
    assert "\n" not in str(caught.value)


def test_damaged_compression_is_an_error_too(tmp_path):
    (tmp_path / "x.jsonl.gz").write_bytes(gzip.compress(GOOD.encode() * 999)[:-9])
    with pytest.raises(ValueError, match=r"x\.jsonl\.gz, line \d+: cannot be read"):
        load_tasks(str(tmp_path / "x.jsonl.gz"))


def test_data_that_is_not_there_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "x.csv").write_text("a,b")
    for data in ("absent.jsonl", "some/absent.jsonl", "empty", "x.csv", "owner/name", "/no/such/folder"):
        with pytest.raises(ValueError, match=data) as caught:
            load_tasks(data)
        assert "\n" not in str(caught.value)


def test_a_dataset_of_the_hub_gives_its_train_and_its_test_split():
    part = datasets.Dataset.from_list([row for row in rows() if row["task"] == "threes"])
    splits = tasks._named_splits("owner/name", datasets.DatasetDict(train=part, validation=part.select(range(6))))
    assert {name: len(examples) for name, examples in splits.items()} == {"train": 24, "test": 6}
    alone = tasks._named_splits("owner/name", datasets.DatasetDict(train=part))
    assert set(alone) == {""}
    assert alone[""][0].choices == ("the answer is yes", "the answer is no")
    with pytest.raises(ValueError, match=r"no split train \(it has corpus"):
        tasks._named_splits("owner/name", datasets.DatasetDict(corpus=part))


@pytest.mark.parametrize("chat", [False, True])
def test_labels_stand_on_the_answer_and_the_end_token_alone(chat):
    words = tokenizer(chat)
    (row,) = tasks.features(words, [Example("t", "2+2=", "four")], {"t": 3})
    text = words.decode(row["input_ids"])
    assert text == ("<user>2+2=<bot>four[END]" if chat else "2+2=\nfour[END]")
    supervised = [token for token, label in zip(row["input_ids"], row["labels"], strict=True) if label != -100]
    assert words.decode(supervised) == "four[END]"
    assert row["labels"][-len(supervised) :] == supervised
    assert (row["task_ids"], sum(row["attention_mask"])) == (3, len(row["input_ids"]))


def test_an_example_fits_whole_with_each_of_its_answers_or_not_at_all():
    assert tasks.fits(tokenizer(), Example("t", "12345", "67"), 9)
    assert not tasks.fits(tokenizer(), Example("t", "12345", "678"), 9)
    assert not tasks.fits(tokenizer(), Example("t", "1", "2", ("2", "3" * 9), 0), 9)


def test_examples_that_do_not_fit_make_room_for_others(tmp_path):
    file = str(write_rows(tmp_path / "x.jsonl"))
    data = load_tasks(file, test_per_task=4, train_per_task=5, fits=lambda x: "1" not in x.prompt)
    assert Counter(x.task for x in data.test) == {"next": 4, "threes": 4}
    assert Counter(x.task for x in data.train) == {"next": 5, "threes": 5}
    assert not any("1" in x.prompt for x in data.train + data.test)
    assert data.left_out > 0
    with pytest.raises(ValueError, match="'next' has no examples to score on: all 24 are too long"):
        load_tasks(file, fits=lambda x: x.task != "next")


def test_only_a_test_split_is_scored_and_a_file_as_it_is(tmp_path):
    write_rows(tmp_path / "x.train.jsonl", [{"task": "a", "prompt": str(i), "answer": "b"} for i in range(4)])
    with pytest.raises(ValueError, match="the task 'a' has no test split"):
        scored_examples(read_tasks(str(tmp_path)), 9, lambda _: True, undivided=False)
    write_rows(tmp_path / "x.test.jsonl", [{"task": "a", "prompt": str(i), "answer": "b"} for i in range(5, 9)])
    data = scored_examples(read_tasks(str(tmp_path)), 3, lambda x: x.prompt != "7", undivided=False)
    assert {x.prompt for x in data.test} == {"5", "6", "8"}
    assert (data.train, data.names) == ([], ("a",))
    file = read_tasks(str(tmp_path / "x.train.jsonl"))
    with pytest.raises(ValueError, match="no test split"):
        scored_examples(file, 9, lambda _: True, undivided=False)
    assert len(scored_examples(file, 9, lambda _: True, undivided=True).test) == 4
    with pytest.raises(ValueError, match="no examples to score on: all 4 are too long"):
        scored_examples(file, 9, lambda _: False, undivided=True)
