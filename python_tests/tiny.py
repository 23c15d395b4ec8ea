"""Tiny real models and batches with tasks, and a literal oracle of their gradients."""

import itertools
import types

import torch
from torch import Tensor, nn

from align_ext import AlignLoraConfig, replace_linear_with_align_lora
from align_ext.nn.base import AdaptedLinear

TASKS, WEIGHT, VOCAB = 3, 0.3, 64


def llama(**options):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(**sizes, vocab_size=VOCAB, use_cache=False, **options)
    return LlamaForCausalLM(config)


def gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=VOCAB, n_positions=32, bos_token_id=0))


def qwen2():
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    return Qwen2ForCausalLM(Qwen2Config(**sizes, num_attention_heads=4, num_key_value_heads=2, vocab_size=VOCAB))


def adapted(model=None, dtype=torch.float64, **options):
    """A model with adapters whose B is not zero, so that every gradient is."""
    model = (model or llama()).to(dtype)
    options = {"r": 4, "lora_dropout": 0.0, "align_weight": WEIGHT, "num_tasks": TASKS} | options
    replace_linear_with_align_lora(model, AlignLoraConfig(**options))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, AdaptedLinear):
                module.adapter.lora_B.copy_(0.1 * torch.randn(module.adapter.lora_B.shape, generator=generator))
    return model.train()


def batch(seed=0) -> tuple[dict[str, Tensor], Tensor]:
    """input_ids, attention_mask and labels [6, 10] with padding, and one task a sample."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, VOCAB, (6, 10), generator=generator)
    mask = (torch.arange(10) < 10 - torch.arange(6)[:, None] % 3).long()
    inputs = {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}
    return inputs, (torch.arange(6) + seed) % TASKS


def literal_kl(z: Tensor, task: Tensor, eps: float = 1e-6) -> Tensor:
    """Σ over pairs of tasks of the symmetric KL, by torch.distributions."""
    normals = [
        torch.distributions.Normal(z[task == i].mean(0), (z[task == i].var(0, correction=0) + eps).sqrt())
        for i in range(TASKS)
    ]
    kl = torch.distributions.kl_divergence
    return sum(0.5 * (kl(a, b) + kl(b, a)).sum() for a, b in itertools.combinations(normals, 2))


class Oracle:
    """The same model with plain PyTorch layers that keep z; loss = Σ w (lm + weight * mean over layers of KL)."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.latents = model, []
        for layer in model.modules():
            if isinstance(layer, AdaptedLinear):
                layer.adapter.state = None
                layer.forward = types.MethodType(self._forward, layer)
        model._forward_pre_hooks.clear()
        model._forward_hooks.clear()

    def _forward(self, layer: AdaptedLinear, x: Tensor) -> Tensor:
        z = x @ layer.adapter.lora_A.T
        self.latents.append(z.flatten(0, -2))
        return layer.base_layer(x) + layer.adapter.scaling * z @ layer.adapter.lora_B.T

    def losses(self, seed: int) -> tuple[Tensor, list[Tensor], Tensor]:
        """lm loss, the layers' latents, and the task of each token of batch `seed`."""
        inputs, tasks = batch(seed)
        self.latents.clear()
        lm = self.model(**inputs).loss
        token_tasks = torch.where(inputs["attention_mask"] == 1, tasks[:, None], -1).flatten()
        return lm, list(self.latents), token_tasks

    def gradients(self, weights: list[float], union: bool = False, align: float = WEIGHT) -> dict[str, Tensor]:
        """The gradients of Σ_i weights[i] * loss(batch i); with union, of one alignment over all batches."""
        parts = [self.losses(i) for i in range(len(weights))]
        total = sum(w * lm for w, (lm, _, _) in zip(weights, parts, strict=True))
        if union:
            task = torch.cat([t for _, _, t in parts])
            layers = list(zip(*(z for _, z, _ in parts), strict=True))
            total = total + align * sum(literal_kl(torch.cat(z), task) for z in layers) / len(layers)
        else:
            for w, (_, latents, task) in zip(weights, parts, strict=True):
                total = total + w * align * sum(literal_kl(z, task) for z in latents) / len(latents)
        total.backward()
        return gradients(self.model)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """The trained parameters' gradients by name, wrappers' prefixes removed."""
    named = ((n.replace("_orig_mod.", "").replace("module.", ""), p.grad) for n, p in model.named_parameters())
    return {n: getattr(g, "full_tensor", lambda g=g: g)().clone() for n, g in named if g is not None}


def error(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest error of a gradient relative to its largest element."""
    assert actual.keys() == expected.keys()
    return max(((actual[n] - g).abs().max() / g.abs().max()).item() for n, g in expected.items())
