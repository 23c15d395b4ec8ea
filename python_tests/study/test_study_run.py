"""Running a study on a tiny model: its files, controls, workers, failures, and a kill at any moment."""

import gzip
import io
import json
import re
import subprocess
import sys
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from hf.words import model_folder, write_rows
from rich.console import Console
from safetensors.torch import load_file

from align_ext import AlignLoraConfig, count_parameters, flops_per_token
from align_ext.adapters.adapted_block import adapted_layers
from align_ext.base_model.load import load_model
from align_ext.cli.app import app
from align_ext.model.load_adapter import load_adapter
from align_ext.study import cell as cell_module
from align_ext.study.design import parse, read_study
from align_ext.study.plan import make_plan, store_plan
from align_ext.study.run import run, statuses

ARMS = {
    "lora": {"architecture": "lora"},
    "align": {"architecture": "align_lora"},
    "shuffled": {"architecture": "align_lora", "control": "shuffled_ids"},
    "partition": {"architecture": "align_lora", "control": "random_partition"},
    "zero": {"architecture": "align_lora", "control": "weight_zero"},
    "l2": {"architecture": "align_lora", "control": "l2"},
    "hydra": {"architecture": "hydra", "num_heads": 2},
    "by_task": {"architecture": "multi_adapter"},
}


def design(place, **changed):
    return {
        "study": "tiny", "question": "does it run?",
        "train": {"model": str(place / "model"), "data": str(place / "rows.jsonl"), "steps": 4, "batch_size": 4,
                  "lr": 1e-2, "lora_dropout": 0.0, "tasks": ["next", "threes"], "train_examples": 12},
        "equal": {"parameters": {"architecture": "hydra", "num_heads": 2, "r": 4}, "scaling": 2.0},
        "arms": ARMS, "seeds": [0],
        "score": {"test": 4, "dev": 2, "forgetting": 2, "probe": 3, "generate": ["next"], "mechanism": "none",
                  "unseen": {"tasks": ["new"], "examples": 3}},
    } | changed  # fmt: skip


def write(folder, content):
    folder.mkdir(exist_ok=True)
    (folder / "study.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    return folder


def start(folder, **options):
    said = Console(file=io.StringIO(), width=200)
    found = run(folder, read_study(folder), said, **options)
    return found, said.file.getvalue()


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("study")
    model_folder(place / "model")
    extra = [{"task": "new", "prompt": f"say {i}", "completion": "i" * i} for i in range(1, 6)]
    write_rows(place / "rows.jsonl")
    with (place / "rows.jsonl").open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in extra)
    return place


@pytest.fixture(scope="module")
def finished(place):
    folder = write(place / "finished", design(place))
    found, _ = start(folder)
    assert {one.state for one in found} == {"done"}, [one.detail for one in found]
    return folder


def cells(folder):
    found = {}
    for file in sorted(folder.glob("cells/*/cell.json")):
        content = json.loads(file.read_text())
        text = gzip.decompress(file.with_name("rows.jsonl.gz").read_bytes()).decode()
        content["rows"] = [json.loads(line) for line in text.splitlines()]
        content["folder"] = file.parent
        found[content["arm"]] = content
    return found


def test_every_cell_scores_the_same_rows_and_tells_what_a_report_needs(finished):
    found, plan = cells(finished), json.loads((finished / "plan.json").read_text())
    assert found.keys() == {"base", *ARMS}
    assert {content["key"] for content in found.values()} == {c["key"] for c in plan["cells"]}
    ids = [[(row["split"], row["id"]) for row in content["rows"]] for content in found.values()]
    assert all(of_cell == ids[0] for of_cell in ids)
    splits = [split for split, _ in ids[0]]
    assert (
        [splits.count(split) for split in ("test", "dev", "unseen")] == [8, 4, 3] == list(plan["data"]["rows"].values())
    )
    assert all(
        (row["greedy"] is not None) == (row["task"] == "next" and row["split"] == "test")
        for c in found.values()
        for row in c["rows"]
    )
    for name, content in found.items():
        assert content["forgetting"]["tokens"] == 254
        if name == "base":
            continue
        cost = json.loads((content["folder"] / "cost.json").read_text())
        assert cost["step_seconds"][1] > 0
        assert cost["decode_ms"]["adapter"] > 0
        assert (cost["decode_ms"]["merged"] is not None) is plan["arms"][name]["merges"]
        assert content["train_tokens"] == found["lora"]["train_tokens"], "the same batches for all arms"
        assert min(content["alignment"].values()) > 0
        lines = (content["folder"] / "losses.csv").read_text().splitlines()
        assert len(lines) == 5
        assert lines[0].startswith("step,lm_loss")
    assert found["align"]["pairs_per_batch"] == 1.0
    assert found["lora"]["pairs_per_batch"] is None


def adapter(content):
    return load_file(content["folder"] / "adapter/adapter_model.safetensors")


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_controls_differ_from_their_arm_in_one_thing(finished):
    """Weight 0 is plain LoRA to the bit; shuffled ids, other partitions and a penalty are not the arm."""
    found = cells(finished)
    tensors = {name: adapter(found[name]) for name in ("lora", "align", "shuffled", "partition", "zero", "l2")}
    assert same(tensors["zero"], tensors["lora"])
    names = ["align", "shuffled", "partition", "l2", "lora"]
    assert not any(same(tensors[a], tensors[b]) for i, a in enumerate(names) for b in names[:i])
    assert found["l2"]["align_weight"] not in (0.1, found["align"]["align_weight"])


def test_the_plan_counts_what_the_cells_train(finished, place):
    plan = json.loads((finished / "plan.json").read_text())
    wanted = plan["arms"]["hydra"]["parameters"]
    for name, content in cells(finished).items():
        if name == "base":
            continue
        arm, (model, _) = plan["arms"][name], load_model(str(place / "model"), "float32")
        load_adapter(model, content["folder"] / "adapter")
        assert count_parameters(model.requires_grad_(False)).trainable == 0
        for layer in adapted_layers(model).values():
            layer.adapter.requires_grad_(True)
        assert count_parameters(model).trainable == arm["parameters"]
        assert flops_per_token(model).adapters == arm["flops_per_token"]["adapters"]
        assert arm["scaling"] == pytest.approx(2.0)
        assert arm["budget_off"] == pytest.approx(arm["parameters"] / wanted - 1)
        smaller = (
            json.loads((content["folder"] / "adapter/adapter_config.json").read_text()) if name == "lora" else None
        )
        assert smaller is None or smaller["r"] == arm["rank"]
    assert abs(plan["arms"]["lora"]["budget_off"]) < 0.1
    assert plan["arms"]["lora"]["merges"]
    assert not plan["arms"]["hydra"]["merges"]


def test_run_again_does_nothing_and_a_new_arm_or_seed_alone_runs(finished, place):
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("cell.json")}
    assert len(start(finished)[1].splitlines()) == 0
    arms = {"lora": ARMS["lora"], "lora_r2": {"architecture": "lora", "r": 2}}
    write(finished, design(place, arms=ARMS | arms))
    found, said = start(finished)
    assert len(re.findall("^cell ", said, re.M)) == 1
    assert "lora_r2-s0" in said
    assert {one.state for one in found} == {"done"}
    assert before.items() <= {path: path.stat().st_mtime_ns for path in finished.rglob("cell.json")}.items()
    write(finished, design(place))
    start(finished)


def begin(folder):
    """A study whose first cell has been begun, but is not finished."""
    store_plan(folder, read_study(folder))
    cell = folder / "cells" / "begun"
    cell.mkdir(parents=True)
    return cell


def test_a_study_whose_data_changed_is_refused(place, tmp_path):
    folder = write(tmp_path / "s", design(place, arms={"lora": ARMS["lora"]}))
    begin(folder)
    changed = design(place, arms={"lora": ARMS["lora"]})
    changed["train"] |= {"train_examples": 5}
    write(folder, changed)
    with pytest.raises(ValueError, match=r"data of the study in .* has changed since its first cell"):
        start(folder)


def test_rows_that_changed_in_their_file_are_refused_while_a_cell_is_missing(place, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text((place / "rows.jsonl").read_text())
    content = design(place, arms={"lora": ARMS["lora"]})
    content["train"] |= {"data": str(rows)}
    folder = write(tmp_path / "s", content)
    begun = begin(folder)
    rows.write_text(rows.read_text().replace("comes", "stands"))
    with pytest.raises(ValueError, match=r"data of the study in .* has changed since its first cell"):
        start(folder)
    assert list(folder.glob("cells/*")) == [begun]


def test_a_plan_without_a_cell_binds_to_nothing(place, tmp_path):
    content = design(place, arms={"lora": ARMS["lora"]})
    folder = write(tmp_path / "s", content)
    first = store_plan(folder, read_study(folder))
    content["train"] |= {"train_examples": 5}
    second = store_plan(write(folder, content), read_study(folder))
    assert second["data"]["digest"] != first["data"]["digest"]
    assert json.loads((folder / "plan.json").read_text()) == json.loads(json.dumps(second))


def test_the_base_is_scored_on_all_tasks_of_an_axis(place, tmp_path):
    folder = write(tmp_path / "s", design(place, arms={"lora": ARMS["lora"]}, vary={"tasks": [1, 2]}))
    base, *cells = make_plan(read_study(folder))["cells"]
    assert [len(cell["options"]["tasks"]) for cell in cells] == [1, 2]
    assert base["options"]["tasks"] == cells[1]["options"]["tasks"]


def test_an_l2_control_of_another_loss_is_another_cell(place, tmp_path):
    arms = {align: {"architecture": "align_lora", "align": align, "control": "l2"} for align in ("kl", "mmd")}
    folder = write(tmp_path / "s", design(place, arms=arms))
    keys = [cell["key"].rpartition("-")[2] for cell in make_plan(read_study(folder))["cells"]]
    assert len(set(keys)) == 3


def test_the_l2_control_pulls_as_the_loss_of_its_arm_does(monkeypatch):
    pulls = {"kl": 3.0, "mmd": 5.0, "l2": 2.0}
    monkeypatch.setattr(cell_module, "alignment_pull", lambda model, tokenizer, rows, ids, kind: pulls[kind])
    for align, given, wanted in (("kl", None, 0.1 * 3 / 2), ("mmd", None, 0.15 * 5 / 2), ("mmd", 0.4, 0.4 * 5 / 2)):
        state = SimpleNamespace(config=AlignLoraConfig(align="l2"))
        monkeypatch.setattr(cell_module, "require_state", lambda model, state=state: state)
        options = SimpleNamespace(order_seed=0, adapter={"align_weight": given})
        job = SimpleNamespace(
            train_rows=[], options=options, model=None, tokenizer=None, data=SimpleNamespace(ids=dict)
        )
        made = parse({"arms": {"l2": {"architecture": "align_lora", "align": align, "control": "l2"}}})
        cell_module._apply_control(made, made.arms[0], job, [])
        assert state.config.align_weight == pytest.approx(wanted)


def test_no_model_outlives_its_cell(place, tmp_path, monkeypatch):
    models, prepare = [], cell_module.recipe.prepare

    def watched(*args):
        job = prepare(*args)
        models.append(weakref.ref(job.model))
        return job

    monkeypatch.setattr(cell_module.recipe, "prepare", watched)
    start(write(tmp_path / "s", design(place, arms={name: ARMS[name] for name in ("align", "hydra")})))
    assert len(models) == 2
    assert [model() for model in models] == [None, None]


def test_a_cell_that_fails_says_why_and_the_others_go_on(place, tmp_path, monkeypatch):
    folder = write(tmp_path / "s", design(place, arms={name: ARMS[name] for name in ("lora", "align")}))
    fit = cell_module.fit

    def failing(job, *args, **options):
        if job.options.adapter["architecture"] == "lora":
            raise RuntimeError("the disk is on fire")
        return fit(job, *args, **options)

    monkeypatch.setattr(cell_module, "fit", failing)
    found, said = start(folder)
    assert [one.state for one in found] == ["done", "failed", "done"]
    assert found[1].detail == "the disk is on fire"
    assert "failed: the disk is on fire" in said
    error = next(folder.glob("cells/*.error.txt")).read_text()
    assert error.startswith("the disk is on fire\n")
    assert "Traceback" in error
    monkeypatch.undo()
    assert [one.state for one in start(folder)[0]] == ["done", "failed", "done"], "only --retry runs it again"
    assert [one.state for one in start(folder, retry=True)[0]] == ["done"] * 3
    assert not list(folder.glob("cells/*.error.txt"))


def test_a_task_to_generate_for_that_the_data_lacks_is_named(place, tmp_path):
    content = design(place)
    content["score"] = content["score"] | {"generate": ["nexd"]}
    with pytest.raises(ValueError, match=r"score\.generate: unknown task 'nexd'; did you mean 'next'"):
        start(write(tmp_path / "s", content))


def test_a_cell_without_its_main_file_runs_again(place, tmp_path):
    folder = write(tmp_path / "s", design(place, arms={"lora": ARMS["lora"]}))
    start(folder)
    (file,) = folder.glob("cells/lora-*/cell.json")
    before = file.read_bytes()
    file.unlink()
    assert "missing" in {one.state for one in statuses(folder)}
    assert {one.state for one in start(folder)[0]} == {"done"}
    assert file.read_bytes() == before


def test_a_deeper_look_is_taken_at_the_first_seed_and_can_be_taken_later(place, tmp_path):
    content = design(place, arms={"m_lora": {"architecture": "m_lora", "num_heads": 2}}, seeds=[0, 1])
    folder = write(tmp_path / "s", content)
    start(folder)
    content["score"] = content["score"] | {"mechanism": "first"}
    write(folder, content)
    found, said = start(folder)
    assert re.findall(r"cell \d of 3: (m_lora-s\d)-\w+, a deeper look", said) == ["m_lora-s0"]
    assert {one.state for one in found} == {"done"}
    (file,) = folder.glob("cells/*/mechanism.json")
    measured = json.loads(file.read_text())
    assert {"divergence", "heads", "heads_change", "latents", "conflict", "bands"} <= measured.keys()
    assert measured["divergence"]["tasks"] == ["next", "threes"]
    heads = measured["heads"], measured["heads_change"]
    assert heads[0] != heads[1], "the change of the heads is not the heads"
    assert start(folder)[1] == ""


@pytest.mark.slow
def test_shards_divide_the_cells_and_two_workers_share_them(place, tmp_path):
    content = design(place, arms={name: ARMS[name] for name in ("lora", "align", "zero")})
    folder = write(tmp_path / "s", content)
    first, _ = start(folder, shard=(1, 2))
    assert [one.state for one in statuses(folder)] == ["done", "missing", "done", "missing"]
    assert len(first) == 2
    assert {one.state for one in start(folder, jobs=2)[0]} == {"done"}
    whole = write(tmp_path / "whole", content)
    start(whole)
    for name, one in cells(folder).items():
        other = cells(whole)[name]
        assert one["rows"] == other["rows"]
        assert {k: v for k, v in one.items() if k != "folder"} == {k: v for k, v in other.items() if k != "folder"}


@pytest.mark.parametrize(
    "events",
    [["60", "-10"], pytest.param(["4", "25", "-12", "-40", "-30", "-20", "-9", "-4", "-1"], marks=pytest.mark.slow)],
)
def test_a_study_killed_at_a_file_event_and_run_again_has_the_same_bytes(events, tmp_path):
    here = Path(__file__).resolve().parent.parent
    done = subprocess.run(
        [sys.executable, "-m", "study.killed_study", str(tmp_path), *events],
        capture_output=True, text=True, cwd=here, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert f": 0 problems of {len(events)}" in done.stdout, done.stdout


def test_the_commands_of_a_study(place, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def said(*arguments):
        app(["study", *arguments], standalone_mode=False)
        return capsys.readouterr().out

    assert "five-tasks" in said("presets")
    assert "wrote mine/study.yaml: edit it" in said("new", "mine", "--like", "lambda")
    write(tmp_path / "s", design(place, arms={"lora": ARMS["lora"], "small": {"architecture": "lora", "r": 2}}))
    text = said("plan", "s")
    assert "3 cells (3 missing): 2 arms, 1 seeds" in text
    assert "next: 4 rows; a difference below" in text
    assert "missing" in said("status", "s")
    assert "wrote s/report/report.html" in said("run", "s")
    assert "3 cells (3 done)" in said("plan", "s")
    assert (tmp_path / "s/report/report.html").is_file()


@pytest.mark.slow
def test_a_cell_of_two_processes_is_that_of_one(place):
    arms = {name: ARMS[name] for name in ("align", "by_task")}
    folders = [write(place / f"by{nproc}", design(place, arms=arms)) for nproc in (1, 2)]
    for nproc, folder in enumerate(folders, 1):
        found, _ = start(folder, nproc=nproc)
        assert [one.state for one in found] == ["done"] * 3
        assert [path.name for path in (folder / "cells").iterdir() if path.name.startswith(".")] == []
    for path in (folders[0] / "cells").iterdir():
        texts = [gzip.decompress((folder / "cells" / path.name / "rows.jsonl.gz").read_bytes()) for folder in folders]
        one, two = ([json.loads(line) for line in text.decode().splitlines()] for text in texts)
        assert [row["id"] for row in one] == [row["id"] for row in two]
        for row, other in zip(one, two, strict=True):
            assert row["nll"] == pytest.approx(other["nll"], rel=1e-4)
