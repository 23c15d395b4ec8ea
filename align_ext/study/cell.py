"""One cell of a study: it trains an arm with one seed, scores it on every row, and writes its files."""

import csv
import io
import json
import platform
import random
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress

from align_ext.adapters.adapted_block import adapted_layers
from align_ext.alignment.context import set_task
from align_ext.alignment.model_state import require_state
from align_ext.config import DEFAULT_WEIGHT, Align
from align_ext.data.rows import Example
from align_ext.evaluation.evaluate import alignment, alignment_pull, score_together
from align_ext.evaluation.rows import ROWS, RowScore, check_rows, rows_digest, write_rows
from align_ext.io.save_adapter import save_adapter
from align_ext.model.merge import merge_and_unload
from align_ext.study.design import BASE, Arm, Cell, Study
from align_ext.study.plain_text import text_loss
from align_ext.study.plan import StudyData, probe_rows, read_data, read_unseen
from align_ext.system import processes
from align_ext.system.locks import claimed
from align_ext.system.messages import reason_of
from align_ext.system.reading import read_json
from align_ext.system.terminal import progress_bars
from align_ext.system.writing import atomic_folder
from align_ext.training import recipe
from align_ext.training.base import load_job_base
from align_ext.training.fit import fit, trained_tokens
from align_ext.training.job import Job
from align_ext.training.options import TrainOptions
from align_ext.training.run_folder import RunFolder, open_shared_run
from align_ext.training.whole_checkpoints import checkpoints

_FILES = r"cell\.json|cost\.json|rows\.jsonl\.gz|losses\.csv|adapter/.*"
_LOSSES = (
    "lm_loss", "align_loss", "aligned_pairs", "balance_loss", "spectral_loss", "orth_loss", "learning_rate",
    "grad_norm",
)  # fmt: skip


def run_base(study: Study, options: TrainOptions, target: Path, console: Console) -> None:
    """Scores the model without adapters and writes its cell."""
    started = time.perf_counter()
    model, tokenizer = load_job_base(options, options.dtype, options.device)
    data = read_data(study, options, tokenizer)
    with progress_bars(console) as bars:
        rows = _score(study, model, tokenizer, data, {}, bars)
    content = _content(study, model, tokenizer, "base", BASE, None, {}) | {"key": target.name, "finite": True}
    cost = {"host": platform.node(), "seconds": {"score": round(time.perf_counter() - started, 1)}}

    def finish() -> None:
        with atomic_folder(target, _FILES) as new:
            _write(new, content, cost, rows, [])

    processes.by_first(finish)


def run_cell(study: Study, cell: Cell, options: TrainOptions, target: Path, console: Console) -> None:
    """Trains and scores one cell; target appears when all of it is done.

    It works in a hidden folder beside the target, which holds the checkpoints of an interrupted cell and is claimed by
    one process, or by the first of those that have joined.

    Args:
        study: the design.
        cell: the cell.
        options: its resolved options.
        target: the folder for its files.
        console: gets progress.

    Raises:
        InUse: another process works on the cell.
        ValueError: as in recipe.prepare.
    """
    work = work_folder(target)
    options = options.for_processes(processes.count())
    with claimed_by_first(work):
        # Another process may have finished it meanwhile.
        done, resume = processes.by_first(lambda: (is_done(target), bool(checkpoints(work / "run/checkpoints"))))
        if not done:
            output = str(work / "run")
            options = replace(options, output=output, resume=resume, save_steps=max(options.steps // 4, 1))
            with open_shared_run(options) as folder:
                _run(study, cell, folder, target, console)
        processes.by_first(lambda: shutil.rmtree(work, ignore_errors=True))


@contextmanager
def claimed_by_first(work: Path) -> Iterator[None]:
    """Claims a folder for all processes that have joined: the first one claims it."""
    with ExitStack() as stack:

        def claim() -> None:
            stack.enter_context(claimed(work))

        processes.by_first(claim)
        yield


def is_done(target: Path) -> bool:
    """Whether a cell's folder is there and whole."""
    return (target / "cell.json").is_file() and not damage(target)


def damage(target: Path) -> str:
    """Returns why a cell's folder is not what was written, or ""."""
    try:
        check_rows(target, read_json(target / "cell.json"))
    except ValueError as error:
        return reason_of(error).replace(f"{target}/", "")
    return ""


def work_folder(target: Path) -> Path:
    """Returns the folder in which a process works on a cell."""
    return target.parent / f".{target.name}"


def _run(study: Study, cell: Cell, folder: RunFolder, target: Path, console: Console) -> None:
    job = recipe.prepare(folder, console, study.score.dev)
    last = folder.last_checkpoint()
    worker = {
        "host": platform.node(), "started": time.time(), "steps": job.options.steps,
        "from_step": 0 if last is None else int(last.name.rpartition("-")[2]),
    }  # fmt: skip
    if processes.number() == 0:
        (work_folder(target) / "worker.json").write_text(json.dumps(worker))
    data = StudyData(job.data, read_unseen(study, folder.options, job.tokenizer, job.data.names))
    probe = probe_rows(study, job.data)
    _apply_control(study, study.arm(cell.arm), job, probe)
    seconds, start = {}, time.perf_counter()
    with progress_bars(console) as bars:
        fitted = fit(job, bars, console, measure=False)
        seconds["train"] = round(time.perf_counter() - start, 1)
        rows = _score(study, job.model, job.tokenizer, data, job.data.ids(), bars)
    seconds["score"] = round(time.perf_counter() - start - seconds["train"], 1)
    losses = fitted["losses"]
    tokens = trained_tokens(job)
    measured = _content(study, job.model, job.tokenizer, cell.label, cell.arm, cell.seed, cell.vary)
    config = require_state(job.model).config
    content = measured | {
        "key": target.name, "steps": job.options.steps, "train_tokens": tokens, "align_weight": config.align_weight,
        "pairs_per_batch": _mean([entry["aligned_pairs"] for entry in losses if "aligned_pairs" in entry]),
        "losses": {"first": losses[0]["lm_loss"], "last": losses[-1]["lm_loss"]},
        "alignment": {
            kind: alignment(job.model, job.tokenizer, probe, job.data.ids(), kind=kind)
            for kind in (("kl", "mmd") if len(job.data.names) > 1 else ())
        },
        "finite": all(abs(entry["lm_loss"]) < float("inf") for entry in losses),
    }  # fmt: skip
    cost = {"host": platform.node(), "threads": torch.get_num_threads(), **fitted["cost"], "seconds": seconds}

    def finish() -> None:
        with atomic_folder(target, _FILES) as new:
            save_adapter(job.model, new / "adapter", task_names=job.data.names)
            cost["decode_ms"] = _decode_times(job, study.score.decode) if study.score.decode else None
            _write(new, content, cost, rows, losses)

    processes.by_first(finish)


def _content(
    study: Study, model: Any, tokenizer: Any, label: str, arm: str, seed: int | None, vary: Mapping[str, Any]
) -> dict[str, Any]:
    """Returns the part of cell.json that the cell of the model without adapters has too."""
    count = study.score.forgetting
    forgetting = text_loss(model, tokenizer, count, study.score.batch_size) if count else None
    return {"label": label, "arm": arm, "seed": seed, "vary": dict(vary), "forgetting": forgetting}


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _apply_control(study: Study, arm: Arm, job: Job, probe: list[Example]) -> None:
    """Makes a control of a run: other task ids for the alignment, or an L2 penalty of equal pull."""
    control, align = arm.control, study.align_of(arm) or "kl"
    own = [row["task_ids"] for row in job.train_rows]
    rng = random.Random(f"control {job.options.order_seed}")
    if control in ("shuffled_ids", "random_partition"):
        ids = rng.sample(own, len(own)) if control == "shuffled_ids" else rng.choices(sorted(set(own)), k=len(own))
        job.train_rows = job.train_rows.remove_columns("task_ids").add_column("task_ids", ids)
        job.mixed_by = own
    elif control == "l2":
        state = require_state(job.model)
        wanted = job.options.adapter["align_weight"]
        wanted = DEFAULT_WEIGHT[align] if wanted is None else wanted
        kinds: tuple[Align, Align] = (align, "l2")
        pull, l2 = (alignment_pull(job.model, job.tokenizer, probe, job.data.ids(), kind) for kind in kinds)
        state.config = replace(state.config, align_weight=wanted * pull / l2)


def _score(
    study: Study, model: Any, tokenizer: Any, data: StudyData, ids: Mapping[str, int], bars: Progress
) -> dict[str, list[RowScore]]:
    """Scores all rows by split; answers are generated for the tasks that score.generate names."""
    result = {}
    for split, examples in data.scored().items():
        rows: list[RowScore] = []
        for task in dict.fromkeys(example.task for example in examples):
            generate: Any = "all" if task in study.score.generate and split != "dev" else "none"
            of_task = [example for example in examples if example.task == task]
            known = {**ids, task: ids.get(task, 0)}  # a multi_adapter scores unseen tasks with its first adapter
            rows += score_together(model, tokenizer, of_task, study.score.batch_size, bars, known, generate=generate)
        result[split] = rows
    return result


def _decode_times(job: Job, tokens: int) -> dict[str, float | None]:
    """Times greedy decoding of one row, in ms a token, with the adapters and merged (2508.05078, Appendix C).

    The model is merged afterwards. merged is None for adapters that do not merge for all tasks.
    """
    model, layers = job.model.eval(), adapted_layers(job.model).values()
    by_task = require_state(model).config.row.by_task
    if by_task:
        set_task(model, 0)
    inputs = {"input_ids": torch.tensor([job.train_rows[0]["input_ids"]], device=job.device)}
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])

    def time_of(count: int) -> float:
        start = time.perf_counter()
        model.generate(**inputs, do_sample=False, min_new_tokens=count, max_new_tokens=count)
        return time.perf_counter() - start

    def per_token() -> float:
        """The prompt's own time is taken off, as that of one token after it."""
        return round(1000 * min((time_of(tokens + 1) - time_of(1)) / tokens for _ in range(3)), 3)

    found: dict[str, float | None] = {"adapter": per_token(), "merged": None}
    if not by_task and all(layer.unmergeable_reason() is None for layer in layers):
        merge_and_unload(model)
        found["merged"] = per_token()
    return found


def _write(
    new: Path, content: dict[str, Any], cost: dict[str, Any], rows: dict[str, list[RowScore]], losses: list[Any]
) -> None:
    write_rows(new / ROWS, rows, "split")
    for name, values in (("cell.json", content | {"sha256": rows_digest(new)}), ("cost.json", cost)):
        (new / name).write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    columns = ("step", *(name for name in _LOSSES if any(name in entry for entry in losses)))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows([entry.get(name, "") for name in columns] for entry in losses)
    (new / "losses.csv").write_text(text.getvalue(), encoding="utf-8")
