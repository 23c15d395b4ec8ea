"""What is aligned under gradient accumulation: each micro-batch, the last ones too, or all of a step as one batch."""

import copy

import pytest
import torch
from literal import Output
from test_batch import EXACT, checkpointed
from tiny import WEIGHT, Oracle, adapted, batch, error, gradients, together

from align_ext import align_statistics, align_step

LOSSES = {"kl": {"align": "kl"}, "mmd": {"align": "mmd", "mmd_n_max": 8}}


def arguments(seed):
    inputs, tasks = batch(seed)
    return {**inputs, "task_ids": tasks}


def train_exactly(model, batches):
    union = align_statistics(model, batches)
    for inputs, part in union.replay():
        with align_step(model, inputs.pop("task_ids"), inputs["attention_mask"]) as step:
            loss = model(**inputs).loss
        step.total(loss / len(union), scale=1 / len(union), of=part).backward()


@pytest.mark.parametrize("mode", [None, "non-reentrant", "reentrant"])
@pytest.mark.parametrize("align", LOSSES)
def test_exact_gives_the_gradient_of_the_one_big_batch(align, mode):
    options = LOSSES[align] | {"align_accumulation": "exact"}
    model = checkpointed(adapted(**options), mode)
    train_exactly(model, [arguments(0), arguments(1)])
    assert error(gradients(model), Oracle(adapted(**options)).gradients([0.5, 0.5], union=True)) < EXACT


def test_exact_draws_the_masks_of_the_first_pass_again():
    """The gradient along itself is the slope of the loss of the two forwards with the same masks."""
    model = adapted(lora_dropout=0.3, align_accumulation="exact", align_weight=3.0)
    batches = [arguments(0), arguments(1)]

    def losses():
        torch.manual_seed(5)
        union = align_statistics(model, batches)
        for inputs, part in union.replay():
            with align_step(model, inputs.pop("task_ids"), inputs["attention_mask"]) as step:
                loss = model(**inputs).loss
            yield step.total(loss / 2, scale=0.5, of=part)

    for loss in losses():
        loss.backward()
    A = model.get_submodule("model.layers.0.mlp.gate_proj").adapter.lora_A
    eps = 1e-3
    values = []
    for sign in (1, -1):
        with torch.no_grad():
            A.add_(sign * eps / A.grad.norm() * A.grad)
        values.append(sum(loss.item() for loss in losses()))
        with torch.no_grad():
            A.sub_(sign * eps / A.grad.norm() * A.grad)
    assert (values[0] - values[1]) / (2 * eps) == pytest.approx(A.grad.norm().item(), rel=1e-2)


def test_exact_without_the_first_pass_is_an_error():
    model = adapted(align_accumulation="exact")
    with pytest.raises(RuntimeError, match=r"union = align_statistics\(model, batches\)"):
        model(**arguments(0))


@pytest.mark.parametrize("align", LOSSES)
def test_a_queue_joins_the_last_micro_batches_as_constants(align):
    options = LOSSES[align] | {"align_accumulation": "queue", "align_queue": 2}
    model, oracle, past = adapted(**options), Oracle(adapted(**options)), []
    for seed in range(4):
        model.zero_grad()
        model(**arguments(seed)).loss.backward()
        oracle.model.zero_grad()
        lm, outputs, task = oracle.forward(seed)
        layers = [together(parts) for parts in zip(outputs, *(old for old, _ in past[-2:]), strict=True)]
        tasks = torch.cat([task, *(ids for _, ids in past[-2:])])
        (lm + oracle.extra(layers, tasks, WEIGHT)).backward()
        assert error(gradients(model), gradients(oracle.model)) < EXACT, seed
        past.append(([Output(o.low, [z.detach() for z in o.latents], None) for o in outputs], task))


def test_a_copy_of_a_model_starts_with_an_empty_queue():
    model = adapted(align_accumulation="queue")
    model(**arguments(0)).loss.backward()
    assert len(model.align_state.queue) == 1
    assert len(copy.deepcopy(model).align_state.queue) == 0


def test_statistics_need_alignment_and_batches():
    with pytest.raises(ValueError, match="has no alignment"):
        align_statistics(adapted(align=None), [arguments(0)])
    with pytest.raises(ValueError, match="batches is empty"):
        align_statistics(adapted(), [])


def test_the_first_pass_leaves_buffers_as_they_were():
    model = adapted(align_accumulation="exact")
    norm = model.model.norm
    norm.register_buffer("seen", torch.tensor(0))
    norm.register_buffer("last", None)

    def see(module, inputs):
        module.seen += 1
        module.last = inputs[0].detach().mean()

    norm.register_forward_pre_hook(see)
    seen = norm.seen
    align_statistics(model, [arguments(seed) for seed in range(3)])
    assert norm.seen is seen
    assert (int(seen), norm.last) == (0, None)
