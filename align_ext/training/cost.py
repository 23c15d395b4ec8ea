"""What a run costs: parameters and operations of the adapters, memory before and while it runs, times of the steps."""

import os
import statistics
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from align_ext.alignment.model_state import require_state
from align_ext.model.cost import count_parameters, flops_per_token
from align_ext.model.memory import training_memory
from align_ext.system import processes
from align_ext.system.memory import available_memory, peak_memory, shown_bytes
from align_ext.training.trial import stepped_optimizer

_USABLE = 0.9  # of the memory that is there; the rest is for what an estimate leaves out


def describe_adapters(model: nn.Module) -> dict[str, Any]:
    """Returns what a table of runs needs of the adapters: alignment, trained parameters, rank, scaling, operations."""
    config, counts = require_state(model).config, count_parameters(model)
    return {
        "architecture": config.architecture, "align": config.align, "align_weight": config.align_weight,
        "rank": config.r, "scaling": config.scaling,
        "trained_parameters": counts.trainable, "percent": counts.percent, "router_parameters": counts.router,
        "flops_per_token": asdict(flops_per_token(model)),
    }  # fmt: skip


def optimizer_state(arguments: transformers.TrainingArguments) -> float:
    """Returns how many bytes the optimizer of a run keeps for each byte that is trained, seen from one step of it.

    2 for AdamW; also for what cannot make a step here.
    """
    try:
        optimizer, parameter = stepped_optimizer(arguments)
    except Exception:  # of any package
        return 2.0
    return sum(map(_bytes, optimizer.state[parameter].values())) / parameter.nbytes


def _bytes(value: Any) -> int:
    if isinstance(value, Mapping):
        return sum(map(_bytes, value.values()))
    return value.nbytes if isinstance(value, torch.Tensor) else 0


def memory_advice(
    model: nn.Module, rows: int, tokens: int, device: str, *, checkpointing: bool, state: float = 2.0
) -> list[str]:
    """Returns what training is about to take, part by part, and the largest micro-batch that would fit: two lines.

    Args:
        model: the model with its adapters.
        rows: the rows of a micro-batch of this process; the advice is --batch-size, the rows of all processes.
        tokens: the tokens of the longest row.
        device: "cpu" or "cuda".
        checkpointing: whether gradient checkpointing is on.
        state: see optimizer_state.
    """
    try:
        needed = training_memory(model, rows, tokens, checkpointing=checkpointing, state=state)
    except ValueError as error:
        return [str(error)[:200]]
    available = available_memory(device)
    if available is None:
        return [str(needed)]
    there, count = f"{shown_bytes(available)} are there", processes.count()
    if device == "cpu":  # whose memory the machine's processes share
        available //= int(os.environ.get("LOCAL_WORLD_SIZE", count))
    most = needed.most_rows(_USABLE * available)
    if most >= rows:
        return [str(needed), f"{there}: --batch-size up to about {most * count} would fit"]
    cures = [f"--batch-size {most * count} with --accumulation"] if most else []
    if not checkpointing:
        less = training_memory(model, rows, tokens, checkpointing=True, state=state)
        cures.append(f"--gradient-checkpointing ({shown_bytes(less.total)})")
    return [str(needed), f"{there}, which may be too little: try {' or '.join(cures or ['a shorter --seq-len'])}"]


class StepClock(transformers.TrainerCallback):
    """Measures the time of the optimizer steps, with the device's work, and adds it to the log as step_seconds.

    A checkpoint holds the log, so that a resumed run has the times of all its steps.
    """

    def __init__(self, device: str) -> None:
        self.device, self.seconds, self._start = device, list[float](), 0.0
        _forget_peak(device)

    def _now(self) -> float:
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Starts the clock."""
        self._start = self._now()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Stops the clock."""
        self.seconds.append(self._now() - self._start)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **_: Any) -> None:
        """Adds the mean time of the steps since the last log."""
        if "lm_loss" in logs and self.seconds:
            state.log_history[-1]["step_seconds"] = round(statistics.fmean(self.seconds), 6)
            self.seconds.clear()

    def cost(self, losses: Sequence[Mapping[str, float]], tokens: float) -> dict[str, Any]:
        """Returns quartiles of the steps' seconds, trained tokens a second, and the peak memory in MiB.

        Args:
            losses: the logged losses.
            tokens: the trained tokens of a step. The peak since the clock was made is the process's on a CPU, the
                device's on a GPU.
        """
        times = [entry["step_seconds"] for entry in losses if "step_seconds" in entry]
        quartiles = statistics.quantiles(times if len(times) > 1 else times * 2, n=4, method="inclusive")
        return {
            "step_seconds": [round(q, 6) for q in quartiles],
            "tokens_per_second": round(tokens / quartiles[1], 1),
            "peak_memory_mib": round(peak_memory(self.device) / 2**20, 1),
        }


def _forget_peak(device: str) -> None:
    """Makes the peak of peak_memory what is in use, so that a process can measure one training after another."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        with suppress(OSError):  # Linux alone: elsewhere the peak is that of the process since its start
            Path("/proc/self/clear_refs").write_text("5")
