"""The tables of a study's report, as plain data."""

from typing import Any

import numpy as np

from align_ext.report import statistics
from align_ext.report.chosen import Arms, Variant
from align_ext.report.compared import (
    FEW_RESAMPLES,
    LOWER_IS_BETTER,
    Comparison,
    controls,
    is_aligned,
    is_control,
    without_alignment,
)
from align_ext.report.conditions import chance_tasks, commonest, point
from align_ext.report.formats import Column, Table, number

MEASURES = {
    "choice_nll": ("Choice NLL", "nats", "How unlikely the right choice is among all, in nats, lower is better."),
    "accuracy": ("Accuracy", "points", "Rows whose most likely choice (a token) is right, in percent."),
    "balanced": ("Balanced accuracy", "points", "Mean over the labels of the accuracy of their rows, in percent."),
    "exact": ("Exact match", "points", "Rows whose generated answer is right, in percent."),
    "loss": ("Loss of free text", "nats", "Negative log-likelihood of the gold answer, nats a token, lower is better."),
    "tie": ("Ties", "points", "Rows with several most likely choices, of which the first is taken, in percent."),
    "choice_nll_sum": ("Choice NLL, whole answers", "nats", "The same of likelihoods that are not divided by tokens."),
    "accuracy_sum": ("Accuracy, whole answers", "points", "The same of likelihoods that are not divided by tokens."),
}  # fmt: skip
_COMPARED = ("choice_nll", "accuracy", "exact", "loss")  # of which the best is bold
_FOLDED = ("balanced", "tie", "choice_nll_sum", "accuracy_sum")
_BOLD = " Bold: the best, and everything whose 95% interval of the difference to it holds 0; means, of the same tasks."


def score_tables(arms: Arms) -> list[Table]:
    """Returns arms x tasks, one table a measure; those without data are left out."""
    tables = [_scores(arms, measure) for measure in MEASURES]
    shares = _shares(arms)
    return [table for table in (*tables[:3], shares, *tables[3:]) if table is not None]


def _scores(arms: Arms, measure: str) -> Table | None:
    title, kind, caption = MEASURES[measure]
    tasks = [
        task for task in arms.tasks("test") if any(_has(arms, one, measure, task) for one in arms.variants.values())
    ]
    if not tasks:
        return None
    rows = []
    for variant in arms.variants.values():
        row = arm_columns(arms, variant)
        for key, task in [*((task, task) for task in tasks), ("mean of tasks", None)]:
            x, groups = arms.values(variant, "test", measure, task)
            if x.shape[1] > 1:
                found = statistics.interval(x, groups, resamples=FEW_RESAMPLES)
                row |= {key: found.estimate, f"{key} error": found.error}
        rows.append(row)
    if measure in _COMPARED:
        for task in tasks:
            _mark_best(arms, rows, measure, task)
        for alike in {tuple(task in row for task in tasks): None for row in rows}:  # means of the same tasks
            _mark_best(arms, [row for row in rows if tuple(task in row for task in tasks) == alike], measure, None)
        caption += _BOLD
    wide = [Column(key, key, kind, error=f"{key} error") for key in (*tasks, "mean of tasks")]
    about = _ABOUT if measure in ("choice_nll", "accuracy") else []
    caption += " Means over rows and seeds, \N{PLUS-MINUS SIGN} standard error over both."
    columns = [Column("arm", "arm"), *(wide if len(tasks) > 1 else wide[:1]), *about]
    return Table(f"scores_{measure}", title, caption, columns, rows, folded=measure in _FOLDED)


_ABOUT = [
    Column("seeds", "seeds", "count"), Column("rank", "rank", "number"), Column("scaling", "scaling", "number"),
    Column("parameters", "parameters", "count"), Column("percent", "% of base", "percent"),
]  # fmt: skip


def arm_columns(arms: Arms, variant: Variant) -> dict[str, Any]:
    """Returns what a row says of its arm."""
    about = arms.results.arms.get(variant.arm, {})
    rank = dict(variant.point).get("rank", about.get("rank"))
    role = "control" if is_control(arms, variant) else "baseline" if variant.arm == arms.results.baseline else ""
    seeds = len([seed for seed in variant.cells if seed is not None]) or None
    row = {"arm": variant.label, "role": role if about else "base", "seeds": seeds, "rank": rank}
    return row | {key: about.get(key) for key in ("scaling", "parameters", "percent")}


def _has(arms: Arms, variant: Variant, measure: str, task: str) -> bool:
    return arms.values(variant, "test", measure, task)[0].shape[1] > 1


def _mark_best(arms: Arms, rows: list[dict[str, Any]], measure: str, task: str | None) -> None:
    """Adds a column to "bold" of the best row and of all not separable from it; accuracy at chance has no best."""
    key = task or "mean of tasks"
    there = [row for row in rows if row.get(key) is not None]
    if not there:
        return
    best = (min if measure in LOWER_IS_BETTER else max)(there, key=lambda row: row[key])
    if measure == "accuracy" and _all_at_chance(arms, best["arm"], task):
        return
    for row in there:
        d, groups = arms.differences(arms.variants[row["arm"]], arms.variants[best["arm"]], "test", measure, task)
        if row is not best and d.shape[1] > 1:
            found = statistics.compare(d, groups, resamples=FEW_RESAMPLES)
            separable = found.closed_low > 0 or found.closed_high < 0
        if row is best or not (d.shape[1] > 1 and separable):
            row["bold"] = [*row.get("bold", []), key]


def _all_at_chance(arms: Arms, label: str, task: str | None) -> bool:
    found = chance_tasks(arms, arms.variants[label])
    tasks = [one for one in arms.tasks("test") if _has(arms, arms.variants[label], "balanced", one)]
    return task in found if task else set(tasks) <= set(found)


def _shares(arms: Arms) -> Table | None:
    tasks = [
        task for task in arms.tasks("test") if any(_has(arms, one, "chosen", task) for one in arms.variants.values())
    ]
    rows = [
        {**arm_columns(arms, one), **{task: commonest(arms, one, task) for task in tasks}}
        for one in arms.variants.values()
    ]
    caption = "The share of a task's rows with the answer that the arm gives most; near 100 % it answers one thing."
    columns = [Column("arm", "arm"), *(Column(task, task, "share") for task in tasks)]
    return (
        Table("scores_commonest", "Share of the commonest answer", caption, columns, rows, folded=True)
        if tasks
        else None
    )


def arm_table(arms: Arms) -> Table:
    """Returns what each arm is: architecture, alignment, what it is a control of, size."""
    rows = []
    for name, about in arms.results.arms.items():
        role = "control" if about["control"] else "baseline" if name == arms.results.baseline else ""
        keys = ("architecture", "align", "control", "rank", "scaling", "parameters", "percent", "budget_off", "merges")
        row = {"arm": name, "role": role, **{key: about[key] for key in keys}}
        weight = None if "align_weight" in arms.results.plan["vary"] else about["align_weight"]
        rows.append(row | {"weight": weight if about["align"] else None})
    columns = [
        Column("arm", "arm"), Column("architecture", "architecture"), Column("align", "alignment"),
        Column("weight", "weight", "number"), Column("control", "control"), Column("rank", "rank", "number"),
        Column("scaling", "scaling", "number"), Column("parameters", "parameters", "count"),
        Column("percent", "% of base", "percent"), Column("budget_off", "off the budget, %", "points", True),
        Column("merges", "merges", "yes"),
    ]  # fmt: skip
    kept = [column for column in columns if any(row[column.key] is not None for row in rows)]
    caption = (
        "What is compared. Scaling is what B A x is multiplied by; an arm that merges costs nothing when it is used."
    )
    return Table("arms", "Arms", caption, kept, rows)


def difference_table(arms: Arms, found: list[Comparison], name: str, split: str) -> Table | None:
    """Returns the differences to the baseline in one measure, with all that tells how sure they are."""
    if not found:
        return None
    measure = found[0].measure
    title, kind, _ = MEASURES[measure]
    rows = [_difference(arms, one) for one in found]
    columns = [
        Column("arm", "arm"), Column("difference", "difference [95%]", kind, True, between=("low", "high")),
        Column("", "closed form [95%]", kind, True, between=("closed_low", "closed_high")),
        Column("error_rows", "row error", kind), Column("error_seeds", "seed error", kind),
        Column("p", "p", "p"), Column("holm", "Holm p", "p"), Column("mcnemar", "McNemar p of each seed"),
        Column("equivalent", "p of \u201cas good\u201d", "p"), Column("detectable", "could see", kind),
        Column("rows_needed", "rows for 1 point", "count"),
        Column("seeds", "seeds", "count"), Column("rows", "rows", "count"),
    ]  # fmt: skip
    points = measure in ("accuracy", "exact")
    dropped = {*([] if points else ["equivalent", "rows_needed"]), *([] if measure == "accuracy" else ["mcnemar"])}
    better = "lower is better" if measure in LOWER_IS_BETTER else "higher is better"
    unit = "points" if points else "nats"
    text = f"Arm minus {arms.results.baseline} in {unit}, {better}, paired by row. "
    text += "Tasks are a sample of tasks: the interval is clustered by task. " if split == "unseen" else ""
    text += "Bold: Holm's p below 0.05 (with fewer than 3 seeds: an interval without 0). " + _HOW
    shown = [column for column in columns if column.key not in dropped]
    return Table(name, f"Differences in {title[0].lower() + title[1:]}", text, shown, rows)


_HOW = (
    "The interval is a bootstrap over rows and over seeds, the closed form stands beside it; \u201ccould see\u201d is "
    "the smallest difference that this study finds with a power of 80%. No interval: every row came out the same."
)


def _difference(arms: Arms, one: Comparison) -> dict[str, Any]:
    of, head = one.difference, arm_columns(arms, one.variant)
    chance = one.measure == "accuracy" and _all_at_chance(arms, one.variant.label, None)
    if of.error == 0:  # every row came out the same, which tells nothing of other rows
        return {**head, "difference": of.estimate, "seeds": of.seeds, "rows": of.rows}
    return {
        "arm": head["arm"], "role": head["role"], "difference": of.estimate, "low": of.low, "high": of.high,
        "closed_low": of.closed_low, "closed_high": of.closed_high, "error_rows": of.error_rows,
        "error_seeds": of.error_seeds, "p": of.p, "holm": one.holm,
        "mcnemar": " ".join(number(p, "p") for p in one.mcnemar), "equivalent": one.equivalent,
        "detectable": one.detectable, "rows_needed": one.rows_needed, "seeds": of.seeds, "rows": of.rows,
        "bold": ["difference"] if one.separable and not chance else [],
    }  # fmt: skip


def task_differences(arms: Arms, measure: str, split: str) -> Table | None:
    """Returns the difference to the baseline on each task by itself, which no p-value is adjusted for."""
    tasks = arms.tasks(split)
    rows, seen = [], set()
    for variant in arms.trained:
        other, row = arms.baseline(variant), arm_columns(arms, variant)
        for task in tasks if other else ():
            if found := _compared(arms, variant, other, split, measure, task):  # type: ignore[arg-type]
                row |= _between(task, found)
                seen.add(task)
        if other:
            rows.append(row)
    if not seen:
        return None
    title, kind, _ = MEASURES[measure]
    columns = [_between_column(task, task, kind) for task in tasks if task in seen]
    caption = f"Arm minus {arms.results.baseline} on each task [95%]. Exploratory: not adjusted for their number."
    name = f"differences_by_task_{measure}" + ("_unseen" if split == "unseen" else "")
    return Table(name, f"{title}, task by task", caption, [Column("arm", "arm"), *columns], rows, folded=True)


def _compared(
    arms: Arms, variant: Variant, other: Variant, split: str, measure: str, task: str | None = None
) -> statistics.Difference | None:
    """Returns one variant minus another where rows tell of their spread."""
    d, groups = arms.differences(variant, other, split, measure, task)
    return statistics.compare(d, groups) if d.size and d.shape[1] > 1 else None


def _between(key: str, found: statistics.Difference) -> dict[str, Any]:
    """Returns what a column of _between_column shows of a difference."""
    return {key: found.estimate, f"{key} low": found.low, f"{key} high": found.high}


def _between_column(key: str, title: str, kind: str) -> Column:
    return Column(key, title, kind, True, between=(f"{key} low", f"{key} high"))


def control_table(arms: Arms) -> Table | None:
    """Returns each aligned arm minus each of its controls, and minus the same architecture without alignment."""
    measures, rows = ("choice_nll", "loss", "accuracy"), []
    for variant in arms.trained:
        others = [*controls(arms, variant), *without_alignment(arms, variant)] if is_aligned(arms, variant) else []
        for other in others:
            row: dict[str, Any] = {"arm": variant.label, "minus": other.label, "seeds": None}
            for measure in measures:
                if found := _compared(arms, variant, other, "test", measure):
                    row |= _between(measure, found) | {"seeds": found.seeds}
            rows.append(row)
    there = [measure for measure in measures if any(measure in row for row in rows)]
    if not there:
        return None
    compared = [_between_column(one, *MEASURES[one][:2]) for one in there]
    caption = (
        "Aligned arm minus a control of it, or minus the same architecture without alignment, paired by row [95%]; not "
        "adjusted for their number. What the two share is no effect of alignment, whether it helps or costs."
    )
    columns = [Column("arm", "arm"), Column("minus", "minus"), *compared, Column("seeds", "seeds", "count")]
    return Table("controls", "Alignment beside its controls", caption, columns, rows)


def choice_table(arms: Arms) -> Table | None:
    """Returns what each arm's choice of the learning rate (or another axis) on dev rows was made from."""
    rows = [
        {
            "arm": " ".join([trial.arm, point(trial.point)]).strip(), "values": point(trial.values), "loss": trial.loss,
            "seeds": trial.seeds, "taken": trial.taken, "bold": ["values", "loss"] if trial.taken else [],
        }
        for trial in arms.trials
    ]  # fmt: skip
    columns = [
        Column("arm", "arm"), Column("values", "value"), Column("loss", "loss on dev rows", "nats"),
        Column("seeds", "seeds", "count"), Column("taken", "taken", "yes"),
    ]  # fmt: skip
    axes = ", ".join(arms.results.plan["choose"])
    caption = (
        f"Each arm takes the {axes} with the smallest loss on dev rows, which are neither trained on nor scored "
        "elsewhere: the mean over tasks of the choice NLL, or of the loss a token where a task has no choices."
    )
    return Table("choice", f"Choice of {axes}", caption, columns, rows, folded=True) if rows else None


def mean_and_error(values: list[float]) -> tuple[float | None, float | None]:
    """Returns the mean over seeds and its standard error (of fewer than two seeds: None)."""
    if not values:
        return None, None
    return float(np.mean(values)), float(np.std(values, ddof=1) / np.sqrt(len(values))) if len(values) > 1 else None
