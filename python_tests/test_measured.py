"""What is kept of a machine's measurements, what is said of it, and what the documents make of it."""

import json
import runpy
import sys
from pathlib import Path

import pytest

from align_ext import cli
from align_ext.bench import restructured, run, saved
from align_ext.bench.restructured import Cell, cells, summary
from align_ext.bench.setting import Case, Setting
from align_ext.bench.timing import Comparison

ROOT = Path(__file__).parents[1]
MEASURED = runpy.run_path(str(ROOT / "docs/measured.py"))
FILES = MEASURED["measured"]()
SUITES = {"restructured": "a table, T=8", "step": "a step"}
FLAGS = {"flags": "fpu avx2 avx512f avx512vl avx512_bf16 amx_bf16"}


def compared(ours, other, name="r_lora"):
    """The times of ours and of its restructured form, beside a frozen layer of 1 ms."""
    form = restructured.FORMS[name]
    times = {"frozen layer alone": [1.0] * (len(ours) + 1), name: ours, form: other}
    baselines = {n: [(1.0, 1.0)] * len(ours) for n in (name, form)}
    return Comparison(times, baselines=baselines, restructured={name: form})


def test_a_cell_is_decided_by_the_quartiles_of_its_paired_turns():
    slower, faster = [3.0, 6.0, 4.5, 1.0], [2.0, 4.0, 3.0, 2.0]
    (cell,) = cells({"a table: T=8": compared(slower, faster), "another": Comparison({"x": [1.0]})})
    assert (cell.name, cell.turns) == ("r_lora, T=8", 4)
    assert cell.quartiles == (1.25, 1.5, 1.5)  # of 1.5, 1.5, 1.5, 0.5
    assert cell.verdict == "open"
    assert cells({"": compared(2 * slower, 2 * faster)})[0].verdict == "slower"
    assert cells({"": compared(8 * [1.0], 8 * [2.0])})[0].verdict == "faster"
    assert cells({"": compared(8 * [2.0, 1.0], 8 * [1.0, 2.0])})[0].verdict == "neither"


def test_in_every_cell_is_said_only_where_it_is_so():
    faster, slower = Cell("a", (0.8, 0.9, 0.95), 8), Cell("b", (1.01, 1.02, 1.03), 8)
    assert summary([], []) == []
    assert summary([faster, faster], [])[0].startswith("In every cell, 2 of them, ours is faster")
    assert summary([faster, faster], ["another"])[0].startswith("Of 2 cells ours is faster")
    assert restructured.holds([faster, faster], [])
    assert not restructured.holds([faster, faster], ["another"])
    for other, line in {
        slower: "It is slower beyond what noise explains in 1",
        Cell("b", (0.9, 1.0, 1.1), 8): "Neither beyond what noise explains in 1",
        Cell("b", (0.8, 0.9, 0.95), 7): "Measured in fewer than 8 turns",
    }.items():
        lines = summary([faster, other], [])
        assert "every cell" not in str(lines)
        assert lines[0].endswith("restructured in 1.")
        assert any(found.startswith(line) for found in lines)
        assert f"  {other}" in lines
    assert "It is slower beyond what noise explains in none" in summary([faster, Cell("b", (0.9, 1.0, 1.1), 8)], [])


def test_the_cells_are_those_of_the_claim():
    titles = [case.title for case in restructured.restructured(Setting())]
    assert len(titles) == 16
    assert "T=256, 2048 -> 5504, bfloat16" in titles[7]
    visit = next(restructured.restructured(Setting(shapes=((16, 24),), batches=(4,)))).run(print)
    assert [cell.name for cell in cells({"a: b": next(visit)})] == [f"{name}, b" for name in restructured.FORMS]


@pytest.mark.parametrize(
    ("limit", "widest"),
    [(None, "AMX"), ("AVX512_CORE_FP16", "AVX512_BF16"), ("avx512_core", "AVX-512"), ("AVX2", "AVX2")],
)
def test_the_vectors_are_those_that_the_limit_allows(limit, widest):
    assert saved.vectors(FLAGS, limit)[-1] == widest
    assert saved.vectors({"flags": "fpu avx2"}, None) == ["AVX2"]


def test_a_file_is_named_after_the_machine(monkeypatch, tmp_path):
    name = "AMD EPYC(TM) 9654 96-Core Processor" + 20 * " "
    numbers = {"cpu family": "25", "model": "17"}
    monkeypatch.setattr(saved, "_cpuinfo", lambda: {"model name": name, **numbers, **FLAGS})
    monkeypatch.setattr(saved.torch, "get_num_threads", lambda: 2)
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16")
    monkeypatch.chdir(tmp_path)
    named = "amd-epyc-9654-96-core-family-25-model-17-avx512-bf16-2-threads.json"
    assert saved.file_in(None, "cpu") == Path(named)
    (tmp_path / "docs/measurements").mkdir(parents=True)
    assert saved.file_in(None, "cpu") == Path("docs/measurements") / named
    assert saved.file_in(tmp_path, "cpu") == tmp_path / named


@pytest.fixture
def bench(monkeypatch, tmp_path):
    """Runs align-lora bench on a suite of one comparison: its exit code."""
    monkeypatch.chdir(tmp_path)

    def call(ours, *arguments):
        def visit(_):
            yield compared(ours, [2.0] * len(ours))

        suite = {name: lambda _, table=table: iter([Case(table, "16 -> 24", visit)]) for name, table in SUITES.items()}
        monkeypatch.setattr(run, "SUITES", suite)
        only = () if "--only" in arguments else ("--only", "restructured")
        monkeypatch.setattr(sys, "argv", ["align-lora", "bench", "--device", "cpu", *only, *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return ended.value.code

    return call


def test_the_exit_code_tells_whether_ours_is_slower_somewhere(bench, capsys):
    assert [bench([ms] * 8, "--check") for ms in (1.0, 2.0, 3.0)] == [0, 0, 1]
    assert bench([1.0] * 7, "--check") == 1  # too few turns to say so
    assert bench([3.0] * 8) == 0
    out = capsys.readouterr().out
    assert "In every cell, 1 of them, ours is faster than the same mathematics restructured." in out
    assert "r_lora, 16 -> 24: 1.50 (1.50 .. 1.50)" in out


def test_a_run_of_one_suite_keeps_the_others_of_the_same_machine_and_versions(bench, tmp_path, monkeypatch):
    def found():
        (path,) = tmp_path.iterdir()
        return {
            table: rows["16 -> 24"]["r_lora"]["ms"] for table, rows in json.loads(path.read_text())["tables"].items()
        }

    assert bench([3.0] * 8, "--save") == 0
    assert bench([5.0] * 8, "--save", "--only", "step") == 0
    assert found() == {"a table, T=8": 3, "a step": 5}
    assert bench([4.0] * 8, "--save") == 0
    assert found() == {"a table, T=8": 4, "a step": 5}
    monkeypatch.setattr(saved, "_packages", lambda: {"torch": "another"})
    assert bench([6.0] * 8, "--save") == 0
    assert found() == {"a table, T=8": 6}, "figures of other versions do not compare"


def test_the_file_of_a_run_holds_every_ratio_and_becomes_a_page(bench, tmp_path):
    assert bench([3.0] * 8, "--save") == 0
    assert bench([1.0, 3.0] * 4, "--save") == 0  # a later run replaces it
    (path,) = tmp_path.iterdir()
    file = json.loads(path.read_text())
    assert file["suites"]["restructured"]["tables"] == ["a table, T=8"]
    assert {*file["machine"]} >= {"processor", "vectors", "threads"}
    assert {"torch", "align_ext"} <= {*file["packages"]}
    rows = file["tables"]["a table, T=8"]["16 -> 24"]
    quartiles = {"ratio": [1, 2, 3], "to_restructured": [0.5, 1, 1.5]}
    assert rows["r_lora"] == {"ms": 2, "turns": 8, **quartiles}
    assert "| r_lora | 2.00 (1.00 .. 3.00); 1.00 (0.50 .. 1.50) |" in MEASURED["page"](file)
    assert MEASURED["cells"](file) == [("r_lora, 16 -> 24", "1.00 (0.50 .. 1.50)", "neither")]
    path.write_text("{}")
    assert bench([3.0], "--save") == 2  # not a file of ours
    assert path.read_text() == "{}"


def test_the_documents_are_as_the_files_have_them():
    documents = MEASURED["documents"]()
    for path, text in documents.items():
        assert (path.read_text() if path.exists() else "") == text, "python docs/measured.py --write"
    pages = {path.stem for path in (ROOT / "docs/measurements").glob("*.md")}
    assert pages == {*FILES}
    text = documents[MEASURED["PERFORMANCE"]]
    tables = {name: table() for name, table in MEASURED["TABLES"].items()}
    assert all(table in text for table in tables.values())
    assert MEASURED["renewed"](text.replace("1.26 beside 1.18", ""), tables) == text


def tables_with(*variants):
    """Every comparison of a machine that has all of these variants, and something to compute."""
    for name, file in FILES.items():
        for table, columns in file["tables"].items():
            for column, rows in columns.items():
                known = all("ratio" in rows.get(variant, {}) for variant in variants)
                if known and not table.startswith("calling"):
                    yield f"{name}: {table}, {column}", rows


def median(row):
    return MEASURED["three"](row["ratio"])[1]


@pytest.mark.parametrize(
    ("ours", "other"),
    [
        ("lora", "PEFT's LoRA"), ("align_lora, kl", "PEFT's LoRA"), ("align_lora", "PEFT's LoRA"),
        ("lora, float32 adapters", "PEFT's LoRA, float32 adapters"), ("m_lora", "M-LoRA, loop"),
        ("r_lora", "R-LoRA, loop"), ("hydra", "HydraLoRA, loop"),
    ],
)  # fmt: skip
def test_what_the_page_claims_of_every_machine_is_so(ours, other):
    found = list(tables_with(ours, other))
    assert found
    for where, rows in found:
        assert median(rows[ours]) < median(rows[other]), f"{where}: docs/performance.md says otherwise"
        if "peak_mib" in rows[ours] and "PEFT" in other:
            assert rows[ours]["peak_mib"] < rows[other]["peak_mib"], where


def test_the_page_says_that_restructured_wins_where_it_does():
    slower = [c for file in FILES.values() for c, _, verdict in MEASURED["cells"](file) if verdict == "slower"]
    text = " ".join((ROOT / "docs/performance.md").read_text().split())
    assert ("on some processors it wins" in text) == bool(slower)
    assert all(cell in text for cell in slower)
    assert "in every cell" not in text.lower()
