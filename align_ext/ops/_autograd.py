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


def one_by_one(values: Sequence[Any]) -> tuple[Any, ...]:
    """Returns the values, and in place of a list its elements."""
    return tuple(v for value in values for v in (value if isinstance(value, (list, tuple)) else [value]))


def _gradients_of(value: Any) -> int | None:
    """Returns how many gradients torch wants of a list of tensors, also of an empty one of whatever; None: one."""
    tensors = isinstance(value, (list, tuple)) and all(isinstance(v, Tensor) for v in value)
    return len(value) if tensors else None


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
            both ways; all arguments if not given. Of a list of tensors backward returns the gradients one by one.

    Returns:
        A function that calls the operator with positional arguments. Lists that the operator returns come one tensor
        after the other, and so backward gets their gradients.
    """
    operator = getattr(torch.ops.align_ext, name).default
    arguments = [argument.name for argument in operator._schema.arguments]
    positions = [arguments.index(argument) for argument in trained or arguments]
    is_list = [isinstance(argument.type, torch.ListType) for argument in operator._schema.arguments]
    takes_lists, has_lists = any(is_list[position] for position in positions), any(is_list)
    flatten: Any = one_by_one if any(isinstance(r.type, torch.ListType) for r in operator._schema.returns) else None

    def select_one_by_one(inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return one_by_one([inputs[position] for position in positions])

    select_trained: Any = select_one_by_one if takes_lists or len(positions) == 1 else itemgetter(*positions)

    def setup_registered(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.eager = False
        ctx.lengths = [_gradients_of(value) for value in inputs] if has_lists else [None] * len(inputs)
        setup_context(ctx, inputs, flatten(output) if flatten else output)

    def backward_registered(ctx: Any, *d_outputs: Any) -> tuple[Any, ...]:
        left = iter(backward(ctx, *(one_by_one(d_outputs) if flatten else d_outputs)))
        gradients: list[Any] = [None if length is None else [None] * length for length in ctx.lengths]
        for position in positions:
            length = ctx.lengths[position]
            gradients[position] = next(left) if length is None else [next(left) for _ in range(length)]
        return tuple(gradients)

    torch.library.register_autograd(f"align_ext::{name}", backward_registered, setup_context=setup_registered)

    def run(inputs: tuple[Any, ...]) -> Any:
        output = below_autograd(operator, made(inputs))
        return flatten(output) if flatten else output

    # Not split into forward and setup_context, because torch would inspect the signature at every call.
    def forward(ctx: Any, *trained_and_inputs: Any) -> Any:
        inputs = trained_and_inputs[-1]
        output = run(inputs)
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
            output = operator(*made(inputs))
            return flatten(output) if flatten else output
        if not torch.is_grad_enabled():
            return run(inputs)
        in_torch_func = torch._C._are_functorch_transforms_active()  # torch refuses them with its own message
        return (function.apply if in_torch_func else apply)(*select_trained(inputs), inputs)

    return call
