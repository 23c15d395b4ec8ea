"""Lets one process train by DeepSpeed, and others than wrote a checkpoint go on from it, in its universal form."""

import contextlib
import io
import os
import shutil
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from align_ext.system.messages import reason_of, shown
from align_ext.training.whole_checkpoints import WRITING

UNIVERSAL = "universal"  # the copy's name, below the folder that is emptied with each checkpoint


def join_alone() -> None:
    """Makes what DeepSpeed needs of a launcher, a group of processes and a number in it, where there is none.

    DeepSpeed itself would look for MPI. The group stays, since what is divided is gathered by it after the training.
    """
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        os.environ.setdefault("LOCAL_RANK", "0")


def check_division(trainer: Any, checkpoint: Path) -> None:
    """Refuses a checkpoint whose optimizer's state was written by other means than those that would load it.

    transformers' Trainer would begin with a new optimizer without a word, or look for files that are not there.

    Raises:
        ValueError: the checkpoint was written with DeepSpeed or FSDP and the trainer is without it, or the other way
            round.
    """
    written, here = "neither DeepSpeed nor FSDP", "neither"
    if (checkpoint / "latest").is_file():
        written = "DeepSpeed"
    elif (checkpoint / "optimizer.bin").is_file() or (checkpoint / "optimizer_0").is_dir():
        written = "FSDP"
    elif not (checkpoint / "optimizer.pt").is_file():  # of save_only_model
        return
    if trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled:
        here = "DeepSpeed" if trainer.is_deepspeed_enabled else "FSDP"
    if not written.startswith(here):
        raise ValueError(
            f"the checkpoint {shown(str(checkpoint))} was written with {written}, and this training is with {here}, "
            "which does not load the optimizer's state of the other: go on as it began, or start from its adapter"
        )


@contextlib.contextmanager
def repartitioned(trainer: Any, checkpoint: Path) -> Iterator[str]:
    """Yields the folder from which a Trainer's processes load a checkpoint, for as long as it is needed.

    DeepSpeed's files hold the optimizer's state in one part for each process. Where as many load it, that is the
    checkpoint itself; otherwise a copy in a folder of output_dir, whose state stands there parameter by parameter.

    Raises:
        ValueError: DeepSpeed cannot convert it.
    """
    args, latest = trainer.args, checkpoint / "latest"
    step = checkpoint / latest.read_text(encoding="utf-8").strip() if latest.is_file() else checkpoint
    parts = len([*step.glob("*zero_pp_rank_*_optim_states.pt")])
    if hasattr(trainer.model_wrapped, "load_universal_checkpoint"):  # the engine is there, as for the best checkpoint
        trainer.model_wrapped._config.load_universal_checkpoint = parts not in (0, args.world_size)
    if parts in (0, args.world_size):
        yield str(checkpoint)
        return
    copy, reason = Path(args.output_dir, WRITING, UNIVERSAL), "the first process says why"
    config = trainer.accelerator.state.deepspeed_plugin.deepspeed_config
    before = config.get("checkpoint", {})
    try:
        with args.main_process_first(local=False):
            if args.process_index == 0:
                try:
                    _convert(checkpoint, step, copy)
                except Exception as error:  # of any kind
                    reason = reason_of(error)
        if not (copy / "latest_universal").exists():
            raise ValueError(
                f"the checkpoint {shown(str(checkpoint))} was written by {parts} processes with DeepSpeed, which "
                f"cannot convert it for {args.world_size} ({reason}): go on with {parts} processes"
            )
        config["checkpoint"] = {**before, "load_universal": True}
        yield str(copy)
    finally:
        config["checkpoint"] = before
        if args.process_index == 0:
            shutil.rmtree(copy.parent, ignore_errors=True)


def divide_steps(optimizer: Any) -> None:
    """Gives each parameter of an optimizer its own count of steps; from the universal form ZeRO-3 loads one for all.

    torch's optimizers add to it in place, so that one count would rise once for each parameter.
    """
    for state in optimizer.state.values():
        if isinstance(state.get("step"), Tensor):
            state["step"] = state["step"].clone()


def _convert(checkpoint: Path, step: Path, copy: Path) -> None:
    """Writes a copy of a checkpoint with DeepSpeed's universal form of its parts."""
    from deepspeed.checkpoint import ds_to_universal

    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(checkpoint, copy, ignore=shutil.ignore_patterns(step.name))
    options = Namespace(
        input_folder=str(step), output_folder=str(copy / step.name), num_extract_workers=1, num_merge_workers=1,
        keep_temp_folder=False, strict=True, inject_missing_state=True,
    )  # fmt: skip
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        ds_to_universal.main(options)
