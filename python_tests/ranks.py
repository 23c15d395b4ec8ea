"""What each of several processes runs; imported by name in the processes."""

import itertools

import torch
import torch.distributed as dist
from test_batch import CHECKPOINTING, EXACT, by_context, by_keyword, checkpointed, oracle_gradients
from tiny import adapted, error, gradients
from torch import nn


def train_on_rank(rank, port):
    """Trains on batch `rank` under DDP and FSDP2, in every checkpointing mode, and compares with the union batch."""
    from torch.distributed.fsdp import fully_shard

    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    for wrap, mode in itertools.product(("ddp", "fsdp2"), CHECKPOINTING):
        model = checkpointed(adapted(), mode)
        if wrap == "ddp":
            call = nn.parallel.DistributedDataParallel(model)
        else:
            call = [fully_shard(part) for part in (*model.model.layers, model)][-1]
        for way in (by_context, by_keyword):
            model.zero_grad()
            way(call, rank)().backward()
            assert error(gradients(model), oracle_gradients(0.5, 0.5, union=True)) < EXACT, (wrap, mode, way)
    dist.destroy_process_group()
