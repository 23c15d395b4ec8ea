"""What each of several processes runs; imported by name in the processes."""

import copy
import dataclasses
import itertools

import pytest
import torch
import torch.distributed as dist
from literal import Output
from test_accumulation import arguments, train_exactly
from test_batch import CHECKPOINTING, EXACT, by_context, by_keyword, checkpointed, two_pending_summed
from tiny import VOCAB, WEIGHT, Oracle, adapted, batch, error, gradients, llama, together
from torch import nn

from align_ext import replace_linear_with_align_lora
from align_ext.model.rank_allocation import allocated_ranks, update_and_allocate

LOUD = {"balance_weight": 0.5, "spectral_weight": 0.2, "lora_dropout": 0.2, "num_heads": 3}
OTHER_LOSSES = (
    {"align": "mmd", "mmd_n_max": 12, "lora_dropout": 0.2},
    {"architecture": "multi_adapter", "align": "kl", "align_statistics": "position"},
    {"architecture": "lora_moe", "align": "kl", "top_k": 2, "balance": "switch"} | LOUD,
    {"architecture": "mtlora", "align": "mmd"} | LOUD,
    {"architecture": "moelora", "align": "kl", "lora_dropout": 0.2, "num_heads": 3},
    {"architecture": "mixlora", "align": "kl", "target_modules": "all-linear", "share_inputs": False} | LOUD,
)


UNEVEN_LOSSES = (
    {},
    {"align": "mmd", "mmd_n_max": 12, "use_dora": True},
    {"architecture": "lora_moe", "align": "mmd", "top_k": 2, "balance": "switch"} | LOUD,
)


def join(rank, processes, port):
    """Starts one of the processes."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=processes)


def wrapped(model, wrap):
    """A model for data parallelism."""
    from torch.distributed.fsdp import fully_shard

    if wrap == "ddp":
        return nn.parallel.DistributedDataParallel(model)
    return [fully_shard(part) for part in (*model.model.layers, model)][-1]


def train_on_rank(rank, port):
    """Trains on batch `rank` under DDP and FSDP2, in every checkpointing mode, and compares with the union batch."""
    join(rank, 2, port)
    runs = [*itertools.product(({},), ("ddp", "fsdp2"), CHECKPOINTING)]
    runs += itertools.product(OTHER_LOSSES, ("ddp", "fsdp2"), ("non-reentrant",))
    for options, wrap, mode in runs:
        model = checkpointed(adapted(**options), mode)
        call = wrapped(model, wrap)
        expected = Oracle(adapted(**options)).gradients([0.5, 0.5], union=True)
        for way in (by_context, by_keyword):
            model.zero_grad()
            way(call, rank)().backward()
            assert error(gradients(model), expected) < EXACT, (options, wrap, mode, way)


def uneven(rank):
    """A batch of its own size, whose tasks others lack: rank 0 has no token of task 2, rank 1 has none at all."""
    samples, length = ((6, 10), (3, 7), (4, 9))[rank]
    generator = torch.Generator().manual_seed(rank)
    ids = torch.randint(1, VOCAB, (samples, length), generator=generator)
    mask, place = torch.ones_like(ids), torch.arange(length)
    mask[0, -2:] = 0
    tasks = torch.tensor(([0, 1, 0, 1, -1, 1], [-1, -1, -1], [2, 2, 0, 2])[rank])
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill((mask == 0) | (place < 2), -100)}, tasks


def lacking(rank):
    """Two of these batches, each of which lacks tasks that the other has."""
    return uneven(2 * rank)


def train_unevenly(rank, processes, port):
    """Trains on batches of other sizes and tasks on each rank, and compares with the union batch."""
    join(rank, processes, port)
    runs = itertools.product(UNEVEN_LOSSES, ("ddp", "fsdp2"), (uneven, lacking) if processes == 2 else (uneven,))
    for options, wrap, batches in runs:
        expected = mean_gradients(Oracle(adapted(**options), batches), processes)
        model = adapted(**options)
        call = wrapped(model, wrap)
        torch.manual_seed(rank)  # the dropout masks'
        inputs, tasks = batches(rank)
        call(**inputs, task_ids=tasks).loss.backward()
        assert error(gradients(model), expected) < EXACT, (options, wrap, batches)
    no_number_of_tasks_is_refused()


def mean_gradients(oracle, processes):
    """Those of the mean of the ranks' losses; a third as a weight would be rounded in the model's float32 loss."""
    config = oracle.config
    weights = {name: processes * getattr(config, name) for name in ("align_weight", "balance_weight")}
    oracle.config = dataclasses.replace(config, **weights)
    return {name: grad / processes for name, grad in oracle.gradients([1] * processes, union=True).items()}


def no_number_of_tasks_is_refused():
    """Each process would learn another one from its own ids."""
    with pytest.raises(ValueError, match="num_tasks must be given when several processes train"):
        by_keyword(adapted(num_tasks=None), 0)


def train_in_further_ways(rank, port):
    """Checkpoints every second layer with two pending forwards, accumulates, and is refused what it must be."""
    join(rank, 2, port)
    checkpoint_some_layers(rank)
    for align in ({"align": "kl"}, {"align": "mmd", "mmd_n_max": 8}):
        accumulate_exactly(rank, align)
        accumulate_with_a_queue(rank, align)
    whole_layers_are_needed()


def allocate_on_rank(rank, port):
    """Trains AdaLoRA on batch `rank` under DDP: the ranks of the layers are those of one process on both batches."""
    join(rank, 2, port)
    options = {"architecture": "adalora", "align": "kl", "target_r": 2, "tinit": 1, "tfinal": 2, "total_step": 5}
    both, alone = adapted(**options), adapted(**options)
    call = wrapped(both, "ddp")
    for model, batches in ((call, [rank]), (alone, [0, 1])):
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
        for step in range(1, 6):
            optimizer.zero_grad()
            if model is alone:
                for name, gradient in Oracle(copy.deepcopy(alone)).gradients([0.5] * len(batches), union=True).items():
                    alone.get_parameter(name).grad = gradient
            else:
                by_keyword(model, rank)().backward()
            optimizer.step()
            update_and_allocate(model, step)
    assert allocated_ranks(call) == allocated_ranks(alone)
    assert sum(allocated_ranks(call).values()) == 12
    assert len(set(allocated_ranks(call).values())) > 1
    for name, parameter in both.named_parameters():
        if "lora_" in name:
            parts = [torch.empty_like(parameter) for _ in range(2)]
            dist.all_gather(parts, parameter.detach())
            assert torch.equal(*parts)
            torch.testing.assert_close(parameter, alone.get_parameter(name), rtol=1e-9, atol=1e-12)
    model = adapted(**options)
    call = wrapped(model, "fsdp2")
    by_keyword(call, rank)().backward()
    with pytest.raises(ValueError, match="processes hold parts here: train with DDP"):
        update_and_allocate(call, 1)


def whole_layers_are_needed():
    """Tensor parallelism before or after the adapters, of the adapted layers or of others, and pipeline stages."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.pipelining import PipelineStage
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    mesh = init_device_mesh("cpu", (2,))

    def sharded(model, block, inside=""):
        outer = {"mlp": "down_proj", "self_attn": "o_proj"}[block]
        names = [name for name, _ in model.model.layers[0].get_submodule(block).named_children() if "_proj" in name]
        styles = {name: RowwiseParallel() if name == outer else ColwiseParallel() for name in names}
        plan = {f"model.layers.{i}.{block}.{name}{inside}": style for i in range(2) for name, style in styles.items()}
        return parallelize_module(model, mesh, plan)

    for block in ("mlp", "self_attn"):  # the defaults adapt the first
        with pytest.raises(ValueError, match=r"tensor parallelism.*without a tensor parallel plan"):
            replace_linear_with_align_lora(sharded(llama(), block))
    model = llama()
    model._tp_size = 2  # as from_pretrained with a plan leaves it
    with pytest.raises(ValueError, match=r"tensor parallelism.*without a tensor parallel plan"):
        replace_linear_with_align_lora(model)
    for model in (sharded(adapted(), "mlp", ".base_layer"), sharded(adapted(), "self_attn")):
        with pytest.raises(ValueError, match=r"tensor parallelism.*without a tensor parallel plan"):
            by_keyword(model, 0)
    with pytest.raises(ValueError, match=r"wrapped already.*plain model first, then wrap it"):
        replace_linear_with_align_lora(wrapped(llama(), "fsdp2"))
    stage = PipelineStage(llama(), dist.get_rank(), 2, torch.device("cpu"))
    with pytest.raises(ValueError, match=r"pipeline stage.*DistributedDataParallel or fully_shard"):
        replace_linear_with_align_lora(stage)


def checkpoint_some_layers(rank):
    """Two pending forwards, every second layer checkpointed; of each forward the ranks' batches are aligned."""
    sums = [Oracle(adapted(), lambda i, k=k: batch(2 * k + i)).gradients([0.5, 0.5], union=True) for k in range(2)]
    expected = {name: grad + 2 * sums[1][name] for name, grad in sums[0].items()}
    for wrap, reentrant in (("ddp", False), ("fsdp2", False), ("fsdp2", True)):  # DDP itself refuses the fourth
        model = adapted()
        model.activation_checkpointing_enable({"use_reentrant": reentrant}, every_n_layers=2)
        call = wrapped(model, wrap)
        two_pending_summed(lambda i, call=call: by_keyword(call, 2 * i + rank))
        assert error(gradients(model), expected) < EXACT, (wrap, reentrant)


def accumulate_exactly(rank, align):
    """Two micro-batches on each rank are aligned as one batch of four."""
    options = align | {"align_accumulation": "exact"}
    expected = Oracle(adapted(**options)).gradients([0.25] * 4, union=True)
    for wrap in ("ddp", "fsdp2"):
        model = adapted(**options)
        train_exactly(wrapped(model, wrap), [arguments(2 * rank), arguments(2 * rank + 1)])
        assert error(gradients(model), expected) < EXACT, (align, wrap)


def accumulate_with_a_queue(rank, align):
    """The last micro-batches of both ranks join as constants."""
    options = align | {"align_accumulation": "queue", "align_queue": 1}
    model, oracle, past = adapted(**options), Oracle(adapted(**options)), []
    call = wrapped(model, "ddp")
    for k in range(3):
        model.zero_grad()
        by_keyword(call, 2 * k + rank)().backward()
        oracle.model.zero_grad()
        parts = [oracle.forward(2 * k + i) for i in range(2)]
        of_step = [(outputs, task) for _, outputs, task in parts]
        layers = [together(same) for same in zip(*(outputs for outputs, _ in of_step + past), strict=True)]
        lm = sum(lm for lm, _, _ in parts) / 2
        (lm + oracle.extra(layers, torch.cat([task for _, task in of_step + past]), WEIGHT)).backward()
        assert error(gradients(model), gradients(oracle.model)) < EXACT, (align, k)
        past = [([Output(o.low, [z.detach() for z in o.latents], None) for o in outputs], t) for outputs, t in of_step]
