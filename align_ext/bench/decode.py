"""Decoding, one token at a time: adapters merged into the weights against adapters beside them (2508.05078, App. C)."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from align_ext.bench import models
from align_ext.bench.setting import Case, Say, Setting
from align_ext.bench.step import MODEL_DTYPE
from align_ext.bench.timing import Call, Comparison, measure
from align_ext.hf.export import merge_and_unload
from align_ext.step import set_task

RIVALS = ("PEFT's LoRA", "R-LoRA, loop", "HydraLoRA, loop")
MERGED = ("align_lora", "m_lora")


def decode(setting: Setting) -> Iterator[Case]:
    """The latency of a token with each architecture, divided by that of the frozen model."""
    models.fetch(setting.model)
    for batch in (1, 8):
        yield Case(
            f"decoding, {setting.model} model, T=1, batch {batch}, bfloat16, r={setting.sizes.rank}, "
            f"N={setting.sizes.heads}",
            partial(_decoding, setting, batch),
        )


def _decoding(setting: Setting, batch: int, _: Say) -> Comparison:
    frozen = models.frozen_model(setting.model, MODEL_DTYPE, setting.device).eval()
    ids = torch.ones((batch, 1), dtype=torch.int64, device=setting.device)
    calls = {models.FROZEN: _call(frozen, ids)}
    for name in MERGED:
        merged = models.adapt(copy.deepcopy(frozen), name, setting.sizes)
        calls[f"{name}, merged"] = _call(merge_and_unload(merged), ids)
    for name in (*models.ARCHITECTURES, *RIVALS):
        shared = {id(p): p for p in frozen.parameters()}  # one copy of the frozen weights serves all
        model = models.adapt(copy.deepcopy(frozen, shared), name, setting.sizes).eval()
        if name == "multi_adapter":
            set_task(model, 0)
        calls[name] = _call(model, ids)
    return measure(calls, setting.rounds, setting.device, host=True, seconds=setting.seconds)


def _call(model: Any, ids: torch.Tensor) -> Call:
    @torch.inference_mode()
    def run() -> None:
        model(input_ids=ids)

    return run
