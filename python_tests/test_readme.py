"""What the README shows works as it stands there."""

import re
import runpy
from pathlib import Path

import pytest
import torch
import typer
from tiny import adapted, batch, llama

from align_ext import align_parts, align_step, capture_latents, cli, merge_and_unload, save_adapter, set_task
from align_ext.adapters import adapter_class
from align_ext.adapters.adapted_block import adapted_layers
from align_ext.training.options import TrainOptions

ROOT = Path(__file__).parents[1]
TABLES = runpy.run_path(str(ROOT / "docs/tables.py"))
CONFIGS = dict(TABLES["configs"]())
BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)


def test_the_quick_start_trains_with_alignment_and_saves_an_adapter(monkeypatch, tmp_path):
    import transformers

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", lambda name: llama().eval())
    inputs, tasks = batch()
    names = {"loader": [inputs | {"task_ids": tasks}] * 2}
    exec(BLOCKS[0], names)
    assert align_parts(names["model"]).align > 0
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()

    # The second block continues the first with a loss of the user's own.
    names |= inputs | {
        "task_ids": tasks,
        "align_step": align_step,
        "align_parts": align_parts,
        "capture_latents": capture_latents,
    }
    names["my_loss"] = lambda logits: torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), inputs["labels"].flatten(), ignore_index=-100
    )
    exec(BLOCKS[1], names)
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in names["model"].parameters())
    assert "model.layers.0.mlp.gate_proj" in names["latents"]


def test_every_command_and_flag_of_the_readme_exists_and_every_command_is_in_it():
    commands = typer.main.get_command(cli.app).commands
    shown = re.findall(r"(?:`| {4}|&& )align-lora ([a-z]+)([^`|#\n]*)", (ROOT / "README.md").read_text())
    assert {name for name, _ in shown} == set(commands)
    for name, rest in shown:
        known = {flag for option in commands[name].params for flag in option.opts}
        assert set(re.findall(r"--[a-z-]+", rest)) <= known, f"align-lora {name}{rest}"


def test_every_file_that_the_documents_link_to_exists():
    for document in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")):
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", document.read_text()):
            assert (document.parent / target).exists(), f"{document.name} links to {target}"


def test_the_tables_are_as_the_code_has_them():
    text = (ROOT / "README.md").read_text()
    assert TABLES["renewed"](text) == text, "python docs/tables.py --write README.md"
    assert all(f"| `{words}` |" in text for words in CONFIGS)
    assert TABLES["renewed"](text.replace("r (n + m)", "n m")) == text


@pytest.mark.parametrize("words", CONFIGS)
def test_the_parameter_formulas_count_what_real_modules_train(words):
    config = CONFIGS[words]
    formula = re.sub(r"(?<=[\w)]) (?=[\w(])", " * ", config.row.parameters)
    sizes = {"n": 6, "m": 10, "r": config.r, "N": config.num_heads, "M": config.num_tasks, "G": config.routing_groups}
    adapter = adapter_class(config)(config, sizes["n"], sizes["m"])
    assert sum(p.numel() for p in adapter.parameters()) == eval(formula, sizes)


def logits(model):
    with torch.no_grad():
        return model.eval()(batch()[0]["input_ids"]).logits


@pytest.mark.parametrize("words", CONFIGS)
def test_what_the_table_says_of_merging_is_what_happens(words):
    config = CONFIGS[words]
    model, said = adapted(**config.to_dict()), TABLES["merges"](config)
    if said != "yes":
        with pytest.raises(ValueError, match="cannot be merged"):
            merge_and_unload(model)
    if said == "a task":
        set_task(model, 1)
    if said != "no":
        expected = logits(model)
        torch.testing.assert_close(logits(merge_and_unload(model)), expected)
        assert (expected - logits(llama().double())).abs().max() > 1e-2, "so that the adapters count"


EXPORTED = [words for words, config in CONFIGS.items() if TABLES["merges"](config) == "yes"]


@pytest.mark.parametrize("words", EXPORTED)
def test_what_exports_is_read_by_stock_peft(words, tmp_path):
    import peft

    model = adapted(**CONFIGS[words].to_dict())
    expected = logits(model)
    save_adapter(model, tmp_path)
    stock = peft.PeftModel.from_pretrained(llama().double(), tmp_path, autocast_adapter_dtype=False)
    torch.testing.assert_close(logits(stock), expected)


def test_each_row_of_the_ablation_adds_what_its_name_says_and_the_last_is_mtlora():
    rows = dict(re.findall(r"^\| (.*) \| `(--.*)` \|$", TABLES["ablation"](), re.MULTILINE))
    parsed = {}
    for row, line in rows.items():
        flags = line.split()
        given = {flag.removeprefix("--"): value for flag, value in zip(flags[::2], flags[1::2], strict=True)}
        parsed[row] = TrainOptions.from_mapping(given).adapter_config(5).to_dict()

    def added(row, to):
        return {name: value for name, value in parsed[row].items() if value != parsed[to][name]}

    assert added("+ block", "HydraLoRA") == {"target_blocks": ["attention", "mlp"]}
    assert added("+ block + spectral", "+ block") == {"spectral": "paper"}
    assert added("+ block + fine-grained", "+ block") == {"routing_groups": 2}
    assert added("all: mtLoRA", "+ block + spectral") == {"architecture": "mtlora", "routing_groups": 2}
    assert len(adapted_layers(adapted(**parsed["+ block"]))) == 4
