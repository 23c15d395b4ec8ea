"""The latents that the layers hand to their step: whose they are, and how long they live."""

import gc
import weakref

import pytest
import torch
from test_batch import EXACT, by_context, by_keyword, checkpointed, oracle_gradients
from tiny import adapted, batch, error, gradients

from align_ext import AlignLoraConfig, align_step, reference
from align_ext.losses.kl import KlStatistics
from align_ext.losses.tokens import TokenTasks


def forward(model):
    """A forward in a step; the step, the model's loss and weak references to the latents' memory."""
    inputs, tasks = batch()
    with align_step(model, tasks) as step:
        lm = model(**inputs).loss
    return step, lm, [weakref.ref(z.untyped_storage()) for z in step.recorded[0].values()]


def alive(references):
    gc.collect()
    return sum(reference() is not None for reference in references)


@pytest.mark.parametrize("mode", [None, "non-reentrant", "reentrant"])
def test_latents_go_when_their_loss_has_been_differentiated(mode):
    step, lm, latents = forward(checkpointed(adapted(), mode))
    total = step.total(lm)
    del lm
    assert alive(latents) == 6
    total.backward(retain_graph=True)
    assert alive(latents) == 6
    total.backward()
    assert alive(latents) == 0
    assert step._gradients is None


def test_latents_of_a_loss_that_nobody_differentiates_go_with_it():
    step, lm, latents = forward(adapted())
    total = step.total(lm)
    del total, lm
    assert alive(latents) == 0


def test_latents_of_a_step_without_total_go_when_the_next_one_opens():
    model = adapted()
    step, lm, latents = forward(model)
    del step, lm
    forward(model)
    assert alive(latents) == 0


def test_an_eager_layer_hands_over_z_itself_and_a_compiled_one_a_copy():
    torch._dynamo.reset()
    model = adapted(dtype=torch.float32)
    layer = model.get_submodule("model.layers.0.mlp.gate_proj")
    x = torch.randn(60, layer.in_features)
    for call, copies in ((layer, False), (torch.compile(layer, backend="aot_eager"), True)):
        with align_step(model, batch()[1]) as step, torch.profiler.profile() as profile:
            call(x)
        (z,) = step.recorded[0].values()
        assert not z.requires_grad
        torch.testing.assert_close(z, x @ layer.adapter.lora_A.T)
        assert copies == any(event.name == "align_ext::record_" for event in profile.events())
    with align_step(model, batch()[1]) as step:
        step.record(layer.adapter.layer, z)
        assert step.recorded[0][0] is z
    with align_step(model, batch()[1]) as step:
        torch.ops.align_ext.record_(step.written, z, step.key, layer.adapter.layer_key, 0)
        assert torch.equal(step.recorded[0][0], z)
        assert step.recorded[0][0].data_ptr() != z.data_ptr()


@pytest.mark.slow
@torch._functorch.config.patch(donated_buffer=False)  # what torch asks for before it retains a compiled graph
@torch._inductor.config.patch(force_disable_caches=True)  # which its cache of compiled graphs does not tell apart
def test_the_default_compiler_gives_the_same_gradient_over_a_retained_graph():
    torch._dynamo.reset()
    plain, model = adapted(dtype=torch.float32), adapted(dtype=torch.float32)
    compiled = torch.compile(model)
    for seed in range(2):
        for m, call in ((plain, plain), (model, compiled)):
            m.zero_grad()
            loss = by_context(call, seed)()
            loss.backward(retain_graph=True)
            loss.backward()
        assert error(gradients(model), gradients(plain)) < 1e-4


def test_saved_tensor_hooks_round_a_compiled_model_change_nothing():
    torch._dynamo.reset()
    model = adapted()
    call = torch.compile(model, backend="aot_eager")
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t.clone()):
        loss = by_keyword(call, 0)()
    loss.backward()
    assert error(gradients(model), oracle_gradients(1)) < EXACT


def test_layers_of_other_tokens_and_dtypes_take_calls_of_their_own():
    ids = torch.tensor([0, 1, 2, 0, 1, 2])
    tokens = TokenTasks(ids)
    sizes = [(60, 4, torch.float32), (30, 3, torch.float32), (60, 2, torch.float64), (60, 1, torch.float32)]
    generator = torch.Generator().manual_seed(0)
    latents = {i: torch.randn(t, r, generator=generator, dtype=d) for i, (t, r, d) in enumerate(sizes)}
    config = AlignLoraConfig(align_layers="sum")
    statistics = KlStatistics.of(latents, tokens, (5, 3, 4), config)
    assert statistics.moments.dtype == torch.float64
    assert (statistics.moments[4] == 0).all()
    dz = statistics.evaluate(config).gradients(latents, tokens, torch.tensor(3.0), 0.5)
    for layer, z in latents.items():
        task = ids.repeat_interleave(len(z) // 6)
        leaf = z.double().requires_grad_()
        (1.5 * reference.gaussian_kl(leaf, task, 3)).backward()
        assert (dz[layer] - leaf.grad).abs().max() < 16 * torch.finfo(z.dtype).eps * leaf.grad.abs().max()
    assert tokens.expand(ids.device, 60) is tokens.expand(ids.device, 60)
