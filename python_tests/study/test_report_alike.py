"""What a report says where rows come out alike, tasks differ, seeds are few, and beside the controls of an arm."""

import csv
import gzip
import json

import numpy as np
import pytest
from study.made_up import ARMS, make_study

from align_ext.report import page as report
from align_ext.report import statistics, tables
from align_ext.report.chosen import Arms
from align_ext.report.compared import with_baseline
from align_ext.report.conditions import cautions
from align_ext.report.results import read_results
from align_ext.report.words import summary

SMALL = {"rows": 24, "rates": (), "unseen": False, "missing": None, "mechanism": False}


def arms_of(folder):
    return Arms(read_results(folder))


def test_rows_that_all_come_out_the_same_have_no_interval(tmp_path):
    arms = {name: ARMS[name] for name in ("lora", "hydra")}
    same = {"skill": 50.0, "noise": 0.0, "seed_noise": 0.0}  # every choice is right
    made = arms_of(make_study(tmp_path / "s", **SMALL | same, arms=arms, tasks={"qnli": 2}))
    found = with_baseline(made, "test", "accuracy")
    (row,) = tables.difference_table(made, found, "accuracy", "test").rows
    assert row["difference"] == 0.0
    assert row["rows"] == 24
    assert not {"low", "closed_low", "p", "rows_needed", "detectable"} & row.keys()
    assert "the study could see nothing, for every row came out the same" in " ".join(
        summary(made, {"accuracy": found}, {})
    )


def test_means_of_different_tasks_share_no_bold(tmp_path):
    arms = {name: ARMS[name] for name in ("lora", "hydra")}
    folder = make_study(
        tmp_path / "s", **SMALL, arms=arms, skill=3.0, effects={"hydra": -1.0}, tasks={"piqa": 2, "qnli": 2}
    )
    for file in (folder / "cells").glob("lora-*/rows.jsonl.gz"):  # trained on one task alone
        kept = [line for line in read_lines(file) if '"piqa"' in line]
        write_lines(file, kept)
    (scores,) = (one for one in tables.score_tables(arms_of(folder)) if one.name == "scores_choice_nll")
    bold = {row["arm"]: row.get("bold", []) for row in scores.rows}
    assert "mean of tasks" in bold["lora"]
    assert "mean of tasks" in bold["hydra"], "the only mean of both tasks but the base's, which is worse"
    assert "piqa" not in bold["hydra"]


def read_lines(file):
    return gzip.decompress(file.read_bytes()).decode().splitlines()


def write_lines(file, lines):
    file.write_bytes(gzip.compress("\n".join(lines).encode()))


def test_an_aligned_arm_stands_beside_its_controls_and_its_architecture_without_alignment(tmp_path):
    arms = dict(ARMS) | {"m_lora_kl": ARMS["m_lora"] | {"align": "kl", "align_weight": 0.1}}
    effects = {"align_kl": -0.8, "shuffled_ids": -0.8, "m_lora": 1.5}
    folder = make_study(tmp_path / "s", **SMALL, arms=arms, effects=effects)
    made = arms_of(folder)
    table = tables.control_table(made)
    rows = {(row["arm"], row["minus"]): row for row in table.rows}
    controls = {("align_kl", "shuffled_ids"), ("align_kl", "weight_zero"), ("align_mmd", "weight_zero")}
    assert rows.keys() == controls | {("m_lora_kl", "m_lora")}
    d, groups = made.differences(made.variants["align_kl"], made.variants["shuffled_ids"], "test", "loss")
    by_hand = statistics.compare(d, groups)
    row = rows["align_kl", "shuffled_ids"]
    assert (row["loss"], row["loss low"], row["seeds"]) == (by_hand.estimate, by_hand.low, 3)
    assert row["choice_nll low"] < 0 < row["choice_nll high"], "both cost the same"
    assert rows["m_lora_kl", "m_lora"]["choice_nll low"] > 0, "what m_lora gains is lost"
    report.write_report(folder)
    with open(folder / "report/tables/controls.csv", newline="") as file:
        assert next(csv.DictReader(file))["minus"] == "shuffled_ids"


def test_two_seeds_speak_of_their_runs_as_one_does():
    random = np.random.default_rng(0)
    d, tasks = random.standard_normal((2, 40)) + np.array([[5.0], [9.0]]), np.zeros(40, int)
    two, one = statistics.compare(d, tasks), statistics.compare(d.mean(0, keepdims=True), tasks)
    assert (two.low, two.high, two.closed_low, two.error) == (one.low, one.high, one.closed_low, one.error)
    assert (two.p, two.error_seeds, two.seeds) == (None, None, 2)
    assert statistics.detectable(two) == statistics.detectable(one) < 1.0


@pytest.mark.parametrize(("threads", "cautioned"), [((1, 1), False), ((1, 2), True)])
def test_times_on_other_numbers_of_threads_are_not_compared(tmp_path, threads, cautioned):
    arms = {name: ARMS[name] for name in ("lora", "hydra")}
    folder = make_study(tmp_path / "s", **SMALL, arms=arms, seeds=(0,))
    for arm, count in zip(arms, threads, strict=True):
        file = folder / "cells" / f"{arm}-0" / "cost.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"threads": count}))
    made = arms_of(folder)
    about = [one.about for one in cautions(made) if one.kind == "hosts"]
    assert about == ([["bench-1, threads: 1", "bench-1, threads: 2"]] if cautioned else [])
    (of_hydra,) = (row for row in report.run_tables.cost_table(made).rows if row["arm"] == "hydra")
    assert ("ratio" in of_hydra) is not cautioned
