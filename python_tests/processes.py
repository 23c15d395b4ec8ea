"""Python processes that tests start: the same package and the tests' own modules, from wherever they are started."""

import gc
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path

import torch

import align_ext

# The package under test first: in a process's current folder, or beside the tests, there may be its bare sources.
PATH = os.pathsep.join(map(str, (Path(align_ext.__file__).parents[1], Path(__file__).parent)))


def python(*arguments, cwd, env=(), **options):
    """Starts Python in a folder that is not the sources'; its output, with what it says of errors, is text."""
    environment = os.environ | {"PYTHONPATH": PATH, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"} | dict(env)
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True} | options
    return subprocess.Popen([sys.executable, *map(str, arguments)], cwd=cwd, env=environment, **options)


# What takes seconds to import is imported once, by the process that the others are forked from.
multiprocessing.set_forkserver_preload(["datasets", "peft", "transformers.trainer", "trl", "align_ext.training"])


def spawn(run, *arguments, processes=2):
    """Runs run(rank, *arguments) in several processes, and raises what one of them raises."""
    torch.multiprocessing.start_processes(_on_rank, (run, arguments), processes, start_method="forkserver")


def _on_rank(rank, run, arguments):
    gc.freeze()  # see pytest_collection_finish
    run(rank, *arguments)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)  # threads that other libraries leave may abort the interpreter's end, which no test is about
