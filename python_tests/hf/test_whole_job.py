"""The whole job: one file of options, a 4-bit base, three sources of three formats, two processes that are killed."""

import json
import time

import psutil
import pytest
import yaml
from hf.test_many_sources import table
from hf.test_several_processes import said, start
from hf.words import model_folder, wide_qwen2, write_rows
from safetensors.torch import load_file

from align_ext.cli.answer import AnswerRequest

STEPS = 20


def turns(number):
    texts = ["hi", f"ho {number}", f"{number}+1?", str(number + 1)]
    return [{"role": role, "content": text} for role, text in zip(["user", "assistant"] * 2, texts, strict=True)]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("job")
    model_folder(place / "model", chat=True, model=wide_qwen2)
    write_rows(place / "chat.jsonl", [{"messages": turns(i)} for i in range(20)])
    table(place / "news.csv", [{"headline": f"news, {i}", "section": f"00{i % 2}"} for i in range(20)])
    (place / "essays.txt").write_text("".join(f"essay {i} " + "of words " * i + "\n" for i in range(20)))
    sources = ["chat.jsonl", {"path": "news.csv", "columns": {"prompt": "headline", "completion": "section"}},
               "prose=essays.txt"]  # fmt: skip
    values = {
        "model": "model", "load_in_4bit": True, "data": sources, "packing": True, "seq_len": 120, "max_steps": STEPS,
        "save_steps": 2, "batch_size": 4, "eval_examples": 3, "mixing_weights": {"prose": 2}, "device": "cpu",
        "train_examples": {"news": 9}, "learning_rate": 5e-4, "dtype": "float32", "lora_dropout": 0.0,
        "logging_steps": 1, "report_to": "tensorboard",
    }  # fmt: skip
    (place / "job.yaml").write_text(yaml.safe_dump(values))
    said(start(place, 1, "train", "--config", "job.yaml", "--output", "alone"))
    two = start(place, 2, "train", "--config", "job.yaml", "--output", "two")
    while not (place / "two/checkpoints/checkpoint-4").exists():
        assert two.poll() is None, two.communicate()
        time.sleep(0.05)
    for process in [psutil.Process(two.pid), *psutil.Process(two.pid).children(recursive=True)]:
        process.kill()
    two.communicate()
    assert not (place / "two/results.json").exists()
    said(start(place, 1, "train", "--config", "job.yaml", "--output", "two", "--resume"))
    return place


def results(folder):
    return json.loads((folder / "results.json").read_text())


def test_the_losses_are_those_of_one_process_and_the_killed_run_went_on(place):
    one, two = results(place / "alone"), results(place / "two")
    assert len(one["losses"]) == len(two["losses"]) == STEPS
    for mine, theirs in zip(one["losses"], two["losses"], strict=True):
        assert {"lm_loss", "align_loss", "loss/news", "loss/chat", "loss/prose"} & mine.keys() > {"align_loss"}
        for name in ("lm_loss", "align_loss"):
            assert mine[name] == pytest.approx(theirs[name], rel=2e-3), mine["step"]
    assert one["losses"][-1]["lm_loss"] < one["losses"][0]["lm_loss"]
    tensors, others = (load_file(place / name / "adapter/adapter_model.safetensors") for name in ("alone", "two"))
    for name, tensor in tensors.items():
        assert (tensor - others[name]).abs().max() < 1e-2 * tensor.abs().max(), name


def test_the_folder_holds_what_was_learnt_of_whom_and_where_the_trackers_find_it(place):
    found = results(place / "two")
    assert found["data"]["tasks"]["news"]["train"]["used"] == 9
    assert {name: score["score"] is None for name, score in found["after"]["tasks"].items()} == {
        "chat": False, "news": False, "prose": True
    }  # fmt: skip
    assert {name: check["passed"] for name, check in found["checks"].items()} == {
        "loaded again": True, "stock PEFT": True, "merged": None
    }  # fmt: skip
    assert "quantised" in found["checks"]["merged"]["detail"]
    assert list((place / "two/tensorboard").glob("events*"))
    report, card = (place / "two/report.html").read_text(), (place / "two/adapter/README.md").read_text()
    for task in ("chat", "news", "prose"):
        assert task in report
        assert f"| {task} | " in card
        assert f"{found['after']['tasks'][task]['loss']:.3f}" in card
        assert f"{found['after']['tasks'][task]['loss']:.3f}" in report
    assert "load_in_4bit: true" in card


def test_it_answers_on_the_base_as_it_was_trained_and_says_where_it_does_not(place):
    request = AnswerRequest.of(str(place / "two"), model=str(place / "model"), merge=False, dtype="auto", device="cpu")
    kinds = {type(layer).__name__ for layer in request.load()[0].modules()}
    assert "Linear4bit" in kinds
    merged = start(place, 1, "merge", "two/adapter", "--model", "model", "--output", "merged")
    assert "the adapter was trained on its base model in 4 bits" in said(merged)


@pytest.mark.slow
def test_it_is_scored_exported_and_goes_on_as_the_start_of_another_run(place):
    data = ("--data", "chat.jsonl", "--data", "prose=essays.txt", "--seq-len", 300, "--device", "cpu")
    text = said(start(place, 1, "eval", "--adapter", "two/adapter", "--model", "model", *data))
    assert "2 tasks: 40 examples to score on" in text
    exported = start(place, 1, "export", "two/adapter", "--output", "peft", "--model", "model", "--verify")
    assert "stock PEFT" in said(exported)
    more = ("--adapter-from", "two/adapter", "--steps", 1, "--checks", "load", "--report-to", "none")
    said(start(place, 1, "train", "--config", "job.yaml", "--output", "more", *more))
    assert results(place / "more")["before"]["tasks"] == results(place / "two")["after"]["tasks"]
    assert results(place / "more")["checks"].keys() == {"loaded again"}
