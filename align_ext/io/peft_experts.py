"""PEFT's form of the adapters of experts, its target_parameters.

PEFT puts one wrapper round a module for each of its adapted tensors, the first of them innermost, so that

    <experts>.base_layer.lora_A.weight      is of the first of two, gate_up_proj
    <experts>.lora_A.weight                 is of the last, down_proj

lora_A is [E r, n], expert by expert, and lora_B [m, r E]: column i E + e is the i-th of expert e.
"""

from collections.abc import Collection, Iterable

from torch import Tensor

from align_ext.adapters.adapted_experts import EXPERT_TENSORS
from align_ext.base_model.adopt_peft import PEFT_PREFIX


def peft_keys(names: Iterable[str], experts: Collection[str]) -> dict[str, str]:
    """Returns the beginning of PEFT's keys of each layer.

    Args:
        names: the layers and tensors of experts.
        experts: which of them are tensors of experts.
    """
    keys = {}
    for name in names:
        module, _, tensor = name.rpartition(".")
        if name in experts:
            after = EXPERT_TENSORS[EXPERT_TENSORS.index(tensor) + 1 :]
            module += ".base_layer" * sum(f"{module}.{other}" in experts for other in after)
        keys[name] = PEFT_PREFIX + (module if name in experts else name)
    return keys


def flattened(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """Returns A [E, r, n] as [E r, n] and B [E, m, r] as [m, r E]; those of one layer as they are."""
    return (A.flatten(0, 1), B.permute(1, 2, 0).flatten(1)) if A.dim() == 3 else (A, B)


def unflattened(A: Tensor, B: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """The inverse of flattened, for tensors of experts of rank r."""
    return A.view(-1, r, A.shape[1]), B.view(len(B), r, -1).permute(2, 0, 1)


def is_named(name: str, targets: Iterable[str]) -> bool:
    """Applies PEFT's rule: a target is a parameter's name, or the end of it."""
    return any(name == target or name.endswith(f".{target}") for target in targets)
