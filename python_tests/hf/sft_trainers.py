"""Rows whose characters tell their task, their AlignSFTTrainer, and what each of several processes runs."""

import datasets
import trl
from hf.trainers import NAMES, ONE_STEP, Gradients, adapted, logged
from hf.words import tokenizer

from align_ext import AlignSFTTrainer

DIGITS = ("012", "345", "678")  # a task's texts are of its own digits


UNLIKE_TRL = {"report_to": "none", "bf16": False, "gradient_checkpointing": False}


def text(i):
    own = DIGITS[i // 2 % 3]
    return "".join(own[(i + j * j) % 3] for j in range(3 + 5 * i % 8))


def text_rows(count=24):
    return [{"text": text(i), "task_ids": i // 2 % 3} for i in range(count)]


def prompt_rows(count=24):
    return [{"prompt": text(i), "completion": text(i)[: 1 + i % 7], "task_ids": i // 2 % 3} for i in range(count)]


def chat_rows(count=24):
    turns = [{"role": "user", "content": ""}, {"role": "bot", "content": ""}]
    return [{"messages": [turn | {"content": text(i)} for turn in turns], "task_ids": i // 2 % 3} for i in range(count)]


def token_rows(count=24):
    rows = tokenizer()([text(i) for i in range(count)])["input_ids"]
    return [{"input_ids": ids, "labels": [-100, *ids[1:]], "task_ids": i // 2 % 3} for i, ids in enumerate(rows)]


FORMATS = {"text": text_rows, "prompt": prompt_rows, "chat": chat_rows, "tokens": token_rows}


def trainer(folder, rows, callbacks=(), kind=AlignSFTTrainer, model=None, arguments=None, **options):
    """A trainer of rows (a list becomes a Dataset); options of SFTConfig, arguments of the trainer."""
    own = {"task_names": () if isinstance(rows, dict) else NAMES, "in_order": True} if kind is AlignSFTTrainer else {}
    return kind(
        model=adapted() if model is None else model,
        args=trl.SFTConfig(str(folder), **(ONE_STEP | UNLIKE_TRL | options)),
        train_dataset=datasets.Dataset.from_list(rows) if isinstance(rows, list) else rows,
        processing_class=tokenizer(chat=True),
        callbacks=list(callbacks),
        **(own | (arguments or {})),
    )


def padded_and_padding_free(folder, world):
    """`step_and_evaluation` of both kinds of batches, names told apart."""
    # A batch without padding is one row, so that samples that fill the last one up cannot be told from the others.
    found, losses = step_and_evaluation(folder, world, 21)
    free, free_losses = step_and_evaluation(folder, world, 24, padding_free=True, max_length=None)
    return found | {f"free {k}": v for k, v in free.items()}, losses | {f"free {k}": v for k, v in free_losses.items()}


def step_and_evaluation(folder, world, eval_count, **options):
    """One optimizer step and an evaluation: its gradients, and every loss that was logged."""
    kept, eval_rows = Gradients(), datasets.Dataset.from_list(prompt_rows(eval_count))
    options |= {"per_device_train_batch_size": 6 // world, "gradient_accumulation_steps": 2}
    arguments = {"eval_dataset": eval_rows}
    ran = trainer(folder, prompt_rows(), [kept], arguments=arguments, per_device_eval_batch_size=4, **options)
    ran.train()
    losses = {name: value for name, value in (ran.evaluate() | logged(ran)[0]).items() if "loss" in name}
    del losses["eval_loss"]  # transformers averages it over batches, whose sizes differ
    return kept.steps[0], losses
