"""The README's and the guide's commands and Python run as they stand there, and the guide is in step with the code."""

import importlib.util
import os
import re
import sys
from pathlib import Path

import pytest
import typer
from hf.guide import blocks, commands
from hf.words import llama, model_folder, write_rows
from processes import python
from transformers import AutoModelForCausalLM

import align_ext
from align_ext import cli

ROOT = Path(__file__).parents[2]
DATA = ROOT / "examples/data"
PAGES = sorted((ROOT / "docs/guide").glob("*.md"))
FIRST = ("README",)  # the page that is read first; the others' blocks run with --slow
DOCUMENTS = [ROOT / "README.md", *PAGES]
MODELS = {"SmolLM2-135M": False, "SmolLM2-135M-Instruct": True}  # and whether it has a chat template


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """A home of Hugging Face's libraries whose cache has tiny models by the names of the documents' models."""
    home = tmp_path_factory.mktemp("home")
    for name, chat in MODELS.items():
        repository, commit = home / "hub" / f"models--HuggingFaceTB--{name}", "0" * 40
        (repository / "refs").mkdir(parents=True)
        (repository / "refs/main").write_text(commit)
        (repository / "snapshots" / commit).mkdir(parents=True)
        # bitsandbytes needs widths that are multiples of 64 on a CPU.
        model_folder(repository / "snapshots" / commit, chat, lambda: llama(hidden_size=64, intermediate_size=128))
    return {"HF_HOME": str(home), "CUDA_VISIBLE_DEVICES": ""}


@pytest.fixture
def work(tmp_path):
    """A folder with the repository's examples."""
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    return tmp_path


def finished(process):
    output, _ = process.communicate(timeout=900)
    assert process.returncode == 0, output
    return output


@pytest.mark.parametrize(
    "page", [pytest.param(page, marks=() if page.stem in FIRST else pytest.mark.slow, id=page.stem) for page in PAGES]
)
def test_every_block_of_a_page_runs_as_it_stands(page, hub, work):
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    output = finished(python("-m", "hf.guide", page, cwd=work, env=hub | {"PATH": path}))
    ran = [line.removeprefix("$ ") for line in output.splitlines() if line.startswith("$ ")]
    assert ran == [command for kind, text in blocks(page) if kind == "bash" for command in commands(text)]
    assert ran


def test_the_first_lines_of_the_readme_train_with_alignment_and_save_an_adapter(hub, work):
    ((kind, text),) = blocks(ROOT / "README.md")
    assert kind == "python"
    assert len([line for line in text.splitlines() if line and not line.startswith(("import", "from"))]) == 10
    after = "\nfrom align_ext import align_parts\nprint('aligned', align_parts(model).align > 0)"
    assert "aligned True" in finished(python("-c", text + after, cwd=work, env=hub))
    assert (work / "adapter" / "adapter_model.safetensors").is_file()


def test_a_loss_of_ones_own_reaches_the_adapters_and_the_latents_are_those_of_every_layer(hub, work):
    ((_, text),) = [block for block in blocks(ROOT / "docs/guide/own-data.md") if "align_step" in block[1]]
    after = """
import math
assert math.isclose(parts.lm, float(loss), rel_tol=1e-4) and parts.weight == 0.1
trained = [p for p in model.parameters() if p.requires_grad]
print("reached", any(p.grad is not None and p.grad.abs().sum() > 0 for p in trained))
print("model.layers.0.mlp.gate_proj" in latents, len(latents) == len(parts.per_layer) == 6, parts.align > 0)
"""
    output = finished(python("-c", text + after, cwd=work, env=hub))
    assert "reached True\nTrue True True" in output


@pytest.mark.slow
def test_a_page_stops_at_the_first_command_that_fails(hub, work):
    page = work / "page.md"
    page.write_text("```bash\nalign-lora train --tasks nobody\necho 'it went on'\n```\n")
    output, _ = (process := python("-m", "hf.guide", page, cwd=work, env=hub)).communicate()
    assert process.returncode != 0
    assert "exit code 2: align-lora train" in output
    assert "\nit went on" not in output


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: document.stem)
def test_every_option_of_a_document_exists(document):
    known = typer.main.get_command(cli.app).commands
    for name, rest in re.findall(r"(?:^|`)align-lora ([a-z]+)([^`|#\n]*)", document.read_text(), re.MULTILINE):
        command = known[name]
        command = command.commands[rest.split()[0]] if hasattr(command, "commands") and rest.split() else command
        flags = {flag for option in command.params for flag in option.opts} | {"--help"}
        assert set(re.findall(r"--[a-z0-9-]+", rest)) <= flags, f"align-lora {name}{rest}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: document.stem)
def test_every_module_and_name_that_a_document_imports_is_there(document):
    text = document.read_text()
    for names in re.findall(r"^from align_ext import (.*)$", text, re.MULTILINE):
        assert set(names.split(", ")) <= set(align_ext.__all__)
    for module in re.findall(r"python -m ([\w.]+)", text):
        assert importlib.util.find_spec(module) is not None, module


def test_the_guide_has_a_line_for_each_of_its_pages():
    text = (ROOT / "docs/guide/README.md").read_text()
    assert {f"]({page.name})" for page in PAGES if page.name != "README.md"} == set(
        re.findall(r"\]\([\w-]+\.md\)", text)
    )


TRAIN = ["train", "--data", DATA, "--steps", 20, "--device", "cpu"]
MISTAKES = [
    ("own-data", [*TRAIN, "--tasks", "addition"], "alignment needs two tasks or more"),
    ("own-data", [*TRAIN, "--batch-size", 2], "batch_size must be at least 4 to hold per_task=2 examples of two tasks"),
    ("own-data", ["train", "--data", "notes.jsonl"], "the column note would be lost"),
    ("own-data", ["train", "--data", "a/x.jsonl", "--data", "b/x.jsonl"], "is in 'a/x.jsonl' and in 'b/x.jsonl'"),
    ("own-data", [*TRAIN, "--seq-len", 20], "has no examples to score on: all 12 are too long"),
    ("own-data", [*TRAIN, "--lr", 1000], "training has diverged"),
    ("own-data", [*TRAIN, "--output", "run"], "the output folder 'run' is not empty"),
    ("own-data", [*TRAIN, "--target-modules", "nothing"], "matches no linear layer"),
    ("several-processes", [*TRAIN, "--fsdp"], "--fsdp divides a model among GPUs"),
    ("architectures", [*TRAIN, "--architecture", "hydraa"], "unknown architecture"),
    ("architectures", [*TRAIN, "--architecture", "lora", "--num-heads", 2], "architecture 'lora' has no num_heads"),
    ("serve", ["merge", "hydra"], "cannot be merged: its router mixes the heads anew for every input"),
    ("serve", ["merge", "multi_adapter"], "the adapter has one part for each task: name one with --task"),
    ("serve", ["merge", "lora", "--model", "other"], "the adapter belongs to another base model"),
    ("serve", ["export", "hydra"], "PEFT has no form of this adapter"),
    ("evaluate", ["eval", "--data", "only"], "has no test split: name a file"),
    ("evaluate", ["eval", "--adapter", "lora", "--model", "other"], "the adapter belongs to another base model"),
]


@pytest.mark.parametrize(("page", "arguments", "message"), MISTAKES, ids=lambda value: str(value)[:40])
def test_what_goes_wrong_says_what_the_page_quotes(run, tmp_path, page, arguments, message):
    command, work = arguments[0], tmp_path / "work"
    base = model_folder(work / "base")
    write_rows(work / "notes.jsonl", [{"prompt": "a", "completion": "b", "note": "hear, hear"}])
    for folder in ("run", "only", "a", "b"):
        (work / folder).mkdir()
    for folder in ("a", "b"):
        write_rows(work / folder / "x.jsonl", [{"prompt": "p", "answer": "q"}])
    write_rows(work / "only" / "x.train.jsonl")
    (work / "run" / "other.txt").write_text("mine")
    model_folder(work / "other", model=lambda: llama(seed=1))
    if command in ("merge", "export", "eval") and arguments[1] != "--data":
        name = arguments[2] if command == "eval" else arguments[1]
        model = AutoModelForCausalLM.from_pretrained(base)
        align_ext.replace_linear_with_align_lora(model, architecture=name, num_tasks=2)
        align_ext.save_adapter(model, work / name, ("a", "b"))
    if command == "train":
        arguments = [*arguments, "--model", base]
    if command in ("merge", "export"):
        arguments = [*arguments, "--output", "result"]
    code, _, error = run(*arguments)
    assert code == 2
    assert message in error
    _, _, mistakes = (ROOT / f"docs/guide/{page}.md").read_text().partition("## What goes wrong")
    assert message in mistakes
