"""What a study's commands say of cells that are damaged, of another design, or of a plan that is not the design's."""

import gzip
import shutil

import pytest
import yaml
from hf.words import model_folder, write_rows
from processes import python
from study.test_study_run import design, start, write

from align_ext.cli.app import app
from align_ext.study import show
from align_ext.study.design import read_study
from align_ext.study.plan import stale, store_plan
from align_ext.study.run import statuses

ONE = {"arms": {"lora": {"architecture": "lora"}}, "score": {"test": 4, "forgetting": 0, "probe": 0, "decode": 0}}


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    place = tmp_path_factory.mktemp("status")
    model_folder(place / "model")
    write_rows(place / "rows.jsonl")
    folder = write(place / "ran", design(place, **ONE, equal={}))
    found, said = start(folder)
    assert {one.state for one in found} == {"done"}, said
    return folder


@pytest.fixture
def study(ran, tmp_path):
    shutil.copytree(ran, tmp_path / "study")
    return tmp_path / "study"


def edit(folder, **train):
    content = yaml.safe_load((folder / "study.yaml").read_text())
    content["train"] |= train
    write(folder, content)


def states(folder):
    return {one.key.partition("-")[0]: (one.state, one.detail) for one in statuses(folder)}


def cut(folder):
    lines = gzip.decompress((folder / "rows.jsonl.gz").read_bytes()).splitlines()
    (folder / "rows.jsonl.gz").write_bytes(gzip.compress(b"\n".join(lines[1:])))


@pytest.mark.parametrize(
    ("harm", "reason"),
    [
        (cut, "rows.jsonl.gz is not the file that was written with these results"),
        (lambda folder: (folder / "rows.jsonl.gz").unlink(), "rows.jsonl.gz cannot be read: No such file or directory"),
        (lambda folder: (folder / "cell.json").write_text("{"), "cell.json is damaged: "),
    ],
)
def test_a_damaged_cell_is_named_and_runs_again_to_the_same_bytes(study, harm, reason):
    (cell,) = study.glob("cells/lora-*")
    whole = (cell / "rows.jsonl.gz").read_bytes()
    harm(cell)
    state, detail = states(study)["lora"]
    assert state == "damaged"
    assert reason in detail
    assert states(study)["base"] == ("done", "")
    found, said = start(study)
    assert "cell 1" not in said, "the base's is whole"
    assert {one.state for one in found} == {"done"}
    assert (cell / "rows.jsonl.gz").read_bytes() == whole


def test_cells_of_another_design_are_counted_and_not_timed(study):
    edit(study, steps=5)
    plan = store_plan(study, read_study(study))
    said = list(show.remarks(study, plan, statuses(study)))
    (others,) = (line for line in said if "of another design" in line)
    assert others.startswith("1 finished cells are of another design, and no part of this study as it is: lora-")
    assert not [line for line in said if "a finished cell took" in line]
    edit(study, steps=4)
    said = list(show.remarks(study, store_plan(study, read_study(study)), statuses(study)))
    assert not [line for line in said if "of another design" in line]
    assert [line for line in said if "a finished cell took" in line]


def test_a_design_that_is_not_the_plans_is_said_by_status_and_report(study, capsys):
    assert stale(study) == ""
    edit(study, lr=0.5)
    for command in ("status", "report"):
        with pytest.raises(SystemExit):
            app(["study", command, str(study)])
        said = " ".join(capsys.readouterr().out.split())
        assert f"study.yaml has changed since the plan that is shown: `align-lora study plan {study}`" in said
    edit(study, lr="fast")
    assert stale(study).endswith("; what is shown is the plan that was made before")
    (study / "study.yaml").unlink()  # a report needs no design
    assert stale(study) == ""


PEAKS = """
from align_ext.training.cost import StepClock
most = bytearray(400 << 20)
print(StepClock("cpu").cost([{"step_seconds": 1.0}], 1)["peak_memory_mib"])
del most
print(StepClock("cpu").cost([{"step_seconds": 1.0}], 1)["peak_memory_mib"])
"""


def test_the_peak_of_memory_is_that_of_the_training_at_hand(tmp_path):
    before, after = map(float, python("-c", PEAKS, cwd=tmp_path, stderr=None).communicate()[0].split())
    assert after < before - 300
