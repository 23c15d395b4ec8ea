"""What goes wrong with task ids is loud, never a silent zero."""

import pytest
import torch
from test_batch import CHECKPOINTING, EXACT, checkpointed, oracle_gradients
from tiny import Oracle, adapted, batch, error, gradients, llama

from align_ext import align_step, replace_linear_with_align_lora


def test_training_without_ids_is_an_error():
    model, (inputs, _) = adapted(), batch()
    with pytest.raises(RuntimeError, match="needs task ids"):
        model(**inputs)


@pytest.mark.parametrize("way", ["align_step", "task_ids="])
def test_training_where_no_adapter_is_trained_is_an_error(way):
    model, (inputs, tasks) = adapted(), batch()
    adapters = [p for p in model.parameters() if p.requires_grad]
    model.requires_grad_(False)
    model.lm_head.requires_grad_(True)

    def step():
        if way == "task_ids=":
            return model(**inputs, task_ids=tasks).loss
        with align_step(model, tasks) as opened:
            return opened.total(model(**inputs).loss)

    with pytest.raises(ValueError, match="no adapter of the model is trained"):
        step()
    assert model.align_state.current is None
    adapters[-1].requires_grad_(True)  # one of a layer's two is enough
    step()


@pytest.mark.parametrize("mode", CHECKPOINTING)
def test_a_recorded_loss_that_is_not_differentiated_is_an_error(mode):
    model, (inputs, tasks) = checkpointed(adapted(), mode), batch()
    with align_step(model, tasks):
        lm = model(**inputs).loss
    with pytest.raises(RuntimeError, match="not the alignment loss"):
        lm.backward()


def test_not_strict_allows_a_loss_without_alignment():
    model, (inputs, tasks) = adapted(), batch()
    with align_step(model, tasks, strict=False):
        lm = model(**inputs).loss
    lm.backward()
    assert error(gradients(model), Oracle(adapted()).gradients([1], align=0.0)) < EXACT


def test_a_step_that_is_gone_is_an_error():
    model, (inputs, tasks) = adapted(), batch()
    with align_step(model, tasks) as step:
        lm = model(**inputs).loss
    model.align_state.last = None
    del step  # as after the next step's opening
    with pytest.raises(RuntimeError, match="its alignment step is gone"):
        lm.backward()


def test_two_forwards_in_one_step_are_an_error():
    model, (inputs, tasks) = adapted(), batch()
    with align_step(model, tasks):
        model(**inputs)
        with pytest.raises(
            RuntimeError, match=r"'model\.layers\.0\.mlp\.gate_proj' ran twice.*several times .*align=None"
        ):
            model(**inputs)


def test_ids_given_twice_are_an_error():
    model, (inputs, tasks) = adapted(), batch()
    with align_step(model, tasks), pytest.raises(RuntimeError, match="given twice"):
        model(**inputs, task_ids=tasks)


def test_a_layer_that_did_not_run_is_named():
    model, (inputs, tasks) = adapted(), batch()
    with align_step(model, tasks) as step:
        x = model.model.embed_tokens(inputs["input_ids"]).requires_grad_()
        loss = model.model.layers[0].mlp(x).sum()
    with pytest.raises(RuntimeError, match=r"3 of 6 aligned layers did not run.*model\.layers\.1\.mlp\.gate_proj"):
        step.total(loss)


def test_a_loss_without_a_graph_is_an_error():
    model, (inputs, tasks) = adapted(), batch()
    with align_step(model, tasks) as step, torch.no_grad():
        lm = model(**inputs).loss
    with pytest.raises(RuntimeError, match="no graph"):
        step.total(lm)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (torch.tensor([0, 1, 2, 3, 0, 1]), "0 .. num_tasks-1 = 2"),
        (torch.tensor([0, 1, 2, -2, 0, 1]), "0 .. num_tasks-1 = 2"),
        (torch.tensor([0.0] * 6), "must be integers"),
        (torch.tensor(1), "must be integers"),
        (torch.tensor([0, 1, 2]), "do not fit a batch of"),
        (torch.zeros(6, 9, dtype=torch.int64), "do not fit a batch of"),
    ],
)
def test_bad_ids_are_named(ids, message):
    model, (inputs, _) = adapted(), batch()
    with pytest.raises(ValueError, match=message):
        model(**inputs, task_ids=ids)
    assert model.align_state.current is None


@pytest.mark.parametrize("task", [10_000, 2**40, 2**62])
def test_a_refused_id_leaves_the_number_of_tasks_as_it_was(task):
    model, (inputs, ids) = adapted(num_tasks=None), batch()
    model(**inputs, task_ids=ids).loss.backward()
    before = model.align_state.tasks
    with pytest.raises(ValueError, match=f"must be below 10000, got {task}"):
        model(**inputs, task_ids=ids.clamp_min(task))
    with pytest.raises(ValueError, match="must be in 0"):
        model(**inputs, task_ids=torch.tensor([0, 1, 5, -2, 0, 1]))
    assert model.align_state.tasks == before


def test_ids_of_another_number_of_tokens_are_an_error():
    model, (inputs, _) = adapted(), batch()
    del inputs["attention_mask"]
    for count in (7, 1):
        with pytest.raises(ValueError, match=rf"task_ids \[{count}\] do not fit a batch of 6 samples"):
            model(**inputs, task_ids=torch.zeros(count, dtype=torch.int64))


@pytest.mark.parametrize(
    "ids",
    ["ab", list("012012"), [0, None, 1], {}, [0, [1]], object(), torch.zeros(6, dtype=torch.complex64),
     torch.zeros(6, dtype=torch.int64, device="meta"), torch.zeros(6).bool(), [0.5] * 6, 3],
)  # fmt: skip
def test_what_are_no_task_ids_is_one_line_that_names_them(ids):
    model, (inputs, _) = adapted(), batch()
    with pytest.raises(ValueError, match="task_ids must be integers") as caught:
        model(**inputs, task_ids=ids)
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="task_ids must be integers"), align_step(model, ids):
        pass


def test_a_model_without_alignment_says_so():
    model, (inputs, tasks) = adapted(align=None), batch()
    model(**inputs).loss.backward()
    with pytest.raises(ValueError, match="alignment is off"), align_step(model, tasks):
        pass
    with pytest.raises(ValueError, match="no adapters"), align_step(llama(), tasks):
        pass


def test_an_exception_in_the_forward_closes_the_step():
    model, (inputs, tasks) = adapted(), batch()
    handle = model.model.layers[1].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(**inputs, task_ids=tasks)
    handle.remove()
    assert model.align_state.current is None
    model(**inputs, task_ids=tasks).loss.backward()
    assert error(gradients(model), oracle_gradients(1)) < EXACT


def test_the_tables_are_disarmed_when_a_backward_ends():
    """A second loss on the same graph gets no alignment gradient."""
    model, (inputs, tasks) = adapted(), batch()
    out = model(**inputs, task_ids=tasks)
    out.loss.backward(retain_graph=True)
    assert model.align_state.in_backward == []
    model.zero_grad()
    out.logits.square().mean().backward()
    oracle = Oracle(adapted())
    oracle.model(**inputs).logits.square().mean().backward()
    assert error(gradients(model), gradients(oracle.model)) < EXACT


def test_a_second_total_of_a_step_is_an_error():
    model, (inputs, tasks) = adapted(), batch()
    with align_step(model, tasks) as step:
        out = model(**inputs)
    step.total(out.loss)
    with pytest.raises(RuntimeError, match="has its total already"):
        step.total(out.logits.mean())


def test_layers_that_the_loss_does_not_reach_are_named():
    model, (inputs, tasks) = adapted(), batch()
    with align_step(model, tasks) as step:
        hidden = model(**inputs, output_hidden_states=True).hidden_states[1]
    with pytest.warns(UserWarning, match=r"did not reach 3 layers, the first is 'model\.layers\.1\.mlp\.gate_proj'"):
        step.total(hidden.square().mean()).backward()


def test_a_model_in_eval_mode_that_is_trained_is_noticed():
    model, (inputs, tasks) = adapted().eval(), batch()
    with pytest.warns(UserWarning, match=r"call model\.train\(\) first"):
        model(**inputs, task_ids=tasks).loss.backward()
    with pytest.raises(ValueError, match=r"call model\.train\(\) first"), align_step(model, tasks):
        pass


def test_a_mask_that_is_not_a_matrix_is_named():
    model, (inputs, tasks) = adapted(), batch()
    inputs["attention_mask"] = torch.ones(6, 1, 10, 10, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"attention_mask must be \[B, S\] to tell padding, got \[6, 1, 10, 10\]"):
        model(**inputs, task_ids=tasks)


def test_differentiating_twice_is_an_error():
    model, (inputs, tasks) = adapted(), batch()
    loss = model(**inputs, task_ids=tasks).loss
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        loss.backward(create_graph=True)


class SequenceFirst(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.fc = torch.nn.Embedding(50, 8), torch.nn.Linear(8, 8)

    def forward(self, input_ids, first=True):
        x = self.embed(input_ids)
        return self.fc(x.transpose(0, 1) if first else x).square().mean()


def test_a_first_batch_of_as_many_samples_as_tokens_does_not_tell_which_dimension_is_which():
    model = replace_linear_with_align_lora(SequenceFirst(), target_modules=["fc"], num_tasks=2, r=2).train()
    square, wide = torch.zeros(4, 4, dtype=torch.int64), torch.zeros(4, 5, dtype=torch.int64)
    ids = torch.tensor([0, 1, 0, 1])
    for inputs, message in ((square, "first dimension may be"), (wide, "not batch first")):
        with pytest.raises(RuntimeError, match=message), align_step(model, ids):
            model(inputs)
    for inputs in (wide, square):  # what a batch has shown holds for the next
        with align_step(model, ids) as step:
            loss = model(inputs, first=False)
        step.total(loss).backward()
