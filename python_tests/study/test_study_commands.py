"""The commands of a study: what they refuse in one line that names the cure, what their tables show, and their ends."""

import errno
import io
import os
import re
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import yaml
from hf.words import model_folder, write_rows
from processes import python
from rich.console import Console
from rich.table import Table

from align_ext.cli.app import UserError, app
from align_ext.report import page
from align_ext.study import run as run_module
from align_ext.study.design import read_study
from align_ext.study.plan import store_plan
from align_ext.study.run import CellStatus
from align_ext.study.show import status_table
from align_ext.system import writing
from align_ext.system.terminal import print_table


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("study")
    model_folder(place / "model")
    write_rows(place / "rows.jsonl")
    return place


def new_study(place, folder, **changed):
    train = {"model": str(place / "model"), "data": str(place / "rows.jsonl"), "steps": 4, "batch_size": 4}
    content = {
        "train": train | {"train_examples": 12, "tasks": ["next", "threes"]},
        "arms": {"lora": {"architecture": "lora"}, "small": {"architecture": "lora", "r": 2}},
        "seeds": [0], "score": {"test": 4, "mechanism": "none"},
    }  # fmt: skip
    for key, value in changed.items():
        content[key] = content[key] | value
    folder.mkdir(exist_ok=True)
    (folder / "study.yaml").write_text(yaml.safe_dump(content))
    return folder


def command(*arguments):
    return app(["study", *map(str, arguments)], standalone_mode=False)


def run(folder, **options):
    said = Console(file=io.StringIO(), width=200)
    try:
        run_module.run(folder, read_study(folder), said, **options)
    except KeyboardInterrupt:
        print("interrupted", file=said.file)
    return said.file.getvalue()


@pytest.mark.parametrize("name", ["plan", "run", "status", "report"])
def test_a_folder_that_is_not_there_is_one_message_of_all_commands(name, tmp_path):
    with pytest.raises(
        UserError, match=r"^there is no folder .*absent: `align-lora study new .*absent` begins a study$"
    ):
        command(name, tmp_path / "absent")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file is a file: name the folder of a study"):
        command(name, tmp_path / "file")


@pytest.mark.parametrize("option", ["jobs", "nproc"])
def test_a_number_of_processes_is_named_with_its_value(option, place, tmp_path):
    with pytest.raises(UserError, match=f"^{option} must be a positive integer, got 0$"):
        command("run", new_study(place, tmp_path / "s"), f"--{option}", 0)


def test_a_study_is_written_like_a_preset_or_another_study(place, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = new_study(place, tmp_path / "s")
    command("new", "other", "--like", folder)
    assert (tmp_path / "other/study.yaml").read_bytes() == (folder / "study.yaml").read_bytes()
    with pytest.raises(UserError, match=r"unknown preset 'quik'; did you mean 'quick'.* no such folder of a study"):
        command("new", "third", "--like", "quik")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"empty holds no study\.yaml: name a preset, or the folder of a study"):
        command("new", "third", "--like", "empty")
    assert not (tmp_path / "third").exists()


def test_a_folder_that_cannot_be_written_to_is_known_before_the_first_cell(place, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"the folder .*file/s' cannot be made: file is a file: name another one"):
        command("new", tmp_path / "file/s")

    def refuse(**options):
        raise OSError(errno.EROFS, "Read-only file system", str(options["dir"]))

    monkeypatch.setattr(writing.tempfile, "TemporaryFile", refuse)
    folder, why = new_study(place, tmp_path / "s"), r"\(Read-only file system\): "
    for name in ("plan", "run"):
        with pytest.raises(UserError, match=rf"^cannot write to the folder .*/s {why}make it writable, or copy the"):
            command(name, folder)
    with pytest.raises(UserError, match=rf"^cannot write to the folder .*/t {why}name another one$"):
        command("new", tmp_path / "t")


def test_wrong_yaml_is_named_once(tmp_path):
    (tmp_path / "study.yaml").write_text("arms: [")
    with pytest.raises(ValueError, match="is not YAML") as caught:
        read_study(tmp_path)
    assert str(caught.value).count("study.yaml") == 1


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"score": {"test": 6}, "train": {"train_examples": 5}},
            "rows that are used: next train 12 -> 5, next test 4 -> 6, threes train 12 -> 5, threes test 4 -> 6; "
            "score.test, score.dev, score.unseen, train.data, train.tasks, train.train_examples, train.seq_len and",
        ),
        ({"train": {"tasks": ["next"]}}, "threes train 12 -> 0, threes test 4 -> 0"),
        ({"train": {"data": "other.jsonl"}}, "(as many rows, but other ones; score.test"),
    ],
)
def test_rows_that_changed_are_named_with_what_decides_on_them(changed, message, place, tmp_path, monkeypatch):
    monkeypatch.chdir(place)
    (place / "other.jsonl").write_text((place / "rows.jsonl").read_text().replace("comes", "stands"))
    folder = new_study(place, tmp_path / "s")
    store_plan(folder, read_study(folder))
    (folder / "cells/begun").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"data of the study in .* has changed since its first cell") as caught:
        run(new_study(place, folder, **changed))
    assert message in str(caught.value)
    assert str(caught.value).endswith(f"`align-lora study new {folder}-2 --like {folder}`")


def test_the_tables_of_a_plan_are_whole_in_a_pipe(place, tmp_path, capsys):
    command("plan", new_study(place, tmp_path / "s", train={"batch_size": 8}))
    said = capsys.readouterr().out
    assert all(word in said for word in ("architecture", "adapter FLOPs", "off budget", "parameters", "small"))
    assert "…" not in said


@pytest.mark.parametrize("terminal", [False, True])
def test_a_table_folds_on_a_narrow_terminal_and_is_as_wide_as_it_must_be_elsewhere(terminal):
    table = Table("architecture", "parameters")
    table.add_row("align_lora_of_a_long_name", "1,719,300")
    console = Console(file=io.StringIO(), width=20, force_terminal=terminal, color_system=None)
    print_table(console, table)
    lines = console.file.getvalue().splitlines()
    cells = [[cell.strip() for cell in re.split("[│┃]", line)[1:-1]] for line in lines]
    rows = [row for row in cells if row]
    columns = ["".join(column) for column in zip(*rows, strict=True)]
    assert columns == ["architecturealign_lora_of_a_long_name", "parameters1,719,300"]
    assert (len(rows) > 2, max(map(len, lines)) <= 20, console.width) == (terminal, terminal, 20)


def test_every_column_of_the_status_has_a_heading():
    assert all(column.header for column in status_table([CellStatus("x", "failed", 0, "why")]).columns)


def test_workers_write_no_report_and_end_with_the_command(place, tmp_path, monkeypatch):
    started = []

    def start(command, **options):
        started.append((command, options["preexec_fn"]))
        return SimpleNamespace(wait=lambda: 0)

    monkeypatch.setattr(run_module.subprocess, "Popen", start)
    run(new_study(place, tmp_path / "s"), jobs=2)
    assert len(started) == 2
    assert all("--no-report" in command and end is not None for command, end in started)


@pytest.mark.parametrize(("flags", "reports"), [([], 1), (["--no-report"], 0), (["--shard", "1/2"], 1)])
def test_the_end_of_a_run_is_left_out_where_it_is_not_wanted(flags, reports, place, tmp_path, monkeypatch, capsys):
    found, written = [CellStatus("a", "done"), CellStatus("b", "failed", 0, "why")], []
    monkeypatch.setattr(run_module, "run", lambda *args, **options: found)
    monkeypatch.setattr(page, "write_report", written.append)
    code = command("run", new_study(place, tmp_path / "s"), *flags)
    assert (code, len(written)) == (1, reports)
    assert capsys.readouterr().out.count("b failed: why") == reports


def test_an_interrupted_cell_says_how_it_goes_on(place, tmp_path, monkeypatch):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(run_module, "run_base", interrupted)
    said = run(new_study(place, tmp_path / "s"))
    assert said.splitlines()[-2:] == ["  interrupted: the same command goes on with this cell", "interrupted"]


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel of Linux does it")
def test_a_worker_ends_with_a_parent_that_is_killed(tmp_path):
    program = (
        "import subprocess, sys; from align_ext.system.ending import end_with_parent\n"
        "worker = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'], preexec_fn=end_with_parent)\n"
        "print(worker.pid, flush=True); worker.wait()"
    )
    parent = python("-c", program, cwd=tmp_path, stderr=subprocess.DEVNULL)
    worker = int(parent.stdout.readline())
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    end = time.monotonic() + 20
    while is_running(worker) and time.monotonic() < end:
        time.sleep(0.05)
    assert not is_running(worker)


def test_a_signal_after_the_command_is_no_traceback(tmp_path):
    program = (
        "import atexit, os, signal, sys; from align_ext.cli import main\n"
        "atexit.register(lambda: os.kill(os.getpid(), signal.SIGTERM)); sys.argv[1:] = ['--version']; main()"
    )
    ended = python("-c", program, cwd=tmp_path)
    said, _ = ended.communicate(timeout=120)
    assert (ended.returncode, said.count("Traceback")) == (-signal.SIGTERM, 0)


def is_running(pid):
    try:
        os.kill(pid, 0)
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except (ProcessLookupError, FileNotFoundError):
        return False
