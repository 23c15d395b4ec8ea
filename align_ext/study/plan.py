"""Resolves a design against its model and data, once for a study: ranks, parameters, cells, rows."""

import functools
import hashlib
import json
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from align_ext.adapters.linear_layer import features_of
from align_ext.base_model.default_model import DEFAULT_MODEL, default_model
from align_ext.base_model.default_targets import with_targets
from align_ext.base_model.dtypes import best_dtype, usable_device
from align_ext.base_model.select_layers import is_linear
from align_ext.config import AUTO, AlignLoraConfig
from align_ext.data.encode import fits
from align_ext.data.rows import Example
from align_ext.data.tasks import Pools, TaskData, read_tasks, row_ids, scored_examples
from align_ext.model.cost import adapter_flops, match_rank, planned_adapters, trained_parameters
from align_ext.study.design import BASE, DESIGN, Cell, Score, Study, read_study
from align_ext.system.bounds import unknown_name
from align_ext.system.messages import reason_of, shown
from align_ext.system.reading import read_json
from align_ext.system.versions import versions
from align_ext.system.writing import atomic_file, check_writable
from align_ext.training.options import TrainOptions, known_options
from align_ext.training.rows import choose, read_pools

PLAN, CELLS = "plan.json", "cells"
READ_ONLY = "make it writable, or copy the study to another folder"  # the cure for a folder that is not
_NAMED = 6  # so many changes are named in a message
_DECIDING = "score.test, score.dev, score.unseen, train.data, train.tasks, train.train_examples, train.seq_len"
_FIXED = ("data", "dtype", "device", "base_parameters")  # what may not change while a study grows


@dataclass(frozen=True)
class StudyData:
    """The rows of a study.

    Attributes:
        trained: the tasks that are trained on; its test and dev rows are the same for every seed.
        unseen: the tasks that are only scored, or None.
    """

    trained: TaskData
    unseen: TaskData | None

    def scored(self) -> dict[str, list[Example]]:
        """Returns the rows to score by split."""
        unseen = [] if self.unseen is None else self.unseen.test
        return {"test": self.trained.test, "dev": self.trained.dev, "unseen": unseen}


def read_data(study: Study, options: TrainOptions, tokenizer: Any | None) -> StudyData:
    """Reads the rows that a study trains and scores on.

    Args:
        study: the design.
        options: the options of any cell.
        tokenizer: the model's; None: rows are not checked for their length.

    Raises:
        ValueError: as in read_tasks, select and scored_examples.
    """
    trained = read_trained(study, options, tokenizer)
    data = StudyData(trained, read_unseen(study, options, tokenizer, trained.names))
    known = [*trained.names, *(() if data.unseen is None else data.unseen.names)]
    for task in study.score.generate:
        if task not in known and "tasks" not in study.vary:
            raise ValueError(f"score.generate: {unknown_name('task', task, known)}")
    return data


def read_trained(study: Study, options: TrainOptions, tokenizer: Any | None) -> TaskData:
    """Reads the tasks that are trained on, as recipe.prepare does; see read_data."""
    return choose(options, read_pools(options, study.score.dev), tokenizer, study.score.dev)


def read_unseen(
    study: Study, options: TrainOptions, tokenizer: Any | None, trained: Collection[str]
) -> TaskData | None:
    """Reads the tasks that are only scored, without those that are trained on; None: there are none. See read_data."""
    unseen = study.score.unseen
    if unseen is None:
        return None
    others = read_tasks(
        unseen.data or options.data, unseen.tasks, train=options.train_counts, test=study.score.test,
        dev=study.score.dev, seed=options.order_seed, ignore_columns=options.ignore_columns,
        columns=() if unseen.data else options.columns,
    )  # fmt: skip
    rest = {name: splits for name, splits in others.tasks.items() if name not in trained}
    if not rest:
        raise ValueError("score.unseen: all of its tasks are trained on: name others in score.unseen.tasks")
    fit, pools = _fits(tokenizer, options), Pools(rest, others.notes)
    return scored_examples(pools, unseen.examples, fit, undivided=True, seq_len=options.seq_len)


def probe_rows(study: Study, trained: TaskData) -> list[Example]:
    """Returns the first test rows of each task, on which alignment and mechanism are measured."""
    of_task = {task: [example for example in trained.test if example.task == task] for task in trained.names}
    return [example for examples in of_task.values() for example in examples[: study.score.probe]]


def first_options(study: Study, **resolved: Any) -> TrainOptions:
    """Returns the options whose rows stand for all cells: of the smallest seed, and of all tasks where they vary."""
    cell = min(study.cells(), key=lambda cell: (cell.seed or 0, -cell.vary.get("tasks", 0)))
    return study.options_of(cell, **resolved)


def _fits(tokenizer: Any | None, options: TrainOptions) -> Any:
    return (lambda _: True) if tokenizer is None else functools.partial(fits, tokenizer, max_tokens=options.seq_len)


def make_plan(study: Study, before: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Resolves a study: plan.json, JSON-ready.

    No weights are read: a model's config.json is enough to count parameters, and its tokenizer to count rows.

    Args:
        study: the design.
        before: the plan of the same study, whose dtype and device are kept.

    Raises:
        ValueError: a model, its data or an option cannot be used.
    """
    first = first_options(study)
    model, tokenizer = empty_model(first.model)
    device = usable_device(first.device) if before is None else before["device"]
    dtype = str(best_dtype(device)).removeprefix("torch.") if before is None else before["dtype"]
    if first.dtype != AUTO:
        dtype = first.dtype
    data = read_data(study, first, tokenizer)
    num_tasks, entry = len(data.trained.names), _data_entry(data)
    budget = _budget(study, model, num_tasks)
    base: dict[str, Any] = {"key": base_cell(study, entry["digest"], dtype), "arm": BASE, "seed": None, "vary": {}}
    base["options"] = _not_default(first_options(study, dtype=dtype, device=device))
    arms: dict[str, Any] = {}
    cells = []
    for cell in study.cells():
        options = study.options_of(cell, dtype=dtype, device=device)
        if budget is not None and "r" not in {*study.arm(cell.arm).options, *cell.vary}:
            rank = nearest_rank(_config(options, model, num_tasks), model, budget)
            options = study.options_of(cell, dtype=dtype, device=device, r=rank)
        if cell.arm not in arms:  # with an axis that changes it, the row of the axis's first value
            config = _config(options, model, num_tasks)
            arms[cell.arm] = _describe(study, cell, config, model, budget)
        given = _not_default(options)
        key = f"{cell.label}-{_digest([given, _control_of(study, cell.arm), _scoring(study)])[:8]}"
        cells.append({"key": key, "arm": cell.arm, "seed": cell.seed, "vary": dict(cell.vary), "options": given})
    return {
        "design": design_digest(study), "study": study.name, "question": study.question,
        "tasks": list(data.trained.names),
        "unseen": [] if data.unseen is None else list(data.unseen.names), "seeds": list(study.seeds),
        "baseline": study.baseline, "margin": study.margin,
        "vary": {axis: list(values) for axis, values in study.vary.items()}, "choose": list(study.choose),
        "dtype": dtype, "device": device, "versions": versions(),
        "base_parameters": sum(p.numel() for p in model.parameters()),
        "data": entry,
        "arms": arms, "cells": [base, *cells],
    }  # fmt: skip


def store_plan(folder: Path, study: Study) -> dict[str, Any]:
    """Makes and writes the plan of a study, or reads it if the design is the same.

    A study may grow by arms, seeds and values, but keeps its data and its precision from its first cell on; before that
    a plan binds to nothing.

    Raises:
        ValueError: as in make_plan; or the folder cannot be written to; or the data, the model or the dtype are not
            those of the cells that are there.
    """
    file = folder / PLAN
    before = read_json(file) if file.is_file() else None
    same, begun = before is not None and before.get("design") == design_digest(study), _begun(folder)
    if before is not None and same and begun:
        return before
    check_writable(folder, READ_ONLY)
    plan = make_plan(study, before if same or begun else None)  # the same dtype for workers that start together
    for name in _FIXED if before is not None and begun else ():
        if (new := json.loads(json.dumps(plan[name]))) != before[name]:  # type: ignore[index]
            raise _changed(name, folder, before[name], new)  # type: ignore[index]
    with atomic_file(file) as new:
        new.write_text(json.dumps(plan, indent=1) + "\n", encoding="utf-8")
    return plan


def stale(folder: Path) -> str:
    """Returns a line if the design in a study's folder is not that of its plan any more, or ""."""
    if not (folder / DESIGN).is_file() or not (folder / PLAN).is_file():
        return ""
    try:
        same = design_digest(read_study(folder)) == read_json(folder / PLAN).get("design")
    except ValueError as error:
        return f"{reason_of(error)}; what is shown is the plan that was made before"
    change = f"study.yaml has changed since the plan that is shown: `align-lora study plan {folder}` makes a new one"
    return "" if same else change


def _begun(folder: Path) -> bool:
    return (folder / CELLS).is_dir() and any((folder / CELLS).iterdir())


def check_data(folder: Path, study: Study, plan: Mapping[str, Any]) -> None:
    """Checks that the rows are still those of a study's plan.

    Raises:
        ValueError: they are not, or as in read_data.
    """
    first = first_options(study)
    _, tokenizer = empty_model(first.model)
    found = _data_entry(read_data(study, first, tokenizer))
    if found["digest"] != plan["data"]["digest"]:
        raise _changed("data", folder, plan["data"], found)


def _changed(name: str, folder: Path, before: Any, new: Any) -> ValueError:
    change = _row_changes(before, new) if name == "data" else f"{shown(before)} -> {shown(new)}"
    return ValueError(
        f"{name} of the study in {shown(str(folder))} has changed since its first cell ({change}), so that its cells "
        f"would not compare: put it back, or start another study, as `align-lora study new {folder}-2 --like {folder}`"
    )


def _row_changes(before: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """Returns what differs between two entries of a plan for its rows, and the options that it comes from."""
    if before["digest"] == new["digest"]:
        return "the same rows are used, of files with other rows beside them"
    old_used, used = ({
        f"{task} {split}": usage["used"]
        for task, splits in (*entry["tasks"].items(), *entry["unseen"].items()) for split, usage in splits.items()
    } for entry in (before, new))  # fmt: skip
    names = [name for name in {**old_used, **used} if old_used.get(name) != used.get(name)]
    changes = [f"{name} {old_used.get(name, 0):,} -> {used.get(name, 0):,}" for name in names[:_NAMED]]
    changes += [f"{len(names) - _NAMED} more"] * (len(names) > _NAMED)
    what = f"rows that are used: {', '.join(changes)}" if names else "as many rows, but other ones"
    return f"{what}; {_DECIDING} and the smallest of seeds decide on them"


def _data_entry(data: StudyData) -> dict[str, Any]:
    """Returns what a plan says of the rows."""
    return data.trained.counts() | {
        "digest": _data_digest(data),
        "unseen": {} if data.unseen is None else data.unseen.counts()["tasks"],
        "rows": {split: len(examples) for split, examples in data.scored().items()},
    }


def _data_digest(data: StudyData) -> str:
    rows = {split: row_ids(examples) for split, examples in data.scored().items()}
    return _digest([rows, sorted(row_ids(data.trained.train))])


def _budget(study: Study, model: torch.nn.Module, num_tasks: int) -> int | None:
    """Returns the number of trained parameters that all arms are matched to, or None."""
    budget = study.budget()
    if not isinstance(budget, TrainOptions):
        return budget
    return trained_parameters(_config(budget, model, num_tasks), model)


def nearest_rank(config: AlignLoraConfig, model: torch.nn.Module, budget: int) -> int:
    """Returns the rank whose trained parameters are nearest to a budget: that of match_rank, or the next one.

    Args:
        config: the options of the architecture; r is ignored.
        model: a plain model, which may be on the meta device.
        budget: a number of trained parameters.
    """
    below = match_rank(config, model, budget)
    step = 2 if config.init_lora_weights == "orthogonal" else 1
    counts = {rank: trained_parameters(replace(config, r=rank), model) for rank in (below, below + step)}
    return min(counts, key=lambda rank: abs(counts[rank] - budget))


def _config(options: TrainOptions, model: torch.nn.Module, num_tasks: int) -> AlignLoraConfig:
    return with_targets(options.adapter_config(num_tasks), model)


def _describe(
    study: Study, cell: Cell, config: AlignLoraConfig, model: torch.nn.Module, budget: int | None
) -> dict[str, Any]:
    """Returns an arm's row of the plan."""
    arm, adapters = study.arm(cell.arm), planned_adapters(config, model)
    parameters, base = trained_parameters(config, model), sum(p.numel() for p in model.parameters())
    linears = [2 * n * m for n, m in (features_of(layer) for layer in model.modules() if is_linear(layer))]
    return {
        "architecture": config.architecture, "control": arm.control, "align": config.align,
        "align_weight": config.align_weight, "rank": config.r, "scaling": config.scaling, "parameters": parameters,
        "percent": 100 * parameters / (parameters + base),
        "budget_off": None if budget is None or "r" in arm.options else parameters / budget - 1,
        "flops_per_token": {"base": sum(linears), "adapters": sum(adapter_flops(a, config) for a in adapters)},
        "merges": not config.target_blocks and all(a.unmergeable_reason() is None for a in adapters),
        "options": dict(arm.options),
    }  # fmt: skip


def _control_of(study: Study, name: str) -> str | None:
    """Returns the control of an arm; an L2 penalty differs by the loss that it pulls as strongly as."""
    arm = study.arm(name)
    align = study.align_of(arm) if arm.control == "l2" else None
    return arm.control if align in (None, "kl") else f"{arm.control} {align}"


def _not_default(options: TrainOptions) -> dict[str, Any]:
    """Returns the options that are not their defaults, so that a new option leaves the keys of cells as they are."""
    known = known_options()
    return {name: value for name, value in options.to_dict().items() if value != _plain(known[name].default)}


def design_digest(study: Study) -> str:
    """Returns a hash of the design."""
    return _digest(asdict(study))


def base_cell(study: Study, digest: str, dtype: str) -> str:
    """Returns the key of the cell of the model without adapters, from the data's digest and the study's dtype."""
    content = [digest, dtype, study.train.get("model"), _scoring(study)]
    return f"{BASE}-{_digest(content)[:8]}"


def _scoring(study: Study) -> dict[str, Any]:
    """Returns the options of the scoring that are not their defaults; the deeper look is no part of a cell."""
    given = {name: value for name, value in asdict(study.score).items() if value != _plain(getattr(Score(), name))}
    return {name: value for name, value in given.items() if name != "mechanism"}


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def empty_model(name: str | None) -> tuple[torch.nn.Module, Any | None]:
    """Returns a causal language model on the meta device, made from its config.json, and its tokenizer or None."""
    source = default_model() if name in (None, DEFAULT_MODEL) else name
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except Exception as error:  # a damaged config.json may raise any exception in transformers
        raise ValueError(f"cannot read the model {shown(str(source))}: {reason_of(error)}") from error
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except Exception:  # a folder with nothing but a config.json, which is enough to count parameters
        tokenizer = None
    if tokenizer is not None and tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model, tokenizer
