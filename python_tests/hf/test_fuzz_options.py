"""Hostile values of every option: options that are valid and come back through YAML, or one line."""

import json
import math
from typing import get_args

import pytest
import yaml
from hostile import check_line, refused
from hypothesis import given
from hypothesis import strategies as st

from align_ext import AlignLoraConfig
from align_ext.architectures import Architecture
from align_ext.system.reading import read_yaml
from align_ext.training.options import TrainOptions, known_options

NUMBERS = [
    0,
    1,
    -1,
    2,
    3.5,
    2**31,
    2**62,
    2**64,
    10**400,
    -(10**400),
    1e-320,
    1e30,
    1e308,
    math.nan,
    math.inf,
    -math.inf,
]
TEXTS = ["", "a", "auto", "none", "true", "1", "1e400", "9" * 5000, "kl", "ü", "[/bold]", "\x1b[31m", "\ud800", "a\0b",
         "x" * 10_000, "(a*)*b", "(", "../..", "1,2", "nan,inf"]  # fmt: skip
OTHERS = [
    None,
    True,
    False,
    [],
    [1],
    ["a", "a"],
    [None],
    [[]],
    ["x" * 10_000],
    {},
    {"a": 1},
    (),
    (1,),
    {1},
    b"\xff",
    object(),
    int,
]
VALUES = [*NUMBERS, *TEXTS, *OTHERS]
NESTED = st.recursive(
    st.sampled_from([*NUMBERS, *TEXTS, None, True]) | st.integers() | st.floats() | st.text(max_size=30),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
OF_JOB = [name for name, option in known_options().items() if not option.of_adapter]
OF_ADAPTER = [name for name, option in known_options().items() if option.of_adapter]
ARCHITECTURES = get_args(Architecture)


def check_config(options):
    """They are valid, and the same through JSON; or one line."""
    try:
        config = AlignLoraConfig(**options)
    except ValueError as error:
        return check_line(error)
    assert AlignLoraConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert 0 < config.scaling < math.inf
    return config


def check_job(make, file=None):
    """They are valid, and the same through YAML; or one line."""
    try:
        options = make()
    except ValueError as error:
        return check_line(error)
    text = yaml.safe_dump(options.to_dict(), allow_unicode=True)
    if file is not None and text.isascii():
        file.write_text(text)
        assert TrainOptions.from_mapping(read_yaml(file)) == options
    return options


@pytest.mark.parametrize("name", OF_ADAPTER)
def test_every_hostile_value_of_an_adapters_option_is_valid_or_one_line(name):
    for value in VALUES:
        for options in ({}, {"architecture": "hydra"}, {"architecture": "multi_adapter", "num_tasks": 2}):
            check_config(options | {name: value})


@pytest.mark.parametrize("name", [*OF_JOB, "adapter", *OF_ADAPTER])
def test_every_hostile_value_of_a_jobs_option_is_valid_or_one_line(name, tmp_path):
    for value in VALUES:
        if name in (*OF_JOB, "adapter"):
            check_job(lambda value=value: TrainOptions(**{name: value}))
        else:
            check_job(lambda value=value: TrainOptions(adapter={name: value}))
        check_job(lambda value=value: TrainOptions.from_mapping({name: value}), tmp_path / "x.yaml")


@pytest.mark.parametrize("key", [None, 3, (), "", "x" * 100_000, "\x1b[1m", "[/bold]", "step s", b"steps", math.nan])
def test_hostile_names_of_options_are_one_line(key):
    refused(TrainOptions.from_mapping, {key: 1}, match="unknown option")
    refused(AlignLoraConfig.from_dict, {key: 1}, match="unknown option")


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"num_tasks": 10**9}, "num_tasks must be a positive integer, at most 10000"),
        ({"mmd_n_max": 10**19}, "mmd_n_max must be"),
        ({"architecture": "hydra", "num_heads": 2**62}, "num_heads must be a positive integer, at most 65536"),
        ({"architecture": "mtlora", "routing_groups": 2**40}, "routing_groups must be"),
        ({"r": 2**62}, "r must be a positive integer, at most 65536"),
        ({"align_queue": 2**70}, "align_queue must be"),
        ({"lora_alpha": 1e308}, "lora_alpha must be a positive number"),
        ({"lora_alpha": 10**400}, "lora_alpha must be"),
        ({"lora_alpha": 1e-60}, "lora_alpha must be"),
        ({"lora_dropout": 0.999999}, r"lora_dropout must be in \[0, 1\)"),
        ({"align_weight": 1e300}, "align_weight must be"),
        ({"mmd_bandwidths": 5}, "mmd_bandwidths must be"),
        ({"mmd_bandwidths": [1e300]}, "mmd_bandwidths must be"),
        ({"target_blocks": [["mlp"]]}, "target_blocks must be"),
        ({"target_modules": [1]}, "target_modules: 1 is no name"),
        ({"target_modules": "((?:a?){5000}){5000}"}, "target_modules: .* is no regular expression"),
        ({"exclude_modules": "a" * 9000}, "exclude_modules: .* is no regular expression"),
    ],
)
def test_a_size_that_nothing_could_hold_is_refused_by_its_name(options, match):
    refused(lambda: AlignLoraConfig(**options), match=match)


@pytest.mark.parametrize("options", [{"steps": 10**10}, {"batch_size": 2**62}, {"seq_len": 10**12}, {"lr": 1e300},
                                     {"lr": 1e-300}, {"tasks": ["a", "a"]}, {"tasks": [""]}, {"save_steps": 2**63},
                                     {"mixing_temperature": math.inf}, {"seed": -1}, {"warmup": math.nan}])  # fmt: skip
def test_a_job_beyond_any_measure_is_refused_by_its_option(options):
    refused(lambda: TrainOptions(**options), match=f"^{next(iter(options))}")


def test_an_option_is_given_once_in_a_source_and_later_sources_win():
    refused(TrainOptions.from_mapping, {"batch-size": 8, "batch_size": 4}, match="batch_size is given twice")
    assert TrainOptions.from_mapping({"batch-size": 8}, {"batch_size": 16}).batch_size == 16


@given(st.sampled_from(ARCHITECTURES), st.dictionaries(st.sampled_from(OF_ADAPTER), NESTED, max_size=4))
def test_fuzz_options_of_adapters_are_valid_or_one_line(architecture, options):
    check_config({"architecture": architecture, "num_tasks": 2} | options)


@given(st.dictionaries(st.sampled_from([*OF_JOB, *OF_ADAPTER]) | st.text(max_size=12), NESTED, max_size=4))
def test_fuzz_options_of_a_job_are_valid_or_one_line(options):
    check_job(lambda: TrainOptions.from_mapping(options))


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz") / "job.yaml"


@given(st.dictionaries(st.sampled_from([*OF_JOB, *OF_ADAPTER]) | st.text(max_size=12), NESTED, max_size=4), st.data())
def test_fuzz_a_yaml_file_of_options_is_valid_or_one_line(file, options, data):
    text = yaml.safe_dump(options, allow_unicode=True)
    place = data.draw(st.integers(0, len(text)))
    text = (
        text[:place]
        + data.draw(st.sampled_from(["", "\n", ": ", "- ", "[", "{", "*a", "&a ", '"', "!!set ", "\t"]))
        + text[place:]
    )
    file.write_text(text, encoding="utf-8", errors="surrogatepass")
    check_job(lambda: TrainOptions.from_mapping(read_yaml(file)))
