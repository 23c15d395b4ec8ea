"""What each of several processes runs; imported by name in the processes."""

import itertools

import torch
import torch.distributed as dist
from test_batch import CHECKPOINTING, EXACT, by_context, by_keyword, checkpointed
from tiny import Oracle, adapted, error, gradients
from torch import nn

LOUD = {"balance_weight": 0.5, "spectral_weight": 0.2, "lora_dropout": 0.2, "num_heads": 3}
OTHER_LOSSES = (
    {"align": "mmd", "mmd_n_max": 12, "lora_dropout": 0.2},
    {"architecture": "multi_adapter", "align": "kl", "align_statistics": "position"},
    {"architecture": "lora_moe", "align": "kl", "top_k": 2, "balance": "switch"} | LOUD,
    {"architecture": "mtlora", "align": "mmd"} | LOUD,
)


def train_on_rank(rank, port):
    """Trains on batch `rank` under DDP and FSDP2, in every checkpointing mode, and compares with the union batch."""
    from torch.distributed.fsdp import fully_shard

    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    runs = [*itertools.product(({},), ("ddp", "fsdp2"), CHECKPOINTING)]
    runs += itertools.product(OTHER_LOSSES, ("ddp", "fsdp2"), ("non-reentrant",))
    for options, wrap, mode in runs:
        model = checkpointed(adapted(**options), mode)
        if wrap == "ddp":
            call = nn.parallel.DistributedDataParallel(model)
        else:
            call = [fully_shard(part) for part in (*model.model.layers, model)][-1]
        expected = Oracle(adapted(**options)).gradients([0.5, 0.5], union=True)
        for way in (by_context, by_keyword):
            model.zero_grad()
            way(call, rank)().backward()
            assert error(gradients(model), expected) < EXACT, (options, wrap, mode, way)
    dist.destroy_process_group()
