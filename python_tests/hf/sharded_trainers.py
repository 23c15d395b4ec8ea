"""Trainers whose parameters are in parts, and what each of their two processes runs (imported there by name)."""

import logging
import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import DistributedType
from hf import shards, trainers
from hf.folders import plain, trained
from hf.words import tokenizer
from safetensors.torch import save_file
from torch.distributed.fsdp import FullyShardedDataParallel
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback

from align_ext import AlignTrainer, TaskCollator, replace_linear_with_align_lora
from align_ext.base_model.sharded import shard_ranks
from align_ext.training.arguments import align_training_arguments
from align_ext.training.checks import check_trained

GATHER = "stage3_gather_16bit_weights_on_model_save"
OPTIONS = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1, "learning_rate": 1e-2}
OPTIONS |= {"remove_unused_columns": False}
QUEUE = {"align": "kl", "align_accumulation": "queue", "align_queue": 2}


def zero(stage, **more):
    """The arguments of DeepSpeed's ZeRO."""
    zero = {"stage": stage, "stage3_param_persistence_threshold": 100, **more}
    return {"deepspeed": {"zero_optimization": zero, "train_micro_batch_size_per_gpu": "auto"}}


def fsdp(**more):
    """The arguments of FSDP2."""
    return {"fsdp": True, "fsdp_config": {"version": 2, **more}}


BEST = {"eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True, "metric_for_best_model": "loss"}
BESIDE = {"trainable_token_indices": [3, 5], "lora_bias": True}
TASKED = {"architecture": "multi_adapter", "align": None}
DEEPSPEED = {
    "zero3": (AlignTrainer, QUEUE | BESIDE, zero(3) | BEST),
    "zero3, Trainer": (Trainer, {}, zero(3, **{GATHER: True})),
    "zero2": (AlignTrainer, {"architecture": "mtlora"}, zero(2)),
}
FSDP = {
    "fsdp": (AlignTrainer, QUEUE | BESIDE, fsdp() | BEST),
    "fsdp, its files sharded": (AlignTrainer, TASKED, fsdp(state_dict_type="SHARDED_STATE_DICT")),
    "fsdp, Trainer": (Trainer, {"architecture": "mtlora"}, fsdp()),
}


class Values(TrainerCallback):
    """Keeps what is trained after each step, whole."""

    def __init__(self):
        self.steps = {}

    def on_step_end(self, args, state, control, model=None, **_):
        self.steps[state.global_step] = shards.values(model)


def arguments(folder, sharding, size=3):
    """TrainingArguments; accelerate shards by FSDP only on what it takes for GPUs."""
    made = align_training_arguments(
        str(folder), **(trainers.ONE_STEP | OPTIONS | sharding | {"per_device_train_batch_size": size})
    )
    assert made.device.type == "cpu"
    if "fsdp" in sharding:
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    return made


def build(folder, case, model=None, args=None, size=3):
    """A case's trainer, and what it will have trained."""
    kind, adapters, sharding = case
    args = args or arguments(folder, sharding, size)
    if model is None:
        model = plain()
        torch.manual_seed(3)
        replace_linear_with_align_lora(model, **{"r": 4, "num_tasks": 3, "lora_dropout": 0.2} | adapters)
        model.model.norm.requires_grad_(True)
    rows, kept = [words(row) for row in trainers.features()], Values()
    own = {"eval_dataset": rows[:6]} if "eval_strategy" in sharding else {}
    ran = kind(model, args, TaskCollator(tokenizer()), rows, callbacks=[kept], **own)
    return ran, kept


def words(row):
    """A row whose tokens the model knows."""
    return row | {n: [x if x < 0 else x % 60 for x in row[n]] for n in ("input_ids", "labels")}


def join(rank, port, count=2):
    shards.join(rank, port, count)
    del os.environ["ACCELERATE_USE_CPU"]  # with which accelerate leaves DeepSpeed out
    if count == 1:  # no launcher has started it
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
            del os.environ[name]


def join_by_deepspeed(rank, port, count=2):
    join(rank, port, count)
    os.environ["DS_ACCELERATOR"] = "cpu"
    from deepspeed import ops

    ops.__compatible_ops__["deepspeed_shm_comm"] = False  # a minute to compile; gloo does what it would


def by_fsdp(rank, port, folder):
    """FSDP2."""
    join(rank, port)
    for name, case in FSDP.items():
        model = run(rank, Path(folder, name), case)
    with pytest.raises(ValueError, match=r"the state_dict has no model.*lora_A: give the whole one"):
        model.save_pretrained(Path(folder, "a part"), state_dict={"model.norm.weight": torch.ones(48)})
    assert not Path(folder, "a part").exists()
    flattened = FullyShardedDataParallel(trained("lora"), use_orig_params=True, device_id=torch.device("cpu"))
    with pytest.raises(ValueError, match=r"flattens the parameters: use FSDP2"):
        check_trained(flattened, None)  # which AlignTrainer does before it trains
    dist.barrier()


def by_deepspeed(rank, port, folder):
    """ZeRO-2 and ZeRO-3."""
    join_by_deepspeed(rank, port)
    for name, case in DEEPSPEED.items():
        run(rank, Path(folder, name), case)
    not_gathered(rank, Path(folder, "not gathered"))
    loaded_in_parts(rank, Path(folder, "loaded in parts"))
    dist.barrier()


FIRST_IS_BEST = BEST | {"greater_is_better": True}  # of its metric, the loss
REPARTITIONED = {
    "zero2": (AlignTrainer, {"lora_dropout": 0.0}, zero(2)),
    "zero3": (AlignTrainer, {"lora_dropout": 0.0}, zero(3)),
    "first is best": (AlignTrainer, {"lora_dropout": 0.0}, zero(2) | FIRST_IS_BEST),
    "last is best": (AlignTrainer, {"lora_dropout": 0.0}, zero(2) | BEST),
}


def by_fewer_or_more(rank, port, folder, count):
    """Two processes train from the start; others go on from their first checkpoint with the same batches."""
    join_by_deepspeed(rank, port, count)
    for name, case in REPARTITIONED.items():
        ran, kept = build(Path(folder, f"{name}, {count}"), case, size=6 // count)
        ran.train(resume_from_checkpoint=None if count == 2 else str(Path(folder, f"{name}, 2", "checkpoint-1")))
        assert list(kept.steps) == ([1, 2] if count == 2 else [2])
        assert ran.state.best_global_step == {"first is best": 1, "last is best": 2}.get(name)
        found = shards.values(ran.model)
        assert (name == "first is best") == any(not torch.equal(x, kept.steps[2][key]) for key, x in found.items())
        if rank == 0:
            save_file(found, Path(folder, f"{name}, {count}", "expected"))
    if count != 2:
        broken = Path(folder, "zero2, 2", "checkpoint-2")
        for file in broken.glob("*/*optim_states.pt") if rank == 0 else ():
            file.write_bytes(b"")
        (broken / "whole.json").unlink(missing_ok=True)
        ran, _ = build(Path(folder, "broken"), REPARTITIONED["zero2"])
        message = f"checkpoint-2' was written by 2 processes with DeepSpeed, which cannot convert it for {count} "
        with pytest.raises(ValueError, match=message + r"\(.*\): go on with 2 processes"):
            ran.train(resume_from_checkpoint=str(broken))
        plain_one = Path(folder, f"plain, {count}, {rank}")
        plain_one.mkdir()
        (plain_one / "optimizer.pt").touch()
        with pytest.raises(ValueError, match="written with neither DeepSpeed nor FSDP, and this training is with Deep"):
            ran.train(resume_from_checkpoint=str(plain_one))
    dist.barrier()


def run(rank, place, case):
    """Trains a case and saves it; another run goes on from the first checkpoint, to the bit."""
    ran, kept = build(place, case)
    ran.train()
    assert bool(shard_ranks(ran.model.parameters())) == (not place.name.startswith("zero2"))
    best = ran.state.best_global_step or OPTIONS["max_steps"]
    ran.save_model(str(place / "final"))
    keep(rank, place, kept.steps | {"final": kept.steps[best]})
    other, found = build(Path(f"{place}, gone on"), case)
    with torch.no_grad():
        for name, parameter in other.model.named_parameters():
            parameter.add_("lora_" in name)
    other.train(resume_from_checkpoint=str(place / "checkpoint-1"))
    assert found.steps[2].keys() == kept.steps[2].keys()
    assert all(torch.equal(tensor, kept.steps[2][name]) for name, tensor in found.steps[2].items())
    return other.model


def not_gathered(rank, place):
    """transformers' own Trainer under ZeRO-3 with DeepSpeed's defaults, by which it gathers nothing."""
    said = []
    logging.getLogger("align_ext.model.save_pretrained").addFilter(lambda record: said.append(record.getMessage()))
    ran, kept = build(place, (Trainer, {}, zero(3)))
    ran.train()
    assert len(said) == (2 if rank == 0 else 0)
    assert all(f"not gathered/checkpoint-{i + 1}" in said[i] and GATHER in said[i] for i in range(len(said)))
    assert not [*place.rglob("adapter*"), *place.rglob("*.safetensors")]
    other, _ = build(place, (Trainer, {}, zero(3, **{GATHER: True})))
    other.train(resume_from_checkpoint=str(place / "checkpoint-2"))
    other.save_model(str(place / "final"))
    keep(rank, place, {"final": kept.steps[2]})


def loaded_in_parts(rank, place):
    """A base that from_pretrained loads in parts, as it does where the arguments are made first."""
    if rank == 0:
        plain("gpt2").save_pretrained(place / "base")
    dist.barrier()
    case = (AlignTrainer, {}, zero(3))
    args = arguments(place, case[2])
    model = AutoModelForCausalLM.from_pretrained(place / "base")
    assert all(parameter.numel() == 0 for parameter in model.parameters())
    replace_linear_with_align_lora(model, r=4, num_tasks=3, target_modules=["c_attn", "c_fc"])
    ran, kept = build(place, case, model, args)
    ran.train()
    keep(rank, place, kept.steps)


def keep(rank, place, expected):
    """Leaves what should be in the folders."""
    for step, tensors in expected.items() if rank == 0 else ():
        save_file(tensors, place / ("final" if step == "final" else f"checkpoint-{step}") / "expected")
