"""One file of options, three sources of three formats (chat, CSV, packed text): trained, stopped, resumed, scored."""

import json
import os
import signal

import torch
import yaml
from hf.test_many_sources import table
from hf.words import model_folder, write_rows
from safetensors.torch import load_file

from align_ext.training import fit


class Stopped(fit.ShowProgress):
    def on_step_end(self, args, state, control, **_):
        if state.global_step == 3:
            os.kill(os.getpid(), signal.SIGINT)


def turns(number):
    said = ["hi", f"ho {number}", f"{number}+1?", str(number + 1)]
    return [{"role": role, "content": text} for role, text in zip(["user", "assistant"] * 2, said, strict=True)]


def test_a_run_of_three_formats_stops_goes_on_to_the_bit_and_is_scored(run, tmp_path, monkeypatch):
    model_folder(tmp_path / "model", chat=True)
    write_rows(tmp_path / "chat.jsonl", [{"messages": turns(i)} for i in range(20)])
    table(tmp_path / "news.csv", [{"headline": f"news, {i}", "section": f"00{i % 2}"} for i in range(20)])
    (tmp_path / "essays.txt").write_text("".join(f"essay {i} " + "of words " * i + "\n" for i in range(20)))
    sources = [
        str(tmp_path / "chat.jsonl"),
        {"path": str(tmp_path / "news.csv"), "columns": {"prompt": "headline", "completion": "section"}},
        f"prose={tmp_path}/essays.txt",
    ]
    values = {
        "model": str(tmp_path / "model"), "data": sources, "packing": True, "seq_len": 120, "steps": 6,
        "save_steps": 2, "batch_size": 4, "eval_examples": 3, "mixing_weights": {"prose": 2}, "device": "cpu",
        "train_examples": {"news": 9}, "lr": 0.02, "dtype": "float32",
    }  # fmt: skip
    (tmp_path / "x.yaml").write_text(yaml.safe_dump(values))
    flags = ("train", "--config", tmp_path / "x.yaml", "--output")
    assert run(*flags, "whole")[0] == 0
    with monkeypatch.context() as patch:
        patch.setattr(fit, "ShowProgress", Stopped)
        assert run(*flags, "out")[0] == 130
    code, _, said = run(*flags, "out", "--resume")
    assert code == 0, said
    whole, resumed = (load_file(tmp_path / "work" / n / "adapter/adapter_model.safetensors") for n in ("whole", "out"))
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in whole.items())
    results = json.loads((tmp_path / "work/out/results.json").read_text())
    assert results["options"]["data"] == sources
    assert results["data"]["tasks"]["news"]["train"]["used"] == 9
    assert {name: score["score"] is None for name, score in results["after"]["tasks"].items()} == {
        "chat": False, "news": False, "prose": True
    }  # fmt: skip
    assert all(check["passed"] for check in results["checks"].values())
    data = ("--data", sources[0], "--data", sources[2], "--seq-len", 300)
    code, out, said = run("eval", "--adapter", "out/adapter", "--model", tmp_path / "model", *data)
    assert code == 0, said
    assert "2 tasks: 40 examples to score on" in out
