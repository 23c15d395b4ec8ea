"""What the examples share: a model with adapters, three small tasks, and the comparison that each script ends with.

Without --model everything is built in: a random Llama of two layers, a tokenizer of single characters, no network.
"""

from __future__ import annotations

import argparse
import os
import random
import string
from collections.abc import Callable
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from align_ext import TaskCollator, TaskSampler, replace_linear_with_align_lora

TASKS = ("sum", "reverse", "capitals")


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Trains with and without the alignment term, and compares.")
    parser.add_argument("--model", help="a folder or a hub id of a causal language model (default: a tiny random one)")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--lr", type=float, default=1e-2)
    parser.add_argument("--weight", type=float, default=0.1, help="lambda of the alignment term")
    return parser.parse_args()


ARGUMENTS = arguments()
SETTINGS = {  # of transformers' and TRL's trainers
    "max_steps": ARGUMENTS.steps,
    "learning_rate": ARGUMENTS.lr,
    "per_device_train_batch_size": 8,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
}


def adapted(weight: float) -> tuple[Any, Any]:
    """A model in training mode with Align-LoRA beside its MLPs, and its tokenizer."""
    torch.manual_seed(0)
    if ARGUMENTS.model:
        tokenizer = AutoTokenizer.from_pretrained(ARGUMENTS.model)
        model = AutoModelForCausalLM.from_pretrained(ARGUMENTS.model, dtype="auto")
    else:
        tokenizer = characters()
        sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
        model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes))
    replace_linear_with_align_lora(model, align="kl", align_weight=weight, num_tasks=len(TASKS))
    return model.train(), tokenizer


def characters() -> PreTrainedTokenizerFast:
    """A tokenizer with a token for each printable character."""
    vocabulary = ["[PAD]", "[END]", "[UNK]", *string.printable]
    inner = Tokenizer(models.WordLevel({token: i for i, token in enumerate(vocabulary)}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="[PAD]", eos_token="[END]", unk_token="[UNK]")


def rows(count: int = 96) -> list[dict[str, Any]]:
    """Examples of the three tasks: prompt, completion, task_ids."""
    rng, result = random.Random(0), []
    for i in range(count):
        a, b, word = rng.randint(10, 99), rng.randint(10, 99), "".join(rng.sample(string.ascii_lowercase, 5))
        prompt, completion = [(f"{a}+{b}=", str(a + b)), (f"{word}<", word[::-1]), (f"{word}^", word.upper())][i % 3]
        result.append({"prompt": prompt, "completion": completion, "task_ids": i % 3})
    return result


def features(tokenizer: Any) -> list[dict[str, Any]]:
    """The examples as tokens, with labels on the completion alone."""
    result = []
    for row in rows():
        prompt, whole = tokenizer(row["prompt"])["input_ids"], tokenizer(row["prompt"] + row["completion"])["input_ids"]
        labels = [-100] * len(prompt) + whole[len(prompt) :]
        mask = [1] * len(whole)
        result.append({"input_ids": whole, "attention_mask": mask, "labels": labels, "task_ids": row["task_ids"]})
    return result


def loader(tokenizer: Any, batches: int = ARGUMENTS.steps, batch_size: int = 8) -> DataLoader:
    """Batches for a loop of one's own, each with all three tasks."""
    data = features(tokenizer)
    order = TaskSampler([row["task_ids"] for row in data], batch_size, "equal", batches=batches)
    return DataLoader(data, batch_size, sampler=order, collate_fn=TaskCollator(tokenizer))  # type: ignore[arg-type]


def optimizer(model: Any) -> torch.optim.Optimizer:
    """AdamW over the adapters."""
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=ARGUMENTS.lr)


def compare(train: Callable[[float], list[float]], *, main_process: bool = True) -> None:
    """Trains without and with the alignment term and shows the alignment value, which must fall faster with it.

    Args:
        train: takes the weight of the alignment and returns the alignment value of each step.
        main_process: whether this process prints.
    """
    kept, processes = {}, int(os.environ.get("WORLD_SIZE", "1"))
    for weight in (0.0, ARGUMENTS.weight):
        values = train(weight)
        kept[weight] = values[-1] / values[0]
        if main_process:
            change = f"{values[0]:.3f} -> {values[-1]:.3f} (x {kept[weight]:.2f})"
            print(f"weight {weight:g}, {processes} process(es): alignment {change}")
    assert kept[ARGUMENTS.weight] < min(1, kept[0.0]), "the alignment term did not lower the alignment value"
