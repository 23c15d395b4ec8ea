"""What a run costs: parameters and operations of the adapters, times of the steps, memory."""

import resource
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
import transformers
from torch import nn

from align_ext.alignment.model_state import require_state
from align_ext.model.cost import count_parameters, flops_per_token


def describe_adapters(model: nn.Module) -> dict[str, Any]:
    """Returns what a table of runs needs of the adapters: trained parameters, rank, scaling, operations per token."""
    config, counts = require_state(model).config, count_parameters(model)
    return {
        "architecture": config.architecture, "rank": config.r, "scaling": config.scaling,
        "trained_parameters": counts.trainable, "percent": counts.percent, "router_parameters": counts.router,
        "flops_per_token": asdict(flops_per_token(model)),
    }  # fmt: skip


class StepClock(transformers.TrainerCallback):
    """Measures the time of the optimizer steps, with the device's work, and adds it to the log as step_seconds.

    A checkpoint holds the log, so that a resumed run has the times of all its steps.
    """

    def __init__(self, device: str) -> None:
        self.device, self.seconds, self._start = device, list[float](), 0.0
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()

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
            tokens: the trained tokens of a step. The peak is the process's on a CPU, the device's on a GPU.
        """
        times = [entry["step_seconds"] for entry in losses if "step_seconds" in entry]
        if self.device == "cuda":
            peak = torch.cuda.max_memory_allocated() / 2**20
        else:
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
        quartiles = statistics.quantiles(times if len(times) > 1 else times * 2, n=4, method="inclusive")
        return {
            "step_seconds": [round(q, 6) for q in quartiles],
            "tokens_per_second": round(tokens / quartiles[1], 1),
            "peak_memory_mib": round(peak, 1),
        }
