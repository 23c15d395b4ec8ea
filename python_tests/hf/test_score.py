"""align-lora eval: the numbers of a run's own scores, of every kind of adapter, on test splits alone; its mistakes."""

import json

import pytest
from hf.words import model_folder, rows, write_rows

from align_ext.evaluation.rows import mean_and_error

KEYS = {"examples", "repeated", "loss", "loss_error", "accuracy", "accuracy_error", "greedy", "greedy_error"}


@pytest.fixture
def place(tmp_path):
    model_folder(tmp_path / "model")
    (tmp_path / "data").mkdir()
    content = list(rows())
    write_rows(tmp_path / "data/x.train.jsonl", content[12:])
    write_rows(tmp_path / "data/x.test.jsonl", content[:12])
    return tmp_path


def common(place):
    return ["--model", place / "model", "--data", place / "data", "--dtype", "float32", "--device", "cpu"]


def trained(run, place, *flags):
    """Results of a few steps of `train`, whose adapter is in out/adapter."""
    flags = ["--steps", 3, "--lr", 2e-2, "--eval-examples", 4, "--output", "out", *flags]
    code, _, err = run("train", *common(place), *flags)
    assert code == 0, err
    return json.loads((place / "work/out/results.json").read_text())


def scored(run, place, *flags):
    code, out, err = run("eval", *common(place), "--examples", 4, "--json", "scores.json", *flags)
    assert code == 0, err
    return json.loads((place / "work/scores.json").read_text()), out


def test_the_standard_error_of_a_mean_is_that_of_a_sample():
    assert mean_and_error([1, 0, 0, 1]) == (0.5, pytest.approx((1 / 12) ** 0.5))
    assert mean_and_error([3.0]) == (3.0, None)


@pytest.mark.parametrize("architecture", ["align_lora", pytest.param("hydra", marks=pytest.mark.slow), "multi_adapter"])
def test_the_scores_are_those_of_the_run_that_trained_the_adapter(run, place, architecture):
    results = trained(run, place, "--architecture", architecture)
    base, _ = scored(run, place)
    found, out = scored(run, place, "--adapter", "out/adapter")
    assert found["options"]["adapter"] == "out/adapter"
    assert "2 tasks: 8 examples to score on, torch.float32 on cpu" in out
    for task in ("threes", "next"):
        mine, own = found["tasks"][task], results["after"]["tasks"][task]
        assert mine.keys() == KEYS
        assert mine["loss"] == pytest.approx(own["loss"], rel=1e-5)
        assert (mine["accuracy"] if task == "threes" else mine["greedy"]) == own["score"]
        assert base["tasks"][task]["loss"] == pytest.approx(results["before"]["tasks"][task]["loss"], rel=1e-5)
        assert base["tasks"][task]["loss"] != pytest.approx(mine["loss"], rel=1e-2)
        assert f"{mine['loss']:.3f} ± {mine['loss_error']:.3f}" in out
    assert found["tasks"]["next"]["accuracy"] is None
    assert found["tasks"]["threes"]["greedy"] is not None
    if architecture == "align_lora":
        merged, _ = scored(run, place, "--adapter", "out/adapter", "--merge")
        assert merged["tasks"]["next"]["loss"] == pytest.approx(found["tasks"]["next"]["loss"], rel=1e-4)
        return
    code, _, err = run("eval", *common(place), "--adapter", "out/adapter", "--merge")
    assert code == 2
    assert ("(with `align-lora merge`, and score" if architecture == "hydra" else "one adapter for each task") in err
    assert "approximate" in err or "with `align-lora merge`" not in err
    if architecture == "multi_adapter":
        write_rows(place / "data/y.test.jsonl", [{"task": "new", "prompt": "a", "answer": "b"}])
        code, _, err = run("eval", *common(place), "--adapter", "out/adapter")
        assert code == 2
        assert "the adapter has none for new: its tasks are next, threes (--tasks keeps" in err
        others, _ = scored(run, place, "--adapter", "out/adapter", "--task", "threes")
        by_number, _ = scored(run, place, "--adapter", "out/adapter", "--task", "1", "--no-generate")
        assert others["tasks"]["threes"] == found["tasks"]["threes"]
        assert others["tasks"]["next"]["loss"] != pytest.approx(found["tasks"]["next"]["loss"], rel=1e-3)
        for task in ("new", "next"):
            assert by_number["tasks"][task]["loss"] == others["tasks"][task]["loss"]
            assert by_number["tasks"][task]["greedy"] is None
        assert [row["id"] for row in by_number["rows"]] == [row["id"] for row in others["rows"]]
        code, _, err = run("eval", *common(place), "--adapter", "out/adapter", "--task", "thres")
        assert code == 2
        assert "unknown task of the adapter 'thres'; did you mean 'threes'" in err
        assert scored(run, place, "--adapter", "out/adapter", "--tasks", "threes, next")[0] == found | {
            "options": found["options"] | {"tasks": ["threes", "next"]}
        }


def test_rows_that_repeat_others_count_once_in_eval_and_train(run, place):
    once, _ = scored(run, place, "--examples", 20)
    content = list(rows())
    write_rows(place / "data/x.test.jsonl", [row for row in content[:12] for _ in range(3)])
    found, out = scored(run, place, "--examples", 100)
    for task, mine in found["tasks"].items():
        expected = once["tasks"][task] | {"repeated": 12}
        assert mine.keys() == expected.keys()
        assert list(mine.values()) == [x if x is None else pytest.approx(x, rel=1e-5) for x in expected.values()]
    line = "repeated rows count once (next: 12 of 18, threes: 12 of 18)"
    assert line in " ".join(out.split())
    assert len(found["rows"]) == 36
    code, out, err = run("train", *common(place), "--steps", 2, "--eval-examples", 100, "--output", "out")
    assert code == 0, err
    assert line in " ".join(out.split())
    assert "Repeated held-out rows count once." in (place / "work/out/report.html").read_text()


@pytest.mark.parametrize("architecture", ["align_lora", "multi_adapter"])
def test_the_base_beside_the_adapter_is_paired_by_row(run, place, architecture):
    trained(run, place, "--architecture", architecture)
    base, _ = scored(run, place)
    found, out = scored(run, place, "--adapter", "out/adapter", "--base")
    assert "what the adapter changes, by row" in out
    assert found["base"]["tasks"] == base["tasks"]
    assert [row["nll"] for row in found["base"]["rows"]] == [row["nll"] for row in base["rows"]]
    assert found["changes"].keys() == {"threes", "next", "all tasks"}
    losses = {task: found["tasks"][task]["loss"] - base["tasks"][task]["loss"] for task in ("threes", "next")}
    for task, difference in losses.items():
        change = found["changes"][task]["loss"]
        assert change["estimate"] == pytest.approx(difference, abs=1e-9)
        assert change["low"] <= change["estimate"] <= change["high"]
        assert f"{difference:+.3f} [{change['low']:+.3f}, {change['high']:+.3f}]" in " ".join(out.split())
    assert found["changes"]["all tasks"]["loss"]["estimate"] == pytest.approx(sum(losses.values()) / 2)
    for flags in (["--base"], ["--base", "--adapter", "out/adapter", "--merge"]):
        code, _, err = run("eval", *common(place), *flags)
        assert (code, err) == (
            2, "align-lora: error: --base goes with --adapter, and without --merge: it is what the adapter stands "
            "beside\n",
        )  # fmt: skip


def test_a_run_says_which_rows_it_held_out_and_how_it_read_them(run, place):
    mine = [{"question": row["prompt"], "said": row["completion"]} for row in rows() if row["task"] == "next"]
    write_rows(place / "mine.jsonl", mine)
    choices = [{k: v for k, v in row.items() if k != "task"} for row in rows() if row["task"] == "threes"]
    write_rows(place / "threes.jsonl", choices)
    (place / "run.yaml").write_text(
        f"model: {place / 'model'}\nsteps: 3\nlr: 2.0e-2\neval_examples: 5\noutput: out\ndtype: bfloat16\nseq_len: 90\n"
        f"data:\n- {{path: {place / 'mine.jsonl'}, name: mine, columns: {{prompt: question, completion: said}}}}\n"
        f"- {place / 'threes.jsonl'}\ndevice: cpu\nchecks: none\n"
    )
    code, _, err = run("train", "--config", place / "run.yaml")
    assert code == 0, err
    results = json.loads((place / "work/out/results.json").read_text())
    code, out, err = run("eval", "--run", "out", "--json", "scores.json")
    assert code == 0, err
    assert "2 tasks: 10 examples to score on, torch.bfloat16 on cpu" in out
    assert "mine: test 5 of 24 (19 beyond eval_examples)" in out
    assert "trained on rows" not in out
    found = json.loads((place / "work/scores.json").read_text())
    for task in ("mine", "threes"):
        assert found["tasks"][task]["loss"] == pytest.approx(results["after"]["tasks"][task]["loss"], rel=1e-5)
    assert (found["options"]["seq_len"], found["options"]["adapter"]) == (90, "out/adapter")
    base, _ = run("eval", "--run", "out", "--adapter", "none", "--json", "base.json")[:2]
    assert base == 0
    assert json.loads((place / "work/base.json").read_text())["tasks"]["mine"]["loss"] == pytest.approx(
        results["before"]["tasks"]["mine"]["loss"], rel=1e-5
    )
    code, _, err = run("eval", "--run", "out", "--seq-len", 30)
    assert (code, err) == (2, "align-lora: error: --run scores the rows that the run held out: leave --seq-len out\n")
    code, out, _ = run("eval", "--adapter", "out/adapter", "--data", place / "threes.jsonl", "--no-generate")
    assert code == 0
    assert "warning: the run of this adapter trained on rows of" in " ".join(out.split())
    write_rows(place / "mine.jsonl", mine[::2])
    code, _, err = run("eval", "--run", "out")
    assert code == 2
    assert "the rows that the run 'out' held out are no longer those of its data" in err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--run", "absent"], "absent holds no finished run of `align-lora train`"),
        (["--merge"], "--merge goes with --adapter"),
        (["--adapter", "absent"], "absent"),
        (["--data", "absent.jsonl"], "no data file or folder 'absent.jsonl'"),
        (["--tasks", "nexd"], "did you mean 'next'"),
        (["--json", "absent/x.json"], "--json='absent/x.json' cannot be written: No such file"),
        (["--examples", 0], "examples must be a positive integer, got 0"),
        (["--dtype", "int8"], "dtype='int8' is not one of"),
        (["--seq-len", 3], "are too long for seq_len=3: give a larger one"),
        (["--batch-size", "many"], "--batch-size"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(run, place, flags, message):
    code, out, err = run("eval", *common(place), *flags)
    assert (code, out) == (2, "")
    assert err.startswith("align-lora: error: ")
    assert err.count("\n") == 1
    assert message in err
    assert list((place / "work").iterdir()) == []


def test_data_without_a_test_split_is_refused_and_a_file_of_its_own_is_scored(run, place):
    (place / "data/x.test.jsonl").unlink()
    code, _, err = run("eval", *common(place))
    assert code == 2
    assert "the task 'next' has no test split" in err
    flags = ["--model", place / "model", "--data", place / "data/x.train.jsonl", "--examples", 99]
    assert run("eval", *flags, "--json", "scores.json")[0] == 0
    found = json.loads((place / "work/scores.json").read_text())
    assert found["tasks"]["next"]["examples"] == 18


@pytest.mark.parametrize("name", ["data/x.test.jsonl", "model/model.safetensors", "model/config.json", "notes.md"])
def test_scores_replace_earlier_scores_and_no_other_file(run, place, name):
    (place / "notes.md").write_text("mine, of align-lora eval")
    before = {path: path.read_bytes() for path in place.rglob("*") if path.is_file()}
    code, out, err = run("eval", *common(place), "--examples", 2, "--json", place / name)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "the file there is no such result, and would be lost: name another" in err
    assert {path: path.read_bytes() for path in place.rglob("*") if path.is_file()} == before
    if name == "notes.md":
        first, _ = scored(run, place)
        assert scored(run, place)[0] == first
