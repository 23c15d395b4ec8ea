"""Which base model an adapter belongs to: its name, some of its weights and what its configuration says it computes.

Of each weight the shape and some values are recorded, in bfloat16: 16 of the first and the last of each kind
(q_proj.weight, norm.weight, ...), 4 of those between, and beyond 512 weights of evenly spaced ones. So the record has
at most 70 kilobytes (25 for 272 weights) and costs nothing at any size; it is the same whether the base is loaded in
float32 or bfloat16, close in float16, and says nothing of weights that are quantised, offloaded or trained. What is
split over processes when an adapter is saved was recorded when the adapters were put in, where it was whole then.
Buffers (a BatchNorm's statistics) are recorded likewise, as they were before training. Of embeddings and the output
head the rows that both have are compared, since a tokenizer may have been extended. The same weights may compute
something else (other heads, rotations, activations), which the configuration tells.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from align_ext.adapters.base import AdaptedLinear, AdaptedModule
from align_ext.alignment.model_state import find_state
from align_ext.base_model.computing_config import computing_entries, other_entry
from align_ext.base_model.modules_to_save import buffers_of, plain_name
from align_ext.system.reading import shown

_VALUES, _VALUES_BETWEEN, _MOST_WEIGHTS = 16, 4, 512
_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_DTYPES = tuple(str(dtype).removeprefix("torch.") for dtype in _FLOATS)


class OtherBaseError(ValueError):
    """The adapter belongs to another base model."""


@dataclass(frozen=True)
class Sample:
    """What is recorded of a weight.

    Attributes:
        shape: its shape.
        dtype: as it was loaded.
        values: some of them in bfloat16, as hexadecimal digits.
    """

    shape: tuple[int, ...]
    dtype: str
    values: str

    @classmethod
    def of(cls, weight: Tensor, number: int) -> Sample:
        """Records a weight by so many values."""
        bits = _values(weight, _places(weight.numel(), number)).view(torch.uint8)
        return cls(tuple(weight.shape), str(weight.dtype).removeprefix("torch."), bytes(bits.tolist()).hex())

    def decoded(self) -> Tensor:
        """The values, bfloat16."""
        return torch.frombuffer(bytearray.fromhex(self.values), dtype=torch.bfloat16)

    def differs(self, weight: Tensor, *, rows_may: bool = False) -> str | None:
        """In what a weight differs from the recorded one, or None.

        A weight that was in float16 meanwhile is rounded otherwise: of its values some are a step of bfloat16 away, and
        the tiny ones more, but most are the same.

        Args:
            weight: of the model.
            rows_may: its first dimension may be another, and the rows that both have are compared.
        """
        shape = tuple(weight.shape)
        if shape != self.shape and not (rows_may and shape[1:] == self.shape[1:]):
            return f"is {list(shape)}, not {list(self.shape)}"
        recorded = self.decoded()
        places = _places(math.prod(self.shape), len(recorded))
        both = places < weight.numel()
        here, there = _values(weight, places[both]), recorded[both]
        same = (here == there) | (there.float().abs() < 1e-4) | (here.isnan() & there.isnan())
        close = torch.allclose(here.float(), there.float(), rtol=2**-7, atol=1e-6, equal_nan=True)
        return None if close and 2 * int(same.sum()) >= len(same) else "has other values"


@dataclass(frozen=True)
class BaseModel:
    """A base model.

    Attributes:
        name: a hub id or an absolute path, if it is known.
        weights: samples by the weight's name in the plain model.
        config: entries of its configuration (base_config.py); empty where none are recorded.
        buffers: samples of its buffers, as they were before training.
    """

    name: str | None
    weights: Mapping[str, Sample]
    config: Mapping[str, Any] = field(default_factory=dict)
    buffers: Mapping[str, Sample] = field(default_factory=dict)

    @classmethod
    def of(cls, model: nn.Module) -> BaseModel:
        """Records a model's base: of what is frozen, or of everything where nothing is."""
        weights, state = _whole_weights(model), find_state(model)
        chosen = weights if state is None else {name: p for name, p in weights.items() if not p.requires_grad}
        samples = {name: Sample.of(chosen[name], n) for name, n in _some(list(chosen)).items()}
        if state is not None:
            samples |= _of_parts(model, {n: s for n, s in state.samples.items() if n not in weights})
        buffers = _float_buffers(model)
        of_buffers = {name: Sample.of(buffers[name], n) for name, n in _some(list(buffers)).items()}
        return cls(name_of_base(model), samples, computing_entries(getattr(model, "config", None)), of_buffers)

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dictionary."""
        weights, buffers = (
            {name: [list(w.shape), w.dtype, w.values] for name, w in of.items()} for of in (self.weights, self.buffers)
        )
        return {"name": self.name, "weights": weights, "config": dict(self.config), "buffers": buffers}

    @classmethod
    def from_dict(cls, content: Any) -> BaseModel:
        """The inverse of to_dict.

        Raises:
            ValueError: it is none.
        """
        try:
            name, config = content["name"], content.get("config", {})
            weights, buffers = (
                {key: Sample(tuple(shape), dtype, values) for key, (shape, dtype, values) in of.items()}
                for of in (content["weights"], content.get("buffers", {}))
            )
            for sample in (*weights.values(), *buffers.values()):
                if sample.dtype not in _DTYPES or not 0 < len(sample.decoded()) <= _VALUES:
                    raise ValueError
            if max(len(weights), len(buffers)) > _MOST_WEIGHTS or not isinstance(config, dict):
                raise ValueError
            if not isinstance(name, (str, type(None))):
                raise ValueError
        except (ValueError, TypeError, LookupError, AttributeError, RuntimeError) as error:
            raise ValueError("its record of the base model is damaged") from error
        return cls(name, weights, config, buffers)

    def check(self, model: nn.Module, cure: str = "give its own, or go on with force=True") -> None:
        """Compares a model, with adapters or without, as far as its weights are there, and its configuration.

        Args:
            model: the model.
            cure: closes the message.

        Raises:
            OtherBaseError: it is another base.
        """
        weights, packed, resized = _whole_weights(model), _packed(model), _of_tokens(model)
        adapted = any(isinstance(module, AdaptedModule) for module in model.modules())
        for name, sample in self.weights.items():
            if name in weights and adapted and weights[name].requires_grad:
                reason = None  # it is trained, so that it may differ
            elif name in weights:
                reason = sample.differs(weights[name], rows_may=id(weights[name]) in resized)
            else:
                reason = None if name.rpartition(".")[0] in packed else "is not in it"
            if reason is not None:
                self._refuse(model, f"{shown(name)} {reason}; {cure}")
        buffers = _float_buffers(model)
        for name in self.buffers.keys() & buffers.keys():  # versions of transformers differ in which they store
            if reason := self.buffers[name].differs(buffers[name]):
                self._refuse(model, f"{shown(name)} {reason}; {cure}")
        entry = other_entry(self.config, computing_entries(getattr(model, "config", None)))
        if entry is not None:
            self._refuse(model, f"the weights are the same, but of the configuration {entry}; {cure}")

    def _refuse(self, model: nn.Module, reason: str) -> NoReturn:
        here = shown(name_of_base(model))
        raise OtherBaseError(f"the adapter belongs to another base model, {shown(self.name)}: in {here} {reason}")


def name_of_base(model: nn.Module) -> str | None:
    """The hub id or the absolute path of a model's folder: never a path in a cache, never a relative one."""
    name = getattr(model, "align_base", None) or getattr(model, "name_or_path", None)
    if not isinstance(name, str) or not name:
        return None
    parts = Path(name).parts
    if len(parts) > 2 and parts[-2] == "snapshots" and parts[-3].startswith("models--"):  # the hub's cache
        return parts[-3].removeprefix("models--").replace("--", "/")
    try:
        path = Path(name).expanduser()
        return str(path.resolve()) if path.is_dir() else name
    except (OSError, RuntimeError, ValueError):  # no path at all: too long, of nobody's home, with a zero in it
        return name


def _whole_weights(model: nn.Module) -> dict[str, Tensor]:
    """The base's floating-point weights by their names in the plain model, without what is packed, split or merged."""
    left_out: set[int] = set()
    for module in model.modules():
        if isinstance(module, AdaptedModule):
            left_out |= {id(p) for p in module.adapter.parameters()}
            if isinstance(module, AdaptedLinear) and module.merged:
                left_out.add(id(module.weight))
    return {
        plain_name(model, name): p
        for name, p in model.named_parameters()
        if id(p) not in left_out
        and type(p) is nn.Parameter
        and p.dtype in _FLOATS
        and not p.is_meta
        and p.numel() > 0
        and type(p.data) is Tensor
        and not hasattr(p, "ds_id")  # ZeRO-3's share
        and ".lora_" not in name
    }


def _of_parts(model: nn.Module, taken: Mapping[str, Sample]) -> dict[str, Sample]:
    """Samples of frozen weights that are split by now, taken when they were whole; none if others were loaded since."""
    kept = {}
    for name, parameter in model.named_parameters():
        sample, part = taken.get(plain_name(model, name)), _first_part(parameter)
        if sample is None or part is None or parameter.requires_grad:
            continue
        places = _places(math.prod(sample.shape), len(sample.decoded()))
        here, there = part[places[places < len(part)].to(part.device)].cpu().float(), sample.decoded().float()
        if not torch.allclose(here, there[: len(here)], rtol=2**-7, atol=1e-6):
            return {}
        kept[plain_name(model, name)] = sample
    return kept


def _first_part(parameter: Any) -> Tensor | None:
    """What this process holds of a split weight, flat: in the first process, which writes, the weight's beginning."""
    if hasattr(parameter, "full_tensor"):
        return parameter.to_local().detach().reshape(-1)
    return parameter.ds_tensor.detach().reshape(-1) if hasattr(parameter, "ds_tensor") else None


def _float_buffers(model: nn.Module) -> dict[str, Tensor]:
    """The base's floating-point buffers by their names in the plain model, as they were before training."""
    state = find_state(model)
    buffers = buffers_of(model) if state is None else state.buffers
    return {n: b for n, b in buffers.items() if b is not None and b.numel() and b.dtype in _FLOATS}


def _packed(model: nn.Module) -> set[str]:
    """Modules, by name in the plain model, of whose weights some are quantised, split, not loaded or no tensors."""
    whole = {id(p) for p in _whole_weights(model).values()}
    return {
        plain_name(model, name)
        for name, module in model.named_modules()
        if any(id(t) not in whole for t in (*module.parameters(recurse=False), *module.buffers(recurse=False)))
        or (hasattr(module, "weight") and "weight" not in module._parameters)
    }


def _of_tokens(model: nn.Module) -> set[int]:
    """The parameters with a row for each token, which change with the tokenizer."""
    found: set[int] = set()
    for get in ("get_input_embeddings", "get_output_embeddings"):
        try:
            module = getattr(model, get)()
        except (AttributeError, NotImplementedError):
            continue
        found |= {id(p) for p in module.parameters()} if module is not None else set()
    return found


def _some(names: list[str]) -> dict[str, int]:
    """Of how many weights how many values are recorded, in the order of the names."""
    kinds: dict[str, list[str]] = {}
    for name in names:
        kinds.setdefault(".".join(part for part in name.split(".")[-2:] if not part.isdecimal()), []).append(name)
    ends = dict.fromkeys(name for of_kind in kinds.values() for name in (of_kind[0], of_kind[-1]))
    between = [name for name in names if name not in ends]
    chosen = set(_spaced(list(ends), _MOST_WEIGHTS))
    chosen |= set(_spaced(between, _MOST_WEIGHTS - len(chosen)))
    return {name: _VALUES if name in ends else _VALUES_BETWEEN for name in names if name in chosen}


def _spaced(names: list[str], most: int) -> list[str]:
    """So many of the names at most, evenly spaced."""
    return names if len(names) <= most else [names[i * len(names) // most] for i in range(most)]


def _places(count: int, number: int) -> Tensor:
    """Where the recorded values, so many, of so many are."""
    return torch.tensor([(2 * i + 1) * count // (2 * number) for i in range(number)])


@torch.no_grad()
def _values(weight: Tensor, places: Tensor) -> Tensor:
    """Some values of a weight, in bfloat16 on the CPU."""
    whole = weight if weight.dim() else weight.reshape(1)
    return whole[torch.unravel_index(places.to(weight.device), whole.shape)].to(torch.bfloat16).cpu()
