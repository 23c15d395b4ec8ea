"""Several sources of several formats: their tasks, splits and columns, and tables whose texts nothing changes."""

import csv
import json

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from hf.words import write_rows
from hypothesis import given as drawn
from hypothesis import settings
from hypothesis import strategies as st

from align_ext.data import sources
from align_ext.data.named_source import NamedSource, named_sources
from align_ext.data.sources import read_source
from align_ext.data.tasks import read_tasks, scored_examples, select
from align_ext.training.options import TrainOptions


def qa(count=4, start=0):
    return [{"prompt": f"p{i}", "completion": f"c{i}"} for i in range(start, start + count)]


def table(file, rows, **options):
    with open(file, "w", newline="", encoding="utf-8") as out:
        writer = csv.DictWriter(out, list(rows[0]), **options)
        writer.writeheader()
        writer.writerows(rows)
    return file


def examples(file):
    return [(x.prompt, x.answer) for x in read_source(str(file)).splits[""]]


def refusal(call, *arguments, **options):
    with pytest.raises(ValueError, match=r"\w") as caught:
        call(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_each_source_without_a_task_column_is_a_task_of_its_own(tmp_path):
    (tmp_path / "deep").mkdir()
    write_rows(tmp_path / "sums.jsonl", qa())
    table(tmp_path / "news.csv", qa())
    write_rows(tmp_path / "deep/chat.jsonl", [{**row, "task": "a"} for row in qa()])
    pools = read_tasks([str(tmp_path / "sums.jsonl"), f"press={tmp_path}/news.csv", f"talk={tmp_path}/deep"])
    assert {task: {s: len(x) for s, x in splits.items()} for task, splits in pools.tasks.items()} == {
        "press": {"": 4}, "sums": {"": 4}, "talk.a": {"": 4}
    }  # fmt: skip
    assert not pools.files
    assert read_tasks([str(tmp_path / "sums.jsonl"), str(tmp_path / "news.csv")]).files


def test_files_of_one_task_are_its_splits_and_a_lone_file_is_what_it_is(tmp_path):
    for name in ("x.train.jsonl", "x.test.jsonl", "y.train.jsonl"):
        write_rows(tmp_path / name, qa(start=10 * (name == "x.test.jsonl")))
    paths = [str(tmp_path / name) for name in ("x.train.jsonl", "x.test.jsonl", "y.train.jsonl")]
    pools = read_tasks(paths)
    assert {task: set(splits) for task, splits in pools.tasks.items()} == {"x": {"train", "test"}, "y": {""}}
    data = select(pools, 9, 2)
    assert {x.prompt for x in data.test if x.task == "x"} <= {f"p{i}" for i in range(10, 14)}
    scored = scored_examples(read_tasks(paths[:1]), 9, lambda _: True, undivided=True)
    assert len(scored.test) == 4
    odd = write_rows(tmp_path / "held.jsonl", qa(start=20))
    pools = read_tasks([{"path": paths[0]}, {"path": str(odd), "name": "x", "split": "test"}])
    assert set(pools.tasks["x"]) == {"train", "test"}
    assert "unknown split 'tset'; did you mean 'test'" in refusal(read_tasks, {"path": paths[0], "split": "tset"})
    assert "leave split out" in refusal(read_tasks, {"path": str(tmp_path), "split": "test"})


def test_one_split_of_a_dataset_may_be_named(monkeypatch):
    parts = {name: datasets.Dataset.from_list(qa(start=n)) for name, n in (("train_sft", 0), ("test_sft", 10))}
    monkeypatch.setattr(sources, "_from_hub", lambda name, streaming: datasets.DatasetDict(parts))
    assert "split: train_sft" in refusal(read_tasks, "owner/chat")
    train, test = ({"path": "owner/chat", "split": f"{split}_sft"} for split in ("train", "test"))
    pools = read_tasks([train, test])
    assert {split: len(x) for split, x in pools.tasks["chat"].items()} == {"train": 4, "test": 4}
    assert set(read_tasks(train).tasks["chat"]) == {""}
    assert "did you mean 'train_sft'" in refusal(read_tasks, {"path": "owner/chat", "split": "train"})


def test_one_task_in_two_sources_is_refused_with_the_cure(tmp_path):
    (tmp_path / "more").mkdir()
    one, two = (str(write_rows(tmp_path / name, qa())) for name in ("x.jsonl", "more/x.jsonl"))
    said = refusal(read_tasks, [one, two])
    assert said.startswith("the task 'x' is in ")
    assert f"--data other={two}" in said
    assert set(read_tasks([one, f"other={two}"]).tasks) == {"x", "other"}
    assert "is there twice" in refusal(read_tasks, [one, one])
    assert "rows in none" in refusal(read_tasks, [one, str(write_rows(tmp_path / "more/x.test.jsonl", qa()))])


def test_columns_have_the_names_that_the_user_says(tmp_path):
    file = str(write_rows(tmp_path / "x.jsonl", [{"q": "2+2", "a": "4", "kind": "sum"}] * 2))
    (example, _) = read_source(NamedSource(file, columns={"prompt": "q", "completion": "a", "task": "kind"})).splits[""]
    assert (example.task, example.prompt, example.answer) == ("sum", "2+2", "4")
    other = str(write_rows(tmp_path / "y.jsonl", [{"text_in": "b", "a": "c"}] * 2))
    own = {"path": other, "columns": {"prompt": "text_in", "completion": "a"}}
    pools = read_tasks([file, own], columns=["prompt=q", "completion=a"], ignore_columns=["kind"])
    assert {name: splits[""][0].prompt for name, splits in pools.tasks.items()} == {"x": "2+2", "y": "b"}
    said = refusal(read_tasks, [file, other], columns=["prompt=q", "completion=a"], ignore_columns=["kind"])
    assert "no column prompt" in said or "unknown column 'q'" in said
    assert "unknown column 'qq'; did you mean 'q'?" in refusal(
        read_tasks, file, columns={"prompt": "q", "completion": "a", "context": "qq"}, ignore_columns=["kind"]
    )
    both = str(write_rows(tmp_path / "z.jsonl", [{"prompt": "p", "q": "q", "answer": "a"}]))
    assert "a column prompt beside 'q'" in refusal(read_tasks, both, columns=["prompt=q"])


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"name": "x"}, "has no path"),
        ({"path": "x", "colums": {}}, "unknown entry of a source 'colums'; did you mean 'columns'"),
        ({"path": 3}, "path=3 must be text"),
        ({"path": "x", "name": " "}, "is no name"),
        ({"path": "x", "columns": "prompt"}, "columns must be pairs such as prompt=question"),
        ({"path": "x", "columns": {"promt": "q"}}, "unknown column of a row 'promt'; did you mean 'prompt'"),
        ({"path": "x", "columns": {"prompt": "q", "answer": "q"}}, "'q' is there twice"),
        ([["x"]], "a source is a text or a mapping"),
    ],
)
def test_a_wrong_source_is_named_with_what_is_allowed(data, message):
    assert message in refusal(named_sources, data)
    assert message in refusal(TrainOptions.from_mapping, {"data": data})


def test_the_option_is_a_text_or_a_list_and_one_text_stays_a_text():
    assert TrainOptions.from_mapping({"data": "a/b.jsonl"}).data == "a/b.jsonl"
    assert TrainOptions.from_mapping({"data": ["a/b.jsonl"]}).to_dict()["data"] == "a/b.jsonl"
    for none in (None, "none", []):
        assert TrainOptions.from_mapping({"data": none}).data is None
    given = {"data": ["a, b.csv", {"path": "c", "columns": {"prompt": "q"}}], "columns": {"answer": "a=b"}}
    options = TrainOptions.from_mapping(given)
    assert options.to_dict()["data"] == given["data"]
    assert options.columns == ("answer=a=b",)
    assert TrainOptions.from_mapping(options.to_dict()) == options


TEXTS = ["NA", "007", "1e5", " padded ", "null", "True", "", 'a "quoted" word', "two\nlines", "1,5", "=1+1", "é\u2028x"]


@pytest.mark.parametrize("ending", ["csv", "tsv"])
def test_a_table_keeps_every_text_as_it_is(ending, tmp_path):
    rows = [{"prompt": f"q{i}", "completion": text} for i, text in enumerate(TEXTS) if text.strip()]
    file = table(tmp_path / f"x.{ending}", rows, delimiter="," if ending == "csv" else "\t")
    assert examples(file) == [(row["prompt"], row["completion"]) for row in rows]


@settings(max_examples=60, deadline=None)
@drawn(st.lists(st.tuples(*[st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1)] * 2),
                min_size=1, max_size=4), st.sampled_from(["csv", "tsv"]))  # fmt: skip
def test_any_text_comes_back(tmp_path_factory, pairs, ending):
    rows = [{"prompt": prompt, "completion": answer} for prompt, answer in pairs if prompt.strip() and answer.strip()]
    if rows:
        file = tmp_path_factory.mktemp("any") / f"x.{ending}"
        table(file, rows, delimiter="," if ending == "csv" else "\t")
        assert examples(file) == [(row["prompt"], row["completion"]) for row in rows]


def test_a_label_of_digits_is_an_index_and_choices_are_json(tmp_path):
    rows = [{"": i, "prompt": f"q{i}", "choices": json.dumps(["no", "yes"]), "label": i % 2, "score": 0.5}
            for i in range(4)]  # fmt: skip
    found = read_source(str(table(tmp_path / "x.csv", rows))).splits[""]
    assert [(x.label, x.answer) for x in found] == [(0, "no"), (1, "yes")] * 2
    rows[2]["choices"] = "['no', 'yes']"
    assert refusal(read_source, str(table(tmp_path / "x.csv", rows))).startswith(
        "'x.csv', line 4: the column choices holds"
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("prompt,answer\na,b\na,b,c\n", "line 3: it has 3 fields, and the line of names has 2"),
        ("prompt,answer\na,b\n\na\n", "line 4: it has 1 fields"),
        ("prompt,prompt\na,b\n", "line 1: two columns have the name 'prompt'"),
        ("prompt,,answer\na,b,c\n", "line 1: column 2 has no name"),
        ('prompt,answer\n"a"b,c\n', "line 2: cannot be read"),
        ('prompt,answer\n"a,c\n', "cannot be read"),
        ("prompt;answer\na;b\n", "line 1: its names are separated by ';'"),
        ("prompt\tanswer\na\tb\n", "line 1: its names are separated by '\\t'"),
        ("prompt,answer\n", "holds no rows"),
        ("", "holds no rows"),
        ("prompt,answer\n\xff,b\n", "line 2: cannot be read"),
    ],
)
def test_a_table_that_cannot_be_used_says_where_and_why(content, message, tmp_path):
    (tmp_path / "x.csv").write_bytes(content.encode("latin-1"))
    assert message in refusal(read_source, str(tmp_path / "x.csv"))


def test_parquet_has_the_types_of_its_columns(tmp_path):
    columns = {"prompt": ["a", "b"], "choices": [["x", "y"]] * 2, "label": [1, 0], "score": [0.5, None]}
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "x.parquet")
    found = read_source(str(tmp_path / "x.parquet"))
    assert [(x.label, x.where) for x in found.splits[""]] == [(1, "'x.parquet', row 1"), (0, "'x.parquet', row 2")]
    assert found.unused == {"score": 1}
    (tmp_path / "y.parquet").write_bytes((tmp_path / "x.parquet").read_bytes()[:-40])
    assert refusal(read_source, str(tmp_path / "y.parquet")).startswith("'y.parquet', row 1: cannot be read")
    pyarrow.parquet.write_table(pyarrow.table({"prompt": [b"a"], "answer": ["b"]}), tmp_path / "z.parquet")
    assert "row 1: the column prompt holds b'a', a bytes" in refusal(read_source, str(tmp_path / "z.parquet"))


def test_the_command_takes_several_sources_and_names_what_is_wrong(run, tmp_path):
    one = write_rows(tmp_path / "x.jsonl", qa())
    code, out, _ = run("train", "--data", one, "--data", f"y={one}", "--columns", "prompt=q,answer=a", "--print-config")
    assert code == 0
    assert f"data:\n- {one}\n- y={one}\n" in out
    assert "columns:\n- prompt=q\n- answer=a\n" in out
    code, _, said = run("train", "--data", one, "--data", one, "--output", "out")
    assert (code, said.count("\n")) == (2, 1)
    assert "is there twice" in said
