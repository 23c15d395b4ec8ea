"""One thread for tiny models; the command line in a process of its own folder, for the tests of every command."""

import signal
import sys

import huggingface_hub
import pytest
import torch
from hf.words import model_folder, write_rows

from align_ext import cli


@pytest.fixture(autouse=True)
def one_thread():
    """Two threads would wait for each other longer than they compute."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Runs align-lora in an empty folder without a hub; returns (exit code, stdout, stderr)."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background job ignores

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["align-lora", *map(str, arguments)])
        capsys.readouterr()  # what the test printed to prepare it, such as transformers' bars, is not the command's
        with pytest.raises(SystemExit) as ended:
            cli.main()
        captured = capsys.readouterr()
        return ended.value.code, captured.out, captured.err

    return call


@pytest.fixture
def place(tmp_path, monkeypatch):
    model_folder(tmp_path / "model")
    write_rows(tmp_path / "rows.jsonl")
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path
