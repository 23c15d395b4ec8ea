"""Verifies that a saved adapter computes the same as the trained model: loaded again, merged, and by stock PEFT."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
from torch import Tensor, nn

from align_ext.adapters.adapted_block import adapted_layers
from align_ext.alignment.model_state import find_state, require_state
from align_ext.base_model.modules_to_save import find_extra_tensors, tensors_of, trained_rows
from align_ext.base_model.quantised import is_quantised
from align_ext.base_model.sharded import shard_ranks
from align_ext.data.encode import gold_tokens
from align_ext.evaluation.same_logits import LARGEST_DIFFERENCE, relative_difference, rounding_difference
from align_ext.io.peft_format import PEFT_CONFIG
from align_ext.model.load_adapter import load_adapter
from align_ext.model.merge import unload
from align_ext.training.job import Job


@dataclass(frozen=True)
class Check:
    """The comparison of two models: the largest difference of their logits relative to the largest logit.

    If an architecture does not allow the second model, passed is None and detail gives the reason.
    """

    passed: bool | None
    difference: float | None
    detail: str = ""


@torch.no_grad()
def verify(job: Job, adapter: Path) -> dict[str, Check]:
    """Compares the trained model, in the dtype of the training, with models that use the saved adapter.

    These are the base with the adapter from load_adapter, whose tensors must equal the trained ones bit for bit, and,
    with checks="all" and where the architecture allows it, the merged model and the folder loaded by stock PEFT, whose
    change of each weight must equal ours in float32 too, which logits of 16 bits could not tell. All of them share one
    base model, which is the job's, so that none is copied; the job's model cannot be used afterwards. A check that
    raises has failed; detail holds the exception.
    """
    if job.options.checks == "none":
        return {}
    if shard_ranks(job.model.parameters()):
        return {"loaded again": Check(None, None, "the parameters are in parts: load the folder in one process")}
    batches = _batches(job)

    def logits(model: Any) -> Tensor:
        return torch.cat([model(**batch, use_cache=False).logits[0].float().cpu() for batch in batches])

    model, layers = job.model.eval(), adapted_layers(job.model)
    trained = logits(model)
    # bitsandbytes computes in 16 bits on a CPU, whatever the dtype.
    rounded = [] if is_quantised(model) else [p for layer in layers.values() for p in layer.base_layer.parameters()]
    limit = rounding_difference(lambda: logits(model), trained, rounded)
    reasons = {"stock PEFT": _peft_unsupported_reason(model, adapter), "merged": _unmergeable_reason(model)}
    beside = {name: tensor.clone() for name, tensor in find_extra_tensors(model).tensors.items()}
    rows = list(trained_rows(model).values())
    base = unload(model)
    modules = {name: module for name, module in base.named_modules(remove_duplicate=False) if name}
    values = {name: tensor.clone() for name, tensor in tensors_of(base).items() if name in beside}

    def place(modules: Mapping[str, nn.Module], values: Mapping[str, Tensor]) -> Any:
        for name, module in modules.items():
            base.set_submodule(name, module)
        for name, tensor in tensors_of(base).items():
            if name in values:
                tensor.copy_(values[name])
        return base

    def loaded() -> Any:
        load_adapter(base, adapter)
        for name, layer in adapted_layers(base).items():
            expected = layers[name].adapter.state_dict()
            for part, tensor in layer.adapter.state_dict().items():
                if not torch.equal(tensor, expected[part]):
                    raise ValueError(f"{name}.{part} is not as it was trained")
        return base.eval()

    def by_peft() -> Any:
        return peft.PeftModel.from_pretrained(base, str(adapter)).eval()

    def changed_otherwise(name: str) -> bool:
        layer: Any = layers[name]
        theirs: Any = base.get_submodule(layer.base_name(name))
        while getattr(theirs, "parameter_name", "") != getattr(layer, "parameter", ""):  # PEFT's wrappers of experts
            theirs = theirs.base_layer
        delta = layer.adapter.delta_weight()
        delta = delta.mT if layer.is_transposed else delta
        difference = (theirs.get_delta_weight("default").to(delta.dtype) - delta).abs().max()
        return not bool(difference <= LARGEST_DIFFERENCE * delta.abs().max())  # after no step both are 0

    def merged() -> Any:
        place({}, beside)
        for one in rows:
            one.merge()
        return place({layer.base_name(name): layer.merged_base() for name, layer in layers.items()}, {})

    models: dict[str, Callable[[], Any]] = {"loaded again": loaded, "stock PEFT": by_peft, "merged": merged}
    checks = {}
    for name, make in models.items():
        if name != "loaded again" and job.options.checks != "all":
            continue
        if reason := reasons.get(name):
            checks[name] = Check(None, None, reason)
            continue
        try:
            difference = relative_difference(logits(make()), trained)
            checks[name] = Check(difference <= limit, difference)
            other = next(filter(changed_otherwise, layers), None) if name == "stock PEFT" else None
            if other is not None:
                checks[name] = Check(False, difference, f"the change of {other} is another one than ours")
        except Exception as error:  # the adapter is saved, so a check only reports the exception
            checks[name] = Check(False, None, f"{type(error).__name__}: {error}")
        if name != "merged":  # the last one
            if find_state(base) is not None:
                unload(base)
            place(modules, values)  # in the place of PEFT's
    return checks


def _batches(job: Job) -> list[dict[str, Tensor]]:
    """Returns a few held-out examples, each as the inputs of the model."""
    examples, ids = job.data.test[:: max(1, len(job.data.test) // 4)], job.data.ids()
    batches = []
    for example in examples:
        prompt, answer = gold_tokens(job.tokenizer, example)
        batches.append({"input_ids": torch.tensor([prompt + answer], device=job.model.device)})
        if require_state(job.model).config.row.by_task:
            batches[-1]["task_ids"] = torch.tensor([ids[example.task]], device=job.model.device)
    return batches


def _unmergeable_reason(model: Any) -> str | None:
    reasons = (layer.unmergeable_reason() for layer in adapted_layers(model).values())
    return next((reason for reason in reasons if reason is not None), None)


def _peft_unsupported_reason(model: Any, adapter: Path) -> str | None:
    """Returns why stock PEFT cannot load an adapter folder, or None: the folder has no adapter_config.json."""
    if not adapter.is_dir() or (adapter / PEFT_CONFIG).is_file():
        return None
    return f"PEFT's LoRA cannot express architecture {model.align_state.config.architecture!r}"
