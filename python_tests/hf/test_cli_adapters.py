"""align-lora merge, export and inspect on folders of every kind; mistakes are one line and nothing is written."""

import json

import pytest
import torch
from hf.folders import ARCHITECTURES, as_version_0_1_0, files
from hf.words import llama, model_folder, tokenizer
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from align_ext import load_adapter, replace_linear_with_align_lora, save_adapter, set_task
from align_ext.adapters.adapted_block import adapted_layers
from align_ext.cli import convert as commands

TEXT = "what comes after 3?"


def adapter_folder(folder, kind, task_names=(), **options):
    """An adapter of random values beside the tiny model that speaks."""
    model = llama()
    torch.manual_seed(1)
    options = {"r": 2, "target_modules": ["up_proj"], "num_tasks": 2} | ARCHITECTURES[kind] | options
    replace_linear_with_align_lora(model, **options)
    with torch.no_grad():
        for layer in adapted_layers(model).values():
            for parameter in layer.adapter.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    save_adapter(model, folder, task_names)
    return model.eval()


@torch.no_grad()
def logits(model):
    return model.eval()(**tokenizer()(TEXT, return_tensors="pt")).logits


def assert_close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["align_lora", "m_lora", "multi_adapter"])
def test_merge_writes_a_model_that_computes_the_same(kind, run, tmp_path):
    model = adapter_folder(tmp_path / "adapter", kind)
    task = ["--task", 1] if kind == "multi_adapter" else []
    if task:
        set_task(model, 1)
    code, out, err = run(
        "merge", tmp_path / "adapter", "--model", model_folder(tmp_path / "base"), "--output", "m", *task
    )
    assert code == 0, err
    assert "writing m" in out
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "work/m")
    assert_close(logits(merged), logits(model))
    assert (tmp_path / "work/m/tokenizer.json").is_file()
    assert not {"adapter_config.json", "align_lora_config.json"} & set(files(tmp_path / "work/m"))


def test_merge_keeps_the_dtype_of_the_base_unless_it_is_told_another(run, tmp_path):
    adapter_folder(tmp_path / "adapter", "lora")
    llama(torch.bfloat16).save_pretrained(tmp_path / "base")
    tokenizer().save_pretrained(tmp_path / "base")
    for flags, dtype in (([], torch.bfloat16), (["--dtype", "float32"], torch.float32)):
        output = tmp_path / str(dtype)
        assert run("merge", tmp_path / "adapter", "--model", tmp_path / "base", "--output", output, *flags)[0] == 0
        tensors = load_file(output / "model.safetensors")
        assert {tensor.dtype for tensor in tensors.values()} == {dtype}


def test_merge_of_a_routed_adapter_says_how_far_the_outputs_moved(run, tmp_path):
    adapter_folder(tmp_path / "adapter", "hydra")
    model_folder(tmp_path / "base")
    (tmp_path / "prompts").write_text(f"{TEXT}\n\nand a longer one\n")
    flags = [
        "--model",
        tmp_path / "base",
        "--output",
        "m",
        "--approximate",
        "uniform",
        "--prompts",
        tmp_path / "prompts",
    ]
    code, out, err = run("merge", tmp_path / "adapter", *flags)
    assert code == 0, err
    tokens = len(TEXT) + len("and a longer one")
    assert "nats a token" in out
    assert f"of {tokens} tokens" in out
    AutoModelForCausalLM.from_pretrained(tmp_path / "work/m")


@pytest.mark.parametrize("kind", ["align_lora", "PiSSA, rslora", "m_lora", "hydra without router"])
def test_export_writes_stock_pefts_folder_and_verifies_it(kind, run, tmp_path):
    model = adapter_folder(tmp_path / "adapter", kind)
    base = model_folder(tmp_path / "base")
    code, out, err = run("export", tmp_path / "adapter", "--model", base, "--output", "e", "--verify")
    assert code == 0, err
    assert files(tmp_path / "work/e") == ["README.md", "adapter_config.json", "adapter_model.safetensors"]
    assert "stock PEFT: same logits" in out
    assert "align_ext: same logits" in out
    assert_close(logits(PeftModel.from_pretrained(llama(), tmp_path / "work/e")), logits(model))
    content = json.loads((tmp_path / "work/e/adapter_config.json").read_text())
    assert content["base_model_name_or_path"] == str(base)


def test_export_writes_a_folder_for_each_task_or_for_one_by_name(run, tmp_path):
    model = adapter_folder(tmp_path / "adapter", "multi_adapter", ["qa", "sums"])
    flags = ["--model", model_folder(tmp_path / "base"), "--verify", "--output"]
    code, out, err = run("export", tmp_path / "adapter", *flags, "all")
    assert code == 0, err
    assert "stock PEFT of qa: same logits" in out
    assert "align_ext of sums: same logits" in out
    assert run("export", tmp_path / "adapter", *flags, "one", "--task", "sums")[0] == 0
    set_task(model, 1)
    for folder in ("all/sums", "one"):
        assert_close(logits(load_adapter(llama(), tmp_path / "work" / folder)), logits(model))
    assert sorted(p.name for p in (tmp_path / "work/all").iterdir()) == ["qa", "sums"]


def test_a_folder_that_does_not_verify_is_exit_code_1(run, tmp_path, monkeypatch):
    adapter_folder(tmp_path / "adapter", "m_lora")
    write = commands.export_peft

    def wrong(model, folder, task=None):
        write(model, folder, task)
        file = folder / "adapter_model.safetensors"
        save_file({name: 1.01 * tensor for name, tensor in load_file(file).items()}, file)

    monkeypatch.setattr(commands, "export_peft", wrong)
    flags = ["--model", model_folder(tmp_path / "base"), "--output", "e", "--verify"]
    code, out, _ = run("export", tmp_path / "adapter", *flags)
    assert code == 1
    assert "stock PEFT: OTHER LOGITS" in out
    assert "align_ext: OTHER LOGITS" in out


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_inspect_needs_no_model(kind, run, tmp_path):
    model = adapter_folder(tmp_path / "adapter", kind, ["qa", "sums"])
    code, out, err = run("inspect", tmp_path / "adapter")
    assert code == 0, err
    text = " ".join(out.split())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert f"architecture {model.align_state.config.architecture}: " in text
    assert f"parameters {trained:,} in " in text
    assert "tasks qa, sums" in text
    assert "values all finite" in text
    assert ("stock PEFT loads" if kind not in NO_PEFT else "stock PEFT cannot: ") in text


NO_PEFT = (
    "hydra",
    "lora_moe",
    "malora",
    "r_lora",
    "mtlora",
    "sequence router",
    "mtlora beside blocks",
    "lora beside blocks",
    "mixlora",
)


@pytest.mark.parametrize("kind", ["m_lora", "adalora", "mixlora", "mtlora_cvpr"])
def test_a_narrow_terminal_shows_whole_names(kind, run, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    model = adapter_folder(tmp_path / "adapter", kind)
    lines = [line for line in run("inspect", tmp_path / "adapter")[1].splitlines() if line.startswith("│")]
    names = [""]
    for _, part, size, *_ in (line.split("│") for line in lines):
        names = [*names, part.strip()] if size.strip() else [*names[:-1], names[-1] + part.strip()]
    assert sorted(names[1:]) == sorted(adapted_layers(model))


def test_the_norms_of_inspect_are_those_of_the_layer(run, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    model = adapter_folder(tmp_path / "adapter", "m_lora")
    rows = {}
    for line in run("inspect", tmp_path / "adapter")[1].splitlines():
        cells = [cell.strip() for cell in line.split("│")[1:-1]]
        rows |= {cells[0]: cells[1:]} if cells else {}
    layers = adapted_layers(model)
    assert rows.keys() == layers.keys()
    for name, layer in layers.items():
        adapter, (n, m, r, scaling, count, *norms) = layer.adapter, rows[name]
        assert (n, m, r, scaling, count) == ("32", "48", "2", "16", str(2 * 32 + len(adapter.lora_B) * 48 * 2))
        for shown, tensor in zip(norms, (adapter.lora_A, adapter.lora_B, adapter.delta_weight()), strict=True):
            assert float(shown) == pytest.approx(float(tensor.detach().norm()), rel=5e-3)


def damaged(folder):
    adapter_folder(folder, "r_lora")
    file = folder / "align_lora_heads.safetensors"
    tensors = load_file(file)
    next(iter(tensors.values())).fill_(float("nan"))
    save_file(tensors, file)


def occupied(folder):
    adapter_folder(folder, "lora")
    (folder.parent / "work/o").mkdir()
    (folder.parent / "work/o/mine").write_text("mine")


MISTAKES = {
    "no such folder": (["inspect"], lambda folder: None, "is no adapter folder"),
    "not finite": (["inspect"], damaged, "not finite"),
    "routed, merged": (["merge"], lambda f: adapter_folder(f, "hydra"), "merge with --approximate uniform"),
    "routed, exported": (["export"], lambda f: adapter_folder(f, "hydra"), "PEFT has no form of this adapter"),
    "blocks": (["export"], lambda f: adapter_folder(f, "lora beside blocks"), "whole blocks"),
    "blocks, merged": (
        ["merge", "--approximate", "uniform"],
        lambda f: adapter_folder(f, "mtlora beside blocks"),
        "beside a whole block",
    ),
    "no task": (["merge"], lambda f: adapter_folder(f, "multi_adapter", ["a", "b"]), "name one with --task (a, b)"),
    "another task": (["merge", "--task", "2"], lambda f: adapter_folder(f, "multi_adapter"), "no such task (0 .. 1)"),
    "one for all tasks": (["export", "--task", "0"], lambda f: adapter_folder(f, "lora"), "one adapter for all tasks"),
    "another approximation": (["merge", "--approximate", "mean"], lambda f: adapter_folder(f, "hydra"), "'mean'"),
    "no prompts": (["merge", "--prompts", "absent"], lambda f: adapter_folder(f, "lora"), "cannot read absent"),
    "another dtype": (["merge", "--dtype", "int3"], lambda f: adapter_folder(f, "lora"), "dtype='int3'"),
    "another base": (
        ["export"],
        lambda f: adapter_folder(f, "lora", target_modules=["model.layers.1.mlp.up_proj"]) and rename_layer(f),
        "no layer was adapted",
    ),
    "a classifier, merged": (["merge"], lambda f: adapter_folder(f, "lora") and of_kind(f, "SEQ_CLS"), "'SEQ_CLS'"),
    "seq2seq, exported": (["export"], lambda f: adapter_folder(f, "lora") and of_kind(f, "SEQ_2_SEQ_LM"), "in Python"),
    "an output that is there": (["export"], occupied, "the output 'o' exists and is no empty folder"),
}


def rename_layer(folder):
    as_version_0_1_0(folder)
    for name in ("adapter_config.json", "align_lora_config.json"):
        file = folder / name
        file.write_text(file.read_text().replace("layers.1", "layers.9"))
    file = folder / "adapter_model.safetensors"
    save_file({name.replace("layers.1", "layers.9"): t for name, t in load_file(file).items()}, file)


def of_kind(folder, task_type):
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"task_type": task_type}))


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_on_stderr_and_nothing_is_written(mistake, run, tmp_path):
    (command, *flags), make, message = MISTAKES[mistake]
    make(tmp_path / "adapter")
    if command != "inspect":
        flags += ["--model", model_folder(tmp_path / "base"), "--output", "o"]
    before = sorted((tmp_path / "work").rglob("*"))
    code, _, err = run(command, tmp_path / "adapter", *flags)
    assert code == 2
    assert err.startswith("align-lora: error: ")
    assert err.count("\n") == 1
    assert message in err
    assert sorted((tmp_path / "work").rglob("*")) == before


@pytest.mark.parametrize("command", ["merge", "export", "inspect"])
def test_the_help_says_what_a_command_is_for_with_an_example(command, run):
    code, out, _ = run(command, "--help")
    assert code == 0
    assert "save_adapter" in out
    assert f"Example: align-lora {command} " in out


@pytest.mark.parametrize(("command", "step"), [("merge", "merge_and_unload"), ("export", "export_peft")])
def test_an_interrupted_command_leaves_nothing(command, step, run, tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    adapter_folder(tmp_path / "adapter", "lora")
    monkeypatch.setattr(commands, step, interrupted)
    code, _, err = run(command, tmp_path / "adapter", "--model", model_folder(tmp_path / "base"), "--output", "o")
    assert code == 130
    assert err.endswith("align-lora: interrupted\n")
    assert list((tmp_path / "work").iterdir()) == []
