"""What a model trains beside its adapters: a head, an embedding, norms, single parameters; found, named, restored.

Buffers that training changes, such as the running statistics of a frozen BatchNorm, belong to it. Names are those of
the plain model, without PeftModel around it and without our layers in it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from align_ext.adapters.base import AdaptedModule
from align_ext.alignment.buffers import Place, assign, places, same_bits
from align_ext.alignment.model_state import find_state
from align_ext.base_model.adopt_peft import PEFT_PREFIX
from align_ext.base_model.sharded import outlines, whole
from align_ext.config import AUTO, AlignLoraConfig
from align_ext.system.tensors import check_tensors

HEADS = ("classifier", "score", "qa_outputs")  # what PEFT trains by task_type
_WRAPPERS = ("_orig_mod", "_checkpoint_wrapped_module")  # of a compiled or checkpointed part of a model
_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)  # have no forward of their own


@dataclass(frozen=True)
class Beside:
    """What is trained beside the adapters.

    Attributes:
        tensors: parameters, and buffers of the modules, by name; a tied one under each of its names.
        modules: names of the modules that are trained whole; their tensors make PEFT's modules_to_save.
        others: trained parameters and changed buffers that make no whole module, which PEFT has no form of.
    """

    tensors: dict[str, Tensor]
    modules: tuple[str, ...]
    others: tuple[str, ...]

    def unexportable_reason(self, model: nn.Module) -> str | None:
        """Why PEFT has no form of this, or None."""
        if self.others:
            module = self.others[0].rpartition(".")[0]
            cure = f"; modules_to_save={[module]} trains and keeps all of it" if module else ""
            return f"{self.others[0]} is trained beside it without the rest of its module{cure}"
        names = {plain_name(model, name) for name, _ in model.named_modules(remove_duplicate=False)}
        for name in names - set(self.modules):
            if name.endswith(self.modules) and self.modules:  # PEFT's rule, in the midst of words too
                return f"PEFT's modules_to_save would take {name} for a module that is trained beside it"
        return None


def trained_beside(model: nn.Module) -> Beside:
    """Finds what requires a gradient and is no adapter's, and the buffers that are no longer as in the base."""
    adapters = {
        p for module in model.modules() if isinstance(module, AdaptedModule) for p in module.adapter.parameters()
    }
    trained = {p for p in model.parameters() if p.requires_grad and p not in adapters}
    modules: list[str] = []
    if trained:
        _collect(model, model, "", trained, modules)
    every, ids = tensors_of(model), {id(tensor) for tensor in (*trained, *_changed_buffers(model).values())}
    inside = {name: tensor for name, tensor in every.items() if is_below(name, modules)}
    others = {name: tensor for name, tensor in every.items() if id(tensor) in ids and name not in inside}
    return Beside(inside | others, tuple(modules), tuple(others))


def buffers_of(model: nn.Module) -> dict[str, Tensor | None]:
    """The base's buffers as they are, by name in the plain model; without those on the meta device."""
    found = {name: module._buffers[key] for name, (module, key) in _places(model).items()}
    return {name: buffer for name, buffer in found.items() if buffer is None or not buffer.is_meta}


def _changed_buffers(model: nn.Module) -> dict[str, Tensor]:
    state = find_state(model)
    if state is None:
        return {}
    known = {n: b for n, b in buffers_of(model).items() if b is not None and n in state.buffers}
    return {n: b for n, b in known.items() if not same_bits(state.buffers[n], b)}


def _places(model: nn.Module) -> dict[str, Place]:
    inside = {id(part) for m in model.modules() if isinstance(m, AdaptedModule) for part in m.adapter.modules()}
    return {plain_name(model, name): place for name, place in places(model) if id(place[0]) not in inside}


def _collect(
    root: nn.Module, module: nn.Module, name: str, trained: Collection[nn.Parameter], found: list[str]
) -> None:
    """Adds the names of the largest modules all of whose parameters are trained and that stand beside all adapters."""
    if isinstance(module, AdaptedModule):
        return
    own = list(module.parameters())
    adapted = any(isinstance(part, AdaptedModule) for part in module.modules())
    if name and own and not adapted and not isinstance(module, _CONTAINERS) and all(p in trained for p in own):
        found.append(plain_name(root, name))
        return
    for child, part in module.named_children():
        _collect(root, part, f"{name}.{child}" if name else child, trained, found)


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and persistent buffer of the base, a tied one under each of its names."""
    inside = tuple(f"{n}.adapter." for n, module in model.named_modules() if isinstance(module, AdaptedModule))
    named = dict(model.named_parameters(remove_duplicate=False)) | {
        f"{place}.{name}" if place else name: buffer
        for place, module in model.named_modules(remove_duplicate=False)
        for name, buffer in module.named_buffers(recurse=False)
        if name not in module._non_persistent_buffers_set
    }
    return {plain_name(model, name): tensor for name, tensor in named.items() if not name.startswith(inside)}


def plain_name(model: nn.Module, name: str) -> str:
    """A name in the plain model of a module or tensor of the base."""
    parts, module, kept = name.removeprefix(PEFT_PREFIX).split("."), model, []
    if name.startswith(PEFT_PREFIX):
        module = model.get_submodule(PEFT_PREFIX[:-1])
    for part in parts:
        holder = isinstance(module, AdaptedModule) or type(module).__module__.startswith("peft.")
        if not (holder and part in ("base_layer", "original_module")) and part not in _WRAPPERS:
            kept.append(part)
        child = module._modules.get(part)
        module = nn.Identity() if child is None else child
    return ".".join(kept)


def modules_to_train(model: nn.Module, config: AlignLoraConfig) -> list[str]:
    """The names of the modules that modules_to_save asks to train whole; "auto": the model's head, if it is a new one.

    The head of a model that does not predict tokens (classification, question answering, rewards) starts at random:
    a PreTrainedModel without output embeddings, and of it the modules outside its base_model, or those of PEFT's names.

    Raises:
        ValueError: there is no such module, or it has nothing to train.
    """
    if config.modules_to_save != AUTO:
        named = dict(model.named_modules())
        found = [name for name in named if any(f".{name}".endswith(f".{wanted}") for wanted in config.modules_to_save)]
        for wanted in config.modules_to_save:
            fits = [name for name in found if f".{name}".endswith(f".{wanted}")]
            if not fits:
                raise ValueError(f"modules_to_save: the model has no module {wanted!r}")
            floats = [p.is_floating_point() for name in fits for p in named[name].parameters()]
            if not floats or not all(floats):
                raise ValueError(f"modules_to_save: {wanted!r} has no parameters of floating-point numbers to train")
        return found
    prefix, get = getattr(model, "base_model_prefix", None), getattr(model, "get_output_embeddings", None)
    if prefix is None or get is None:
        return []
    try:
        if get() is not None:
            return []
    except (NotImplementedError, AttributeError):
        pass
    inner = model._modules.get(prefix)
    children = {name: child for name, child in model.named_children() if any(True for _ in child.parameters())}
    return [name for name, child in children.items() if (child is not inner if inner is not None else name in HEADS)]


def start_training(model: nn.Module, names: Collection[str]) -> None:
    """Makes parameters of the base trained, and keeps what they are for unload."""
    state = find_state(model)
    assert state is not None
    every = {name: tensor for name, tensor in tensors_of(model).items() if isinstance(tensor, nn.Parameter)}
    names = [name for name in names if name in every]
    chosen = {id(every[name]) for name in names}
    names = [name for name, tensor in every.items() if id(tensor) in chosen]  # a tied one under each of its names
    for name, value in whole({n: every[n] for n in names if n not in state.originals}, "start_training").items():
        state.originals[name] = value.clone()
    for name in names:
        every[name].requires_grad_(True)


def parameters_to_fill(model: nn.Module, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The parameters beside the adapters, by name, that a folder's tensors are to fill.

    Args:
        model: plain, or adapted.
        stored: the folder's tensors, by name in the plain model.

    Raises:
        ValueError: they are others, or have other shapes; a buffer is of another kind.
    """
    if find_state(model) is None:
        wanted = {name: tensor for name, tensor in tensors_of(model).items() if name in stored}
    else:
        beside = trained_beside(model)
        wanted = {n: t for n, t in beside.tensors.items() if isinstance(t, nn.Parameter) or is_below(n, beside.modules)}
    buffers = {name: stored[name] for name in _places(model) if name in stored}  # whose sizes training may change
    for name, tensor in wanted.items():
        if name in buffers and tensor.is_floating_point() != stored[name].is_floating_point():
            raise ValueError(f"{name} is {stored[name].dtype}, but should be like {tensor.dtype}")
    check_tensors(stored, outlines(wanted) | buffers, " (what is trained beside the adapters)")
    return {name: tensor for name, tensor in wanted.items() if isinstance(tensor, nn.Parameter)}


def fill_buffers(model: nn.Module, stored: Mapping[str, Tensor]) -> None:
    """Gives the base's buffers a folder's values, and those that it has not their values of the base."""
    found, state = _places(model), find_state(model)
    assert state is not None
    given = {name: stored[name] for name in found if name in stored}
    back = {name: state.buffers[name] for name in _changed_buffers(model)}
    assign(found, {**back, **given}, next(model.parameters()))


def give_back(model: nn.Module) -> None:
    """Gives what is trained beside the adapters its values of the base model, and freezes it.

    Raises:
        ValueError: they are not known any more; nothing was changed then.
    """
    state, beside = find_state(model), trained_beside(model).tensors
    assert state is not None
    parameters = {name: tensor for name, tensor in beside.items() if isinstance(tensor, nn.Parameter)}
    lost = sorted(parameters.keys() - state.originals.keys())
    if lost:
        raise ValueError(
            f"{lost[0]} was trained beside the adapters, and its value in the base model is not kept: load the base "
            "model again, or name its module in modules_to_save to have it kept"
        )
    with torch.no_grad():
        for name, tensor in parameters.items():
            tensor.copy_(state.originals[name])
            tensor.requires_grad_(False)
    fill_buffers(model, {})


def check_ties(model: nn.Module, tensors: Mapping[str, Tensor], *, alone: bool) -> None:
    """Checks that names of one tensor in the model have one value.

    Args:
        model: the model.
        tensors: what it is about to get, by name.
        alone: refuse also what has a name in the model that gets no value (in PEFT's form it stays as it was).

    Raises:
        ValueError: they do not.
    """
    groups: dict[Tensor, list[str]] = {}
    for name, tensor in tensors_of(model).items():
        groups.setdefault(tensor, []).append(name)
    for names in groups.values():
        given = [name for name in names if name in tensors]
        others = [name for name in given if not torch.equal(tensors[name], tensors[given[0]])]
        others += [name for name in names if name not in tensors] if given and alone else []
        if others:
            raise ValueError(
                f"{given[0]} and {others[0]} are one tensor in this model, but not in the adapter: load the base with "
                "tie_word_embeddings=False"
            )


def is_below(name: str, modules: Collection[str]) -> bool:
    """Whether a name begins with that of one of these modules."""
    return any(name.startswith(f"{module}.") for module in modules)


def describe(beside: Mapping[str, Any]) -> str:
    """How many values tensors have, and the names of the first."""
    count = sum(tensor.numel() for tensor in beside.values())
    return f"{count:,} values: {', '.join(list(beside)[:6])}{' ...' if len(beside) > 6 else ''}"
