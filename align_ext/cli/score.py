"""What `align-lora eval` does: a base model, an adapter's folder or none, and the tasks' test splits; a table out."""

from __future__ import annotations

import functools
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from align_ext.base_model.checks import check_base
from align_ext.data.encode import check_conversations, fits, token_rows
from align_ext.data.tasks import TaskData, read_tasks, scored_examples
from align_ext.evaluation.evaluate import TaskScore, evaluate
from align_ext.evaluation.scored_model import ModelRequest
from align_ext.io.adapter_folder import AdapterFolder
from align_ext.system.memory import enough_memory
from align_ext.system.terminal import bars_on, print_line, working
from align_ext.system.versions import versions
from align_ext.system.writing import atomic_file, check_file, user_path

MARK = "align-lora eval"  # tells a file of scores, which another may replace, from anything else


@dataclass(frozen=True)
class EvalRequest(ModelRequest):
    """What to score, and on which rows: the options of `align-lora eval`."""

    data: str | None = None
    tasks: tuple[str, ...] = ()
    examples: int = 100
    batch_size: int = 16
    seq_len: int = 256
    ignore_columns: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("examples", "batch_size", "seq_len"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be a positive integer, got {getattr(self, name)}")
        super().__post_init__()


@enough_memory("lower --batch-size or --seq-len, or take a narrower --dtype")
def score(request: EvalRequest, file: str | None, console: Console) -> dict[str, TaskScore]:
    """Scores a model on each task's test split, prints the table, and writes it as JSON where a file is named.

    Raises:
        ValueError: something of the request cannot be used; nothing is written.
    """
    path = None if file is None else user_path(file, "--json")
    if path is not None:
        check_file("--json", path, f'"written_by": "{MARK}"')
    pools = read_tasks(
        request.data, request.tasks, train=0, test=request.examples, ignore_columns=request.ignore_columns
    )
    stored = None if request.adapter is None else AdapterFolder.read(request.adapter)
    ids = None if stored is None else _task_ids(stored, tuple(pools.tasks), merged=request.merge)
    with working(console, "loading the model"):
        model, tokenizer = request.load_base()
    check_conversations(tokenizer, pools.examples())
    fit = functools.partial(fits, tokenizer, max_tokens=request.seq_len)
    own_file = request.data is not None and Path(os.path.expanduser(request.data)).is_file()
    data = scored_examples(pools, request.examples, fit, undivided=own_file)
    check_base(model, tokenizer, token_rows(tokenizer, data.test))
    with working(console, "loading the adapter"):
        model = request.put_adapter(model)
    print_line(
        console, f"{len(data.names)} tasks: {len(data.test)} examples to score on, {model.dtype} on {model.device}"
    )
    for line in data.report():
        print_line(console, f"  {line}")
    with bars_on(console) as bars:
        scores = evaluate(model, tokenizer, data.test, request.batch_size, bars, ids, greedy=True)
    console.print(_table(scores, data))
    if path is not None:
        tasks = {name: _parts(name, found, data) for name, found in scores.items()}
        content = {
            "written_by": MARK, "options": asdict(request), "versions": versions(), "dtype": str(model.dtype),
            "data": data.counts(), "tasks": tasks,
        }  # fmt: skip
        with atomic_file(path) as new:
            new.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return scores


def _task_ids(stored: AdapterFolder, tasks: tuple[str, ...], *, merged: bool) -> dict[str, int] | None:
    """The ids by which an adapter of its own for each task knows them; None where one adapter serves all."""
    if stored.config.architecture != "multi_adapter":
        return None
    if merged:
        raise ValueError("--merge: a multi_adapter has one adapter for each task: score it without, or score what "
                         "`align-lora merge --task` writes")  # fmt: skip
    names = stored.task_names or tuple(str(i) for i in range(stored.config.num_tasks or 0))
    missing = [task for task in tasks if task not in names]
    if missing:
        raise ValueError(f"the adapter has none for {', '.join(missing)}: its tasks are {', '.join(names)} (--tasks "
                         "keeps some of the data's)")  # fmt: skip
    return {name: i for i, name in enumerate(names)}


def _parts(name: str, found: TaskScore, data: TaskData) -> dict[str, float | int | None]:
    """A task's numbers by what they are."""
    of_choices = any(example.choices for example in data.test if example.task == name)
    choice = (found.score, found.score_error) if of_choices else (None, None)
    greedy = (found.greedy, found.greedy_error) if of_choices else (found.score, found.score_error)
    return {
        "examples": found.examples, "loss": found.loss, "loss_error": found.loss_error, "accuracy": choice[0],
        "accuracy_error": choice[1], "greedy": greedy[0], "greedy_error": greedy[1],
    }  # fmt: skip


def _table(scores: dict[str, TaskScore], data: TaskData) -> Table:
    table = Table("task", title="test splits: value ± standard error")
    for title in ("examples", "loss per answer token", "accuracy by likelihood", "score of greedy answers"):
        table.add_column(title, justify="right")
    for name, found in scores.items():
        parts = _parts(name, found, data)
        cells = [_shown(parts[key], parts[f"{key}_error"]) for key in ("loss", "accuracy", "greedy")]
        table.add_row(name, str(found.examples), *cells)
    return table


def _shown(value: float | None, error: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.3f}" + ("" if error is None else f" ± {error:.3f}")
