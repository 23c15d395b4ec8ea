"""Verifies that a saved adapter computes the same as the trained model: loaded again, merged, and by stock PEFT."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch

from align_ext.adapters.adapted_block import adapted_layers
from align_ext.base_model.load import load_model
from align_ext.data.encode import encode
from align_ext.evaluation.same_logits import LARGEST_DIFFERENCE, relative_difference
from align_ext.io.peft_format import PEFT_CONFIG
from align_ext.model.load_adapter import load_adapter
from align_ext.model.merge import merge_and_unload
from align_ext.training.job import Job


@dataclass(frozen=True)
class Check:
    """The comparison of two models: the largest difference of their logits relative to the largest logit.

    If an architecture does not allow the second model, passed is None and detail gives the reason.
    """

    passed: bool | None
    difference: float | None
    detail: str = ""


def verify(job: Job, adapter: Path) -> dict[str, Check]:
    """Compares the trained model in float32 with the models that use the saved adapter.

    These are the base with the adapter from load_adapter, whose tensors must equal the trained ones bit for bit, and,
    if the architecture allows it, the merged model and the folder loaded by stock PEFT. The base has the dtype of the
    training. The job's model cannot be used afterwards. A check that raises has failed; detail holds the exception.
    """
    examples, ids = job.data.test[:: max(1, len(job.data.test) // 4)], job.data.ids()
    by_task = job.options.adapter["architecture"] == "multi_adapter"
    batches = []
    for example in examples:
        prompt, answer = encode(job.tokenizer, example.prompt, example.answer)
        batches.append({"input_ids": torch.tensor([prompt + answer], device=job.device)})
        if by_task:
            batches[-1]["task_ids"] = torch.tensor([ids[example.task]], device=job.device)

    @torch.no_grad()
    def logits(model: Any) -> torch.Tensor:
        return torch.cat([model(**batch, use_cache=False).logits[0].cpu() for batch in batches])

    dtype = job.model.dtype

    def base() -> Any:
        return load_model(job.options.model, dtype)[0].float().to(job.device)

    def loaded() -> Any:
        model = load_adapter(base(), adapter)
        for name, layer in adapted_layers(job.model).items():
            for part, tensor in adapted_layers(model)[name].adapter.state_dict().items():
                if not torch.equal(tensor, layer.adapter.state_dict()[part]):
                    raise ValueError(f"{name}.{part} is not as it was trained")
        return model.eval()

    trained = logits(job.model.float().eval())
    models = {
        "loaded again": loaded,
        "merged": lambda: merge_and_unload(job.model),
        "stock PEFT": lambda: peft.PeftModel.from_pretrained(base(), str(adapter)).eval(),
    }
    reasons = {"merged": _unmergeable_reason(job.model), "stock PEFT": _peft_unsupported_reason(job.model, adapter)}
    checks = {}
    for name, make in models.items():
        if reason := reasons.get(name):
            checks[name] = Check(None, None, reason)
            continue
        try:
            difference = relative_difference(logits(make()), trained)
            checks[name] = Check(difference <= LARGEST_DIFFERENCE, difference)
        except Exception as error:  # the adapter is saved, so a check only reports the exception
            checks[name] = Check(False, None, f"{type(error).__name__}: {error}")
    return checks


def _unmergeable_reason(model: Any) -> str | None:
    reasons = (layer.unmergeable_reason() for layer in adapted_layers(model).values())
    return next((reason for reason in reasons if reason is not None), None)


def _peft_unsupported_reason(model: Any, adapter: Path) -> str | None:
    """Returns why stock PEFT cannot load an adapter folder, or None: the folder has no adapter_config.json."""
    if not adapter.is_dir() or (adapter / PEFT_CONFIG).is_file():
        return None
    return f"PEFT's LoRA cannot express architecture {model.align_state.config.architecture!r}"
