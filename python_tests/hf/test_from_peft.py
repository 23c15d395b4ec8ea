"""docs/guide/from-peft.md is in step with the PEFT that is installed, and with what is taken and refused here."""

import inspect
import re
from dataclasses import fields
from pathlib import Path

import peft
import pytest
from peft import LoraConfig, LoraModel, PeftModel
from tiny import llama
from torch import nn

import align_ext
from align_ext import AlignLoraConfig
from align_ext.model.arguments import resolve_config

PAGE = (Path(__file__).parents[2] / "docs/guide/from-peft.md").read_text()
ROWS = re.findall(r"^\| `(\w+)` \| ([^|]+?) \|", PAGE.partition("## Functions")[0], re.MULTILINE)
FUNCTIONS = re.findall(r"^\| `(\w+)` \| ([^|]+?) \|", PAGE.partition("## Functions")[2], re.MULTILINE)
SAME = {
    "r": 3, "target_modules": ["up_proj"], "exclude_modules": ["lm_head"], "lora_alpha": 5, "lora_dropout": 0.25,
    "use_rslora": True, "use_dora": True, "modules_to_save": ["norm"], "init_lora_weights": "gaussian",
    "layers_to_transform": [1], "target_parameters": ["experts.down_proj"],
    "layers_pattern": ["layers"], "rank_pattern": {"up_proj": 2}, "alpha_pattern": {"up_proj": 3.0},
    "bias": "all", "lora_bias": True, "trainable_token_indices": [1, 2],
}  # fmt: skip
NEEDS = {"layers_pattern": {"layers_to_transform": [1]}}


def test_every_option_of_peft_is_in_the_table_once():
    assert sorted(name for name, _ in ROWS) == sorted(field.name for field in fields(LoraConfig))
    assert {kind for _, kind in ROWS} == {"same", "not needed", "refused"}
    assert {name for name, kind in ROWS if kind == "same"} == SAME.keys()


@pytest.mark.parametrize("name", SAME)
def test_what_is_the_same_arrives(name):
    given = {"target_modules": ["up_proj"], **NEEDS.get(name, {}), name: SAME[name]}
    value = getattr(resolve_config(llama(), LoraConfig(**given), {}), name)
    assert (list(value) if isinstance(value, tuple) else value) == SAME[name]
    assert value != getattr(AlignLoraConfig(), name)


@pytest.mark.parametrize(("name", "kind"), [(name, kind) for name, kind in ROWS if kind != "same"])
def test_what_is_refused_is_named_and_what_is_not_needed_is_taken(name, kind):
    config = LoraConfig(target_modules=["up_proj"])
    setattr(config, name, "something")
    if kind == "not needed":
        assert resolve_config(llama(), config, {}) == resolve_config(
            llama(), LoraConfig(target_modules=["up_proj"]), {}
        )
    else:
        with pytest.raises(
            ValueError, match=rf"peft\.LoraConfig has {name}='something', which these adapters have not"
        ):
            resolve_config(llama(), config, {})


def test_every_function_of_peft_is_in_the_table_once_and_ours_exist():
    known = {
        name
        for kind in (LoraModel, PeftModel)
        for name, _ in inspect.getmembers(kind, callable)
        if not name.startswith("_") and name not in dir(nn.Module)
    }
    assert sorted(name for name, _ in FUNCTIONS) == sorted(known | {"get_peft_model"})
    assert hasattr(peft, "get_peft_model")
    ours = {other.strip("`") for _, other in FUNCTIONS} - {"-", "same"}
    assert ours <= set(align_ext.__all__)
