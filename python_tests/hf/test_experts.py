"""Experts that are one tensor, adapted by target_parameters: exact, aligned, checkpointed, merged."""

import copy

import literal
import pytest
import torch
from hf.folders import assert_same_bits
from hf.mixtures import ALIGN_WEIGHT, KINDS, adapted, eager, gradients, logits, loss_of, mixture, options
from tiny import batch

from align_ext import (
    AlignLoraConfig,
    adapter_report,
    add_adapter,
    add_weighted_adapter,
    align_parts,
    capture_latents,
    count_parameters,
    disable_adapter,
    load_adapter,
    match_rank,
    merge_and_unload,
    save_adapter,
    set_adapter,
    unload,
)
from align_ext.adapters.adapted_block import adapted_layers
from align_ext.diagnostics.record import record_adapters


class Dense(torch.nn.Module):
    """Experts written out, token by token and expert by expert: y = Σ_e w_te expert_e(x_t), W_e + s B_e A_e."""

    def __init__(self, base, factors, scaling, latents, name):
        super().__init__()
        self.base, self.factors, self.scaling, self.latents, self.name = base, factors, scaling, latents, name

    def product(self, tensor, x, expert):
        A, B = self.factors[f"{self.name}.{tensor}"]
        weight = getattr(self.base, tensor)[expert]
        weight = weight.T if self.base.is_transposed else weight
        bias = getattr(self.base, f"{tensor}_bias")[expert] if self.base.has_bias else 0
        self.latents[f"{self.name}.{tensor}"].append(A[expert] @ x)
        return (weight + self.scaling * B[expert] @ A[expert]) @ x + bias

    def forward(self, x, chosen, weights):
        outputs = []
        for token, experts, factor in zip(x, chosen, weights, strict=True):
            y = 0
            for expert, w in zip(experts, factor, strict=True):
                up = self.product("gate_up_proj" if self.base.has_gate else "up_proj", token, expert)
                inner = self.base._apply_gate(up) if self.base.has_gate else self.base.act_fn(up)
                y = y + w * self.product("down_proj", inner, expert)
            outputs.append(y)
        return torch.stack(outputs)


@pytest.mark.parametrize("kind", [*KINDS, "Qwen3Next"])
def test_a_step_with_alignment_has_the_gradient_of_the_equations(kind):
    model = adapted(kind, torch.float64, target_modules=[])
    loss = loss_of(model)
    loss.backward()
    config, layers = model.align_state.config, adapted_layers(model)
    factors = {
        n: [p.detach().clone().requires_grad_() for p in layer.adapter.parameters()] for n, layer in layers.items()
    }
    latents = {name: [] for name in layers}
    plain = mixture(kind).double().train()
    for place in {name.rpartition(".")[0] for name in layers}:
        plain.set_submodule(place, Dense(plain.get_submodule(place), factors, config.scaling, latents, place))
    inputs, tasks = batch()
    expected = plain(**inputs, use_cache=False).loss
    ids = torch.where(inputs["attention_mask"] > 0, tasks[:, None], -1).flatten()
    top_k = len(next(iter(latents.values()))) // len(ids)
    assert top_k == 2
    aligned = [literal.kl(torch.stack(z), ids.repeat_interleave(top_k), config) for z in latents.values()]
    expected = expected + ALIGN_WEIGHT * torch.stack(aligned).mean()
    torch.testing.assert_close(loss.double(), expected.double(), rtol=1e-6, atol=0)
    found = gradients(model)
    for name, pair in factors.items():
        for part, gradient in zip("AB", torch.autograd.grad(expected, pair, retain_graph=True), strict=True):
            torch.testing.assert_close(found[f"{name}.lora_{part}"], gradient, rtol=1e-5, atol=1e-7)
    assert all(p.grad is None for n, p in model.named_parameters() if "lora_" not in n)
    assert set(align_parts(model).per_layer) == set(layers)


@pytest.mark.parametrize("kind", ["Mixtral", "GptOss", "NemotronH"])
def test_adapters_merge_and_come_off_again(kind, tmp_path):
    base = eager(kind)
    plain, weights = logits(base), {n: t.clone() for n, t in base.state_dict().items()}
    model = adapted(kind, model=base)
    expected = logits(model)
    with disable_adapter(model):
        assert torch.equal(logits(model), plain)
    layer = next(layer for name, layer in adapted_layers(model).items() if name.endswith("experts.down_proj"))
    layer.merge()
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-5)
    layer.unmerge()
    assert torch.equal(logits(model), expected)
    save_adapter(model, tmp_path)
    assert_same_bits(unload(model).state_dict(), weights)
    merged = merge_and_unload(load_adapter(model, tmp_path))
    assert merged.state_dict().keys() == weights.keys()
    torch.testing.assert_close(logits(merged), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("kind", "reentrant"), [("Mixtral", True), ("Qwen3Moe", False), ("GptOss", False)])
def test_activation_checkpointing_changes_no_bit(kind, reentrant):
    model, found = adapted(kind, lora_dropout=0.3), []
    for checkpointed in (False, True):
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.zero_grad()
        torch.manual_seed(5)
        loss_of(model).backward()
        found.append({name: gradient.clone() for name, gradient in gradients(model).items()})
    assert_same_bits(*found)


def test_rows_of_experts_have_the_tasks_of_their_tokens():
    model, (inputs, tasks) = adapted("Mixtral"), batch()
    losses = []
    for ids in (tasks, tasks[:, None].expand_as(inputs["input_ids"])):
        loss_of(model, ids)
        losses.append(align_parts(model).per_layer)
    assert losses[0] == losses[1]
    inputs["attention_mask"][:] = 1
    model(**inputs, task_ids=tasks)
    assert align_parts(model).per_layer != losses[0]


@pytest.mark.parametrize("others", [{"align": "mmd"}, {"align_statistics": "position"}])
def test_experts_that_a_loss_cannot_take_are_left_out_of_it_and_the_report_says_so(others):
    model = adapted("Mixtral", **others)
    loss_of(model).backward()
    assert set(align_parts(model).per_layer) == {f"model.layers.{i}.self_attn.q_proj" for i in range(2)}
    assert all(gradient.abs().max() > 0 for gradient in gradients(model).values())
    assert any("4 tensors of experts are adapted, but not aligned" in line for line in adapter_report(model).unmatched)


def test_the_report_the_count_and_the_latents_know_experts():
    model = adapted("Mixtral")
    experts = [f"model.layers.{i}.mlp.experts.{tensor}" for i in range(2) for tensor in ("gate_up_proj", "down_proj")]
    assert set(experts) < set(adapter_report(model).replaced)
    assert not adapter_report(model).unmatched
    here = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert count_parameters(model).trainable == here == 2 * (3 * (32 + 32) + 4 * 3 * (32 + 96) + 4 * 3 * (48 + 32))
    config = AlignLoraConfig(**options("Mixtral"))
    assert match_rank(config, mixture("Mixtral"), here) == 3
    with capture_latents(model) as latents:
        logits(model)
    assert latents[experts[0]].z.shape == (6 * 10 * 2, 3)


def test_a_trained_tensor_of_adapted_experts_is_refused_and_not_left_without_its_gradient():
    model = adapted("Mixtral")
    model.model.layers[0].mlp.experts.base_layer.down_proj.requires_grad_(True)
    with pytest.raises(RuntimeError, match="down_proj of the adapted experts requires a gradient"):
        loss_of(model)


def test_compiled_experts_are_the_same():
    experts, found = adapted("GptOss", align=None).model.layers[0].mlp.experts, []
    x, weights = torch.randn(20, 32, requires_grad=True), torch.rand(20, 2)
    chosen = torch.randint(4, (20, 2))
    parameters = [x, *(p for p in experts.parameters() if p.requires_grad)]
    for call in (experts, torch.compile(experts, fullgraph=True, backend="aot_eager")):
        y = call(x, chosen, weights)
        found.append([y, *torch.autograd.grad(y.square().sum(), parameters)])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_of_several_adapters_each_has_its_experts():
    model = adapted("Mixtral")
    first = logits(model)
    add_adapter(model, "second", options("Mixtral", target_modules=[], target_parameters=["experts.down_proj"]))
    set_adapter(model, "second")
    assert torch.equal(logits(model), logits(eager("Mixtral")))
    assert len(adapted_layers(model)) == 2
    set_adapter(model, "default")
    assert torch.equal(logits(model), first)
    with pytest.raises(ValueError, match=r"only adapters of layers can be composed, and .* is a tensor of experts"):
        add_weighted_adapter(model, ["default", "second"], [1.0, 1.0], "sum")


def test_measures_of_latents_are_of_the_layers_beside_experts():
    inputs, tasks = batch()
    found = record_adapters(adapted("Mixtral"), [inputs | {"task_ids": tasks}], gradients=True)
    assert set(found.latents) == {f"model.layers.{i}.self_attn.q_proj" for i in range(2)}
    assert len(found.gradients) == 6
    with pytest.raises(ValueError, match="only experts are adapted"):
        record_adapters(adapted("Mixtral", target_modules=[]), [inputs | {"task_ids": tasks}])


def test_a_choice_of_no_expert_adds_nothing():
    experts = adapted("Mixtral", align=None).model.layers[0].mlp.experts
    x, weights, chosen = torch.randn(20, 32), torch.rand(20, 2), torch.randint(4, (20, 2))
    weights[::3, 1] = 0
    expected = experts(x, chosen, weights)
    chosen[::3, 1], weights[::3, 1] = 4, 0.5
    assert torch.equal(experts(x, chosen, weights), expected)


def test_a_copy_stands_alone_and_a_checkpoint_of_the_base_is_taken():
    model = adapted("GptOss")
    expected, other = logits(model), copy.deepcopy(model)
    other.load_state_dict(model.state_dict())
    assert torch.equal(logits(other), expected)
    changed = {name: 1.5 * tensor for name, tensor in eager("GptOss").state_dict().items()}
    other.load_state_dict(changed, strict=False)
    assert torch.equal(logits(model), expected)
    assert not torch.equal(logits(other), expected)
    with disable_adapter(other):
        found = logits(other)
    base = eager("GptOss")
    base.load_state_dict(changed)
    assert torch.equal(found, logits(base))
