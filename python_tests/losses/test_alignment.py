"""Statistics of the alignment: by position as Align-LoRA's released code takes them, and of several sets of tokens."""

import literal
import pytest
import torch
from test_batch import by_keyword
from tiny import adapted, batch

from align_ext import AlignLoraConfig, align_parts, align_step
from align_ext.losses.kl import KlStatistics
from align_ext.losses.mmd import MmdStatistics
from align_ext.losses.statistics import STATISTICS
from align_ext.losses.tokens import TokenTasks

POSITION = AlignLoraConfig(align_statistics="position", num_tasks=2)


def latents(*shape, seed=0):
    return {0: torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)}


def test_by_position_by_hand():
    """Two positions, two samples a task, one dimension: sample variances, the mean over the positions."""
    z = torch.tensor([[0.0, 0.0], [2.0, 2.0], [4.0, 1.0], [6.0, 3.0]], dtype=torch.float64).view(8, 1)
    tokens = TokenTasks(torch.tensor([0, 0, 1, 1]))
    statistics = KlStatistics.of({0: z}, tokens, (1, 2, 1), POSITION)
    # All variances are 2; the means differ by 4 in the first position and by 1 in the second: D = gap² / (2 * 2).
    value = statistics.evaluate(POSITION).value.item()
    assert value == pytest.approx((16 / 4 + 1 / 4) / 2, rel=1e-5)  # eps = 1e-6 beside the variance


def test_by_position_is_the_mean_over_positions_of_the_literal_kl_and_padding_counts():
    model = adapted(align_statistics="position")
    inputs, tasks = batch()
    by_keyword(model, 0)
    seen = []
    for module in model.modules():
        if hasattr(module, "adapter"):
            module.register_forward_hook(lambda m, args, y: seen.append(args[0].detach() @ m.adapter.lora_A.T.detach()))
    model(**inputs, task_ids=tasks)
    config = model.align_state.config
    expected = []
    for z in seen:  # [B, S, r]
        total = 0.0
        for s in range(z.shape[1]):
            total = total + literal.kl(z[:, s], tasks, config)
        expected.append((total / z.shape[1]).item())
    parts = align_parts(model)
    assert list(parts.per_layer.values()) == pytest.approx(expected, rel=1e-10)
    assert sum(parts.per_task) == pytest.approx(2 * parts.align, rel=1e-10)


def test_by_position_needs_ids_of_samples_and_batches_of_one_length():
    model, (inputs, tasks) = adapted(align_statistics="position"), batch()
    with align_step(model, tasks[:, None].expand(6, 10)) as step:
        lm = model(**inputs).loss
    with pytest.raises(RuntimeError, match=r"needs one task id per sample, \[B\], of an unpacked batch"):
        step.total(lm)
    tokens = TokenTasks(torch.tensor([0, 0, 1, 1]))
    short, long = (KlStatistics.of(latents(4 * s, 3), tokens, (1, 2, 3), POSITION) for s in (5, 6))
    with pytest.raises(RuntimeError, match="met 5 and 6 positions: pad all processes"):
        short.merge(long)


@pytest.mark.parametrize("align", STATISTICS)
@pytest.mark.parametrize("shape", [(12, 3), (12, 2, 3)])
def test_statistics_of_two_sets_of_tokens_are_those_of_the_union(align, shape):
    kind = STATISTICS[align]
    config = AlignLoraConfig(align=align, num_tasks=2, align_layers="sum")
    if len(shape) == 3:
        config = AlignLoraConfig(architecture="lora_moe", num_heads=2, align=align, num_tasks=2, align_layers="sum")
    first, second = latents(*shape), latents(*shape, seed=1)
    ids = [torch.tensor([0, 1, 1, 0]).repeat(3), torch.tensor([1, 1, 0, -1]).repeat(3)]
    parts = [kind.of(z, TokenTasks(i), (1, 2, 3), config) for z, i in zip((first, second), ids, strict=True)]
    union = {0: torch.cat([first[0], second[0]])}
    whole = kind.of(union, TokenTasks(torch.cat(ids)), (1, 2, 3), config).evaluate(config)
    merged = parts[0].merge(parts[1]).evaluate(config)
    torch.testing.assert_close(merged.value, whole.value, rtol=1e-12, atol=0)
    loss = getattr(literal, align)
    heads = union[0].unbind(1) if len(shape) == 3 else [union[0]]
    expected = sum(loss(z, torch.cat(ids), config) for z in heads) / len(heads)
    torch.testing.assert_close(whole.value, expected, rtol=1e-12, atol=0)


def test_the_mean_square_by_hand():
    """Two tokens of tasks and one of none, two dimensions: (1 + 4 + 9 + 16) / 4, whose gradient is z / 2."""
    z = {0: torch.tensor([[1.0, 2.0], [float("nan"), 9.0], [3.0, 4.0]])}
    tokens, config = TokenTasks(torch.tensor([1, -1, 0])), AlignLoraConfig(align="l2", num_tasks=2)
    loss = STATISTICS["l2"].of(z, tokens, (1, 2, 2), config).evaluate(config)
    assert loss.value.item() == 7.5
    gradient = loss.gradients(z, tokens, torch.tensor(3.0), 0.5)[0]
    assert gradient.tolist() == [[0.75, 1.5], [0.0, 0.0], [2.25, 3.0]]
    assert loss.statistics.per_task(config) == [12.5, 2.5]


@pytest.mark.parametrize("align", ["kl", "mmd"])
def test_the_strength_of_the_sum_over_pairs_does_not_depend_on_how_many_tasks_a_batch_holds(align):
    """Tasks that differ alike: two of four tasks in a batch give eq. 5's sum over all six pairs, three of them too."""
    options = {"align": align, "num_tasks": 4, "mmd_bandwidths": (1.0,)}
    spread = torch.cat([torch.eye(4), -torch.eye(4)]).double().repeat(3, 1)
    values: dict[str, list[float]] = {"sum": [], "mean": [], "batch": []}
    for present in (2, 3, 4):
        z = {0: torch.cat([spread + 2 * torch.eye(4)[task] for task in range(present)])}
        tokens = TokenTasks(torch.arange(present).repeat_interleave(24))
        for how, found in values.items():
            config = AlignLoraConfig(**options, align_pairs=how)
            statistics = STATISTICS[align].of(z, tokens, (1, 4, 4), config)
            loss = statistics.evaluate(config)
            found.append(loss.value.item())
            assert statistics.pairs(config).item() == present * (present - 1) / 2
            assert sum(statistics.per_task(config)) == pytest.approx(2 * loss.value.item(), rel=1e-9)
            leaf = z[0].clone().requires_grad_()
            (literal_loss := getattr(literal, align)(leaf, tokens.ids, config)).backward()
            assert loss.value.item() == pytest.approx(literal_loss.item(), rel=1e-9)
            gradient = loss.gradients(z, tokens, torch.ones((), dtype=torch.float64), 1.0)[0]
            torch.testing.assert_close(gradient, leaf.grad, rtol=1e-9, atol=1e-12)
    pair = values["mean"][0]
    assert values["mean"] == pytest.approx([pair] * 3, rel=1e-9)
    assert values["sum"] == pytest.approx([6 * pair] * 3, rel=1e-9)
    assert values["batch"] == pytest.approx([pair, 3 * pair, 6 * pair], rel=1e-9)


def test_mmd_needs_layers_that_see_the_same_tokens():
    layers = {0: torch.randn(12, 3), 1: torch.randn(6, 3)}
    with pytest.raises(RuntimeError, match=r'align="mmd" needs layers that see the same tokens, got \[6, 12\]'):
        MmdStatistics.of(layers, TokenTasks(torch.tensor([0, 1])), (2, 2, 3), AlignLoraConfig(align="mmd"))
