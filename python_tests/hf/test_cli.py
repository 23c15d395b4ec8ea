"""The command line: mistakes are one line and exit code 2, files and flags combine, and train and doctor run."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import torch
import yaml
from hf.words import model_folder, write_rows
from processes import python
from safetensors.torch import load_file

from align_ext import __version__, cli
from align_ext.diagnostics import doctor
from align_ext.system import ending, processes
from align_ext.training.options import ADAPTERS, GROUPS, TrainOptions, known_options

RUN = """
steps: 4
save-steps: 2
eval-steps: 2
eval-examples: 2
batch-size: 6
per-task: 3
accumulation: 2
align-accumulation: exact
align-schedule: cosine
align-warmup: 0.25
mixing: temperature
mixing-temperature: 1.5
dtype: float32
device: cpu
"""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--bathc-size", 3], "--bathc-size"),
        (["train", "--steps"], "--steps"),
        (["train", "--steps", "many"], "--steps"),
        (["train", "--steps", -3], "steps must be a positive integer, got -3"),
        (["train", "--align", "mmmd"], "unknown align 'mmmd'; did you mean 'mmd'"),
        (["train", "--data", "absent.jsonl"], "no data file or folder 'absent.jsonl': name one, or a dataset of"),
        (["train", "--model", "/absent"], "no model folder '/absent'"),
        (["train", "--tasks", "chain_sun"], "'chain_sum'"),
        (["train", "--config", "absent.yaml"], "cannot read absent.yaml: No such file"),
        (["tarin"], "tarin"),
    ],
)
def test_a_mistake_is_one_line_on_stderr_exit_code_2_and_nothing_written(run, arguments, message, tmp_path):
    code, out, err = run(*arguments)
    assert code == 2
    assert out == ""
    assert err.startswith("align-lora: error: ")
    assert err.count("\n") == 1
    assert message in err
    assert list((tmp_path / "work").iterdir()) == []


def test_an_unknown_key_of_a_file_is_named_with_the_nearest(run, tmp_path):
    (tmp_path / "x.yaml").write_text("step: 3\n")
    code, _, err = run("train", "--config", tmp_path / "x.yaml")
    assert code == 2
    assert "'step'; did you mean 'steps'" in err


def test_flags_override_the_file_and_the_printed_configuration_is_such_a_file(run, tmp_path):
    (tmp_path / "x.yaml").write_text("steps: 3\nbatch-size: 6\nlr: 1e-3\n")
    code, out, _ = run("train", "--config", tmp_path / "x.yaml", "--batch-size", 4, "--tasks", "a,b", "--print-config")
    assert code == 0
    options = TrainOptions.from_mapping(yaml.safe_load(out))
    assert options == TrainOptions(steps=3, batch_size=4, lr=1e-3, tasks=("a", "b"))


def test_the_options_of_the_adapters_are_flags_and_print_as_a_file_that_means_the_same(run, tmp_path):
    flags = ["--architecture", "mtlora", "--num-heads", 3, "--target-blocks", "mlp", "--spectral", "none"]
    flags += ["--align", "mmd", "--mmd-bandwidths", "0.5,2", "--use-rslora", "--balance-weight", 0.5]
    code, out, err = run("train", *flags, "--print-config")
    assert code == 0, err
    config = TrainOptions.from_mapping(yaml.safe_load(out)).adapter_config(2)
    assert (config.architecture, config.num_heads, config.target_blocks) == ("mtlora", 3, ("mlp",))
    assert (config.spectral, config.align, config.mmd_bandwidths) == (None, "mmd", (0.5, 2.0))
    assert (config.use_rslora, config.balance_weight) == (True, 0.5)
    (tmp_path / "x.yaml").write_text(out)
    assert run("train", "--config", tmp_path / "x.yaml", "--print-config")[1] == out


def test_every_option_is_a_flag_with_its_default_in_the_help(run):
    code, out, _ = run("train", "--help")
    assert code == 0
    text = " ".join(out.split())
    for name, value in TrainOptions().to_dict().items():
        assert re.search(rf"--{name.replace('_', '-')}[ ,]", text)
        if isinstance(value, int | float) and value:
            assert f"[{value}]" in text, name


@pytest.mark.parametrize("command", ["train", "data"])
def test_the_help_shows_each_option_in_its_group(run, command):
    _, out, _ = run(command, "--help")
    sections = dict(re.findall(r"^(\w[^\n]*):\n((?:  [^\n]*\n|\n)+)", out, re.MULTILINE))
    assert list(sections) == ["Options", *GROUPS, ADAPTERS]
    for name, option in known_options().items():
        flag = re.compile(rf"^  --{name.replace('_', '-')}(?:[, /]|$)", re.MULTILINE)
        found = [group for group, text in sections.items() if flag.search(text)]
        assert found == [option.group], name


def test_train_runs_a_local_model_on_local_rows(run, tmp_path):
    model_folder(tmp_path / "model", chat=True)
    write_rows(tmp_path / "rows.jsonl")
    flags = ["--steps", 2, "--eval-examples", 2, "--dtype", "float32", "--output", "out", "--device", "cpu"]
    flags += ["--num-tasks", 3]  # one more than there are
    code, out, err = run("train", "--model", tmp_path / "model", "--data", tmp_path / "rows.jsonl", *flags)
    assert code == 0, err
    results = json.loads((tmp_path / "work/out/results.json").read_text())
    assert set(results["after"]["tasks"]) == {"next", "threes"}
    for expected in ("step 1/2", "next", "threes", "alignment loss", "stock PEFT: same logits", "wrote out"):
        assert expected in out


def test_a_file_covers_the_whole_run_and_an_interrupted_one_is_resumed_to_the_bit(run, tmp_path, monkeypatch):
    from align_ext.training import fit

    class Stopped(fit.ShowProgress):
        def on_step_end(self, args, state, control, **_):
            if state.global_step == 3:
                os.kill(os.getpid(), signal.SIGINT)

    model_folder(tmp_path / "model")
    write_rows(tmp_path / "rows.jsonl")
    content = f"model: {tmp_path / 'model'}\ndata: {tmp_path / 'rows.jsonl'}\n" + RUN
    (tmp_path / "x.yaml").write_text(content)
    assert run("train", "--config", tmp_path / "x.yaml", "--output", "whole")[0] == 0
    with monkeypatch.context() as patch:
        patch.setattr(fit, "ShowProgress", Stopped)
        code, out, err = run("train", "--config", tmp_path / "x.yaml", "--output", "out")
    assert (code, err) == (130, "align-lora: interrupted\n")
    assert "out/checkpoints/checkpoint-3 is kept: --resume goes on from it" in out
    code, out, err = run("train", "--config", tmp_path / "x.yaml", "--output", "out", "--resume")
    assert code == 0, err
    files = [tmp_path / "work" / name / "adapter/adapter_model.safetensors" for name in ("whole", "out")]
    whole, resumed = map(load_file, files)  # of the files the headers have no order
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in whole.items())
    code, _, err = run("train", "--config", tmp_path / "x.yaml", "--output", "out", "--resume")
    assert code == 2
    assert "is complete: there is nothing to resume" in err


def test_a_failed_check_is_exit_code_1(run, tmp_path, monkeypatch):
    from align_ext.training import verify

    model_folder(tmp_path / "model")
    write_rows(tmp_path / "rows.jsonl")
    monkeypatch.setattr(verify, "rounding_difference", lambda *_: -1.0)
    flags = ["--steps", 1, "--eval-examples", 2, "--output", "out", "--device", "cpu"]
    code, out, _ = run("train", "--model", tmp_path / "model", "--data", tmp_path / "rows.jsonl", *flags)
    assert code == 1
    assert "OTHER LOGITS" in out
    assert (tmp_path / "work/out/adapter").is_dir()


@pytest.mark.parametrize(
    ("sent", "said"), [("SIGINT", "interrupted"), ("SIGTERM", "ended by SIGTERM"), ("SIGHUP", "ended by SIGHUP")]
)
def test_ctrl_c_and_an_ended_job_have_a_shells_exit_code_and_no_traceback(run, sent, said, monkeypatch):
    from align_ext.training import recipe

    def interrupted(*_):
        os.kill(os.getpid(), signal.Signals[sent])
        time.sleep(5)

    monkeypatch.setattr(recipe, "prepare", interrupted)
    # The tests may have been started to ignore one of them (nohup).
    before = {number: signal.signal(number, signal.SIG_DFL) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        code, _, err = run("train")
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert code == 128 + signal.Signals[sent]
    assert err == f"align-lora: {said}\n"


def test_a_later_signal_does_not_wait_for_the_step(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(ending.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(ending, "_received", [])  # other tests of this process received nothing
    monkeypatch.setenv("RANK", "1")  # which says nothing
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        ending.listen()
        with ending.deferred() as received:
            os.kill(os.getpid(), signal.SIGINT)
            now[0] += 0.9
            os.kill(os.getpid(), signal.SIGINT)
            assert received() == signal.SIGINT
            now[0] += 0.2
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
        for number in (signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)


def test_an_error_of_our_own_keeps_its_traceback(run, tmp_path, monkeypatch):
    from align_ext.training import recipe

    def broken(*_):
        raise RuntimeError("a bug")

    monkeypatch.setattr(recipe, "prepare", broken)
    monkeypatch.setattr(sys, "argv", ["align-lora", "train"])
    with pytest.raises(RuntimeError, match="a bug"):
        cli.main()


@pytest.mark.parametrize("healthy", [True, False])
def test_the_doctors_verdict_is_the_exit_code(run, healthy, monkeypatch):
    monkeypatch.setattr(doctor, "run", lambda: healthy)
    assert run("doctor")[0] == (0 if healthy else 1)


@pytest.mark.parametrize("count", [1, 2])
def test_a_signal_that_another_process_followed_sooner_is_what_ends_this_one(monkeypatch, capsys, count):
    def lose_the_other(**_):
        with ending.deferred():
            signal.raise_signal(signal.SIGTERM)
        raise RuntimeError("Connection closed by peer")

    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    app = sys.modules["align_ext.cli.app"]  # the package's name app is what is in it
    monkeypatch.setattr(app, "app", lose_the_other)
    monkeypatch.setattr(processes, "started", lambda: count)
    try:
        if count == 1:  # there is no other
            with pytest.raises(RuntimeError, match="Connection closed"):
                app._run()
        else:
            assert app._run() == 128 + signal.SIGTERM
            assert capsys.readouterr().err == "align-lora: ended by SIGTERM\n"
    finally:
        ending._received.clear()
        for number, handler in handlers.items():
            signal.signal(number, handler)


def test_help_needs_no_transformers(tmp_path):
    code = (
        "import sys; sys.argv = ['align-lora', '--version']\n"
        "from align_ext.cli import main\n"
        "try: main()\n"
        "except SystemExit as end: assert end.code == 0\n"
        "assert not {'torch._dynamo', 'transformers', 'peft', 'datasets', 'reasoning_gym'} & set(sys.modules)"
    )
    process = python("-c", code, cwd=tmp_path)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 0, said
    assert said == f"align-lora {__version__}\n"


COMMAND = ("-c", "from align_ext.cli import main; main()")


def lost(arguments, kind, cwd):
    """The exit code and stderr of a command whose output is a pipe that nobody reads, or a disk that is full."""
    if kind == "pipe":
        reader, output = os.pipe()
        os.close(reader)
    else:
        output = os.open("/dev/full", os.O_WRONLY)
    process = python(*COMMAND, *arguments, cwd=cwd, stdout=output, stderr=subprocess.PIPE)
    os.close(output)
    err = process.communicate(timeout=300)[1]
    return process.returncode, err


@pytest.mark.parametrize("arguments", [pytest.param(["--help"], marks=pytest.mark.slow), ["train", "--print-config"]])
def test_a_command_whose_output_is_lost_ends_without_a_traceback(arguments, tmp_path):
    assert lost(arguments, "pipe", tmp_path) == (128 + signal.SIGPIPE, "")
    code, err = lost(arguments, "full", tmp_path)
    assert (code, err) == (2, "align-lora: standard output cannot be written: No space left on device\n")


@pytest.mark.slow
def test_a_run_outlives_its_log(tmp_path):
    model_folder(tmp_path / "model")
    write_rows(tmp_path / "rows.jsonl")
    flags = ["--model", tmp_path / "model", "--data", tmp_path / "rows.jsonl", "--dtype", "float32"]
    short = [*flags, "--steps", 1, "--eval-examples", 2]
    code, err = lost(["train", *short, "--output", "full"], "full", tmp_path)
    assert (code, err.splitlines()[-1]) == (0, "align-lora: standard output cannot be written: No space left on device")
    process = python(*COMMAND, "train", *short, "--output", "cut", cwd=tmp_path, stderr=subprocess.PIPE)
    process.stdout.readline()
    process.stdout.close()
    err = process.stderr.read()
    assert process.wait(120) == 0
    assert "Error" not in err
    for run in ("full", "cut"):
        assert (tmp_path / run / "adapter/adapter_model.safetensors").is_file()
        assert (tmp_path / run / "results.json").is_file()


@pytest.mark.parametrize(("number", "said"), [(signal.SIGINT, "interrupted"), (signal.SIGHUP, "ended by SIGHUP")])
@pytest.mark.parametrize("delay", [0.2, 1.5])
def test_a_signal_while_the_package_is_imported_is_one_line(tmp_path, number, said, delay):
    (tmp_path / "align-lora").write_text(
        "import signal\nfor n in (signal.SIGINT, signal.SIGHUP): signal.signal(n, signal.default_int_handler)\n"
        "print(flush=True)\nfrom align_ext.cli import main\nmain()"
    )
    process = python("align-lora", "train", "--model", "/absent", cwd=tmp_path)
    process.stdout.readline()
    time.sleep(delay)
    process.send_signal(number)
    assert process.communicate(timeout=120)[0] == f"align-lora: {said}\n"
    assert process.returncode == 128 + number
