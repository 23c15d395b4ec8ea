"""The report of a study: one page, the same in Markdown, and its tables and figures as files.

It is made from the study's files alone, at any time: what is not finished yet is listed and left out. The same files
give the same bytes.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from align_ext.report import figures, run_tables, tables
from align_ext.report.chosen import Arms
from align_ext.report.compared import Comparison, headline_of, with_baseline
from align_ext.report.conditions import Caution, cautions, data_table, facts
from align_ext.report.formats import Table, to_csv, to_tex
from align_ext.report.mechanism_figures import mechanism_pictures
from align_ext.report.results import read_results
from align_ext.report.svg import Picture
from align_ext.report.templates import templates
from align_ext.report.words import glossary, summary
from align_ext.system.writing import atomic_folder

_MEASURES = ("choice_nll", "accuracy", "exact", "loss")  # that are compared with the baseline
_OURS = r"report\.(html|md)|tables/[^/]+\.(csv|tex)|figures/[^/]+\.svg"
_WRITERS = {"csv": to_csv, "tex": to_tex}


@dataclass(frozen=True)
class Section:
    """A part of the report: its figures and tables, one at least, in the order in which they are read."""

    name: str
    title: str
    parts: list[Picture | Table]


@dataclass(frozen=True)
class Report:
    """All that the report says, before it has a form."""

    study: str
    question: str
    findings: list[str]
    cautions: list[Caution]
    facts: list[tuple[str, str]]
    main: Picture | None
    sections: list[Section]
    words: list[tuple[str, str]]


def write_report(study: Path) -> Path:
    """Writes STUDY/report: report.html, report.md, tables/*.csv and *.tex, figures/*.svg. Returns the page's path.

    The folder is replaced in one step, so that pages, tables and figures are always of one report; files in it that are
    not ours stay.

    Args:
        study: the folder of the study; see `results.read_results`.

    Raises:
        ValueError: the plan is missing or damaged, or the report cannot be written.
    """
    study = Path(study)
    report = make_report(Arms(read_results(study)))
    pages = templates()
    with atomic_folder(study / "report", _OURS) as folder:
        for name in ("report.html", "report.md"):
            (folder / name).write_bytes(pages.get_template(f"{name}.jinja").render(report=report).encode())
        (folder / "tables").mkdir()
        for table in _parts(report, Table):
            for ending, writer in _WRITERS.items():
                (folder / "tables" / f"{table.name}.{ending}").write_bytes(writer(table).encode())
        (folder / "figures").mkdir()
        for one in [*([report.main] if report.main else []), *_parts(report, Picture)]:
            (folder / "figures" / f"{one.name}.svg").write_bytes(one.file.encode())
    return study / "report" / "report.html"


def make_report(arms: Arms) -> Report:
    """Returns what the report of a study says; sections without data are left out."""
    plan = arms.results.plan
    test, unseen = ({m: with_baseline(arms, split, m) for m in _MEASURES} for split in ("test", "unseen"))
    drawn = [test["choice_nll"], test["loss"], test["accuracy"] or test["exact"]]
    return Report(
        plan["study"],
        plan["question"],
        summary(arms, test, unseen),
        cautions(arms),
        facts(arms),
        figures.forest(arms, drawn, "differences", f"Differences to {plan['baseline']}"),
        [one for one in _sections(arms, test, unseen) if one.parts],
        glossary(arms),
    )


def _sections(arms: Arms, test: dict[str, list[Comparison]], unseen: dict[str, list[Comparison]]) -> Iterator[Section]:
    baseline = arms.results.baseline
    yield _section("arms", "Arms", tables.arm_table(arms))
    yield _section("scores", "Scores", *tables.score_tables(arms))
    differences = [
        tables.difference_table(arms, test[measure], f"differences_{measure}", "test") for measure in _MEASURES
    ]
    by_task = [tables.task_differences(arms, measure, "test") for measure in _MEASURES[:2]]
    yield _section("differences", f"Differences to {baseline}", *differences, tables.control_table(arms), *by_task)
    others = [unseen["choice_nll"], unseen["accuracy"]]
    forest = figures.forest(arms, others, "unseen", f"Differences to {baseline} on tasks that were not trained on")
    elsewhere = [tables.difference_table(arms, unseen[measure], f"unseen_{measure}", "unseen") for measure in _MEASURES]
    by_task = [tables.task_differences(arms, "choice_nll", "unseen")]
    yield _section("unseen", "Tasks that were not trained on", forest, *elsewhere, *by_task)
    yield _section("sweeps", "Sweeps", *figures.sweeps(arms))
    yield _section("forgetting", "Forgetting", run_tables.forgetting_table(arms))
    headline = headline_of(test) or "choice_nll"
    yield _section("cost", "Cost", figures.pareto(arms, headline), run_tables.cost_table(arms))
    yield _section("mechanism", "Mechanism", run_tables.mechanism_table(arms), *mechanism_pictures(arms))
    yield _section("conditions", "Choices and data", tables.choice_table(arms), data_table(arms))


def _section(name: str, title: str, *parts: Picture | Table | None) -> Section:
    return Section(name, title, [part for part in parts if part is not None])


def _parts(report: Report, kind: type) -> Iterator[Any]:
    yield from (part for section in report.sections for part in section.parts if isinstance(part, kind))
