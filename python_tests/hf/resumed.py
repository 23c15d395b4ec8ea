"""Runs that stop and go on, and what the process that goes on runs (imported there by name)."""

from pathlib import Path

import datasets
import torch
from hf import sft_trainers, trainers
from hf.words import llama
from safetensors.torch import save_file

from align_ext import replace_linear_with_align_lora

STEPS, SAVED = 7, 5  # four batches an epoch: it goes on in the middle of the second
OPTIONS = {"max_steps": STEPS, "save_strategy": "steps", "save_steps": SAVED, "learning_rate": 1e-2}
COMMON = {"r": 4, "num_tasks": 3, "lora_dropout": 0.2}
CASES = {
    "kl, heads with masks": {"architecture": "m_lora", "align": "kl"},
    "mmd, mixed tasks": {"align": "mmd"},
    "spectral, blocks": {
        "architecture": "mtlora",
        "align": "kl",
        "spectral_steps": 2,
        "target_blocks": ("attention", "mlp"),
    },
    "exact accumulation": {"align": "kl", "align_accumulation": "exact"},
    "queue, kl": {"align": "kl", "align_accumulation": "queue"},
    "queue, mmd": {"align": "mmd", "align_accumulation": "queue", "align_queue": 2},
    "biases and rows": {"align": "kl", "lora_bias": True, "trainable_token_indices": [3, 5]},
    "adalora": {"architecture": "adalora", "align": "kl", "tinit": 1, "tfinal": 1},
    "sft": {"align": "kl"},
}


def build(case, folder):
    """The trainer of a case, its adapters' first values and its order by seeds."""
    model = llama()
    torch.manual_seed(3)
    replace_linear_with_align_lora(model, **COMMON, **CASES[case])
    own = {"align_schedule": "cosine", "align_warmup": 0.3}
    if case == "sft":
        rows, options = sft_trainers.text_rows(), {"packing": True, "max_length": 14, "per_device_train_batch_size": 2}
        return sft_trainers.trainer(
            folder, rows, model=model, arguments=own | {"in_order": False}, **OPTIONS, **options
        )
    rows = datasets.Dataset.from_list(trainers.features())
    own |= {"mixing": "temperature"} if "mixed" in case else {}
    parts = {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 2} if "accumulation" in case else {}
    return trainers.trainer(folder, model, rows, arguments=own | {"in_order": False}, **OPTIONS, **parts)


def state(model):
    """Everything of the adapters."""
    return {name: t.detach().clone() for name, t in model.state_dict().items() if is_trained(name)}


def is_trained(name):
    return "lora_" in name or name.endswith("adapter.rows")


def go_on(_, folder):
    """Goes on from the checkpoint of every case in folder/<case>, with adapters that were something else before."""
    torch.set_num_threads(1)
    for case in CASES:
        ran = build(case, Path(folder, case))
        with torch.no_grad():
            for name, tensor in ran.model.state_dict().items():
                if is_trained(name):
                    tensor.add_(1)
        ran.train(resume_from_checkpoint=str(Path(folder, case, f"checkpoint-{SAVED}")))
        save_file(state(ran.model), Path(folder, f"{case}.safetensors"))
