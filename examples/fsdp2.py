"""Fine-tunes one model on several tasks with FSDP2: each process holds a part of the parameters, and has own batches.

torchrun --standalone --nproc_per_node 2 examples/fsdp2.py examples/data/*.train.jsonl
"""

import argparse
import itertools
import json
import os
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer

from align_ext import TaskCollator, TaskSampler, align_parts, replace_linear_with_align_lora, save_adapter

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("files", nargs="+", type=Path, help='for each task, lines of {"prompt": ..., "completion": ...}')
parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M", help="folder or hub id [%(default)s]")
parser.add_argument("--steps", type=int, default=30, help="optimizer steps [%(default)s]")
parser.add_argument("--lr", type=float, default=2e-4, help="learning rate [%(default)s]")
parser.add_argument("--weight", type=float, default=0.1, help="of the alignment in the loss [%(default)s]")
parser.add_argument("--output", default="adapter", help="folder for the adapter [%(default)s]")
args = parser.parse_args()
if args.steps < 1 or "RANK" not in os.environ:
    parser.error("start it by torchrun --nproc_per_node 2 examples/fsdp2.py, with --steps of at least 1")

device = "cuda" if torch.cuda.is_available() else "cpu"
if device == "cuda":
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
dist.init_process_group("nccl" if device == "cuda" else "gloo")
rank, world = dist.get_rank(), dist.get_world_size()
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
order = TaskSampler([row["task_ids"] for row in data], batch_size=4, mixing="equal", batches=args.steps * world)
loader = DataLoader(data, batch_size=4, sampler=order, collate_fn=TaskCollator(tokenizer))

for part in (*model.to(device).train().model.layers, model):  # after the adapters, before the optimizer
    fully_shard(part)
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=args.lr)
for batch in itertools.islice(loader, rank, None, world):  # a process takes every second batch, if there are two
    model(**{name: tensor.to(device) for name, tensor in batch.items()}).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if rank == 0:
        print(f"loss {align_parts(model).lm:.3f}, alignment {align_parts(model).align:.4f}")
save_adapter(model, args.output, [file.name.split(".")[0] for file in args.files])  # every process calls it
dist.destroy_process_group()
