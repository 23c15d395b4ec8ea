"""`align-lora train` and `eval` under torchrun: the results of one process, resumed by any number of processes."""

import json
import signal
import socket

import pytest
from hf.failing_process import fail
from hf.words import model_folder, write_rows
from processes import python, spawn
from safetensors.torch import load_file

from align_ext.system.processes import joined

STEPS = ("--steps", 200, "--save-steps", 150)
TINY = {"--device": "cpu", "--dtype": "float32", "--lora-dropout": 0, "--batch-size": 12, "--eval-examples": 4,
        "--log-steps": 1, "--lr": 1e-3}  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    model_folder(folder / "model")
    write_rows(folder / "rows.jsonl")
    return folder


def start(place, launcher, *arguments):
    """Starts the command by a launcher, or in so many processes, by torchrun if they are several."""
    if isinstance(launcher, int):
        several = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", launcher)
        launcher = several if launcher > 1 else ()
    return python(*launcher, "-m", "align_ext.cli", *arguments, cwd=place)


def train(place, launcher, output, *more):
    given = [word for pair in TINY.items() for word in pair]
    return start(
        place, launcher, "train", "--model", "model", "--data", "rows.jsonl", "--output", output, *given, *more
    )


def said(process, code=0):
    text, _ = process.communicate(timeout=300)
    assert process.returncode == code, text
    return text


def results(folder):
    return json.loads((folder / "results.json").read_text())


def assert_equal_runs(first, second):
    one, other = results(first), results(second)
    assert len(one["losses"]) == len(other["losses"])
    for mine, theirs in zip(one["losses"], other["losses"], strict=True):
        names = {name for name in mine if "loss" in name or name in ("grad_norm", "aligned_pairs")}
        assert {"lm_loss", "align_loss", "loss/next", "grad_norm"} <= names <= theirs.keys()
        for name in names:
            assert mine[name] == pytest.approx(theirs[name], rel=1e-4, abs=1e-5), name
    tensors, others = (load_file(folder / "adapter/adapter_model.safetensors") for folder in (first, second))
    assert tensors.keys() == others.keys()
    for name, tensor in tensors.items():
        assert (tensor - others[name]).abs().max() < 1e-4 * tensor.abs().max(), name
    for when in ("before", "after"):
        for task, score in one[when]["tasks"].items():
            assert score["loss"] == pytest.approx(other[when]["tasks"][task]["loss"], rel=1e-5)
            assert score["score"] == other[when]["tasks"][task]["score"]
        assert one[when]["align"] == pytest.approx(other[when]["align"], rel=1e-4)


@pytest.mark.slow
def test_three_processes_give_the_results_of_one_and_one_of_them_reports(place):
    alone, text = train(place, 1, "alone", "--steps", 5), said(train(place, 3, "three", "--steps", 5))
    said(alone)
    assert_equal_runs(place / "alone", place / "three")
    assert [text.count(f"step {n}/5  loss") for n in range(1, 6)] == [1] * 5
    assert text.count("loaded again: same logits") == text.count("wrote three") == 1
    assert sorted(p.name for p in (place / "three").iterdir()) == sorted(p.name for p in (place / "alone").iterdir())


TORCHRUN = "torch.distributed.run --nnodes 2 --nproc_per_node 1"
ACCELERATE = "accelerate.commands.launch --multi_gpu --num_processes 2"
MACHINES = {
    "torchrun, by rank": TORCHRUN + " --node_rank {rank} --master_addr 127.0.0.1 --master_port {port}",
    "torchrun, by rendezvous": TORCHRUN + " --rdzv_backend c10d --rdzv_endpoint 127.0.0.1:{port} --rdzv_id 1",
    "accelerate": ACCELERATE + " --num_machines 2 --machine_rank {rank} --main_process_ip 127.0.0.1"
    " --main_process_port {port}",
}


@pytest.mark.slow
@pytest.mark.parametrize("way", MACHINES)
def test_two_launchers_as_on_two_machines_give_the_results_of_one_process(place, way):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    output = way.replace(", ", "-").replace(" ", "-")
    launchers = [("-m", *MACHINES[way].format(rank=rank, port=port).split()) for rank in (0, 1)]
    machines = [train(place, launcher, output, "--steps", 5) for launcher in launchers]
    said(train(place, 1, f"alone-{output}", "--steps", 5))
    texts = [said(machine) for machine in machines]
    assert sum(text.count(f"wrote {output}") for text in texts) == 1
    assert_equal_runs(place / f"alone-{output}", place / output)


@pytest.mark.slow
def test_accelerate_starts_the_processes_of_one_machine(place):
    text = said(train(place, ("-m", *ACCELERATE.split()), "accelerated", "--steps", 5))
    said(train(place, 2, "torchrun", "--steps", 5))
    assert text.count("wrote accelerated") == 1
    found = [results(place / folder)["losses"] for folder in ("accelerated", "torchrun")]
    for one, other in zip(*found, strict=True):
        assert one | {"step_seconds": 0} == other | {"step_seconds": 0}  # to the bit, as one process's are not


def train_until_ended(place, output, *more):
    """Two processes that SIGTERM ends, which write a checkpoint."""
    two = train(place, 2, output, *more)
    text = ""
    while "step 1/" not in text:  # both are in training
        text += (line := two.stdout.readline())
        assert line, text
    two.send_signal(signal.SIGTERM)
    text += said(two, 1)  # torchrun's own code
    assert text.count("is kept: --resume goes on from it") == text.count("ended by SIGTERM") == 1
    (checkpoint,) = (place / output / "checkpoints").glob("checkpoint-*")
    assert 0 < int(checkpoint.name.rpartition("-")[2]) < 200


@pytest.mark.slow  # test_whole_job has one that is killed
def test_a_run_of_two_processes_that_is_ended_goes_on_in_one_and_is_the_unbroken_run(place):
    train_until_ended(place, "ended", *STEPS)
    assert "going on from" in said(train(place, 1, "ended", *STEPS, "--resume"))
    said(train(place, 1, "unbroken", *STEPS))
    assert_equal_runs(place / "unbroken", place / "ended")


@pytest.mark.parametrize("failing", [0, 1])
def test_the_process_that_alone_fails_says_why(tmp_path, unused_port, failing):
    spawn(fail, unused_port, str(tmp_path), failing)
    said = [(tmp_path / str(rank)).read_text() for rank in range(2)]
    assert said[failing] == f"2 align-lora: error: only process {failing} sees it\n"
    assert said[1 - failing] == "2 "


def test_eval_divides_the_rows_and_gives_the_same_ones(place):
    found = []
    for count in (1, 2):
        file = place / f"scores-{count}.json"
        text = said(start(place, count, "eval", "--model", "model", "--data", "rows.jsonl", "--device", "cpu",
                          "--dtype", "float32", "--examples", 7, "--json", file))  # fmt: skip
        assert text.count("test splits") == 1
        found.append(json.loads(file.read_text())["rows"])
    assert [row["id"] for row in found[0]] == [row["id"] for row in found[1]]
    for one, other in zip(*found, strict=True):
        assert one["nll"] == pytest.approx(other["nll"], rel=1e-5)
        assert one["greedy"] == other["greedy"]


@pytest.mark.slow
def test_the_data_are_shown_once_for_a_run_of_all_processes(place):
    options = ("--model", "model", "--data", "rows.jsonl", "--per-device-train-batch-size", 3, "--json", "data.json")
    text = said(start(place, 2, "data", *options))
    assert text.count("the first example of 'next'") == 1
    assert json.loads((place / "data.json").read_text())["options"]["batch_size"] == 6


@pytest.mark.parametrize("command", ["merge", "export", "generate", "inspect", "report"])
def test_what_one_process_does_says_so_to_several(run, monkeypatch, command):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    output = ("--output", "new") if command in ("merge", "export") else ()
    said = f"align-lora: error: {command} is the work of one process: start it without torchrun\n"
    assert run(command, "out/adapter", *output) == (2, "", said)


@pytest.mark.slow
def test_a_mistake_is_one_line_of_one_process(place):
    text = said(train(place, 2, "mistaken", "--data", "none.jsonl"), 1)
    assert text.count("align-lora: error:") == text.count("there is no data file or folder 'none.jsonl'") == 1
    assert not (place / "mistaken").exists()


def test_a_process_whose_launcher_has_started_no_others_says_so(monkeypatch):
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "none"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="the 2 processes do not find one another"), joined("cpu"):
        pass
