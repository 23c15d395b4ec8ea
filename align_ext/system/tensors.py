"""Files of tensors: written as safetensors with a record of what they belong to, read strictly."""

from __future__ import annotations

import hashlib
import json
import math
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from align_ext.system.reading import MOST_BYTES, check_names, open_file, parse_json, reason_of, shown, shown_path

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
_RECORD = "align_ext"  # in the metadata, which PEFT leaves alone


def write_tensors(file: Path, tensors: Mapping[str, Tensor], record: Mapping[str, Any] | None = None) -> None:
    """Writes tensors of any device as safetensors, with a digest of them.

    Args:
        file: the file.
        tensors: by name.
        record: JSON-ready; what they belong to, kept in the file.

    Raises:
        ValueError: a value is not finite.
        OSError: the disk is full, or the like.
    """
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{name} holds values that are not finite")
        if tensor.dtype not in _DTYPES.values():
            raise ValueError(f"{name} is {tensor.dtype}, which no folder of an adapter holds")
    content, seen = {}, set()
    for name, tensor in tensors.items():
        whole = tensor.detach().cpu().contiguous()
        content[name] = whole.clone() if whole.data_ptr() in seen else whole  # no two names share memory in a file
        seen.add(whole.data_ptr())
    kept = {"tensors": digest_of(content), **(record or {})}
    try:
        save_file(content, file, metadata={"format": "pt", _RECORD: json.dumps(kept)})
    except SafetensorError as error:  # which it makes of a full disk
        raise OSError(f"{shown_path(file)} cannot be written: {reason_of(error)}") from error


def read_tensors(file: str | os.PathLike[str], *, empty: bool = False) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Reads a safetensors file: its tensors on the CPU, and its record, empty where there is none.

    Args:
        file: the file.
        empty: tensors may be without values.

    Raises:
        ValueError: it cannot be read, is damaged, does not hold the tensors that were written, or holds one without
            values, of an odd dtype or an odd name; or its header is larger than 16 MiB.
    """
    header, size = _header(file)
    try:
        record = header.pop("__metadata__", None) or {}
        content = parse_json(record.get(_RECORD, "{}"))
        if not isinstance(content, dict):
            raise ValueError("its record is none")
        check_names(list(header), "its keys", most=1_000_000)
        end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
        if end > size:
            raise ValueError("it ends too soon")
        for key, entry in header.items():
            if entry["dtype"] not in _DTYPES:
                raise ValueError(f"{key} is {shown(entry['dtype'])}, which no adapter holds")
            if math.prod(entry["shape"]) == 0 and not empty:
                raise ValueError(f"{key} is {entry['shape']}: it holds no values")
        tensors = load_file(file)
        if content.get("tensors") not in (None, digest_of(tensors)):
            raise ValueError("it does not hold the tensors that were saved")
        return tensors, content
    except (SafetensorError, ValueError, TypeError, LookupError, AttributeError, OSError, RuntimeError) as error:
        raise ValueError(f"{shown_path(file)} is damaged: {reason_of(error)}") from error


def _header(file: str | os.PathLike[str]) -> tuple[dict[str, Any], int]:
    """The header, each key once, and how many bytes follow it."""
    try:
        with open_file(file) as stream:
            length = struct.unpack("<Q", stream.read(8))[0]
            if length > MOST_BYTES:
                raise ValueError("its header is too large")
            header = parse_json(stream.read(length).decode("utf-8"))
            size = os.fstat(stream.fileno()).st_size - 8 - length
    except (OSError, struct.error, ValueError) as error:
        if isinstance(error, ValueError) and str(error).startswith("cannot read"):
            raise
        raise ValueError(f"{shown_path(file)} is damaged: {reason_of(error)}") from error
    if not isinstance(header, dict) or not all(isinstance(entry, dict) for entry in header.values()):
        raise ValueError(f"{shown_path(file)} is damaged: its header is none")
    return header, size


def digest_of(tensors: Mapping[str, Tensor]) -> str:
    """Computes a SHA-256 of names, dtypes, shapes and bytes, in the names' order."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def check_tensors(tensors: Mapping[str, Tensor], wanted: Mapping[str, Tensor], hint: str = "") -> None:
    """Compares keys, shapes and kinds of dtypes with those wanted, and checks that all values are finite.

    Raises:
        ValueError: they differ, or are not finite.
    """
    missing, unexpected = sorted(wanted.keys() - tensors.keys()), sorted(tensors.keys() - wanted.keys())
    if missing or unexpected:
        raise ValueError(
            f"the adapter does not fit the model: {len(missing)} keys are missing {shown(missing[:3])}, "
            f"{len(unexpected)} are unexpected {shown(unexpected[:3])}{hint}"
        )
    for key, expected in wanted.items():
        tensor = tensors[key]
        if tensor.shape != expected.shape:
            raise ValueError(f"{key} is {list(tensor.shape)}, but the model's is {list(expected.shape)}")
        if tensor.dtype not in (FLOATS if expected.is_floating_point() else (expected.dtype,)):
            raise ValueError(f"{key} is {tensor.dtype}, but should be like {expected.dtype}")
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{key} holds values that are not finite")
