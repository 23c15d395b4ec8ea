"""Align-LoRA with accelerate, the alignment being that of all processes' tokens.

accelerate launch --num_processes 2 examples/accelerate_two_processes.py, on CPUs
torchrun --nproc_per_node 2 examples/accelerate_two_processes.py.
"""

import torch
from accelerate import Accelerator
from common import ARGUMENTS, adapted, compare, launched, loader, optimizer

from align_ext import align_parts

launched(several=True)
accelerator = Accelerator(cpu=not torch.cuda.is_available())


def train(weight: float) -> list[float]:
    """Trains the adapters; the alignment value of each step."""
    model, tokenizer = adapted(weight)
    batches = loader(tokenizer, ARGUMENTS.steps * accelerator.num_processes, batch_size=4)
    model, steps, batches = accelerator.prepare(model, optimizer(model), batches)
    values = []
    for batch in batches:  # each process has its own
        accelerator.backward(model(**batch).loss)
        steps.step()
        steps.zero_grad()
        values.append(align_parts(model).align)
    return values


if __name__ == "__main__":
    compare(train)
    accelerator.end_training()
