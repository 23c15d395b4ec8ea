"""A run with checkpoints that is killed with SIGKILL at one of its file events, and what becomes of it when it goes on.

python -m hf.killed FOLDER [EVENT ...] tries these events of the run, or with none all of them, each in a process of its
own, and prints the number of events and what went wrong. An event is a call that opens a file for writing, makes,
renames, swaps, locks, syncs or removes one; the process is killed right before it. Of tensors' files, which
are written outside Python, half is there when it is killed.
"""

import contextlib
import io
import os
import signal
import sys
from pathlib import Path

AUDITED = {"os.rename", "os.mkdir", "os.remove", "os.rmdir", "fcntl.flock", "os.truncate", "shutil.rmtree"}
OPTIONS = {
    "steps": 3, "save_steps": 1, "lr": 2e-2, "eval_examples": 1, "train_examples": 6, "batch_size": 4, "seed": 3,
    "dtype": "float32", "device": "cpu", "align_accumulation": "queue",
}  # fmt: skip


class Killer:
    """Counts the file events below a folder, and kills the process at one."""

    def __init__(self, folder, at):
        self.folder, self.at, self.count = str(folder), at, 0
        sys.addaudithook(self._audit)
        import torch

        from align_ext.system import tensors, writing

        torch.save = self._halved(torch.save, 1)
        tensors.save_file = self._halved(tensors.save_file, 1)
        os.fsync = self._before(os.fsync)
        writing.exchange = self._before(writing.exchange)

    def _audit(self, event, arguments):
        written = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if (event in AUDITED or written) and self._is_below(arguments[0]):
            self._event()

    def _is_below(self, path):
        return isinstance(path, int) or os.path.abspath(os.fspath(path)).startswith(self.folder)

    def _event(self):
        self.count += 1
        if self.count == self.at:
            os.kill(os.getpid(), signal.SIGKILL)

    def _before(self, function):
        def call(*arguments):
            self._event()
            return function(*arguments)

        return call

    def _halved(self, function, place):
        def call(*arguments, **options):
            result = function(*arguments, **options)
            if self.count + 1 == self.at:
                file = Path(arguments[place])
                os.truncate(file, file.stat().st_size // 2)
            self._event()
            return result

        return call


def forked(work):
    """Runs work() in a process of its own; returns its exit code, negative for a signal."""
    if (child := os.fork()) == 0:
        code = 99
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def train(folder, output, *, resume=False, at=0, **changed):
    """The command, without its process; returns how many file events it had."""
    from rich.console import Console

    from align_ext.training import recipe
    from align_ext.training.options import TrainOptions
    from align_ext.training.run_folder import open_run

    recipe.verify = lambda job, adapter: {}
    paths = {"model": str(folder / "model"), "data": str(folder / "rows.jsonl"), "output": str(output)}
    options = TrainOptions.from_mapping(OPTIONS | paths | {"resume": resume} | changed)
    killer = Killer(output.parent, at) if at is not None else None
    console = Console(file=io.StringIO())
    with open_run(options) as opened:
        recipe.train(recipe.prepare(opened, console), console)
    if killer is not None:
        (folder / "events").write_text(str(killer.count))


def outcome(folder, at, expected, **changed):
    """What is wrong after a kill at an event and going on; None if the adapter is the unbroken run's to the bit."""
    from align_ext.training.whole_checkpoints import checkpoints

    work = folder / f"killed-{at}"
    work.mkdir()
    output = work / "out"
    if changed.get("overwrite"):
        forked(lambda: train(folder, output, at=None, seed=4, save_steps=0))
        before = adapter_of(output)
    code = forked(lambda: train(folder, output, at=at, **changed))
    if code != -signal.SIGKILL:
        return f"event {at}: the run ended with {code}"
    if changed.get("overwrite") and adapter_of(output) not in (before, expected):
        return f"event {at}: neither the old run nor the new one is in place"
    done = [path for path in (output,) if (path / "results.json").is_file() and adapter_of(path) == expected]
    waiting = [*checkpoints(output / "checkpoints"), *checkpoints(work / ".out.new/checkpoints")]
    errors = work / "errors"

    def go_on():
        with errors.open("w") as file, contextlib.redirect_stderr(file):
            try:
                train(folder, output, resume=bool(waiting), at=None, **changed)
            except BaseException as error:
                print(f"{type(error).__name__}: {error}", file=file)
                raise

    code = forked(go_on)
    said = errors.read_text()
    if code and not (done and ("is complete" in said or "is not empty" in said)) and "is complete" not in said:
        return f"event {at}: going on ended with {code}: {said.strip()[-300:]}"
    if adapter_of(output) != expected:
        return f"event {at}: another adapter"
    left = sorted(path.name for path in work.iterdir() if path.name not in ("out", "errors"))
    hidden = [str(path.relative_to(work)) for path in output.rglob(".*")]
    return f"event {at}: left behind {left + hidden}" if left or (hidden and not done) else None


def adapter_of(output):
    """The tensors' bytes: the file's header has no order of its own."""
    from safetensors.torch import load_file

    file = output / "adapter/adapter_model.safetensors"
    return {name: t.numpy().tobytes() for name, t in load_file(file).items()} if file.is_file() else None


def main(folder, events, **changed):
    """Tries the events, all of them if none is given; a negative one counts from the end."""
    from hf.words import model_folder, write_rows

    os.environ["HF_HUB_OFFLINE"] = "1"
    import torch
    import transformers

    import align_ext.training.recipe  # noqa: F401  so that the processes have it

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    forked(lambda: (model_folder(folder / "model"), write_rows(folder / "rows.jsonl")))
    whole = folder / "whole"
    whole.mkdir()
    if changed.get("overwrite"):
        forked(lambda: train(folder, whole / "out", at=None, seed=4, save_steps=0))
    assert forked(lambda: train(folder, whole / "out", **changed)) == 0
    expected, count = adapter_of(whole / "out"), int((folder / "events").read_text())
    wrong = []
    for event in events or range(1, count + 1):
        at = event if event > 0 else count + 1 + event
        if problem := outcome(folder, at, expected, **changed):
            wrong.append(problem)
    print(f"{count} file events{', overwriting' * bool(changed)}: {len(wrong)} problems of {len(events) or count}")
    for problem in wrong:
        print(problem)
    return count, wrong


if __name__ == "__main__":
    arguments = sys.argv[1:]
    changed = {"overwrite": True} if "--overwrite" in arguments else {}
    arguments = [argument for argument in arguments if argument != "--overwrite"]
    sys.exit(bool(main(Path(arguments[0]).absolute(), [int(event) for event in arguments[1:]], **changed)[1]))
