"""The checks at a run's end: content with what was trained in any dtype, and with nothing else."""

import io
import json
import shutil

import pytest
import torch
from hf.words import llama, model_folder, write_rows
from rich.console import Console
from safetensors.torch import load_file, save_file

from align_ext.evaluation.same_logits import LARGEST_DIFFERENCE
from align_ext.io.adapter_folder import OUR_CONFIG
from align_ext.training import recipe
from align_ext.training.options import TrainOptions
from align_ext.training.run_folder import open_run

KEY = "base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"
DTYPES = ("float32", "bfloat16", "float16")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dtypes")
    for dtype in DTYPES:
        model_folder(folder / dtype, model=lambda dtype=dtype: llama(getattr(torch, dtype)))
    write_rows(folder / "rows.jsonl")
    return folder


@pytest.mark.parametrize(
    ("stored", "trained", "adapters"),
    [
        ("float32", "float32", "float32"),
        ("float32", "bfloat16", "float32"),
        ("bfloat16", "bfloat16", "base"),
        pytest.param("float32", "float16", "float32", marks=pytest.mark.slow),
        pytest.param("bfloat16", "float32", "float32", marks=pytest.mark.slow),
        pytest.param("float16", "bfloat16", "float32", marks=pytest.mark.slow),
    ],
)
def test_the_checks_are_content_with_what_was_trained_and_fall_with_one_tensor_a_little_off(
    place, tmp_path, monkeypatch, stored, trained, adapters
):
    said = Console(file=io.StringIO(), width=200)
    values = {
        "model": str(place / stored), "data": str(place / "rows.jsonl"), "output": str(tmp_path / "out"), "steps": 3,
        "lr": 2e-2, "eval_examples": 2, "dtype": trained, "device": "cpu", "adapter_dtype": adapters,
    }  # fmt: skip
    if trained == stored:  # with what is trained beside the adapters
        values |= {"modules_to_save": "norm", "trainable_token_indices": "40,50,60,70"}
    jobs = []
    verify = recipe.verify

    def twice(job, adapter):
        jobs.append({"state": {n: t.clone() for n, t in job.model.state_dict().items()}})
        return verify(job, adapter)

    monkeypatch.setattr(recipe, "verify", twice)
    with open_run(TrainOptions.from_mapping(values)) as folder:
        results = recipe.train(recipe.prepare(folder, said), said)
    assert {name: check["passed"] for name, check in results["checks"].items()} == dict.fromkeys(
        ("loaded again", "merged", "stock PEFT"), True
    ), results["checks"]

    adapter = tmp_path / "out/adapter"
    tensors = load_file(adapter / "adapter_model.safetensors")
    tensors[KEY] = (tensors[KEY].float() * 1.02).to(tensors[KEY].dtype)
    save_file(tensors, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
    for without_digest in (False, True):
        if without_digest:
            strip_digests(adapter)
        with open_run(
            TrainOptions.from_mapping(values | {"output": str(tmp_path / f"again{without_digest}")})
        ) as folder:
            job = recipe.prepare(folder, said)
        job.model.load_state_dict(jobs[0]["state"])
        checks = verify(job, adapter)
        assert checks["merged"].passed
        assert checks["loaded again"].passed is False
        assert checks["loaded again"].detail
        assert checks["stock PEFT"].passed is False
        assert checks["stock PEFT"].difference > LARGEST_DIFFERENCE

    shutil.rmtree(adapter)
    with open_run(TrainOptions.from_mapping(values | {"output": str(tmp_path / "gone")})) as folder:
        gone = verify(recipe.prepare(folder, said), adapter)
    for name in ("loaded again", "stock PEFT"):
        assert gone[name].passed is False
        assert gone[name].detail


def strip_digests(adapter):
    content = json.loads((adapter / OUR_CONFIG).read_text())
    for name in [name for name in content if "digest" in name or "fingerprint" in name]:
        del content[name]
    (adapter / OUR_CONFIG).write_text(json.dumps(content))
