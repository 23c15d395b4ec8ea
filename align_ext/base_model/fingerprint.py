"""The fingerprint of the base model of an adapter: its name, some of its weights, and its configuration.

The record holds the shape of each weight and some of its values in bfloat16: 16 values of the first and the last weight
of each kind (q_proj.weight, norm.weight, ...), and 4 of the others. Of more than 512 weights, evenly spaced ones are
recorded. So the record has at most 70 kilobytes (25 for 272 weights) and takes no time. It is the same for a
base in float32 or bfloat16, close in float16, and leaves out weights that are quantised, offloaded or trained. Weights
that are sharded when an adapter is saved were recorded when the adapters were inserted, if they were complete then.
Buffers are recorded as they were before training. Of embeddings and the output head, only the rows that both models
have are compared, since a tokenizer may have been extended. The configuration is part of the record, since it changes
what the same weights compute (heads, rotations, activations).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from align_ext.adapters.adapted_linear import AdaptedLinear, AdaptedModule, AdaptedWeight
from align_ext.alignment.model_state import find_state
from align_ext.base_model.computing_config import computing_entries, first_difference
from align_ext.base_model.modules_to_save import buffers_of, plain_name
from align_ext.system.messages import shown

_VALUES, _VALUES_BETWEEN, _MAX_WEIGHTS = 16, 4, 512
_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_DTYPES = tuple(str(dtype).removeprefix("torch.") for dtype in _FLOATS)


class OtherBaseError(ValueError):
    """Raised if the adapter belongs to another base model."""


@dataclass(frozen=True)
class Sample:
    """The record of one weight.

    Attributes:
        shape: its shape.
        dtype: the dtype in which it was loaded.
        values: some of its values in bfloat16, as hexadecimal digits.
    """

    shape: tuple[int, ...]
    dtype: str
    values: str

    @classmethod
    def of(cls, weight: Tensor, number: int) -> Sample:
        """Records so many values of a weight."""
        bits = _values(weight, _sample_indices(weight.numel(), number)).view(torch.uint8)
        return cls(tuple(weight.shape), str(weight.dtype).removeprefix("torch."), bytes(bits.tolist()).hex())

    def decoded(self) -> Tensor:
        """Returns the values in bfloat16."""
        return torch.frombuffer(bytearray.fromhex(self.values), dtype=torch.bfloat16)

    def differs(self, weight: Tensor, *, rows_may_differ: bool = False, replaced: Sequence[int] = ()) -> str | None:
        """Returns how a weight differs from the recorded one, or None.

        A weight that was stored in float16 meanwhile has other rounding: most values are the same, some differ by one
        step of bfloat16, and tiny ones by more.

        Args:
            weight: the weight of the model.
            rows_may_differ: whether the number of rows may differ; then only the rows that both have are compared.
            replaced: numbers of rows that are not compared.
        """
        shape = tuple(weight.shape)
        if shape != self.shape and not (rows_may_differ and shape[1:] == self.shape[1:]):
            return f"is {list(shape)}, not {list(self.shape)}"
        recorded = self.decoded()
        indices = _sample_indices(math.prod(self.shape), len(recorded))
        row = indices // max(1, math.prod(self.shape[1:]))
        both = (indices < weight.numel()) & ~torch.isin(row, torch.tensor(replaced, dtype=torch.int64))
        here, there = _values(weight, indices[both]), recorded[both]
        same = (here == there) | (there.float().abs() < 1e-4) | (here.isnan() & there.isnan())
        close = torch.allclose(here.float(), there.float(), rtol=2**-7, atol=1e-6, equal_nan=True)
        return None if close and 2 * int(same.sum()) >= len(same) else "has other values"


@dataclass(frozen=True)
class BaseModel:
    """A base model.

    Attributes:
        name: a hub id or an absolute path, if it is known.
        weights: records of its weights by their names in the plain model.
        config: entries of its configuration (computing_config.py); empty if none are recorded.
        buffers: records of its buffers as they were before training.
    """

    name: str | None
    weights: Mapping[str, Sample]
    config: Mapping[str, Any] = field(default_factory=dict)
    buffers: Mapping[str, Sample] = field(default_factory=dict)

    @classmethod
    def of(cls, model: nn.Module) -> BaseModel:
        """Records a model's base: the frozen weights, or all weights if it has no adapters."""
        weights, state = _complete_weights(model), find_state(model)
        chosen = weights if state is None else {name: p for name, p in weights.items() if not p.requires_grad}
        samples = {name: Sample.of(chosen[name], n) for name, n in _values_per_weight(list(chosen)).items()}
        if state is not None:
            samples |= _shard_samples(model, {n: s for n, s in state.samples.items() if n not in weights})
        buffers = _float_buffers(model)
        buffer_samples = {name: Sample.of(buffers[name], n) for name, n in _values_per_weight(list(buffers)).items()}
        return cls(base_name(model), samples, computing_entries(getattr(model, "config", None)), buffer_samples)

    def to_dict(self) -> dict[str, Any]:
        """Returns a JSON-ready dictionary."""
        weights, buffers = (
            {n: [list(s.shape), s.dtype, s.values] for n, s in group.items()} for group in (self.weights, self.buffers)
        )
        return {"name": self.name, "weights": weights, "config": dict(self.config), "buffers": buffers}

    @classmethod
    def from_dict(cls, content: Any) -> BaseModel:
        """The inverse of to_dict.

        Raises:
            ValueError: the content is not such a dictionary.
        """
        try:
            name, config = content["name"], content.get("config", {})
            weights, buffers = (
                {key: Sample(tuple(shape), dtype, values) for key, (shape, dtype, values) in samples.items()}
                for samples in (content["weights"], content.get("buffers", {}))
            )
            for sample in (*weights.values(), *buffers.values()):
                if sample.dtype not in _DTYPES or not 0 < len(sample.decoded()) <= _VALUES:
                    raise ValueError
            if max(len(weights), len(buffers)) > _MAX_WEIGHTS or not isinstance(config, dict):
                raise ValueError
            if not isinstance(name, (str, type(None))):
                raise ValueError
        except (ValueError, TypeError, LookupError, AttributeError, RuntimeError) as error:
            raise ValueError("its record of the base model is damaged") from error
        return cls(name, weights, config, buffers)

    def check(
        self,
        model: nn.Module,
        cure: str = "give its own, or go on with force=True",
        replaced: Mapping[str, Sequence[int]] = MappingProxyType({}),
    ) -> None:
        """Compares the weights that a model has, with or without adapters, and its configuration.

        Args:
            model: the model.
            cure: the last words of the message.
            replaced: by the names of weights, rows that an adapter replaces, and that may differ.

        Raises:
            OtherBaseError: it is another base.
        """
        weights, packed, resized = _complete_weights(model), _incomplete_modules(model), _token_parameters(model)
        adapted = any(isinstance(module, AdaptedModule) for module in model.modules())
        for name, sample in self.weights.items():
            if name in weights and adapted and weights[name].requires_grad:
                reason = None  # a trained weight may differ
            elif name in weights:
                resizable = id(weights[name]) in resized
                reason = sample.differs(weights[name], rows_may_differ=resizable, replaced=replaced.get(name, ()))
            else:
                reason = None if name.rpartition(".")[0] in packed else _lacking(model, name)
            if reason is not None:
                self._refuse(model, f"{shown(name)} {reason}; {cure}")
        buffers = _float_buffers(model)
        for name in self.buffers.keys() & buffers.keys():  # versions of transformers have different buffers
            if reason := self.buffers[name].differs(buffers[name]):
                self._refuse(model, f"{shown(name)} {reason}; {cure}")
        entry = first_difference(self.config, computing_entries(getattr(model, "config", None)))
        if entry is not None:
            self._refuse(model, f"the weights are the same, but of the configuration {entry}; {cure}")

    def _refuse(self, model: nn.Module, reason: str) -> NoReturn:
        known = "" if self.name is None else f", {shown(self.name)}"
        here = "this one" if (name := base_name(model)) is None else shown(name)
        raise OtherBaseError(f"the adapter belongs to another base model{known}: in {here} {reason}")


def _lacking(model: nn.Module, name: str) -> str:
    """Returns why a model has no weight of its own by this name."""
    tied = any(plain_name(model, other) == name for other, _ in model.named_parameters(remove_duplicate=False))
    return "is tied to another weight, and the adapter's is not (tie_word_embeddings=False)" if tied else "is not in it"


def base_name(model: nn.Module) -> str | None:
    """Returns a model's hub id or the absolute path of its folder, never a relative path or one in the hub's cache."""
    name = getattr(model, "align_base", None) or getattr(model, "name_or_path", None)
    if not isinstance(name, str) or not name:
        return None
    try:
        path = Path(name).expanduser()
        if not path.is_absolute() and not path.is_dir():
            return name
        return _hub_id(path.absolute()) or _hub_id(path.resolve()) or str(path.absolute())  # a link may lead into it
    except (OSError, RuntimeError, ValueError):  # not a path: too long, an unknown home folder, a null byte
        return name


def _hub_id(path: Path) -> str | None:
    """Returns the repository of a path in the hub's cache, or None."""
    found = re.search(r"/models--([^/]+)/snapshots/[^/]+", str(path))
    return None if found is None else found[1].replace("--", "/")


def _complete_weights(model: nn.Module) -> dict[str, Tensor]:
    """Returns the floating-point weights of the base that are complete: not packed, sharded, offloaded or merged."""
    excluded: set[int] = set()
    for module in model.modules():
        if isinstance(module, AdaptedModule):
            excluded |= {id(p) for p in module.adapter.parameters()}
            if isinstance(module, AdaptedLinear) and module.merged:
                excluded |= {id(p) for p in module.base_layer.parameters()}
            elif isinstance(module, AdaptedWeight) and module.merged:
                excluded.add(id(module.weight))
    return {
        plain_name(model, name): p
        for name, p in model.named_parameters()
        if id(p) not in excluded
        and type(p) is nn.Parameter
        and p.dtype in _FLOATS
        and not p.is_meta
        and p.numel() > 0
        and type(p.data) is Tensor
        and not hasattr(p, "ds_id")  # sharded by ZeRO-3
        and ".lora_" not in name
    }


def _shard_samples(model: nn.Module, earlier: Mapping[str, Sample]) -> dict[str, Sample]:
    """Returns the earlier records of frozen weights that are sharded now; none if other weights were loaded since."""
    samples = {}
    for name, parameter in model.named_parameters():
        sample, part = earlier.get(plain_name(model, name)), _local_shard(parameter)
        if sample is None or part is None or parameter.requires_grad:
            continue
        indices = _sample_indices(math.prod(sample.shape), len(sample.decoded()))
        here, there = part[indices[indices < len(part)].to(part.device)].cpu().float(), sample.decoded().float()
        if not torch.allclose(here, there[: len(here)], rtol=2**-7, atol=1e-6):
            return {}
        samples[plain_name(model, name)] = sample
    return samples


def _local_shard(parameter: Any) -> Tensor | None:
    """Returns this process's shard of a weight, flattened; in the first process it is the start of the weight."""
    if hasattr(parameter, "full_tensor"):
        return parameter.to_local().detach().reshape(-1)
    return parameter.ds_tensor.detach().reshape(-1) if hasattr(parameter, "ds_tensor") else None


def _float_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Returns the base's floating-point buffers as they were before training, by name in the plain model."""
    state = find_state(model)
    buffers = buffers_of(model) if state is None else state.buffers
    return {n: b for n, b in buffers.items() if b is not None and b.numel() and b.dtype in _FLOATS}


def _incomplete_modules(model: nn.Module) -> set[str]:
    """Returns the names of modules with a weight that is quantised, sharded, not loaded or no tensor."""
    whole = {id(p) for p in _complete_weights(model).values()}
    return {
        plain_name(model, name)
        for name, module in model.named_modules()
        if not isinstance(module, AdaptedModule)  # whose base layer is looked at
        and (
            any(id(t) not in whole for t in (*module.parameters(recurse=False), *module.buffers(recurse=False)))
            or (hasattr(module, "weight") and "weight" not in module._parameters)
        )
    }


def _token_parameters(model: nn.Module) -> set[int]:
    """Returns the ids of the parameters with one row per token, whose size depends on the tokenizer."""
    token_ids: set[int] = set()
    for get in ("get_input_embeddings", "get_output_embeddings"):
        try:
            module = getattr(model, get)()
        except (AttributeError, NotImplementedError):
            continue
        token_ids |= {id(p) for p in module.parameters()} if module is not None else set()
    return token_ids


def _values_per_weight(names: list[str]) -> dict[str, int]:
    """Returns how many values of which weights are recorded, in the order of the names."""
    kinds: dict[str, list[str]] = {}
    for name in names:
        kinds.setdefault(".".join(part for part in name.split(".")[-2:] if not part.isdecimal()), []).append(name)
    ends = dict.fromkeys(name for group in kinds.values() for name in (group[0], group[-1]))
    between = [name for name in names if name not in ends]
    chosen = set(_evenly_spaced(list(ends), _MAX_WEIGHTS))
    chosen |= set(_evenly_spaced(between, _MAX_WEIGHTS - len(chosen)))
    return {name: _VALUES if name in ends else _VALUES_BETWEEN for name in names if name in chosen}


def _evenly_spaced(names: list[str], maximum: int) -> list[str]:
    """Returns at most so many of the names, evenly spaced."""
    return names if len(names) <= maximum else [names[i * len(names) // maximum] for i in range(maximum)]


def _sample_indices(count: int, number: int) -> Tensor:
    """Returns the flat indices of `number` evenly spaced values out of `count`."""
    return torch.tensor([(2 * i + 1) * count // (2 * number) for i in range(number)])


@torch.no_grad()
def _values(weight: Tensor, indices: Tensor) -> Tensor:
    """Returns the values at flat indices of a weight, in bfloat16 on the CPU."""
    whole = weight if weight.dim() else weight.reshape(1)
    return whole[torch.unravel_index(indices.to(weight.device), whole.shape)].to(torch.bfloat16).cpu()
