"""How an operator gets its autograd formula: registered for compilers and tracers, called directly in eager mode.

Both ways run the same two functions. The registered formula costs some 100 microseconds of Python a call, forward and
backward, most of them in torch's own machinery; torch.autograd.Function costs twenty. What it costs grows with its
arguments, so it is given those that may need a gradient, and all others as one.
"""

from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor

from align_ext.ops import _native  # noqa: F401

SetupContext = Callable[[Any, tuple[Any, ...], Any], None]
Backward = Callable[..., tuple[Tensor | None, ...]]


def below_autograd(operator: Any, inputs: tuple[Any, ...]) -> Any:
    """Calls an operator past its registered formula, which takes longer than a small operator itself."""
    with torch._C._AutoDispatchBelowAutograd():
        return operator(*inputs)


def apply_of(function: Any) -> Callable[..., Any]:
    """An autograd.Function's apply, past 2 us of Python that are all about torch.func."""
    return super(torch.autograd.Function, function).apply


def differentiable(
    name: str, backward: Backward, setup_context: SetupContext, trained: Sequence[str] = ()
) -> Callable[..., Any]:
    """Gives the operator align_ext::name its gradient.

    Args:
        name: of the operator.
        backward: (ctx, *gradients of the outputs) -> gradients of trained.
        setup_context: (ctx, inputs, outputs): saves what backward needs. ctx.eager says how both were called.
        trained: the arguments that have a gradient, the first one first (ctx.needs_input_grad[0] is about it in both
            ways); all if not given.

    Returns:
        A function that calls the operator, arguments by position.
    """
    operator = getattr(torch.ops.align_ext, name).default
    arguments = [argument.name for argument in operator._schema.arguments]
    positions = [arguments.index(argument) for argument in trained or arguments]
    trained_of: Any = itemgetter(*positions) if len(positions) > 1 else lambda inputs: (inputs[positions[0]],)

    def setup_registered(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.eager = False
        setup_context(ctx, inputs, output)

    def backward_registered(ctx: Any, *d_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
        gradients = dict(zip(positions, backward(ctx, *d_outputs), strict=True))
        return tuple(gradients.get(position) for position in range(len(arguments)))

    torch.library.register_autograd(f"align_ext::{name}", backward_registered, setup_context=setup_registered)

    # Not split into forward and setup_context: torch inspects the signature of such at every call.
    def forward(ctx: Any, *trained_and_inputs: Any) -> Any:
        inputs = trained_and_inputs[-1]
        output = below_autograd(operator, inputs)
        ctx.eager = True
        setup_context(ctx, inputs, output)
        return output

    def backward_eager(ctx: Any, *d_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
        return *backward(ctx, *d_outputs), None

    members = {"forward": staticmethod(forward), "backward": staticmethod(backward_eager)}
    function: Any = type(name, (torch.autograd.Function,), members)
    apply = apply_of(function)

    def call(*inputs: Any) -> Any:
        if torch.compiler.is_compiling():
            return operator(*inputs)
        if not torch.is_grad_enabled():
            return below_autograd(operator, inputs)
        of_func = torch._C._are_functorch_transforms_active()  # refused, by a message of torch's
        return (function.apply if of_func else apply)(*trained_of(inputs), inputs)

    return call
