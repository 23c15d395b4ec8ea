"""The memory of a training step beside a base in nf4: of every architecture no more than of PEFT's LoRA."""

import functools

import peft
import pytest
import torch
from architectures import COMPARED, FROM_WEIGHT, ON_LAYERS, config_of
from tiny import llama
from torch.profiler import ProfilerActivity, profile

from align_ext import align_step, replace_linear_with_align_lora
from align_ext.bench.models import in_4_bits

TARGETS = ["gate_proj", "up_proj", "down_proj"]
SIZES = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 3}
R, DROPOUT, SAMPLES, TOKENS = 8, 0.1, 4, 128


def base():
    model = in_4_bits(llama(**SIZES).bfloat16()).requires_grad_(False)
    model.enable_input_require_grads()
    return model


def peak(model, tasks=None):
    """The most bytes that torch has allocated in a step's forward and backward, beyond those before it."""
    inputs = {"input_ids": torch.arange(SAMPLES * TOKENS).view(SAMPLES, TOKENS) % 64}
    inputs["labels"] = inputs["input_ids"]

    def step():
        with align_step(model, tasks) if tasks is not None else torch.enable_grad() as opened:
            lm = model(**inputs).loss
        (opened.total(lm) if tasks is not None else lm).backward()

    step()  # a first one makes what stays: gradients, buffers
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        step()
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    held, most = 0, 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


@functools.cache
def peak_of_peft(use_dora):
    options = peft.LoraConfig(r=R, lora_alpha=32, lora_dropout=DROPOUT, target_modules=TARGETS, use_dora=use_dora)
    return peak(peft.get_peft_model(base(), options).train())


NAMES = [name for name in ON_LAYERS if name not in COMPARED + FROM_WEIGHT and "by sequence" not in name]


@pytest.mark.parametrize("name", [pytest.param(x, marks=() if x == "lora" else pytest.mark.slow) for x in NAMES])
def test_a_step_takes_no_more_than_pefts(name):
    config = config_of(name, target_modules=TARGETS, r=R, lora_dropout=DROPOUT)
    model = replace_linear_with_align_lora(base(), config).train()
    found = peak(model, torch.arange(SAMPLES) % config.num_tasks if config.needs_step else None)
    most = peak_of_peft(config.use_dora)
    print(f"{name}: {found / 2**20:.1f} MiB, PEFT's LoRA {most / 2**20:.1f} MiB")
    assert 0 < found <= most
