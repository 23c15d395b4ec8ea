"""Every example runs as its first lines say, and with the alignment term the alignment value falls faster."""

import ast
import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hf.words import llama, model_folder

import align_ext
from align_ext import load_adapter
from align_ext.model import replace

EXAMPLES = Path(__file__).parents[2] / "examples"
DATA = sorted((EXAMPLES / "data").glob("*.train.jsonl"))
PROCESSES = {"accelerate_two_processes": 2, "fsdp2": 2}
STEPS = {"sft_packing": 12}  # of more tokens each
SCRIPTS = sorted(file.stem for file in EXAMPLES.glob("*.py"))
OF_TEXT = [script for script in SCRIPTS if script != "vision"]  # it draws its data itself
FIRST = ("plain_loop", "trainer")  # the others, of packages or several processes that take long to start, with --slow
VALUE = re.compile(r"(?:alignment |'align_loss': ')([\d.e+-]+)")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A folder with a tiny model and its tokenizer."""
    return model_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture
def alone(monkeypatch, capfd):
    """Runs a script in this process, which no launcher started; exit code, what it prints, what it says of errors."""

    def alone(script, *arguments, **environment):
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
            monkeypatch.delenv(name, raising=False)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(sys, "argv", [str(EXAMPLES / f"{script}.py"), *map(str, arguments)])
        monkeypatch.setattr(sys, "path", [path for path in sys.path if Path(path).resolve() != EXAMPLES])
        capfd.readouterr()
        try:
            runpy.run_path(str(EXAMPLES / f"{script}.py"), run_name="__main__")
            code = 0
        except SystemExit as ended:
            code = ended.code
        return code, *capfd.readouterr()

    return alone


def launched(script, processes, *arguments):
    """What a script prints under torchrun, as its first lines start it."""
    options = ["--standalone", "--nproc_per_node", str(processes)]
    command = [sys.executable, "-m", "torch.distributed.run", *options, str(EXAMPLES / f"{script}.py"), *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = list(map(str, command))
    return subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout


@pytest.fixture
def values(alone, model, tmp_path):
    """The alignment of each step of a run with a weight, whose adapter is left in tmp_path / "adapter"."""

    def values(script, weight):
        arguments = [*DATA, "--model", model, "--lr", 1e-2, "--weight", weight, "--steps", STEPS.get(script, 30)]
        arguments += ["--output", tmp_path / "adapter"]
        if script in PROCESSES:
            return list(map(float, VALUE.findall(launched(script, PROCESSES[script], *arguments))))
        code, out, _ = alone(script, *arguments)
        assert code == 0
        return list(map(float, VALUE.findall(out)))

    return values


@pytest.mark.parametrize("script", [pytest.param(s, marks=() if s in FIRST else pytest.mark.slow) for s in OF_TEXT])
def test_the_alignment_falls_faster_with_a_weight_than_without_and_the_adapter_is_saved(values, script, tmp_path):
    without, with_it = values(script, 0), values(script, 0.1)
    assert len(without) == len(with_it) == STEPS.get(script, 30)  # of several processes one speaks
    assert without[0] == with_it[0]
    assert with_it[-1] < with_it[0]
    assert with_it[-1] / with_it[0] < without[-1] / without[0]

    trained, inputs = llama(), torch.arange(12)[None]
    before = trained(inputs).logits
    load_adapter(trained, tmp_path / "adapter")
    assert (trained.eval()(inputs).logits - before).abs().max() > 1e-2
    assert config_of(tmp_path / "adapter")["task_names"] == ["addition", "reversal", "sentiment"]


def config_of(folder):
    return json.loads((folder / "align_lora_config.json").read_text())


def test_a_compiled_model_and_a_plain_one_are_trained_alike(values, monkeypatch):
    monkeypatch.setattr(replace, "join_siblings", lambda model: None)  # compiled layers have dropout masks of their own
    assert values("compile", 0.1) == pytest.approx(values("plain_loop", 0.1), rel=1e-3)


@pytest.mark.slow
def test_processes_of_trainers_on_cpus_join(model, tmp_path):
    arguments = [*DATA, "--model", model, "--steps", 12, "--output", tmp_path / "adapter"]
    assert len(VALUE.findall(launched("trainer", 2, *arguments))) == 12  # one process speaks


@pytest.mark.parametrize("architecture", ["align_lora", "mtlora"])
def test_a_vit_learns_tasks_of_images(architecture, alone):
    code, out, _ = alone("vision", "--steps", 40, "--architecture", architecture)
    before, after = (
        list(map(float, re.findall(r"[01]\.\d\d", line))) for line in re.findall(r"(?:before|after): .*", out)
    )
    assert (code, len(before), len(after)) == (0, 3, 3)
    assert sum(after) / 3 > sum(before) / 3 + 0.1
    assert float(VALUE.findall(out)[0]) > 0


def test_each_example_is_short_enough_to_read_at_once():
    for script in SCRIPTS:
        assert len((EXAMPLES / f"{script}.py").read_text().splitlines()) <= 70


def test_each_example_stands_alone():
    """It imports no neighbour, and of this package the public names."""
    for script in SCRIPTS:
        for node in ast.walk(ast.parse((EXAMPLES / f"{script}.py").read_text())):
            if isinstance(node, ast.ImportFrom):
                assert node.module not in SCRIPTS
                if node.module.startswith("align_ext"):
                    assert node.module == "align_ext"
                    assert {alias.name for alias in node.names} <= set(align_ext.__all__)
            if isinstance(node, ast.Import):
                assert not {alias.name for alias in node.names} & {*SCRIPTS, "align_ext"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "arguments", "environment", "message"),
    [
        ("fsdp2", DATA, {}, "torchrun --nproc_per_node 2 examples/fsdp2.py"),
        ("accelerate_two_processes", DATA, {}, "torchrun --nproc_per_node 2 examples/accelerate_two_processes.py"),
        ("plain_loop", DATA, {"RANK": "0", "WORLD_SIZE": "2"}, "start it by python examples/plain_loop.py"),
        ("compile", DATA, {"RANK": "0", "WORLD_SIZE": "2"}, "start it by python examples/compile.py"),
        ("plain_loop", [*DATA, "--steps", "0"], {}, "--steps of at least 1"),
        ("trainer", [*DATA, "--steps", "0"], {}, "--steps must be at least 1"),
        ("sft_packing", [*DATA, "--steps", "many"], {}, "--steps: invalid int value: 'many'"),
        ("plain_loop", [*DATA, "--weight", "nan"], {}, "align_weight must be a number >= 0"),
        ("trainer", [*DATA, "--model", "/nowhere"], {}, "/nowhere"),
        ("plain_loop", ["/nowhere.jsonl"], {}, "No such file or directory: '/nowhere.jsonl'"),
        ("sft_packing", [EXAMPLES / "trainer.py"], {}, "Extra data: line 1 column 3"),
        ("plain_loop", [], {}, "the following arguments are required: files"),
        ("vision", ["--steps", "0"], {}, "--steps must be at least 1"),
        ("vision", ["--steps", "1", "--architecture", "lara"], {}, "did you mean 'lora'"),
    ],
)
def test_a_wrong_start_is_one_line(alone, model, script, arguments, environment, message):
    given = [] if "--model" in arguments or script == "vision" else ["--model", model]
    code, _, error = alone(script, *arguments, *given, **environment)
    said = [line for line in error.splitlines() if line.startswith(f"{script}.py: ")]
    assert (code, len(said)) == (2, 1)
    assert message in said[0]
    assert "Traceback" not in error


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_is_there_without_a_launcher(alone, script):
    code, usage, _ = alone(script, "--help")
    assert code == 0
    assert "--weight" in usage
    assert f"examples/{script}.py{' examples/data/*.train.jsonl' * (script in OF_TEXT)}" in usage
