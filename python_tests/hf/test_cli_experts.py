"""A mixture of experts by the commands: trained, scored, exported, merged, asked; its experts adapted or frozen."""

import json

import pytest
from hf.words import model_folder, qwen3_moe, write_rows
from safetensors.torch import load_file

EXPERTS = ("--target-parameters", "mlp.experts.gate_up_proj,mlp.experts.down_proj")


@pytest.mark.parametrize("flags", [EXPERTS, ("--target-modules", "q_proj,o_proj")])
def test_a_mixture_goes_through_every_command(run, tmp_path, flags):
    model_folder(tmp_path / "model", model=qwen3_moe)
    write_rows(tmp_path / "rows.jsonl")
    options = (
        "--model",
        tmp_path / "model",
        "--data",
        tmp_path / "rows.jsonl",
        "--device",
        "cpu",
        "--dtype",
        "float32",
    )
    sizes = ("--steps", 4, "--lr", 2e-2, "--eval-examples", 4, "--lora-dropout", 0)
    code, out, err = run("train", *options, *sizes, "--output", "out", *flags)
    assert code == 0, err
    assert "MiB to train: weights" in out
    assert "cannot be estimated" not in out + err
    results = json.loads((tmp_path / "work/out/results.json").read_text())
    assert {name: check["passed"] for name, check in results["checks"].items()} == {
        "loaded again": True, "stock PEFT": True, "merged": True
    }  # fmt: skip
    tensors = load_file(tmp_path / "work/out/adapter/adapter_model.safetensors")
    assert any("mlp.experts" in name for name in tensors) == (flags == EXPERTS)

    def losses(*more):
        code, _, err = run("eval", "--run", "out", "--no-generate", "--json", "scores.json", *more)
        assert code == 0, err
        found = json.loads((tmp_path / "work/scores.json").read_text())["tasks"]
        return {task: score["loss"] for task, score in found.items()}

    after, before = (
        {task: one["loss"] for task, one in results[when]["tasks"].items()} for when in ("after", "before")
    )
    assert losses() == pytest.approx(after, rel=1e-5)
    assert losses("--merge") == pytest.approx(after, rel=1e-4)
    assert losses("--adapter", "none") == pytest.approx(before, rel=1e-5)
    assert max(abs(after[task] - before[task]) for task in after) > 0.1

    code, out, err = run("export", "out/adapter", "--output", "peft", "--verify")
    assert (code, out.count("same logits")) == (0, 2), err
    assert run("merge", "out/adapter", "--output", "merged")[0] == 0
    asked = ("--prompt", "3|4: yes or no?", "--max-new-tokens", 8)
    answers = {run("generate", name, *asked)[1] for name in ("out", "peft", "merged")}
    assert len(answers) == 1
    assert answers != {run("generate", tmp_path / "model", *asked)[1]}
