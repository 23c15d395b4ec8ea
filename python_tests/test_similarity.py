"""Similarity of heads and tasks, and routing: values computed by hand, and models of the papers' architectures."""

import builtins
import math

import pytest
import torch
from tiny import TASKS, adapted, batch, llama

from align_ext import replace_linear_with_align_lora
from align_ext.adapters.base import Adapter
from align_ext.diagnostics import similarity

UP = "model.layers.0.mlp.up_proj"
OF_HEADS = {"num_heads": 3, "align": None, "target_blocks": ()}


def with_tasks():
    inputs, tasks = batch()
    return {**inputs, "task_ids": tasks}


def measured_with_input(measure, model, inputs):
    """What `measure` finds, and the input that UP got meanwhile."""
    seen = {}
    hook = model.get_submodule(UP).register_forward_pre_hook(lambda module, args: seen.update(x=args[0]))
    found = measure(model, inputs)
    hook.remove()
    return found, seen["x"]


def adapters(model):
    return {n.removesuffix(".adapter"): m for n, m in model.named_modules() if isinstance(m, Adapter)}


def test_cosines_are_those_computed_by_hand():
    rows = torch.tensor([[1.0, 0.0], [3.0, 3.0], [-2.0, 0.0], [0.0, 0.0]])
    found = similarity.cosines(rows)
    half = math.sqrt(0.5)
    expected = torch.tensor([[1, half, -1], [half, 1, -half], [-1, -half, 1]])
    torch.testing.assert_close(found[:3, :3], expected)
    assert found[3].isnan().all()


def test_heads_are_compared_as_flattened_matrices_layer_by_layer():
    model = adapted(architecture="hydra", **OF_HEADS)
    with torch.no_grad():
        B = adapters(model)[UP].lora_B
        B[1] = -2 * B[0]
        B[2] = 0
        B[2, 0, 0] = 1.0
    found = similarity.head_similarity(model)
    assert len(found) == 6
    assert found[UP].shape == (3, 3)
    assert float(found[UP][0, 1]) == pytest.approx(-1)
    assert float(found[UP][0, 2]) == pytest.approx((B[0, 0, 0] / B[0].norm()).item())
    mean = similarity.mean_similarity({"a": found[UP], "b": torch.full((3, 3), float("nan"))})
    torch.testing.assert_close(mean, found[UP])


def test_heads_at_zero_have_no_direction():
    model = llama()
    replace_linear_with_align_lora(model, architecture="hydra")
    assert all(matrix.isnan().all() for matrix in similarity.head_similarity(model).values())


def test_routing_of_given_weights_is_computed_by_hand():
    found = similarity._routing(torch.tensor([[1.0, 0.0], [0.5, 0.5], [0.25, 0.75], [0.0, 1.0]]))
    entropies = [0, math.log(2), -0.25 * math.log(0.25) - 0.75 * math.log(0.75), 0]
    assert found.entropy == pytest.approx(sum(entropies) / 4 / math.log(2))
    assert found.importance.tolist() == pytest.approx([0.4375, 0.5625])
    assert found.load.tolist() == [0.5, 0.5]


def test_one_head_has_nothing_to_choose():
    assert similarity._routing(torch.ones(5, 1)).entropy == 1.0


@pytest.mark.parametrize("architecture", ["hydra", "lora_moe", "mtlora"])
def test_a_routers_weights_are_those_of_the_softmax_of_the_tokens_that_count(architecture):
    options = {**OF_HEADS, "balance": None, "spectral": None} if architecture == "mtlora" else OF_HEADS
    model = adapted(architecture=architecture, **options)
    inputs = with_tasks()
    found, x = measured_with_input(similarity.routing, model, inputs)
    R = adapters(model)[UP].lora_router.lora_R.detach()
    w = (x @ R.T).unflatten(-1, (-1, 3)).softmax(-1)[inputs["attention_mask"] == 1].flatten(0, 1)
    assert len(found) == 6
    torch.testing.assert_close(found[UP].importance, w.mean(0), check_dtype=False)
    assert found[UP].entropy == pytest.approx(float(-(w * w.log()).sum(1).mean() / math.log(3)), rel=1e-5)
    assert found[UP].load.sum() == pytest.approx(1)
    assert model.training
    assert "low_rank_forward" not in adapters(model)[UP].__dict__


def test_a_zero_router_is_uniform_and_a_steep_one_is_not():
    model = adapted(architecture="r_lora", **OF_HEADS)
    for adapter in adapters(model).values():
        torch.nn.init.zeros_(adapter.lora_router.lora_R)
    assert similarity.routing(model, with_tasks())[UP].entropy == pytest.approx(1)
    for adapter in adapters(model).values():
        torch.nn.init.normal_(adapter.lora_router.lora_R, std=100)
    assert similarity.routing(model, with_tasks())[UP].entropy < 0.5


def test_tokens_of_no_task_do_not_count():
    model = adapted(architecture="hydra", **OF_HEADS)
    inputs = with_tasks()
    first = {name: value[:1] for name, value in inputs.items()}
    alone = similarity.routing(model, {**inputs, "task_ids": torch.tensor([0, -1, -1, -1, -1, -1])})
    torch.testing.assert_close(alone[UP].importance, similarity.routing(model, first)[UP].importance)
    with pytest.raises(ValueError, match="no token of the batch counts"):
        similarity.routing(model, {**inputs, "task_ids": torch.full((6,), -1)})


@pytest.mark.parametrize("architecture", ["align_lora", "lora_moe"])
def test_latents_of_tasks_are_compared_by_their_means(architecture):
    options = OF_HEADS if architecture == "lora_moe" else {}
    model = adapted(architecture=architecture, **options)
    inputs = with_tasks()
    found, x = measured_with_input(similarity.latent_similarity, model, inputs)
    A = adapters(model)[UP].lora_A
    z = x @ A.reshape(-1, A.shape[-1]).T
    token = torch.where(inputs["attention_mask"] == 1, inputs["task_ids"][:, None], -1)
    means = torch.stack([z[token == task].mean(0) for task in range(TASKS)])
    assert found[UP].shape == (TASKS, TASKS)
    torch.testing.assert_close(found[UP], similarity.cosines(means), check_dtype=False)


def test_a_multi_adapter_model_is_measured_on_the_batchs_tasks():
    model = adapted(architecture="multi_adapter")
    assert similarity.head_similarity(model)[UP].shape == (TASKS, TASKS)
    assert similarity.latent_similarity(model, with_tasks())[UP].diagonal().tolist() == pytest.approx([1.0] * TASKS)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: similarity.head_similarity(llama()), "no adapters"),
        (lambda: similarity.head_similarity(adapted()), "no layer has several heads"),
        (lambda: similarity.routing(adapted(), batch()[0]), "no layer has a router"),
        (lambda: similarity.latent_similarity(adapted(), batch()[0]), "no task_ids"),
    ],
)
def test_what_is_not_there_is_said(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_heat_map_is_drawn_where_matplotlib_is(tmp_path):
    pytest.importorskip("matplotlib")
    matrices = {f"layer {i}": torch.eye(3) for i in range(7)}
    assert similarity.plot_similarity(matrices, tmp_path / "x.png") == str(tmp_path / "x.png")
    assert (tmp_path / "x.png").read_bytes()[:4] == b"\x89PNG"


def test_without_matplotlib_nothing_is_drawn(tmp_path, monkeypatch):
    plain = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("matplotlib"):
            raise ImportError
        return plain(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    assert similarity.plot_similarity({"layer": torch.eye(3)}, tmp_path / "y.png") is None
    assert not (tmp_path / "y.png").exists()
