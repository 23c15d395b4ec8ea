"""Names that look like markup, codes of emoji or nothing a terminal has are shown by every command as they are."""

import json

import pytest
from hf.test_cli_adapters import adapter_folder
from hf.words import llama, model_folder
from processes import python
from rich.progress import Progress
from torch import nn

from align_ext import replace_linear_with_align_lora, save_adapter
from align_ext.diagnostics.grad_check import GradReport, print_reports
from align_ext.system.terminal import plain_console, print_line, progress_bars, show_status

NAMES = ["[/bold]", ":bomb:[red]"]


def rows(path, names=NAMES):
    lines = [{"task": n, "prompt": f"what is {i}?", "answer": str(i % 3), "split": s}
             for n in names for i in range(6) for s in ("train", "test")]  # fmt: skip
    path.write_text("\n".join(json.dumps(line) for line in lines))
    return path


@pytest.fixture(params=["pipe", "terminal"])
def console(request, monkeypatch):
    """Where the output goes."""
    monkeypatch.setenv("COLUMNS", "200")
    if request.param == "terminal":
        monkeypatch.setenv("FORCE_COLOR", "1")
        monkeypatch.setenv("TERM", "xterm")


@pytest.mark.usefixtures("console")
@pytest.mark.parametrize("command", ["inspect", "merge", "export", "eval", "train"])
def test_every_command_shows_names_as_they_are(command, run, tmp_path):
    base, adapter = model_folder(tmp_path / "[base]"), tmp_path / "[x]adapter:bomb:"
    adapter_folder(adapter, "lora" if command in ("inspect", "eval") else "multi_adapter", () if command == "merge" else
                   ["[bold]", ":bomb:[red]"])  # fmt: skip
    arguments = {
        "inspect": [adapter],
        "merge": [adapter, "--model", base, "--output", "[/b]", "--task", 1],
        "export": [adapter, "--model", base, "--output", "[/b]:x:", "--verify"],
        "eval": ["--adapter", adapter, "--model", base, "--data", rows(tmp_path / "[r].jsonl"), "--examples", 2],
        "train": ["--model", base, "--data", rows(tmp_path / "[r].jsonl"), "--steps", 1, "--batch-size", 4, "--output",
                  tmp_path / "[/o]", "--dtype", "float32", "--eval-examples", 2],
    }[command]  # fmt: skip
    code, out, err = run(command, *arguments)
    assert code == 0, err
    shown = "".join(out.split())
    if command in ("eval", "train"):
        assert all(name in shown for name in NAMES), out
    if command == "inspect":
        assert "[bold],:bomb:[red]" in shown
    if command == "export":
        assert "[/b]:x:" in shown
        assert "stockPEFTof:bomb:[red]:samelogits" in shown


@pytest.mark.usefixtures("console")
def test_a_mistake_shows_the_name_as_it_is(run, tmp_path):
    adapter_folder(tmp_path / "a", "multi_adapter", ["[bold]", ":bomb:"])
    code, _, err = run("export", tmp_path / "a", "--output", "o", "--task", "[/bold]")
    assert code == 2
    assert "--task [/bold]: there is no such task ([bold], :bomb:)" in err


@pytest.mark.usefixtures("console")
def test_layers_may_be_called_like_markup(run, tmp_path):
    model = nn.Sequential()
    for name in ("[/bold]", ":bomb:", "[red]"):
        model.add_module(name, nn.Linear(4, 4))
    replace_linear_with_align_lora(model, architecture="lora", r=2, target_modules=["[/bold]", ":bomb:", "[red]"])
    save_adapter(model, tmp_path / "a")
    code, out, err = run("inspect", tmp_path / "a")
    assert code == 0, err
    assert all(name in out for name in ("[/bold]", ":bomb:", "[red]"))


@pytest.mark.usefixtures("console")
def test_reports_bars_and_lines_show_names_as_they_are(capsys):
    console = plain_console()
    print_reports({"[/bold]:x:": GradReport([], {"[/a]": 1.0})}, console)
    print_line(console, "[/bold]:bomb:")
    with show_status(console, "[/writing]:bomb:"):
        pass
    with progress_bars(console) as bars:
        assert isinstance(bars, Progress)
        bars.update(bars.add_task("[/scoring]:bomb:", total=2), advance=1)
        bars.refresh()
    out = capsys.readouterr().out
    assert "[/bold]:x:" in out
    assert "[/bold]:bomb:" in out
    if console.is_terminal:
        assert "[/writing]" in out
        assert "[/scoring]" in out


def test_letters_that_the_terminal_has_not_are_escaped(tmp_path):
    save_adapter(replace_linear_with_align_lora(llama(), align=None), tmp_path / "a", ["ünder", "数学"])
    terminal = {"PYTHONIOENCODING": "ascii", "COLUMNS": "200"}
    code = "import sys; sys.argv = ['align-lora', 'inspect', sys.argv[1]]; from align_ext.cli import main; main()"
    process = python("-c", code, tmp_path / "a", cwd=tmp_path, env=terminal)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 0, said
    assert r"\xfcnder" in said
