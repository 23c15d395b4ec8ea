"""A tiny model and its AlignTrainer, and what each of several processes runs (imported there by name)."""

import json
import os

import torch
from hf.words import llama, tokenizer
from safetensors.torch import save_file
from tiny import gradients
from transformers import TrainerCallback

from align_ext import AlignTrainer, TaskCollator, align_step, replace_linear_with_align_lora
from align_ext.training.arguments import align_training_arguments

WEIGHT, NAMES = 0.3, ("even", "odd", "other")
ONE_STEP = {
    "per_device_train_batch_size": 6,
    "max_steps": 1,
    "learning_rate": 0.0,
    "max_grad_norm": 0.0,
    "logging_steps": 1,
    "save_strategy": "no",
    "use_cpu": True,
    "disable_tqdm": True,
}


def features(count=24, seed=0):
    """Texts of different lengths, of which a different share is supervised."""
    generator = torch.Generator().manual_seed(seed)
    result = []
    for i in range(count):
        length = int(torch.randint(5, 12, (), generator=generator))
        ids = torch.randint(3, 100, (length,), generator=generator).tolist()
        prompt = int(torch.randint(1, 4, (), generator=generator))
        labels = [-100] * prompt + ids[prompt:]
        result.append({"input_ids": ids, "attention_mask": [1] * length, "labels": labels, "task_ids": i // 2 % 3})
    return result


def adapted(align="kl", dtype=torch.float64, **options):
    model = llama(dtype)
    options = {"num_tasks": 3, "r": 4, "lora_dropout": 0.0, "align_weight": WEIGHT} | options
    replace_linear_with_align_lora(model, align=align, **options)
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


class Gradients(TrainerCallback):
    """Keeps the gradients that each optimizer step meets."""

    def __init__(self):
        self.steps = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **_):
        self.steps.append(gradients(model))


def trainer(tmp_path, model, rows, callbacks=(), eval_rows=None, arguments=None, **options):
    own = {"in_order": True, **(arguments or {})}
    result = AlignTrainer(
        model=model,
        args=align_training_arguments(str(tmp_path), **(ONE_STEP | options)),
        train_dataset=rows,
        eval_dataset=eval_rows,
        data_collator=TaskCollator(tokenizer()),
        task_names=NAMES,
        callbacks=list(callbacks),
        **own,
    )
    return result


def own_gradients(batch, weight, loss_of=lambda model, inputs: model(**inputs, use_cache=False).loss):
    """The gradients of lm + weight * align of one micro-batch alone."""
    model, inputs = adapted().train(), dict(batch)
    with align_step(model, inputs.pop("task_ids")) as step:
        loss = loss_of(model, inputs)
    step.total(loss, weight=weight).backward()
    return gradients(model)


def shared_gradients(batches, lm_shares, **loss):
    """Σ share * lm gradient + the mean of the micro-batches' alignment gradients."""
    total = {}
    for batch, share in zip(batches, lm_shares, strict=True):
        lm, both = own_gradients(batch, 0.0, **loss), own_gradients(batch, WEIGHT, **loss)
        for name in lm:
            part = share * lm[name] + (both[name] - lm[name]) / len(batches)
            total[name] = total.get(name, 0) + part
    return total


def logged(ran):
    return [entry for entry in ran.state.log_history if "lm_loss" in entry]


def step_and_evaluation(folder, world):
    """One optimizer step and an evaluation: its gradients, and every loss that was logged."""
    kept, rows = Gradients(), features()
    options = {"per_device_train_batch_size": 6 // world, "gradient_accumulation_steps": 2}
    ran = trainer(folder, adapted(), rows, [kept], eval_rows=rows[:21], **options)
    ran.train()
    losses = {name: value for name, value in (ran.evaluate() | logged(ran)[0]).items() if "loss" in name}
    return kept.steps[0], losses


def on_rank(rank, port, folder, run, *arguments):
    """Process `rank` of two: run(folder, 2, ...), whose gradients and losses the first one leaves in the folder."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    found, losses = run(folder, 2, *arguments)
    if rank == 0:
        save_file(found, folder / "gradients.safetensors")
        (folder / "losses.json").write_text(json.dumps(losses))


def diverges(folder, world):
    """A run of two processes with checkpoints, of which one's loss is not finite in the third step; what each says."""
    rank = int(os.environ["RANK"])
    options = {"per_device_train_batch_size": 3, "max_steps": 5, "save_strategy": "steps", "save_steps": 1}
    ran = trainer(folder, adapted(), features(), **options)
    own = ran.compute_loss

    def compute_loss(*args, **kwargs):
        loss = own(*args, **kwargs)
        # Its gradient stays finite, so that only the exchange of the losses can tell the other process.
        return loss if rank == 0 or ran.state.global_step < 2 else loss + (loss.detach() * float("nan"))

    ran.compute_loss = compute_loss
    try:
        ran.train()
        said = "nothing"
    except FloatingPointError as error:
        said = str(error)
    (folder / f"said-{rank}").write_text(said)
    return {}, {}
