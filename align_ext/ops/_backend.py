"""Describes this build and machine: versions, devices, and the kernels of each operator."""

import platform
from importlib.metadata import version
from typing import Any

import torch

from align_ext.ops._native import build_info

OPS = {  # public operator -> the torch operators that it calls
    "grouped_lora": ("grouped_lora", "grouped_lora_backward"),
    "dropout_sum": ("dropout_sum", "dropout_sum_backward"),
    "routed_lora": ("routed_lora", "routed_lora_backward"),
    "sibling_lora": ("sibling_lora", "sibling_lora_backward"),
    "gaussian_kl": ("gaussian_kl", "gaussian_kl_backward", "task_moments", "gaussian_kl_tables"),
    "mk_mmd": ("mk_mmd", "mk_mmd_backward"),
}


def has_kernel(op: str, device: str) -> bool:
    """Whether this build has native forward and backward kernels of an operator for "cpu" or "cuda"."""
    key = {"cpu": "CPU", "cuda": "CUDA"}[device]
    return all(torch._C._dispatch_has_kernel_for_dispatch_key(f"align_ext::{name}", key) for name in OPS[op])


def backend() -> dict[str, Any]:
    """Describes the build and this machine.

    Returns:
        versions: the versions of align_ext, torch and Python.
        built_with: torch version, C++ compiler and CUDA architectures of the extension.
        devices: the devices that torch sees.
        ops: operator -> device -> "native" or "none" (no kernel in this build).
    """
    vectors = f"{torch.backends.cpu.get_cpu_capability()}, kernels by vectors of {build_info.vector_bytes()} bytes"
    vectors += f" and {unit}" if (unit := build_info.bfloat16_unit()) else ""
    devices = {"cpu": f"{platform.machine()}, {torch.get_num_threads()} threads, {vectors}"}
    for index in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(index)
        devices[f"cuda:{index}"] = f"{torch.cuda.get_device_name(index)}, sm_{major}{minor}"
    return {
        "versions": {
            "align_ext": version("align_ext"),
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "built_with": {
            "torch": build_info.built_with_torch,
            "compiler": build_info.compiler,
            "cuda_archs": build_info.cuda_archs.split(),
        },
        "devices": devices,
        "ops": {
            op: {device: "native" if has_kernel(op, device) else "none" for device in ("cpu", "cuda")} for op in OPS
        },
    }
