"""Tiny real models and batches with tasks, and a literal oracle of their gradients."""

import functools
import types
from collections.abc import Callable, Sequence
from typing import Any

import literal
import torch
from torch import Tensor, nn

from align_ext import AlignLoraConfig, replace_linear_with_align_lora
from align_ext.adapters.adapted_linear import AdaptedModule

TASKS, WEIGHT, VOCAB, LENGTH = 3, 0.3, 64, 10
PLAIN = AlignLoraConfig(architecture="lora")


def llama(**options):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(**sizes | options, vocab_size=VOCAB, use_cache=False)
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
    """A model with adapters whose B (and router) is not zero, so that no gradient is."""
    model = (model or llama()).to(dtype)
    options = {"r": 4, "lora_dropout": 0.0, "align_weight": WEIGHT, "num_tasks": TASKS} | options
    replace_linear_with_align_lora(model, AlignLoraConfig(**options))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("lora_B", "lora_R", "lora_scaling", "lora_N", "lora_E")):
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.train()


def batch(seed=0) -> tuple[dict[str, Tensor], Tensor]:
    """input_ids, attention_mask and labels [6, 10] with prompts and padding, and one task a sample."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, VOCAB, (6, LENGTH), generator=generator)
    place, sample = torch.arange(LENGTH), torch.arange(6)[:, None]
    mask, prompt = place < LENGTH - sample % 3, place < 1 + sample % 2
    inputs = {"input_ids": ids, "attention_mask": mask.long(), "labels": ids.masked_fill(~mask | prompt, -100)}
    return inputs, (torch.arange(6) + seed) % TASKS


def prompts(inputs: dict[str, Tensor]) -> Tensor:
    """The tokens of each sample before its first label, bool [B, S]."""
    labelled = (inputs["labels"] != -100).cumsum(1)
    return (labelled == 0) & (inputs["attention_mask"] == 1)


def literal_kl(z: Tensor, task: Tensor, config: AlignLoraConfig | None = None) -> Tensor:
    """Σ over pairs of tasks of the symmetric KL."""
    return literal.kl(z, task, config or AlignLoraConfig(num_tasks=TASKS))


class Oracle:
    """The same model with layers in plain PyTorch, and its losses literally, for autograd.

    lm + align_weight * mean over layers (and a layer's latents) of the alignment + balance_weight * mean over layers of
    the balance + spectral_weight * mean over layers of the spectral loss, or orth_reg_weight * orthogonality.
    """

    def __init__(self, model: nn.Module, batches: Callable[[int], Any] = batch) -> None:
        self.model, self.config, self.batches = model, model.align_state.config, batches
        self.adapters = [module.adapter for module in model.modules() if isinstance(module, AdaptedModule)]
        self.outputs: list[literal.Output] = []
        self.tasks = self.prompt = self.seeds = None
        for layer in model.modules():
            if isinstance(layer, AdaptedModule):
                layer.forward = types.MethodType(self._forward, layer)
        for block in {a.block: model.get_submodule(a.block) for a in self.adapters if hasattr(a, "block")}.values():
            mixture = literal.Mixture(block, self.config, self._own_rng)
            block.forward = functools.partial(self._mixed, mixture)
            block._forward_pre_hooks.clear()
            block._forward_hooks.clear()
        model._forward_pre_hooks.clear()
        model._forward_hooks.clear()

    def _forward(self, layer: AdaptedModule, *args: Any, **kwargs: Any) -> Any:
        x, base_out = (
            kwargs["hidden_states"] if "hidden_states" in kwargs else args[0],
            layer.base_layer(*args, **kwargs),
        )
        p = self.config.lora_dropout if layer.training else 0.0
        rng, number = self._rng(layer, p)
        if self.config.use_dora:
            self.outputs.append(literal.dora(layer, self.config, x, p, rng, number))
        else:
            of_batch = self.tasks, self.prompt, rng, number
            config = PLAIN if self.config.row.mixture else self.config  # beside a mixture's blocks
            self.outputs.append(literal.low_rank(layer.adapter, config, x, p, *of_batch))
        if isinstance(base_out, tuple):
            return base_out[0] + self.outputs[-1].low, *base_out[1:]
        return base_out + self.outputs[-1].low

    def _mixed(self, mixture: literal.Mixture, *args: Any) -> Tensor:
        y, outputs = mixture.forward(*args)
        self.outputs += outputs
        return y

    def _own_rng(self, layer: AdaptedModule) -> tuple[Tensor | None, float]:
        """Seed and offset of the mask of a layer without siblings, and p."""
        p = self.config.lora_dropout if layer.training else 0.0
        rng = self._rng(layer, p)[0]
        return torch.randint(0, 2**63 - 1, (2,)) if p and rng is None else rng, p

    def _rng(self, layer: AdaptedModule, p: float) -> tuple[Tensor | None, tuple[int, int]]:
        """Seed and offset of a layer's mask, and which one of how many it is: siblings have those of the first."""
        siblings = getattr(layer, "siblings", None) if layer.training else None
        group = [siblings.parent.get_submodule(name) for name in siblings.names] if siblings else [layer]
        number = group.index(layer), len(group)
        if p == 0 or (self.seeds is None and siblings is None):
            return None, number
        if self.seeds is not None and layer.adapter.layer is not None:
            return self.seeds[group[0].adapter.layer], number
        if siblings is not None and layer is group[0]:
            siblings.drawn = torch.randint(0, 2**63 - 1, (2,))
        return siblings.drawn if siblings is not None else None, number

    @property
    def latents(self) -> list[Tensor]:
        """Of the layers that have one."""
        return [output.latents[0] for output in self.outputs]

    def forward(self, seed: int) -> tuple[Tensor, list[literal.Output], Tensor]:
        """The lm loss of batch `seed`, what its layers computed, and the task of each token that counts."""
        torch.manual_seed(seed)
        inputs, tasks = self.batches(seed)
        self.tasks = tasks.repeat_interleave(inputs["input_ids"].shape[1])
        self.prompt = prompts(inputs)
        self.outputs = []
        drawn_at_once = self.config.lora_dropout > 0 and any(a.layer is not None for a in self.adapters)
        layers = len(self.model.align_state.names)
        self.seeds = torch.randint(2**63 - 1, (layers, 2)) if drawn_at_once else None
        lm = self.model(**inputs).loss
        return lm, self.outputs, torch.where(inputs["attention_mask"] == 1, tasks[:, None], -1).flatten()

    def extra(self, outputs: list[literal.Output], task: Tensor, align: float) -> Tensor:
        """The weighted alignment and balance of a batch."""
        total = torch.zeros(())
        if self.config.align:
            total = total + align * sum(self.alignment(output, task) for output in outputs) / self._layers()
        if self.config.balance:
            losses = self.balances(outputs, task)
            total = total + self.config.balance_weight * sum(losses) / len(losses)
        return total

    def balances(self, outputs: list[literal.Output], task: Tensor) -> list[Tensor]:
        """The balance of each router."""
        kind, top_k = self.config.balance, self.config.latents if self.config.row.mixture else None
        routed = [output.weights for output in outputs if output.weights is not None]
        return [literal.balance(weights, task >= 0, kind, top_k) for weights in routed]

    def _layers(self) -> int:
        return len(self.adapters) if self.config.align_layers == "mean" else 1

    def of_parameters(self) -> Tensor | float:
        """The weighted orthogonality, or the spectral loss, its projectors those of the heads as they are now."""
        if self.config.orth_reg_weight:
            losses = [literal.orthogonality(adapter.lora_B, adapter.lora_A) for adapter in self.adapters]
            return self.config.orth_reg_weight * sum(losses) / len(losses)
        if self.config.spectral is None:
            return 0.0
        losses = [literal.spectral(adapter.lora_B, self.config.spectral) for adapter in self.adapters]
        return self.config.spectral_weight * sum(losses) / len(losses)

    def alignment(self, output: literal.Output, task: Tensor) -> Tensor:
        """That of a layer; by position padding counts and each sample has its first token's task."""
        if self.config.align_statistics == "position":
            samples = len(task) // LENGTH
            return literal.kl_by_position(output.latents[0], task.view(samples, -1)[:, 0], samples, self.config)
        loss = getattr(literal, self.config.align)
        return sum(loss(z, task, self.config) for z in output.latents) / len(output.latents)

    def gradients(self, weights: list[float], union: bool = False, align: float | None = None) -> dict[str, Tensor]:
        """The gradients of Σ_i weights[i] * loss(batch i); with union, alignment and balance see one batch."""
        align = self.config.align_weight if align is None else align
        parts = [self.forward(i) for i in range(len(weights))]
        total = sum(w * lm for w, (lm, _, _) in zip(weights, parts, strict=True))
        total = total + sum(weights) * self.of_parameters()
        if union:
            layers = [together(outputs) for outputs in zip(*(outputs for _, outputs, _ in parts), strict=True)]
            total = total + self.extra(layers, torch.cat([task for _, _, task in parts]), align)
        else:
            for w, (_, outputs, task) in zip(weights, parts, strict=True):
                total = total + w * self.extra(outputs, task, align)
        total.backward()
        return gradients(self.model)


def together(outputs: Sequence[literal.Output]) -> literal.Output:
    """What a layer computed for several batches as if for one."""
    latents = [torch.cat(parts) for parts in zip(*(output.latents for output in outputs), strict=True)]
    routed = outputs[0].weights is not None
    return literal.Output(outputs[0].low, latents, torch.cat([o.weights for o in outputs]) if routed else None)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """The trained parameters' gradients by name, wrappers' prefixes removed."""
    named = ((n.replace("_orig_mod.", "").replace("module.", ""), p.grad) for n, p in model.named_parameters())
    return {n: getattr(g, "full_tensor", lambda g=g: g)().clone() for n, g in named if g is not None}


def error(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest error of a gradient relative to its largest element."""
    assert actual.keys() == expected.keys()
    return max(((actual[n] - g).abs().max() / g.abs().max()).item() for n, g in expected.items())
