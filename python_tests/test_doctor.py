"""The doctor sees what is wrong with an installation."""

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console

from align_ext import backend
from align_ext.adapters import adapter_class
from align_ext.architectures import ARCHITECTURES
from align_ext.config import AlignLoraConfig
from align_ext.diagnostics import doctor


def examine():
    out = io.StringIO()
    return doctor.run(Console(file=out, width=120)), out.getvalue()


def test_a_sound_installation_is_healthy():
    healthy, text = examine()
    assert healthy
    for op in backend()["ops"]:
        assert op in text
    for architecture in ARCHITECTURES:
        assert f"{architecture} ok" in " ".join(text.split())
    assert torch.__version__ in text


@pytest.mark.parametrize("op", ["grouped_lora", "sibling_lora", "dropout_sum", "routed_lora", "gaussian_kl", "mk_mmd"])
def test_a_wrong_result_is_found(op, monkeypatch):
    right = getattr(doctor.ops, op)

    def wrong(*args, **kwargs):
        result = right(*args, **kwargs)
        if op == "sibling_lora":  # one of each layer
            return tuple(y * 1.1 for y in result[0]), result[1]
        return (result[0] * 1.1, *result[1:]) if isinstance(result, tuple) else result * 1.1

    monkeypatch.setattr(doctor.ops, op, wrong)
    healthy, text = examine()
    assert not healthy
    assert "relative error" in text


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_wrong_architecture_is_found(name, monkeypatch):
    kind = adapter_class(AlignLoraConfig(architecture=name, num_tasks=2))
    right = kind.low_rank_forward

    def wrong(self, x, dropout_p, current, **op):
        y, *others = right(self, x, dropout_p, current, **op)
        return (op["base_out"] + 1.1 * (y - op["base_out"]), *others)

    cpu = torch.device("cpu")
    assert doctor._verdict(doctor._architecture(name), cpu, torch.float32) is None
    monkeypatch.setattr(kind, "low_rank_forward", wrong)
    assert "relative error" in doctor._verdict(doctor._architecture(name), cpu, torch.float32)


def test_a_failing_operator_is_reported_not_raised(monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(doctor.ops, "gaussian_kl", broken)
    healthy, text = examine()
    assert not healthy
    assert "no such kernel" in text


def test_a_missing_extension_names_the_build_command(tmp_path):
    """The bare sources without _C: the import says what to do."""
    import shutil
    from pathlib import Path

    source = Path(__file__).parents[1] / "align_ext"
    shutil.copytree(source, tmp_path / "align_ext", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    # -S leaves out the environment's own align_ext, and only then are torch's folder and the sources put back.
    path = [str(tmp_path), str(Path(torch.__file__).parents[1])]
    command = [sys.executable, "-S", "-c", f"import sys; sys.path[:0] = {path}; import align_ext"]
    result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert result.returncode != 0
    assert "pip install ." in result.stderr
    assert "align_ext._C is missing" in result.stderr


LIMITS = {
    None: 64,
    "SSE41": 16,
    "AVX": 16,
    "AVX2": 32,
    "AVX512_CORE": 64,
    "AVX512_CORE_BF16": 64,
    "AVX512_CORE_AMX": 64,
}
BF16_LIMITS = ("AVX512_CORE_BF16", "AVX512_CORE_AMX")


@pytest.mark.parametrize(
    "limit", [pytest.param(name, marks=() if name in (None, "AVX2") else pytest.mark.slow) for name in LIMITS]
)
def test_kernels_take_what_the_processor_has_and_torch_s_own_products_may(limit, tmp_path):
    code = "from align_ext.ops._native import build_info as i; print(i.vector_bytes(), i.bfloat16_unit() or None)"
    env = {name: value for name, value in os.environ.items() if name != "ONEDNN_MAX_CPU_ISA"}
    env |= {"ONEDNN_MAX_CPU_ISA": limit} if limit else {}
    # From elsewhere: the sources in the current folder, if it has them, are not the installed package.
    run = subprocess.run(
        [sys.executable, "-c", code], env=env, cwd=tmp_path, capture_output=True, text=True, check=True
    )
    features = set(Path("/proc/cpuinfo").read_text().split())
    widest = 64 if "avx512bw" in features else 32 if {"avx2", "fma"} <= features else 16
    unit = "AVX512_BF16" if "avx512_bf16" in features and limit in (None, *BF16_LIMITS) else None
    unit = "AMX" if "amx_bf16" in features and limit in (None, "AVX512_CORE_AMX") else unit
    assert run.stdout.split() == [str(min(widest, LIMITS[limit])), str(unit)]
