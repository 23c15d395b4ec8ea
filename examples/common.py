"""What the examples share: a model with adapters, three small tasks, and the comparison that each script ends with.

Without --model everything is built in: a random Llama of two layers, a tokenizer of single characters, no network.
"""

from __future__ import annotations

import argparse
import os
import random
import string
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from align_ext import TaskCollator, TaskSampler, replace_linear_with_align_lora

TASKS = ("sum", "reverse", "capitals")


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise ValueError
    return value


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise ValueError
    return value


_positive.__name__, _count.__name__ = "positive number", "positive integer"  # in messages


class Parser(argparse.ArgumentParser):
    """A mistake is one line and exit code 2."""

    def error(self, message: str) -> NoReturn:
        """Says it."""
        self.exit(2, f"{self.prog}: {message}\n")


PARSER = Parser(description="Trains with and without the alignment term, and compares.")
PARSER.add_argument("--model", help="a folder or a hub id of a causal language model (default: a tiny random one)")
PARSER.add_argument("--steps", type=_count, default=30)
PARSER.add_argument("--lr", type=_positive, default=1e-2)
PARSER.add_argument("--weight", type=_positive, default=0.1, help="lambda of the alignment term")
ARGUMENTS = PARSER.parse_args()
SETTINGS = {  # of transformers' and TRL's trainers
    "max_steps": ARGUMENTS.steps,
    "learning_rate": ARGUMENTS.lr,
    "per_device_train_batch_size": 8,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    "use_cpu": not torch.cuda.is_available(),  # so that processes on CPUs find each other
}


def launched(*, several: bool) -> None:
    """Ends the script in one line where it was not started as it has to be."""
    script, processes = f"examples/{PARSER.prog}", os.environ.get("WORLD_SIZE", "1")
    if several and "RANK" not in os.environ:
        PARSER.error(f"it trains on several processes: start it by torchrun --nproc_per_node 2 {script}")
    if not several and processes != "1":
        PARSER.error(f"it trains on one process, and {processes} were started: start it by python {script}")


def adapted(weight: float) -> tuple[Any, Any]:
    """A model in training mode with Align-LoRA beside its MLPs, and its tokenizer."""
    torch.manual_seed(0)
    try:
        if ARGUMENTS.model:
            tokenizer = AutoTokenizer.from_pretrained(ARGUMENTS.model)
            model = AutoModelForCausalLM.from_pretrained(ARGUMENTS.model, dtype="auto")
        else:
            tokenizer = characters()
            sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
            model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes))
        replace_linear_with_align_lora(model, align="kl", align_weight=weight, num_tasks=len(TASKS))
    except (OSError, ValueError) as error:  # what transformers and the options say of a wrong --model
        PARSER.error(f"--model {ARGUMENTS.model}: {' '.join(str(error).split())}")
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


def compare(train: Callable[[float], list[float]]) -> None:
    """Trains without and with the alignment term and shows the alignment value, which must fall faster with it.

    Args:
        train: takes the weight of the alignment and returns the alignment value of each step.
    """
    kept, processes = {}, int(os.environ.get("WORLD_SIZE", "1"))
    for weight in (0.0, ARGUMENTS.weight):
        values = train(weight)
        kept[weight] = values[-1] / values[0]
        if os.environ.get("RANK", "0") == "0":
            change = f"{values[0]:.3f} -> {values[-1]:.3f} (x {kept[weight]:.2f})"
            print(f"weight {weight:g}, {processes} process(es): alignment {change}")
    if not kept[ARGUMENTS.weight] < min(1, kept[0.0]):
        raise SystemExit("the alignment term did not lower the alignment value: try more --steps")
