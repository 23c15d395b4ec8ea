"""A training that ends early: which steps it did, which adapter it keeps, and that terminal, report and card say so."""

import json

import pytest
from hf.runs import options, run
from hf.words import model_folder, write_rows
from safetensors.torch import load_file

from align_ext.report.run_page import make_run_report
from align_ext.report.run_results import read_run
from align_ext.report.run_words import cautions
from align_ext.training.in_words import adapter_step, shown_steps, stored_bits


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model_folder(tmp_path / "model")
    write_rows(tmp_path / "rows.jsonl")
    return tmp_path


@pytest.mark.parametrize(
    ("given", "steps", "step", "said"),
    [
        ({"steps": 1}, None, 1, "1 step"),
        ({"steps": 1200}, {"done": 1200, "best": None}, 1200, "1,200 steps"),
        ({"steps": 12}, {"done": 12, "best": 8}, 12, "12 steps"),
        ({"steps": 12}, {"done": 4, "best": 2}, 4, "4 of 12 steps"),
        ({"steps": 12, "load_best_model_at_end": True}, {"done": 4, "best": 4}, 4, "4 of 12 steps"),
        ({"steps": 12, "load_best_model_at_end": True}, {"done": 12, "best": 8}, 8,
         "12 steps (the adapter is that of step 8)"),
        ({"steps": 12, "load_best_model_at_end": True}, {"done": 4, "best": 2}, 2,
         "4 of 12 steps (the adapter is that of step 2)"),
    ],
)  # fmt: skip
def test_the_steps_in_words(given, steps, step, said):
    results = {"options": given, **({} if steps is None else {"steps": steps})}
    assert adapter_step(results) == step
    assert shown_steps(results) == said


def test_how_the_base_was_stored_in_words():
    assert stored_bits({"load_in_4bit": True, "load_in_8bit": False}) == " in 4 bits"
    assert stored_bits({"load_in_8bit": True}) == " in 8 bits"
    assert stored_bits({}) == ""


@pytest.mark.parametrize("best", [False, True])
def test_a_training_that_ends_early_says_what_it_did_and_kept(place, best):
    given = {"eval_steps": 2, "save_steps": 2, "early_stopping_patience": 1, "load_best_model_at_end": best}
    results, said = run(place, steps=40, lr=30.0, warmup=0.0, checks="none", **given)
    losses = [(one["eval_loss"], one["step"]) for one in results["evaluations"]]
    done, least = losses[-1][1], min(losses)[1]
    assert results["steps"] == {"planned": 40, "done": done, "best": least, "begun": 0}
    assert least == done - 2 < 38
    words = f"{done} of 40 steps" + f" (the adapter is that of step {least})" * best
    assert f"\ntrained {words}\n" in said
    card = (place / "out/adapter/README.md").read_text()
    assert f"\n{words}, on the base model.\n" in card
    page = make_run_report(read_run(place / "out"))
    assert dict(page.facts)["Training"].startswith(f"{words}, 8 \N{MULTIPLICATION SIGN} 1 rows each, ")
    kept = place / f"out/checkpoints/checkpoint-{least if best else done}/adapter_model.safetensors"
    adapter, stored = load_file(place / "out/adapter/adapter_model.safetensors"), load_file(kept)
    assert all((adapter[name] == stored[name]).all() for name in adapter.keys() | stored.keys())


@pytest.mark.parametrize("best", [False, True])
def test_the_end_is_drawn_at_the_step_of_the_adapter(place, best):
    run(place, checks="none")
    file = place / "out/results.json"
    results = json.loads(file.read_text())
    assert [one["step"] for one in results["measures"]] == [3, 6, 9]
    results["options"] |= options(place, eval_steps=2, save_steps=2, load_best_model_at_end=best).to_dict()
    results |= {"steps": {"planned": 12, "done": 10, "best": 6}, "evaluations": [
        {"step": step, "eval_loss": loss} for step, loss in ((2, 3.0), (6, 1.0), (10, 2.0))
    ]}  # fmt: skip
    file.write_text(json.dumps(results))
    found = read_run(place / "out")
    assert [step for step, _ in found.measures()] == ([0, 3, 6, 9] if best else [0, 3, 6, 9, 10])
    assert dict(found.measures())[6 if best else 10] == found.probe("after")
    assert any("fewer steps do" in one.text for one in cautions(found)) is not best
