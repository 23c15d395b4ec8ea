"""Align-LoRA in a plain PyTorch loop, on a tiny random Llama: the alignment falls faster with a weight than without.

Run: python examples/plain_loop.py
"""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from align_ext import align_parts, replace_linear_with_align_lora

TASKS, STEPS = 3, 60


def batch(step: int) -> dict[str, torch.Tensor]:
    """Six sequences: task k repeats its own stretch of the vocabulary."""
    generator = torch.Generator().manual_seed(step)
    task_ids = torch.arange(6) % TASKS
    input_ids = 1 + 20 * task_ids[:, None] + torch.randint(0, 20, (6, 16), generator=generator)
    return {"input_ids": input_ids, "labels": input_ids, "task_ids": task_ids}


def train(weight: float) -> float:
    """Trains the adapters and returns the last alignment value."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes))
    replace_linear_with_align_lora(model, num_tasks=TASKS, align_weight=weight).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    for step in range(STEPS):
        model(**batch(step)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    parts = align_parts(model)
    print(f"weight {weight}: lm loss {parts.lm:.3f}, alignment {parts.align:.3f}")
    return parts.align


if __name__ == "__main__":
    without, with_weight = train(0.0), train(0.1)
    assert with_weight < without
