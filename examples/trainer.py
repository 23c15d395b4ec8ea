"""Fine-tunes one model on several tasks with transformers' Trainer, on one process or several.

python examples/trainer.py examples/data/*.train.jsonl
torchrun --standalone --nproc_per_node 2 examples/trainer.py examples/data/*.train.jsonl
"""

import argparse
import json
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments

from align_ext import AlignTrainer, TaskCollator, replace_linear_with_align_lora

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("files", nargs="+", type=Path, help='for each task, lines of {"prompt": ..., "completion": ...}')
parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M", help="folder or hub id [%(default)s]")
parser.add_argument("--steps", type=int, default=30, help="optimizer steps [%(default)s]")
parser.add_argument("--lr", type=float, default=2e-4, help="learning rate [%(default)s]")
parser.add_argument("--weight", type=float, default=0.1, help="of the alignment in the loss [%(default)s]")
parser.add_argument("--output", default="adapter", help="folder for the adapter [%(default)s]")
args = parser.parse_args()
if args.steps < 1:
    parser.error("--steps must be at least 1")

torch.manual_seed(0)
try:
    rows = [(json.loads(line), task) for task, file in enumerate(args.files) for line in file.open()]
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype="auto")
    replace_linear_with_align_lora(model, num_tasks=len(args.files), align_weight=args.weight)
except (OSError, ValueError) as error:  # a wrong argument
    parser.error(" ".join(str(error).split()))
tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token

data = []
for row, task in rows:  # the labels are the completion and the end token: the prompt is not learnt
    prompt = tokenizer(row["prompt"] + "\n")["input_ids"]
    answer = tokenizer(row["completion"], add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
    data.append({"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer, "task_ids": task})

settings = TrainingArguments(
    args.output, max_steps=args.steps, learning_rate=args.lr, per_device_train_batch_size=8, logging_steps=1,
    save_strategy="no", report_to="none", use_cpu=not torch.cuda.is_available(),
)  # fmt: skip
trainer = AlignTrainer(
    model=model,
    args=settings,
    train_dataset=data,  # a datasets.Dataset as well, with the same columns
    data_collator=TaskCollator(tokenizer),
    task_names=[file.name.split(".")[0] for file in args.files],
    mixing="equal",  # every batch has several examples of several tasks
)
trainer.train()  # it logs loss, lm_loss, align_loss and each task's loss
trainer.save_model(args.output)
