"""What one adapted layer keeps for backward and how many operators it calls: exact, so that neither can creep up."""

from collections import Counter
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode

from align_ext import AlignLoraConfig, align_step, replace_linear_with_align_lora

T, IN, OUT, R, N, G, TASKS = 96, 64, 48, 4, 3, 2, 2
RNG = 16  # seed and offset of the masks
PLAIN = {"balance": None, "spectral": None, "target_blocks": ()}
PER_HEAD = {"architecture": "hydra", "dropout_site": "input_per_head"}
# Options, and floats kept of each token beside x: z, and the routing weights w.
LAYERS = {
    "lora": ({"architecture": "lora"}, R),
    "align_lora": ({"architecture": "align_lora"}, R),
    "align_lora, mmd": ({"architecture": "align_lora", "align": "mmd"}, R),
    "multi_adapter": ({"architecture": "multi_adapter"}, R),
    "pissa": ({"architecture": "lora", "init_lora_weights": "pissa"}, R),
    "m_lora": ({"architecture": "m_lora"}, R),
    "m_lora without offset": ({"architecture": "m_lora", "init_lora_weights": "kaiming"}, R),
    "hydra": ({"architecture": "hydra"}, R + N),
    "r_lora": ({"architecture": "r_lora"}, R + N),
    "r_lora, aligned": ({"architecture": "r_lora", "align": "kl"}, R + N),
    "mtlora": ({"architecture": "mtlora", "routing_groups": G, **PLAIN}, R + G * N),
    "lora_moe": ({"architecture": "lora_moe"}, N * R + N),
    "lora_moe, top 2": ({"architecture": "lora_moe", "top_k": 2}, N * R + N),
    "hydra, a mask on x for each head": (PER_HEAD, N * R + N),
    "hydra without router": ({"architecture": "hydra", "router": None}, N * R),
}
ALL = pytest.mark.parametrize("name", LAYERS)


def adapted(name, dtype=torch.float32):
    options = LAYERS[name][0]
    several = {} if options["architecture"] in ("lora", "align_lora", "multi_adapter") else {"num_heads": N}
    config = AlignLoraConfig(**options, **several, r=R, num_tasks=TASKS, target_modules=["0"])
    layer = replace_linear_with_align_lora(nn.Sequential(nn.Linear(IN, OUT, dtype=dtype)), config)
    x = torch.randn(T, IN, dtype=dtype, requires_grad=True)
    return layer.train(), config, x


def forward_and_backward(layer, config, x, watch=nullcontext):
    """One training step; `watch` surrounds the layer's forward."""
    with align_step(layer, torch.arange(T) % TASKS) if config.needs_step else nullcontext() as step, watch():
        y = layer(x)
    (step.total(y.sum()) if step else y.sum()).backward()


def kept_bytes(layer, config, x):
    """Bytes of the storages that autograd keeps after forward, beside those of parameters and buffers."""
    own = {t.untyped_storage().data_ptr() for t in (*layer.parameters(), *layer.buffers())}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)  # the tensor, so that no other gets its address
        return tensor

    forward_and_backward(layer, config, x, lambda: saved_tensors_hooks(keep, lambda tensor: tensor))
    return sum(size for size, _ in kept.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@ALL
def test_a_layer_keeps_x_the_latent_and_the_routing_weights_and_nothing_else(name, dtype):
    layer, config, x = adapted(name, dtype)
    groups = 8 * (T + TASKS + 1) if name == "multi_adapter" else 0  # the tokens by task, one tensor for all layers
    assert kept_bytes(layer, config, x) == x.nbytes + 4 * T * LAYERS[name][1] + RNG + groups


def test_without_dropout_there_is_no_seed_to_keep():
    layer, config, x = adapted("lora")
    layer[0].adapter.dropout_p = 0.0
    assert kept_bytes(layer, config, x) == x.nbytes + 4 * T * R


class Operators(TorchDispatchMode):
    """Counts what reaches the dispatcher from Python and from autograd, but for views, which compute nothing."""

    def __init__(self):
        super().__init__()
        self.calls = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        returned = [value.alias_info for value in func._schema.returns]
        if not any(alias is not None and not alias.is_write for alias in returned):
            self.calls[str(func).removesuffix(".default")] += 1
        return func(*args, **(kwargs or {}))


def calls_of(name, dtype=torch.float32):
    layer, config, x = adapted(name, dtype)
    forward_and_backward(layer, config, x)  # a first call may set up
    with Operators() as operators:
        forward_and_backward(layer, config, x)
    return operators.calls


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(
    "name", [name for name, (options, _) in LAYERS.items() if name != "multi_adapter" and "align" not in name]
)
def test_a_layer_is_one_operator_in_each_direction_and_one_seed(name, dtype):
    ours = {call: count for call, count in calls_of(name, dtype).items() if "align_ext" in call}
    assert sorted(ours.values()) == [1, 1]
    rest = calls_of(name, dtype)
    for call in ours:
        del rest[call]
    # The seed; what y.sum() does in both directions; gradients that accumulate into those of the first call.
    parameters = sum(p.requires_grad for p in adapted(name)[0].parameters())
    allowed = {"aten.randint": 1, "aten.sum": 1, "aten.ones_like": 1, "aten.add_.Tensor": 1 + parameters}
    assert rest <= Counter(allowed), rest


def test_the_alignment_of_a_step_costs_as_many_operators_for_many_layers_as_for_one():
    def calls(count):
        config = AlignLoraConfig(r=R, num_tasks=TASKS, target_modules="[0-9]+")
        model = replace_linear_with_align_lora(nn.Sequential(*(nn.Linear(IN, IN) for _ in range(count))), config)
        x = torch.randn(T, IN, requires_grad=True)
        with Operators() as operators:
            forward_and_backward(model.train(), config, x)
        return operators.calls

    one, two, five = calls(1), calls(2), calls(5)
    for call in ("align_ext.task_moments", "align_ext.gaussian_kl_tables", "align_ext.gaussian_kl_backward"):
        assert one[call] == five[call] == 1
    each = ("align_ext.grouped_lora", "align_ext.grouped_lora_backward", "aten.randint", "aten.detach")
    a_layer = two - one
    assert a_layer <= Counter(dict.fromkeys(each, 1)), a_layer
    assert five - two == Counter({call: 3 * count for call, count in a_layer.items()})
