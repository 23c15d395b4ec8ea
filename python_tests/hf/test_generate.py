"""`align-lora generate`: greedy answers are transformers' own, conversations remember, and each mistake is one line."""

import io
import os
import pty
import select
import signal
import sys

import pytest
import torch
from hf.runs import run as train
from hf.words import model_folder, write_rows
from processes import python

from align_ext.data.encode import prompt_tokens
from align_ext.evaluation.scored_model import ModelRequest

COMMAND = ("-c", "from align_ext.cli import main; main()")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run of plain text, one of a chat model, and one of a multi_adapter."""
    place = tmp_path_factory.mktemp("runs")
    write_rows(place / "rows.jsonl")
    for name, options in {"plain": {}, "chat": {}, "several": {"architecture": "multi_adapter"}}.items():
        model_folder(place / f"{name}-model", chat=name == "chat")
        train(place, model=str(place / f"{name}-model"), output=str(place / name), steps=4, lr=0.05, **options)
    return place


def expected(folder, prompt, count, task=None):
    """The greedy answer, token by token, without generate()."""
    whole = (folder / "config.json").exists()
    named = {"model": str(folder)} if whole else {"adapter": str(folder / "adapter")}
    model, words = ModelRequest(**named, dtype="float32").load(task)
    ids = prompt_tokens(words, prompt)
    start = len(ids)
    with torch.no_grad():
        for _ in range(count):
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
            if ids[-1] == words.eos_token_id:
                break
    return words.decode(ids[start:], skip_special_tokens=True)


FLAGS = ("--dtype", "float32", "--device", "cpu", "--max-new-tokens", 8)


@pytest.mark.parametrize("kind", ["plain", "chat"])
def test_an_answer_is_the_likeliest_tokens_one_by_one(run, runs, kind):
    text = expected(runs / kind, "after 3 comes", 8)
    for folder in (runs / kind, runs / kind / "adapter"):
        code, out, err = run("generate", folder, "--prompt", "after 3 comes", *FLAGS)
        assert (code, err) == (0, "")
        assert out == f"{text}\n"


def test_a_task_of_a_multi_adapter_answers_and_a_merged_one_the_same(run, runs):
    texts = [expected(runs / "several", "after 3 comes", 8, task) for task in ("next", "threes")]
    assert texts[0] != texts[1]
    for task, text in zip(("next", "threes"), texts, strict=True):
        for merge in ([], ["--merge"]):
            code, out, err = run(
                "generate", runs / "several", "--prompt", "after 3 comes", "--task", task, *merge, *FLAGS
            )
            assert (code, out) == (0, f"{text}\n"), err


def test_a_file_is_answered_line_by_line_with_the_base_beside_it(run, runs, tmp_path):
    (tmp_path / "prompts").write_text("after 3 comes\n\nafter 5 comes\n")
    code, out, err = run("generate", runs / "plain", "--file", tmp_path / "prompts", *FLAGS)
    assert code == 0, err
    texts = [expected(runs / "plain", f"after {i} comes", 8) for i in (3, 5)]
    assert out == "".join(f"> after {i} comes\n{text}\n" for i, text in zip((3, 5), texts, strict=True))
    code, out, err = run("generate", runs / "plain", "--file", tmp_path / "prompts", "--base", *FLAGS)
    assert code == 0, err
    assert out.index("> after 3 comes") < out.index("base") < out.index("adapter") < out.index("> after 5 comes")
    code, base, err = run("generate", runs / "plain-model", "--prompt", "after 3 comes", *FLAGS)
    assert code == 0, err
    assert base.strip() in out
    assert base.strip() != texts[0].strip()


def test_sampling_depends_on_the_seed_alone(run, runs):
    def said(*flags):
        code, out, err = run("generate", runs / "plain", "--prompt", "after 3", "--temperature", 2, *FLAGS, *flags)
        assert code == 0, err
        return out

    assert said("--seed", 1) == said("--seed", 1) != said("--seed", 2)
    assert said("--seed", 1) != f"{expected(runs / 'plain', 'after 3', 8)}\n"


def talk(run, monkeypatch, lines, *arguments):
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    code, out, err = run("generate", *arguments, *FLAGS)
    assert (code, err) == (0, "")
    return out


def test_a_conversation_remembers_until_it_is_reset(run, runs, monkeypatch):
    folder = runs / "chat-model"  # untrained, so that it says many things
    first = expected(folder, "after 3 comes", 8)
    turns = (("user", "after 3 comes"), ("assistant", first.strip()), ("user", "after 3 comes"))
    second = expected(folder, turns, 8)
    assert first.strip()
    assert second != first
    out = talk(run, monkeypatch, "after 3 comes\nafter 3 comes\n/reset\n\nafter 3 comes\n/quit\nnever", folder)
    assert out == f"{first}\n{second}\n{first}\n"


def test_without_a_chat_template_each_line_is_by_itself(run, runs, monkeypatch):
    text = expected(runs / "plain", "after 3 comes", 8)
    assert talk(run, monkeypatch, "after 3 comes\nafter 3 comes", runs / "plain") == 2 * f"{text}\n"


def test_a_conversation_changes_the_task_and_a_mistake_in_it_is_a_line(run, runs, monkeypatch):
    texts = {task: expected(runs / "several", "after 3 comes", 8, task) for task in ("next", "threes")}
    lines = "after 3 comes\n/task threes\nafter 3 comes\n/task x\n/task\n/x\nafter 3 comes"
    out = talk(run, monkeypatch, lines, runs / "several", "--task", "next")
    rest = "--task x: there is no such task (next, threes)\n/task needs a task: next, threes\n"
    rest += f"unknown command '/x': /reset, /task NAME or /quit\n{texts['threes']}\n"
    assert out == f"{texts['next']}\n{texts['threes']}\n{rest}"
    out = talk(run, monkeypatch, "/task next\n" + "x" * 3000, runs / "plain")
    assert out.startswith("/task changes the task of an adapter by task that is not merged, and this is none\n")
    assert "the prompt has 3001 tokens, and the model has room for 2048: write a shorter one" in out


def test_base_and_adapter_talk_in_turns(run, runs, monkeypatch):
    text = expected(runs / "chat", "after 3 comes", 8)
    out = talk(run, monkeypatch, "after 3 comes", runs / "chat", "--base")
    assert out.startswith("base:\n")
    assert out.endswith(f"adapter:\n{text}\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["absent", "--prompt", "a"], "is no adapter folder"),
        (["{runs}/several", "--prompt", "a"], "answers as one of its tasks: name it by --task (next, threes)"),
        (["{runs}/several", "--task", "x"], "--task x: there is no such task (next, threes)"),
        (["{runs}/plain", "--task", "next"], "align_lora is one adapter for all tasks"),
        (["{runs}/plain", "--prompt", "a", "--file", "b"], "--prompt and --file exclude each other"),
        (["{runs}/plain", "--prompt", " "], "--prompt is empty"),
        (["{runs}/plain", "--file", "absent"], "cannot read absent"),
        (["{runs}/plain", "--prompt", "a", "--temperature", "-1"], "temperature must be in 0 .. 100, got -1"),
        (["{runs}/plain", "--prompt", "a", "--max-new-tokens", "0"], "max_new_tokens must be in 1 .. 1000000, got 0"),
        (["{runs}/plain", "--prompt", "a", "--seed", "-1"], "seed must be in 0 .. 2**32-1, got -1"),
        (["{runs}/plain-model", "--prompt", "a", "--base"], "--base and --task go with an adapter"),
        (["{runs}/plain-model", "--prompt", "a", "--merge"], "--merge goes with --adapter"),
        (["{runs}/plain-model", "--prompt", "a", "--model", "b"], "--model names an adapter's base"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line(run, runs, arguments, message):
    code, out, err = run("generate", *(word.format(runs=runs) for word in arguments))
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
    assert message in err


class Terminal:
    """A conversation in a process on a terminal of its own."""

    def __init__(self, *arguments, cwd):
        self.file, there = pty.openpty()
        self.process = python(*COMMAND, *map(str, arguments), cwd=cwd, stdin=there, stdout=there, stderr=there)
        os.close(there)
        self.shown = b""

    def read(self):
        """Reads more of what it shows; False: it has ended."""
        if not select.select([self.file], [], [], 60)[0]:
            self.process.kill()
            raise TimeoutError(self.shown.decode())
        try:
            more = os.read(self.file, 1000)
        except OSError:  # the other side is closed
            return False
        self.shown += more
        return bool(more)

    def write(self, text, prompts):
        """Types a text when a prompt has come so many times."""
        while self.shown.count(b"\n> ") < prompts and self.read():
            pass
        os.write(self.file, text)

    def end(self):
        """Returns what it has shown, and its exit code."""
        while self.read():
            pass
        os.close(self.file)
        return self.shown.decode().replace("\r\n", "\n"), self.process.wait(60)


@pytest.mark.parametrize(
    ("last", "code"),
    [
        (b"\x04", 0),
        pytest.param(b"/quit\n", 0, marks=pytest.mark.slow),
        pytest.param(signal.SIGINT, 0, marks=pytest.mark.slow),
        pytest.param(signal.SIGTERM, 143, marks=pytest.mark.slow),
    ],
    ids=["end of file", "/quit", "Ctrl-C", "SIGTERM"],
)
def test_a_conversation_on_a_terminal_ends_cleanly(run, runs, last, code):  # run: SIGINT is heard
    terminal = Terminal("generate", runs / "chat", *FLAGS, cwd=runs)
    terminal.write(b"after 3 comes\n", prompts=1)
    if isinstance(last, bytes):
        terminal.write(last, prompts=2)
    else:
        terminal.write(b"", prompts=2)
        terminal.process.send_signal(last)
    shown, ended = terminal.end()
    assert ended == code, shown
    assert "/reset forgets the turns before, /quit ends" in shown
    assert "Traceback" not in shown
    assert f"\n{expected(runs / 'chat', 'after 3 comes', 8)}\n" in shown
