"""The work of `align-lora merge` and `align-lora export`: they write a folder from an adapter and a base model."""

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from align_ext.alignment.context import set_task
from align_ext.base_model.checks import check_base, model_errors
from align_ext.cli.scored_run import base_note
from align_ext.data.encode import text_batch
from align_ext.evaluation.same_logits import LARGEST_DIFFERENCE, relative_difference, verdict
from align_ext.io.adapter_folder import AdapterFolder, task_list, task_number
from align_ext.io.peft_format import refuse_dora, unexportable_reason
from align_ext.io.save_adapter import export_peft
from align_ext.model.load_adapter import load_adapter
from align_ext.model.load_base import load_base
from align_ext.model.merge import merge_and_unload, unload
from align_ext.system.locks import LOCK, claimed
from align_ext.system.memory import enough_memory
from align_ext.system.messages import shown, shown_path
from align_ext.system.reading import check_folder, read_text
from align_ext.system.terminal import print_line, show_status
from align_ext.system.writing import atomic_folder, check_space, user_path

PROMPTS = (
    "The capital of France is",
    "Question: what is 17 + 25? Answer:",
    "def fibonacci(n):\n    return",
    "Once upon a time there was a small town by the sea, and in it",
)


_MAX_PROMPT_BYTES = 1 << 16  # the most bytes of prompts, which are one batch


@dataclass(frozen=True)
class Request:
    """The options of both commands; model: None for that of the adapter; task: a name or number, or None."""

    adapter: str
    model: str | None
    output: str
    task: str | None
    force: bool = False


@enough_memory("merge in a narrower --dtype, or where there is more")
def merge(request: Request, approximate: Any, prompts: str | None, dtype: str, console: Console) -> None:
    """Writes the base model with the adapter merged into its weights, and its tokenizer.

    Raises:
        ValueError: the adapter cannot be merged, or an option cannot be used; nothing is written.
    """
    with _claimed_output(request.output) as target:
        stored = AdapterFolder.read(request.adapter)
        texts = PROMPTS if prompts is None else read_prompts(prompts)
        task = task_number(stored, request.task)
        if stored.config.row.by_task:
            if task is None:
                raise ValueError(f"the adapter has one part for each task: name one with --task ({task_list(stored)})")
        elif approximate is None and (reason := next(iter(stored.adapters.values())).unmergeable_reason()):
            raise ValueError(f"{request.adapter} cannot be merged: {reason}")
        with _timed_status("loading the model", console):
            model, tokenizer = load_base(request.model, stored, dtype, lambda line: print_line(console, line))
            batch = text_batch(tokenizer, texts) if approximate else None
            if batch is not None:
                check_base(model, tokenizer, _rows(batch), cure="give shorter lines in --prompts")
            load_adapter(model, request.adapter, force=request.force)
        if note := base_note(request.adapter):
            print_line(console, note)
        if task is not None:
            set_task(model, task)
        with _timed_status("merging", console):
            merge_and_unload(model, approximate, None if batch is None else {**batch, "use_cache": False})
        if approximate:
            print_line(console, str(model.merge_report))
        check_space(target, sum(tensor.nbytes for tensor in model.state_dict().values()))
        with _timed_status(f"writing {target}", console), atomic_folder(target) as path:
            model.save_pretrained(path)
            tokenizer.save_pretrained(path)


@enough_memory("export where there is more")
def export(request: Request, verify: bool, console: Console) -> bool:
    """Writes the adapter as a folder of stock PEFT; one by task gets a subfolder per task if none is given.

    Returns:
        False if verify is set and the model loaded from a folder computes other logits.

    Raises:
        ValueError: PEFT's format cannot hold the adapter, or an option cannot be used; nothing is written.
    """
    with _claimed_output(request.output) as target:
        stored = AdapterFolder.read(request.adapter)
        refuse_dora(stored.config)
        task = task_number(stored, request.task)
        subfolders: dict[str, int | None] = {"": task}
        if stored.config.row.by_task:
            names = stored.task_names or tuple(map(str, range(stored.config.num_tasks or 0)))
            subfolders = {name: number for number, name in enumerate(names)} if task is None else subfolders
        elif reason := unexportable_reason(stored.adapters, stored.config):
            raise ValueError(f"PEFT has no form of this adapter: {reason}")
        with _timed_status("loading the model", console):
            model, tokenizer = load_base(request.model, stored, torch.float32, lambda line: print_line(console, line))
            if verify:
                check_base(model, tokenizer, _rows(text_batch(tokenizer, PROMPTS)), cure="leave --verify out")
            load_adapter(model, request.adapter, force=request.force)
        if note := base_note(request.adapter):
            print_line(console, note)
        with _timed_status(f"writing {target}", console), atomic_folder(target) as path:
            for folder, number in subfolders.items():
                export_peft(model, path / folder, number)
        if not verify:
            return True
        with _timed_status("verifying", console):
            differences = _verify(model, tokenizer, target, subfolders)
        for reader, difference in differences.items():
            print_line(console, f"{reader}: {verdict(difference, passed=difference <= LARGEST_DIFFERENCE)}")
        return all(difference <= LARGEST_DIFFERENCE for difference in differences.values())


def _verify(model: Any, tokenizer: Any, target: Path, subfolders: Mapping[str, int | None]) -> dict[str, float]:
    """Returns the relative differences of logits of stock PEFT and of our loader; the model is unusable afterwards."""
    import peft

    batch, expected = text_batch(tokenizer, PROMPTS), {}
    for folder, number in subfolders.items():
        set_task(model, number)
        expected[folder] = _logits(model, batch)
    base, differences = unload(model), {}
    for folder, logits in expected.items():
        of = f" of {folder}" if folder else ""
        peft_model = peft.PeftModel.from_pretrained(base, str(target / folder))
        differences[f"stock PEFT{of}"] = relative_difference(_logits(peft_model, batch), logits)
        base = peft_model.unload()
        differences[f"align_ext{of}"] = relative_difference(_logits(load_adapter(base, target / folder), batch), logits)
        unload(base)
    return differences


@torch.no_grad()
def _logits(model: Any, batch: Mapping[str, Tensor]) -> Tensor:
    with model_errors(model, "be verified"):
        return model.eval()(**batch, use_cache=False).logits[batch["attention_mask"].bool()]


def _rows(batch: Mapping[str, Tensor]) -> list[list[int]]:
    """Returns the tokens of each row of a batch, without padding."""
    return [ids[mask.bool()].tolist() for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)]


def read_prompts(file: str) -> Sequence[str]:
    """Reads a file of one prompt a line; empty lines are none.

    Raises:
        ValueError: it cannot be read, is too large, or holds no prompt.
    """
    lines = [line for line in read_text(file, _MAX_PROMPT_BYTES).splitlines() if line.strip()]
    if not lines:
        raise ValueError(f"the file of prompts {shown_path(file)} is empty: write one a line")
    return lines


@contextmanager
def _claimed_output(output: str) -> Iterator[Path]:
    """Claims the output, a new or empty folder; it is removed if it was made here and stays empty."""
    check_folder(output, "output")
    with claimed(user_path(output, "--output")) as target:
        if os.listdir(target) != [LOCK]:
            raise ValueError(f"the output {shown(output)} exists and is no empty folder: choose another --output")
        yield target


@contextmanager
def _timed_status(what: str, console: Console) -> Iterator[None]:
    """Shows a status during a block, and prints how long the block took."""
    start = time.perf_counter()
    with show_status(console, what):
        yield
    print_line(console, f"{what}: {time.perf_counter() - start:.1f} s")
