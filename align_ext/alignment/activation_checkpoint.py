"""Activation checkpointing of a Hugging Face model: what is recomputed finds the step of its own forward."""

from collections.abc import Callable
from typing import Any

import torch

from align_ext.alignment.model_state import AlignState


class BoundCheckpoint:
    """A model's checkpoint function whose recomputation re-enters the step of its own forward."""

    def __init__(self, state: AlignState, checkpoint: Callable[..., Any]) -> None:
        self.state, self.checkpoint = state, checkpoint

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Checkpoints function(*args, **kwargs)."""
        if torch.compiler.is_compiling():  # the compiled backward recomputes without running Python
            return self.checkpoint(function, *args, **kwargs)
        state, step = self.state, self.state.current

        def run(*a: Any, **k: Any) -> Any:
            outer, state.current = state.current, step
            try:
                return function(*a, **k)
            finally:
                state.current = outer

        return self.checkpoint(run, *args, **kwargs)
