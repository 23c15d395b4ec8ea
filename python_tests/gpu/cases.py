"""Every operator's forward and backward as one function of tensors, for tests of where and when kernels run."""

from dataclasses import dataclass, field
from typing import Any

import heads_cases
import pytest
import torch
from torch import Tensor

from align_ext import ops, reference

Tensors = dict[str, Tensor]
TRAINED = ("x", "A", "B", "R", "base")
TASKS, GROUPS, HEADS = 4, 3, 4


@dataclass(frozen=True)
class Case:
    """An operator with options.

    Attributes:
        name: of the case.
        op: of the operator.
        options: of its call.
        inputs: of heads_cases.make.
        weight: whether the operator computes the base product.
        groups: whether rows choose their adapter.
    """

    name: str
    op: str
    options: dict[str, Any] = field(default_factory=dict)
    inputs: dict[str, Any] = field(default_factory=dict)
    weight: bool = False
    groups: bool = False

    @property
    def is_loss(self) -> bool:
        """Whether it has latents and task ids."""
        return self.op in ("gaussian_kl", "mk_mmd")

    def tensors(self, size: tuple[int, int, int, int], dtype: torch.dtype, seed: int = 0) -> Tensors:
        """Inputs on the CPU: tokens, in, out, rank."""
        tokens, *_, rank = size
        generator = torch.Generator().manual_seed(seed)
        if self.is_loss:
            task = torch.randint(-1, TASKS, (tokens,), generator=generator)
            z = torch.randn(tokens, rank, generator=generator) * (1 + task[:, None] % 3) + task[:, None]
            return {"x": z.to(dtype), "task": task}
        heads = GROUPS if self.groups else 1 if self.op == "grouped_lora" else HEADS
        made = heads_cases.make((*size, heads), dtype, seed=seed, **({"A_per_head": self.groups} | self.inputs))
        if self.op == "grouped_lora":
            made["dz"] = torch.randn(tokens, rank, generator=generator)
            if self.groups:
                made["group"] = torch.randint(0, GROUPS, (tokens,), generator=generator)
            else:
                made["B"] = made["B"][0]
        del made["base" if self.weight else "W"]
        if not self.weight:
            del made["bias"]
        return made | {"rng": heads_cases.RNG + seed}

    def results(self, tensors: Tensors, namespace: Any = ops) -> Tensors:
        """Outputs and all gradients by name; autograd sees the tensors as they are, without a copy."""
        given = {name: t.detach().requires_grad_(name in TRAINED) for name, t in tensors.items()}
        op = getattr(namespace, self.op)
        if self.is_loss:
            outputs, grads = (op(given["x"], given["task"], TASKS, **self.options),), (None,)
        else:
            named = {"weight": "W", "bias": "bias", "base_out": "base", "A0": "A0", "B0": "B0", "group": "group"}
            options = {name: given[key] for name, key in named.items() if key in given} | self.options
            if options.get("dropout_p"):
                options["rng"] = given["rng"]
            router = (given["R"],) if "R" in given else ()
            outputs = op(given["x"], given["A"], given["B"], *router, scaling=0.75, **options)
            grads = tuple(given[name].to(y.dtype) for name, y in zip(("dy", "dz", "dw"), outputs, strict=False))
        torch.autograd.backward(outputs, grads)
        found = dict(zip(("y", "z", "w"), (y.detach() for y in outputs), strict=False))
        return found | {f"d{name}": given[name].grad for name in TRAINED if name in given}


ROUTED = {"groups": 1}
CASES = [
    Case("grouped_lora", "grouped_lora", {"dropout_p": 0.1}, weight=True),
    Case("grouped_lora, base_out", "grouped_lora", {"dropout_p": 0.1}),
    Case("grouped_lora, groups", "grouped_lora", {"dropout_p": 0.1}, groups=True),
    *(
        Case(f"dropout_sum, {site}", "dropout_sum", {"site": site, "dropout_p": 0.1 * (site != "none")},
             {"site": site, "offset_rank": 3}, weight=site == "latent")
        for site in heads_cases.SITES
    ),
    Case("routed_lora", "routed_lora", {"site": "latent", "dropout_p": 0.1}, ROUTED, weight=True),
    Case("routed_lora, input_per_head", "routed_lora", {"site": "input_per_head", "dropout_p": 0.1},
         ROUTED | {"site": "input_per_head"}),
    Case("routed_lora, top 2, own A", "routed_lora", {"site": "input", "dropout_p": 0.1, "top_k": 2},
         ROUTED | {"site": "input", "A_per_head": True}),
    Case("routed_lora, 2 groups", "routed_lora", {"site": "input", "dropout_p": 0.1}, {"site": "input", "groups": 2}),
    Case("gaussian_kl", "gaussian_kl"),
    Case("mk_mmd", "mk_mmd"),
]  # fmt: skip
EVERY_CASE = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
PROJECTIONS = pytest.mark.parametrize("case", [c for c in CASES if not c.is_loss], ids=lambda case: case.name)


def move(tensors: Tensors, device: torch.device | str) -> Tensors:
    """Copies on a device."""
    return {name: t.to(device, copy=True) for name, t in tensors.items()}


def assert_same_bits(found: Tensors, expected: Tensors) -> None:
    """All outputs, wherever they are."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name].cpu(), tensor.cpu()), name


def closeness_of(case: Case, found: Tensors, tensors: Tensors) -> tuple[Tensors, Tensors, Tensors]:
    """What closeness.py compares: found, and the reference's results in the inputs' dtype and in float64."""
    keep = ("dz", "dw", "task", "group", "rng")
    double = {name: t if name in keep else t.double() for name, t in tensors.items()}
    same, exact = (case.results(inputs, reference) for inputs in (tensors, double))
    return {name: t.cpu() for name, t in found.items()}, same, exact
