"""The task_type in adapter_config.json, which decides which PeftModel class of stock PEFT loads an adapter."""

from collections.abc import Collection
from inspect import signature
from typing import Any

from torch import nn

from align_ext.base_model.modules_to_save import HEADS, plain_name

_BY_CLASS = {
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
}


def task_type_of(model: nn.Module, trained: Collection[str]) -> str | None:
    """Returns the task_type of a model, which may be wrapped, or None for the general PeftModel.

    PEFT's types for generation need input_ids, so a model of only sound or images has none, and its type for features
    passes inputs_embeds too, which models of two towers have not (CLIP). PEFT's types for
    classification need the head's tensors in the folder, so a model without a trained head has none.

    Args:
        model: the model.
        trained: names in the plain model of the modules that the folder holds completely.
    """
    inner = transformers_model(model)
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
    takes_tokens = {"input_ids", "inputs_embeds"} <= signature(type(inner).forward).parameters.keys()
    return "FEATURE_EXTRACTION" if takes_tokens and inner.base_model is inner else None


def transformers_model(model: nn.Module) -> Any:
    """Returns the model of transformers that a model is or wraps, or None."""
    from transformers import PreTrainedModel  # imported here to keep `align-lora --help` fast

    return next((module for module in model.modules() if isinstance(module, PreTrainedModel)), None)
