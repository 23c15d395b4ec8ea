"""What kind of model an adapter is for, as adapter_config.json says it: which class of stock PEFT's loads it."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from torch import nn

from align_ext.base_model.modules_to_save import HEADS, plain_name

_BY_CLASS = {
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
}


def task_type_of(model: nn.Module, trained: Collection[str]) -> str | None:
    """The task_type of a model, which may be wrapped; None where PEFT has none, and its PeftModel serves.

    Those of models that generate take input_ids: a model of sound or images alone has none. With those of models that
    classify PEFT asks a folder for the head's tensors: without a trained head there is none either.

    Args:
        model: the model.
        trained: names in the plain model of the modules that the folder holds whole.
    """
    from transformers import PreTrainedModel  # here, so that `align-lora --help` does not wait for it

    inner: Any = next((module for module in model.modules() if isinstance(module, PreTrainedModel)), None)
    if inner is None:
        return None
    name = type(inner).__name__
    by_class = next((kind for ending, kind in _BY_CLASS.items() if name.endswith(ending)), None)
    if by_class is not None:
        names = (plain_name(model, name) for name, _ in model.named_modules())
        heads = {name for name in names if name.rpartition(".")[2] in HEADS}
        return by_class if heads <= set(trained) else None
    if inner.can_generate():
        if inner.main_input_name != "input_ids":
            return None
        return "SEQ_2_SEQ_LM" if inner.config.is_encoder_decoder else "CAUSAL_LM"
    takes_tokens = inner.main_input_name == "input_ids"
    return "FEATURE_EXTRACTION" if takes_tokens and inner.base_model is inner else None
