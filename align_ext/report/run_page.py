"""The report of one training run: one HTML file without a network, made from the files of the run's folder alone.

The same files give the same bytes.
"""

import json
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from align_ext.base_model.default_model import DEFAULT_MODEL
from align_ext.data.named_source import named_sources
from align_ext.evaluation.same_logits import verdict
from align_ext.report import run_figures as figures
from align_ext.report.conditions import Caution
from align_ext.report.formats import Column, Table, number
from align_ext.report.page import Section
from align_ext.report.run_results import Difference, Run, is_beyond_noise, read_run
from align_ext.report.run_words import cautions, findings, glossary
from align_ext.report.svg import Picture
from align_ext.report.templates import templates
from align_ext.system.writing import atomic_file
from align_ext.training.in_words import shown_steps, shown_times, stored_bits
from align_ext.training.options import known_options

REPORT = "report.html"
_OF_THE_FOLDER = ("output", "overwrite", "resume")  # options that are not of the training
_MOST_TASKS = 5  # in the title


@dataclass(frozen=True)
class RunReport:
    """All that the report of a run says, before it has a form."""

    name: str
    title: str
    findings: list[str]
    cautions: list[Caution]
    facts: list[tuple[str, str]]
    main: Picture | None
    sections: list[Section]
    answers: list[tuple[str, list[dict[str, Any]]]]
    yaml: str
    command: str
    words: list[tuple[str, str]]


def write_run_report(folder: Path) -> Path:
    """Writes report.html into the folder of a finished run. Returns its path.

    Raises:
        ValueError: the folder holds no finished run, or one of its files is damaged.
    """
    folder = Path(folder)
    page = templates().get_template("run_page.html.jinja").render(report=make_run_report(read_run(folder)))
    with atomic_file(folder / REPORT) as new:
        new.write_bytes(page.encode("utf-8", "backslashreplace"))
    return folder / REPORT


def make_run_report(run: Run) -> RunReport:
    """Returns what the report of a run says; sections without data are left out."""
    changed = changed_options(run.options)
    answers: dict[str, list[dict[str, Any]]] = {}
    for one in run.results.get("answers", []):
        answers.setdefault(one["task"], []).append(one)
    return RunReport(
        run.name,
        _title(run),
        findings(run),
        cautions(run),
        _facts(run),
        figures.losses(run),
        [section for section in _sections(run) if section.parts],
        list(answers.items()),
        yaml.safe_dump(changed, sort_keys=False, allow_unicode=True, width=100) if changed else "",
        command(changed),
        glossary(run),
    )


def _sections(run: Run) -> Iterator[Section]:
    yield _section("tasks", "Tasks", figures.changes(run), _task_table(run))
    yield _section("training", "Training", figures.terms(run))
    yield _section("alignment", "Alignment", figures.layers(run), figures.over_time(run), figures.divergence(run))
    yield _section("routing", "Routing", figures.entropy(run), figures.entropy_over_time(run), figures.load(run))
    yield _section("data", "Data", _data_table(run))
    yield _section("checks", "Checks and cost", _check_table(run), _cost_table(run))


def _section(name: str, title: str, *parts: Picture | Table | None) -> Section:
    return Section(name, title, [part for part in parts if part is not None])


def changed_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the options of a run that differ from the defaults, without those of its folder."""
    known = known_options()
    changed = {}
    for name, value in options.items():
        default = known[name].default if name in known else None
        default = list(default) if isinstance(default, tuple) else default
        if name not in _OF_THE_FOLDER and value != default:
            changed[name] = value
    return changed


def command(changed: Mapping[str, Any]) -> str:
    """Returns the command that runs a training with these options again, from a file where flags cannot say them."""
    sources = changed.get("data")
    sources = sources if isinstance(sources, list) else []
    if not all(isinstance(source, str) for source in sources):
        return "align-lora train --config run.yaml --output again"
    words = ["align-lora", "train", *(word for source in sources for word in ("--data", source))]
    for name, value in changed.items():
        flag = name.replace("_", "-")
        if name == "data" and sources:
            continue
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
            continue
        words += [f"--{flag}", "none" if value is None else _text(value) or "none"]
    return shlex.join([*words, "--output", "again"])


def _title(run: Run) -> str:
    tasks = list(run.results["data"].get("tasks", {}))
    model = Path(_model(run)).name
    names = ", ".join(tasks) if len(tasks) <= _MOST_TASKS else _count(len(tasks), "task")
    return f"{model}, trained on {names}" if tasks else model


def _facts(run: Run) -> list[tuple[str, str]]:
    results, options = run.results, run.options
    model, adapters, cost = results["model"], results["adapters"], results.get("cost") or {}
    splits = results["data"].get("tasks", {}).values()
    rows = [sum(split.get(name, {}).get("used", 0) for split in splits) for name in ("train", "test")]
    align = adapters.get("align")
    tasks = _count(len(splits), "task")
    parameters = number(adapters["trained_parameters"], "count")
    batch = f"{options['batch_size']} \N{MULTIPLICATION SIGN} {options['accumulation']}"
    facts = [
        ("Model", f"{_model(run)}{stored_bits(options)}, {model['dtype'].removeprefix('torch.')} on {model['device']}"),
        ("Data", f"{_sources(options.get('data'))}: {number(rows[0], 'count')} rows of {tasks} to "
                 f"train on, {number(rows[1], 'count')} held out"),
        ("Adapters", f"{adapters['architecture']}, rank {adapters['rank']}, {parameters} trained parameters "
                     f"({adapters['percent']:.3g}% of all)"),
        ("Alignment", f"{align}, weight {adapters['align_weight']:g}" if align else "none"),
        ("Training", f"{shown_steps(results)}, {batch} rows each, learning rate {options['lr']:g}, "
                     f"seed {options['seed']}"),
    ]  # fmt: skip
    if cost:
        facts.append(
            ("Speed", f"{number(cost['tokens_per_second'], 'count')} trained tokens a second, "
                      f"{cost['step_seconds'][1]:.3g} s a step")
        )  # fmt: skip
        where = "GPU" if model["device"] == "cuda" else "process"
        facts.append(("Memory", f"{number(cost['peak_memory_mib'], 'count')} MiB at the peak of the {where}"))
    facts.append(("Versions", ", ".join(f"{name} {version}" for name, version in results["versions"].items())))
    return facts


def _model(run: Run) -> str:
    return str(run.options.get("model") or DEFAULT_MODEL)


def _sources(data: Any) -> str:
    """Returns the sources of data in words: a path, or name=path."""
    sources = ((one.name, one.path) for one in named_sources(data))
    return ", ".join(path if name is None else f"{name}={path}" for name, path in sources) or "built-in tasks"


def _text(value: Any) -> str:
    if isinstance(value, Mapping):
        return ",".join(f"{name}={json.dumps(part)}" for name, part in value.items())
    return ",".join(map(str, value)) if isinstance(value, list) else str("" if value is None else value)


def _count(number_of: int, name: str) -> str:
    return f"{number(number_of, 'count')} {name}{'' if number_of == 1 else 's'}"


def _task_table(run: Run) -> Table | None:
    rows = []
    for one in run.changes:
        row: dict[str, Any] = {"task": one.task, "rows": one.before["examples"], "bold": []}
        for name in ("loss", "score"):
            change: Difference | None = getattr(one, name)
            for when, score in (("before", one.before), ("after", one.after)):
                row |= {f"{name} {when}": score[name], f"{name} {when} error": score[f"{name}_error"]}
            if change is not None:
                row |= {f"{name} change": change.estimate, f"{name} low": change.low, f"{name} high": change.high}
                row["bold"] += [f"{name} change"] if is_beyond_noise(change) else []
        rows.append(row | {"found": _verdict(one.loss)})
    if not rows:
        return None
    columns = [Column("task", "task"), Column("rows", "rows", "count")]
    for name, kind in (("loss", "nats"), ("score", "two")):
        if any(row.get(f"{name} before") is not None for row in rows):
            columns += [
                Column(f"{name} {when}", f"{name} {when}", kind, error=f"{name} {when} error")
                for when in ("before", "after")
            ]
            between = (f"{name} low", f"{name} high")
            columns.append(Column(f"{name} change", "change [95%]", kind, True, between=between))
    columns.append(Column("found", "loss is"))
    caption = (
        "Held-out rows before and after training, \N{PLUS-MINUS SIGN} standard error over rows; the change is paired "
        "by row. Bold: beyond noise, task by task, not adjusted for their number."
    )
    return Table("tasks", "Before and after", caption, columns, rows)


def _verdict(change: Difference | None) -> str:
    if change is None:
        return "of one row"
    if not is_beyond_noise(change):
        return "within noise"
    return "better" if change.estimate < 0 else "worse"


def _data_table(run: Run) -> Table | None:
    rows = []
    for task, splits in run.results["data"].get("tasks", {}).items():
        row = {"task": task}
        for split in ("train", "test"):
            usage = splits.get(split, {})
            left_out = ", ".join(f"{count} {reason}" for reason, count in usage.get("left_out", {}).items())
            row |= {f"{split} used": usage.get("used"), f"{split} left out": left_out or None}
        rows.append(row)
    columns = [
        Column("task", "task"), Column("train used", "trained on", "count"), Column("train left out", "left out"),
        Column("test used", "held out", "count"), Column("test left out", "left out"),
    ]  # fmt: skip
    caption = "Rows of each task that were used, and why others were not."
    return Table("data", "Rows of the tasks", caption, columns, rows) if rows else None


def _check_table(run: Run) -> Table | None:
    rows = [
        {"check": name, "found": _check(check)} for name, check in run.results.get("checks", {}).items()
    ]  # fmt: skip
    caption = "Whether the saved adapter gives the logits of the trained model, in float32."
    return (
        Table("checks", "Checks", caption, [Column("check", "model"), Column("found", "found")], rows) if rows else None
    )


def _check(check: Mapping[str, Any]) -> str:
    if check["detail"]:
        return f"{'does not apply' if check['passed'] is None else 'failed'}: {check['detail']}"
    return verdict(check["difference"], passed=check["passed"])


def _cost_table(run: Run) -> Table | None:
    rows = [{"part": name, "seconds": seconds} for name, seconds in shown_times(run.results).items()]
    columns = [Column("part", "part"), Column("seconds", "seconds", "number")]
    return Table("cost", "Time", "Where the time went.", columns, rows) if rows else None
