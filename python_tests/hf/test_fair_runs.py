"""What makes runs comparable: one order of the examples, the same scored rows, and all numbers that a table needs."""

import gzip
import json

from hf.runs import prepare, run

from align_ext import flops_per_token
from align_ext.evaluation.rows import RowScore
from align_ext.training import fit


def trained_rows(place, monkeypatch, **changed):
    """The tokens of every batch that a run trains on, in order."""
    seen = []

    class Recording(fit.AlignTrainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            if model.training:
                seen.append((inputs["input_ids"].tolist(), inputs["task_ids"].tolist()))
            return super().compute_loss(model, inputs, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(fit, "AlignTrainer", Recording)
        results, _ = run(place, steps=5, eval_examples=2, **changed)
    return seen, results


def test_every_arm_of_a_seed_trains_on_the_same_batches_and_a_data_seed_fixes_them_for_all_seeds(place, monkeypatch):
    first, results = trained_rows(place, monkeypatch, output="a", architecture="lora")
    for name, changed in {
        "b": {"architecture": "align_lora"}, "c": {"architecture": "hydra", "num_heads": 3}, "d": {"align_weight": 0},
        "e": {"seed": 7, "data_seed": 0},
    }.items():  # fmt: skip
        same, other = trained_rows(place, monkeypatch, output=name, **changed)
        assert same == first, changed
        assert other["data"]["digest"] == results["data"]["digest"]
    assert trained_rows(place, monkeypatch, output="f", seed=7)[0] != first
    ids = [{row.id for row in read_run(place / "work" / name)} for name in "aef"]
    assert ids[0] == ids[1] == ids[2], "every seed scores the same rows"


def read_run(folder):
    lines = [
        json.loads(line) for line in gzip.decompress((folder / "rows.jsonl.gz").read_bytes()).decode().splitlines()
    ]
    assert {line.pop("when") for line in lines} == {"before", "after"}
    return [RowScore(**line) for line in lines]


def test_results_hold_what_a_table_needs(place):
    results, _ = run(place, steps=3, architecture="hydra", num_heads=3, r=4)
    adapters, cost = results["adapters"], results["cost"]
    model = prepare(place, output="x", architecture="hydra", num_heads=3, r=4).model
    assert adapters["trained_parameters"] == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert (adapters["rank"], adapters["scaling"], adapters["architecture"]) == (4, 8.0, "hydra")
    assert adapters["flops_per_token"]["adapters"] == flops_per_token(model).adapters > 0
    assert cost["step_seconds"] == sorted(cost["step_seconds"])
    assert cost["tokens_per_second"] > 0
    assert cost["peak_memory_mib"] > 50
    assert [row.task for row in read_run(place / "work/out")] == ["next"] * 4 + ["threes"] * 4 + ["next"] * 4 + [
        "threes"
    ] * 4
    pairs = [entry["aligned_pairs"] for entry in run(place, output="y", steps=3, log_steps=1)[0]["losses"]]
    assert pairs == [1.0] * 3
