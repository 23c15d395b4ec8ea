"""The node by which a step's gradients reach a layer: y as it is, dz and dw of the step, whatever runs round it."""

import gc
import weakref

import pytest
import torch
from heads_cases import call, leaves_of, make
from test_batch import EXACT, by_context, oracle_gradients
from tiny import adapted, error, gradients
from torch import nn

from align_ext import align_step
from align_ext.alignment.tap import LATENT, WEIGHTS, as_key, register_step, tap

OPS = {  # op: its options, and whether it has a router
    "grouped_lora": ({}, {}),
    "dropout_sum": ({"site": "input_per_head"}, {"site": "input_per_head", "dropout_p": 0.3}),
    "routed_lora": ({"groups": 2, "A_per_head": True}, {"top_k": 2}),
}


class GivenStep:
    """A step that has one gradient to give for each output of layer 2."""

    def __init__(self, dz, dw=None):
        self.given, self.asked = {LATENT: dz, WEIGHTS: dw}, []
        self.number = register_step(self)
        self.key = as_key(self.number)

    def pop_gradient(self, layer, output):
        self.asked.append((layer, output))
        return self.given[output]


class Layer:
    layer, layer_key = 2, as_key(2)


def inputs_of(op):
    options, of_op = OPS[op]
    inputs = make((20, 16, 12, 4, 3), torch.float32, **options)
    return inputs | ({"B": inputs["B"][0]} if op == "grouped_lora" else {}), of_op


def test_a_hand_computed_case():
    x = torch.tensor([[1.0, 2.0]], requires_grad=True)
    y, z, w = 3 * x, x * x, x + 1  # dx = 3 dy + 2 x dz + dw
    step = GivenStep(torch.tensor([[10.0, 100.0]]), torch.tensor([[0.5, 0.25]]))
    out = tap(y, z, w, step, Layer)
    assert torch.equal(out, y)
    out.backward(torch.tensor([[1.0, -1.0]]))
    assert x.grad.tolist() == [[3 + 20 + 0.5, -3 + 400 + 0.25]]
    assert sorted(step.asked) == [(2, LATENT), (2, WEIGHTS)]


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("op", OPS)
def test_an_operators_gradients_are_those_of_a_loss_on_its_outputs(op, compiled):
    torch._dynamo.reset()
    inputs, options = inputs_of(op)
    leaves, expected = leaves_of(inputs), results_of(op, inputs, options)
    step = GivenStep(inputs["dz"].clone(), inputs.get("dw"))

    def layer(leaves):
        y, z, *w = call(op, leaves, **options)
        return tap(y, z, w[0] if w else None, step, Layer)

    y = (torch.compile(layer, backend="aot_eager", fullgraph=True) if compiled else layer)(leaves)
    y.backward(inputs["dy"])
    for name in ("x", "A", "B", "R"):
        if name in expected:
            assert torch.equal(leaves[name].grad, expected[name]), name


def results_of(op, inputs, options):
    leaves = leaves_of(inputs)
    outputs = call(op, leaves, **options)
    torch.autograd.backward(outputs, [inputs[name] for name, _ in zip(("dy", "dz", "dw"), outputs, strict=False)])
    return {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}


def test_y_is_not_copied_and_may_be_changed_in_place():
    inputs, _ = inputs_of("grouped_lora")
    leaves, step = leaves_of(inputs), GivenStep(None)
    y, z = call("grouped_lora", leaves)
    out = tap(y, z, None, step, Layer)
    assert out.data_ptr() == y.data_ptr()
    out.mul_(2.0).relu_().sum().backward()
    again = leaves_of(inputs)
    call("grouped_lora", again)[0].mul(2.0).relu().sum().backward()
    assert torch.equal(leaves["x"].grad, again["x"].grad)
    assert torch.equal(leaves["A"].grad, again["A"].grad)


def test_a_models_layers_may_be_followed_by_changes_in_place():
    model = adapted(dtype=torch.float32)
    layer = model.get_submodule("model.layers.0.mlp.gate_proj")
    with align_step(model, torch.tensor([0, 1, 0])):
        y = layer(torch.randn(3, 5, layer.in_features))
        nn.functional.silu(y, inplace=True)
        y += 1
    assert y.requires_grad


def test_a_graph_keeps_no_step_and_without_one_it_says_so():
    x = torch.ones(1, 2, requires_grad=True)
    step = GivenStep(torch.ones(1, 2))
    out, gone = tap(3 * x, x * x, None, step, Layer), weakref.ref(step)
    del step
    gc.collect()
    assert gone() is None
    with pytest.raises(RuntimeError, match="its alignment step is gone"):
        out.sum().backward()


def test_nothing_is_saved_that_the_operator_does_not_save():
    inputs, _ = inputs_of("grouped_lora")

    def bytes_saved(with_tap):
        saved, leaves, step = {}, leaves_of(inputs), GivenStep(None)

        def pack(tensor):
            saved[tensor.untyped_storage().data_ptr()] = tensor.nbytes
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            y, z = call("grouped_lora", leaves)
            y = tap(y, z, None, step, Layer) if with_tap else y
        return sum(saved.values())

    assert bytes_saved(True) == bytes_saved(False)


@pytest.mark.parametrize("hooks", ["copies", "offloaded"])
def test_saved_tensor_hooks_change_nothing(hooks):
    model = adapted()
    copies = torch.autograd.graph.saved_tensors_hooks(torch.clone, torch.clone)
    with copies if hooks == "copies" else torch.autograd.graph.save_on_cpu():
        loss = by_context(model, 0)()
    loss.backward()
    assert error(gradients(model), oracle_gradients(1)) < EXACT
