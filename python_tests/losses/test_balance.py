"""The balance of the routing: by hand, its gradient, and several processes."""

import literal
import pytest
import torch

from align_ext.losses.balance import Balance
from align_ext.losses.tokens import TokenTasks

EVERY = TokenTasks(torch.zeros(1, dtype=torch.int64))


def balance(w, kind, tokens=EVERY):
    return Balance.of({0: w}, tokens, kind, distributed=False)


def test_cv2_by_hand():
    w = torch.tensor([[[0.75, 0.25]], [[1.0, 0.0]]])  # means 7/8 and 1/8, their mean 1/2, variance 9/32
    assert balance(w, "cv2").value.item() == pytest.approx((9 / 32) / 0.25)
    even = torch.tensor([[[0.75, 0.25]], [[0.25, 0.75]]])
    assert balance(even, "cv2").value.item() == 0
    assert balance(torch.ones(4, 2, 1), "cv2").value.item() == 0  # one head
    assert (balance(torch.ones(4, 2, 1), "cv2").d_w[0] == 0).all()


def test_switch_by_hand():
    w = torch.tensor([[[0.75, 0.25, 0.0]], [[1.0, 0.0, 0.0]]])  # P = 7/8, 1/8, 0; chosen by 1, 1/2, 0 of the tokens
    loss = balance(w, "switch")
    assert loss.value.item() == pytest.approx(3 * (7 / 8 + 1 / 16))
    assert torch.allclose(loss.d_w[0], torch.tensor([3.0, 1.5, 0.0]) / 2)  # N f_i / tokens


def test_switch_of_probabilities_by_hand():
    p = torch.tensor([[[0.6, 0.3, 0.1]], [[0.2, 0.5, 0.3]]])  # P = 0.4, 0.4, 0.2; of two, chosen by 1/2, 1, 1/2
    loss = Balance.of({0: p}, EVERY, "switch", distributed=False, top_k=2)
    assert loss.value.item() == pytest.approx(3 * (0.2 + 0.4 + 0.1))
    assert torch.allclose(loss.d_w[0], torch.tensor([1.5, 3.0, 1.5]) / 2)


@pytest.mark.parametrize("kind", ["cv2", "switch"])
@pytest.mark.parametrize("groups", [1, 3])
def test_value_and_gradient_are_the_literal_ones(kind, groups):
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for layer, tokens in ((0, 12), (3, 12)):
        logits = torch.randn(tokens, groups, 4, generator=generator, dtype=torch.float64)
        logits[..., 1] = logits[..., 1].masked_fill(logits[..., 1] < 0, -torch.inf)  # left out by a top-k
        weights[layer] = logits.softmax(-1).requires_grad_()
    tasks = TokenTasks(torch.tensor([[0, 1, -1], [-1, -1, 1], [2, 0, 0], [1, 1, -1]]))
    valid = tasks.ids.flatten() >= 0
    detached = {layer: w.detach() for layer, w in weights.items()}
    actual = Balance.of(detached, tasks, kind, distributed=False)
    expected = torch.stack([literal.balance(w, valid, kind) for w in weights.values()])
    torch.testing.assert_close(actual.per_layer, expected.detach(), rtol=1e-12, atol=0)
    torch.testing.assert_close(actual.value, expected.detach().mean(), rtol=1e-12, atol=0)
    grads = torch.autograd.grad(2.5 * 3 * expected.mean(), list(weights.values()))
    ours = actual.gradients(detached, tasks, torch.tensor(2.5), 3.0)
    for w, gradient in zip(ours.values(), grads, strict=True):
        torch.testing.assert_close(w, gradient, rtol=1e-10, atol=1e-14)
    assert (ours[0][~valid] == 0).all()


def test_a_batch_without_a_valid_token_has_neither_loss_nor_gradient():
    w, nobody = torch.rand(4, 1, 3), TokenTasks(torch.full((4,), -1))
    for kind in ("cv2", "switch"):
        loss = balance(w, kind, nobody)
        assert loss.value.item() == 0
        assert (loss.gradients({0: w}, nobody, torch.tensor(1.0), 1.0)[0] == 0).all()
