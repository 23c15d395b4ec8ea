"""Every example runs as its first lines say, and with the alignment term the alignment value falls faster."""

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
PROCESSES = {"accelerate_two_processes": 2, "fsdp2": 2}
SCRIPTS = sorted(file.stem for file in EXAMPLES.glob("*.py") if file.stem != "common")
LINE = re.compile(r"weight (\S+), (\d) process\(es\): alignment (\S+) -> (\S+) \(x")


@pytest.fixture
def run(monkeypatch, capfd, unused_port):
    """Runs a script and returns what it prints."""

    def run(script):
        file = EXAMPLES / f"{script}.py"
        if script in PROCESSES:
            options = ["--nproc_per_node", str(PROCESSES[script]), "--master_port", str(unused_port)]
            command = [sys.executable, "-m", "torch.distributed.run", *options, str(file)]
            environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
            return subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout
        monkeypatch.setattr(sys, "argv", [str(file)])
        monkeypatch.syspath_prepend(str(EXAMPLES))
        monkeypatch.setenv("WORLD_SIZE", "1")
        runpy.run_path(str(file), run_name="__main__")
        return capfd.readouterr().out

    return run


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_alignment_falls_faster_with_a_weight_than_without(run, script):
    lines = LINE.findall(run(script))
    (zero, without), (weight, with_it) = ((float(w), float(last) / float(first)) for w, _, first, last in lines)
    assert {int(processes) for _, processes, _, _ in lines} == {PROCESSES.get(script, 1)}
    assert zero == 0 < weight
    assert with_it < 1
    assert with_it < without


def test_each_example_is_short_enough_to_read_at_once():
    for script in SCRIPTS:
        assert len((EXAMPLES / f"{script}.py").read_text().splitlines()) <= 40


def started(script, *arguments, **environment):
    """Exit code and what a script says, started without a launcher."""
    own = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    command = [sys.executable, str(EXAMPLES / f"{script}.py"), *arguments]
    result = subprocess.run(command, capture_output=True, text=True, env=own | environment, check=False)
    return result.returncode, result.stdout, result.stderr


@pytest.mark.parametrize(
    ("script", "arguments", "environment", "message"),
    [
        ("fsdp2", (), {}, "torchrun --nproc_per_node 2 examples/fsdp2.py"),
        ("accelerate_two_processes", (), {}, "torchrun --nproc_per_node 2 examples/accelerate_two_processes.py"),
        ("plain_loop", (), {"RANK": "0", "WORLD_SIZE": "2"}, "start it by python examples/plain_loop.py"),
        ("plain_loop", ("--steps", "0"), {}, "--steps: invalid positive integer"),
        ("plain_loop", ("--weight", "nan"), {}, "--weight: invalid positive number"),
        ("trainer", ("--model", "/nowhere"), {}, "--model /nowhere"),
    ],
)
def test_a_wrong_start_is_one_line(script, arguments, environment, message):
    code, _, error = started(script, *arguments, **environment)
    said = [line for line in error.splitlines() if line.startswith(f"{script}.py: ")]
    assert (code, len(said)) == (2, 1)
    assert message in said[0]
    assert "Traceback" not in error


def test_help_is_there_without_a_launcher():
    code, usage, _ = started("fsdp2", "--help")
    assert code == 0
    assert "--weight" in usage


def test_processes_of_trainers_on_cpus_join(unused_port):
    options = ["--nproc_per_node", "2", "--master_port", str(unused_port)]
    command = [sys.executable, "-m", "torch.distributed.run", *options, str(EXAMPLES / "trainer.py"), "--steps", "12"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    found = subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout
    assert {int(processes) for _, processes, _, _ in LINE.findall(found)} == {2}
    assert len(LINE.findall(found)) == 2  # one process speaks
