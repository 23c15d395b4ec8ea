"""One tolerance rule for every kernel test, judged over enough draws of the inputs that none decides by luck."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

# Two ways of adding up the same numbers round alike on average, but of one number either may be right by luck: then
# twice its error is nothing. A pool of so many elements has an error of its own, whatever processor rounded them.
ELEMENTS = 64
DRAWS = 16  # at most; an output of one element is judged over as many
# Of outputs that are exactly zero nothing is rounded: such a draw adds nothing to a pool.

Results = dict[str, Tensor]


def assert_draws_are_as_close_as_torch(
    draw: Callable[[int], tuple[Results, Results, Results]], draws: int = DRAWS
) -> Results:
    """Holds each output of an operator to the rule, over draws of its inputs until all outputs have ELEMENTS elements.

    Args:
        draw: of a seed the outputs by name: what the kernel returned, in any dtypes; the reference run in the dtype of
            the inputs; the reference run in float64 on the same inputs.
        draws: how many at most.

    Returns:
        What the kernel returned in the first draw.
    """
    pools: dict[str, list[tuple[Tensor, Tensor, Tensor]]] = {}
    for seed in range(draws):
        actual, same_dtype, exact = draw(seed)
        assert actual.keys() == same_dtype.keys() == exact.keys()
        for name, tensor in actual.items():
            pools.setdefault(name, []).append((tensor, same_dtype[name].to(tensor.dtype), exact[name]))
        elements = {name: sum(e.numel() for *_, e in pool if e.any()) for name, pool in pools.items()}
        if all(number == 0 or number >= ELEMENTS for number in elements.values()):
            break
    for name, pool in pools.items():
        try:
            assert_pool_is_as_close_as_torch(pool)
        except AssertionError as error:
            raise AssertionError(f"{name}, {len(pool)} draws: {error}") from error
    return {name: pool[0][0] for name, pool in pools.items()}


def compare_losses(run, op, oracle, device, inputs, tasks, draws=DRAWS, **options):
    """Holds a loss of latents and task ids, those of inputs(seed=...), and its gradient to the rule."""

    def draw(seed):
        z, task = inputs(seed=seed)
        same_dtype, exact = (run(oracle, z, task, tasks, dtype, **options) for dtype in (None, torch.float64))
        return run(op, z, task, tasks, device=device, **options), same_dtype, exact

    assert_draws_are_as_close_as_torch(draw, draws)


def assert_as_close_as_torch(actual: Tensor, same_dtype: Tensor, exact: Tensor) -> None:
    """The rule on one draw, of many elements."""
    assert_pool_is_as_close_as_torch([(actual, same_dtype, exact)])


def assert_pool_is_as_close_as_torch(pool: Sequence[tuple[Tensor, Tensor, Tensor]], slack: float = 2.0) -> None:
    """A kernel may be at most `slack` times as wrong as plain PyTorch in the same dtype, plus two roundings.

    Both in the largest element and in the L2 norm, so that an error in many small elements counts too. Over several
    draws it is the root of the mean square of the draws' errors, each in units of the draw's exact norm, or of the root
    mean square of these norms if that is larger: neither a large draw nor one whose sums cancel decides for all.

    Args:
        pool: of each draw what the kernel returned, dtype D; the reference run in D, which shows how much error D
            itself costs; and the reference run in float64 on the same inputs.
        slack: allowed ratio of the two errors.
    """
    for actual, same_dtype, exact in pool:
        assert actual.shape == exact.shape, (actual.shape, exact.shape)
        assert actual.dtype == same_dtype.dtype, (actual.dtype, same_dtype.dtype)
        assert exact.dtype == torch.float64
        assert torch.isfinite(actual).all()
    if not pool[0][2].numel():
        return
    floor = 2 * torch.finfo(pool[0][0].dtype).eps
    for norm in (lambda t: t.abs().max(), lambda t: t.norm()):
        sizes = torch.stack([norm(exact) for *_, exact in pool])
        units = sizes.clamp_min(max(root_mean_square(sizes).item(), 1e-30))
        error, budget = (
            root_mean_square(torch.stack([norm(three[of].double() - three[2]) for three in pool]) / units)
            for of in (0, 1)
        )
        limit = slack * budget + floor * root_mean_square(sizes / units)
        assert error <= limit, f"error {error:.2e}, plain torch {budget:.2e}, floor {floor:.2e}"


def root_mean_square(t: Tensor) -> Tensor:
    """Computes sqrt(mean t²)."""
    return t.square().mean().sqrt()
