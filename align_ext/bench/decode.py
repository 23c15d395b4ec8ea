"""Decoding one token at a time: merged adapters against separate ones (2508.05078, App. C)."""

import copy
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch

from align_ext.alignment.context import set_task
from align_ext.architectures import ARCHITECTURES
from align_ext.bench import models
from align_ext.bench.setting import Case, Setting
from align_ext.bench.timing import Call, Comparison, visits
from align_ext.model.merge import merge_and_unload
from align_ext.system.terminal import PrintLine

RIVALS = ("PEFT's LoRA", "R-LoRA, loop", "HydraLoRA, loop")
MERGED = ("align_lora", "m_lora")


def decode(setting: Setting) -> Iterator[Case]:
    """Measures the latency per token of each architecture, relative to the frozen model."""
    models.fetch(setting.model)
    models_of = functools.cache(functools.partial(_models, setting))  # the same models for all batches
    for batch in (1, 8):
        table = f"decoding, {setting.model} model, T=1, bfloat16, r={setting.sizes.rank}, N={setting.sizes.heads}"
        yield Case(table, f"batch {batch}", functools.partial(_decoding, setting, batch, models_of))


def _models(setting: Setting) -> dict[str, Any]:
    frozen = models.frozen_model(setting.model, torch.bfloat16, setting.device)
    result = {models.FROZEN: frozen}
    for name in MERGED:
        result[f"{name}, merged"] = merge_and_unload(models.adapt(copy.deepcopy(frozen), name, setting.sizes))
    for name in (*ARCHITECTURES, *RIVALS):
        shared = {id(p): p for p in frozen.parameters()}  # all models share the frozen weights
        result[name] = models.adapt(copy.deepcopy(frozen, shared), name, setting.sizes)
        if name in ARCHITECTURES and ARCHITECTURES[name].by_task:
            set_task(result[name], 0)
    return result


def _decoding(setting: Setting, batch: int, make: Callable[[], dict[str, Any]], _: PrintLine) -> Iterator[Comparison]:
    ids = torch.ones((batch, 1), dtype=torch.int64, device=setting.device)
    calls = {name: _call(model.eval(), ids) for name, model in make().items()}
    yield from visits(calls, setting.rounds, setting.device, host=True, seconds=setting.share)


def _call(model: Any, ids: torch.Tensor) -> Call:
    @torch.inference_mode()
    def run() -> None:
        model(input_ids=ids)

    return run
