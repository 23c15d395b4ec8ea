"""Align-LoRA with FSDP2, parameters and batches sharded: torchrun --nproc_per_node 2 examples/fsdp2.py."""

import torch
import torch.distributed as dist
from common import ARGUMENTS, adapted, compare, launched, loader, optimizer
from torch.distributed.fsdp import fully_shard

from align_ext import align_parts

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def train(weight: float) -> list[float]:
    """Trains the adapters; the alignment value of each step."""
    model, tokenizer = adapted(weight)  # adapters first, then shards
    for part in (*model.model.layers, model):
        fully_shard(part)
    steps, values, (rank, world) = optimizer(model), [], (dist.get_rank(), dist.get_world_size())
    for i, batch in enumerate(loader(tokenizer, ARGUMENTS.steps * world, batch_size=4)):
        if i % world == rank:
            model(**{name: x.to(DEVICE) for name, x in batch.items()}).loss.backward()
            steps.step()
            steps.zero_grad()
            values.append(align_parts(model).align)
    return values


if __name__ == "__main__":
    launched(several=True)
    dist.init_process_group("nccl" if DEVICE == "cuda" else "gloo")
    if DEVICE == "cuda":
        torch.cuda.set_device(dist.get_rank() % torch.cuda.device_count())
    compare(train)
    dist.destroy_process_group()
