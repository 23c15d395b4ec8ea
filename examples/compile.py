"""Align-LoRA with torch.compile, the whole model in one graph: python examples/compile.py."""

import torch
from common import adapted, compare, launched, loader, optimizer

from align_ext import align_parts, align_step

BACKEND = "inductor" if torch.cuda.is_available() else "eager"  # on a CPU: captured whole, but not worth the C++


def train(weight: float) -> list[float]:
    """Trains the adapters; the alignment value of each step."""
    model, tokenizer = adapted(weight)
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=BACKEND)
    steps, values = optimizer(model), []
    for batch in loader(tokenizer):
        with align_step(model, batch.pop("task_ids"), batch["attention_mask"]) as step:
            loss = compiled(**batch, use_cache=False).loss
        step.total(loss).backward()
        steps.step()
        steps.zero_grad()
        values.append(align_parts(model).align)
    return values


if __name__ == "__main__":
    launched(several=False)
    compare(train)
