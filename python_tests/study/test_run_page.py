"""The report of a run as a browser shows it, for many tasks of long names and for one task."""

import pytest
from hf.runs import run
from hf.words import model_folder, rows, write_rows
from study.browser import NEEDED, check_page, check_print, measure

from align_ext.report.run_page import write_run_report

pytestmark = NEEDED
RUNS = {
    "aligned": {"eval_steps": 4},
    "routed, without alignment": {"architecture": "mtlora", "align": "none"},
    "many tasks": {"steps": 4, "architecture": "hydra", "align": "kl"},
    "one task": {"architecture": "lora", "tasks": "threes", "eval_examples": 1},
}


@pytest.fixture(scope="module", params=RUNS)
def page(request, tmp_path_factory):
    place = tmp_path_factory.mktemp("run")
    model_folder(place / "model")
    content = list(rows(32))
    if request.param == "many tasks":
        content = [row | {"task": f"{row['task']} of a rather long name, number {i % 28:02}"} for i, row in enumerate(
            [*content, *rows(96)])]  # fmt: skip
    write_rows(place / "rows.jsonl", content)
    run(place, **{"output": str(place / "out"), "log_steps": 1} | RUNS[request.param])
    return write_run_report(place / "out")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_browser_shows_it_legibly(page, scheme, tmp_path):
    check_page(scheme, measure(page, scheme, tmp_path))


def test_it_prints(page, tmp_path):
    check_print(page, tmp_path, tmp_path / "report.pdf")
