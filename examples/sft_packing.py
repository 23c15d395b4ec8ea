"""Fine-tunes one model on several tasks with TRL's SFTTrainer, several examples packed into a row.

python examples/sft_packing.py examples/data/*.train.jsonl
"""

import argparse
import json
from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig

from align_ext import AlignSFTTrainer, replace_linear_with_align_lora

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
    tasks = {file.name.split(".")[0]: [json.loads(line) for line in file.open()] for file in args.files}
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype="auto")
    replace_linear_with_align_lora(model, num_tasks=len(args.files), align_weight=args.weight)
except (OSError, ValueError) as error:  # a wrong argument
    parser.error(" ".join(str(error).split()))
tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token

for rows in tasks.values():
    for row in rows:  # so that prompt and completion are apart
        row["prompt"] += "\n"
settings = SFTConfig(
    args.output, max_steps=args.steps, learning_rate=args.lr, per_device_train_batch_size=8, logging_steps=1,
    packing=True, max_length=256, bf16=False, save_strategy="no", report_to="none",
    use_cpu=not torch.cuda.is_available(),
)  # fmt: skip
trainer = AlignSFTTrainer(
    model=model,
    args=settings,
    train_dataset={task: Dataset.from_list(rows) for task, rows in tasks.items()},  # or one, with a column task_ids
    processing_class=tokenizer,
)
trainer.train()  # it logs loss, lm_loss, align_loss and each task's loss
trainer.save_model(args.output)
