"""Bases of the same weights that compute something else: an adapter is refused on them, by the entry that differs."""

import dataclasses
import json

import pytest
import torch
from hf.words import llama, model_folder, qwen2, tokenizer, write_rows
from hostile import refused
from transformers import AutoConfig, AutoModelForCausalLM, Gemma3TextConfig, Mamba2Config, Qwen3MoeConfig

from align_ext import AlignLoraConfig, load_adapter, replace_linear_with_align_lora, save_adapter
from align_ext.base_model.computing_config import computing_entries, first_difference
from align_ext.base_model.fingerprint import BaseModel
from align_ext.system.reading import parse_json


def changed(model=llama, **entries):
    """A model of the same weights, and another configuration."""
    before = model()
    config = type(before.config).from_dict(before.config.to_dict() | entries)
    after = type(before)(config)
    after.load_state_dict(before.state_dict())
    return after


COMPUTES = {
    "num_attention_heads": ({"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16}, "is 2, not 4"),
    "hidden_act": ({"hidden_act": "gelu"}, "is 'gelu', not 'silu'"),
    "rms_norm_eps": ({"rms_norm_eps": 1e-3}, "is 0.001, not 1e-06"),
    "rope_parameters.rope_theta": (
        {"rope_parameters": {"rope_type": "default", "rope_theta": 50.0}},
        "is 50.0, not 10000.0",
    ),
}
SCALED = {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}
WITHOUT_EFFECT = {
    "attention_dropout": 0.3,
    "initializer_range": 0.5,
    "use_cache": False,
    "bos_token_id": 7,
    "pad_token_id": 5,
    "architectures": ["X"],
    "dtype": "bfloat16",
    "max_position_embeddings": 77,  # rotations are computed
    "pretraining_tp": 3,
    "id2label": {0: "a", 1: "b", 2: "c"},
    "name_or_path": "elsewhere",
    "some_new_entry": 5,
    "rms_norm_eps": 9.99999997e-07,  # float32's 1e-6
}


@pytest.fixture
def folder(tmp_path):
    save_adapter(replace_linear_with_align_lora(llama(), AlignLoraConfig(align=None, r=2)), tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.mark.parametrize("entry", COMPUTES)
def test_the_same_weights_with_another_entry_are_another_base(entry, folder):
    entries, values = COMPUTES[entry]
    other = changed(**entries)
    ids = torch.arange(5, 15)[None]
    assert not torch.allclose(other(ids).logits, llama()(ids).logits, atol=1e-6), "it computes something else"
    said = refused(load_adapter, other, folder, match="the weights are the same, but of the configuration")
    assert f"{entry} {values};" in said
    load_adapter(other, folder, force=True)


def test_stretched_rotations_are_another_base_and_so_is_their_length(folder, tmp_path):
    refused(load_adapter, changed(rope_parameters=SCALED), folder, match=r"rope_parameters\.rope_type is 'linear'")
    linear = BaseModel.of(changed(rope_parameters=SCALED))
    refused(linear.check, changed(rope_parameters=SCALED | {"factor": 2.0}), match="factor is 2.0, not 4.0")
    once = BaseModel.of(changed(rope_parameters=YARN))
    refused(once.check, changed(rope_parameters=YARN | {"attention_factor": 2.0}), match="factor is 2.0, not None")
    refused(BaseModel.of(llama()).check, changed(rope_parameters=YARN), match="rope_parameters")
    record = BaseModel.of(changed(rope_parameters=SCALED))
    refused(record.check, changed(rope_parameters=SCALED, max_position_embeddings=64), match="max_position_embeddings")


@pytest.mark.parametrize("entry", WITHOUT_EFFECT)
def test_what_does_not_decide_the_computation_may_differ(entry, folder):
    load_adapter(changed(**{entry: WITHOUT_EFFECT[entry]}), folder)


def test_a_window_counts_where_it_is_used():
    window = {"sliding_window": 4, "use_sliding_window": True, "layer_types": ["sliding_attention"] * 2}
    record = BaseModel.of(qwen2())
    refused(record.check, changed(qwen2, **window), match="of the configuration")
    record.check(changed(qwen2, attention_dropout=0.5))


def test_a_folder_without_a_record_of_the_configuration_is_read_as_before():
    model = llama()
    old = BaseModel.of(model).to_dict()
    del old["config"]
    BaseModel.from_dict(old).check(changed(hidden_act="gelu"))
    for config in (None, 5, [], "x"):
        refused(BaseModel.from_dict, old | {"config": config}, match="damaged")


@pytest.mark.parametrize("kind", [Mamba2Config, Gemma3TextConfig, Qwen3MoeConfig])
def test_the_record_is_plain_json_whatever_the_configuration_holds(kind):
    entries = computing_entries(kind())  # Mamba's time_step_limit is infinite
    again = parse_json(json.dumps(entries, allow_nan=False))
    assert first_difference(again, computing_entries(kind())) is None
    assert entries.keys() >= {"model_type", "hidden_size"}
    assert not any("dropout" in name or name.endswith("_token_id") for name in entries)


def test_entries_of_parts_are_compared_by_name():
    config = AutoConfig.for_model("gemma3")
    entries = computing_entries(config)
    config.text_config.rms_norm_eps = 0.5
    assert first_difference(entries, computing_entries(config)) == "text_config.rms_norm_eps is 0.5, not 1e-06"
    config.text_config.rms_norm_eps = 1e-6
    config.text_config.vocab_size += 8
    assert first_difference(entries, computing_entries(config)) is None


def test_a_configuration_that_says_nothing_is_not_compared():
    model = torch.nn.Linear(2, 2)
    for config in (None, {"a": 1}, object()):
        model.config = config
        assert BaseModel.of(model).config == {}
    assert dataclasses.replace(BaseModel.of(model), config={"a": 1}).check(model) is None


def test_every_command_refuses_another_configuration_and_goes_on_by_force(run, tmp_path):
    base = model_folder(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(base)
    save_adapter(replace_linear_with_align_lora(model, AlignLoraConfig(align=None, r=2)), tmp_path / "a")
    changed(rms_norm_eps=0.01).save_pretrained(tmp_path / "other")
    tokenizer().save_pretrained(tmp_path / "other")
    rows = [{"task": "a", "prompt": "x?", "answer": "y"}]
    evaluation = ["eval", "--adapter", tmp_path / "a", "--data", write_rows(tmp_path / "rows.jsonl", rows)]
    for command in (
        ["merge", tmp_path / "a", "--output", "m"],
        ["export", tmp_path / "a", "--output", "e"],
        evaluation,
    ):
        code, _, err = run(*command, "--model", tmp_path / "other")
        assert code == 2
        assert "rms_norm_eps is 0.01, not 1e-06" in err
        assert "--force" in err
        assert run(*command, "--model", tmp_path / "other", "--force")[0] == 0
