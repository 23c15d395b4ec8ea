"""How an operator gets its autograd formula: registered for compilers and tracers, called directly in eager mode.

Both ways run the same two functions. The registered formula costs some 100 microseconds of Python a call, forward and
backward, most of them in torch's own machinery; torch.autograd.Function costs a few.
"""

from collections.abc import Callable
from typing import Any

import torch

SetupContext = Callable[[Any, tuple[Any, ...], Any], None]


def differentiable(name: str, backward: Callable[..., Any], setup_context: SetupContext) -> Callable[..., Any]:
    """Gives the operator align_ext::name its gradient.

    Args:
        name: of the operator.
        backward: (ctx, *gradients of the outputs) -> gradients of the inputs.
        setup_context: (ctx, inputs, outputs): saves what backward needs.

    Returns:
        A function that calls the operator, arguments by position.
    """
    torch.library.register_autograd(f"align_ext::{name}", backward, setup_context=setup_context)
    operator = getattr(torch.ops.align_ext, name).default

    def forward(*inputs: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return operator(*inputs)

    members = {"forward": forward, "backward": backward, "setup_context": setup_context}
    function: Any = type(
        name, (torch.autograd.Function,), {key: staticmethod(member) for key, member in members.items()}
    )

    def call(*inputs: Any) -> Any:
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return operator(*inputs)
        return function.apply(*inputs)

    return call
