"""Task ids that give an alignment loss nothing to compare."""

import pytest
import torch

NOBODY_TO_COMPARE = pytest.mark.parametrize(
    ("name", "task", "tasks"),
    [
        ("no tokens", [], 3),
        ("no task", [-1, -1, -1], 3),
        ("one task", [0, 0, 0, 0], 3),
        ("single tokens", [0, 1, 2], 3),
        ("one active task of two", [0, 0, 0, 1], 2),
        ("ids beyond the tasks", [0, 0, 0, 7, 7], 2),
    ],
)


def assert_exactly_zero(op, device, name, task, tasks):
    z = torch.randn(len(task), 4).to(device).requires_grad_()
    loss = op(z, torch.tensor(task, dtype=torch.int64, device=device), tasks)
    loss.backward()
    assert loss.item() == 0, name
    assert (z.grad == 0).all(), name
