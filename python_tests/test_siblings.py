"""Layers that a module calls with the same tensor are computed together: the same numbers, in every way of training."""

import copy
import gc
import pickle
import weakref
from functools import partial

import pytest
import torch
from test_batch import CHECKPOINTING, EXACT, FLOWS, by_keyword, checkpointed
from test_saved_bytes import Operators
from tiny import Oracle, adapted, batch, error, gradients, llama, qwen2
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from align_ext import AlignLoraConfig, disable_adapter, replace_linear_with_align_lora
from align_ext.adapters.lora import LoraAdapter
from align_ext.adapters.siblings import Siblings
from align_ext.bench.models import in_4_bits
from align_ext.model.merge import unload

EVERY = {"target_modules": "all-linear"}
JOINED = [("gate_proj", "up_proj"), ("q_proj", "k_proj", "v_proj")]


def groups_of(model):
    """The names of layers that are computed together."""
    return sorted({tuple(m.siblings.names) for m in model.modules() if getattr(m, "siblings", None) is not None})


@pytest.mark.parametrize(
    ("options", "groups"),
    [
        (EVERY, JOINED),
        (EVERY | {"exclude_modules": ["k_proj"]}, [("gate_proj", "up_proj"), ("q_proj", "v_proj")]),
        (EVERY | {"architecture": "lora"}, JOINED),
        ({"target_modules": ["up_proj", "down_proj"]}, []),
        (EVERY | {"share_inputs": False}, []),
        (EVERY | {"architecture": "lora", "init_lora_weights": "pissa"}, JOINED),
        (EVERY | {"architecture": "multi_adapter"}, []),
        (EVERY | {"architecture": "malora"}, []),
        (EVERY | {"architecture": "multilora"}, []),
        (EVERY | {"architecture": "nlora"}, []),
        (EVERY | {"architecture": "adalora"}, []),
    ],
)
def test_layers_are_joined_where_one_operator_computes_all(options, groups):
    assert groups_of(adapted(**options)) == groups


@pytest.mark.parametrize("mode", CHECKPOINTING)
@pytest.mark.parametrize("make", [llama, qwen2], ids=["llama", "qwen2 with biases"])
def test_every_mode_is_exact_with_and_without(make, mode):
    expected = {weights: Oracle(adapted(make(), **EVERY)).gradients(list(weights)) for weights in {*FLOWS.values()}}
    for share in (True, False):
        model = checkpointed(adapted(make(), share_inputs=share, **EVERY), mode)
        for flow, weights in FLOWS.items():
            model.zero_grad()
            flow(lambda seed, model=model: by_keyword(model, seed))
            assert error(gradients(model), expected[weights]) < EXACT, (share, flow.__name__)


@pytest.mark.parametrize("mode", CHECKPOINTING)
@pytest.mark.parametrize("architecture", ["lora", "align_lora", "r_lora"])
def test_what_is_recomputed_has_the_same_masks(architecture, mode):
    """lora has no step: its masks are drawn where its layers are computed, as often in a recomputation."""
    results = []
    for checkpointing in (None, mode):
        model = checkpointed(adapted(lora_dropout=0.3, architecture=architecture, **EVERY), checkpointing)
        torch.manual_seed(7)
        inputs, tasks = batch()
        ids = {} if architecture == "lora" else {"task_ids": tasks}
        model(**inputs, **ids).loss.backward()
        results.append(gradients(model))
    assert error(results[1], results[0]) < EXACT


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("architecture", ["lora", "align_lora"])
def test_with_dropout_the_gradient_is_that_of_the_equations(architecture, share):
    options = {"lora_dropout": 0.3, "architecture": architecture, "share_inputs": share, **EVERY}
    model, oracle = adapted(**options), Oracle(adapted(**options))
    torch.manual_seed(0)
    inputs, tasks = batch()
    ids = {"task_ids": tasks} if architecture == "align_lora" else {}
    model(**inputs, **ids).loss.backward()
    assert error(gradients(model), oracle.gradients([1])) < EXACT


def test_ranks_and_scalings_of_their_own():
    patterns = {"rank_pattern": {"k_proj": 2, "up_proj": 6}, "alpha_pattern": {"q_proj": 3}}
    found = [adapted(share_inputs=share, **patterns, **EVERY) for share in (True, False)]
    for model in found:
        by_keyword(model, 0)().backward()
    assert error(gradients(found[0]), gradients(found[1])) < EXACT


def calls(model, seed=0):
    """How often the operators of layers are called in a training step."""
    with Operators() as operators:
        by_keyword(model, seed)().backward()
    return {
        name.removeprefix("align_ext."): n for name, n in operators.calls.items() if "_lora" in name or "_sum" in name
    }


def test_a_layer_of_the_model_takes_four_operators_in_place_of_seven():
    together, each = calls(adapted(**EVERY)), calls(adapted(share_inputs=False, **EVERY))
    assert together == {"sibling_lora": 4, "sibling_lora_backward": 4, "grouped_lora": 4, "grouped_lora_backward": 4}
    assert each == {"grouped_lora": 14, "grouped_lora_backward": 14}


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_layers_of_dora_are_computed_together_where_all_see_x_itself(dropout):
    options = {"use_dora": True, "lora_dropout": dropout, **EVERY}
    model, called = adapted(**options), calls(adapted(**options))
    assert ("sibling_lora" in called) is (dropout == 0)
    by_keyword(model, 0)().backward()
    assert error(gradients(model), Oracle(adapted(**options)).gradients([1])) < EXACT


def kept(**options):
    """The bytes that a step keeps for backward beside the parameters."""
    model = adapted(**options)
    own, storages = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}

    def keep(tensor):
        if tensor.untyped_storage().data_ptr() not in own:
            storages[tensor.untyped_storage().data_ptr()] = (tensor.untyped_storage().nbytes(), tensor)
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        by_keyword(model, 0)
    assert not any(m.siblings._kept for m in model.modules() if getattr(m, "siblings", None) is not None)
    return sum(size for size, _ in storages.values())


def test_nothing_more_is_kept_for_backward_and_no_output_is_held():
    options = {"lora_dropout": 0.1, **EVERY}
    assert kept(**options) <= kept(share_inputs=False, **options)


def frozen(model):
    model.model.layers[0].self_attn.k_proj.adapter.requires_grad_(False)


def unloaded(model):
    attention = model.model.layers[0].self_attn
    attention.q_proj = attention.q_proj.base_layer


def merged(model):
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.merge()


def with_hooks(model):
    attention = model.model.layers[0].self_attn
    attention.q_proj.register_forward_pre_hook(lambda module, args: (args[0] * 1.5,))
    attention.k_proj.adapter.register_forward_hook(lambda module, args, y: y * 0.5)
    attention.v_proj.base_layer.register_forward_hook(lambda module, args, y: y + 1)


def in_evaluation(model):
    model.model.layers[0].mlp.gate_proj.eval()


def another_tensor(model):
    model.model.layers[0].mlp.up_proj.register_forward_pre_hook(lambda module, args: (args[0].clone(),))


@pytest.mark.parametrize("change", [frozen, unloaded, merged, with_hooks, in_evaluation, another_tensor])
def test_layers_that_differ_are_on_their_own(change):
    results = []
    for share in (True, False):
        model = adapted(share_inputs=share, align=None, **EVERY)
        change(model)
        by_keyword_or_plain(model).backward()
        results.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert results[0].keys() == results[1].keys()
    assert all((results[0][n] - results[1][n]).norm() <= EXACT * results[1][n].norm() for n in results[0])


def by_keyword_or_plain(model):
    inputs, _ = batch()
    return model(**inputs).loss


class Pair(nn.Module):
    """Two layers and what a test does between their calls."""

    def __init__(self, between):
        super().__init__()
        self.a, self.b, self.between = nn.Linear(8, 6), nn.Linear(8, 6), between

    def forward(self, x):
        first = self.a(x)
        self.between(x)
        second = self.b(x)
        return first + second


def nothing(x):
    """Is done between the calls."""


def pair(between=nothing):
    torch.manual_seed(0)
    config = AlignLoraConfig(architecture="lora", r=2, lora_dropout=0.0, target_modules=["a", "b"])
    model = replace_linear_with_align_lora(Pair(between), config).train()
    assert groups_of(model) == [("a", "b")]
    return model


def test_a_tensor_that_is_changed_in_place_between_two_calls_is_another_one():
    x = torch.randn(5, 8)
    changed = pair(lambda x: x.add_(1))
    with torch.no_grad():
        y = changed(x.clone())
    plain = unload(copy.deepcopy(changed))
    torch.testing.assert_close(y, plain.a(x) + plain.b(x + 1))


def test_a_layer_that_is_not_called_in_the_end_has_no_gradient():
    class OnlyOne(Pair):
        def forward(self, x):
            first = self.a(x)
            return first + (self.b(x) if self.between(x) else 0)

    model = pair()
    model.__class__ = OnlyOne  # after its layers were joined
    with Operators() as operators:
        model(torch.randn(5, 8)).sum().backward()
    assert operators.calls["align_ext.sibling_lora"] == 1
    assert model.a.adapter.lora_B.grad is not None
    assert model.b.adapter.lora_B.grad is None
    assert model.b.adapter.lora_A.grad is None


def test_beside_a_quantised_base_one_weight_at_a_time_is_dequantised():
    model = adapted(in_4_bits(llama(hidden_size=64, intermediate_size=128)), dtype=torch.float32, **EVERY)
    assert calls(model) == {"grouped_lora": 14, "grouped_lora_backward": 14}


def test_layers_that_are_called_one_by_one_have_their_own_gradients():
    model, x = pair(), torch.randn(5, 8)
    with torch.no_grad():
        model.b(x)
    for layer in (model.a, model.b):
        layer(x).sum().backward()
    alone = [layer.adapter.lora_B.grad.clone() for layer in (model.a, model.b)]
    model.zero_grad()
    model(x).sum().backward()
    for layer, expected in zip((model.a, model.b), alone, strict=True):
        torch.testing.assert_close(layer.adapter.lora_B.grad, expected)


def test_a_module_that_calls_itself_between_its_layers():
    class Recursive(Pair):
        def forward(self, x, depth=2):
            first = self.a(x)
            inner = self(x, depth - 1) if depth else 0
            second = self.b(x)
            return first * second + inner

    model = pair()
    model.__class__ = Recursive
    y = model(torch.randn(5, 8, generator=torch.Generator().manual_seed(0)))
    plain = unload(copy.deepcopy(model))
    torch.testing.assert_close(y, plain(torch.randn(5, 8, generator=torch.Generator().manual_seed(0))))


def of_a_class_of_its_own(model):
    class Twice(LoraAdapter):
        def low_rank_forward(self, x, dropout_p, current, **op):
            y, z, w = super().low_rank_forward(x, dropout_p, current, **op)
            return 2 * y, z, w

    model.b.adapter.__class__ = Twice


def with_another_forward(model):
    forward = model.b.adapter.forward
    model.b.adapter.forward = lambda *args: 2 * forward(*args)


def in_evaluation_by_itself(model):
    model.b.adapter.eval()


def with_dropout(model):
    model.b.adapter.dropout_p = 0.5


def compiled(model):
    model.b.compile(backend="eager")


@pytest.mark.parametrize(
    "change", [of_a_class_of_its_own, with_another_forward, in_evaluation_by_itself, with_dropout, compiled]
)
def test_a_layer_that_is_not_like_its_sibling_is_on_its_own(change):
    model = pair()
    change(model)
    with Operators() as operators:
        model(torch.randn(5, 8))
    assert "align_ext.sibling_lora" not in operators.calls


def test_a_hook_for_all_modules_sees_the_adapters():
    model, seen = pair(), []
    hook = nn.modules.module.register_module_forward_hook(lambda module, args, y: seen.append(module))
    with hook:
        model(torch.randn(5, 8))
    assert model.a.adapter in seen
    assert model.b.adapter in seen


def test_a_copy_computes_with_its_own_layers():
    model = pair()
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert twin.a.siblings is twin.b.siblings is not model.a.siblings
        with torch.no_grad():
            twin.b.adapter.lora_B.fill_(1)
        x = torch.randn(5, 8)
        with Operators() as operators:
            assert not torch.equal(twin(x), model(x))
        assert operators.calls["align_ext.sibling_lora"] == 2


def test_a_layer_holds_no_other_one():
    model = pair()
    model(torch.randn(5, 8)).sum().backward()
    assert copy.deepcopy(model.a).siblings.layers() == []
    held = weakref.ref(model.b)
    gc.disable()  # a model that nobody holds is freed without it
    try:
        del model
        assert held() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("share", [True, False])
def test_a_checkpointed_forward_is_recomputed_alike(share):
    """By its forward alone, without what is around the call of a module."""
    results = []
    for checkpointing in (False, True):
        model = adapted(share_inputs=share, align=None, **EVERY)
        for layer in model.model.layers if checkpointing else ():
            layer.self_attn.forward = partial(checkpoint, layer.self_attn.forward, use_reentrant=False)
        by_keyword_or_plain(model).backward()
        results.append(gradients(model))
    assert error(results[1], results[0]) < EXACT


def test_evaluation_a_disabled_model_and_transforms_compute_each_layer_by_itself(monkeypatch):
    model, x = pair(), torch.randn(5, 8)
    with torch.no_grad():
        model.a.adapter.lora_B.normal_()

    def together(call):
        with Operators() as operators:
            call()
        return operators.calls["align_ext.sibling_lora"]

    assert together(lambda: model(x)) == 1
    assert together(lambda: model.eval()(x)) == 0
    model.train()
    with disable_adapter(model):
        assert together(lambda: model(x)) == 0
    with torch.inference_mode():
        assert together(lambda: model(torch.randn(5, 8))) == 0
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    assert together(lambda: torch.func.functional_call(model, parameters, (x,))) == 0
    expected = model(x)
    monkeypatch.setattr(Siblings, "outputs", None)  # nothing asks for them in a compiled model
    torch.testing.assert_close(torch.compile(model, backend="aot_eager", fullgraph=True)(x), expected)
