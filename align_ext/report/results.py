"""The finished part of a study as it lies in its folder: the plan, and each cell with its rows and its cost.

Needs no model and no GPU. What is in the plan must be whole, or nothing can be said; a cell that is missing or cannot
be read is listed with the reason, and the rest is read.
"""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from align_ext.evaluation.rows import ROWS, check_rows
from align_ext.system.messages import line, reason_of, shown, shown_path
from align_ext.system.reading import exists, parse_json, read_json, read_lines, read_text

BASE = "base"  # the arm and the key of the model without adapters
SPLITS = ("test", "dev", "unseen")
_ROUNDING = -1e-3  # of a likelihood of 1
_Number = (int, float)
_OPTIONAL_TEXT = (str, type(None))
_OPTIONAL_NUMBER = (int, float, type(None))

_PLAN = {
    "study": str, "question": str, "tasks": list, "unseen": list, "seeds": list, "baseline": str, "margin": _Number,
    "vary": dict, "choose": list, "dtype": str, "device": str, "versions": dict, "base_parameters": int, "data": dict,
    "arms": dict, "cells": list,
}  # fmt: skip
_ARM = {
    "architecture": str, "control": _OPTIONAL_TEXT, "align": _OPTIONAL_TEXT, "align_weight": _OPTIONAL_NUMBER,
    "rank": _OPTIONAL_NUMBER, "scaling": _OPTIONAL_NUMBER, "parameters": int, "percent": _Number,
    "budget_off": _OPTIONAL_NUMBER, "flops_per_token": dict, "merges": bool, "options": dict,
}  # fmt: skip
_PLANNED_CELL = {"key": str, "arm": str, "seed": (int, type(None)), "vary": dict}
_CELL = {**_PLANNED_CELL, "finite": bool}
_ROW = {"id": str, "task": str, "split": str, "label": int, "also": list, "nll": list, "tokens": list}


@dataclass(frozen=True)
class Cell:
    """One finished run: one arm with one seed and one value of each axis.

    Attributes:
        key: its folder's name.
        arm: its arm, or "base".
        seed: its seed; None for the base.
        vary: the value of each axis that varies.
        content: cell.json as it is.
        cost: cost.json as it is, or None if there is none.
        rows: the lines of rows.jsonl.gz.
    """

    key: str
    arm: str
    seed: int | None
    vary: dict[str, Any]
    content: dict[str, Any]
    cost: dict[str, Any] | None
    rows: list[dict[str, Any]] = field(repr=False)

    @property
    def finite(self) -> bool:
        """Whether every loss of training and every score is a finite number."""
        return self.content["finite"] and all(None not in row["nll"] for row in self.rows)

    @property
    def place(self) -> tuple[str, int] | None:
        """On what it ran, if that was noted: the machine, and the number of threads."""
        cost = self.cost or {}
        return (str(cost["host"]), int(cost.get("threads") or 0)) if "host" in cost else None


@dataclass(frozen=True)
class Results:
    """A study's folder.

    Attributes:
        folder: the folder.
        plan: plan.json as it is.
        cells: the finished cells by key, in the order of the plan.
        missing: the reason for each cell of the plan that is not among them, by key.
    """

    folder: Path
    plan: dict[str, Any]
    cells: dict[str, Cell]
    missing: dict[str, str]

    @property
    def arms(self) -> dict[str, dict[str, Any]]:
        """What the plan says of each arm."""
        return self.plan["arms"]

    @property
    def baseline(self) -> str:
        """The arm that the others are compared with."""
        return self.plan["baseline"]


def read_results(study: Path) -> Results:
    """Reads a study's plan and all of its cells that are finished.

    Args:
        study: the folder of the study.

    Raises:
        ValueError: the plan is missing or damaged.
    """
    if not exists(study / "plan.json"):
        raise ValueError(f"study={shown_path(study)} holds no plan.json: run `align-lora study plan` on it first")
    plan = _read_plan(study / "plan.json")
    cells: dict[str, Cell] = {}
    missing: dict[str, str] = {}
    for planned in plan["cells"]:
        folder = study / "cells" / planned["key"]
        try:
            if exists(folder / "cell.json"):
                cells[planned["key"]] = _read_cell(folder, planned)
            else:
                missing[planned["key"]] = _failure(folder)
        except ValueError as error:
            missing[planned["key"]] = reason_of(error).replace(f"{folder}/", "")  # the same wherever the study lies
    return Results(study, plan, cells, missing)


def _read_plan(path: Path) -> dict[str, Any]:
    plan = read_json(path)
    _check(plan, _PLAN, path)
    for name, arm in plan["arms"].items():
        _check(arm, _ARM, path, f"arms.{name}.")
    for index, cell in enumerate(plan["cells"]):
        _check(cell, _PLANNED_CELL, path, f"cells[{index}].")
        if cell["arm"] != BASE and cell["arm"] not in plan["arms"]:
            raise ValueError(f"{shown_path(path)}: cells[{index}].arm={shown(cell['arm'])} is none of its arms")
        if Path(cell["key"]).name != cell["key"]:
            raise ValueError(f"{shown_path(path)}: cells[{index}].key={shown(cell['key'])} must be a folder's name")
    if plan["baseline"] not in plan["arms"]:
        arms = ", ".join(plan["arms"])
        raise ValueError(f"{shown_path(path)}: baseline={shown(plan['baseline'])} must be one of its arms: {arms}")
    return plan


def _read_cell(folder: Path, planned: dict[str, Any]) -> Cell:
    content = read_json(folder / "cell.json")
    _check(content, _CELL, folder / "cell.json")
    for name in _PLANNED_CELL:
        if content[name] != planned[name]:
            of_plan = f"{name}={shown(content[name])}, the plan {name}={shown(planned[name])}"
            raise ValueError(f"{shown_path(folder / 'cell.json')} has {of_plan}: run the cell again")
    check_rows(folder, content)
    content["mechanism"] = _mechanism(folder / "mechanism.json")
    cost = read_json(folder / "cost.json") if exists(folder / "cost.json") else None
    rows = []
    for number, text in read_lines(folder / ROWS):
        try:
            row = parse_json(text)
            _check_row(row)
        except ValueError as error:
            raise ValueError(f"{ROWS}, line {number}: {reason_of(error)}") from error
        rows.append(row)
    if len({row["id"] for row in rows}) < len(rows):
        raise ValueError(f"{ROWS} holds an id twice")
    return Cell(planned["key"], planned["arm"], planned["seed"], planned["vary"], content, cost, rows)


def _mechanism(path: Path) -> dict[str, Any] | None:
    """Returns what a deeper look has found; nothing at all where its file cannot be read, and None without one."""
    if not exists(path):
        return None
    try:
        return read_json(path)
    except ValueError:
        return {}


def _check_row(row: Any) -> None:
    for name, kind in _ROW.items():
        if not isinstance(row, dict) or not isinstance(row.get(name), kind):
            raise ValueError(f"{name} is missing, or no {_name(kind)}")
    choices = max(len(row["nll"]), 1)
    if row["split"] not in SPLITS:
        raise ValueError(f"split={shown(row['split'])} must be one of {', '.join(SPLITS)}")
    if not -1 <= row["label"] < choices or len(row["tokens"]) != len(row["nll"]) or not row["nll"]:
        raise ValueError(f"label={row['label']}, {len(row['nll'])} nll and {len(row['tokens'])} tokens do not agree")
    if min(row["tokens"]) < 1 or any(nll is not None and nll < _ROUNDING for nll in row["nll"]):
        raise ValueError(f"tokens={row['tokens']} must be positive, and nll={row['nll']} not negative")


def _failure(folder: Path) -> str:
    """Returns the first line of why a cell failed, or that it is not there yet."""
    error = folder.with_name(f"{folder.name}.error.txt")
    if not exists(error):
        return "not finished yet"
    first = read_text(error).strip().split("\n", 1)[0]
    return f"failed: {line(first, 200)}"


def _check(content: Any, expected: dict[str, Any], path: Path, where: str = "") -> None:
    """Raises ValueError unless an object has the expected names, each with a value of its type."""
    if not isinstance(content, dict):
        raise ValueError(f"{shown_path(path)}: {where.rstrip('.')} must be an object")
    for name, kind in expected.items():
        if name not in content:
            raise ValueError(f"{shown_path(path)}: {where}{name} is missing")
        value = content[name]
        wrong = not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool)
        if wrong or (isinstance(value, float) and not math.isfinite(value)):
            raise ValueError(f"{shown_path(path)}: {where}{name}={shown(value)} must be {_name(kind)}")


def _name(kind: Any) -> str:
    names = {
        str: "text",
        list: "a list",
        dict: "an object",
        int: "a whole number",
        float: "a number",
        bool: "true or false",
    }
    kinds = kind if isinstance(kind, tuple) else (kind,)
    return " or ".join(dict.fromkeys("null" if one is type(None) else names[one] for one in kinds))
