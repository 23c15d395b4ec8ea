"""Align-LoRA with TRL's SFTTrainer, several examples packed into a row: python examples/sft_packing.py."""

from tempfile import TemporaryDirectory

from common import SETTINGS, TASKS, adapted, compare, rows
from datasets import Dataset
from trl import SFTConfig

from align_ext import AlignSFTTrainer


def train(weight: float) -> list[float]:
    """Trains the adapters; the alignment value of each step."""
    model, tokenizer = adapted(weight)
    with TemporaryDirectory() as folder:
        trainer = AlignSFTTrainer(
            model=model,
            args=SFTConfig(folder, packing=True, max_length=64, bf16=False, **SETTINGS),
            train_dataset=Dataset.from_list(rows()),  # or {"sum": ..., "reverse": ...}, a dataset for each task
            processing_class=tokenizer,
            task_names=TASKS,
        )
        trainer.train()
    return [entry["align_loss"] for entry in trainer.state.log_history if "align_loss" in entry]


if __name__ == "__main__":
    compare(train)
