"""mk_mmd of several layers in one call: the numbers that each has alone."""

import pytest
import torch
from ops.test_mk_mmd import DTYPES, make

from align_ext import ops, reference
from align_ext.ops.mk_mmd import mk_mmd_backward, mk_mmd_rows


def layers_of(tokens, ranks, dtype=torch.float32):
    """Latents that share tokens: of layers, and of heads, whose rows lie in those of one tensor."""
    z, task = make(tokens, sum(ranks), 3, dtype)
    return list(z.split(ranks, 1)), task


@pytest.mark.parametrize("compiled", [False, True])
def test_the_layers_of_a_list_have_the_bits_that_they_have_alone(device, compiled):
    torch._dynamo.reset()
    layers, task = layers_of(120, [6, 6, 2, 6])
    layers = [z.to(device).requires_grad_() for z in layers]

    def call(layers):
        return ops.mk_mmd(layers, task.to(device), 3)

    losses = (torch.compile(call, backend="aot_eager", fullgraph=True) if compiled else call)(layers)
    scale = torch.tensor([1.0, 3.0, 0.5, -2.0], device=device)
    gradients = torch.autograd.grad((losses * scale).sum(), layers)
    for z, loss, dz, factor in zip(layers, losses, gradients, scale, strict=True):
        alone = ops.mk_mmd(z, task.to(device), 3)
        (expected,) = torch.autograd.grad(alone * factor, z)
        if z.shape[1] == 6:  # on CUDA a smaller rank's bandwidth is added up in another order
            assert torch.equal(loss, alone)
            assert torch.equal(dz, expected)
        torch.testing.assert_close(loss, alone, rtol=1e-6, atol=0)
        torch.testing.assert_close(dz, expected, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_layers_of_a_list_match_the_literal_pairs(device, dtype):
    layers, task = layers_of(90, [5, 8], dtype)
    results = [
        op([z.to(of, kind) for z in layers], task.to(of), 3).cpu()
        for op, of, kind in ((ops.mk_mmd, device, dtype), (reference.mk_mmd, "cpu", torch.float64))
    ]
    torch.testing.assert_close(results[0].double(), results[1], rtol=1e-5, atol=1e-6)


def test_some_of_the_tokens_get_their_gradients_from_the_rows(device):
    layers, task = layers_of(80, [4, 3])
    layers, task = [z.to(device) for z in layers], task.to(device)
    losses, gradient, slot = mk_mmd_rows(layers, task, 3, n_max=9)
    whole = mk_mmd_backward(torch.ones_like(losses), gradient, slot, [4, 3], torch.float32)
    part = mk_mmd_backward(torch.ones_like(losses), gradient, slot[30:50], [4, 3], torch.float32)
    for of_layer, of_part in zip(whole, part, strict=True):
        assert of_layer.any()
        assert torch.equal(of_layer[30:50], of_part)


def test_layers_that_do_not_fit_are_refused(device):
    z, task = (t.to(device) for t in make(20, 4, 3))
    for layers, message in [
        ([], "z must hold the latent of one layer at least"),
        ([z, z[1:]], "z of every layer must have shape"),
        ([z, z.bfloat16()], "z of every layer must have the same dtype"),
        ([z, z[0]], "z must be .tokens, rank., got"),
    ]:
        with torch.no_grad(), pytest.raises(RuntimeError, match=message):
            ops.mk_mmd(layers, task, 3)
