"""Batches with task ids, and recordings written down by hand."""

import torch
from tiny import adapted, batch, llama

from align_ext import replace_linear_with_align_lora
from align_ext.diagnostics.record import Recording

UP = "model.layers.0.mlp.up_proj"
HEADS = {"num_heads": 3, "align": None, "target_blocks": (), "balance": None, "spectral": None}


def with_tasks(seed=0):
    inputs, tasks = batch(seed)
    return {**inputs, "task_ids": tasks}


def by_hand(tasks=(0,), examples=None, latents=None, weights=None, gradients=None):
    """A recording of given lists; examples: one a token if not given."""
    examples = range(len(tasks)) if examples is None else examples
    as_tensors = [{k: torch.as_tensor(v) for k, v in (part or {}).items()} for part in (latents, weights)]
    gradients = {n: {k: torch.tensor(g) for k, g in of.items()} for n, of in (gradients or {}).items()}
    return Recording(torch.tensor(tasks), torch.tensor(list(examples)), *as_tensors, gradients)


def of_architecture(architecture, **options):
    """A tiny model of an architecture whose heads and router are not zero; 3 heads where it has some."""
    headed = architecture in ("hydra", "r_lora", "m_lora", "lora_moe", "mtlora")
    known = {} if not headed else {k: HEADS[k] for k in ("num_heads", "align")}
    known |= {k: HEADS[k] for k in ("target_blocks", "balance", "spectral")} if architecture == "mtlora" else {}
    return adapted(architecture=architecture, **known | options)


def untrained(architecture):
    model = llama()
    replace_linear_with_align_lora(model, architecture=architecture, num_tasks=3)
    return model


def adapters(model):
    from align_ext.adapters.capture import adapters_of

    return adapters_of(model)
