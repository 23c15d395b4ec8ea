"""Ranks and alphas of single layers, and layers by number: the layers, ranks and outputs are those of stock PEFT."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tiny import batch, llama

from align_ext import (
    AlignLoraConfig,
    align_parts,
    count_parameters,
    export_peft,
    load_adapter,
    replace_linear_with_align_lora,
    save_adapter,
)
from align_ext.adapters.adapted_block import adapted_layers
from align_ext.model.cost import trained_parameters
from align_ext.training.options import TrainOptions

CASES = {
    "ranks": {"rank_pattern": {"down_proj": 3, "layers.0.mlp.up_proj": 5}},
    "alphas": {"alpha_pattern": {"down_proj": 3.0}},
    "an expression": {"rank_pattern": {r"layers\.0\..*": 2}, "alpha_pattern": {r"layers\.\d\.mlp\.up_proj": 7}},
    "the first counts": {"rank_pattern": {"up_proj": 6, "layers.0.mlp.up_proj": 5}},
    "rslora": {"rank_pattern": {"down_proj": 3}, "use_rslora": True},
    "one layer": {"layers_to_transform": 1},
    "layers of a list": {"layers_to_transform": [0], "layers_pattern": "layers"},
    "one layer, and what is in none by its whole name": {
        "layers_to_transform": 1,
        "target_modules": ["up_proj", "down_proj", "lm_head"],
    },
}
BASE = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.0, "target_modules": ["up_proj", "down_proj"]}


def filled(model):
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.copy_(0.1 * torch.randn(p.shape, generator=generator))
    return model


def logits(model):
    with torch.no_grad():
        return model.eval()(batch()[0]["input_ids"]).logits


@pytest.mark.parametrize("case", CASES)
def test_layers_ranks_and_scalings_are_those_of_stock_peft(case, tmp_path):
    options = BASE | CASES[case]
    config = AlignLoraConfig(architecture="lora", **options)
    ours, stock = replace_linear_with_align_lora(llama(), config), get_peft_model(llama(), LoraConfig(**options))
    found = {name: (layer.adapter.r, layer.adapter.scaling) for name, layer in adapted_layers(ours).items()}
    assert found == {
        name.removeprefix("base_model.model."): (module.r["default"], module.scaling["default"])
        for name, module in stock.named_modules()
        if hasattr(module, "lora_A")
    }
    assert trained_parameters(config, llama()) == count_parameters(ours).trainable
    before = logits(filled(ours))
    save_adapter(ours, tmp_path / "ours")
    assert torch.equal(logits(load_adapter(llama(), tmp_path / "ours")), before)
    export_peft(ours, tmp_path / "peft")
    torch.testing.assert_close(logits(PeftModel.from_pretrained(llama(), tmp_path / "peft")), before)
    given = adapted_layers(replace_linear_with_align_lora(llama(), LoraConfig(**options)))
    assert {name: (layer.adapter.r, layer.adapter.scaling) for name, layer in given.items()} == found


def test_every_linear_layer_of_some_layers():
    model = replace_linear_with_align_lora(llama(), align=None, target_modules="all-linear", layers_to_transform=(1,))
    names = list(adapted_layers(model))
    assert len(names) == 7
    assert all(name.startswith("model.layers.1.") for name in names)


@pytest.mark.parametrize("architecture", ["align_lora", "hydra", "r_lora", "m_lora", "multi_adapter", "lora_moe"])
def test_every_architecture_is_aligned_and_trained_with_ranks_of_its_layers(architecture):
    config = AlignLoraConfig(architecture=architecture, align="kl", num_tasks=3, rank_pattern={"layers.0.*": 2})
    model = filled(replace_linear_with_align_lora(llama(), config)).train()
    inputs, ids = batch()
    model(**inputs, task_ids=ids).loss.backward()
    assert align_parts(model).align > 0
    ranks = {name: layer.adapter.lora_A.shape[-2] for name, layer in adapted_layers(model).items()}
    assert set(ranks.values()) == {2, 8}
    assert all(r == (2 if "layers.0" in name else 8) for name, r in ranks.items())
    assert all(p.grad is not None and p.grad.any() for name, p in model.named_parameters() if "lora_A" in name)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank_pattern": {"up_proj": 0}}, "rank_pattern must be a positive integer for each name"),
        ({"rank_pattern": {3: 1}}, "rank_pattern must be values by the names of layers"),
        ({"alpha_pattern": {"up_proj": -1.0}}, "alpha_pattern must be a positive number for each name"),
        ({"layers_to_transform": [-1]}, "layers_to_transform must be numbers of layers"),
        ({"layers_to_transform": [0], "target_modules": ".*up_proj"}, "target_modules is a regular expression"),
        ({"layers_pattern": ["layers"]}, "it does nothing without layers_to_transform"),
        ({"layers_to_transform": [9]}, "no layer was adapted"),
        ({"rank_pattern": {"up_proj": 49}, "init_lora_weights": "pissa"}, "r=49 is above the 48 singular directions"),
        ({"rank_pattern": {"up(": 2}}, "is no regular expression"),
        ({"architecture": "mtlora", "rank_pattern": {"up_proj": 2}}, "whole blocks are adapted"),
    ],
)
def test_what_cannot_be_says_so(options, message):
    with pytest.raises(ValueError, match=message):
        replace_linear_with_align_lora(llama(), **{"num_tasks": 2, **options})


def test_the_command_takes_them():
    given = {"rank_pattern": "q_proj=4,v_proj=2", "alpha_pattern": {"q_proj": 8}, "layers_to_transform": "0,2"}
    config = TrainOptions.from_mapping({**given, "layers_pattern": "layers"}).adapter_config(2)
    assert (config.rank_pattern, config.alpha_pattern) == ({"q_proj": 4, "v_proj": 2}, {"q_proj": 8})
    assert (config.layers_to_transform, config.layers_pattern) == ((0, 2), ("layers",))
    assert AlignLoraConfig.from_dict(config.to_dict()) == config
