"""The work of `align-lora eval`: scores a base model, with or without an adapter, on the tasks' test splits."""

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from align_ext.base_model.checks import check_base
from align_ext.cli.scored_run import base_note, held_out, load_run_base, read_finished, trained_note, with_run
from align_ext.data.encode import check_conversations, fits, token_rows
from align_ext.data.tasks import TaskData, read_tasks, scored_examples
from align_ext.evaluation.evaluate import score_together
from align_ext.evaluation.rows import RowScore, TaskScore, repeats_line, task_scores
from align_ext.evaluation.scored_model import ModelRequest
from align_ext.io.adapter_folder import AdapterFolder
from align_ext.model.disable import disable_adapter
from align_ext.report.run_results import Run, changes_of, is_beyond_noise
from align_ext.report.statistics import Difference
from align_ext.system import processes
from align_ext.system.bounds import unknown_name
from align_ext.system.memory import enough_memory
from align_ext.system.messages import shown
from align_ext.system.terminal import print_line, print_table, progress_bars, show_status
from align_ext.system.versions import versions
from align_ext.system.writing import atomic_file, check_file, user_path
from align_ext.training.options import TrainOptions
from align_ext.training.rows import read_pools

MARK = "align-lora eval"  # identifies files of scores, which may be overwritten


@dataclass(frozen=True)
class EvalRequest(ModelRequest):
    """The options of `align-lora eval`: the model to score, and the rows to score on."""

    data: str | list[str] | None = None
    columns: tuple[str, ...] = ()
    tasks: tuple[str, ...] = ()
    examples: int = 100
    batch_size: int = 16
    seq_len: int = 256
    ignore_columns: tuple[str, ...] = ()
    task: str | None = None
    generate: bool = True
    base: bool = False  # whether the base alone is scored on the same rows too
    run: tuple[Run, TrainOptions] | None = None  # whose held-out rows are scored; the fields above are then the run's

    def __post_init__(self) -> None:
        for name in ("examples", "batch_size", "seq_len"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be a positive integer, got {getattr(self, name)}")
        if self.base and (self.adapter is None or self.merge):
            raise ValueError("--base goes with --adapter, and without --merge: it is what the adapter stands beside")
        super().__post_init__()

    def load_base(self) -> tuple[Any, Any]:
        """Loads the base model, and the tokenizer; those of a run as it trained on them."""
        return super().load_base() if self.run is None else load_run_base(self, self.run[1])


def request_of(given: Mapping[str, Any]) -> EvalRequest:
    """Returns the request of the options that are given, and of a run if one is among them.

    Raises:
        ValueError: an option cannot be used.
    """
    if "run" not in given:
        return EvalRequest(**given)
    run = read_finished(given["run"])
    return EvalRequest(**with_run(given, *run) | {"run": run})


@enough_memory("lower --batch-size or --seq-len, or take a narrower --dtype")
def score(request: EvalRequest, file: str | None, console: Console) -> dict[str, TaskScore]:
    """Scores a model on each task's test split, prints the table, and writes it as JSON if a file is given.

    Raises:
        ValueError: an option cannot be used; nothing is written.
    """
    path = None if file is None else user_path(file, "--json")
    if path is not None:
        check_file("--json", path, f'"written_by": "{MARK}"')
    run = request.run
    pools = read_pools(run[1]) if run else read_tasks(
        request.data, request.tasks, train=0, test=request.examples, ignore_columns=request.ignore_columns,
        columns=request.columns,
    )  # fmt: skip
    stored = None if request.adapter is None else AdapterFolder.read(request.adapter)
    ids = None if stored is None else _task_ids(stored, tuple(pools.tasks), request)
    with show_status(console, "loading the model"):
        model, tokenizer = request.load_base()
    check_conversations(tokenizer, pools.examples())
    fit = functools.partial(fits, tokenizer, max_tokens=request.seq_len)
    if run:
        data = held_out(*run, pools, tokenizer)
    else:
        data = scored_examples(pools, request.examples, fit, undivided=pools.files, seq_len=request.seq_len)
    check_base(model, tokenizer, token_rows(tokenizer, data.test))
    with show_status(console, "loading the adapter"):
        model = request.put_adapter(model)
    print_line(
        console, f"{len(data.names)} tasks: {len(data.test)} examples to score on, {model.dtype} on {model.device}"
    )
    for line in data.report():
        print_line(console, f"  {line}")
    if not run and request.adapter is not None:
        for line in filter(None, (base_note(request.adapter), trained_note(request.adapter, request.data))):
            print_line(console, line)
    generate = "all" if request.generate else "none"
    alone: list[RowScore] = []
    with progress_bars(console) as bars:
        scored = functools.partial(
            score_together, model, tokenizer, data.test, request.batch_size, bars, ids, generate=generate
        )
        rows = scored()
        if request.base:
            with disable_adapter(model):
                alone = scored()
    scores = task_scores(rows)
    print_table(console, _table(scores, data))
    changes = _changes(alone, rows)
    if changes:
        print_table(console, _changes_table(changes))
    if line := repeats_line({name: vars(result) for name, result in scores.items()}):
        print_line(console, line)
    if path is not None and processes.number() == 0:
        tasks = {name: _results(name, result, data) for name, result in scores.items()}
        content = {
            "written_by": MARK, "options": asdict(request), "versions": versions(), "dtype": str(model.dtype),
            "data": data.counts(), "tasks": tasks, "rows": [asdict(row) for row in rows],
        }  # fmt: skip
        if request.base:
            of_base = {name: _results(name, result, data) for name, result in task_scores(alone).items()}
            content["base"] = {"tasks": of_base, "rows": [asdict(row) for row in alone]}
            content["changes"] = {
                task: {name: change and asdict(change) for name, change in zip(("loss", "score"), both, strict=True)}
                for task, both in changes.items()
            }
        with atomic_file(path) as new:
            new.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return scores


def _task_ids(stored: AdapterFolder, tasks: tuple[str, ...], request: EvalRequest) -> dict[str, int] | None:
    """Returns the id of each task for an adapter by task, or None for other adapters."""
    if not stored.config.row.by_task:
        if request.task is not None:
            raise ValueError(f"--task {shown(request.task)}: an adapter of architecture {stored.config.architecture!r} "
                             "is one for all tasks: leave it out")  # fmt: skip
        return None
    if request.merge:
        raise ValueError(f"--merge: a {stored.config.architecture} has one adapter for each task: score it without, "
                         "or score what `align-lora merge --task` writes")  # fmt: skip
    names = stored.task_names or tuple(str(i) for i in range(stored.config.num_tasks or 0))
    if request.task is not None:
        chosen = int(request.task) if request.task.isdecimal() and request.task not in names else None
        if (chosen is None and request.task not in names) or (chosen is not None and chosen >= len(names)):
            raise ValueError(unknown_name("task of the adapter", request.task, names))
        return dict.fromkeys(tasks, names.index(request.task) if chosen is None else chosen)
    missing = [task for task in tasks if task not in names]
    if missing:
        raise ValueError(f"the adapter has none for {', '.join(missing)}: its tasks are {', '.join(names)} (--tasks "
                         "keeps some of the data's, --task names the adapter that scores all)")  # fmt: skip
    return {name: i for i, name in enumerate(names)}


def _results(name: str, result: TaskScore, data: TaskData) -> dict[str, float | int | None]:
    """Returns a task's results by name."""
    chosen = any(example.choices for example in data.test if example.task == name)
    choice = (result.score, result.score_error) if chosen else (None, None)
    greedy = (result.greedy, result.greedy_error) if chosen else (result.score, result.score_error)
    return {
        "examples": result.examples, "repeated": result.repeated, "loss": result.loss,
        "loss_error": result.loss_error, "accuracy": choice[0], "accuracy_error": choice[1],
        "greedy": greedy[0], "greedy_error": greedy[1],
    }  # fmt: skip


def _table(scores: dict[str, TaskScore], data: TaskData) -> Table:
    table = Table("task", title="test splits: value ± standard error")
    for title in ("examples", "loss per answer token", "accuracy by likelihood", "score of greedy answers"):
        table.add_column(title, justify="right")
    for name, result in scores.items():
        results = _results(name, result, data)
        cells = [_format_value(results[key], results[f"{key}_error"]) for key in ("loss", "accuracy", "greedy")]
        table.add_row(name, str(result.examples), *cells)
    return table


def _changes(before: Sequence[RowScore], after: Sequence[RowScore]) -> dict[str, tuple[Difference | None, ...]]:
    """Returns what the adapter changes of the loss and the score of each task, and of all together; {} without rows."""
    names = dict.fromkeys(row.task for row in before)
    chosen = {name: [name] for name in names} | ({"all tasks": [*names]} if len(names) > 1 else {})
    found: dict[str, tuple[Difference | None, ...]] = {}
    for title, tasks in chosen.items():
        both: list[Any] = [[asdict(row) for row in rows if row.task in tasks] for rows in (before, after)]
        found[title] = changes_of(*both)
    return found


def _changes_table(changes: dict[str, tuple[Difference | None, ...]]) -> Table:
    table = Table("task", title="what the adapter changes, by row: mean and 95% interval; * beyond noise")
    for title in ("loss per answer token", "score"):
        table.add_column(title, justify="right")
    for name, both in changes.items():
        table.add_row(name, *(_format_change(change) for change in both))
    return table


def _format_change(change: Difference | None) -> str:
    if change is None:
        return "-"
    mark = " *" if is_beyond_noise(change) else ""
    return f"{change.estimate:+.3f} [{change.low:+.3f}, {change.high:+.3f}]{mark}"


def _format_value(value: float | None, error: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.3f}" + ("" if error is None else f" ± {error:.3f}")
