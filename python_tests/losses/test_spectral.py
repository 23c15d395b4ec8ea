"""The overlap of a layer's heads: by hand, against an SVD, and when its projectors are refreshed."""

import literal
import pytest
import torch
from tiny import adapted, batch

from align_ext.losses.spectral import overlap, projectors, self_orthogonality


def heads(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_the_overlap_by_hand():
    a, b, c = torch.tensor([[1.0], [0.0]]), torch.tensor([[0.0], [2.0]]), torch.tensor([[3.0], [1.0]])
    assert overlap(torch.stack([a, b])).item() == 0  # orthogonal
    assert overlap(torch.stack([a, c])).item() == 9
    assert overlap(torch.stack([a, b, c])).item() == 0 + 9 + 4
    assert overlap(torch.stack([a])).item() == 0


def test_projectors_by_hand():
    """One singular value 2 and none: mean 1, so the direction counts exp(-2) and the other 1."""
    B = torch.tensor([[[2.0, 0.0], [0.0, 0.0], [0.0, 0.0]]])
    expected = torch.diag(torch.tensor([-2.0, 0.0]).exp())
    assert torch.allclose(projectors(B)[0], expected)
    # Heads of rank 1 have Sigma = mean Sigma: B' = B / e.
    one = torch.tensor([[[3.0], [4.0]], [[1.0], [0.0]]])
    assert overlap(one, projectors(one)).item() == pytest.approx(9 * torch.e**-4, rel=1e-6)


def test_projectors_are_those_of_an_svd():
    B = heads(3, 20, 4)
    B[1, :, 2] = 1e-3 * B[1, :, 2]  # a small singular value
    for P, head in zip(projectors(B), B, strict=True):
        torch.testing.assert_close(P, literal.projector(head), rtol=0, atol=1e-12)
    assert torch.equal(projectors(torch.zeros(2, 5, 3)), torch.eye(3).expand(2, 3, 3))


def test_the_closed_form_of_all_pairs_and_its_gradient():
    B = heads(3, 20, 4).requires_grad_()
    P = projectors(B)
    C = B @ P
    gram = C.movedim(0, 1).flatten(1).mT @ C.movedim(0, 1).flatten(1)
    half = 0.5 * (gram.square().sum() - (C.mT @ C).square().sum())
    torch.testing.assert_close(overlap(B, P), half)
    torch.testing.assert_close(overlap(B, P), literal.spectral(B, "paper"))
    (gradient,) = torch.autograd.grad(overlap(B, P), B)
    for i in range(3):  # 2 (Σ_{j≠i} B'_j B'_jᵀ B'_i) P_i
        others = sum(C[j] @ C[j].T @ C[i] for j in range(3) if j != i)
        torch.testing.assert_close(gradient[i], 2 * others @ P[i])


@pytest.mark.parametrize("loss", [overlap, lambda B: overlap(B, projectors(heads(2, 6, 3)))])
def test_gradcheck(loss):
    assert torch.autograd.gradcheck(loss, heads(2, 6, 3, seed=1).requires_grad_())


def test_self_orthogonality_by_hand():
    """Columns of equal norm at right angles cost nothing; Sigma = (2, 1) has the mean 1.5 and c² = 2.5."""
    B = torch.tensor([[[3.0, 0.0], [0.0, 3.0]], [[2.0, 0.0], [0.0, 1.0]]])
    weights = torch.tensor([-2 / 1.5, -1 / 1.5]).exp()
    expected = (1.5 * weights[0] ** 2) ** 2 + (1.5 * weights[1] ** 2) ** 2
    assert self_orthogonality(B).item() == pytest.approx(expected.item() / 2, rel=1e-6)
    assert self_orthogonality(torch.zeros(2, 5, 3)).item() == 0


def test_self_orthogonality_and_its_gradient_are_those_of_the_literal_form():
    B, same = heads(3, 20, 4).requires_grad_(), heads(3, 20, 4).requires_grad_()
    ours, expected = self_orthogonality(B), literal.spectral(same, "released")
    torch.testing.assert_close(ours, expected)
    torch.testing.assert_close(torch.autograd.grad(ours, B), torch.autograd.grad(expected, same))


def test_16_bit_heads_are_compared_in_float32():
    B = 50 * heads(2, 300, 2).half()
    for loss in (overlap(B), self_orthogonality(B)):
        assert loss.dtype == torch.float32
        assert torch.isfinite(loss)


def test_projectors_are_the_identity_while_the_heads_are_zero_and_then_live_k_forwards():
    options = {"architecture": "hydra", "spectral": "paper", "spectral_steps": 3, "num_heads": 2}
    model = adapted(**options)
    adapter = next(m.adapter for m in model.modules() if hasattr(m, "adapter"))
    start = adapter.lora_B.detach().clone()
    with torch.no_grad():
        adapter.lora_B.zero_()

    def forward():
        inputs, _ = batch()
        return model(**inputs).loss

    for _ in range(4):
        forward()
        assert torch.equal(adapter.lora_P, torch.eye(4).expand(2, 4, 4).to(adapter.lora_P))
        assert int(adapter.lora_age) == 0
    refreshed = []
    for step in range(7):
        with torch.no_grad():
            adapter.lora_B.copy_((1 + step) * start + step * start.flip(0))
        before = adapter.lora_P.clone()
        forward()
        if not torch.equal(before, adapter.lora_P):
            refreshed.append(step)
            torch.testing.assert_close(adapter.lora_P, projectors(adapter.lora_B))
    assert refreshed == [0, 3, 6]


def test_a_refresh_between_a_forward_and_its_backward_changes_nothing():
    model = adapted(architecture="hydra", spectral="paper", spectral_steps=1, num_heads=2)
    inputs, _ = batch()
    first = model(**inputs).loss
    with torch.no_grad():
        for module in model.modules():
            if hasattr(module, "adapter"):
                module.adapter.lora_P.zero_()  # as DDP's broadcast of buffers writes in place
    model(**inputs)
    first.backward()
