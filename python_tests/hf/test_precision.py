"""16-bit training: gradients of both losses as near to float64 as a literal PyTorch model's in the same precision."""

import pytest
import torch
from hf.trainers import Gradients
from hf.words import tokenizer
from tiny import WEIGHT, Oracle, adapted, batch, gradients, literal_kl

from align_ext import AlignTrainer, TaskCollator, align_step
from align_ext.training.arguments import align_training_arguments


def literal_gradients(precision):
    """Of the literal model: in float64 (None), or by autocast with the alignment computed in float64 from its z."""
    model = adapted(dtype=torch.float32)
    oracle = Oracle(model if precision else model.double())
    with torch.autocast("cpu", precision or torch.bfloat16, enabled=precision is not None):
        lm, _, task = oracle.forward(0)
    latents = [z.double() for z in oracle.latents]
    total = lm + WEIGHT * sum(literal_kl(z, task) for z in latents) / len(latents)
    total.backward()
    return {name: g.double() for name, g in gradients(oracle.model).items()}


def error(found, exact):
    """The largest relative error of a parameter's gradient, in the 2-norm."""
    assert found.keys() == exact.keys()
    return max(float((found[name] - g).norm() / g.norm()) for name, g in exact.items())


def rows():
    """The tiny batch without its padding."""
    inputs, tasks = batch()
    for mask, task, ids, labels in zip(inputs["attention_mask"] == 1, tasks, inputs["input_ids"], inputs["labels"],
                                       strict=True):  # fmt: skip
        tokens = {"input_ids": ids[mask].tolist(), "labels": labels[mask].tolist()}
        yield tokens | {"attention_mask": [1] * int(mask.sum()), "task_ids": int(task)}


def by_trainer(folder, kept, use_cpu=True):
    """AlignTrainer with bf16=True."""
    own = {"max_steps": 1, "per_device_train_batch_size": 6, "max_grad_norm": 0.0, "learning_rate": 0.0}
    arguments = align_training_arguments(str(folder), **own, save_strategy="no", use_cpu=use_cpu, bf16=True)
    collator = TaskCollator(tokenizer())
    model = adapted(dtype=torch.float32)
    return AlignTrainer(
        model=model, args=arguments, train_dataset=list(rows()), data_collator=collator, in_order=True, callbacks=[kept]
    )


def by_sft(folder, kept, use_cpu=True):
    """AlignSFTTrainer with bf16=True."""
    import datasets
    from hf import sft_trainers

    data = datasets.Dataset.from_list(list(rows())).remove_columns("attention_mask")
    model = adapted(dtype=torch.float32)
    return sft_trainers.trainer(folder, data, [kept], model=model, bf16=True, use_cpu=use_cpu)


@pytest.mark.parametrize("build", [by_trainer, by_sft])
def test_in_bf16_the_trainers_gradients_are_within_the_rounding_of_a_literal_model(tmp_path, build):
    kept = Gradients()
    build(tmp_path, kept).train()
    exact = literal_gradients(None)
    plain = error(literal_gradients(torch.bfloat16), exact)
    assert 1e-3 < plain < 0.1
    assert error({name: g.double() for name, g in kept.steps[0].items()}, exact) <= 2 * plain


def test_in_fp16_with_a_scaled_loss_so_are_a_loops():
    model, (inputs, tasks) = adapted(dtype=torch.float32), batch()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    with torch.autocast("cpu", torch.float16), align_step(model, tasks) as step:
        loss = model(**inputs).loss
    scaler.scale(step.total(loss)).backward()
    exact, plain = literal_gradients(None), error(literal_gradients(torch.float16), literal_gradients(None))
    scaled = {name: g.double() / 1024 for name, g in gradients(model).items()}
    assert error(scaled, exact) <= 2 * plain
    assert plain < 0.02
    scaler.unscale_(optimizer)
    assert error({name: g.double() for name, g in gradients(model).items()}, exact) <= 2 * plain
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    scaler.step(optimizer)
    moved = {name: (before[name] - p).double() for name, p in model.named_parameters() if p.requires_grad}
    assert error({name: p.detach() for name, p in moved.items()}, exact) <= 2 * plain + 1e-4


def test_in_fp16_an_overflow_of_the_scaled_loss_skips_the_step():
    model, (inputs, tasks) = adapted(dtype=torch.float32), batch()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    with torch.autocast("cpu", torch.float16), align_step(model, tasks) as step:
        loss = model(**inputs).loss
    scaler.scale(step.total(loss)).backward()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    scaler.step(optimizer)
    scaler.update()
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert scaler.get_scale() < 2.0**40
