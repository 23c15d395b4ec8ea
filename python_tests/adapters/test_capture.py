"""capture_latents: what adapters compute on the way, in training and evaluation, and nothing else changes."""

import pytest
import torch
from architectures import ARCHITECTURES
from tiny import adapted, batch, gradients
from torch import nn

from align_ext import align_step, capture_latents
from align_ext.adapters.adapted_block import adapted_layers


def run(model, seed=0):
    inputs, tasks = batch(seed)
    with align_step(model, tasks, inputs["attention_mask"]) as step:
        loss = model(**inputs).loss
    step.total(loss).backward()


def test_a_lora_layers_latents_are_x_A():
    model = adapted(lora_dropout=0.0).eval()
    name = "model.layers.1.mlp.up_proj"
    layer, seen = model.get_submodule(name), []
    handle = layer.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad(), capture_latents(model) as latents:
        model(**batch()[0])
    handle.remove()
    assert latents.keys() == adapted_layers(model).keys()
    assert latents[name].w is None
    torch.testing.assert_close(latents[name].z, seen[0].flatten(0, 1) @ layer.adapter.lora_A.T)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("training", [True, False])
def test_every_architecture_shows_its_latents_and_routers(architecture, training):
    model = adapted(**{"lora_dropout": 0.1, **ARCHITECTURES[architecture]}).train(training)
    inputs, tasks = batch()
    with torch.set_grad_enabled(training), capture_latents(model) as latents:
        model(**inputs, task_ids=tasks)
    layers = adapted_layers(model)
    assert latents.keys() == layers.keys()
    for name, (z, w) in latents.items():
        adapter = layers[name].adapter
        assert (z.shape[0], z.shape[-1]) == (inputs["input_ids"].numel(), adapter.r)
        assert (w is not None) == (getattr(adapter, "lora_router", None) is not None)
        if w is not None:
            torch.testing.assert_close(w.sum(-1), torch.ones_like(w[..., 0]))


@pytest.mark.parametrize("align", ["kl", "mmd"])
def test_training_under_a_capture_is_the_same_to_the_bit(align):
    plain, captured = (adapted(align=align, mmd_n_max=8) for _ in range(2))
    torch.manual_seed(3)
    run(plain)
    torch.manual_seed(3)
    with capture_latents(captured) as latents:
        run(captured)
    expected, found = gradients(plain), gradients(captured)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert not any(z.requires_grad for z, _ in latents.values())


def test_after_the_context_nothing_is_captured_even_if_it_raised():
    model = adapted()
    with pytest.raises(KeyError), capture_latents(model) as latents:
        raise KeyError
    run(model)
    assert not latents
    assert all(layer.adapter.capture is None for layer in adapted_layers(model).values())


def test_a_model_without_adapters_is_refused():
    with pytest.raises(ValueError, match="the model has no adapters"), capture_latents(nn.Linear(2, 2)):
        pass
