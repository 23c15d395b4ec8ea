"""Runs the missing cells of a study, in any number of processes and on any number of machines, and tells its status."""

import functools
import gc
import json
import os
import shutil
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console

from align_ext.study.cell import claimed_by_first, damage, is_done, run_base, run_cell, work_folder
from align_ext.study.deeper import MECHANISM, look_deeper, wants_look
from align_ext.study.design import BASE, Cell, Study
from align_ext.study.plan import CELLS, PLAN, READ_ONLY, check_data, store_plan
from align_ext.system import processes
from align_ext.system.bounds import integer_text, is_whole, unknown_name
from align_ext.system.ending import end_with_parent
from align_ext.system.locks import InUse, claimed
from align_ext.system.messages import line, reason_of, shown
from align_ext.system.reading import read_json
from align_ext.system.terminal import print_line
from align_ext.system.writing import atomic_file, check_writable, remove_leftovers
from align_ext.training.options import TrainOptions
from align_ext.training.whole_checkpoints import checkpoints


@dataclass(frozen=True)
class CellStatus:
    """The state of a cell.

    Attributes:
        key: the cell's name.
        state: "done", "running", "failed", "interrupted" (it has a checkpoint), "damaged" (its files are not what was
            written; it runs again) or "missing".
        step: the step of its last checkpoint; steps in all.
        detail: the first line of its error, the host that works on it, or what is damaged.
        seconds_left: an estimate from its last checkpoint.
    """

    key: str
    state: Literal["done", "running", "failed", "interrupted", "damaged", "missing"]
    step: int = 0
    detail: str = ""
    seconds_left: float | None = None


def run(
    folder: Path, study: Study, console: Console, *, jobs: int = 1, nproc: int = 1, shard: tuple[int, int] = (1, 1),
    arms: tuple[str, ...] = (), retry: bool = False,
) -> list[CellStatus]:  # fmt: skip
    """Runs all cells that are missing; a cell that fails says why in its folder, and the others go on.

    Args:
        folder: the study's folder.
        study: its design.
        console: gets progress.
        jobs: the number of cells at a time, each with a share of the processor's threads, or with GPUs of its own.
        nproc: the number of processes that train and score a cell together.
        arms: only the cells of these arms; empty: of all.
        shard: (i, n): only every n-th cell from the i-th on, for a job array on several machines.
        retry: run failed cells again.

    Returns:
        The status of every cell of the shard.

    Raises:
        ValueError: jobs or nproc is no positive integer, the folder cannot be written to, or as in store_plan.
    """
    for name, count in (("jobs", jobs), ("nproc", nproc)):
        if not is_whole(count):
            raise ValueError(f"{name} must be {integer_text(count)}, got {count}")
    processes.by_first(lambda: check_writable(folder, READ_ONLY))
    plan = processes.by_first(lambda: store_plan(folder, study))
    for arm in arms:
        if arm not in plan["arms"]:
            raise ValueError(unknown_name("arm", arm, plan["arms"]))
    if others := outside(folder, plan):
        print_line(console, others)
    cells = [entry for entry in _cells(folder, plan) if not arms or entry[1].arm in (BASE, *arms)]
    cells = cells[shard[0] - 1 :: shard[1]]

    def check() -> None:
        if not all(is_done(path) for path, _, _ in cells):
            check_data(folder, study, plan)

    processes.by_first(check)
    if jobs > 1 or nproc > processes.count():
        flags = ["--no-report", "--shard", f"{shard[0]}/{shard[1]}", "--arms", ",".join(arms)]
        flags += ["--retry"] if retry else []
        for code in _in_processes([str(folder), *flags], jobs, nproc):
            if code not in (0, 1):  # 1: a cell failed, and says why
                print_line(console, f"a process ended with exit code {code}; what it worked on is not finished")
        return [status(path) for path, _, _ in cells]
    for number, (path, cell, options) in enumerate(cells, 1):
        error = path.parent / f"{path.name}.error.txt"
        work = work_folder(path)
        todo = functools.partial(_to_do, study, path, cell.seed, retry=retry)
        nothing, look = processes.by_first(todo)
        if nothing:
            continue
        print_line(console, f"cell {number} of {len(cells)}: {path.name}" + ", a deeper look" * look)
        start = time.perf_counter()
        try:
            if cell.arm == BASE:
                with claimed_by_first(work):
                    run_base(study, options, path, console)
            else:
                if not look:
                    run_cell(study, cell, options, path, console)
                if wants_look(study, cell.seed) and processes.number() == 0 and is_done(path):
                    with claimed(work):
                        look_deeper(study, options, path)
        except InUse:
            print_line(console, "  another process works on it")
            continue
        except processes.FailedElsewhere:  # where it is said
            continue
        except KeyboardInterrupt:
            print_line(console, "  interrupted: the same command goes on with this cell")
            raise
        except Exception as problem:  # any bug or lack of memory ends this cell alone
            with atomic_file(error) as new:
                new.write_text(f"{reason_of(problem)}\n\n{traceback.format_exc()}", encoding="utf-8")
            print_line(console, f"  failed: {reason_of(problem)}")
            continue
        error.unlink(missing_ok=True)
        print_line(console, f"  done in {time.perf_counter() - start:.0f} s")
        gc.collect()  # a Trainer and its model refer to each other
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return [status(path) for path, _, _ in cells]


def _to_do(study: Study, path: Path, seed: int | None, *, retry: bool) -> tuple[bool, bool]:
    """Returns whether there is nothing to do at a cell, and whether a deeper look is all that there is to do."""
    done, work, failed = is_done(path), work_folder(path), path.parent / f"{path.name}.error.txt"
    if done:  # what a process left that was killed right before its end
        remove_leftovers(path)
    if done and work.is_dir():
        with suppress(InUse), claimed(work):
            shutil.rmtree(work, ignore_errors=True)
    look = done and wants_look(study, seed) and not (path / MECHANISM).is_file()
    return (done and not look) or (failed.is_file() and not retry), look


def statuses(folder: Path) -> list[CellStatus]:
    """Returns the status of every cell of a study whose plan has been made.

    Raises:
        ValueError: there is no plan.
    """
    file = folder / PLAN
    if not file.is_file():
        raise ValueError(f"{shown(str(folder))} holds no {PLAN}: `align-lora study plan {folder}` makes it")
    return [status(path) for path, _, _ in _cells(folder, read_json(file))]


def status(path: Path) -> CellStatus:
    """Returns the status of the cell in a folder."""
    work, error = work_folder(path), path.parent / f"{path.name}.error.txt"
    if is_done(path) and not error.is_file():
        return CellStatus(path.name, "done")
    steps = [int(p.name.partition("-")[2]) for p in checkpoints(work / "run/checkpoints")]
    step = max(steps, default=0)
    if work.is_dir():
        try:
            with claimed(work):
                pass
        except InUse:
            return CellStatus(path.name, "running", step, *_worker(work, step))
    if error.is_file():
        return CellStatus(path.name, "failed", step, error.read_text(encoding="utf-8").partition("\n")[0])
    broken = damage(path) if (path / "cell.json").is_file() else ""
    return CellStatus(path.name, "interrupted" if step else "damaged" if broken else "missing", step, broken)


def outside(folder: Path, plan: Mapping[str, Any]) -> str:
    """Returns a line that names the finished cells of other designs, which are no part of a plan, or ""."""
    planned = {cell["key"] for cell in plan["cells"]}
    names = [path.parent.name for path in sorted((folder / CELLS).glob("*/cell.json"))]
    names = [name for name in names if name not in planned]
    if not names:
        return ""
    return (
        f"{len(names)} finished cells are of another design, and no part of this study as it is: "
        f"{line(', '.join(names), 200)}; they count again when study.yaml is put back"
    )


def _worker(work: Path, step: int) -> tuple[str, float | None]:
    try:
        worker = json.loads((work / "worker.json").read_text())
        total = int(worker["steps"])
    except (OSError, ValueError, LookupError):
        return "", None
    passed = time.time() - worker["started"]
    done = step - worker["from_step"]
    return worker["host"], passed / done * (total - step) if done > 0 else None


def _cells(folder: Path, plan: dict[str, Any]) -> list[tuple[Path, Cell, TrainOptions]]:
    """Returns the folder of each cell, the cell and its options."""
    return [
        (folder / CELLS / of["key"], Cell(of["arm"], of["seed"], of["vary"]), TrainOptions.from_mapping(of["options"]))
        for of in plan["cells"]
    ]


def _in_processes(arguments: list[str], jobs: int, nproc: int) -> list[int]:
    """Runs the command for several cells at a time, which are shared by claiming them; returns the exit codes."""
    # The current folder stays off the path: it may hold sources of the package that are not the installed ones.
    program = "import sys; sys.path = [p for p in sys.path if p]; from align_ext.cli import main; main()"
    command = [sys.executable, "-c", program, "study", "run", *arguments]
    if nproc > 1:
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(nproc)]
        command = [*torchrun, "--no-python", "--", *command]
    workers = [
        subprocess.Popen(command, env=environment, preexec_fn=end_with_parent)
        for environment in _environments(jobs, nproc)
    ]
    try:
        return [worker.wait() for worker in workers]
    except BaseException:
        for worker in workers:
            worker.terminate()
        for worker in workers:
            worker.wait()
        raise


def _environments(jobs: int, nproc: int) -> Iterator[dict[str, str]]:
    """Yields the environment of each job: a GPU a process in turn, or a share of the processor's threads."""
    gpus = torch.cuda.device_count()
    threads = max(1, torch.get_num_threads() // (jobs * nproc))
    for job in range(jobs):
        own = {"OMP_NUM_THREADS": str(threads)}
        if gpus:
            own = {"CUDA_VISIBLE_DEVICES": ",".join(str((job * nproc + i) % gpus) for i in range(nproc))}
        yield {**os.environ, **own}
