"""Tensors of more than 2^31 elements: rows at both ends and around that element are right, and so are sums over all.

Rows repeat those of a block, so that the reference has few of them. Outside of the rows that are looked at incoming
gradients are zero, and tokens have no task.
"""

from dataclasses import replace

import pytest
import torch
from closeness import assert_as_close_as_torch
from gpu.cases import EVERY_CASE, closeness_of, move

from align_ext import ops
from align_ext.reference.philox import philox

BLOCK, RANK = 100, 8
# rows, columns; of a loss's latents rows and rank. cpu: the SIMT engine.
ROWS = {"cuda": ((1 << 19) + 100, 4096), "cpu": (330, 24)}
LATENTS = {"cuda": ((1 << 25) + 100, 64), "cpu": (330, 8)}
OF_ROWS = ("x", "base", "dy", "dz", "dw", "group", "task", "y", "z", "w", "dx", "dbase")


def looked_at(rows, columns):
    """The first rows, the last ones, and those around element 2^31 (of few rows those in the middle)."""
    middle = min((1 << 31) // columns, rows // 2 if rows < 1000 else rows)
    return torch.cat([torch.arange(64), torch.arange(middle - 20, middle + 20), torch.arange(rows - 64, rows)]).unique()


@EVERY_CASE
def test_rows_and_sums(device, case):
    case = replace(case, options=case.options | ({} if case.is_loss else {"dropout_p": 0.0}))
    rows, columns = (LATENTS if case.is_loss else ROWS)[device.type]
    block = case.tensors((BLOCK, columns, columns, columns if case.is_loss else RANK), torch.bfloat16)
    where, index = looked_at(rows, columns), torch.arange(rows, device=device) % BLOCK
    large = {name: t[index] if name in OF_ROWS else t for name, t in move(block, device).items()}
    assert device.type == "cpu" or large["x"].numel() > 1 << 31
    elsewhere = torch.ones(rows, dtype=torch.bool, device=device)
    elsewhere[where.to(device)] = False
    for name in {"dy", "dz", "dw"} & large.keys():
        large[name][elsewhere] = 0
    if case.is_loss:
        large["task"][elsewhere] = -1
    found = case.results(large)
    if "y" in found and not case.is_loss:
        for begin in range(
            0, rows - BLOCK, BLOCK * (rows // BLOCK // 50 or 1)
        ):  # the rows between repeat the first ones
            torch.testing.assert_close(found["y"][begin : begin + BLOCK], found["y"][:BLOCK], rtol=2e-2, atol=5e-2)
    of_rows = OF_ROWS if not case.is_loss else ("dx",)
    found = {name: t[where.to(device)] if name in of_rows else t for name, t in found.items()}
    small = {name: t[where % BLOCK] if name in OF_ROWS else t for name, t in block.items()}
    found, same, exact = closeness_of(case, found, small)
    for name in exact:
        assert_as_close_as_torch(found[name], same[name].to(found[name].dtype), exact[name])


@pytest.mark.parametrize("p", [0.5])
def test_masks(device, p):
    """The mask of an element is that of its number, also beyond 2^31, in both passes."""
    rows, columns = ROWS[device.type]
    seed, offset = 123456789, 42
    generator = torch.Generator().manual_seed(0)
    A = torch.randn(1, columns, generator=generator).bfloat16()
    x = torch.ones(rows, columns, dtype=torch.bfloat16, device=device).requires_grad_()
    B, base = (torch.zeros(shape, dtype=torch.bfloat16, device=device) for shape in ((8, 1), (rows, 8)))
    rng = torch.tensor([seed, offset], device=device)
    _, z = ops.grouped_lora(x, A.to(device), B, dropout_p=p, rng=rng, base_out=base)
    z.backward(torch.ones_like(z))
    where = looked_at(rows, columns)
    assert columns % 8 == 0
    blocks = where[:, None] * (columns // 8) + torch.arange(columns // 8)
    words = philox(seed, blocks, offset)
    lanes = torch.stack([words & 0xFFFF, words >> 16], dim=-1).reshape(len(where), columns)
    mask = (lanes >= round(65536 * p)).double() / (1 - p)
    torch.testing.assert_close(z[where.to(device)].cpu().double(), mask @ A.double().T, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(x.grad[where.to(device)].cpu().double(), mask * A.double(), rtol=8e-3, atol=0)
