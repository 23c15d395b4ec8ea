"""AlignLoraConfig: defaults, validation, JSON."""

import json
import math

import pytest

from align_ext import AlignLoraConfig


def test_the_defaults_are_the_papers():
    config = AlignLoraConfig()
    assert (config.architecture, config.r, config.lora_alpha, config.lora_dropout) == (
        "align_lora",
        8,
        32,
        0.1,
    )
    assert (config.align, config.align_weight) == ("kl", 0.1)
    assert config.target_modules == ("gate_proj", "up_proj", "down_proj")
    assert config.scaling == 4


def test_plain_lora_has_no_alignment_unless_asked():
    assert AlignLoraConfig(architecture="lora").align is None
    assert AlignLoraConfig(architecture="lora", align="kl").align_weight == 0.1
    assert AlignLoraConfig(align=None).align is None
    assert AlignLoraConfig(align_weight=0.0).align_weight == 0.0


def test_rslora_divides_by_the_root_of_the_rank():
    assert AlignLoraConfig(r=16, lora_alpha=8, use_rslora=True).scaling == 8 / math.sqrt(16)


@pytest.mark.parametrize(
    "options",
    [{}, {"align": None}, {"target_modules": "all-linear"}, {"target_modules": ["a", "b"], "num_tasks": 5}],
)
def test_json_round_trip(options):
    config = AlignLoraConfig(**options)
    assert AlignLoraConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"r": 0}, "r must be a positive integer, got 0"),
        ({"r": 2.5}, "r must be a positive integer, got 2.5"),
        ({"r": True}, "r must be a positive integer, got True"),
        ({"lora_alpha": float("nan")}, "lora_alpha must be a positive number, got nan"),
        ({"lora_dropout": 1.0}, r"lora_dropout must be in \[0, 1\), got 1.0"),
        ({"align": "kld"}, "unknown align 'kld'; did you mean 'kl'"),
        ({"architecture": "aling_lora"}, "unknown architecture 'aling_lora'; did you mean 'align_lora'"),
        ({"align_weight": -1}, "align_weight must be a number >= 0"),
        ({"num_tasks": 0}, "num_tasks must be a positive integer, or None, got 0"),
        ({"target_modules": "*_proj"}, "is no regular expression"),
        ({"target_modules": None}, "target_modules must be module names or a regular expression, got None"),
        ({"use_rslora": "false"}, "use_rslora must be true or false, got 'false'"),
        ({"target_modules": ()}, "target_modules must be suffixes"),
        ({"align_eps": 0}, "align_eps must be a positive number"),
        ({"align_ddof": 2}, "align_ddof must be 0 or 1"),
        ({"align_pairs": "max"}, "align_pairs must be"),
        ({"align_layers": "max"}, "align_layers must be"),
        ({"adapter_dtype": "int8"}, "adapter_dtype must be"),
    ],
)
def test_bad_values_are_named_with_what_is_allowed(options, message):
    with pytest.raises(ValueError, match=message):
        AlignLoraConfig(**options)


def test_an_unknown_option_names_the_nearest():
    with pytest.raises(ValueError, match="unknown option 'lora_aplha'; did you mean 'lora_alpha'"):
        AlignLoraConfig.from_dict({"lora_aplha": 3})
