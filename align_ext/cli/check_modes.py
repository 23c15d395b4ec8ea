"""align-lora doctor --grad-check: checks that losses reach every layer in each mode of activation checkpointing."""

from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from align_ext.adapters.capture import adapters_of
from align_ext.architectures import ARCHITECTURES
from align_ext.base_model.checks import check_base
from align_ext.base_model.load import load_model
from align_ext.config import AlignLoraConfig
from align_ext.diagnostics.grad_check import GradReport, grad_check, print_reports
from align_ext.model.replace import replace_linear_with_align_lora

MODES = {"no checkpointing": None, "non-reentrant": False, "reentrant": True}
_TASKS, _VOCABULARY, _SEED = 2, 64, 0
_LARGE_DIFFERENCES = 3  # how many layers of a user's model are checked by finite differences


def check_modes(name: str | None, console: Console) -> bool:
    """Checks a model, or without a name tiny models of all architectures; prints a table; True if all checks pass.

    Args:
        name: a model folder or hub id; the model gets adapters with the default options, and a batch of random tokens
            of two tasks.
        console: gets the table.

    Raises:
        ValueError: there is no such model.
    """
    makers = _tiny_models() if name is None else _load_model_maker(name)
    reports: dict[str, GradReport] = {}
    cases = [(label, make, mode) for label, make in makers.items() for mode in MODES]
    on_terminal = console.is_terminal
    for label, make, mode in track(cases, "gradient check", console=console, transient=True, disable=not on_terminal):
        model, differences = make()
        _checkpoint(model, MODES[mode])
        reports[f"{label}, {mode}"] = grad_check(model, batch_of(model), differences=differences)
    print_reports(reports, console)
    return all(report.ok for report in reports.values())


def _tiny_models() -> dict[str, Callable[[], tuple[Any, int]]]:
    return {architecture: _tiny_model_maker(architecture) for architecture in ARCHITECTURES}


def _tiny_model_maker(architecture: str) -> Callable[[], tuple[Any, int]]:
    def make() -> tuple[Any, int]:
        sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
        torch.manual_seed(_SEED)
        model = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=_VOCABULARY, use_cache=False)).train()
        align: Any = None if architecture == "lora" else "kl"
        options: dict[str, Any] = {"r": 4, "align": align, "num_tasks": _TASKS, "architecture": architecture}
        replace_linear_with_align_lora(model, AlignLoraConfig(**options))
        for adapter in adapters_of(model).values():  # no parameter is zero, as after some training
            for parameter in adapter.parameters():
                nn.init.normal_(parameter, std=0.1)
        return model, 16

    return make


def _load_model_maker(name: str) -> dict[str, Callable[[], tuple[Any, int]]]:
    model, tokenizer = load_model(name, torch.float32)
    check_base(model, tokenizer, batch_of(model)["input_ids"].tolist(), training=True, cure="name another model")
    model.train()
    replace_linear_with_align_lora(model, num_tasks=_TASKS)
    return {name: lambda: (model, _LARGE_DIFFERENCES)}


def _checkpoint(model: Any, reentrant: bool | None) -> None:
    if reentrant is None:
        model.gradient_checkpointing_disable()
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        model.enable_input_require_grads()


def batch_of(model: Any) -> dict[str, Tensor]:
    """Returns random tokens [4, 8] of two tasks; the last two samples are padded."""
    generator = torch.Generator().manual_seed(_SEED)
    ids = torch.randint(min(_VOCABULARY, model.config.get_text_config().vocab_size), (4, 8), generator=generator)
    mask = torch.ones_like(ids)
    mask[2:, 6:] = 0
    tensors = {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}
    device = next(model.parameters()).device
    return {name: tensor.to(device) for name, tensor in (tensors | {"task_ids": torch.arange(4) % _TASKS}).items()}
