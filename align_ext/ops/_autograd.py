"""Autograd formulas of operators: registered for compilers and tracers, called directly in eager mode.

Both ways run the same two functions. The registered formula costs about 100 microseconds of Python per call, forward
and backward, mostly inside torch; torch.autograd.Function costs about 20. Its cost grows with the number of arguments,
so it gets the arguments that may need a gradient one by one and all inputs again as one tuple.
"""

from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor

from align_ext.ops import _native  # noqa: F401

SetupContext = Callable[[Any, tuple[Any, ...], Any], None]
Backward = Callable[..., Sequence[Tensor | None]]


def below_autograd(operator: Any, inputs: tuple[Any, ...]) -> Any:
    """Calls an operator without its registered autograd formula, which takes longer than a small operator itself."""
    with torch._C._AutoDispatchBelowAutograd():
        return operator(*inputs)


def made(inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Returns the inputs of an operator, with the tensor that a function among them makes in the function's place."""
    return tuple(given() if callable(given) else given for given in inputs)


def apply_of(function: Any) -> Callable[..., Any]:
    """Returns an autograd.Function's apply without the 2 us of Python that only torch.func needs."""
    return super(torch.autograd.Function, function).apply


def differentiable(
    name: str, backward: Backward, setup_context: SetupContext, trained: Sequence[str] = ()
) -> Callable[..., Any]:
    """Registers the gradient of the operator align_ext::name.

    Args:
        name: the operator's name.
        backward: (ctx, *gradients of the outputs) -> gradients of the arguments in `trained`.
        setup_context: (ctx, inputs, outputs): saves what backward needs. ctx.eager tells which way is used.
        trained: the arguments that have a gradient, in order, so that ctx.needs_input_grad[0] is the first one's in
            both ways; all arguments if not given. Or one argument that is a list of tensors, whose gradients backward
            returns one by one.

    Returns:
        A function that calls the operator with positional arguments.
    """
    operator = getattr(torch.ops.align_ext, name).default
    arguments = [argument.name for argument in operator._schema.arguments]
    positions = [arguments.index(argument) for argument in trained or arguments]
    of_list = isinstance(operator._schema.arguments[positions[0]].type, torch.ListType)
    one_by_one = len(positions) > 1 or of_list
    select_trained: Any = itemgetter(*positions) if one_by_one else lambda inputs: (inputs[positions[0]],)

    def setup_registered(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.eager = False
        if of_list:  # torch takes an empty list for one of tensors, and wants a list of gradients
            ctx.no_gradients = [[] if isinstance(value, (list, tuple)) and not value else None for value in inputs]
        setup_context(ctx, inputs, output)

    def backward_registered(ctx: Any, *d_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
        of_trained = backward(ctx, *d_outputs)
        gradients = dict(zip(positions, (list(of_trained),) if of_list else of_trained, strict=True))
        others = ctx.no_gradients if of_list else [None] * len(arguments)
        return tuple(gradients.get(position, other) for position, other in enumerate(others))

    torch.library.register_autograd(f"align_ext::{name}", backward_registered, setup_context=setup_registered)

    # Not split into forward and setup_context, because torch would inspect the signature at every call.
    def forward(ctx: Any, *trained_and_inputs: Any) -> Any:
        inputs = trained_and_inputs[-1]
        output = below_autograd(operator, made(inputs))
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
            return operator(*made(inputs))
        if not torch.is_grad_enabled():
            return below_autograd(operator, made(inputs))
        in_torch_func = torch._C._are_functorch_transforms_active()  # torch refuses them with its own message
        return (function.apply if in_torch_func else apply)(*select_trained(inputs), inputs)

    return call
