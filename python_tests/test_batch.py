"""The alignment reaches every adapter exactly, whatever the training loop does (docs/numerics.md)."""

import copy
import functools
import pickle
from typing import get_args

import pytest
import torch
from processes import spawn
from tiny import TASKS, WEIGHT, Oracle, adapted, batch, error, gradients, literal_kl, llama
from torch import nn

from align_ext import align_parts, align_step, replace_linear_with_align_lora, unload
from align_ext.adapters.base import Adapter
from align_ext.architectures import Architecture

EXACT = 1e-11  # float64; the oracle is the literal sum over pairs, differentiated by autograd
CHECKPOINTING = (None, "non-reentrant", "reentrant")


@functools.cache
def oracle_gradients(*weights, union=False):
    return Oracle(adapted()).gradients(list(weights), union)


def checkpointed(model, mode):
    if mode is not None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": mode == "reentrant"})
        model.enable_input_require_grads()
    return model


def by_context(model, seed):
    torch.manual_seed(seed)  # the dropout masks'
    inputs, tasks = batch(seed)
    with align_step(model, tasks, inputs["attention_mask"], inputs["labels"]) as step:
        lm = model(**inputs).loss
    return lambda: step.total(lm)


def by_keyword(model, seed):
    torch.manual_seed(seed)
    inputs, tasks = batch(seed)
    loss = model(**inputs, task_ids=tasks).loss
    return lambda: loss


def single(forward):
    forward(0)().backward()


def scaled(forward):
    (65536.0 * forward(0)()).backward()


def accumulated(forward):
    for seed in range(2):
        (forward(seed)() / 2).backward()


def two_pending_summed(forward):
    first, second = forward(0), forward(1)
    (first() + 2 * second()).backward()


def two_pending_reversed(forward):
    first, second = forward(0)(), forward(1)()
    (2 * second).backward()
    first.backward()


FLOWS = {
    single: (1,),
    scaled: (65536,),
    accumulated: (0.5, 0.5),
    two_pending_summed: (1, 2),
    two_pending_reversed: (1, 2),
}


def compiled_or_slow(mode, way):
    """Whether to compile a case: with recomputation that takes long, and one such case sees most of the same."""
    slow = mode is not None and (mode, way) != ("non-reentrant", by_keyword)
    return [(False, mode, way), pytest.param(True, mode, way, marks=[pytest.mark.slow] * slow)]


@pytest.mark.parametrize(
    ("compiled", "mode", "way"),
    [case for mode in CHECKPOINTING for way in (by_context, by_keyword) for case in compiled_or_slow(mode, way)],
)
def test_the_gradient_is_exact_in_every_mode(compiled, mode, way):
    torch._dynamo.reset()
    model = checkpointed(adapted(), mode)
    call = torch.compile(model, backend="aot_eager") if compiled else model
    for flow, weights in FLOWS.items():
        model.zero_grad()
        flow(functools.partial(way, call))
        assert error(gradients(model), oracle_gradients(*weights)) < EXACT, flow.__name__


def test_the_weight_moves_the_gradient_of_A_by_the_reference_amount():
    expected = {weight: Oracle(adapted()).gradients([1], align=weight) for weight in (0.0, WEIGHT, 10 * WEIGHT)}
    for weight, grads in expected.items():
        model = adapted(align_weight=weight)
        by_keyword(model, 0)().backward()
        assert error(gradients(model), grads) < EXACT
    with_align, without = expected[WEIGHT], expected[0.0]
    moved = [(with_align[n] - without[n]).norm() / without[n].norm() for n in without if "lora_A" in n]
    assert len(moved) == 6
    assert min(moved) > 1e-3  # every layer's A feels it


def test_a_second_backward_over_a_retained_graph_gives_the_same_gradient():
    model = adapted()
    loss = by_keyword(model, 0)()
    loss.backward(retain_graph=True)
    once = gradients(model)
    loss.backward()
    assert error(gradients(model), {n: 2 * g for n, g in once.items()}) < EXACT


def test_saved_tensor_hooks_change_nothing():
    model = adapted()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t.clone()):
        loss = by_keyword(model, 0)()
    loss.backward()
    assert error(gradients(model), oracle_gradients(1)) < EXACT


class Checkpointed(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, *args, **kwargs):
        return torch.utils.checkpoint.checkpoint(self.inner, *args, use_reentrant=False, **kwargs)


# multi_adapter alone has no loss, and its layers look for the step all the same.
@pytest.mark.parametrize("options", [{}, {"architecture": "multi_adapter"}])
def test_a_checkpoint_function_of_the_users_own_is_exact(options):
    model = adapted(**options)
    model.model.layers[0] = Checkpointed(model.model.layers[0])
    by_keyword(model, 0)().backward()
    actual = {name.replace("inner.", ""): grad for name, grad in gradients(model).items()}
    assert error(actual, Oracle(adapted(**options)).gradients([1])) < EXACT


@pytest.mark.parametrize("mode", CHECKPOINTING)
def test_dropout_and_alignment_survive_recomputation(mode):
    plain, recomputed = adapted(lora_dropout=0.3), checkpointed(adapted(lora_dropout=0.3), mode)
    for model in (plain, recomputed):
        by_keyword(model, 0)().backward()
    assert error(gradients(recomputed), gradients(plain)) < EXACT


@pytest.mark.parametrize("mode", CHECKPOINTING)
def test_autocast_moves_the_gradient_towards_the_float32_one(mode):
    """Under bf16 autocast the alignment's part of A's gradient is the float32 one up to bf16's rounding."""

    def part(**autocast):
        grads = []
        for weight in (0.0, 10.0):
            model = checkpointed(adapted(dtype=torch.float32, align_weight=weight), mode)
            with torch.autocast("cpu", torch.bfloat16, **autocast):
                loss = by_keyword(model, 0)()
            loss.backward()
            grads.append(gradients(model))
        return {name: grads[1][name] - grads[0][name] for name in grads[0] if "lora_A" in name}

    low, full = part(enabled=True), part(enabled=False)
    for name in full:
        cosine = nn.functional.cosine_similarity(low[name].flatten(), full[name].flatten(), dim=0)
        assert cosine > 0.99, name
        assert abs(low[name].norm() / full[name].norm() - 1) < 0.05, name


def test_torch_compile_does_not_recompile_from_step_to_step():
    torch._dynamo.reset()
    model = adapted()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    counts = []
    for seed in range(4):
        by_context(compiled, seed)().backward()
        counts.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert counts[0] == counts[-1]


def test_ids_per_token_equal_ids_per_sample():
    model, (inputs, tasks) = adapted(), batch()
    model(**inputs, task_ids=tasks[:, None].expand(6, 10)).loss.backward()
    assert error(gradients(model), oracle_gradients(1)) < EXACT


def test_padding_is_taken_from_the_models_own_mask():
    model, (inputs, tasks) = adapted(), batch()
    with align_step(model, tasks) as step:
        lm = model(**inputs).loss
    step.total(lm).backward()
    assert error(gradients(model), oracle_gradients(1)) < EXACT


def test_padding_is_found_in_positional_arguments_too():
    inputs, tasks = batch()
    ids, mask, labels = inputs.values()
    model = adapted()
    model(ids, mask, labels=labels, task_ids=tasks).loss.backward()
    assert error(gradients(model), oracle_gradients(1)) < EXACT
    model.zero_grad()
    with align_step(model, tasks) as step:
        lm = model(ids, mask, labels=labels, task_ids=None).loss
    step.total(lm).backward()
    assert error(gradients(model), oracle_gradients(1)) < EXACT


def test_a_tuple_of_outputs_holds_the_total_too():
    model, (inputs, tasks) = adapted(), batch()
    model(**inputs, task_ids=tasks, return_dict=False)[0].backward()
    assert error(gradients(model), oracle_gradients(1)) < EXACT


def test_a_backward_inside_autocast_changes_nothing():
    model = adapted()
    loss = by_keyword(model, 0)()
    with torch.autocast("cpu", torch.bfloat16):
        loss.backward()
    assert error(gradients(model), oracle_gradients(1)) < 1e-2  # the model's own products round to bf16 there
    single, double = adapted(dtype=torch.float32), adapted(dtype=torch.float32)
    for m, region in ((single, False), (double, True)):
        loss = by_keyword(m, 0)()
        with torch.autocast("cpu", torch.bfloat16, enabled=region):
            loss.backward()
    assert error(gradients(double), gradients(single)) < 2e-2


def test_the_default_compiler_trains_with_alignment():
    torch._dynamo.reset()
    plain, model = adapted(dtype=torch.float32), adapted(dtype=torch.float32)
    by_context(plain, 0)().backward()
    by_context(torch.compile(model), 0)().backward()
    assert error(gradients(model), gradients(plain)) < 1e-4


def test_the_default_compilers_forward_and_backward_drop_the_same():
    """The gradient along itself is the slope of the loss: masks that differ would give another."""
    torch._dynamo.reset()
    model = adapted(dtype=torch.float32, lora_dropout=0.3)
    compiled = torch.compile(model)

    def loss():
        return by_context(compiled, 0)()

    loss().backward()
    A = model.get_submodule("model.layers.0.mlp.gate_proj").adapter.lora_A
    step = 2e-3 * A.grad / A.grad.norm()
    values = []
    with torch.no_grad():
        for sign in (1, -1):
            A.add_(sign * step)
            with torch.enable_grad():
                values.append(loss().item())
            A.sub_(sign * step)
    assert (values[0] - values[1]) / 4e-3 == pytest.approx(A.grad.norm().item(), rel=2e-2)


def test_response_only_counts_the_tokens_with_a_label():
    inputs, tasks = batch()
    inputs["labels"][:, :5] = -100
    model = adapted(response_only=True)
    model(**inputs, task_ids=tasks)
    oracle = Oracle(adapted())
    oracle.model(**inputs)
    token_tasks = torch.where(inputs["labels"] != -100, tasks[:, None], -1).flatten()
    expected = torch.stack([literal_kl(z, token_tasks) for z in oracle.latents]).mean()
    assert align_parts(model).align == pytest.approx(expected.item(), rel=1e-10)


@pytest.mark.parametrize("architecture", get_args(Architecture))
def test_every_architecture_tells_its_parts_whether_or_not_it_aligns(architecture):
    for align in (None, "kl"):
        model, (inputs, tasks) = adapted(architecture=architecture, align=align), batch()
        assert align_parts(model) is None, "no step has been trained"
        total = model(**inputs, task_ids=tasks).loss
        parts = align_parts(model)
        assert (parts.align > 0, parts.pairs) == ((True, TASKS * (TASKS - 1) / 2) if align else (False, None))
        extra = 0.01 * (parts.balance or 0) + 2e-3 * (parts.spectral or 0) + 0.1 * (parts.orthogonality or 0)
        assert total.item() == pytest.approx(parts.lm + parts.weight * parts.align + extra, rel=1e-6)
        model.eval()(**inputs, task_ids=tasks)
        assert align_parts(model) == parts, "evaluation is no training step"


def test_the_parts_add_up():
    model, (inputs, tasks) = adapted(), batch()
    total = model(**inputs, task_ids=tasks).loss
    parts = align_parts(model)
    oracle = Oracle(adapted())
    lm, outputs, token_tasks = oracle.forward(0)
    kls = [oracle.alignment(output, token_tasks).item() for output in outputs]
    assert parts.lm == pytest.approx(lm.item(), rel=1e-6)  # transformers computes it in float32
    assert list(parts.per_layer.values()) == pytest.approx(kls, rel=1e-10)
    assert parts.align == pytest.approx(sum(kls) / len(kls), rel=1e-10)
    assert sum(parts.per_task) == pytest.approx(2 * parts.align, rel=1e-10)
    assert total.item() == pytest.approx(parts.lm + WEIGHT * parts.align, rel=1e-6)
    assert len(parts.per_task) == TASKS
    assert "model.layers.0.mlp.gate_proj" in parts.per_layer


def test_scale_and_weight_multiply_the_alignment():
    model = adapted()
    inputs, tasks = batch()
    with align_step(model, tasks) as step:
        lm = model(**inputs).loss
    step.total(lm, weight=10 * WEIGHT, scale=0.1).backward()
    assert error(gradients(model), oracle_gradients(1)) < EXACT


def test_evaluation_has_no_dropout_and_training_has():
    model, (inputs, tasks) = adapted(lora_dropout=0.5), batch()
    training = [model(**inputs, task_ids=tasks).logits for _ in range(2)]
    evaluated = [model.eval()(**inputs).logits for _ in range(2)]
    assert not torch.equal(*training)
    assert torch.equal(*evaluated)
    assert torch.equal(evaluated[0], adapted(lora_dropout=0.0).eval()(**inputs).logits)


def test_evaluation_and_generation_need_no_ids():
    model, (inputs, tasks) = adapted(), batch()
    model.eval()
    assert torch.equal(model(**inputs).loss, model(**inputs, task_ids=tasks).loss)
    prompt = inputs["input_ids"][:1, :4]
    out = model.generate(prompt, max_new_tokens=3, do_sample=False, pad_token_id=0)
    model.train()
    assert torch.equal(out, model.generate(prompt, max_new_tokens=3, do_sample=False, pad_token_id=0))


# ------------------------------------------------------------------------------------------------------ the model


def test_the_number_of_tasks_can_be_learned_from_the_ids():
    model = adapted(num_tasks=None)
    by_keyword(model, 0)().backward()
    assert error(gradients(model), oracle_gradients(1)) < EXACT


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_trains_by_itself(duplicate):
    model = adapted()
    by_keyword(model, 1)()  # a step has been there
    twin = duplicate(model)
    assert twin.align_state is not model.align_state
    assert all(m.state is twin.align_state for m in twin.modules() if isinstance(m, Adapter))
    by_keyword(twin, 0)().backward()
    assert error(gradients(twin), oracle_gradients(1)) < EXACT
    assert gradients(model) == {}
    unload(twin)
    assert not twin._forward_pre_hooks
    assert not twin._forward_hooks_with_kwargs
    assert model._forward_pre_hooks


def test_layers_of_different_rank_share_a_step():
    from peft import LoraConfig, get_peft_model

    peft = LoraConfig(r=4, lora_alpha=8, target_modules=["up_proj", "down_proj"], rank_pattern={"down_proj": 2})
    torch.manual_seed(5)
    model = get_peft_model(llama().double(), peft).double()
    replace_linear_with_align_lora(model, align_weight=WEIGHT, num_tasks=TASKS)
    model.train()
    twin = copy.deepcopy(model)
    by_keyword(model, 0)().backward()
    assert error(gradients(model), Oracle(twin).gradients([1])) < EXACT


# -------------------------------------------------------------------------------------------- several processes


def test_two_processes_give_the_gradient_of_the_union_batch(unused_port):
    from ranks import train_on_rank  # a module of its own, which the processes can import by name

    spawn(train_on_rank, unused_port)
