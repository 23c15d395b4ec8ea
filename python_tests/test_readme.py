"""What the README says is so; that its commands and Python run is in hf/test_guide.py."""

import contextlib
import json
import re
import runpy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import typer
from tiny import adapted, batch, llama

from align_ext import cli, merge_and_unload, save_adapter, set_task
from align_ext.adapters import adapter_class
from align_ext.adapters.adapted_block import adapted_layers
from align_ext.training.options import TrainOptions

ROOT = Path(__file__).parents[1]
TABLES = runpy.run_path(str(ROOT / "docs/tables.py"))
CONFIGS = dict(TABLES["configs"]())
PICTURE = runpy.run_path(str(ROOT / "docs/picture.py"))
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")]


def test_every_command_and_flag_of_the_readme_exists_and_every_command_is_in_it():
    commands = typer.main.get_command(cli.app).commands
    shown = re.findall(r"(?:`| {4}|&& )align-lora ([a-z]+)([^`|#\n]*)", (ROOT / "README.md").read_text())
    assert {name for name, _ in shown} == set(commands)
    for name, rest in shown:
        command = commands[name]
        command = command.commands[rest.split()[0]] if hasattr(command, "commands") and rest.split() else command
        known = {flag for option in command.params for flag in option.opts}
        assert set(re.findall(r"--[a-z-]+", rest)) <= known, f"align-lora {name}{rest}"


def headings(document):
    """The anchors of a document's headings, as GitHub makes them."""
    lines = re.findall(r"^#+ (.*)$", document.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", line.lower()).replace(" ", "-") for line in lines}


def test_every_file_and_heading_that_the_documents_link_to_exists():
    for document in DOCUMENTS:
        for target, anchor in re.findall(r"\]\(([^)#:]*)(?:#([^)]*))?\)", document.read_text()):
            file = document.parent / target if target else document
            assert file.exists(), f"{document.name} links to {target}"
            assert not anchor or anchor in headings(file), f"{document.name} links to {target}#{anchor}"


def test_all_that_merge_whole_but_adalora_take_dora():
    table = (ROOT / "README.md").read_text().partition("<!-- architectures -->")[2].partition("<!-- end -->")[0]
    merging = re.findall(r"^\| `([^`]+)` .*\| yes \|", table, re.M)
    assert {"lora", "hydra router=None", "nlora", "adalora"} <= set(merging) < set(CONFIGS)
    for words, config in CONFIGS.items():
        takes = words in merging and words != "adalora"
        with contextlib.nullcontext() if takes else pytest.raises(ValueError, match="use_dora=True"):
            replace(config, use_dora=True)


def test_the_tables_are_as_the_code_has_them():
    texts = {document: document.read_text() for document in DOCUMENTS}
    for document, text in texts.items():
        assert TABLES["renewed"](text) == text, f"python docs/tables.py --write {document.relative_to(ROOT)}"
    for name in TABLES["TABLES"]:
        assert sum(f"<!-- {name} -->" in text for text in texts.values()) == 1, name
    text = texts[ROOT / "README.md"]
    assert all(f"| `{words}` |" in text for words in CONFIGS)
    assert TABLES["renewed"](text.replace("r (n + m)", "n m")) == text


def test_the_picture_and_the_figures_beside_it_are_those_that_were_measured():
    assert PICTURE["PICTURE"].read_text() == PICTURE["picture"](), "python docs/picture.py --write"
    assert (
        f"![Time of one adapted layer divided by that of the frozen layer, on a CPU](docs/{PICTURE['PICTURE'].name})"
        in (text := (ROOT / "README.md").read_text())
    )
    medians = PICTURE["medians"]()
    assert f"**{medians['Align-LoRA with its loss, this package']} times** the frozen layer's time" in text
    assert f"it is {medians['LoRA, PEFT']} times" in text
    without_amx = json.loads((ROOT / "docs/measurements/amd-epyc-avx512-bf16-2-threads.json").read_text())["tables"]
    rows = next(columns for table, columns in without_amx.items() if "one adapter" in table)[PICTURE["COLUMN"]]
    ours, peft = (rows[name]["ratio"][1] for name in ("align_lora, kl", "PEFT's LoRA"))
    assert f"on an AMD EPYC with AVX512_BF16 {ours:.2f} and {peft:.2f} (" in text


def test_the_two_commands_are_the_ones_that_ci_runs():
    text = re.sub(r"```.*?```", "", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    shown = re.findall(r"^    (\S.*)$", text, re.MULTILINE)
    assert shown == ['pip install ".[test]"', "pytest"]
    lines = (ROOT / ".ci/run").read_text().splitlines()
    assert 'pip install -qq ".[test]"' in lines
    assert "pytest -q --durations=10" in lines


@pytest.mark.parametrize("words", CONFIGS)
def test_the_parameter_formulas_count_what_real_modules_train(words):
    config = CONFIGS[words]
    of_layer, _, of_router = config.row.parameters.partition("; a block ")
    formula = re.sub(r"(?<=[\w)]) (?=[\w(])", " * ", f"{of_layer} + {of_router or 0}")
    sizes = {"n": 6, "m": 10, "r": config.r, "N": config.num_heads, "M": config.num_tasks, "G": config.routing_groups}
    sizes["d"] = config.shared_rank
    adapter = adapter_class(config)(config, sizes["n"], sizes["m"], *((sizes["n"], True) if of_router else ()))
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
    rows = dict(re.findall(r"^\| (.*) \| .* M \| `(--.*)` \|$", TABLES["ablation"](), re.MULTILINE))
    parsed = {}
    for row, line in rows.items():
        flags = line.split()
        given = {flag.removeprefix("--"): value for flag, value in zip(flags[::2], flags[1::2], strict=True)}
        parsed[row] = TrainOptions.from_mapping(given).adapter_config(5).to_dict()

    def added(row, to):
        return {name: value for name, value in parsed[row].items() if value != parsed[to][name]}

    assert added("+ block", "HydraLoRA") == {"target_blocks": ["mlp"], "target_modules": "auto"}
    assert added("+ block + spectral", "+ block") == {"spectral": "paper"}
    assert added("+ block + fine-grained", "+ block") == {"routing_groups": 2}
    assert added("all: mtLoRA", "+ block + spectral") == {"architecture": "mtlora", "routing_groups": 2}
    assert len(adapted_layers(adapted(**parsed["+ block"]))) == 2
