"""`align-lora train` with parameters in parts, by ZeRO and FSDP2, on several processes: the results of one process."""

import json
import shutil

import pytest
from hf import sharded_runs as runs
from hf.test_several_processes import STEPS as MANY_STEPS
from hf.test_several_processes import assert_equal_runs, said, train, train_until_ended
from hf.words import model_folder, write_rows
from processes import spawn

pytestmark = pytest.mark.slow  # test_sharded_trainers has most of it
STEPS = ("--steps", 4)
AUTO = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sharded")
    model_folder(folder / "model")
    write_rows(folder / "rows.jsonl")
    for stage in (2, 3):
        zero = {"zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 100}}
        (folder / f"zero{stage}.json").write_text(json.dumps(zero | dict.fromkeys(AUTO, "auto")))
    said(train(folder, 1, "alone", *STEPS))
    return folder


def test_by_zero3_a_run_is_that_of_one_process(place, monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    text = said(train(place, 2, "zero3", *STEPS, "--deepspeed", "zero3.json"))
    assert "loaded again: does not apply: the parameters are in parts" in text
    assert_equal_runs(place / "alone", place / "zero3")


@pytest.mark.parametrize("stage", [2, 3])
def test_by_zero_a_run_of_two_that_is_ended_goes_on_in_one_and_in_three_as_the_unbroken_run(place, stage, monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    more = (*MANY_STEPS, "--deepspeed", f"zero{stage}.json")
    ended, unbroken = place / f"ended-{stage}", place / "unbroken"
    train_until_ended(place, ended.name, *more)
    assert "began with --deepspeed, and nothing" in said(train(place, 1, ended.name, *MANY_STEPS, "--resume"), 2)
    if not unbroken.exists():
        said(train(place, 1, unbroken.name, *MANY_STEPS))
    for count in (1, 3):
        shutil.copytree(ended, place / f"ended-{stage}-{count}")
        assert "going on from" in said(train(place, count, f"ended-{stage}-{count}", *more, "--resume"))
        assert_equal_runs(unbroken, place / f"ended-{stage}-{count}")


def test_by_fsdp2_a_run_is_that_of_one_process(place, unused_port):
    spawn(runs.by_fsdp2, unused_port, str(place))
    assert_equal_runs(place / "alone", place / "fsdp2")
