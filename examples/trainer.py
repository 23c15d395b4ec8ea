"""Align-LoRA with transformers' Trainer: python examples/trainer.py."""

from tempfile import TemporaryDirectory

from common import SETTINGS, TASKS, adapted, compare, features
from transformers import TrainingArguments

from align_ext import AlignTrainer, TaskCollator


def train(weight: float) -> list[float]:
    """Trains the adapters; the alignment value of each step."""
    model, tokenizer = adapted(weight)
    with TemporaryDirectory() as folder:
        trainer = AlignTrainer(
            model=model,
            args=TrainingArguments(folder, **SETTINGS),
            train_dataset=features(tokenizer),  # a datasets.Dataset as well, with a column task_ids
            data_collator=TaskCollator(tokenizer),
            task_names=TASKS,
            mixing="equal",
        )
        trainer.train()
    return [entry["align_loss"] for entry in trainer.state.log_history if "align_loss" in entry]


if __name__ == "__main__":
    compare(train)
