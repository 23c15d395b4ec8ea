"""The model "align" of lm-evaluation-harness: its likelihoods and answers are those of the model with its adapter."""

import json
import sys

import pytest
import torch
from hf.words import llama, model_folder, tokenizer

from align_ext import load_adapter, replace_linear_with_align_lora, save_adapter, set_task
from align_ext.adapters.adapted_block import adapted_layers
from align_ext.evaluation import lm_eval as ours

TASK = """
task: local
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: label
metric_list: [{{metric: acc}}]
"""


def adapter(folder, **options):
    """An adapter that counts, of two tasks."""
    model = llama()
    replace_linear_with_align_lora(model, num_tasks=2, r=4, **options)
    torch.manual_seed(1)
    for layer in adapted_layers(model).values():
        torch.nn.init.normal_(layer.adapter.lora_B, std=0.3)
    save_adapter(model, folder, task_names=("a", "b"))
    return folder


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    model_folder(tmp_path / "model")
    return tmp_path


def align_lm(place, folder=None, **options):
    options = {"dtype": "float32", "device": "cpu", "batch_size": 3} | options
    return ours.align_lm(str(place / "model"), None if folder is None else str(folder), **options)


def log_likelihood(model, prompt, answer):
    """Of an answer's characters, each a token; and whether greedy decoding gives it."""
    ids = tokenizer()(prompt + answer, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        logits = model(input_ids=ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    gold = ids[0, len(prompt) :]
    return logits.gather(1, gold[:, None]).sum().item(), bool((logits.argmax(-1) == gold).all())


@pytest.mark.parametrize("options", [{}, {"architecture": "hydra"}, {"architecture": "multi_adapter"}])
def test_the_harness_meets_the_model_with_its_adapter(place, options):
    from lm_eval.api.instance import Instance

    folder, task = adapter(place / "adapter", **options), "b" if "multi" in str(options) else None
    model = load_adapter(llama(), folder).eval()
    if task is not None:
        set_task(model, 1)
    pairs = [("one and one", " is two"), ("a", "b"), ("what is this, then?", " a test"), ("x", " y z")]
    requests = [Instance("loglikelihood", {}, pair, 0) for pair in pairs]
    found = align_lm(place, folder, task=task).loglikelihood(requests)
    for (value, greedy), pair in zip(found, pairs, strict=True):
        expected = log_likelihood(model, *pair)
        assert value == pytest.approx(expected[0], rel=1e-4)
        assert greedy is expected[1]
        assert value != pytest.approx(log_likelihood(llama(), *pair)[0], rel=1e-3)
    if not options:
        merged = align_lm(place, folder, merge=True).loglikelihood(requests)
        assert [value for value, _ in merged] == pytest.approx([value for value, _ in found], rel=1e-4)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the CPU is what remains where there is no GPU")
@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
def test_a_device_that_cannot_be_used_is_a_warning_and_the_cpu_is_taken(place, device, caplog):
    found = align_lm(place, device=device)
    assert found.device == found.model.device == torch.device("cpu")
    assert f"device={device}, but torch sees no GPU here" in caplog.text


def test_the_harness_generates_as_its_task_says_and_not_as_the_model_does(place):
    from lm_eval.api.instance import Instance

    requests = [
        Instance("generate_until", {}, (text, {"max_gen_toks": 8, "until": ["\n\n"]}), 0) for text in ("a", "x")
    ]
    expected = align_lm(place).generate_until(requests)
    file = place / "model/generation_config.json"
    odd = {"repetition_penalty": 9.0, "no_repeat_ngram_size": 1, "min_new_tokens": 8, "num_beams": 2}
    file.write_text(json.dumps(json.loads(file.read_text()) | odd))
    assert align_lm(place).generate_until(requests) == expected
    assert any(expected)


def test_a_local_task_runs_through_the_harnesss_own_command_line(place, monkeypatch):
    folder = adapter(place / "adapter")
    model = load_adapter(llama(), folder).eval()
    rows = [{"question": f"{i} is", "choices": ["odd", "even"], "label": i % 2} for i in range(12)]
    (place / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (place / "tasks").mkdir()
    (place / "tasks/local.yaml").write_text(TASK.format(file=place / "rows.jsonl"))
    right = 0
    for row in rows:
        values = [log_likelihood(model, row["question"], " " + choice)[0] for choice in row["choices"]]
        right += values.index(max(values)) == row["label"]
    arguments = f"pretrained={place / 'model'},adapter={folder},dtype=float32"
    flags = ["--tasks", "local", "--include_path", place / "tasks", "--batch_size", "4"]
    flags += ["--model", "align", "--model_args", arguments, "--output_path", place / "out"]
    monkeypatch.setattr(sys, "argv", ["lm_eval", "run", *map(str, flags)])
    ours.main()
    (file,) = (place / "out").rglob("results_*.json")
    assert json.loads(file.read_text())["results"]["local"]["acc,none"] == pytest.approx(right / len(rows))


def slow(*case):
    return pytest.param(*case, marks=pytest.mark.slow)  # each reads the harness's thousands of tasks


@pytest.mark.parametrize(
    ("model", "task", "message"),
    [
        ("pretrained=MODEL,adapter=nowhere", "arc_easy", "nowhere is no adapter folder"),
        ("pretrained=MODEL,adaptor=ADAPTER", "arc_easy", "adaptor is no option"),
        slow("pretrained=nowhere/nobody,adapter=ADAPTER", "arc_easy", "nowhere/nobody"),
        slow("pretrained=MODEL,adapter=ADAPTER", "no_such_task", "no_such_task"),
        slow("pretrained=MODEL,adapter=ADAPTER,merge=perhaps", "arc_easy", "merge='perhaps'"),
    ],
)
def test_a_mistake_on_the_harnesss_command_line_is_one_line(place, monkeypatch, capsys, model, task, message):
    model = model.replace("MODEL", str(place / "model")).replace("ADAPTER", str(adapter(place / "adapter")))
    monkeypatch.setattr(sys, "argv", ["lm_eval", "run", "--model", "align", "--model_args", model, "--tasks", task])
    with pytest.raises(SystemExit) as ended:
        ours.main()
    assert ended.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("align: ")]
    assert message in line


def test_adapters_that_the_harness_cannot_score_are_refused(place):
    with pytest.raises(ValueError, match="name one, as task="):
        align_lm(place, adapter(place / "many", architecture="multi_adapter"))
    routed = adapter(place / "routed", architecture="hydra", router="mlp", routing="sequence")
    with pytest.raises(ValueError, match="would route by the answers"):
        align_lm(place, routed)


def test_without_the_harness_the_error_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setitem(sys.modules, "lm_eval.api.registry", None)
    monkeypatch.setattr(ours, "_model_class", ours._model_class.__wrapped__)  # as before its first use
    with pytest.raises(ModuleNotFoundError, match="pip install lm-eval"):
        ours.align_lm()
