"""Similarity of heads and tasks, and routing: values computed by hand, and models of the papers' architectures."""

import math

import pytest
import torch
from recordings import UP, adapters, by_hand, of_architecture, untrained, with_tasks
from tiny import TASKS, adapted, literal_kl, llama

from align_ext.diagnostics import latents, module_types
from align_ext.diagnostics.cosines import cosines, pairs
from align_ext.diagnostics.heads import copy_heads, head_similarity
from align_ext.diagnostics.latents import example_latents, latent_similarity, task_divergence
from align_ext.diagnostics.record import record_adapters
from align_ext.diagnostics.routing import _routing, routing
from align_ext.diagnostics.separation import separation, tsne


def recorded_with_input(model, inputs):
    """The recording of a batch, and the input that UP got meanwhile."""
    seen = {}
    hook = model.get_submodule(UP).register_forward_pre_hook(lambda module, args: seen.update(x=args[0]))
    found = record_adapters(model, [inputs])
    hook.remove()
    return found, seen["x"].detach()


def test_cosines_are_those_computed_by_hand():
    rows = torch.tensor([[1.0, 0.0], [3.0, 3.0], [-2.0, 0.0], [0.0, 0.0]])
    found = cosines(rows)
    half = math.sqrt(0.5)
    expected = torch.tensor([[1, half, -1], [half, 1, -half], [-1, -half, 1]])
    torch.testing.assert_close(found[:3, :3], expected)
    assert found[3].isnan().all()
    torch.testing.assert_close(pairs(found), torch.tensor([half, -1, -half]))


@pytest.mark.parametrize(
    ("name", "component", "block", "kind"),
    [
        ("model.layers.11.mlp.gate_proj", "gate_proj", "model.layers.11.mlp", "mlp"),
        ("model.layers.0.self_attn.q_proj", "q_proj", "model.layers.0.self_attn", "attention"),
        ("model.layers.0.mlp", "mlp", "model.layers.0.mlp", "mlp"),
        ("transformer.h.3.attn.c_attn", "c_attn", "transformer.h.3.attn", "attention"),
        ("bert.encoder.layer.2.attention.output.dense", "dense", "bert.encoder.layer.2.attention", "attention"),
        ("encoder.block.0.layer.1.DenseReluDense.wi", "wi", "encoder.block.0.layer.1.DenseReluDense", "DenseReluDense"),
        ("model.layers.0.mlp.experts.3.up_proj", "up_proj", "model.layers.0.mlp", "mlp"),
        ("0.mlp.up", "up", "0.mlp", "mlp"),
        ("lm_head", "lm_head", "lm_head", "lm_head"),
    ],
)
def test_a_module_has_a_type_and_a_block(name, component, block, kind):
    found = module_types.component_of(name), module_types.block_of(name), module_types.block_type_of(name)
    assert found == (component, block, kind)


def test_values_of_layers_are_grouped_by_type():
    layers = {"l.0.mlp.up": 1, "l.0.attn.q": 2, "l.1.mlp.up": 3, "l.1.attn.k": 4}
    assert module_types.by_component(layers) == {"up": [1, 3], "q": [2], "k": [4]}
    assert module_types.by_block({"l.0.mlp": 1, "l.0.attn": 2, "l.1.mlp": 3}) == {"mlp": [1, 3], "attention": [2]}


def test_heads_are_compared_as_flattened_matrices_layer_by_layer():
    model = of_architecture("hydra")
    with torch.no_grad():
        B = adapters(model)[UP].lora_B
        B[1] = -2 * B[0]
        B[2] = 0
        B[2, 0, 0] = 1.0
    found = head_similarity(model)
    assert len(found) == 6
    assert found[UP].shape == (3, 3)
    assert float(found[UP][0, 1]) == pytest.approx(-1)
    assert float(found[UP][0, 2]) == pytest.approx((B[0, 0, 0] / B[0].norm()).item())


def test_what_heads_have_learned_is_compared_without_their_start():
    model = of_architecture("r_lora")
    start = copy_heads(model)
    assert start[UP].data_ptr() != adapters(model)[UP].lora_B.data_ptr()
    learned = torch.zeros_like(start[UP])
    learned[0, 0, 0], learned[1, 0, 0], learned[1, 1, 0] = 1e-3, 1e-3, 1e-3
    with torch.no_grad():
        adapters(model)[UP].lora_B.add_(learned)
    change = head_similarity(model, start)
    assert float(change[UP][0, 1]) == pytest.approx(math.sqrt(0.5))
    assert change[UP][2].isnan().all()
    assert all(matrix.isnan().all() for name, matrix in change.items() if name != UP)
    before = cosines(start[UP].flatten(1))
    torch.testing.assert_close(head_similarity(model)[UP], before, atol=1e-3, rtol=0)


@pytest.mark.parametrize("start", [{}, {UP: torch.zeros(2, 80, 4)}])
def test_a_start_of_another_model_is_refused(start):
    with pytest.raises(ValueError, match=r"start has no heads \[3, 80, 4\] of the layer model.layers.0.mlp"):
        head_similarity(
            of_architecture("hydra"), {**copy_heads(of_architecture("hydra")), UP: start.get(UP, torch.ones(1))}
        )


def test_heads_at_zero_have_no_direction():
    assert all(matrix.isnan().all() for matrix in head_similarity(untrained("hydra")).values())


def test_routing_of_given_weights_is_computed_by_hand():
    found = _routing(torch.tensor([[1.0, 0.0], [0.5, 0.5], [0.25, 0.75], [0.0, 1.0]]))
    entropies = [0, math.log(2), -0.25 * math.log(0.25) - 0.75 * math.log(0.75), 0]
    assert found.entropy == pytest.approx(sum(entropies) / 4 / math.log(2))
    assert found.importance.tolist() == pytest.approx([0.4375, 0.5625])
    assert found.load.tolist() == [0.5, 0.5]


def test_one_head_has_nothing_to_choose():
    assert _routing(torch.ones(5, 1)).entropy == 1.0


@pytest.mark.parametrize("architecture", ["hydra", "lora_moe", "mtlora"])
def test_a_routers_weights_are_those_of_the_softmax_of_the_tokens_that_count(architecture):
    model, inputs = of_architecture(architecture), with_tasks()
    recording, x = recorded_with_input(model, inputs)
    found = routing(recording)
    R = adapters(model)[UP].lora_router.lora_R.detach()
    w = (x @ R.T).unflatten(-1, (-1, 3)).softmax(-1)[inputs["attention_mask"] == 1].flatten(0, 1)
    assert len(found) == 6
    torch.testing.assert_close(found[UP].importance, w.mean(0), check_dtype=False)
    assert found[UP].entropy == pytest.approx(float(-(w * w.log()).sum(1).mean() / math.log(3)), rel=1e-5)
    assert found[UP].load.sum() == pytest.approx(1)


def test_a_zero_router_is_uniform_and_a_steep_one_is_not():
    model = of_architecture("r_lora")
    for adapter in adapters(model).values():
        torch.nn.init.zeros_(adapter.lora_router.lora_R)
    assert routing(record_adapters(model, [with_tasks()]))[UP].entropy == pytest.approx(1)
    for adapter in adapters(model).values():
        torch.nn.init.normal_(adapter.lora_router.lora_R, std=100)
    assert routing(record_adapters(model, [with_tasks()]))[UP].entropy < 0.5


@pytest.mark.parametrize("architecture", ["align_lora", "lora_moe"])
def test_latents_of_tasks_are_compared_by_their_means(architecture):
    model, inputs = of_architecture(architecture), with_tasks()
    recording, x = recorded_with_input(model, inputs)
    A = adapters(model)[UP].lora_A.detach()
    z = x @ A.reshape(-1, A.shape[-1]).T
    token = torch.where(inputs["attention_mask"] == 1, inputs["task_ids"][:, None], -1)
    means = torch.stack([z[token == task].mean(0) for task in range(TASKS)])
    found = latent_similarity(recording)[UP]
    assert found.shape == (TASKS, TASKS)
    torch.testing.assert_close(found, cosines(means), check_dtype=False)


def test_a_multi_adapter_model_is_measured_on_the_batchs_tasks():
    model = of_architecture("multi_adapter")
    assert head_similarity(model)[UP].shape == (TASKS, TASKS)
    found = latent_similarity(record_adapters(model, [with_tasks()]))
    assert found[UP].diagonal().tolist() == pytest.approx([1.0] * TASKS)


def test_the_divergence_of_two_tasks_is_computed_by_hand():
    tasks = (0, 1, 0, 1)
    first = [[0.0], [2.0], [2.0], [6.0]]  # means 1 and 4, variances 1 and 4
    second = [[5.0], [4.0], [7.0], [6.0]]  # means 6 and 5, variances 1 and 1
    by_first = 0.25 * (1 / 4 + 4 - 2 + 9 * (1 + 1 / 4))
    by_second = 0.25 * (1 + 1 - 2 + 1 * (1 + 1))
    for layers, expected in (
        ({"a": first}, by_first),
        ({"a": first, "b": second}, (by_first + by_second) / 2),
        ({"a": [[x, y] for x, y in zip(first, second, strict=True)]}, (by_first + by_second) / 2),  # two heads
        ({"a": [x + y for x, y in zip(first, second, strict=True)]}, by_first + by_second),  # two dimensions
    ):
        found = task_divergence(by_hand(tasks, latents=layers))
        assert found.diagonal().tolist() == [0.0, 0.0]
        assert found[0, 1] == found[1, 0]
        assert float(found[0, 1]) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("architecture", ["align_lora", "lora", "hydra", "lora_moe"])
def test_divergences_add_up_to_the_alignment_loss_whatever_the_model_aligns(architecture):
    model, inputs = of_architecture(architecture), with_tasks()
    recording = record_adapters(model, [inputs])
    heads = [z for layer in recording.latents.values() for z in (layer.unbind(1) if layer.dim() == 3 else [layer])]
    expected = sum(float(literal_kl(z, recording.tasks)) for z in heads) / len(heads)
    assert float(task_divergence(recording).triu().sum()) == pytest.approx(expected, rel=1e-4)


def test_a_task_of_one_token_has_no_variance():
    with pytest.raises(ValueError, match="the task 1 has 1 tokens"):
        task_divergence(by_hand((0, 0, 1), latents={"a": [[1.0], [2.0], [3.0]]}))


def test_an_example_is_the_mean_of_its_tokens_and_a_packed_row_one_of_each_task():
    z = [[1.0, 0.0], [3.0, 2.0], [10.0, 0.0], [20.0, 2.0]]
    found = example_latents(by_hand((0, 0, 1, 0), (0, 0, 0, 1), {"a": [[9.0]] * 4, "b": z, "c": [[9.0]] * 4}))
    assert found.layer == "b"  # the middle one
    assert found.tasks.tolist() == [0, 1, 0]
    assert found.points.tolist() == [[2.0, 1.0], [10.0, 0.0], [20.0, 2.0]]


def test_examples_are_numbered_through_all_batches():
    model = adapted()
    found = example_latents(record_adapters(model, [with_tasks(0), with_tasks(1)]), UP)
    assert found.tasks.tolist() == [0, 1, 2, 0, 1, 2, 1, 2, 0, 1, 2, 0]
    second = example_latents(record_adapters(model, [with_tasks(1)]), UP)
    torch.testing.assert_close(found.points[6:], second.points)


def test_points_of_two_far_clusters_are_told_apart():
    points, tasks = torch.tensor([[0.0], [1.0], [10.0], [11.0]]), torch.tensor([0, 0, 1, 1])
    found = separation(points, tasks)
    assert (found.accuracy, found.chance) == (1.0, 0.5)
    assert found.silhouette == pytest.approx(((10.5 - 1) / 10.5 + (9.5 - 1) / 9.5) / 2)


def test_points_that_know_nothing_of_their_tasks_are_at_chance():
    points = torch.randn(400, 8, generator=torch.Generator().manual_seed(0))
    found = separation(points, torch.arange(400) % 4)
    assert found.chance == 0.25
    assert found.accuracy == pytest.approx(0.25, abs=0.07)
    assert found.silhouette == pytest.approx(0, abs=0.05)


def test_the_probe_does_not_see_what_it_is_scored_on():
    """With more dimensions than points it would be right on all that it was fitted on."""
    points = torch.randn(40, 100, generator=torch.Generator().manual_seed(0))
    assert separation(points, torch.arange(40) % 2).accuracy < 0.75


def test_a_map_keeps_clusters_and_is_the_same_each_time():
    generator = torch.Generator().manual_seed(0)
    tasks = torch.arange(30) % 3
    points = torch.randn(30, 6, generator=generator) + 20 * torch.eye(6)[tasks]
    found = tsne(points)
    assert found.shape == (30, 2)
    assert torch.equal(found, tsne(points))
    assert separation(found, tasks).accuracy == 1.0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: head_similarity(llama()), "no adapters"),
        (lambda: head_similarity(adapted()), "no layer has several heads"),
        (lambda: routing(by_hand()), "no layer has a router"),
        (lambda: example_latents(by_hand(latents={"a": [[1.0]]}), "b"), "no adapted layer is called 'b'"),
        (lambda: separation(torch.ones(3, 1), torch.tensor([0, 0, 1])), "the points of 2 tasks, 1 of the smallest"),
        (lambda: separation(torch.ones(3, 1), torch.zeros(3)), "the points of 1 tasks"),
        (lambda: tsne(torch.ones(3, 1)), "t-SNE of 3 points"),
    ],
)
def test_what_is_not_there_is_said(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    "call", [lambda: tsne(torch.ones(9, 1)), lambda: separation(torch.ones(4, 1), torch.arange(4))]
)
def test_without_scikit_learn_the_cure_is_said(call, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"needs scikit-learn: pip install 'align_ext\[study\]'"):
        call()


def test_the_options_of_the_divergence_are_not_the_models():
    aligned, other = adapted(), adapted(align_eps=1.0, align_pairs="mean", align_layers="sum")
    expected = latents.task_divergence(record_adapters(aligned, [with_tasks()]))
    torch.testing.assert_close(latents.task_divergence(record_adapters(other, [with_tasks()])), expected)
