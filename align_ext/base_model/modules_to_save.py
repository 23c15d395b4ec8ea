"""Finds, names and restores what a model trains beside its adapters: a head, an embedding, norms, single parameters.

Buffers that training changes, such as the running statistics of a frozen BatchNorm, are included. Names are those in
the plain model, without the names of a PeftModel around it and of our layers in it.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from align_ext.adapters.adapted_block import Adapted
from align_ext.adapters.adapted_linear import AdaptedModule
from align_ext.adapters.trained_rows import TokenRows, TrainedRows
from align_ext.alignment.buffers import Place, assign, places, same_bits
from align_ext.alignment.model_state import find_state
from align_ext.base_model.adopt_peft import PEFT_PREFIX
from align_ext.base_model.sharded import full_shapes, full_values
from align_ext.config import AUTO, AlignLoraConfig
from align_ext.system.tensors import check_tensors

HEADS = ("classifier", "score", "qa_outputs")  # the modules that PEFT trains by task_type
ROWS = "token_adapter.trainable_tokens_delta"  # PEFT's name of the trained rows in an embedding
_WRAPPERS = ("_orig_mod", "_checkpoint_wrapped_module")  # name parts of compiled and checkpointed modules
_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)  # have no forward of their own


@dataclass(frozen=True)
class ExtraTensors:
    """The tensors that are trained beside the adapters.

    Attributes:
        tensors: parameters, and buffers of the modules, by name; a tied one under each of its names. Trained rows of an
            embedding have PEFT's name for them.
        modules: names of the fully trained modules, which PEFT calls modules_to_save.
        others: names of trained parameters and changed buffers outside of these modules.
        bias: "all" or "lora_only", if others are the biases that PEFT's option of this value trains; else "none", and
            PEFT cannot store them.
    """

    tensors: dict[str, Tensor]
    modules: tuple[str, ...]
    others: tuple[str, ...]
    bias: str = "none"

    def unexportable_reason(self, model: nn.Module) -> str | None:
        """Returns why PEFT's format cannot store this, or None."""
        if self.others and self.bias == "none":
            module = self.others[0].rpartition(".")[0]
            cure = f"; modules_to_save={[module]} trains and keeps all of it" if module else ""
            return f"{self.others[0]} is trained beside it without the rest of its module{cure}"
        if reason := _rows_reason(model):
            return reason
        names = {plain_name(model, name) for name, _ in model.named_modules(remove_duplicate=False)}
        for name in names - set(self.modules):
            if name.endswith(self.modules) and self.modules:  # PEFT's rule, which also matches inside words
                return f"PEFT's modules_to_save would take {name} for a module that is trained beside it"
        return None


def _rows_reason(model: nn.Module) -> str | None:
    """Returns why stock PEFT would compute something else with trained rows, or None."""
    wrapped = {name: module for name, module in model.named_modules() if isinstance(module, TrainedRows)}
    for name, module in wrapped.items():
        if getattr(module.base_layer, "bias", None) is not None:
            return f"PEFT leaves out the bias of {plain_name(model, name)}, of which rows are trained"
    config: Any = getattr(model, "config", None)
    ties = hasattr(config, "to_dict") and config.to_dict().get("tie_word_embeddings")
    if len(wrapped) > len(trained_rows(model)) and not ties:
        return "PEFT does not know that the weight of which rows are trained is tied: set tie_word_embeddings"
    return None


def find_extra_tensors(model: nn.Module) -> ExtraTensors:
    """Finds parameters that require a gradient outside of adapters, and buffers that differ from the base's."""
    adapters = {
        p for module in model.modules() if isinstance(module, AdaptedModule) for p in module.adapter.parameters()
    }
    trained = {p for p in model.parameters() if p.requires_grad and p not in adapters}
    modules: list[str] = []
    if trained:
        _collect_trained(model, model, "", trained, modules)
    tensors, ids = tensors_of(model), {id(tensor) for tensor in (*trained, *_changed_buffers(model).values())}
    inside = {name: tensor for name, tensor in tensors.items() if is_inside(name, modules)}
    others = {name: tensor for name, tensor in tensors.items() if id(tensor) in ids and name not in inside}
    rows = {f"{name}.{ROWS}": module.adapter.rows for name, module in trained_rows(model).items()}
    return ExtraTensors(inside | others | rows, tuple(modules), tuple(others), _bias_option(model, inside, others))


def _bias_option(model: nn.Module, inside: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> str:
    """Returns PEFT's option that trains just these tensors outside of the fully trained modules; "none": there is none.

    Of two that do, it is the model's own.
    """
    state = find_state(model)
    if state is None or not others:
        return "none"
    layers = [plain_name(model, name) for name, module in model.named_modules() if isinstance(module, Adapted)]
    for option in (state.config.bias, "lora_only", "all"):
        if {*biases(model, option, layers)} - inside.keys() == others.keys():
            return option
    return "none"


def trained_rows(model: nn.Module) -> dict[str, TrainedRows]:
    """Returns the modules of which rows are trained, by name in the plain model; one of each tie."""
    found: dict[TokenRows, tuple[str, TrainedRows]] = {}
    for name, module in model.named_modules():
        if isinstance(module, TrainedRows):
            found.setdefault(module.adapter, (plain_name(model, name), module))
    return dict(found.values())


def biases(model: nn.Module, option: str, adapted: Collection[str]) -> list[str]:
    """Returns the names of the biases that an option trains: PEFT's rule, parameters of the base called bias.

    Args:
        model: the model.
        option: "none", "all", or "lora_only", those of adapted layers.
        adapted: the names of these in the plain model.
    """
    return [
        name
        for name, tensor in tensors_of(model).items()
        if isinstance(tensor, nn.Parameter)
        and tensor.is_floating_point()
        and f".{name}".endswith(".bias")
        and (option == "all" or (option == "lora_only" and name.removesuffix(".bias") in adapted))
    ]


def buffers_of(model: nn.Module) -> dict[str, Tensor | None]:
    """Returns the base's current buffers by name in the plain model, except those on the meta device."""
    found = {name: module._buffers[key] for name, (module, key) in _buffer_slots(model).items()}
    return {name: buffer for name, buffer in found.items() if buffer is None or not buffer.is_meta}


def _changed_buffers(model: nn.Module) -> dict[str, Tensor]:
    state = find_state(model)
    if state is None:
        return {}
    known = {n: b for n, b in buffers_of(model).items() if b is not None and n in state.buffers}
    return {n: b for n, b in known.items() if not same_bits(state.buffers[n], b)}


def _buffer_slots(model: nn.Module) -> dict[str, Place]:
    inside = {id(part) for m in model.modules() if isinstance(m, AdaptedModule) for part in m.adapter.modules()}
    return {plain_name(model, name): place for name, place in places(model) if id(place[0]) not in inside}


def _collect_trained(
    root: nn.Module, module: nn.Module, name: str, trained: Collection[nn.Parameter], found: list[str]
) -> None:
    """Adds the names of the largest fully trained modules that contain no adapter."""
    if isinstance(module, AdaptedModule):
        return
    params = list(module.parameters())
    adapted = any(isinstance(part, AdaptedModule) for part in module.modules())
    if name and params and not adapted and not isinstance(module, _CONTAINERS) and all(p in trained for p in params):
        found.append(plain_name(root, name))
        return
    for child, part in module.named_children():
        _collect_trained(root, part, f"{name}.{child}" if name else child, trained, found)


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Returns every parameter and persistent buffer of the base, a tied one under each of its names."""
    inside = tuple(f"{n}.adapter." for n, module in model.named_modules() if isinstance(module, AdaptedModule))
    named = dict(model.named_parameters(remove_duplicate=False)) | {
        f"{place}.{name}" if place else name: buffer
        for place, module in model.named_modules(remove_duplicate=False)
        for name, buffer in module.named_buffers(recurse=False)
        if name not in module._non_persistent_buffers_set
    }
    return {plain_name(model, name): tensor for name, tensor in named.items() if not name.startswith(inside)}


def plain_name(model: nn.Module, name: str) -> str:
    """Returns the name that a module or tensor of the base has in the plain model."""
    parts, module, plain_parts = name.removeprefix(PEFT_PREFIX).split("."), model, []
    if name.startswith(PEFT_PREFIX):
        module = model.get_submodule(PEFT_PREFIX[:-1])
    for part in parts:
        is_wrapper = isinstance(module, AdaptedModule) or type(module).__module__.startswith("peft.")
        if not (is_wrapper and part in ("base_layer", "original_module")) and part not in _WRAPPERS:
            plain_parts.append(part)
        child = module._modules.get(part)
        module = nn.Identity() if child is None else child
    return ".".join(plain_parts)


def modules_to_train(model: nn.Module, config: AlignLoraConfig) -> list[str]:
    """Returns the modules to train fully by modules_to_save; "auto" gives the model's head if it is new.

    A PreTrainedModel without output embeddings predicts no tokens and has a new head (classification, rewards): all
    modules outside its base_model, or those with the names that PEFT knows. A name is the end of one, as in PEFT:
    "norm" is also input_layernorm.

    Raises:
        ValueError: there is no such module, or it has nothing to train.
    """
    if config.modules_to_save != AUTO:
        named = dict(model.named_modules())
        found = [name for name in named if name and name.endswith(config.modules_to_save)]
        for wanted in config.modules_to_save:
            fits = [name for name in found if name.endswith(wanted)]
            if not fits:
                raise ValueError(f"modules_to_save: the model has no module {wanted!r}")
            floats = [p.is_floating_point() for name in fits for p in named[name].parameters()]
            if not floats or not all(floats):
                raise ValueError(f"modules_to_save: {wanted!r} has no parameters of floating-point numbers to train")
        return found
    prefix, get_head = getattr(model, "base_model_prefix", None), getattr(model, "get_output_embeddings", None)
    if prefix is None or get_head is None:
        return []
    try:
        if get_head() is not None:
            return []
    except (NotImplementedError, AttributeError):
        pass
    inner = model._modules.get(prefix)
    children = {name: child for name, child in model.named_children() if any(True for _ in child.parameters())}
    return [name for name, child in children.items() if (child is not inner if inner is not None else name in HEADS)]


def start_training(model: nn.Module, names: Collection[str]) -> None:
    """Makes parameters of the base trainable, and stores their original values for unload."""
    state = find_state(model)
    assert state is not None
    params = {name: tensor for name, tensor in tensors_of(model).items() if isinstance(tensor, nn.Parameter)}
    names = [name for name in names if name in params]
    chosen = {id(params[name]) for name in names}
    names = [name for name, tensor in params.items() if id(tensor) in chosen]  # a tied one under each of its names
    unknown = all(parameter.is_meta for parameter in model.parameters())  # of a model that is not loaded yet
    new = {} if unknown else {name: params[name] for name in names if name not in state.originals}
    for name, value in full_values(new, "start_training").items():
        state.originals[name] = value.clone()
    for name in names:
        params[name].requires_grad_(True)


def parameters_to_load(model: nn.Module, stored: Mapping[str, Tensor], rows: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the parameters beside the adapters, by name, that get the tensors of a folder.

    Args:
        model: a plain or adapted model.
        stored: the folder's tensors, by name in the plain model.
        rows: tensors of the shapes of trained rows that a plain model gets with the adapters.

    Raises:
        ValueError: names, shapes or kinds of dtypes differ.
    """
    if find_state(model) is None:
        wanted = {name: tensor for name, tensor in tensors_of(model).items() if name in stored} | dict(rows)
    else:
        extra = find_extra_tensors(model)
        wanted = {n: t for n, t in extra.tensors.items() if isinstance(t, nn.Parameter) or is_inside(n, extra.modules)}
    buffers = {name: stored[name] for name in _buffer_slots(model) if name in stored}  # training may change their sizes
    for name, tensor in wanted.items():
        if name in buffers and tensor.is_floating_point() != stored[name].is_floating_point():
            raise ValueError(f"{name} is {stored[name].dtype}, but should be like {tensor.dtype}")
    check_tensors(stored, full_shapes(wanted) | buffers, " (what is trained beside the adapters)")
    return {name: tensor for name, tensor in wanted.items() if isinstance(tensor, nn.Parameter)}


def set_buffers(model: nn.Module, stored: Mapping[str, Tensor]) -> None:
    """Sets the base's buffers to a folder's values; changed buffers that it does not hold get their base values."""
    found, state = _buffer_slots(model), find_state(model)
    assert state is not None
    given = {name: stored[name] for name in found if name in stored}
    base_values = {name: state.buffers[name] for name in _changed_buffers(model)}
    assign(found, {**base_values, **given}, next(model.parameters()))


def restore_base(model: nn.Module) -> None:
    """Restores the base values of what is trained beside the adapters, and freezes it.

    Raises:
        ValueError: the base values are no longer known; nothing was changed then.
    """
    state, extra, base = find_state(model), find_extra_tensors(model).tensors, tensors_of(model)
    assert state is not None
    parameters = {name: tensor for name, tensor in extra.items() if name in base and isinstance(tensor, nn.Parameter)}
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
    set_buffers(model, {})


def check_ties(model: nn.Module, tensors: Mapping[str, Tensor], *, alone: bool) -> None:
    """Checks that all names of a tied tensor get the same value.

    Args:
        model: the model.
        tensors: the new values by name.
        alone: refuse also a tied tensor of which one name gets no value (with PEFT, that name keeps its old value).

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


def is_inside(name: str, modules: Collection[str]) -> bool:
    """Whether a name is inside one of these modules."""
    return any(name.startswith(f"{module}.") for module in modules)


def describe(extra: Mapping[str, Any]) -> str:
    """Returns a text with the number of values of tensors, and the first names."""
    count = sum(tensor.numel() for tensor in extra.values())
    return f"{count:,} values: {', '.join(list(extra)[:6])}{' ...' if len(extra) > 6 else ''}"
