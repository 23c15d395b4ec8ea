"""Names and patterns out of files: bounded, printable, no other folder, and soon matched or refused."""

import re
import time

import pytest
from hostile import check_line, refused
from hypothesis import given
from hypothesis import strategies as st

from align_ext.system.names import Matcher, check_names, check_pattern

ENDLESS = ["(.|a)*(.|b)*(.|c)*(.|d)*(.|e)*[!?]", "((a|.)*)*[xy]z", r"(.+)(.+)(.+)(.+)(.+)(.+)\1\2\3\4\5\6"]


@pytest.mark.parametrize("pattern", ENDLESS)
def test_a_pattern_that_never_ends_is_refused_for_all_names_together(pattern):
    names = [f"xx.xyz.{i}." + "ab" * 40 for i in range(300)]
    matcher = Matcher()
    refused(lambda: [matcher.matches(pattern, name) for name in names], match="takes too long")


@pytest.mark.parametrize(
    "pattern",
    [
        "(",
        "*_proj",
        "((?:a?){5000}){5000}",
        "((a{40}){40}){40}",
        "a{4000,}",
        "a{99999999999999999999}",
        "(?R)",
        "(a)(?1)*",
        "(?:abc){e}",
        "(?e)abc{e<=1}x",
        "a{,}" * 4 + "{i}",
        "(?|(a)|(b))c",
        "(?V1)[[a-z]--[b]]",
        r"\p{L}+",
        r"\N{LATIN SMALL LETTER A}",
        r"\L<words>",
        "(" * 700 + ")" * 700,
        "a" * 5000,
        "(?i)(?L)a",
    ],
)
def test_a_pattern_that_is_none_or_too_large_or_means_other_things_to_re_is_refused(pattern):
    refused(check_pattern, pattern, match="is no regular expression")


def test_patterns_mean_what_they_mean_to_peft():
    name = "model.layers.11.mlp.up_proj"
    for pattern, fits in {
        name: True,
        "up_proj": False,
        ".*up_proj": True,
        r".*\.(up|down)_proj": True,
        r"model\.layers\.\d{1,3}\.mlp\.\w+": True,
        "(?i:MODEL).*": True,
        r"(?!.*q_proj).*_proj(?<=up_proj)": True,
        r"model\.layers\.(?P<n>[0-9]+)\..*": True,
    }.items():
        assert Matcher().matches(pattern, name) == fits, pattern
    for pattern, fits in {
        "up_proj": True,
        "proj": False,
        "mlp.up_proj": True,
        "layers": False,
        "q|up_proj": True,
    }.items():
        assert Matcher().matches(pattern, name, end=True) == fits, pattern


def test_many_names_and_plain_patterns_are_no_long_time():
    matcher, names = Matcher(), [f"model.layers.{i}.mlp.experts.{j}.up_proj" for i in range(60) for j in range(60)]
    assert sum(matcher.matches(r".*\.layers\.\d+\.mlp\..*up_proj", name) for name in names) == len(names)


@pytest.mark.parametrize(
    "names",
    [5, None, "abc", {"a": 1}, [1], [None], [["a"]], [""], [" a"], ["a\n"], ["a", "b", "a"], ["x" * 1001], ["\x1b[1m"],
     ["\u202ea"], ["\ud800"], ["a"] * 20_000, [str(i) for i in range(20_000)], [True], ["é" * 501]],
)  # fmt: skip
def test_names_that_are_none_are_refused(names):
    assert refused(check_names, names, "task_names").startswith("task_names")


@pytest.mark.parametrize("name", ["..", ".", "/etc", "a/b", "../x", "a\\b", "x" * 201, "a\0b"])
def test_names_that_would_be_other_folders_are_refused(name):
    refused(lambda: check_names([name], "task_names", for_folders=True), match="is no name for a folder")


def test_names_that_are_names_stay_what_they_are():
    names = ["a", "[bold]", "ü b", "数学", ":bomb:", "..a", "-x", "a.b", "🙂"]
    assert check_names(names, "task_names", for_folders=True) == tuple(names)
    assert check_names([], "task_names") == ()
    assert check_names(["a/b"], "task_names") == ("a/b",)


PATTERN = st.lists(
    st.sampled_from(
        ["a", "b", ".", "*", "+", "?", "(", ")", "(?:", "|", "[", "]", "^", "$", "{2}", "{3,}", "{,9}", r"\d", r"\1",
         "-", "(?=", "(?!", "(?<=", "*?", "++", "(?P<n>", "(?P=n)", "{e}", "(?i)", r"\b", r"\.", ",", "}"]
    ),
    max_size=25,
).map("".join)  # fmt: skip


@given(PATTERN)
def test_fuzz_patterns_fit_as_they_fit_for_re_or_are_refused(pattern):
    start, fits = time.perf_counter(), {}
    try:
        matcher = Matcher()
        fits = {name: matcher.matches(pattern, name) for name in ("a", "ab", "a.b.aab", "bb1")}
    except ValueError as error:
        check_line(error)
    assert time.perf_counter() - start < 2
    try:
        expected = re.compile(pattern)
    except (re.error, OverflowError):
        return
    for name, fit in fits.items():
        assert (expected.fullmatch(name) is not None) == fit
