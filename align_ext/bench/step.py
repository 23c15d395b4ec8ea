"""Measures training steps: tokens per second and memory, with one process per variant.

`python -m align_ext.bench.step JSON` is such a process: it makes its model and says so; it takes a step for each line
that it reads and says so; at the end of its input it tells its peak memory. The frozen model's process and those of up
to TOGETHER variants live side by side and take turns.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, TextIO

import torch

from align_ext.bench import models
from align_ext.bench.baselines import Sizes
from align_ext.bench.setting import TASKS, Case, Setting, name_of
from align_ext.bench.timing import Baselines, Call, Comparison, Goal, measure
from align_ext.system.memory import peak_memory
from align_ext.system.terminal import PrintLine

TOGETHER = 4  # processes at a time; each holds its model and its allocator's memory between steps
LEAST_ROUNDS = 3


@dataclass(frozen=True)
class Work:
    """The training of one process."""

    variant: str
    model: str
    dtype: str
    device: str
    batch: int
    seq_len: int
    rank: int
    heads: int
    dropout_p: float
    threads: int
    quantised: bool = False


def make_step(work: Work) -> Callable[[], None]:
    """Returns a training step of a variant: forward, backward, AdamW."""
    sizes = Sizes(work.batch * work.seq_len, work.rank, work.heads, work.dropout_p)
    model: Any = models.frozen_model(work.model, getattr(torch, work.dtype), work.device).train()
    model = models.in_4_bits(model) if work.quantised else model
    model = models.adapt(model, work.variant, sizes)
    # All variants compute dx down to the embeddings; the frozen model would compute no gradient otherwise.
    model.get_input_embeddings().register_forward_hook(lambda module, args, output: output.requires_grad_())
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4) if trained else None
    ids = torch.randint(1, model.config.vocab_size, (work.batch, work.seq_len)).to(work.device)
    batch = {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}
    state = getattr(model, "align_state", None)
    if state is not None and state.config.needs_ids:
        batch["task_ids"] = torch.arange(work.batch, device=work.device) % TASKS

    def step() -> None:
        model(**batch).loss.backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()

    return step


def serve(work: Work, commands: TextIO, answers: TextIO) -> None:
    """Runs a step for each line of commands."""
    torch.set_num_threads(work.threads)
    step = make_step(work)
    print("ready", file=answers, flush=True)
    for _ in commands:
        step()
        if work.device == "cuda":
            torch.cuda.synchronize()
        print("taken", file=answers, flush=True)
    print(peak_memory(work.device) / 2**20, file=answers, flush=True)


class Process:
    """The process of a variant."""

    def __init__(self, work: Work) -> None:
        self.variant, self.errors = work.variant, tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed by __exit__)
        command = [sys.executable, "-m", "align_ext.bench.step", json.dumps(asdict(work))]
        # Without this, sources in the current folder would hide the installed package.
        environment = os.environ | {"PYTHONSAFEPATH": "1"}
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, text=True, env=environment
        )

    def __enter__(self) -> Process:
        self.wait()
        return self

    def wait(self) -> None:
        """Waits until the process is ready."""
        self._answer()

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()
        self.errors.close()

    def step(self) -> None:
        """Runs a step."""
        assert self.process.stdin is not None
        print("step", file=self.process.stdin, flush=True)
        self._answer()

    def finish(self) -> float:
        """Ends the process; returns its peak memory in MiB."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.stdin = None
        return float(self._answer())

    def _answer(self) -> str:
        assert self.process.stdout is not None
        answer = self.process.stdout.readline()
        if not answer:
            self.errors.seek(0)
            lines = self.errors.read().strip().splitlines() or ["it said nothing"]
            raise RuntimeError(f"the process of {self.variant!r} ended: {lines[-1]}")
        return answer


def step(setting: Setting) -> Iterator[Case]:
    """Measures training steps of a model with each variant, relative to the frozen model."""
    models.fetch(setting.model)
    work, sizes = f"whole step, {setting.model} model, {setting.batch} x {setting.seq_len} tokens", setting.sizes
    for dtype in map(name_of, setting.step_dtypes):
        yield Case(f"{work}, r={sizes.rank}, N={sizes.heads}", dtype, partial(_whole_steps, setting, dtype))


def quantised(setting: Setting) -> Iterator[Case]:
    """Measures training steps of a model whose weights are stored in nf4, relative to the frozen model so stored."""
    models.fetch(setting.model)
    sizes, dtype = setting.sizes, name_of(setting.step_dtypes[0])
    work = f"whole step, {setting.model} model in nf4, {setting.batch} x {setting.seq_len} tokens"
    few = replace(setting, steps="quantised", step_rounds=min(setting.step_rounds, 3))
    yield Case(f"{work}, r={sizes.rank}, N={sizes.heads}", dtype, partial(_whole_steps, few, dtype))


def _whole_steps(setting: Setting, dtype: str, print_line: PrintLine) -> Iterator[Comparison]:
    first, *others = models.variants(setting.steps)
    tokens = setting.batch * setting.seq_len
    peak: dict[str, float] = {}
    times: dict[str, list[float]] = {first: []}
    baselines: Baselines = {}
    with Process(work(setting, first, dtype)) as frozen:
        for begin in range(0, len(others), TOGETHER):
            group = others[begin : begin + TOGETHER]
            if begin and not setting.share():  # the time of the run is over
                break
            with ExitStack() as alive:
                processes = {variant: alive.push(Process(work(setting, variant, dtype))) for variant in group}
                for index, (variant, process) in enumerate(processes.items()):
                    print_line(f"{variant} ({begin + index + 1} of {len(others)})")
                    process.wait()
                print_line(f"{', '.join(group)}: up to {setting.step_rounds} rounds")
                steps: dict[str, Call] = {name: process.step for name, process in processes.items()}
                result = measure(
                    {first: frozen.step, **steps}, setting.step_rounds, "cpu", least=LEAST_ROUNDS,
                    seconds=lambda: setting.step_seconds,
                )  # fmt: skip
                peak |= {variant: process.finish() for variant, process in processes.items()}
            times[first] += result.times_ms.pop(first)
            times |= result.times_ms
            baselines |= result.baselines
        peak[first] = frozen.finish()
    left_out = [variant for variant in others if variant not in times]
    result = Comparison(times, tokens=tokens, baselines=baselines, peak_mib=peak, left_out=left_out)
    if {"R-LoRA, loop", "LoRA, restructured", "r_lora"} <= set(times):
        # 1.5 times as fast as the loop, and within 5% of LoRA with one head.
        limit = min(result.ratios("R-LoRA, loop")[1] / 1.5, 1.05 * result.ratios("LoRA, restructured")[1])
        result.goals = {"r_lora": Goal(round(limit, 3))}
    yield result  # the only visit, which takes minutes


def work(setting: Setting, variant: str, dtype: str) -> Work:
    """Returns the training of a variant's process."""
    sizes = setting.sizes
    return Work(
        variant, setting.model, dtype, setting.device, setting.batch, setting.seq_len, sizes.rank, sizes.heads,
        sizes.dropout_p, torch.get_num_threads(), setting.steps == "quantised",
    )  # fmt: skip


if __name__ == "__main__":
    # Libraries may print, so the answers use a copy of standard output.
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    serve(Work(**json.loads(sys.argv[1])), sys.stdin, channel)
