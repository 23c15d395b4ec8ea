"""Writes tensors as safetensors files with a record of what they belong to, and reads them strictly."""

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

from align_ext.system.messages import reason_of, shown, shown_path
from align_ext.system.names import check_names
from align_ext.system.reading import MAX_ROW_BYTES, open_file, parse_json

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
_RECORD = "align_ext"  # the key of the record in the metadata, which PEFT ignores


def write_tensors(file: Path, tensors: Mapping[str, Tensor], record: Mapping[str, Any] | None = None) -> None:
    """Writes tensors of any device as safetensors, with their digest.

    Args:
        file: the file.
        tensors: the tensors by name.
        record: JSON-ready information about what they belong to; stored in the file.

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
        copy = tensor.detach().cpu().contiguous()
        content[name] = copy.clone() if copy.data_ptr() in seen else copy  # no two names share memory in a file
        seen.add(copy.data_ptr())
    metadata = {"tensors": digest_of(content), **(record or {})}
    try:
        save_file(content, file, metadata={"format": "pt", _RECORD: json.dumps(metadata)})
    except SafetensorError as error:  # for example, the disk is full; the file's folder is a hidden one
        raise OSError(f"{file.name} cannot be written: {reason_of(error)}") from error
    _sort_metadata(file)


def _sort_metadata(file: Path) -> None:
    """Sorts the metadata in the header, which save_file writes in a random order: equal contents are equal bytes."""
    with open(file, "r+b") as stream:
        length = struct.unpack("<Q", stream.read(8))[0]
        header = json.loads(stream.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        if len(text) <= length:  # the header is as long as before
            stream.seek(8)
            stream.write(text.ljust(length))


def read_tensors(file: str | os.PathLike[str], *, empty: bool = False) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Reads a safetensors file: its tensors on the CPU, and its record, which is empty if there is none.

    Args:
        file: the file.
        empty: whether tensors without values are allowed.

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
        check_names(list(header), "its keys", maximum=1_000_000)
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
    """Returns the header, whose keys are unique, and how many bytes follow it."""
    try:
        with open_file(file) as stream:
            length = struct.unpack("<Q", stream.read(8))[0]
            if length > MAX_ROW_BYTES:
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
    """Computes a SHA-256 of names, dtypes, shapes and bytes, sorted by name."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def check_tensors(tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor], hint: str = "") -> None:
    """Checks that keys, shapes and kinds of dtypes are the expected ones, and that all values are finite.

    Raises:
        ValueError: they differ, or are not finite.
    """
    missing, unexpected = sorted(expected.keys() - tensors.keys()), sorted(tensors.keys() - expected.keys())
    if missing or unexpected:
        raise ValueError(
            f"the adapter does not fit the model: {len(missing)} keys are missing {shown(missing[:3])}, "
            f"{len(unexpected)} are unexpected {shown(unexpected[:3])}{hint}"
        )
    for key, model_tensor in expected.items():
        tensor = tensors[key]
        if tensor.shape != model_tensor.shape:
            raise ValueError(f"{key} is {list(tensor.shape)}, but the model's is {list(model_tensor.shape)}")
        if tensor.dtype not in (FLOATS if model_tensor.is_floating_point() else (model_tensor.dtype,)):
            raise ValueError(f"{key} is {tensor.dtype}, but should be like {model_tensor.dtype}")
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{key} holds values that are not finite")
