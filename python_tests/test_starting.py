"""What align-lora does before it imports torch."""

import os
import subprocess
import sys

import pytest


@pytest.mark.skipif("CS_GNU_LIBC_VERSION" not in os.confstr_names, reason="the options are glibc's")
def test_bench_keeps_freed_memory_and_its_children_do_not(tmp_path):
    command = tmp_path / "align-lora"
    command.write_text(
        "import sys, align_ext.system.starting, resource, subprocess, torch\n"
        "def faults():\n"
        "    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "    torch.zeros(2**26, dtype=torch.uint8)\n"
        "    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before\n"
        "print(sum(faults() > 2**13 for _ in range(8)), *sys.argv[1:])\n"
        "code = 'import os; print(os.environ.get(\"GLIBC_TUNABLES\"))'\n"
        "print(subprocess.run([sys.executable, '-c', code], capture_output=True, text=True).stdout, end='')\n"
    )

    def run(*arguments, tunables):
        done = subprocess.run(
            [sys.executable, command, *arguments], capture_output=True, text=True, check=True,
            env=os.environ | {"GLIBC_TUNABLES": tunables},
        )  # fmt: skip
        return done.stdout.splitlines()

    own = "glibc.malloc.arena_max=1"
    for tunables in ("", own):
        new, children = run("bench", "--only", "step", tunables=tunables)
        assert new in ("1 bench --only step", "2 bench --only step")
        assert children == tunables
        assert run("train", tunables=tunables) == ["8 train", tunables]
