"""What each of two processes runs that hold parts of a model's parameters (imported there by name)."""

import logging
import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from hf.folders import plain, trained
from hf.mixtures import eager
from hf.test_biases import moved
from safetensors.torch import save_file
from tiny import batch, llama, qwen2

from align_ext import (
    export_peft,
    load_adapter,
    merge_and_unload,
    replace_linear_with_align_lora,
    save_adapter,
    set_task,
    unload,
)
from align_ext.adapters.adapted_block import adapted_layers
from align_ext.base_model import sharded
from align_ext.training.checkpoint import load_trained, save_trained


def tied():
    return llama(tie_word_embeddings=True)


def mixtral():
    return eager("Mixtral")


KINDS = ("DoRA", "m_lora, rslora", "multi_adapter", "mtlora beside blocks")
FIRST, STEPS = "model.layers.0.mlp.down_proj", 2
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
BESIDE = {  # base, options
    "a head and an embedding": (llama, {"target_modules": ["q_proj", "lm_head", "embed_tokens"]}),
    "a tied head and rows of its weight": (tied, {"target_modules": ["q_proj"], "trainable_token_indices": [1, 3]}),
    "an adapter of a tied head": (tied, {"target_modules": ["q_proj", "lm_head"]}),
    "biases": (qwen2, {"target_modules": ["q_proj", "k_proj"], "bias": "all", "lora_bias": True}),
    "experts": (mixtral, {"target_modules": ["q_proj"], "target_parameters": EXPERTS}),
}
DORA = {"DoRA of a head and an embedding": (llama, BESIDE["a head and an embedding"][1] | {"use_dora": True})}


def join(rank, port, count=2):
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)


def model_of(kind):
    """With adapters of random values; the final norm and the embedding, which may be the head too, are trained.

    Of what is trained BESIDE, that alone.
    """
    if kind in BESIDE or kind in DORA:
        options = {"r": 3, "num_tasks": 3, "architecture": "lora", "lora_dropout": 0.0} | (BESIDE | DORA)[kind][1]
        return moved(replace_linear_with_align_lora(base_of(kind), **options))
    if kind == "tied":
        model = replace_linear_with_align_lora(base_of(kind), r=3, num_tasks=3, align=None)
    else:
        model = trained(kind, align=None)
    for part in (model.model.norm, model.model.embed_tokens):
        part.requires_grad_(True)
    return model


def base_of(kind):
    """The model without adapters, always the same."""
    return (BESIDE | DORA | {"tied": (tied,)}).get(kind, (plain,))[0]()


def values(model):
    """Everything that is trained, by the names that the modules have, whole."""
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            found[name] = (
                parameter.full_tensor() if hasattr(parameter, "full_tensor") else whole_by_deepspeed(parameter)
            )
    return {name: tensor.detach().clone() for name, tensor in found.items()}


def keep_values(rank, model, place):
    """What is trained, which the first process writes down too."""
    expected = values(model)
    if rank == 0:
        save_file(expected, place / "expected.safetensors")
    return expected


def whole_by_deepspeed(parameter):
    if not hasattr(parameter, "ds_id"):
        return parameter
    import deepspeed

    with deepspeed.zero.GatheredParameters([parameter]):
        return parameter.detach().clone()


def train(call, model, rank, step):
    for i in range(STEPS):
        inputs, tasks = batch(2 * i + rank)
        needs = model.align_state.config.needs_ids
        step(call(**inputs, **({"task_ids": tasks} if needs else {})).loss)


def shard(model):
    from torch.distributed.fsdp import fully_shard

    return [fully_shard(part) for part in (*model.model.layers, model)][-1]


def by_fsdp2(rank, kind, place):
    """Trains a kind in shards, saves it, and loads it into shards again; what needs the whole model is refused."""
    model = shard(model_of(kind))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.05)

    def step(loss):
        loss.backward()
        optimizer.step(), optimizer.zero_grad()

    train(model.train(), model, rank, step)
    with torch.no_grad():
        model.eval()(**batch()[0], **({"task_ids": batch()[1]} if kind == "multi_adapter" else {}))  # leaves it whole
    save_trained(model, place / "adapter")
    assert (place / "adapter" / "align_lora_config.json").is_file()  # in every process
    expected = keep_values(rank, model, place)
    if kind in ("tied", "multi_adapter", *BESIDE):
        set_task(model, 1)
        export_peft(model, place / "peft")
    for refused in (merge_and_unload, unload):
        with pytest.raises(ValueError, match=r"one process, but this one is wrapped or in parts"):
            refused(model)
    other = shard(model_of(kind))
    load_trained(other, place / "adapter")
    assert all(torch.equal(tensor, expected[name]) for name, tensor in values(other).items())
    return model


def fsdp2(rank, port, folder):
    """Trains, saves and loads each kind in shards; what is not called by all processes is an error in each of them."""
    join(rank, port)
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    for kind in (*KINDS, "tied"):
        model = by_fsdp2(rank, kind, Path(folder, kind))
        for layer in adapted_layers(model).values():
            assert layer.unmergeable_reason() is not None
    alone(rank, model, Path(folder, "alone"))
    something_else(rank, model, Path(folder, "else"))
    nothing_to_write_to(rank, model, Path(folder))
    dist.barrier()


def by_ddp(rank, kind):
    """The gradients are the mean of those of each process's batch."""
    alone, model = (model_of(kind).double().train() for _ in range(2))
    for one in range(2):
        (alone(**batch(one)[0]).loss / 2).backward()
    wrapped = torch.nn.parallel.DistributedDataParallel(model)  # which is needed as long as its hooks are
    wrapped(**batch(rank)[0]).loss.backward()
    expected = {name: parameter.grad for name, parameter in alone.named_parameters() if parameter.requires_grad}
    assert None not in expected.values()
    for name, gradient in expected.items():
        torch.testing.assert_close(model.get_parameter(name).grad, gradient)


def fsdp2_beside(rank, port, folder):
    """The same for what PEFT's options adapt or train beside linear layers, and its gradients under DDP."""
    join(rank, port)
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    for kind in (*BESIDE, *DORA):
        by_ddp(rank, kind)
        by_fsdp2(rank, kind, Path(folder, kind))
    dist.barrier()


def alone(rank, model, folder):
    """The first process saves alone, while the other one waits at a barrier; then both do."""
    sharded.SECONDS = 2.0
    if rank == 0:
        with pytest.raises(RuntimeError, match=r"save_adapter needs all 2 processes.*not all called it within 2 s"):
            save_adapter(model, folder)
        assert not folder.exists()
    dist.barrier()
    sharded.SECONDS = 60.0
    save_adapter(model, folder)
    assert folder.is_dir()


def something_else(rank, model, folder):
    """One process saves and the other one exports."""
    with pytest.raises(RuntimeError, match=r"was called here, but .* in process"):
        (save_adapter if rank == 0 else export_peft)(model, folder)
    assert not folder.exists()


def nothing_to_write_to(rank, model, folder):
    """What the writing process meets is an error in the others too."""
    (folder / "file").write_text("mine")
    dist.barrier()
    with pytest.raises((ValueError, RuntimeError), match="file"):
        save_adapter(model, folder / "file")
    assert (folder / "file").read_text() == "mine"


def zero3(rank, port, folder, kinds):
    """Trains with DeepSpeed's ZeRO-3 and saves; loads before deepspeed.initialize, and is refused after it."""
    import deepspeed

    join(rank, port)
    deepspeed.init_distributed("gloo", auto_mpi_discovery=False, verbose=False)
    options = {
        "train_micro_batch_size_per_gpu": 6,
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 100},
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
    }
    for kind in kinds:
        model = model_of(kind)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.05)
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=options)

        def step(loss, engine=engine):
            engine.backward(loss)
            engine.step()

        engine.train()
        train(engine, model, rank, step)
        place = Path(folder, kind)
        save_trained(engine, place / "adapter")
        expected = keep_values(rank, model, place)
        if kind in BESIDE:
            export_peft(engine, place / "peft")
        with pytest.raises(ValueError, match=r"DeepSpeed's optimizer has a copy .*before deepspeed\.initialize"):
            load_adapter(engine, place / "adapter")
        with pytest.raises(ValueError, match="one process, but this one is wrapped or in parts"):
            merge_and_unload(engine.module)
        with deepspeed.zero.Init(config_dict_or_path=options):
            empty = base_of(kind).__class__(base_of(kind).config)
        assert all(p.numel() == 0 or p.ds_persist for p in empty.parameters())
        with deepspeed.zero.GatheredParameters(list(empty.parameters()), modifier_rank=0):
            if rank == 0:
                empty.load_state_dict(base_of(kind).state_dict())
        load_adapter(empty, place / "adapter")
        names = {n: p for n, p in empty.named_parameters() if p.requires_grad}
        assert names.keys() == expected.keys()
        assert all(torch.equal(tensor, expected[name]) for name, tensor in values(empty).items())
        save_adapter(empty, place / "again")
    dist.barrier()
