"""The queue of statistics takes what a step leaves only when the step went well."""

import pytest
import torch
from tiny import adapted, batch

from align_ext import align_step


def queue_of(model):
    return len(model.align_state.queue)


@pytest.mark.parametrize("align", ["kl", "mmd"])
def test_a_step_that_did_not_go_well_leaves_nothing(align):
    model = adapted(align=align, align_accumulation="queue")
    inputs, ids = batch()
    loss = model(**inputs, task_ids=ids).loss
    assert queue_of(model) == 0, "it is not differentiated yet"
    del loss
    with align_step(model, ids, inputs["attention_mask"]) as step:
        step.total(model(**inputs).loss)
    assert queue_of(model) == 0
    (model(**inputs, task_ids=ids).loss * float("nan")).backward()
    handle = model.model.embed_tokens.register_forward_hook(lambda m, a, out: out * float("nan"))
    model(**inputs, task_ids=ids).loss.backward()
    handle.remove()
    before = queue_of(model)

    def fails(gradient):
        raise RuntimeError("in the backward")

    model.model.layers[0].mlp.up_proj.adapter.lora_A.register_hook(fails)
    with pytest.raises(RuntimeError, match="in the backward"):
        model(**inputs, task_ids=ids).loss.backward()
    assert queue_of(model) == before
    assert all(torch.isfinite(t).all() for s in model.align_state.queue for t in s.to_tensors().values())


def test_a_step_that_went_well_is_kept_once():
    model = adapted(align_accumulation="queue", align_queue=2)
    inputs, ids = batch()
    for _ in range(3):
        loss = model(**inputs, task_ids=ids).loss
        loss.backward()
    assert queue_of(model) == 2
