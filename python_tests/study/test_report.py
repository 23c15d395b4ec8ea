"""The report of a study: its numbers from the rows by another way, its words, its warnings, its bytes."""

import csv
import gzip
import json
import math
import re
import shutil
from xml.etree import ElementTree

import numpy as np
import pytest
from study.made_up import ARMS, TASKS, make_study

from align_ext.report import page as report
from align_ext.report import statistics
from align_ext.report.chosen import Arms
from align_ext.report.compared import with_baseline
from align_ext.report.conditions import cautions
from align_ext.report.formats import Column, Table, to_csv, to_markdown, to_tex
from align_ext.report.results import read_results
from align_ext.report.svg import COLOURS, INK
from align_ext.report.words import summary

EFFECTS = {"align_kl": 0.4, "shuffled_ids": 0.4, "m_lora": -0.3}


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """A whole study and its report: 7 arms, 3 seeds, learning rates, unseen tasks; one seed of an arm is missing."""
    folder = make_study(tmp_path_factory.mktemp("study") / "made_up", effects=EFFECTS, constant=("weight_zero",))
    report.write_report(folder)
    return folder


def table(study, name):
    with open(study / "report/tables" / f"{name}.csv", newline="") as file:
        return {row["arm"]: row for row in csv.DictReader(file)}


def nll_of(study, key, split, task):
    """The choice NLL of each row of a cell, by id, from the file alone."""
    with gzip.open(study / "cells" / key / "rows.jsonl.gz", "rt") as lines:
        rows = [json.loads(line) for line in lines]
    found = {}
    for row in rows:
        if row["split"] == split and row["task"] == task and row["label"] >= 0:
            shares = [math.exp(-nll / tokens) for nll, tokens in zip(row["nll"], row["tokens"], strict=True)]
            found[row["id"]] = -math.log(shares[row["label"]] / sum(shares))
    return found


CHOICE_TASKS = [task for task, choices in TASKS.items() if choices]


def test_doubled_rows_change_no_difference_and_are_pointed_out(tmp_path):
    folder = make_study(tmp_path / "made_up", effects=EFFECTS, **SMALL)
    once = [one.difference for one in with_baseline(Arms(read_results(folder)), "test", "accuracy")]
    for file in folder.glob("cells/*/rows.jsonl.gz"):
        lines = gzip.decompress(file.read_bytes()).decode().splitlines()
        doubled = [*lines, *(re.sub(r'("id": "[^"]*)', r"\1#2", one) for one in lines)]
        file.write_bytes(gzip.compress("\n".join(doubled).encode()))
    arms = Arms(read_results(folder))
    found = with_baseline(arms, "test", "accuracy")
    assert [one.difference for one in found] == once
    repeated = {one.kind: one.about for one in cautions(arms)}["repeated"]
    assert [one.split(":")[0] for one in repeated] == list(TASKS)


def test_scores_are_means_over_rows_and_seeds(study):
    for arm, rate in (("lora", "0.0002"), ("m_lora", "0.0001")):
        by_task = []
        for task in CHOICE_TASKS:
            seeds = [list(nll_of(study, f"{arm}-{seed}-lr{rate}", "test", task).values()) for seed in range(3)]
            by_task.append(np.mean(seeds))
            assert float(table(study, "scores_choice_nll")[arm][task]) == pytest.approx(by_task[-1], rel=1e-9)
        assert float(table(study, "scores_choice_nll")[arm]["mean of tasks"]) == pytest.approx(
            np.mean(by_task), rel=1e-9
        )


def test_differences_are_paired_by_row_and_seed(study):
    d, tasks = [], []
    for number, task in enumerate(sorted(CHOICE_TASKS)):
        one, two = (
            [nll_of(study, f"{arm}-{seed}-lr0.0002", "test", task) for seed in range(3)] for arm in ("align_kl", "lora")
        )
        d.append([[a[key] - b[key] for key in a] for a, b in zip(one, two, strict=True)])
        tasks += [number] * len(one[0])
    expected = statistics.compare(np.concatenate(d, axis=1), np.array(tasks))
    row = table(study, "differences_choice_nll")["align_kl"]
    assert float(row["difference"]) == pytest.approx(np.mean([np.mean(of_task) for of_task in d]), rel=1e-9)
    names = {"low": "low", "high": "high", "closed_low": "closed_low", "error_rows": "error_rows", "p": "p"}
    for column, name in names.items():
        assert float(row[column]) == pytest.approx(getattr(expected, name), rel=1e-6), column
    assert float(row["detectable"]) == pytest.approx(statistics.detectable(expected), rel=1e-6)
    assert row["rows"] == str(len(tasks))


def test_p_values_are_adjusted_over_the_arms_of_the_table(study):
    rows = [row for row in table(study, "differences_choice_nll").values() if row["p"]]
    assert len(rows) == 5  # of 6 arms one has 2 seeds
    smallest = min(rows, key=lambda row: float(row["p"]))
    assert float(smallest["holm"]) == pytest.approx(min(1, 5 * float(smallest["p"])), rel=1e-6)


def test_each_arm_takes_its_best_learning_rate_on_dev_rows(study):
    with open(study / "report/tables/choice.csv", newline="") as file:
        taken = {row["arm"]: row["values"] for row in csv.DictReader(file) if row["taken"] == "yes"}
    assert taken == {arm: "lr 0.0001" if arm == "m_lora" else "lr 0.0002" for arm in ARMS}


def test_the_rows_scored_do_not_choose_the_learning_rate(study, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(study, other)
    for key in ("lora-0-lr0.0001", "lora-1-lr0.0001", "lora-2-lr0.0001"):  # a rate that is right on every test row
        path = other / "cells" / key / "rows.jsonl.gz"
        with gzip.open(path, "rt") as lines:
            rows = [json.loads(line) for line in lines]
        for row in rows:
            if row["split"] != "dev" and row["label"] >= 0:
                row["nll"][row["label"]] = 0.0
        path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    assert Arms(read_results(other)).variants["lora"].chosen == {"lr": 2e-4}


def test_the_same_files_give_the_same_bytes(study, tmp_path):
    before = {path.relative_to(study): path.read_bytes() for path in (study / "report").rglob("*") if path.is_file()}
    other = tmp_path / "other"  # neither the folder nor the time is in the report
    shutil.copytree(study, other, ignore=shutil.ignore_patterns("report"))
    report.write_report(other)
    after = {path.relative_to(other): path.read_bytes() for path in (other / "report").rglob("*") if path.is_file()}
    assert before == after
    assert len([path for path in before if path.suffix == ".svg"]) == 12


def test_what_a_report_no_longer_has_goes_and_files_of_others_stay(tmp_path):
    other = make_study(tmp_path / "other", arms=TWO, **SMALL)
    report.write_report(other)
    (other / "report/notes.txt").write_text("mine")
    (other / "report/figures/sweep_rank.svg").write_text("<svg/>")
    assert report.write_report(other) == other / "report/report.html"
    assert (other / "report/notes.txt").read_text() == "mine"
    assert not (other / "report/figures/sweep_rank.svg").exists()


def test_each_warning_is_there_once(tmp_path):
    arms = {**ARMS, "align_mmd": {**ARMS["align_mmd"], "budget_off": 0.021}}
    folder = make_study(
        tmp_path / "study", seeds=(0, 1), rates=(1e-4, 2e-4, 4e-4), rows=60, arms=arms, constant=("weight_zero",),
        not_finite=("align_kl",), missing=("hydra", 1), skill=0.8, mechanism=False,
        arm_options={"align_mmd": {"dtype": "bfloat16"}, "lora": {"dtype": "auto"}},
    )  # fmt: skip
    cost = folder / "cells/lora-0-lr0.0002/cost.json"
    cost.write_text(cost.read_text().replace("bench-1", "bench-2"))
    (folder / "cells/m_lora-0-lr0.0002/rows.jsonl.gz").write_bytes(b"no gzip")
    found = {one.kind: one.about for one in cautions(Arms(read_results(folder)))}
    page = (report.write_report(folder)).read_text()
    kinds = ["missing", "seeds", "rows", "parameters", "dtype", "finite", "one_answer", "chance", "edge", "hosts"]
    assert re.findall(r'data-kind="(\w+)"', page) == kinds == list(found)
    assert found["parameters"] == ["align_mmd: +2.1 %", "m_lora: \N{MINUS SIGN}19.3 %"]
    assert found["dtype"] == ["align_mmd: bfloat16"]
    assert found["finite"] == [f"align_kl-0-lr{rate}" for rate in ("0.0001", "0.0002", "0.0004")]
    assert found["one_answer"] == ["weight_zero, qnli: 100 %"]
    assert any(about.startswith("weight_zero: qnli") for about in found["chance"])
    assert found["edge"] == ["m_lora: lr 0.0001"]
    assert found["missing"][:2] == ["hydra-1-lr0.0001", "hydra-1-lr0.0002"]
    assert found["missing"][-1].startswith("m_lora-0-lr0.0002: 'rows.jsonl.gz', line 1")


def test_a_sound_study_has_no_warning(tmp_path):
    arms = {name: ARMS[name] for name in ("lora", "align_kl", "shuffled_ids")}
    folder = make_study(
        tmp_path / "study",
        rows=300,
        rates=(),
        arms=arms,
        missing=None,
        skill=2,
        unseen=False,
        mechanism=False,
        cost=False,
    )
    assert cautions(Arms(read_results(folder))) == []


SMALL = {"rates": (), "rows": 150, "unseen": False, "mechanism": False, "cost": False, "missing": None, "noise": 0.1}


def findings(folder):
    arms = Arms(read_results(folder))
    text = " ".join(summary(arms, {measure: with_baseline(arms, "test", measure) for measure in MEASURES}, {}))
    return re.sub(r"(= |< )?[0-9.]*[0-9]( to [0-9.]+)?", "#", text)


def words(folder, effects, arms=("lora", "align_kl", "shuffled_ids"), **changes):
    chosen = {name: ARMS[name] for name in arms}
    return findings(
        make_study(folder, effects=effects, arms=chosen, tasks={"qnli": 2, "piqa": 2}, **{**SMALL, **changes})
    )


MEASURES = ("choice_nll", "accuracy")
TWO = {name: ARMS[name] for name in ("lora", "hydra")}
BASIS = "# arms are compared with lora row by row, on # test rows of # tasks, over # seeds. "
SIZE = "# nats of choice NLL [#, #, Holm p #]"


def test_words_of_a_null(tmp_path):
    text = words(tmp_path / "study", {})
    could_see = "the study could see # nats of choice NLL, or # points of accuracy."
    assert text.startswith(f"{BASIS}No arm differs from lora by more than noise: {could_see}")
    assert "better" not in text
    assert "alignment" not in text


def test_words_of_an_effect_that_beats_its_control(tmp_path):
    text = words(tmp_path / "study", {"align_kl": 0.6})
    control = "and better than its control, shuffled_ids (by # nats [#, #, Holm p #]): this is an effect of alignment."
    assert text.startswith(f"{BASIS}align_kl is better than lora by {SIZE}, {control}")


def test_words_of_an_effect_that_the_control_has_too(tmp_path):
    text = words(tmp_path / "study", {"align_kl": 0.6, "shuffled_ids": 0.6})
    control = "but the control shuffled_ids (by # nats [#, #, Holm p #]) is, too, and not separable from it"
    assert text.startswith(f"{BASIS}align_kl is better than lora by {SIZE}, {control}: so this is no alignment.")
    assert "effect of alignment" not in text
    assert text.count("shuffled_ids") == 2  # with its cause, and in accuracy


def test_words_of_a_worse_arm(tmp_path):
    text = words(tmp_path / "study", {"align_kl": -0.6})
    assert "align_kl is worse than lora by # nats of choice NLL [#, #, Holm p #]." in text
    assert "effect of alignment" not in text


def test_a_task_has_as_many_rows_as_in_the_cells_that_were_trained_on_it(tmp_path):
    tasks = {"qnli": 2, "gsm8k": 0}
    folder = make_study(tmp_path / "s", **(SMALL | {"rows": 40}), tasks=tasks, arms=TWO)
    for file in (folder / "cells").glob("hydra*/rows.jsonl.gz"):
        rows = [line for line in gzip.decompress(file.read_bytes()).splitlines(keepends=True) if b"gsm8k" not in line]
        file.write_bytes(gzip.compress(b"".join(rows)))
    found = {one.kind: one.about for one in cautions(Arms(read_results(folder)))}
    assert found["rows"] == ["qnli: 40", "gsm8k: 40"]


def test_without_a_control_nothing_is_called_alignment(tmp_path):
    text = words(tmp_path / "none", {"align_kl": 0.6}, ("lora", "align_kl"))
    assert "but no control of it is finished" in text
    text = words(tmp_path / "zero", {"align_kl": 0.6}, ("lora", "align_kl", "weight_zero"))
    assert "without a control of equal strength it may be mere regularisation" in text
    arms = ("lora", "align_kl", "shuffled_ids", "weight_zero")
    folder = tmp_path / "missing"
    words(folder, {"align_kl": 0.6}, arms)
    for path in (folder / "cells").glob("shuffled_ids*"):
        shutil.rmtree(path)
    text = findings(folder)
    assert "; the control shuffled_ids must be finished before it is called alignment." in text


def test_with_one_seed_the_words_are_about_the_runs(tmp_path):
    text = words(tmp_path / "study", {"align_kl": 0.6}, seeds=(0,))
    assert "over # seed. With fewer than # seeds, what is said is about these training runs, not the methods." in text
    assert "in these runs this is an effect of alignment" in text
    assert "Holm" not in text


def test_a_study_that_has_just_begun(tmp_path):
    folder = make_study(tmp_path / "study", **SMALL)
    shutil.rmtree(folder / "cells")
    page = report.write_report(folder).read_text()
    assert "There is nothing to compare with lora yet." in page
    assert re.findall(r'<section id="(\w+)">', page) == ["arms", "conditions", "words"]


def test_sections_without_data_are_left_out(study):
    page = (study / "report/report.html").read_text()
    names = ["arms", "scores", "differences", "unseen", "forgetting", "cost", "mechanism", "conditions", "words"]
    assert re.findall(r'<section id="(\w+)">', page) == names
    assert "sweeps" not in page


def test_a_sweep_has_a_line_an_arm(tmp_path):
    arms = {name: ARMS[name] for name in ("lora", "align_kl", "shuffled_ids")}
    folder = make_study(tmp_path / "study", arms=arms, weights=(0.0, 0.1, 0.3), effects={"per_weight": 1.0}, **SMALL)
    report.write_report(folder)
    rows = table(folder, "differences_choice_nll")
    assert list(rows) == [
        f"{arm} (align_weight {w})" for arm in ("align_kl", "shuffled_ids") for w in ("0", "0.1", "0.3")
    ]
    estimates = [float(rows[f"align_kl (align_weight {weight})"]["difference"]) for weight in ("0", "0.1", "0.3")]
    assert estimates[0] > estimates[1] > estimates[2]  # the more weight, the lower the loss
    svg = (folder / "report/figures/sweep_align_weight.svg").read_text()
    assert all(f">{label}</text>" in svg for label in ("lora", "align_kl", "shuffled_ids", "align_weight"))


def test_words_of_a_sweep_are_one_sentence_an_arm(tmp_path):
    arms = ("lora", "align_kl", "shuffled_ids")
    text = words(tmp_path / "both", {"per_weight": 3.0}, arms, weights=(0.0, 0.1, 0.5))
    where = "better than lora at align_weight # and align_weight #, most at align_weight # by"
    assert f"align_kl is {where} {SIZE}; nowhere does it beat every control that it needs" in text
    assert f"The control shuffled_ids is {where} {SIZE}." in text
    assert "effect of alignment" not in text
    text = words(tmp_path / "one", {"align_kl": 0.6}, arms, weights=(0.0, 0.1, 0.5))
    assert "it beats each of its controls at align_weight # and align_weight #: this is an effect of alignment." in text
    assert "The control shuffled_ids is within noise of lora everywhere (the study could see # nats" in text


def test_accuracy_at_chance_gets_no_bold(tmp_path):
    arms = {name: ARMS[name] for name in ("lora", "align_kl")}
    folder = make_study(tmp_path / "study", arms=arms, tasks={"qnli": 2}, constant=("base", *arms), **SMALL)
    found = {
        one.name: one for section in report.make_report(Arms(read_results(folder))).sections for one in section.parts
    }
    assert not any(row.get("bold") for row in found["scores_accuracy"].rows)
    assert any(row.get("bold") for row in found["scores_choice_nll"].rows)


def test_figures_are_accessible_and_take_the_colour_of_the_text(study):
    page = (study / "report/report.html").read_text()
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))  # several figures in one page
    assert set(re.findall(r'(?:href="|url\()#([\w.-]+)', page)) <= set(ids)
    for path in (study / "report/figures").glob("*.svg"):
        root = ElementTree.parse(path).getroot()
        names = [child.tag.rpartition("}")[2] for child in root]
        assert names[:2] == ["title", "desc"]
        assert root.get("role") == "img"
        assert root.get("aria-labelledby").split() == [root[0].get("id"), root[1].get("id")]
        text = path.read_text()
        assert INK not in text
        assert "currentColor" in text
        assert "data:image" not in text  # no pixels
        assert "<dc:date>" not in text


def test_the_page_needs_no_network(study):
    page = (study / "report/report.html").read_text()
    links = set(re.findall(r'(?:src|href)="([^"#]+)"', page))
    assert {link for link in links if not link.startswith(("tables/", "data:,"))} == set()
    assert all((study / "report" / link).is_file() for link in links if link.startswith("tables/"))
    markdown = (study / "report/report.md").read_text()
    pictures = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", markdown)
    assert len(pictures) == 12
    assert all((study / "report" / picture).is_file() for picture in pictures)


def luminance(colour):
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


@pytest.mark.parametrize("colour", COLOURS)
@pytest.mark.parametrize("paper", ["#ffffff", "#16181b"])
def test_colours_have_contrast_on_light_and_dark_paper(colour, paper):
    light, dark = sorted((luminance(colour), luminance(paper)), reverse=True)
    assert (light + 0.05) / (dark + 0.05) >= 3  # WCAG 1.4.11


HARD = Table(
    "hard", "A & B", "",
    [Column("arm", "50% & more"), Column("x", "x_1", "nats", True, error="e", between=("low", "high"))],
    [{"arm": "a_b|#1 <b>{\\x}", "x": -0.0123, "e": 0.001, "low": -0.02, "high": 0.0, "bold": ["x"], "role": "control"},
     {"arm": "none", "x": None}],
)  # fmt: skip


def test_latex_is_escaped():
    assert to_tex(HARD).splitlines()[1:] == [
        r"\begin{tabular}{lr}",
        r"\toprule",
        r"50\% \& more & x\_1 \\",
        r"\midrule",
        r"a\_b|\#1 $<$b$>$\{\textbackslash{}x\} & \textbf{$-$0.012 $\pm$ 0.001 [$-$0.020, 0.000]} \\",
        r"none & -- \\",
        r"\bottomrule",
        r"\end{tabular}",
    ]


def test_markdown_and_csv_are_escaped():
    assert to_markdown(HARD).splitlines()[2].startswith(r"| a_b\|#1 \<b>{\\x} | **")
    assert to_csv(HARD) == "role,arm,x,e,low,high\ncontrol,a_b|#1 <b>{\\x},-0.0123,0.001,-0.02,0\n,none,,,,\n"


def test_html_is_escaped(tmp_path):
    folder = make_study(tmp_path / "study", **SMALL)
    plan = json.loads((folder / "plan.json").read_text())
    plan["question"] = "<script>alert(1)</script> & more"
    (folder / "plan.json").write_text(json.dumps(plan))
    page = report.write_report(folder).read_text()
    assert "<script>alert" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt; &amp; more" in page
