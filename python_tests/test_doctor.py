"""The doctor sees what is wrong with an installation."""

import io
import subprocess
import sys

import pytest
import torch
from rich.console import Console

from align_ext import backend
from align_ext.diagnostics import doctor


def examine():
    out = io.StringIO()
    return doctor.run(Console(file=out, width=120)), out.getvalue()


def test_a_sound_installation_is_healthy():
    healthy, text = examine()
    assert healthy
    for op in backend()["ops"]:
        assert op in text
    assert torch.__version__ in text


@pytest.mark.parametrize("op", ["grouped_lora", "dropout_sum", "routed_lora", "gaussian_kl", "mk_mmd"])
def test_a_wrong_result_is_found(op, monkeypatch):
    right = getattr(doctor.ops, op)

    def wrong(*args, **kwargs):
        result = right(*args, **kwargs)
        return (result[0] * 1.1, *result[1:]) if isinstance(result, tuple) else result * 1.1

    monkeypatch.setattr(doctor.ops, op, wrong)
    healthy, text = examine()
    assert not healthy
    assert "relative error" in text


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
