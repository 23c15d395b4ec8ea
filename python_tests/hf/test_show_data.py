"""`align-lora data`: every count is that of the run with the same options, and every line is right by hand."""

import io
import json

import pytest
from hf.runs import options, prepare
from hf.words import model_folder, tokenizer, write_rows
from rich.console import Console

from align_ext.cli.show_data import show_data
from align_ext.data.overview import learnt_parts, lengths, normalised, overlaps, padding
from align_ext.data.rows import Example
from align_ext.data.task_sampler import TaskSampler
from align_ext.training import fit
from align_ext.training.options import TrainOptions


def row(count, task=0):
    return {"input_ids": [5] * count, "labels": [-100] * (count - 1) + [5], "task_ids": task}


def test_lengths_by_hand():
    assert lengths([]) == {}
    assert lengths([7]) == {"min": 7, "median": 7, "p95": 7, "max": 7, "sum": 7}
    assert lengths(range(1, 101)) == {"min": 1, "median": 50, "p95": 95, "max": 100, "sum": 5050}


def test_padding_by_hand():
    rows = [row(2), row(4), row(6), row(8)]
    order = list(TaskSampler([0] * 4, 2, per_task=1, batches=2))
    lengths_of = [len(rows[i]["input_ids"]) for i in order]
    computed = 2 * max(lengths_of[:2]) + 2 * max(lengths_of[2:])
    found = padding(rows, 2, TaskSampler([0] * 4, 2, per_task=1, batches=2))
    assert found == {"batches": 2, "tokens": 20, "padding": 1 - 20 / computed}


def test_what_asks_the_same_is_found_and_signs_are_no_punctuation():
    train = [Example("a", "What is 2 + 3?", "5"), Example("a", "x", "1"), Example("b", (), "Some text."),
             Example("a", "what is 2 - 3", "-1")]  # fmt: skip
    test = [Example("c", " what is  2 + 3", "5"), Example("c", "x", "2"), Example("b", (), "some text")]
    assert [(one.asked, exact) for one, _, exact in overlaps(train, test)] == [
        ("What is 2 + 3?", False), ("x", True), ("Some text.", False)
    ]  # fmt: skip
    assert normalised("1.5 km") != normalised("15 km")
    assert normalised("?!") == "?!"


def test_the_parts_of_a_row_are_all_of_it():
    made = tokenizer()
    ids = made("ab c[END]")["input_ids"]
    assert learnt_parts(made, {"input_ids": ids, "labels": [-100, ids[1], -100, *ids[3:]]}) == [
        ("a", False), ("b", True), (" ", False), ("c[END]", True)
    ]  # fmt: skip


def shown(given, width=200):
    out = Console(file=io.StringIO(), width=width, markup=False, emoji=False)
    return show_data(given, None, out), out.file.getvalue()


def test_counts_and_rows_are_those_of_the_run(place):
    rows = [{"task": t, "prompt": f"{t}{i}", "answer": t * (1 + 9 * (i == 3))} for t in "ab" for i in range(12)]
    write_rows(place / "rows.jsonl", [*rows, {"task": "a", "prompt": "B1!", "answer": "a"}, rows[0]])
    given = {"seq_len": 9, "steps": 3, "packing": True, "train_examples": "b=3", "eval_examples": 3}
    content, said = shown(options(place, **given))
    job = prepare(place, **given)
    for task, splits in json.loads(json.dumps(job.data.counts()))["tasks"].items():
        for split, usage in splits.items():
            assert usage.items() <= content["tasks"][task][split].items()
    assert content["padding"]["packed_rows"] == len(job.train_rows)
    assert content["padding"]["batches"] == 3
    assert content["too_long"]["rows"] == 2
    assert content["too_long"]["longest"] == 2 + 1 + 10 + 1
    assert "--seq-len 14 would keep all of them" in said
    assert content["overlap"]["exact"] == 0
    assert content["tasks"]["b"]["train"]["tokens"]["max"] == 2 + 1 + 1 + 1 + any(
        len(x.prompt) == 3 for x in job.data.train if x.task == "b"
    )
    first = next(x for x in job.data.train if x.task == "a")
    assert f"{first.prompt}\n[[a[END]]]" in said
    assert fit.trained_tokens(job) > 0


def test_shares_that_a_batch_cannot_hold_are_told_by_the_command_and_the_run(place):
    rows = [{"task": t, "prompt": f"{t}{i}", "answer": t} for t in "ab" for i in range(12)]
    write_rows(place / "rows.jsonl", rows)
    far = {"mixing_weights": "a=9", "batch_size": 4, "per_task": 2, "steps": 10, "eval_examples": 2}
    said = {}
    for name, given in (("far", far), ("near", far | {"batch_size": 20}), ("free", far | {"mixing_weights": ()})):
        content, said[name] = shown(options(place, **given))
        share = {task: content["tasks"][task]["train"]["share"] for task in "ab"}
        assert share["a"]["asked"] == pytest.approx(0.5 if name == "free" else 0.9)
        assert share["a"]["drawn"] == pytest.approx({"far": 0.5, "near": 0.9, "free": 0.5}[name])
    line = "'a' has 50% of the run's rows, where 90% are asked: a micro-batch of 4 holds two tasks or more"
    assert [line in said[name] for name in said] == [True, False, False]
    out = Console(file=io.StringIO(), width=300)
    prepare(place, said=out, **far)
    assert line in out.file.getvalue()


def test_the_turns_that_are_learnt_are_those_that_the_option_names(tmp_path):
    place = {"model": str(model_folder(tmp_path / "model", chat=True)), "eval_examples": 1, "steps": 1}
    talk = [{"role": role, "content": text} for role, text in [("user", "a"), ("assistant", "b")]] * 2
    rows = [{"task": t, "messages": [{"role": "user", "content": f"{i}"}, *talk[1:]]} for t in "ab" for i in range(9)]
    write_rows(tmp_path / "talk.jsonl", rows)
    learnt = {}
    for given in ({}, {"trained_turns": "all"}, {"trained_turns": "last"}):
        made = TrainOptions.from_mapping({**place, "data": str(tmp_path / "talk.jsonl"), **given})
        parts = shown(made)[0]["examples"]["a"]
        learnt[given.get("trained_turns")] = [text[:1] for text, is_learnt in parts if is_learnt]
    assert learnt == {None: ["b", "b"], "all": ["b", "b"], "last": ["b"]}


def test_the_command_prints_and_writes_and_train_does_the_same_without_a_step(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model_folder(tmp_path / "model")
    write_rows(tmp_path / "rows.jsonl")
    write_rows(tmp_path / "more.jsonl", [{"prompt": f"x{i}", "answer": "y"} for i in range(9)])
    flags = ("--model", "model", "--data", "rows.jsonl", "--data", "more.jsonl", "--eval-examples", "2")
    code, out, _ = run("data", *flags, "--json", "data.json")
    assert code == 0
    content = json.loads((tmp_path / "data.json").read_text())
    assert set(content["tasks"]) == {"more", "next", "threes"}
    assert content["options"]["data"] == ["rows.jsonl", "more.jsonl"]
    code, again, _ = run("train", *flags, "--dry-run")
    assert (code, again) == (0, out)
    assert not (tmp_path / "align_lora_run").exists()
    code, _, said = run("data", *flags, "--train-examples", "mre=3")
    assert (code, said.count("\n")) == (2, 1)
    assert "did you mean 'more'" in said


@pytest.mark.parametrize("file", ["rows.jsonl", "absent/x.json"])
def test_a_file_of_others_is_not_written_over(run, tmp_path, monkeypatch, file):
    monkeypatch.chdir(tmp_path)
    model_folder(tmp_path / "model")
    write_rows(tmp_path / "rows.jsonl")
    before = (tmp_path / "rows.jsonl").read_text()
    code, _, said = run("data", "--model", "model", "--data", "rows.jsonl", "--json", file)
    assert (code, said.count("\n")) == (2, 1)
    assert (tmp_path / "rows.jsonl").read_text() == before
