"""A study that is killed with SIGKILL at one of its file events, and what becomes of it when it is run again.

python -m study.killed_study FOLDER [EVENT ...] tries these events, each in a process of its own, and prints the number
of events and what went wrong; see hf/killed.py.
"""

import io
import os
import shutil
import sys
from pathlib import Path

from hf.killed import Killer, forked

DESIGN = """
study: tiny
train: {{model: {place}/model, data: {place}/rows.jsonl, steps: 4, batch_size: 4, lr: 1.0e-2, train_examples: 8}}
arms:
  align: {{architecture: align_lora, r: 4}}
seeds: [3]
score: {{test: 4, dev: 2, forgetting: 2, probe: 2, mechanism: none, generate: [next]}}
"""


def run_study(folder, at=None):
    """The work of `align-lora study run`; returns the statuses of the cells."""
    from rich.console import Console

    from align_ext.study.design import read_study
    from align_ext.study.run import run

    killer = Killer(folder, at) if at is not None else None
    found = run(folder, read_study(folder), Console(file=io.StringIO()))
    if killer is not None:
        (folder.parent / "events").write_text(str(killer.count))
    return found


def contents(folder):
    """The folders of a study, and the bytes of all its files but the plan and the measured costs."""
    found = (path for path in sorted(folder.rglob("*")) if path.name not in ("cost.json", "plan.json"))
    return {str(path.relative_to(folder)): path.is_file() and path.read_bytes() for path in found}


def new(place, name):
    folder = place / name
    folder.mkdir()
    (folder / "study.yaml").write_text(DESIGN.format(place=place))
    return folder


def main(place, events):
    from hf.words import model_folder, write_rows

    os.environ["HF_HUB_OFFLINE"] = "1"
    import torch
    import transformers

    import align_ext.study.run  # noqa: F401  so that the processes have it

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    forked(lambda: (model_folder(place / "model"), write_rows(place / "rows.jsonl")))
    whole = new(place, "whole")
    assert forked(lambda: run_study(whole, 0)) == 0
    expected, count = contents(whole), int((place / "events").read_text())
    wrong = []
    for event in events or range(1, count + 1):
        at = event if event > 0 else count + 1 + event
        folder = new(place, f"killed-{at}")
        code = forked(lambda at=at, folder=folder: run_study(folder, at))
        again = forked(lambda folder=folder: run_study(folder))
        found = contents(folder)
        if code != -9 or again != 0 or found != expected:
            differ = sorted(n for n in {*found, *expected} if found.get(n) != expected.get(n))
            wrong.append(f"event {at}: ended with {code}, again with {again}; other files: {differ}")
        shutil.rmtree(folder)
    print(f"{count} file events: {len(wrong)} problems of {len(events) or count}")
    for problem in wrong:
        print(problem)


if __name__ == "__main__":
    main(Path(sys.argv[1]), [int(event) for event in sys.argv[2:]])
