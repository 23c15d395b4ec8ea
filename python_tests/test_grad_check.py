"""The gradient check passes what is sound, and names what is not and why."""

import pytest
import torch
from test_batch import by_context, by_keyword, checkpointed
from tiny import WEIGHT, Oracle, adapted, batch
from torch import nn

from align_ext import AlignLoraConfig, align_step
from align_ext.adapters.adapted_block import adapted_layers
from align_ext.diagnostics.grad_check import grad_check
from align_ext.losses.kl import KlAlignment

UP, DOWN = "model.layers.0.mlp.up_proj", "model.layers.1.mlp.down_proj"


def with_tasks(seed=0):
    inputs, tasks = batch(seed)
    return {**inputs, "task_ids": tasks}


def by_step(model, inputs, strict=True):
    ids = inputs["task_ids"]
    with align_step(model, ids, strict=strict) as step:
        loss = model(**{name: value for name, value in inputs.items() if name != "task_ids"}).loss
    return step, loss


@pytest.mark.parametrize("mode", [None, "non-reentrant", "reentrant"])
def test_a_healthy_model_passes_and_is_left_as_it_was(mode):
    model = checkpointed(adapted(dtype=torch.float32, lora_dropout=0.2), mode)
    for p in model.parameters():
        p.grad = torch.ones_like(p) if p.requires_grad else None
    before = [(p.clone(), p.grad) for p in model.parameters()]
    buffers, config, random = [b.clone() for b in model.buffers()], model.align_state.config, torch.get_rng_state()
    report = grad_check(model, with_tasks(), differences=2)
    assert report.ok, str(report)
    assert [layer.verdict for layer in report.layers] == 6 * ["ok"]
    assert sum(layer.expected is not None for layer in report.layers) == 2
    assert report.scale["align"] == pytest.approx(1, rel=0.01)
    for p, (value, grad) in zip(model.parameters(), before, strict=True):
        assert torch.equal(p, value)
        assert p.dtype == torch.float32
        assert p.grad is grad
    assert all(torch.equal(b, kept) for b, kept in zip(model.buffers(), buffers, strict=True))
    assert model.align_state.config is config
    assert torch.equal(torch.get_rng_state(), random)


def test_what_it_reports_is_what_the_alignment_adds_to_the_gradient():
    with_align, without = (Oracle(adapted()).gradients([1], align=weight) for weight in (WEIGHT, 0.0))
    for layer in grad_check(adapted(), with_tasks()).layers:
        name = f"{layer.layer}.adapter.lora_A"
        assert layer.gradient == pytest.approx(float((with_align[name] - without[name]).norm()), rel=1e-9)
        assert layer.expected == pytest.approx(layer.gradient, rel=1e-3)


def scaled(model, inputs):
    (1024.0 * by_keyword(model, 0)()).backward()


def accumulated(model, inputs):
    for seed in range(2):
        (by_context(model, seed)() / 2).backward()


@pytest.mark.parametrize(("loop", "factor"), [(scaled, 1024), (accumulated, 0.5)])
def test_a_loop_may_scale_and_accumulate_and_the_factor_is_told(loop, factor):
    report = grad_check(adapted(), None, loop, differences=2)
    assert report.ok, str(report)
    assert report.scale["align"] == pytest.approx(factor, rel=1e-3)
    assert f"align: multiplied by {factor}" in str(report)


ARCHITECTURES = {
    "align_lora": {"align": "mmd"},
    "multi_adapter": {"align": "kl"},
    "lora_moe": {"align": "kl", "balance": "cv2"},
    "hydra": {"align": "mmd", "balance": "cv2"},
    "r_lora": {"balance": "cv2"},
    "m_lora": {"align": "kl"},
    "mtlora": {"align": "kl"},
    "lora": {},
    "multilora": {"align": "kl"},
    "moelora": {"align": "kl"},
    "mtlora_cvpr": {"align": "kl"},
    "nlora": {"align": "kl"},
    "malora": {"align": "kl", "balance": "cv2"},
    "mixlora": {"align": "kl", "target_modules": "all-linear"},
    "adalora": {"align": "kl"},
}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_passes_with_its_losses(architecture):
    heads = {} if AlignLoraConfig(architecture=architecture, num_tasks=3).num_heads is None else {"num_heads": 3}
    model = adapted(architecture=architecture, **heads, **ARCHITECTURES[architecture])
    if architecture == "r_lora":
        for layer in adapted_layers(model).values():
            torch.nn.init.zeros_(layer.adapter.lora_router.lora_R)
    report = grad_check(model, with_tasks(), differences=2)
    assert report.ok, str(report)
    balanced = architecture in ("lora_moe", "hydra", "r_lora", "mtlora", "malora", "mixlora")
    losses = ["align" if model.align_state.config.align else "loss"] + ["balance"] * balanced
    assert list(report.scale) == losses
    # R-LoRA starts with a uniform router, where "cv2" has its minimum.
    expected = {"balance": "stationary"} if architecture == "r_lora" else {}
    for layer in report.layers:
        assert layer.verdict == expected.get(layer.loss, "ok")


@pytest.mark.parametrize("align", [None, "kl"])
def test_the_norms_of_dora_are_constants_to_the_gradient(align):
    model = adapted(architecture="lora", use_dora=True, align=align)
    for layer in adapted_layers(model).values():
        layer.adapter.lora_B.data.mul_(5)
    report = grad_check(model, with_tasks(), differences=2)
    assert report.ok, str(report)
    assert not any("row_norms" in vars(layer) for layer in adapted_layers(model).values())


def test_top_k_routing_is_checked_without_differences():
    model = adapted(architecture="lora_moe", num_heads=3, top_k=2, align="kl")
    report = grad_check(model, with_tasks())
    assert report.ok
    assert all(layer.expected is None for layer in report.layers)


def detach(model):
    model.get_submodule(UP).register_forward_hook(lambda module, args, y: y.detach())


def freeze(model):
    model.get_submodule(UP).adapter.lora_A.requires_grad_(False)


def without_graph(model):
    layer = model.get_submodule(UP)
    layer.forward = torch.no_grad()(layer.forward)


class Checkpointed(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return torch.utils.checkpoint.checkpoint(self.inner, x, use_reentrant=True)


def checkpoint_without_input_gradient(model):
    """Layers whose input is data: reentrant checkpointing then records no graph."""
    layer = model.get_submodule(UP)
    model.model.layers[0].mlp.up_proj = Checkpointed(layer)
    layer.register_forward_pre_hook(lambda module, args: (args[0].detach(),))
    model.model.layers[0].mlp.up_proj.register_forward_pre_hook(lambda module, args: (args[0].detach(),))


@pytest.mark.parametrize(
    ("sabotage", "layer", "cause"),
    [
        (detach, UP, "its output is detached, or the loss does not depend on it"),
        (freeze, UP, "the parameter is frozen"),
        (without_graph, UP, "runs without a graph: under no_grad"),
        (checkpoint_without_input_gradient, UP, "reentrant checkpoint whose input needs no gradient"),
    ],
)
def test_a_layer_that_gets_nothing_is_named_with_the_cause(sabotage, layer, cause):
    model = adapted()
    sabotage(model)
    report = grad_check(model, with_tasks())
    assert not report.ok
    none = {x.layer.replace(".inner", ""): x.cause for x in report.layers if x.verdict == "none"}
    assert list(none) == [layer]
    assert cause in none[layer]
    assert cause in str(report)


def beside(model, inputs):
    step, loss = by_step(model, inputs, strict=False)
    step.total(loss)
    loss.backward()


def without_total(model, inputs):
    _, loss = by_step(model, inputs, strict=False)
    loss.backward()


def own_weight(model, inputs):
    step, loss = by_step(model, inputs)
    step.total(loss, weight=0.2).backward()


def forgetful(model, inputs):
    model(**inputs).loss.backward()
    model.zero_grad()


def evaluating(model, inputs):
    model.eval()(**inputs).loss.backward()
    model.train()


def gradless(model, inputs):
    with torch.no_grad():
        return model(**inputs).loss


def strictly_beside(model, inputs):
    _, loss = by_step(model, inputs)
    loss.backward()


@pytest.mark.parametrize(
    ("loop", "cause"),
    [
        (beside, "differentiates a loss beside the step's"),
        (without_total, "differentiates a loss beside the step's"),
        (own_weight, "a weight of its own, 0.2"),
        (forgetful, "cleared the gradients"),
        (evaluating, "opens no training step: call model.train"),
        (gradless, "the model under no_grad"),
        (strictly_beside, "backward reached an aligned layer, but not the alignment loss"),
    ],
)
def test_a_loop_that_loses_the_alignment_is_named(loop, cause):
    report = grad_check(adapted(), with_tasks(), loop, differences=1)
    assert [layer.verdict for layer in report.layers] == 6 * ["none"]
    assert all(cause in layer.cause for layer in report.layers), str(report)


@pytest.mark.parametrize(("task", "cause"), [(1, "of task 1 alone"), (-1, "of no task")])
def test_a_batch_without_two_tasks_is_named(task, cause):
    inputs = {**with_tasks(), "task_ids": torch.full((6,), task)}
    report = grad_check(adapted(), inputs, differences=1)
    assert all(layer.verdict == "none" and cause in layer.cause for layer in report.layers)


def test_a_layer_that_the_forward_skips_is_named():
    model = adapted()
    mlp = model.model.layers[0].mlp
    mlp.forward = lambda x: mlp.down_proj(mlp.act_fn(mlp.gate_proj(x)))
    report = grad_check(model, with_tasks())
    assert not report.ok
    assert f"did not run in this step, the first is '{UP}'" in report.layers[0].cause


def test_a_frozen_router_gets_no_balance():
    model = adapted(architecture="hydra", num_heads=3, balance="cv2", align="kl")
    model.get_submodule(UP).adapter.lora_router.lora_R.requires_grad_(False)
    report = grad_check(model, with_tasks(), differences=2)
    assert [(x.layer, x.loss) for x in report.layers if x.verdict == "none"] == [(UP, "balance")]


def test_a_wrong_gradient_of_one_layer_is_found(monkeypatch):
    right = KlAlignment.gradients

    def wrong(self, *args):
        return {layer: dz * (1.5 if layer == 5 else 1) for layer, dz in right(self, *args).items()}

    monkeypatch.setattr(KlAlignment, "gradients", wrong)
    report = grad_check(adapted(), with_tasks())
    assert {x.layer: x.verdict for x in report.layers}[DOWN] == "wrong"


def test_without_alignment_the_models_own_loss_is_followed():
    model = adapted(architecture="lora")
    detach(model)
    verdicts = {x.layer: (x.loss, x.verdict) for x in grad_check(model, batch()[0], differences=2).layers}
    assert verdicts[UP] == ("loss", "none")
    assert verdicts[DOWN] == ("loss", "ok")


def test_a_loop_that_trains_is_refused():
    def trains(model, inputs):
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        model(**inputs).loss.backward()
        optimizer.step()

    with pytest.raises(ValueError, match="leave optimizer"):
        grad_check(adapted(), with_tasks(), trains)


def test_an_error_of_the_loops_own_is_not_swallowed():
    def broken(model, inputs):
        raise RuntimeError("my own")

    with pytest.raises(RuntimeError, match="my own"):
        grad_check(adapted(), with_tasks(), broken)


def test_a_model_without_adapters_is_refused():
    with pytest.raises(ValueError, match="no adapters"):
        grad_check(nn.Linear(2, 2), None)


def test_a_16_bit_model_on_the_cpu_is_checked_in_double():
    report = grad_check(adapted(dtype=torch.bfloat16), with_tasks(), differences=1)
    assert report.ok, str(report)
