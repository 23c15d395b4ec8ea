"""Loads a job's base model as its options say."""

import logging
from typing import Any

import torch

from align_ext.base_model.dtypes import resolve_dtype
from align_ext.base_model.load import load_model
from align_ext.base_model.quantised import is_quantised, quantised_loading
from align_ext.system.terminal import PrintLine
from align_ext.training.options import TrainOptions

_LOG = logging.getLogger(__name__)


def load_job_base(
    options: TrainOptions, dtype: torch.dtype | str, device: str, print_line: PrintLine = _LOG.info
) -> tuple[Any, Any]:
    """Loads the base model on its device, quantised or with another attention if the options ask for it.

    Args:
        options: the options of the job.
        dtype: the dtype of its weights, or of what is not quantised.
        device: "cpu" or "cuda".
        print_line: gets one-line messages about downloads and conversions.

    Returns:
        The model in eval mode, and the tokenizer.

    Raises:
        ValueError: as in load_model and quantised_loading.
    """
    loading = quantised_loading(options.load_in_4bit, options.load_in_8bit, resolve_dtype(dtype), device)
    if options.attn_implementation is not None:
        loading["attn_implementation"] = options.attn_implementation
    model, tokenizer = load_model(options.model, dtype, print_line, **loading)
    return (model if is_quantised(model) else model.to(device)), tokenizer
