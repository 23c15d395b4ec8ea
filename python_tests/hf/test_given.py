"""What replace_linear_with_align_lora takes for its options, and what it refuses in one line."""

import pytest
import torch
from hf.folders import logits
from peft import LoraConfig, get_peft_model
from tiny import llama
from torch import nn

from align_ext import AlignLoraConfig, adapter_report, replace_linear_with_align_lora

TAKEN = {
    "PEFT's defaults": {},
    "a list": {"r": 4, "lora_alpha": 6, "lora_dropout": 0.25, "target_modules": ["up_proj", "q_proj"]},
    "DoRA": {"target_modules": ["up_proj"], "use_dora": True},
    "a pattern": {"target_modules": r".*\.layers\.1\..*_proj", "exclude_modules": ["q_proj"], "use_rslora": True},
    "all-linear": {"target_modules": "all-linear", "init_lora_weights": "gaussian", "task_type": "CAUSAL_LM"},
    "a module": {"target_modules": ["up_proj"], "modules_to_save": ["lm_head"]},
    "all modules whose names end so": {"target_modules": ["up_proj"], "modules_to_save": ["norm"]},
}


@pytest.mark.parametrize("case", TAKEN)
def test_a_lora_config_of_peft_means_the_same_layers_ranks_and_scaling(case):
    ours = replace_linear_with_align_lora(llama(), LoraConfig(**TAKEN[case]))
    theirs = get_peft_model(llama(), LoraConfig(**TAKEN[case])).base_model.model
    expected = {name: module for name, module in theirs.named_modules() if hasattr(module, "lora_A")}
    assert set(adapter_report(ours).replaced) == expected.keys()
    for name, layer in expected.items():
        adapter = ours.get_submodule(name).adapter
        assert adapter.r == layer.r["default"]
        assert adapter.scaling == pytest.approx(layer.scaling["default"])
        assert adapter.dropout_p == getattr(layer.lora_dropout["default"], "p", 0.0)
    trained = {n.replace(".modules_to_save.default", "") for n, p in theirs.named_parameters() if p.requires_grad}
    assert {n for n in trained if "lora" not in n} == {
        n for n, p in ours.named_parameters() if p.requires_grad and "lora" not in n
    }


def test_a_dictionary_is_taken():
    model = replace_linear_with_align_lora(llama(), {"r": 3, "target_modules": ["up_proj"]})
    assert model.align_state.config == AlignLoraConfig(r=3, target_modules=["up_proj"])


BEYOND = {
    "use_qalora": True, "init_lora_weights": "olora",
}  # fmt: skip


@pytest.mark.parametrize("option", BEYOND)
def test_what_peft_has_beyond_is_refused_by_its_name(option):
    model = llama()
    with pytest.raises(ValueError, match=rf"peft\.LoraConfig has {option}="):
        replace_linear_with_align_lora(model, LoraConfig(target_modules=["up_proj"], **{option: BEYOND[option]}))
    assert all(p.requires_grad for p in model.parameters())
    assert torch.equal(logits(model), logits(llama()))


@pytest.mark.parametrize("config", ["lora", 8, ["r", 8], object(), AlignLoraConfig, nn.Linear(1, 1)])
def test_anything_else_is_refused_in_one_line(config):
    with pytest.raises(ValueError, match=r"config must be an AlignLoraConfig") as refused:
        replace_linear_with_align_lora(llama(), config)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("model", ["gpt2", None, {"a": 1}])
def test_a_model_that_is_none_is_refused(model):
    with pytest.raises(ValueError, match="model must be a torch module"):
        replace_linear_with_align_lora(model)


@pytest.mark.parametrize(
    "options",
    [{"r": "8"}, {"r": None}, {"r": 2.0}, {"lora_alpha": "a"}, {"target_modules": 5}, {"target_modules": [1]},
     {"modules_to_save": 3}, {"modules_to_save": "lm_head"}, {"align": 1}, {"architecture": None}, {"num_tasks": True}],
)  # fmt: skip
def test_options_of_wrong_types_are_refused_by_their_names(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        replace_linear_with_align_lora(llama(), options)


def test_a_model_of_which_peft_knows_no_layers_needs_target_modules():
    with pytest.raises(ValueError, match="names no target_modules, and PEFT knows none for None"):
        replace_linear_with_align_lora(nn.Sequential(nn.Linear(2, 2)), LoraConfig())
