"""The mutants of .ci/mutations.py have their places in the sources, without which they would prove nothing."""

import runpy
import sys
from pathlib import Path

import pytest

MUTATIONS = runpy.run_path(str(Path(__file__).parents[1] / ".ci/mutations.py"))


def test_every_mutant_fits_the_sources_just_once(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["mutations.py", "--check"])
    assert MUTATIONS["main"]() == 0, capsys.readouterr().out
    mutants = [*MUTATIONS["MUTANTS"], *MUTATIONS["barriers"]()]
    assert f"{len(mutants)} of {len(mutants)} mutants fit" in capsys.readouterr().out
    assert len({(mutant.file, mutant.before) for mutant in mutants}) == len(mutants) > 40


@pytest.mark.parametrize(
    ("place", "test", "message"),
    [
        ("x = 1", "test_a.py -k b", None),
        ("x = 2", "test_a.py", "its place is 0 times in a.py"),
        ("x", "test_a.py", "its place is 2 times in a.py"),
        ("x = 1", "test_a.py test_gone.py", "there is no test test_gone.py"),
    ],
)
def test_a_mutant_that_fits_nowhere_or_has_no_test_is_named(place, test, message, tmp_path):
    (tmp_path / "a.py").write_text("x = 1\nx\n")
    (tmp_path / "test_a.py").touch()
    found = MUTATIONS["misplaced"](MUTATIONS["Mutant"]("a mutant", "a.py", place, "", test), tmp_path)
    assert found == (None if message is None else f"a mutant: {message}")
