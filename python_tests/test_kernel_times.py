"""What Nsight Compute prints stands beside the model's kernels; other kernels than the model's are seen."""

from pathlib import Path

import kernel_times
import pytest
from gpus import Gpu

CSV = (Path(__file__).parent / "gpu/ncu.csv").read_text()
LORA = next(iter(kernel_times.CASES))


def test_kernels_times_and_bytes_are_read():
    kernels = kernel_times.read_csv(CSV)
    assert [kernel_times.short(name) for name, _, _ in kernels] == [
        "shrink_kernel", "expand_kernel", "sweep_kernel", "sum_kernel", "backward_kernel", "sum_chunks_kernel",
    ]  # fmt: skip
    assert [seconds for _, seconds, _ in kernels[:2]] == pytest.approx([31.296e-6, 58.112e-6])
    assert [moved for *_, moved in kernels[:2]] == [52428800, 136314880]


def test_output_without_kernels_is_none():
    assert kernel_times.read_csv("==ERROR== ERR_NVGPUCTRPERM - The user does not have permission\n") == []


def test_a_row_has_the_model_s_kernel_and_the_one_that_ran(capsys):
    assert kernel_times.compare(LORA, kernel_times.read_csv(CSV), Gpu())
    rows = [row.split(" | ") for row in capsys.readouterr().out.splitlines() if row.startswith("| ")]
    assert [row[0] for row in rows[1:3]] == ["| shrink x", "| expand y"]
    assert [row[3:] for row in rows[1:3]] == [["shrink_kernel", "31.3", "52.4 |"], ["expand_kernel", "58.1", "136.3 |"]]
    assert rows[-1][4] == "230.5"  # all


def test_another_number_of_kernels_is_seen():
    kernels = kernel_times.read_csv(CSV)
    assert not kernel_times.compare(LORA, kernels[:-1], Gpu())
    assert not kernel_times.compare(LORA, [*kernels, kernels[0]], Gpu())


def test_nsight_compute_is_asked_for_what_is_read():
    options = kernel_times.NCU
    assert options[options.index("--metrics") + 1].split(",") == [kernel_times.TIME, kernel_times.BYTES]


def test_where_it_may_not_count_the_script_says_so_and_ends_with_77(tmp_path, capsys):
    ncu = tmp_path / "ncu"
    ncu.write_text("#!/bin/sh\necho '==ERROR== ERR_NVGPUCTRPERM - no permission'\nexit 1\n")
    ncu.chmod(0o755)
    with pytest.raises(SystemExit) as ended:
        kernel_times.counted(str(ncu), LORA)
    assert ended.value.code == 77
    assert capsys.readouterr().out.splitlines()[-1].endswith("==ERROR== ERR_NVGPUCTRPERM - no permission")
