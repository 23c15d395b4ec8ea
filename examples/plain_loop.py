"""Align-LoRA in a plain PyTorch loop: python examples/plain_loop.py."""

from common import adapted, compare, launched, loader, optimizer

from align_ext import align_parts


def train(weight: float) -> list[float]:
    """Trains the adapters; the alignment value of each step."""
    model, tokenizer = adapted(weight)
    steps, values = optimizer(model), []
    for batch in loader(tokenizer):  # input_ids, attention_mask, labels, task_ids
        model(**batch).loss.backward()
        steps.step()
        steps.zero_grad()
        values.append(align_parts(model).align)
    return values


if __name__ == "__main__":
    launched(several=False)
    compare(train)
