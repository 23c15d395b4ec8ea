"""Loads a causal language model and its tokenizer; the default is a small model that needs neither hub nor GPU."""

import logging
import re
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from transformers import AutoModelForCausalLM, AutoTokenizer

from align_ext.base_model.checks import check_finite, check_loaded
from align_ext.base_model.default_model import DEFAULT_MODEL, default_model
from align_ext.base_model.dtypes import resolve_dtype
from align_ext.base_model.hub import ask_hub
from align_ext.system.messages import reason_of, shown, shown_path
from align_ext.system.reading import open_file
from align_ext.system.terminal import PrintLine

_LOG = logging.getLogger(__name__)


def load_model(
    name: str | None = None, dtype: str | torch.dtype = "auto", print_line: PrintLine = _LOG.info, **options: Any
) -> tuple[Any, Any]:
    """Loads a causal language model and its tokenizer from safetensors, without running code that comes with them.

    Args:
        name: a local folder, a hub id, or None for SmolLM2-135M-Instruct (see `default_model`).
        dtype: "auto" (see `best_dtype`), "stored" (as in its files), "float32", "bfloat16", "float16", or torch's.
        print_line: gets one-line messages about downloads and conversions.
        **options: further arguments of from_pretrained.

    Returns:
        The model, on the CPU (if the options do not say otherwise) and in eval mode, and the tokenizer, with a padding
        token.

    Raises:
        ValueError: there is no such model, it cannot be loaded, or some weights are missing, not loaded or not finite;
            the message is one line.
    """
    known, source = name is None or name == DEFAULT_MODEL, _source(name, print_line)
    tokenizer = _tokenizer(source)
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            source,
            dtype="auto" if dtype == "stored" else resolve_dtype(dtype),
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # check_loaded reports them
            **options,
        )
    except Exception as error:  # damaged files may raise any exception in transformers
        raise ValueError(f"cannot load the model {shown_path(source)}: {reason_of(error)}") from error
    check_loaded(model, info, f"the model {shown_path(source)}")
    check_finite(model, f"the model {shown_path(source)}")
    if known:
        model.align_base = DEFAULT_MODEL  # the name for adapters, since name_or_path is a path in the cache
    _make_ready(tokenizer, source)
    return model.eval(), tokenizer


def load_tokenizer(name: str | None = None, print_line: PrintLine = _LOG.info) -> Any:
    """Loads the tokenizer of a model, with a padding token, without its weights; see `load_model`.

    Raises:
        ValueError: there is no such model, or its tokenizer fails.
    """
    source = _source(name, print_line)
    tokenizer = _tokenizer(source)
    _make_ready(tokenizer, source)
    return tokenizer


def _source(name: str | None, print_line: PrintLine) -> str:
    """Returns the folder or hub id of a model."""
    return str(default_model(print_line)) if name is None or name == DEFAULT_MODEL else _checked_name(name)


def _tokenizer(source: str) -> Any:
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
        _check_length(tokenizer)
    except Exception as error:  # damaged files may raise any exception in transformers
        raise ValueError(f"cannot load the model {shown_path(source)}: {reason_of(error)}") from error
    return tokenizer


def _make_ready(tokenizer: Any, source: str) -> None:
    """Gives a tokenizer a padding token, and checks that it runs."""
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise ValueError(f"the tokenizer of {source!r} has neither a padding nor an end token")
        tokenizer.pad_token = tokenizer.eos_token
    try:
        tokenizer(["a", "a b"], return_tensors="pt", padding=True, return_attention_mask=True)
        tokenizer.decode([tokenizer.pad_token_id], skip_special_tokens=True)
    except Exception as error:  # tokenizer_config.json may lead to any exception
        raise ValueError(
            f"the tokenizer of {shown_path(source)} fails (see tokenizer_config.json): {reason_of(error)}"
        ) from error


def _check_length(tokenizer: Any) -> None:
    """Raises ValueError if the tokenizer's largest length is no number."""
    length = tokenizer.model_max_length
    if not isinstance(length, (int, float)) or isinstance(length, bool):
        raise ValueError(f"model_max_length={shown(length)} in tokenizer_config.json is no number")


def _checked_name(name: str) -> str:
    """Returns the name or path for from_pretrained; asks the hub first, since from_pretrained retries for a minute."""
    try:
        folder = Path(name).expanduser()
        is_folder = folder.is_dir()
    except (OSError, RuntimeError, ValueError) as error:  # too long, an unknown home folder, a null byte
        raise ValueError(f"--model {shown(name)} names neither a folder nor a hub id: {reason_of(error)}") from error
    if is_folder:
        if not (folder / "config.json").is_file():
            raise ValueError(f"the model folder {shown_path(name)} holds no config.json")
        for file in folder.iterdir():
            if not file.is_dir() and file.exists():
                open_file(file).close()  # reading a FIFO would block
        return str(folder)
    if not re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", name) or len(name) > 200:
        raise ValueError(f"there is no model folder {shown(name, 200)}, and it is not a hub id (owner/name)")
    if (refusal := ask_hub(name)) is None:
        return name
    if isinstance(cached := try_to_load_from_cache(name, "config.json"), str):
        return str(Path(cached).parent)
    raise ValueError(f"there is no model folder {name!r}, and the hub does not give it: {_first_line(refusal)}")


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
