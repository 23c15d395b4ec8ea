"""What alignment adds to a training step of a whole model: the same LoRA with and without it.

A Llama of SmolLM2-135M's sizes with random weights, adapters beside gate_proj, up_proj and down_proj, padding-free
batches of five tasks; forward, backward and AdamW. The ratio of the second row is what the losses cost.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from align_ext import AlignLoraConfig, replace_linear_with_align_lora
from align_ext.bench.timing import Comparison, main, measure

TASKS = 5
MODEL = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "vocab_size": 49152}
TINY = {"hidden_size": 36, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 64}
# model, samples, tokens of a sample, rounds
SIZES: dict[str, tuple[dict[str, int], int, int, int]] = {
    "cpu": (MODEL, 8, 128, 7),
    "cuda": (MODEL, 8, 128, 30),
    "quick": (TINY, 6, 4, 2),
}
LOSSES: dict[str, dict[str, Any]] = {
    "LoRA": {"align": None},
    "LoRA, aligned by kl": {"align": "kl"},
    "LoRA, aligned by mmd": {"align": "mmd"},
}


def step(
    options: dict[str, Any], model_size: dict[str, int], shape: tuple[int, int], device: str
) -> Callable[[], None]:
    """One training step of a model in bfloat16, adapters in float32, with these losses."""
    torch.manual_seed(0)
    heads = {"num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True, "use_cache": False}
    model = LlamaForCausalLM(LlamaConfig(**model_size, **heads)).to(device, torch.bfloat16)
    replace_linear_with_align_lora(model, AlignLoraConfig(architecture="lora", num_tasks=TASKS, **options))
    trained = [p for p in model.train().parameters() if p.requires_grad]
    for weight in trained:  # B starts as zero
        nn.init.normal_(weight, std=0.02)
    optimizer = torch.optim.AdamW(trained, lr=1e-5)
    ids = torch.randint(model_size["vocab_size"], shape, device=device)
    batch = {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}
    if options["align"]:
        batch["task_ids"] = torch.arange(shape[0], device=device) % TASKS

    def run() -> None:
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()

    return run


def run(device: str, size: str) -> dict[str, Comparison]:
    """Comparisons by title."""
    model_size, samples, length, rounds = SIZES[size]
    steps = {name: step(options, model_size, (samples, length), device) for name, options in LOSSES.items()}
    layers, hidden = model_size["num_hidden_layers"], model_size["hidden_size"]
    title = f"training step, {layers} layers of {hidden}, bfloat16, {samples} x {length} tokens, {TASKS} tasks"
    return {title: measure(steps, rounds, device)}


if __name__ == "__main__":
    main(run)
