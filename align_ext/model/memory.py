"""The memory that training takes, estimated before it begins: nothing is computed and no weight is read.

    total = weights + adapters + gradients + optimizer + activations

- weights: the base as it is stored, 4-bit weights with their scales.
- adapters: all that is trained; gradients: as much; optimizer: what it keeps (AdamW two moments, as much each).
- activations = kept + max(8 L, 4/3 block - 4 L), of one micro-batch with L logits:
  kept: what autograd keeps of a forward with its loss. A twin of the model, of fake tensors that have shapes and no
  values, runs the forward, and every tensor that autograd saves is counted once. With gradient checkpointing that is
  little more than the input of each block and the log-likelihoods, 4 L.
  8 L: the gradients of the log-likelihoods and of the logits in float32, which exist while all of this is kept.
  block: what one checkpointed block keeps, which exists while it is computed again, when those of the loss are gone; a
  third more for the gradients within it. 0 without checkpointing.

It leaves out what a device's libraries take for themselves, and temporary tensors within one operation.
"""

import copy
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM
from transformers.modeling_layers import GradientCheckpointingLayer

from align_ext.adapters.init import FROM_WEIGHT
from align_ext.alignment.model_state import require_state
from align_ext.model.replace import replace_linear_with_align_lora
from align_ext.system.memory import shown_bytes

_SAVED, _GRADIENTS = 4, 8  # bytes of a logit: its log-likelihood, and the gradients of that and of itself, in float32


@dataclass(frozen=True)
class TrainingMemory:
    """The parts of the module's formula in bytes.

    Attributes:
        weights: of the base.
        adapters: of all that is trained.
        gradients: of all that is trained.
        optimizer: what it keeps of the gradients before.
        activations: of one micro-batch.
        rows: the rows of a micro-batch.
        tokens: the tokens of each row.
    """

    weights: int
    adapters: int
    gradients: int
    optimizer: int
    activations: int
    rows: int
    tokens: int

    @property
    def fixed(self) -> int:
        """What does not depend on the batch."""
        return self.weights + self.adapters + self.gradients + self.optimizer

    @property
    def total(self) -> int:
        """All of it."""
        return self.fixed + self.activations

    def most_rows(self, available: float) -> int:
        """Returns the rows of the largest micro-batch for which a number of bytes is enough; 0: not even one row."""
        return max(0, int((available - self.fixed) / (self.activations / self.rows)))

    def __str__(self) -> str:
        parts = {name: shown_bytes(getattr(self, name)) for name in ("weights", "adapters", "gradients", "optimizer")}
        text = ", ".join(f"{name} {size}" for name, size in parts.items())
        return (
            f"about {shown_bytes(self.total)} to train: {text}, activations {shown_bytes(self.activations)} of "
            f"{self.rows} x {self.tokens} tokens"
        )


def training_memory(
    model: nn.Module, rows: int, tokens: int, *, checkpointing: bool = False, state: float = 2.0
) -> TrainingMemory:
    """Estimates the memory of a training step.

    Args:
        model: a causal language model of transformers with adapters, on any device, the meta device too.
        rows: the rows of a micro-batch.
        tokens: the tokens of its longest row.
        checkpointing: whether gradient checkpointing is on.
        state: bytes that the optimizer keeps for each byte that is trained: 2 for AdamW.

    Raises:
        ValueError: the model cannot run without values, as one whose forward looks at them, so that nothing is known.
    """
    trained = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    weights = sum(p.nbytes + _scales(p) for p in model.parameters() if not p.requires_grad)
    weights += sum(buffer.nbytes for buffer in model.buffers())
    try:
        twin = _twin(model)
        with FakeTensorMode(), _GroupedProducts():
            _pretend(twin, _device(model))
            kept, logits = _kept(twin, rows, tokens)
            block = 0
            if checkpointing:
                everything = kept
                twin.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
                kept, _ = _kept(twin, rows, tokens)
                block = (everything - kept) // _blocks(twin)
    except Exception as error:  # any, since the forward is the model's own
        raise ValueError(f"the memory of this model cannot be estimated: {type(error).__name__}: {error}") from error
    activations = kept + max(_GRADIENTS * logits, block * 4 // 3 - _SAVED * logits)
    return TrainingMemory(weights, trained, trained, round(state * trained), activations, rows, tokens)


class _GroupedProducts(TorchDispatchMode):
    """Gives the products of frozen experts their shape: torch's own rule for fake tensors knows bfloat16 alone."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._grouped_mm.default:
            rows, weights = args[:2]  # [S, in], [E, in, out]
            return rows.new_empty(rows.shape[0], weights.shape[-1])
        return func(*args, **(kwargs or {}))


def _scales(parameter: Any) -> int:
    """Returns the bytes of the scales of a quantised weight of bitsandbytes."""
    state = getattr(parameter, "quant_state", None)
    parts = [] if state is None else [state, getattr(state, "state2", None)]
    return sum(part.absmax.nbytes for part in parts if part is not None and part.absmax is not None)


def _twin(model: Any) -> Any:
    """Returns a model of the same shapes on the meta device, with the same kind of adapters, in train mode."""
    config = copy.deepcopy(model.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    losses: dict[str, Any] = {"align": None, "balance": None, "spectral": None}  # which keep numbers of rank r alone
    adapters = replace(require_state(model).config, **losses)
    if adapters.orth_reg_weight:
        adapters = replace(adapters, orth_reg_weight=0.0)
    if adapters.init_lora_weights in FROM_WEIGHT:
        adapters = replace(adapters, init_lora_weights="kaiming")
    if adapters.row.by_task:  # each token goes through one LoRA of the rank of all of its paths
        paths = adapters.num_heads or adapters.row.paths
        ranks = {name: paths * r for name, r in adapters.rank_pattern.items()}
        adapters = replace(adapters, architecture="lora", num_heads=None, r=paths * adapters.r, rank_pattern=ranks)
    with torch.device("meta"):
        twin = AutoModelForCausalLM.from_config(
            config, dtype=model.dtype, attn_implementation=model.config._attn_implementation
        )
        replace_linear_with_align_lora(twin, adapters)
    return twin.train()


def _device(model: Any) -> torch.device:
    return torch.device("cpu") if model.device.type == "meta" else model.device


def _pretend(model: nn.Module, device: torch.device) -> None:
    """Puts fake tensors of a device in the place of a meta model's: what chooses kernels by the device does so."""
    fake: dict[int, Tensor] = {}  # a tensor that two modules share stays one
    for module in model.modules():
        for tensors in cast("tuple[dict[str, Tensor | None], ...]", (module._parameters, module._buffers)):
            for name, tensor in tensors.items():
                if tensor is not None:
                    if id(tensor) not in fake:
                        empty = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
                        parameter = isinstance(tensor, nn.Parameter)
                        fake[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if parameter else empty
                    tensors[name] = fake[id(tensor)]


def _blocks(model: nn.Module) -> int:
    """Returns the number of the blocks that are checkpointed each by itself."""
    return max(1, sum(isinstance(module, GradientCheckpointingLayer) for module in model.modules()))


def _kept(model: Any, rows: int, tokens: int) -> tuple[int, int]:
    """Returns the bytes that autograd keeps of a forward with its loss, and the number of logits."""
    own = {tensor.untyped_storage()._cdata for tensor in (*model.parameters(), *model.buffers())}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        key = tensor.untyped_storage()._cdata
        if key not in own:
            kept[key] = tensor
        return tensor

    ids = torch.zeros(rows, tokens, dtype=torch.int64, device=next(model.parameters()).device)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids, use_cache=False)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values()), output.logits.numel()
