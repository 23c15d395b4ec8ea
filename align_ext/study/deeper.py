"""A deeper look into a finished cell: heads, latents, gradients, spectra and routers, from its saved adapter."""

import json
from pathlib import Path
from typing import Any

import transformers

from align_ext.data.collator import TaskCollator
from align_ext.data.encode import features
from align_ext.diagnostics.heads import copy_heads
from align_ext.io.adapter_folder import AdapterFolder
from align_ext.model.load_adapter import load_adapter
from align_ext.model.replace import replace_linear_with_align_lora
from align_ext.study.design import Study
from align_ext.study.mechanism import mechanism
from align_ext.study.plan import probe_rows, read_trained
from align_ext.system.writing import atomic_file
from align_ext.training.base import load_job_base
from align_ext.training.options import TrainOptions

MECHANISM = "mechanism.json"


def wants_look(study: Study, seed: int | None) -> bool:
    """Whether the design asks for a deeper look into the cells of a seed."""
    chosen = {"first": study.seeds[:1], "all": study.seeds, "none": ()}[study.score.mechanism]
    return seed in chosen and bool(study.score.probe)


def look_deeper(study: Study, options: TrainOptions, cell: Path) -> None:
    """Measures what training did to a cell's adapter, and writes mechanism.json into its folder.

    Args:
        study: the design.
        options: the cell's.
        cell: its folder.
    """
    model, tokenizer = load_job_base(options, options.dtype, options.device)
    data = read_trained(study, options, tokenizer)
    transformers.set_seed(options.seed)
    replace_linear_with_align_lora(model, AdapterFolder.read(cell / "adapter").config)
    start = copy_heads(model)
    load_adapter(model, cell / "adapter")
    rows = list(features(tokenizer, probe_rows(study, data), data.ids()))
    collate, size = TaskCollator(tokenizer), study.score.batch_size
    batches: list[dict[str, Any]] = [
        {name: x.to(options.device) for name, x in collate(rows[i : i + size]).items()}
        for i in range(0, len(rows), size)
    ]
    found = mechanism(model, batches, data.names, start)
    with atomic_file(cell / MECHANISM) as new:
        new.write_text(json.dumps(found) + "\n", encoding="utf-8")
