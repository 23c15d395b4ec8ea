"""The report of a run: its statistics by hand, its words from numbers, what it shows of each kind of run, failures."""

import gzip
import json
import re
import shlex
import shutil
import warnings
from dataclasses import replace

import numpy as np
import pytest
import yaml
from hf.runs import options
from hf.runs import run as run_recipe
from hf.words import model_folder, rows, write_rows
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from align_ext.cli.train import _write_report
from align_ext.data.rows import Example
from align_ext.data.tasks import TaskData
from align_ext.evaluation.rows import RowScore, TaskScore
from align_ext.report import run_figures, run_page, run_results
from align_ext.report.formats import MINUS
from align_ext.report.run_page import changed_options, command, write_run_report
from align_ext.report.run_results import is_beyond_noise, read_run
from align_ext.report.run_words import cautions, findings
from align_ext.report.svg import picture, sheet, style
from align_ext.system.terminal import plain_console
from align_ext.training import recipe
from align_ext.training.job import Job
from align_ext.training.options import TrainOptions
from align_ext.training.record import shown_answers
from align_ext.training.run_folder import open_run

NETWORK = r"""(?:src|href)=["'](?!#|data:)|url\((?!#)|@import|https?://(?!www\.w3\.org/)"""


def test_means_over_the_steps_by_hand(monkeypatch):
    drawn = []
    monkeypatch.setattr(run_figures, "picture", lambda name, title, caption, figure: drawn.append(figure))
    found = [(step, {"m.0.a": step + 1.0, "m.0.b": 3.0, "m.1.a": step + 5.0}) for step in (0, 2, 4)]
    run_figures._by_step(found, "n", "t", "u", "c")
    (figure,) = drawn
    left, right, _ = figure.axes
    assert [line.get_ydata().tolist() for line in left.lines] == [[3.0, 5.0, 7.0], [3.0, 3.0, 3.0]]
    assert right.collections[0].get_array().reshape(2, 3).tolist() == [[2.0, 3.0, 4.0], [5.0, 7.0, 9.0]]
    assert run_figures._by_step(found[:2], "n", "t", "u", "c") is None


def row(when, number, task, nll, tokens, greedy=None):
    return {
        "when": when, "id": f"{task}-{number}", "task": task, "label": -1, "also": [], "nll": [nll],
        "tokens": [tokens], "greedy": greedy,
    }  # fmt: skip


def made_up(folder, tasks, **changed):
    """The files of a run nobody ran: tasks of [(nll before, nll after, tokens, score before, score after), ...]."""
    folder.mkdir()
    lines, results = [], {"before": {"tasks": {}, "align": None}, "after": {"tasks": {}, "align": None}}
    for place, when in enumerate(("before", "after")):
        for task, content in tasks.items():
            of_task = [row(when, i, task, one[place], one[2], one[3 + place]) for i, one in enumerate(content)]
            lines += of_task
            scored = TaskScore.of(
                [RowScore(x["id"], task, -1, (), tuple(x["nll"]), tuple(x["tokens"]), x["greedy"]) for x in of_task]
            )
            results[when]["tasks"][task] = vars(scored)
    results |= {
        "options": TrainOptions().to_dict(), "versions": {"torch": "2"}, "losses": [{"step": 1, "lm_loss": 2.0}],
        "model": {"name": "m", "dtype": "torch.float32", "device": "cpu"},
        "data": {"tasks": {task: {} for task in tasks}},
        "adapters": {"architecture": "lora", "align": None, "rank": 8, "trained_parameters": 10, "percent": 1.0},
    }  # fmt: skip
    (folder / "results.json").write_text(json.dumps(results | changed))
    (folder / "rows.jsonl.gz").write_bytes(gzip.compress("".join(json.dumps(one) + "\n" for one in lines).encode()))
    return folder


def test_the_change_of_a_ratio_and_its_error_by_hand(tmp_path):
    found = read_run(made_up(tmp_path / "run", {"a": [(4, 2, 2, 0, 1), (9, 3, 3, 0, 0)]}))
    change = found.changes[0]
    assert change.loss.estimate == pytest.approx(-8 / 5)  # (-2 - 6) / (2 + 3)
    assert change.loss.estimate == pytest.approx(change.after["loss"] - change.before["loss"])
    assert change.loss.error == pytest.approx(0.48)  # sqrt(2 / 1 (1.2^2 + 1.2^2)) / 5
    assert change.score.estimate == pytest.approx(0.5)
    assert change.score.error == pytest.approx(0.5)
    assert (found.loss.estimate, found.loss.error) == pytest.approx((change.loss.estimate, change.loss.error))


def test_the_error_is_that_of_the_score_of_a_task():
    rng = np.random.default_rng(0)
    d, tokens = rng.normal(-1, 1, 50), rng.integers(1, 20, 50)
    before = [row("before", i, "a", 0.0, int(t)) for i, t in enumerate(tokens)]
    after = [row("after", i, "a", float(x), int(t)) for i, (x, t) in enumerate(zip(d, tokens, strict=True))]
    values = run_results._losses(before, after)
    pairs = zip(d, tokens, strict=True)
    expected = TaskScore.of([RowScore(str(i), "a", -1, (), (float(x),), (int(t),)) for i, (x, t) in enumerate(pairs)])
    assert values.mean() == pytest.approx(expected.loss)
    assert values.std(ddof=1) / 50**0.5 == pytest.approx(expected.loss_error)


def test_doubled_rows_change_neither_a_result_nor_its_error_nor_a_difference(tmp_path):
    content = [(2.0 + i % 3, 1.0 + i % 2, 1 + i % 4, i % 2, 1) for i in range(9)]
    once, twice = (made_up(tmp_path / name, {"a": content, "b": content[:5]}) for name in ("once", "twice"))
    lines = gzip.decompress((twice / "rows.jsonl.gz").read_bytes()).decode().splitlines()
    doubled = [text for one in lines for text in (one, re.sub(r'("id": "[^"]*)', r"\1#2", one))]
    (twice / "rows.jsonl.gz").write_bytes(gzip.compress("\n".join(doubled).encode()))
    first, second = read_run(once), read_run(twice)
    assert len(second.ids) == 2 * len(first.ids)
    assert (second.loss, second.score, second.changes) == (first.loss, first.score, first.changes)
    rows = [RowScore(f"a-{i}", "a", -1, (), (x[0],), (x[2],), x[3]) for i, x in enumerate(content)]
    copies = [replace(row, id=f"{row.id}#{k}") for row in rows for k in (2, 3)]
    assert TaskScore.of([*rows, *copies]) == replace(TaskScore.of(rows), repeated=18)


def test_a_run_says_of_each_task_how_many_rows_repeat_others(tmp_path):
    folder = made_up(tmp_path / "run", {"a": many(3, 1), "b": many(3, 1)})
    results = json.loads((folder / "results.json").read_text())
    results["after"]["tasks"]["b"] |= {"repeated": 3}
    (folder / "results.json").write_text(json.dumps(results))
    found = {one.kind: one for one in cautions(read_run(folder))}
    assert found["repeated"].about == ["b: 3 of 43"]


def many(before, after, spread=0.05, count=40):
    rng = np.random.default_rng(1)
    return [(before + e, after + f, 1, None, None) for e, f in rng.normal(0, spread, (count, 2))]


def test_words_say_what_is_beyond_noise_and_what_is_not(tmp_path):
    tasks = {"better": many(3, 1), "worse": many(1, 2), "noise": many(2, 2, spread=1)}
    run = read_run(made_up(tmp_path / "run", tasks))
    said = " ".join(findings(run))
    assert "The loss is better in better; worse in worse; within noise in noise." in said
    assert [is_beyond_noise(one.loss) for one in run.changes] == [True, True, False]
    assert f"The loss of held-out answers fell from 1.991 to 1.623 nats a token ({MINUS}0.368 [" in said
    assert "score" not in said
    assert [one.about for one in cautions(run) if one.kind == "worse"] == [["worse"]]


def test_five_rows_show_nothing_however_alike_they_are(tmp_path):
    changes = {}
    for count in (5, 6):
        run = read_run(made_up(tmp_path / str(count), {"a": many(3, 1, count=count)}))
        changes[count] = (is_beyond_noise(run.loss), "fell" in findings(run)[0])
        assert run.loss.closed_high < 0
    assert changes == {5: (False, False), 6: (True, True)}


def test_words_of_one_task_within_noise_and_of_nothing_that_changed(tmp_path):
    said = findings(read_run(made_up(tmp_path / "noise", {"a": many(2, 2, spread=1)})))
    assert said[0].startswith("The loss of held-out answers did not change by more than noise (")
    said = findings(read_run(made_up(tmp_path / "same", {"a": [(2, 2, 1, 1, 1)] * 5})))
    assert said[:2] == ["The loss of held-out answers is 2.000 nats a token as before.", "The score is 1.00 as before."]
    said = findings(read_run(made_up(tmp_path / "row", {"a": [(2, 1, 1, None, None)]})))
    assert said[0] == "The loss of held-out answers has no interval: it takes two held-out rows of a task."


def test_warnings_of_failed_checks_overfitting_and_long_rows(tmp_path):
    changed = {
        "checks": {"merged": {"passed": False, "difference": 0.3, "detail": ""}},
        "evaluations": [{"step": 5, "eval_loss": 1.0}, {"step": 9, "eval_loss": 1.5}],
        "data": {"tasks": {"a": {"train": {"used": 3, "left_out": {"too long (seq_len)": 7}}}}},
    }
    found = {one.kind: one for one in cautions(read_run(made_up(tmp_path / "run", {"a": many(3, 1)}, **changed)))}
    assert found.keys() == {"checks", "overfitted", "too long"}
    assert found["checks"].about == ["merged"]
    assert "least at step 5 (1.000) and rose to 1.500" in found["overfitted"].text
    assert found["too long"].about == ["a 7"]


def test_the_options_are_those_that_differ_and_the_command_means_the_same(run):
    more = {
        "trainer": {"neftune_noise_alpha": 5.0, "lr_scheduler_kwargs": {"a": 1, "b": [2, 3]}},
        "data": ["x,y", "n=z"],
    }
    given = TrainOptions(
        steps=7, tasks=("a b", "c"), gradient_checkpointing=True, output="x", adapter={"align": None}, **more
    )
    changed = changed_options(given.to_dict())
    assert changed == {"steps": 7, "tasks": ["a b", "c"], "gradient_checkpointing": True, "align": None, **more}
    words = shlex.split(command(changed))
    assert words[:2] == ["align-lora", "train"]
    code, out, err = run(*words[1:], "--print-config")
    assert code == 0, err
    assert TrainOptions.from_mapping(yaml.safe_load(out)).to_dict() == given.to_dict() | {"output": "again"}


def test_sources_with_columns_of_their_own_are_named_and_go_on_from_the_file(tmp_path):
    sources = ["a.jsonl", {"path": "b.csv", "name": "bees", "columns": {"prompt": "q"}}, {"path": "c"}, "d=e.txt"]
    file = made_up(tmp_path / "run", {"a": many(3, 1)})
    results = json.loads((file / "results.json").read_text())
    (file / "results.json").write_text(json.dumps(results | {"options": results["options"] | {"data": sources}}))
    page = write_run_report(file).read_text()
    assert "<dd>a.jsonl, bees=b.csv, c, d=e.txt: " in page
    assert "{&#39;path&#39;" not in page
    assert "<pre>align-lora train --config run.yaml --output again</pre>" in page


def test_answers_are_shown_to_what_is_asked_and_turns_keep_their_roles():
    turns = (("system", "Be kind."), ("user", "hi"), ("assistant", "", '{"tool_calls": [1]}'), ("tool", "5"))
    test = [Example("t", (), "a plain text")] * 3 + [Example("t", turns, "six"), Example("t", "asked", "seven")]
    scores = [RowScore(str(i), "t", -1, (), (1.0,), (1,), 0.0, "said") for i in range(len(test))]
    data = TaskData(("t",), test=test)
    found = shown_answers(Job(TrainOptions(), None, data, None, None, "cpu", None, None, [], [], ""), scores, scores)
    said = 'system: Be kind.\nuser: hi\nassistant: {"tool_calls": [1]}\ntool: 5'
    assert [(one["prompt"], one["gold"]) for one in found] == [(said, "six"), ("asked", "seven")]


def test_names_in_other_scripts_are_drawn_as_text_without_a_warning():
    with style("x"), warnings.catch_warnings():
        warnings.simplefilter("error")
        figure = sheet(3, 2)
        figure.add_subplot().set_title("日本語 🙂 тест")
        made = picture("x", "title", "caption", figure)
    assert "日本語 🙂 тест" in made.svg


RUNS = {
    "aligned": ({}, ("Alignment", "Answers"), ("Routing",)),
    "one task": ({"architecture": "lora", "tasks": "threes"}, ("Answers",), ("Alignment", "Routing")),
    "multi_adapter": ({"architecture": "multi_adapter"}, ("own adapter", "Alignment"), ("Routing",)),
    "blocks": (
        {"architecture": "mtlora", "align": "none", "report_to": "tensorboard"},
        ("Routing", "Load of heads"),
        (),
    ),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    place = tmp_path_factory.mktemp("runs")
    model_folder(place / "model")
    content = [one | {"prompt": one["prompt"] + " <b>&"} if "prompt" in one else one for one in rows()]
    write_rows(place / "rows.jsonl", content)
    for name, (changed, _, _) in RUNS.items():
        run_recipe(place, output=str(place / name), steps=3, log_steps=1, **changed)
    return place


@pytest.mark.parametrize("kind", RUNS)
def test_each_kind_of_run_has_its_sections_and_needs_no_network(runs, kind):
    page = write_run_report(runs / kind).read_text()
    _, there, missing = RUNS[kind]
    for title in there:
        assert title in page
    for title in missing:
        assert f"<h2>{title}</h2>" not in page
    assert not re.search(NETWORK, page)
    assert page.count("<svg") == page.count("<desc id=") == page.count('role="img"') >= 3
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    results = json.loads((runs / kind / "results.json").read_text())
    shown = results["answers"][0]
    assert shown.keys() == {"task", "prompt", "gold", "before", "after", "before_score", "after_score"}
    assert (shown["after"] in ("the answer is yes", "the answer is no")) is (shown["task"] == "threes")
    assert "after" not in json.loads(gzip.decompress((runs / kind / "rows.jsonl.gz").read_bytes()).splitlines()[0])


def test_what_is_no_markup_is_escaped_and_the_same_files_give_the_same_bytes(runs):
    first = write_run_report(runs / "aligned").read_bytes()
    assert b"&lt;b&gt;&amp;" in first
    assert b"<b>" not in first
    assert write_run_report(runs / "aligned").read_bytes() == first


def test_layers_pairs_and_their_mean_agree(runs):
    probe = json.loads((runs / "aligned/results.json").read_text())["after"]["adapters"]
    assert probe["rows"] == 8
    assert probe["tasks"] == ["next", "threes"]
    assert np.mean(list(probe["layers"].values())) == pytest.approx(probe["divergence"][0][1], rel=1e-5)
    assert set(probe["layers"]) == {
        f"model.layers.{i}.mlp.{kind}_proj" for i in (0, 1) for kind in ("gate", "up", "down")
    }
    routing = json.loads((runs / "blocks/results.json").read_text())["after"]["adapters"]["routing"]
    assert all(sum(one["load"]) == pytest.approx(1, abs=1e-5) for one in routing.values())


def test_the_adapters_are_measured_after_each_quarter(runs):
    for kind, name in (("aligned", "layers"), ("blocks", "routing")):
        run = read_run(runs / kind)
        steps = run.options["steps"]
        assert [step for step, _ in run.measures()] == [0, *sorted({steps * i // 4 for i in (1, 2, 3)} - {0}), steps]
        first, *_, last = (of[name] for _, of in run.measures())
        assert first.keys() == last.keys()
        assert first != last


def test_trackers_get_the_divergence_and_the_routing_of_each_quarter_beside_all_losses(runs):
    found = EventAccumulator(str(runs / "blocks/tensorboard")).Reload()
    told = {name: {one.step: one.value for one in found.Scalars(name)} for name in found.Tags()["scalars"]}
    assert told["train/lm_loss"].keys() == {1, 2, 3}
    measures = dict(read_run(runs / "blocks").measures())
    for step in (1, 2):
        routers = measures[step]["routing"]
        for kind in ("load", "weight"):
            means = np.mean([one[kind] for one in routers.values()], axis=0)
            assert [told[f"train/routing_{kind}/{head}"][step] for head in range(len(means))] == pytest.approx(means)
            assert sum(means) == pytest.approx(1, abs=1e-4)
        for kind, layers in (
            ("routing_entropy", {name: one["entropy"] for name, one in routers.items()}),
            ("divergence", measures[step]["layers"]),
        ):
            assert told[f"train/{kind}"][step] == pytest.approx(np.mean(list(layers.values())))
            assert {name: told[f"train/{kind}/{name}"][step] for name in layers} == pytest.approx(layers)


def test_long_runs_stay_small_and_keep_their_mean():
    entries = [{"step": i, "lm_loss": float(i % 7)} for i in range(1, 10_001)]
    steps, values = run_figures._line(entries, "lm_loss")
    assert len(steps) == len(values) == 300
    assert np.mean(values) == pytest.approx(np.mean([entry["lm_loss"] for entry in entries]), abs=0.01)


def test_a_run_of_an_earlier_version_has_a_report(runs, tmp_path):
    shutil.copytree(runs / "aligned", tmp_path / "old")
    file = tmp_path / "old/results.json"
    results = json.loads(file.read_text())
    del results["answers"], results["before"]["adapters"], results["after"]["adapters"], results["adapters"]["align"]
    file.write_text(json.dumps(results))
    page = write_run_report(tmp_path / "old").read_text()
    assert "<h2>Tasks</h2>" in page
    assert "<h2>Answers</h2>" not in page


def test_a_run_without_scores_shows_its_losses(runs, tmp_path):
    shutil.copytree(runs / "aligned", tmp_path / "cut")
    file = tmp_path / "cut/results.json"
    results = json.loads(file.read_text())
    for name in ("before", "after", "answers", "checks"):
        results.pop(name, None)
    file.write_text(json.dumps(results))
    (tmp_path / "cut/rows.jsonl.gz").unlink()
    page = write_run_report(tmp_path / "cut").read_text()
    assert "ended before its held-out rows were scored again" in page
    assert "Loss over the steps" in page


@pytest.mark.parametrize("harm", ["missing", "no json", "no rows", "other rows", "no losses"])
def test_a_folder_that_is_no_whole_run_is_one_line(run, runs, tmp_path, harm):
    folder = tmp_path / "harmed"
    shutil.copytree(runs / "aligned", folder)
    content = gzip.decompress((folder / "rows.jsonl.gz").read_bytes()).splitlines(keepends=True)
    if harm == "missing":
        (folder / "results.json").unlink()
    elif harm == "no json":
        (folder / "results.json").write_text("{")
    elif harm == "no losses":
        (folder / "results.json").write_text(json.dumps(
            json.loads((folder / "results.json").read_text()) | {"losses": None}))  # fmt: skip
    else:
        kept = content[:-1] if harm == "other rows" else [b"[]\n"]
        (folder / "rows.jsonl.gz").write_bytes(gzip.compress(b"".join(kept)))
    code, out, err = run("report", folder)
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
    assert ("no finished run" if harm == "missing" else "is damaged: ") in err


def test_train_writes_the_report_and_overwriting_replaces_it(run, tmp_path):
    model_folder(tmp_path / "model")
    write_rows(tmp_path / "rows.jsonl")
    flags = ["--model", tmp_path / "model", "--data", tmp_path / "rows.jsonl", "--steps", 1, "--eval-examples", 2]
    flags += ["--dtype", "float32", "--device", "cpu", "--output", "out"]
    code, out, err = run("train", *flags)
    assert code == 0, err
    assert out.splitlines()[-1] == "report: out/report.html"
    file = tmp_path / "work/out/report.html"
    first = file.read_bytes()
    file.unlink()
    assert run("report", "out") == (0, "wrote out/report.html\n", "")
    assert file.read_bytes() == first
    code, out, err = run("train", *flags, "--overwrite", "--seed", 1)
    assert code == 0, err
    assert file.read_bytes() != first
    assert sorted(p.name for p in file.parent.iterdir()) == ["adapter", "report.html", "results.json", "rows.jsonl.gz"]


@pytest.mark.parametrize(
    ("error", "said"),
    [(ModuleNotFoundError("no", name="scipy"), "it needs scipy: pip"), (OSError(28, "No space left"), "No space left")],
)
def test_a_report_that_fails_loses_nothing_and_is_one_line(place, monkeypatch, capsys, error, said):
    def fails(folder):
        raise error

    monkeypatch.setattr(run_page, "write_run_report", fails)
    with open_run(options(place, steps=1)) as folder:
        recipe.train(recipe.prepare(folder, plain_console()), plain_console())
        capsys.readouterr()
        _write_report(folder, plain_console())
    out = capsys.readouterr().out
    assert out.startswith("no report: ")
    assert said in out
    assert out.count("\n") == 1
    assert (place / "work/out/results.json").is_file()
