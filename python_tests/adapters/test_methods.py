"""The methods that the papers compare themselves with, by hand: one layer, small numbers."""

import torch
from torch import nn

from align_ext import replace_linear_with_align_lora, set_task

ONES = torch.ones(1, 2, dtype=torch.float64)


def layer(weight, **options):
    """A linear layer of this weight with an adapter of rank 1 and s = 1, in evaluation."""
    model = nn.Sequential(nn.Linear(len(weight[0]), len(weight), bias=False)).double()
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor(weight))
    options = {"r": 1, "lora_alpha": 1, "lora_dropout": 0.0, "target_modules": ["0"], "align": None} | options
    return replace_linear_with_align_lora(model, **options).eval()


def fill(adapter, **values):
    with torch.no_grad():
        for name, value in values.items():
            getattr(adapter, name).copy_(torch.tensor(value))


def test_multilora_by_hand():
    model = layer([[1.0, 0.0], [0.0, 1.0]], architecture="multilora", num_heads=2)
    A, B = [[[1.0, 2.0]], [[3.0, 0.0]]], [[[1.0], [5.0]], [[2.0], [1.0]]]
    fill(model[0].adapter, lora_A=A, lora_B=B, lora_scaling=[[1.0, 0.0], [0.5, 2.0]])
    # x = (1, 1): z = 3, 3; c * B z = (3, 0) and (3, 6)
    assert model(ONES).tolist() == [[1 + 3 + 3, 1 + 0 + 6]]


def test_multilora_starts_with_scalings_of_zero_and_no_other_zero():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(300, 200))
    adapter = replace_linear_with_align_lora(model, architecture="multilora", target_modules=["0"], r=40)[0].adapter
    assert not adapter.lora_scaling.any()
    for matrix, inputs in ((adapter.lora_A, 300), (adapter.lora_B, 40)):  # uniform within 1 / sqrt(inputs)
        assert 0.99 < matrix.abs().max() * inputs**0.5 <= 1
        assert abs(matrix.std() * (3 * inputs) ** 0.5 - 1) < 0.02


def test_moelora_by_hand():
    model = layer([[1.0, 0.0], [0.0, 1.0]], architecture="moelora", num_heads=2, num_tasks=2)
    adapter = model[0].adapter
    A, B = [[[1.0, 2.0]], [[3.0, 0.0]]], [[[1.0], [5.0]], [[2.0], [1.0]]]
    gate, task = torch.zeros(2, 64), torch.zeros(2, 64)
    gate[0, 0], task[0, 0] = 1.0, torch.log(torch.tensor(3.0))  # the weights of task 0 are 3/4 and 1/4
    fill(adapter, lora_A=A, lora_B=B, lora_gate=gate.tolist(), lora_task=task.tolist())
    for k, (first, second) in enumerate([(0.75, 0.25), (0.5, 0.5)]):
        set_task(model, k)
        # x = (1, 1): z = 3, 3; B z = (3, 15) and (6, 3)
        wanted = torch.tensor([[1 + 3 * first + 6 * second, 1 + 15 * first + 3 * second]], dtype=torch.float64)
        torch.testing.assert_close(model(ONES), wanted, rtol=1e-7, atol=0)


def test_mtlora_cvpr_by_hand():
    model = layer([[1.0, 0.0], [0.0, 1.0]], architecture="mtlora_cvpr", num_tasks=2)
    A, B = [[[1.0, 2.0]], [[3.0, 0.0]], [[0.0, 1.0]]], [[[1.0], [5.0]], [[2.0], [1.0]], [[7.0], [0.0]]]
    fill(model[0].adapter, lora_A=A, lora_B=B)
    for task, own in enumerate([(6, 3), (7, 0)]):  # x = (1, 1): the shared z = 3, B_0 z = (3, 15)
        set_task(model, task)
        assert model(ONES).tolist() == [[1 + 3 + own[0], 1 + 15 + own[1]]]


def test_nlora_starts_from_rows_and_columns_of_the_weight_by_hand():
    model = layer([[1.0, 2.0, 0.0], [0.0, 1.0, 3.0], [4.0, 0.0, 1.0]], architecture="nlora", r=2, lora_alpha=2)
    adapter = model[0].adapter
    assert adapter.lora_A.tolist() == [[1, 2, 0], [0, 1, 3]]
    assert adapter.lora_B.tolist() == [[1, 2], [0, 1], [4, 0]]
    assert adapter.lora_N.tolist() == [[1, 2], [0, 1]]
    x = torch.tensor([[1.0, 0.0, 1.0]], dtype=torch.float64)
    assert torch.equal(model(x), model[0].base_layer(x))
    fill(adapter, lora_N=[[1.0, 2.0], [0.0, 2.0]])  # z = (1, 3): N z moves from (7, 3) to (7, 6), B N z by (6, 3, 0)
    assert (model(x) - model[0].base_layer(x)).tolist() == [[6, 3, 0]]


def test_malora_by_hand():
    model = layer([[1.0, 0.0], [0.0, 1.0]], architecture="malora", num_heads=3, shared_rank=2)
    adapter = model[0].adapter
    C, B = [[[1.0, 0.0]], [[1.0, 1.0]], [[9.0, 9.0]]], [[[1.0], [5.0]], [[2.0], [1.0]], [[9.0], [9.0]]]
    fill(adapter, lora_A=[[1.0, 2.0], [0.0, 1.0]], lora_C=C, lora_B=B)
    fill(adapter.lora_router, lora_R=[[0.0, 0.0], [0.0, 0.0], [-1.0, -1.0]])  # the first two, half each
    # x = (1, 1): S x = (3, 1), z = 3 and 4, B z = (3, 15) and (8, 4)
    assert model(ONES).tolist() == [[1 + 5.5, 1 + 9.5]]
