"""What align-lora does before it imports torch."""

import os
import subprocess
import sys

import pytest

SCRIPT = """
import multiprocessing, os, resource, subprocess, sys
import align_ext.system.starting
import torch

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.zeros(2**26, dtype=torch.uint8)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

if __name__ == "__main__":
    print(sum(faults() > 2**13 for _ in range(8)), *sys.argv[1:], flush=True)
    subprocess.run([sys.executable, "-c", "import os; print(os.environ['GLIBC_TUNABLES'])"], check=True)
    spawned = multiprocessing.get_context("spawn").Process(target=print, args=("spawned",))
    spawned.start()  # with the arguments of this process, as if they were its own
    spawned.join(30)
    spawned.kill()
"""


@pytest.mark.skipif("CS_GNU_LIBC_VERSION" not in os.confstr_names, reason="the options are glibc's")
def test_bench_keeps_freed_memory_and_its_children_do_not(tmp_path):
    command = tmp_path / "align-lora"
    command.write_text(SCRIPT)

    def run(*arguments, tunables):
        done = subprocess.run(
            [sys.executable, command, *arguments], capture_output=True, text=True, check=True,
            env=os.environ | {"GLIBC_TUNABLES": tunables},
        )  # fmt: skip
        return done.stdout.splitlines()

    own = "glibc.malloc.arena_max=1"
    for tunables in ("", own):
        new, *children = run("bench", "--only", "step", tunables=tunables)
        assert new in ("1 bench --only step", "2 bench --only step")
        assert children == [tunables, "spawned"]
    assert run("train", tunables=own) == ["8 train", own, "spawned"]
