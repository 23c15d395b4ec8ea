"""Tasks: the built-in ones, those of files, and which of their examples are trained and scored, and why not."""

import gzip
import json
import os
import re
import subprocess
import sys
from collections import Counter
from dataclasses import replace

import pytest
from hf.words import rows, write_rows

from align_ext.data.generated import BUILTIN_TASKS, BY_HASH_ORDER
from align_ext.data.rows import Example
from align_ext.data.tasks import Usage, read_tasks, row_ids, scored_examples, select

FORMS = {
    "chain_sum": r"-?\d+",
    "syllogism": r"Yes|No",
    "calendar_arithmetic": r"[A-Z][a-z]+day",
    "time_intervals": r"\d+:\d\d:\d\d",
    "prime_factorization": "\\d+( \N{MULTIPLICATION SIGN} \\d+)*",
}


def load_tasks(data=None, tasks=(), train_per_task=2000, test_per_task=16, seed=0, **options):
    pools = read_tasks(data, tasks, train=min(train_per_task, 60), test=test_per_task, seed=seed)
    return select(pools, train_per_task, test_per_task, **options)


@pytest.fixture(scope="module")
def builtin():
    return load_tasks(train_per_task=60, test_per_task=12)


MADE = """import hashlib, json, sys
from reasoning_gym.factory import DATASETS
from align_ext.data.generated import builtin_examples
made = {}
for name in json.loads(sys.argv[1]) or DATASETS:
    try:
        rows = [(x.prompt, x.answer) for x in builtin_examples(name, 8, 5)]
        made[name] = hashlib.sha256(repr(rows).encode()).hexdigest()
    except ValueError as error:
        made[name] = str(error)
print("\\n" + json.dumps(made))"""


def made_by_processes(names, hash_seeds, folder):
    """What processes of their own make of generators (none named: of all), by name.

    They run elsewhere: the sources in the current folder, if it has them, are not the installed package.
    """
    made = []
    for seed in hash_seeds:
        command = [sys.executable, "-c", MADE, json.dumps(names)]
        environment = os.environ | {"PYTHONHASHSEED": seed}
        run = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, check=True)
        made.append(json.loads(run.stdout.splitlines()[-1]))
    return made


def test_processes_make_the_same_examples_of_the_tasks_that_have_them(tmp_path):
    one, other = made_by_processes([*BUILTIN_TASKS, "ransom_note"], ["1", "2"], tmp_path)
    assert [name for name in one if one[name] != other[name]] == ["ransom_note"]


@pytest.mark.slow
def test_which_generators_differ_by_process_and_which_know_no_answer(tmp_path):
    one, other = made_by_processes([], ["1", "2"], tmp_path)
    assert {name for name in one if one[name] != other[name]} == BY_HASH_ORDER
    without = {name for name, text in one.items() if "knows none to learn" in text}
    assert without == {"graph_color", "rubiks_cube", "boxnet", "rush_hour", "propositional_logic"}
    assert [name for name, text in one.items() if "by its defaults" in text] == ["composite"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("ransom_note", "PYTHONHASHSEED=0"),
        ("propositional_logic", "knows none to learn"),
        ("composite", "by its defaults"),
    ],
)
def test_generators_that_cannot_be_trained_on_are_refused(name, message, monkeypatch):
    monkeypatch.delenv("PYTHONHASHSEED", raising=False)
    with pytest.raises(ValueError, match=f"task '{name}'.*{message}"):
        load_tasks(tasks=("syllogism", name))


def test_a_fixed_hash_seed_makes_them_repeatable(monkeypatch):
    monkeypatch.setenv("PYTHONHASHSEED", "0")
    assert load_tasks(tasks=("ransom_note",), train_per_task=4, test_per_task=2).names == ("ransom_note",)


def test_five_built_in_tasks_each_answer_in_a_form_of_their_own(builtin):
    assert set(builtin.names) == set(FORMS)
    for example in (*builtin.train, *builtin.test):
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
    asked = [row.get("prompt") or row["instruction"] for row in everything]
    assert {x.prompt for x in data.test} == set(asked[30:])
    assert {x.prompt for x in data.train} == set(asked[:30]), "what stands in the test file is not trained on"
    few = load_tasks(str(tmp_path), test_per_task=1)
    assert few.train == data.train, "nor what stands there and is not scored now"
    assert few.usage["next"] == {
        "train": Usage(20, 15, {"with a held-out prompt": 5}, 0),
        "test": Usage(9, 1, {"beyond eval_examples": 8}, 0),
    }


def test_the_examples_chosen_do_not_depend_on_the_order_of_the_rows(tmp_path):
    write_rows(tmp_path / "a.jsonl", list(rows()))
    write_rows(tmp_path / "b.jsonl", list(rows())[::-1])
    one, two = (load_tasks(str(tmp_path / name), test_per_task=4, train_per_task=6) for name in ("a.jsonl", "b.jsonl"))
    assert one == two


def test_every_seed_scores_the_same_rows_and_trains_on_its_own(tmp_path):
    write_rows(tmp_path / "a.jsonl")
    pools = read_tasks(str(tmp_path / "a.jsonl"))
    zero, again, one = (select(pools, 6, 4, dev_per_task=3, seed=seed) for seed in (0, 0, 1))
    assert zero == again
    assert (one.test, one.dev) == (zero.test, zero.dev)
    assert one.train != zero.train
    assert {len(zero.train), len(zero.dev)} == {12, 6}
    asked = [{x.prompt for x in part} for part in (zero.test, zero.dev, [*zero.train, *one.train])]
    assert not (asked[0] & asked[1])
    assert not (asked[0] & asked[2])
    assert not (asked[1] & asked[2])


def test_generated_rows_to_choose_on_depend_on_no_seed_and_are_neither_trained_nor_tested():
    parts = {"train": 20, "test": 5, "dev": 5}
    one, two = (select(read_tasks(None, ["syllogism", "spell_backward"], seed=seed, **parts), 20, 5, dev_per_task=5)
                for seed in (0, 9))  # fmt: skip
    assert one.dev == two.dev
    assert one.names == ("syllogism", "spell_backward"), "any generator of reasoning-gym may be named"
    assert len(one.dev) == 10
    assert not {x.prompt for x in one.dev} & {x.prompt for x in (*one.train, *one.test, *two.train)}
    with pytest.raises(ValueError, match="unknown task 'silogism'; did you mean 'syllogism'"):
        read_tasks(None, ["silogism"])


def test_the_id_of_a_row_is_that_of_its_content(tmp_path):
    write_rows(tmp_path / "a.jsonl", list(rows()))
    write_rows(tmp_path / "b.jsonl", list(rows())[::-1])
    first, second = (select(read_tasks(str(tmp_path / name)), 6, 9).test for name in ("a.jsonl", "b.jsonl"))
    assert row_ids(first) == row_ids(second)
    assert len(set(row_ids(first))) == len(first)
    x = Example("t", "p", "a", ("a", "b"), 0)
    assert row_ids([x, replace(x, label=1, answer="b"), replace(x, prompt="q"), x])[::3] == [
        row_ids([x])[0], row_ids([x])[0] + "#2",
    ]  # fmt: skip
    assert len(set(row_ids([x, replace(x, label=1, answer="b"), replace(x, prompt="q"), x]))) == 4


def test_some_tasks_can_be_chosen_and_an_unknown_one_is_named_with_the_nearest(tmp_path):
    file = str(write_rows(tmp_path / "x.jsonl"))
    assert load_tasks(file, tasks=["threes"]).names == ("threes",)
    with pytest.raises(ValueError, match=r"'three'.*'threes'"):
        load_tasks(file, tasks=["three"])


def test_examples_that_do_not_fit_make_room_for_others(tmp_path):
    file = str(write_rows(tmp_path / "x.jsonl"))
    data = load_tasks(file, test_per_task=4, train_per_task=5, fits=lambda x: "1" not in x.prompt)
    assert Counter(x.task for x in data.test) == {"next": 4, "threes": 4}
    assert Counter(x.task for x in data.train) == {"next": 5, "threes": 5}
    assert not any("1" in x.prompt for x in (*data.train, *data.test))
    assert data.usage["next"]["test"].left_out["too long (seq_len)"] > 0
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
    assert data.usage["a"]["train"] == Usage(4, 0, {"in an unused split": 4}, 0)
    file = read_tasks(str(tmp_path / "x.train.jsonl"))
    with pytest.raises(ValueError, match="no test split"):
        scored_examples(file, 9, lambda _: True, undivided=False)
    assert len(scored_examples(file, 9, lambda _: True, undivided=True).test) == 4
    with pytest.raises(ValueError, match="no examples to score on: all 4 are too long"):
        scored_examples(file, 9, lambda _: False, undivided=True)


def test_all_that_is_left_out_is_counted_by_task_and_reason(tmp_path):
    def row(i, task="a"):
        return {"task": task, "prompt": str(i), "answer": "b", "id": i, "source": "web"}

    write_rows(tmp_path / "x.train.jsonl", [*(row(i) for i in range(40)), row(3), row(3), *map(row, range(90, 95))])
    write_rows(tmp_path / "x.test.jsonl", [row(i) for i in range(90, 100)])
    write_rows(tmp_path / "x.dev.jsonl", [row(i) for i in range(100, 107)])
    write_rows(tmp_path / "y.train.jsonl", [row(i, "c") for i in range(9)])
    write_rows(tmp_path / "y.valid.jsonl", [row(i, "c") for i in range(20, 22)])
    write_rows(tmp_path / "z.jsonl", [row(i, "b") for i in range(30)])
    (tmp_path / "README.md").write_text("hello")
    data = load_tasks(str(tmp_path), train_per_task=20, test_per_task=4, fits=lambda x: x.prompt[-1] != "7")
    seen = {name: {split: usage.left_out for split, usage in splits.items()} for name, splits in data.usage.items()}
    assert seen["a"]["validation"] == {"in an unused split": 7}
    assert seen["a"]["train"]["with a held-out prompt"] == 5
    assert data.usage["a"]["train"].repeated == 2
    assert seen["b"]["train"]["with a held-out prompt"] == 4, "which are those that are scored"
    assert list(data.usage["c"]) == ["train", "validation"]
    for name, splits in data.usage.items():
        for split, usage in splits.items():
            assert usage.used + sum(usage.left_out.values()) == usage.rows, (name, split)
        examples = {"train": data.train, "test": data.test, "validation": data.test if name == "c" else []}
        used = {split: sum(x.task == name for x in examples[split]) for split in splits}
        assert used == {split: usage.used for split, usage in splits.items()}
    lines = list(data.report())
    assert lines[0].startswith("a: train 20 of 47 (")
    assert "2 repeated), test 4 of 10 (6 beyond eval_examples), validation 0 of 7 (7 in an unused split)" in lines[0]
    assert lines[3:] == ["not read: README.md", "unused columns: id (105 rows), source (105 rows)"]
    assert json.loads(json.dumps(data.counts()))["tasks"]["c"]["validation"] == {
        "rows": 2, "used": 2, "left_out": {}, "repeated": 0
    }  # fmt: skip


def test_a_report_of_many_tasks_columns_and_files_is_short(tmp_path):
    for i in range(50):
        write_rows(tmp_path / f"{i}.jsonl", [{"prompt": str(j), "answer": "b", f"{i}_id": j} for j in range(9)])
        (tmp_path / f"{i}.md").write_text("")
    lines = list(load_tasks(str(tmp_path), test_per_task=2).report())
    assert len(lines) == 23
    assert lines[20] == "... and 30 more tasks"
    assert max(map(len, lines)) < 320


def test_rows_of_a_task_in_a_split_and_in_none_are_refused(tmp_path):
    write_rows(tmp_path / "x.train.jsonl", [{"task": "a", "prompt": "p", "answer": "b"}])
    write_rows(tmp_path / "x.jsonl", [{"task": "b", "prompt": "p", "answer": "b"}])
    assert set(read_tasks(str(tmp_path)).tasks) == {"a", "b"}
    write_rows(tmp_path / "y.jsonl", [{"task": "a", "prompt": "p", "answer": "b"}])
    with pytest.raises(
        ValueError, match=r"'a' has rows in a split \('x.train.jsonl', line 1\) and rows in none \('y.jsonl'"
    ):
        read_tasks(str(tmp_path))


def test_very_many_tasks_are_refused_at_once(tmp_path):
    write_rows(tmp_path / "x.jsonl", [{"task": str(i), "prompt": "p", "answer": "b"} for i in range(10_001)])
    with pytest.raises(ValueError, match="the data has 10,001 tasks, and there may be 10,000"):
        read_tasks(str(tmp_path / "x.jsonl"))


def test_a_train_row_that_asks_what_is_tested_in_another_form_is_left_out(tmp_path):
    write_rows(tmp_path / "x.train.jsonl", [{"prompt": "p", "answer": "b"}, {"prompt": "q", "answer": "b"}])
    turns = [{"role": "user", "content": "p"}, {"role": "assistant", "content": "b"}]
    write_rows(tmp_path / "x.test.jsonl", [{"messages": turns}])
    assert [x.prompt for x in load_tasks(str(tmp_path)).train] == ["q"]
    write_rows(tmp_path / "x.train.jsonl", [{"prompt": "p", "answer": "b"}])
    with pytest.raises(ValueError, match="'x' has no examples to train on: all have held-out prompts"):
        load_tasks(str(tmp_path))
