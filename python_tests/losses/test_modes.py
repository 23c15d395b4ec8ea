"""Every loss of every architecture is exact in every mode of training, against a literal oracle (tiny.py)."""

import functools

import literal
import pytest
import torch
from test_batch import (
    CHECKPOINTING,
    EXACT,
    accumulated,
    by_context,
    by_keyword,
    checkpointed,
    scaled,
    single,
    two_pending_reversed,
    two_pending_summed,
)
from tiny import Oracle, adapted, batch, error, gpt2, gradients, llama, qwen2

from align_ext import AlignLoraConfig, align_parts

# Dropout everywhere: its masks must be the same in recomputation, and in the oracle.
CASES = {
    "lora, mmd": {"architecture": "lora", "align": "mmd", "mmd_statistic": "u", "align_layers": "sum"},
    "lora, l2": {"architecture": "lora", "align": "l2"},
    "lora_moe, l2": {"architecture": "lora_moe", "align": "l2", "align_layers": "sum"},
    "m_lora, kl of a batch's pairs": {"architecture": "m_lora", "align": "kl", "align_pairs": "batch"},
    "align_lora by position": {"align_statistics": "position"},
    "align_lora, mmd of few": {"align": "mmd", "mmd_bandwidths": [0.1, 1.0, 7.0], "mmd_n_max": 8},
    "multi_adapter": {"architecture": "multi_adapter"},
    "multi_adapter, kl": {"architecture": "multi_adapter", "align": "kl", "align_pairs": "mean"},
    "lora_moe, kl, switch": {"architecture": "lora_moe", "align": "kl", "top_k": 2, "balance": "switch"},
    "lora_moe, mmd": {"architecture": "lora_moe", "align": "mmd", "align_pairs": "mean", "spectral": "uniform"},
    "hydra, kl, cv2": {"architecture": "hydra", "align": "kl", "align_ddof": 1, "balance": "cv2"},
    "hydra without router, kl": {"architecture": "hydra", "router": None, "align": "kl", "spectral": "paper"},
    "r_lora, mmd, cv2": {"architecture": "r_lora", "align": "mmd", "balance": "cv2"},
    "r_lora by position": {
        "architecture": "r_lora", "align": "kl", "align_statistics": "position", "balance": "cv2",
    },
    "m_lora, kl": {"architecture": "m_lora", "align": "kl", "spectral": "released"},
    "multilora, kl": {"architecture": "multilora", "align": "kl", "spectral": "uniform"},
    "moelora, mmd": {"architecture": "moelora", "align": "mmd"},
    "mtlora_cvpr, kl": {"architecture": "mtlora_cvpr", "align": "kl"},
    "nlora, mmd": {"architecture": "nlora", "align": "mmd"},
    "adalora, kl": {"architecture": "adalora", "align": "kl", "orth_reg_weight": 0.2},
    "adalora, mmd": {"architecture": "adalora", "align": "mmd"},
    "malora, kl, switch": {"architecture": "malora", "align": "kl", "balance": "switch"},
    "mixlora": {"architecture": "mixlora"},
    "mixlora, mmd": {"architecture": "mixlora", "align": "mmd", "router_temperature": 0.7, "balance": "cv2"},
    "mixlora and attention, kl": {"architecture": "mixlora", "align": "kl", "target_modules": "all-linear"},
    "mtlora on layers, kl": {"architecture": "mtlora", "align": "kl", "target_blocks": ()},
    "mtlora": {"architecture": "mtlora", "target_blocks": ("attention", "mlp")},
    "mtlora by sequence, mmd": {
        "architecture": "mtlora", "align": "mmd", "routing": "sequence", "router": "mlp", "balance": "switch",
        "top_k": 2,
    },
}  # fmt: skip
LOUD = {"balance_weight": 0.5, "spectral_weight": 0.2}  # weights at which a loss left out would be seen


def options_of(name):
    config = AlignLoraConfig(**{"num_tasks": 3} | CASES[name])
    heads = {} if config.num_heads is None else {"num_heads": 3}
    return {"lora_dropout": 0.2} | LOUD | heads | CASES[name]


@functools.cache
def expected(name, *weights):
    return Oracle(adapted(**options_of(name))).gradients(list(weights))


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("mode", CHECKPOINTING)
def test_the_gradient_is_the_literal_one(name, mode):
    model = checkpointed(adapted(**options_of(name)), mode)
    flows = {two_pending_summed: (1, 2), single: (1,)} if mode else {accumulated: (0.5, 0.5), scaled: (65536,)}
    flows |= {two_pending_reversed: (1, 2)}
    for flow, weights in flows.items():
        for way in (by_context, by_keyword) if flow is single else (by_keyword,):
            model.zero_grad()
            flow(functools.partial(way, model))
            assert error(gradients(model), expected(name, *weights)) < EXACT, (flow.__name__, way.__name__)


@pytest.mark.parametrize(
    "name", ["multi_adapter", "lora_moe, kl, switch", "m_lora, kl", "mtlora by sequence, mmd", "adalora, kl"]
)
def test_each_loss_moves_the_gradient(name):
    """Otherwise an oracle without it would have passed too."""
    options = options_of(name)
    with_all = expected(name, 1)
    weights = {"align": "align_weight", "balance": "balance_weight", "spectral": "spectral_weight"}
    for loss, weight in (weights | {"orth_reg_weight": "orth_reg_weight"}).items():
        if not getattr(adapted(**options).align_state.config, loss):
            continue
        without = Oracle(adapted(**options | {weight: 0.0})).gradients([1])
        assert error(without, with_all) > 1e-3, loss


@pytest.mark.parametrize("name", CASES)
def test_the_parts_are_the_literal_losses(name):
    model = adapted(**options_of(name))
    by_keyword(model, 0)
    parts, oracle = align_parts(model), Oracle(adapted(**options_of(name)))
    lm, outputs, task = oracle.forward(0)
    assert parts.lm == pytest.approx(lm.item(), rel=1e-6)  # transformers computes it in float32
    assert list(parts.per_layer.values()) == pytest.approx(
        [oracle.alignment(output, task).item() for output in outputs] if oracle.config.align else [], rel=1e-9
    )
    if oracle.config.align == "kl":  # a pair's MMD by itself has bandwidths of its own
        assert sum(parts.per_task) == pytest.approx(2 * parts.align, rel=1e-9)
    config = oracle.config
    if config.balance:
        losses = oracle.balances(outputs, task)
        assert parts.balance == pytest.approx((sum(losses) / len(losses)).item(), rel=1e-9)
    if config.spectral:
        losses = [literal.spectral(adapter.lora_B, config.spectral) for adapter in oracle.adapters]
        assert parts.spectral == pytest.approx((sum(losses) / len(losses)).item(), rel=1e-9)
    if config.orth_reg_weight:
        losses = [literal.orthogonality(adapter.lora_B, adapter.lora_A) for adapter in oracle.adapters]
        assert parts.orthogonality == pytest.approx((sum(losses) / len(losses)).item(), rel=1e-9)


COMPILED = ["multi_adapter, kl", "lora_moe, kl, switch", "mixlora, mmd"]
COMPILED += [pytest.param(n, marks=pytest.mark.slow) for n in ("hydra without router, kl", "mtlora", "adalora, kl")]


@pytest.mark.parametrize("name", COMPILED)
def test_a_compiled_model_is_exact_without_a_break_and_is_compiled_once(name):
    torch._dynamo.reset()
    options = {**options_of(name), "share_inputs": False}  # compiled layers have masks of their own
    model = adapted(llama(num_hidden_layers=1), **options)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    counts = []
    for seed in range(3):
        by_context(compiled, seed)().backward()
        counts.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    oracle = Oracle(adapted(llama(num_hidden_layers=1), **options))
    assert error(gradients(model), oracle.gradients([1, 1, 1])) < EXACT
    assert counts[0] == counts[-1]


@pytest.mark.parametrize("make", [gpt2, qwen2])
@pytest.mark.parametrize("name", ["mtlora", "mtlora by sequence, mmd", "r_lora, mmd, cv2"])
def test_other_models_are_exact_too(make, name):
    """Blocks of GPT-2 return tuples and take their input by position; r_lora stands beside its Conv1D."""
    layers = {"target_modules": ["c_fc", "c_proj"]} if make is gpt2 else {}
    model, twin = (adapted(make(), **options_of(name) | layers) for _ in range(2))
    by_keyword(model, 0)().backward()
    assert error(gradients(model), Oracle(twin).gradients([1])) < EXACT


def test_tokens_of_no_task_count_in_no_loss():
    model = adapted(**options_of("hydra, kl, cv2"))
    inputs, tasks = batch()
    tasks[0] = -1
    torch.manual_seed(0)
    model(**inputs, task_ids=tasks)
    oracle = Oracle(adapted(**options_of("hydra, kl, cv2")))
    _, outputs, task = oracle.forward(0)
    task[:10] = -1
    parts = align_parts(model)
    assert parts.align == pytest.approx((sum(oracle.alignment(o, task) for o in outputs) / 6).item(), rel=1e-9)
    alone = oracle.extra(outputs, task, 0.0).item() / oracle.config.balance_weight
    assert parts.balance == pytest.approx(alone, rel=1e-9)
