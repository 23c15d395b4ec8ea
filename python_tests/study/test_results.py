"""Reading the files of a study: what is damaged is named, and one cell does not spoil the others."""

import gzip
import json
import re

import pytest
from study.made_up import ARMS, make_study

from align_ext.evaluation.rows import rows_digest
from align_ext.report.chosen import Arms
from align_ext.report.conditions import cautions
from align_ext.report.page import make_report
from align_ext.report.results import read_results

TINY = {
    "arms": {"lora": ARMS["lora"]}, "rates": (), "rows": 20, "seeds": (0, 1), "unseen": False, "mechanism": False,
    "cost": False, "missing": None, "tasks": {"qnli": 2},
}  # fmt: skip


@pytest.fixture
def study(tmp_path):
    return make_study(tmp_path / "study", **TINY)


def edit(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_all_cells_are_read(study):
    results = read_results(study)
    assert list(results.cells) == ["base", "lora-0", "lora-1"]
    assert results.missing == {}
    assert len(results.cells["lora-0"].rows) == 40  # 20 of test, 20 of dev


def test_no_plan_is_an_error_that_names_the_cure(tmp_path):
    with pytest.raises(ValueError, match=r"study=.* holds no plan\.json: run `align-lora study plan` on it first"):
        read_results(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda plan: plan.pop("seeds"), r"plan\.json: seeds is missing"),
        (lambda plan: plan.update(margin="2"), r"margin='2' must be a whole number or a number"),
        (lambda plan: plan.update(baseline="rola"), r"baseline='rola' must be one of its arms: lora"),
        (lambda plan: plan["arms"]["lora"].pop("merges"), r"arms\.lora\.merges is missing"),
        (
            lambda plan: plan["arms"]["lora"].update(parameters=True),
            r"arms\.lora\.parameters=True must be a whole number",
        ),
        (lambda plan: plan["cells"][1].update(arm="x"), r"cells\[1\]\.arm='x' is none of its arms"),
        (lambda plan: plan["cells"][1].update(key="../x"), r"cells\[1\]\.key='\.\./x' must be a folder's name"),
    ],
)
def test_a_damaged_plan_is_an_error_that_names_the_place(study, change, message):
    edit(study / "plan.json", change)
    with pytest.raises(ValueError, match=message) as error:
        read_results(study)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "change", "reason"),
    [
        ("cell.json", lambda cell: cell.pop("finite"), "finite is missing"),
        ("cell.json", lambda cell: cell.update(seed=7), r"has seed=7, the plan seed=0: run the cell again"),
        ("cell.json", None, r"^cannot read cell\.json: .*it is no text in UTF-8"),
        ("rows.jsonl.gz", None, r"line 1: cannot be read"),
    ],
)
def test_a_damaged_cell_is_listed_and_the_others_are_read(study, name, change, reason):
    path = study / "cells/lora-0" / name
    if change:
        edit(path, change)
    else:
        path.write_bytes(b"{\xff}")
    results = read_results(study)
    assert list(results.cells) == ["base", "lora-1"]
    assert list(results.missing) == ["lora-0"]
    assert re.search(reason, results.missing["lora-0"])


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"label": 2}, "label=2, 2 nll and 2 tokens do not agree"),
        ({"tokens": [1]}, "label=.*, 2 nll and 1 tokens do not agree"),
        ({"tokens": [0, 1]}, r"tokens=\[0, 1\] must be positive"),
        ({"nll": [-3.0, 1.0]}, r"nll=\[-3\.0, 1\.0\] not negative"),
        ({"split": "train"}, "split='train' must be one of test, dev, unseen"),
        ({"nll": None}, "nll is missing"),
        ({"id": "qnli/test00000001"}, "holds an id twice"),
    ],
)
def test_a_damaged_row_is_named_by_its_line(study, row, reason):
    path = study / "cells/lora-0/rows.jsonl.gz"
    lines = gzip.decompress(path.read_bytes()).decode().splitlines()
    lines[2] = json.dumps(json.loads(lines[2]) | row)
    path.write_bytes(gzip.compress("\n".join(lines).encode()))
    reported = read_results(study).missing["lora-0"]
    assert re.search(reason, reported)
    assert "line 3" in reported or "twice" in reason


def test_rows_that_were_not_written_with_their_cell_are_not_believed(study):
    cell = study / "cells/lora-0"
    edit(cell / "cell.json", lambda content: content.update(sha256=rows_digest(cell)))
    assert not read_results(study).missing
    lines = gzip.decompress((cell / "rows.jsonl.gz").read_bytes()).decode().splitlines()
    (cell / "rows.jsonl.gz").write_bytes(gzip.compress("\n".join(lines[:-1]).encode()))
    message = "rows.jsonl.gz is not the file that was written with these results"
    assert read_results(study).missing == {"lora-0": message}
    (cell / "rows.jsonl.gz").unlink()
    assert "rows.jsonl.gz cannot be read: No such file" in read_results(study).missing["lora-0"]


def test_a_broken_deeper_look_costs_no_scores(study):
    (study / "cells/lora-0/mechanism.json").write_text("{")
    results = read_results(study)
    assert not results.missing
    assert {one.kind: one.about for one in cautions(Arms(results))}["mechanism"] == ["lora-0"]
    make_report(Arms(results))


def test_a_cell_that_failed_says_why(study):
    (study / "cells/lora-1/cell.json").unlink()
    (study / "cells/lora-1.error.txt").write_text("CUDA out of memory: 3 GiB\nTraceback ...\n")
    (study / "cells/lora-0/cell.json").unlink()
    missing = read_results(study).missing
    assert missing == {"lora-0": "not finished yet", "lora-1": "failed: CUDA out of memory: 3 GiB"}


def test_the_likelihood_of_more_rows_comes_first(tmp_path):
    tasks = {"qnli": 2, "gsm8k": 0, "say": 0}
    arms = {name: ARMS[name] for name in ("lora", "hydra")}
    folder = make_study(tmp_path / "s", rows=40, tasks=tasks, arms=arms, rates=(), unseen=False, missing=None)
    made = make_report(Arms(read_results(folder)))
    assert "on 80 test rows of 2 tasks" in made.findings[0]
    titles = ["Choice NLL", "Loss of free text", "Accuracy"]
    assert [title for title in titles if title in made.main.file] == titles


def test_a_task_of_cells_that_do_not_count_has_no_rows(tmp_path):
    arms = {name: ARMS[name] for name in ("lora", "hydra")}
    folder = make_study(tmp_path / "s", **TINY | {"arms": arms, "seeds": (0,), "not_finite": ("hydra",)})
    (file,) = (folder / "cells").glob("hydra*/rows.jsonl.gz")
    file.write_bytes(gzip.compress(gzip.decompress(file.read_bytes()).replace(b'"qnli"', b'"piqa"')))
    found = {one.kind: one.about for one in cautions(Arms(read_results(folder)))}
    assert "piqa: 0" in found["rows"]
