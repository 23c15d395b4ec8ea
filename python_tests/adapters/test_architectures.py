"""Every architecture beside a layer: its equations literally, its start, its merging, its heads."""

import contextlib
import copy

import pytest
import torch
from architectures import FROM_WEIGHT, HEADS, MERGEABLE, ON_LAYERS, ROUTED, config_of
from literal import low_rank
from torch import nn

from align_ext import AlignLoraConfig, align_step, replace_linear_with_align_lora, set_task

N, M, BATCH, LENGTH = 12, 10, 3, 5
TASK_IDS = torch.tensor([2, 0, 1])
EXACT = 1e-12  # float64
EVERY = pytest.mark.parametrize("name", ON_LAYERS)


def conv1d(n, m):
    from transformers.pytorch_utils import Conv1D

    return Conv1D(m, n)


def plain_layer(base=nn.Linear, dtype=torch.float64):
    torch.manual_seed(0)
    layer = base(N, M)
    nn.init.normal_(layer.bias)
    return layer.to(dtype)


def adapted_layer(name, base=nn.Linear, dtype=torch.float64, start=True, **options):
    """A model of one adapted layer; its adapter as it starts, or with trained-looking values. Dropout 0.3."""
    model = nn.Sequential(plain_layer(base, dtype))
    options = {"r": 4, "lora_alpha": 6, "lora_dropout": 0.3, "target_modules": ["0"], "align": None} | options
    config = config_of(name, **options)
    replace_linear_with_align_lora(model, config)
    if not start:
        with torch.no_grad():
            for parameter in model[0].adapter.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model.train(), config


def batch(dtype=torch.float64, seed=1):
    """x [B, S, n], the attention mask and labels: prompts of 2 to 4 tokens, one of them padded on the left."""
    x = torch.randn(BATCH, LENGTH, N, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)
    mask = torch.ones(BATCH, LENGTH, dtype=torch.int64)
    mask[2, 0] = 0
    labels = torch.where(torch.arange(LENGTH) >= torch.tensor([2, 3, 4])[:, None], 1, -100)
    return x, mask, labels


@contextlib.contextmanager
def step_of(model, config):
    """The step that the options call for, with the batch's tasks, mask and labels; or None."""
    _, mask, labels = batch()
    ids = TASK_IDS if config.needs_ids else None
    with align_step(model, ids, mask, labels) if config.needs_step else contextlib.nullcontext() as step:
        yield step


def total(step, loss):
    return loss if step is None else step.total(loss)


def prompt_and_tasks():
    _, mask, labels = batch()
    return (labels == -100) & (mask == 1), TASK_IDS.repeat_interleave(LENGTH)


@EVERY
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("base", [nn.Linear, conv1d])
def test_the_layer_is_its_equations_written_out(name, p, base):
    """y, the latents z and the routing weights w, and every gradient of any loss on the three."""
    model, config = adapted_layer(name, base, start=False)
    layer, (x, _, _) = model[0], batch()
    x.requires_grad_()
    with step_of(model, config) as step:
        x_in, weight, bias, given = layer.base_arguments(x)
        base_out = layer.base_layer(x)
        given = None if given is None else base_out  # otherwise the operator computes the base itself
        torch.manual_seed(3)
        y, z, w = layer.adapter.low_rank_forward(x_in, p, step, weight=weight, bias=bias, base_out=given)
    prompt, tasks = prompt_and_tasks()
    torch.manual_seed(3)
    expected = low_rank(layer.adapter, config, x, p, tasks, prompt)
    outputs = [y, z.unflatten(0, (BATCH, -1)), w]
    latents = torch.stack(expected.latents, 1) if z.dim() == 3 else expected.latents[0]
    references = [base_out + expected.low, latents.unflatten(0, (BATCH, -1)), expected.weights]
    generator = torch.Generator().manual_seed(5)
    leaves = {"x": x, **dict(layer.adapter.named_parameters())}
    leaves.pop("lora_magnitude_vector", None)  # which the layer applies: test_dora.py
    grads = []
    for group in outputs, references:
        generator.manual_seed(5)
        loss = sum((t * torch.randn(t.shape, generator=generator, dtype=t.dtype)).sum() for t in group if t is not None)
        grads.append(torch.autograd.grad(loss, leaves.values(), retain_graph=True))
    for actual, reference in zip(outputs, references, strict=True):
        assert (actual is None) == (reference is None)
        if actual is not None:
            assert (actual - reference).abs().max() < EXACT * reference.abs().max()
    for key, actual, reference in zip(leaves, *grads, strict=True):
        assert reference.abs().max() > 0, key
        assert (actual - reference).abs().max() < EXACT * reference.abs().max(), key


@EVERY
@pytest.mark.parametrize("training", [False, True])
def test_the_start_is_no_change_of_the_model_and_the_base_is_never_touched(name, training):
    for dtype, p in ((torch.float64, 0.0), (torch.float32, 0.0), (torch.float32, 0.3)):
        model, config = adapted_layer(name, dtype=dtype)
        plain, (x, _, _) = plain_layer(dtype=dtype), batch(dtype)
        assert torch.equal(model[0].base_layer.weight, plain.weight)
        model[0].adapter.dropout_p = p
        if config.row.by_task:
            set_task(model, 1)
        with step_of(model, config) if training else contextlib.nullcontext():
            y = model.train(training)(x)
        change, masked = (y - plain(x)).abs().max(), training and p > 0 and config.dropout_site != "input"
        if config.init_lora_weights in ("kaiming", "gaussian"):  # B = 0
            assert change == 0
        elif config.init_lora_weights == "random_heads" and masked:  # no change on average only
            assert change > 1e-3
        else:
            assert change < 8 * torch.finfo(dtype).eps * y.abs().max()


def losses(model, config, steps, rate=0.1):
    """Trains a layer towards another one."""
    torch.manual_seed(1)
    target = nn.Linear(N, M).double()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=rate)
    values = []
    for seed in range(steps):
        x, _, _ = batch(seed=seed)
        with step_of(model, config) as step:
            loss = (model(x) - target(x)).square().mean()
        optimizer.zero_grad()
        total(step, loss).backward()
        optimizer.step()
        values.append(loss.item())
    return values


@EVERY
def test_training_moves_every_parameter_and_never_the_base(name):
    model, config = adapted_layer(name)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    values = losses(model, config, 12)
    assert min(values[-3:]) < values[0]
    trained = {key for key, parameter in model.named_parameters() if parameter.requires_grad}
    assert {key for key in before if "base_layer" in key}.isdisjoint(trained)
    for key, tensor in model.state_dict().items():
        if key in trained:
            assert (tensor != before[key]).any(), key
        elif "lora_P" not in key and "lora_age" not in key:
            assert torch.equal(tensor, before[key]), key


@pytest.mark.parametrize("name", HEADS)
def test_heads_do_not_stay_alike(name):
    model, config = adapted_layer(name)
    losses(model, config, 3)
    B = model[0].adapter.lora_B.detach()
    for i in range(len(B)):
        for j in range(i):
            assert (B[i] - B[j]).norm() > 1e-3 * B[i].norm(), (i, j)


@pytest.mark.parametrize("name", MERGEABLE)
@pytest.mark.parametrize("base", [nn.Linear, conv1d])
def test_evaluation_is_the_merged_layer_and_unmerging_restores_the_bits(name, base):
    model, config = adapted_layer(name, base, start=False)
    layer, (x, _, _) = model.eval()[0], batch()
    if config.row.by_task:
        assert "name one with set_task" in layer.unmergeable_reason()
        with pytest.raises(RuntimeError, match="needs to know the task"):
            model(x)
        set_task(model, 2)
    before, weight = model(x), layer.weight.clone()
    assert (before - layer.base_layer(x)).abs().max() > 0.1
    layer.merge()
    layer.merge()  # once
    assert (layer.weight - weight).abs().max() > 0.01
    assert (model(x) - before).abs().max() < EXACT * before.abs().max()
    layer.unmerge()
    assert torch.equal(layer.weight, weight)
    assert torch.equal(model(x), before)
    merged = layer.merged_base()
    assert merged is layer.base_layer
    assert (merged(x) - before).abs().max() < EXACT * before.abs().max()


@pytest.mark.parametrize("name", ROUTED)
def test_routed_layers_refuse_to_merge_and_say_why(name):
    model, _ = adapted_layer(name, start=False)
    weight = model[0].weight.clone()
    with pytest.raises(ValueError, match="its router mixes the heads anew for every input"):
        model[0].merge()
    with pytest.raises(TypeError, match="no fixed change of the weight"):
        model[0].delta_weight()
    assert torch.equal(model[0].weight, weight)


@pytest.mark.parametrize("name", ROUTED)
def test_the_uniform_change_is_that_of_equal_weights(name):
    model, _ = adapted_layer(name, start=False)
    layer, (x, _, _) = model.eval()[0], batch()
    layer.adapter.lora_router.reset(zeros=True)
    layer.adapter.config = AlignLoraConfig.from_dict(layer.adapter.config.to_dict() | {"top_k": 0})
    change = layer.adapter.uniform_delta_weight()
    actual = model(x) - layer.base_layer(x)
    assert (actual - x @ change.T).abs().max() < EXACT * actual.abs().max()


@pytest.mark.parametrize("name", HEADS)
def test_heads_in_another_order_have_their_gradients_in_that_order(name):
    order = torch.tensor([2, 0, 1])
    model, config = adapted_layer(name, start=False)
    model[0].adapter.dropout_p = 0.0
    twin = copy.deepcopy(model)
    groups = config.routing_groups or 1
    rows = torch.cat([g * 3 + order for g in range(groups)])
    of_heads = {"lora_B": order, "lora_R": rows, **({"lora_A": order} if model[0].adapter.lora_A.dim() == 3 else {})}
    of_heads |= {"lora_scaling": order, "lora_gate": order, "lora_C": order}
    with torch.no_grad():
        for key, parameter in twin[0].adapter.named_parameters():
            if (permutation := of_heads.get(key.rpartition(".")[2])) is not None:
                parameter.copy_(parameter[permutation])
    x, _, _ = batch()
    outputs = []
    for m in (model, twin):
        with step_of(m, config) as step:
            outputs.append(m(x))
        total(step, outputs[-1].square().sum()).backward()
    assert (outputs[0] - outputs[1]).abs().max() < EXACT * outputs[0].abs().max()
    for (key, a), b in zip(model[0].adapter.named_parameters(), twin[0].adapter.parameters(), strict=True):
        expected = a.grad[of_heads.get(key.rpartition(".")[2], slice(None))]
        assert (b.grad - expected).abs().max() < EXACT * expected.abs().max(), key


@EVERY
def test_a_16_bit_base_gets_float32_adapters_and_answers_in_16_bits(name):
    model, config = adapted_layer(name, dtype=torch.bfloat16, start=False)
    assert {p.dtype for p in model[0].adapter.parameters()} == {torch.float32}
    x, _, _ = batch(torch.bfloat16)
    with step_of(model, config) as step:
        y = model(x)
    assert y.dtype == torch.bfloat16
    total(step, y.float().square().sum()).backward()
    assert all(torch.isfinite(p.grad).all() and p.grad.any() for p in model[0].adapter.parameters())


@pytest.mark.parametrize("name", [name for name in ON_LAYERS if name not in FROM_WEIGHT])
def test_a_rank_above_the_layers_size_starts_as_no_change_and_trains(name):
    model, config = adapted_layer(name, r=14, align="kl")
    model[0].adapter.dropout_p = 0.0
    x, _, _ = batch()
    with step_of(model, config) as step:
        y = model(x)
    assert (y - plain_layer()(x)).abs().max() < EXACT
    total(step, y.square().sum()).backward()
    gradients = [p.grad for p in model[0].adapter.parameters()]
    assert all(torch.isfinite(gradient).all() for gradient in gradients)
    assert any(gradient.any() for gradient in gradients)


def test_pissa_takes_no_more_directions_than_there_are():
    with pytest.raises(ValueError, match=r"0: r=11 is above the 10 singular directions .*choose r <= 10"):
        adapted_layer("lora, pissa", r=11)
    assert adapted_layer("lora, pissa", r=10)[0][0].adapter.r == 10


def test_nlora_takes_no_more_rows_and_columns_than_there_are():
    with pytest.raises(ValueError, match=r"0: r=11 is above the 10 rows or columns of its weight, by which NLoRA"):
        adapted_layer("nlora, nystrom", r=11)
    with pytest.raises(ValueError, match="needs the base weight in memory"), torch.device("meta"):
        adapted_layer("nlora, nystrom")


def test_groups_that_do_not_divide_the_outputs_are_refused():
    with pytest.raises(ValueError, match="routing_groups=3 does not divide the 10 outputs of a layer"):
        adapted_layer("mtlora, two groups", routing_groups=3)


def test_pissa_starts_from_the_largest_singular_directions_of_the_weight():
    model, _ = adapted_layer("lora, pissa", lora_alpha=8)
    adapter, weight = model[0].adapter, model[0].weight
    U, S, V = torch.linalg.svd(weight, full_matrices=False)
    best = (U[:, :4] * S[:4]) @ V[:4]
    assert (adapter.scaling * adapter.lora_B @ adapter.lora_A - best).abs().max() < 1e-12 * best.abs().max()
    balanced = adapter.lora_A.norm(dim=1) - adapter.lora_B.norm(dim=0)
    assert balanced.abs().max() < 1e-12 * S[0]
    with pytest.raises(ValueError, match="needs the base weight in memory"), torch.device("meta"):
        adapted_layer("lora, pissa")


def test_random_heads_have_the_papers_spread():
    """c = m^(1/4) / sqrt(gamma); A ~ c N(0, 1/n), B ~ c N(0, 1/m): R-LoRA, Table 1."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(400, 900))
    options = {"target_modules": ["0"], "architecture": "m_lora", "r": 40, "init_gamma": 16.0}
    adapter = replace_linear_with_align_lora(model, **options)[0].adapter
    c = 900**0.25 / 4
    assert adapter.lora_A.std().item() == pytest.approx(c / 20, rel=0.02)  # 16000 numbers: 0.6% is one deviation
    assert adapter.lora_B.std().item() == pytest.approx(c / 30, rel=0.01)
    assert torch.equal(adapter.lora_A0, adapter.lora_A)
    torch.testing.assert_close(adapter.lora_B0, adapter.lora_B.sum(0))
    gaussian = replace_linear_with_align_lora(
        nn.Sequential(nn.Linear(400, 900)),
        target_modules=["0"],
        architecture="lora",
        r=40,
        init_lora_weights="gaussian",
    )
    assert gaussian[0].adapter.lora_A.std().item() == pytest.approx(1 / 40, rel=0.02)
