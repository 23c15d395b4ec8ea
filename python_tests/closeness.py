"""One tolerance rule for every kernel test."""

import torch
from torch import Tensor


def assert_as_close_as_torch(actual: Tensor, same_dtype: Tensor, exact: Tensor, slack: float = 2.0) -> None:
    """A kernel may be at most `slack` times as wrong as plain PyTorch in the same dtype, plus two roundings.

    Both in the largest element and in the relative L2 norm, so that an error in many small elements counts too.

    Args:
        actual: what the kernel returned, dtype D.
        same_dtype: the reference run in D; it shows how much error D itself costs.
        exact: the reference run in float64 on the same inputs.
        slack: allowed ratio of the two errors.
    """
    assert actual.shape == exact.shape, (actual.shape, exact.shape)
    assert actual.dtype == same_dtype.dtype, (actual.dtype, same_dtype.dtype)
    assert exact.dtype == torch.float64
    assert torch.isfinite(actual).all()
    if not exact.numel():
        return
    floor = 2 * torch.finfo(actual.dtype).eps
    for norm in (lambda t: t.abs().max(), lambda t: t.norm()):
        scale = norm(exact).clamp_min(1e-30)
        error, budget = norm(actual.double() - exact) / scale, norm(same_dtype.double() - exact) / scale
        assert error <= slack * budget + floor, f"error {error:.2e}, plain torch {budget:.2e}, floor {floor:.2e}"
