"""Every family of models is adapted, trained with task ids, saved, loaded and merged with no option given."""

import json

import pytest
import torch
from hf.families import FAMILIES, SAMPLES, family
from peft import PeftModel
from torch import nn

from align_ext import (
    AlignLoraConfig,
    adapter_report,
    align_parts,
    load_adapter,
    merge_and_unload,
    replace_linear_with_align_lora,
    save_adapter,
)
from align_ext.base_model.default_targets import with_targets

TASKS = torch.arange(SAMPLES) % 2
OTHERS = ("vision", "visual")  # parts of models of several modalities that do not see the text


def logits(model, batch):
    with torch.no_grad():
        found = model.eval()(**{name: x for name, x in batch.items() if name not in ("labels", "return_loss")})
    return found.logits_per_text if "logits_per_text" in found else found.logits


def aligned(model, batch, padding=0):
    """Each layer's alignment, with other tokens as padding."""
    if "attention_mask" in batch:
        ids = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, padding)
        batch = batch | {"input_ids": ids}
    torch.manual_seed(0)
    model(**batch, task_ids=TASKS)
    return dict(align_parts(model).per_layer)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_is_adapted_trained_saved_loaded_and_merged_with_no_option_given(name, tmp_path):
    _, _, make_batch, ends = FAMILIES[name]
    model, batch = replace_linear_with_align_lora(family(name)), make_batch()
    adapted = adapter_report(model).replaced
    assert {end for end in ends for layer in adapted if layer.endswith(f".{end}")} == set(ends)
    assert all(layer.endswith(tuple(f".{end}" for end in ends)) for layer in adapted)
    assert not [layer for layer in adapted if any(other in layer for other in OTHERS)]

    before = logits(model, batch)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    for _ in range(2):
        model.train()(**batch, task_ids=TASKS).loss.backward()
        assert all(value > 0 for value in align_parts(model).per_layer.values())
        assert align_parts(model).per_layer.keys() == set(adapted)
        assert aligned(model, batch, padding=5) == pytest.approx(aligned(model, batch), rel=1e-4)
        optimizer.step()
        optimizer.zero_grad()
    trained = logits(model, batch)
    assert (trained - before).abs().max() > 1e-4

    save_adapter(model, tmp_path)
    assert torch.equal(logits(load_adapter(family(name), tmp_path), batch), trained)
    theirs = PeftModel.from_pretrained(family(name), tmp_path)
    torch.testing.assert_close(logits(theirs, batch), trained, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(logits(merge_and_unload(model), batch), trained, rtol=1e-4, atol=1e-5)
    saved = json.loads((tmp_path / "align_lora_config.json").read_text())["target_modules"]
    assert saved != "auto"
    assert adapter_report(replace_linear_with_align_lora(family(name), target_modules=saved)).replaced == adapted


def targets(model, **options):
    return with_targets(AlignLoraConfig(**options), model).target_modules


def test_the_names_of_the_default_are_the_shortest_that_mean_these_layers_alone():
    assert targets(family("llama")) == ("gate_proj", "up_proj", "down_proj")
    assert targets(family("gpt2")) == ("c_fc", "mlp.c_proj"), "and not the c_proj of the attention"
    assert targets(family("clip")) == tuple(f"text_model.encoder.layers.{i}.mlp.fc{j}" for i in (0, 1) for j in (1, 2))
    assert targets(family("llama"), target_modules="all-linear") == "all-linear"
    assert targets(family("llama"), architecture="mtlora") == "auto", "blocks take the place of layers"


def test_a_model_without_blocks_is_adapted_whole_but_for_its_head():
    assert targets(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 3))) == ("0", "2")
    with pytest.raises(ValueError, match=r"target_modules='auto' matches no linear layer .*: none at all"):
        replace_linear_with_align_lora(nn.Sequential(nn.Conv2d(1, 1, 1)))


class Mixed(nn.Module):
    """A block of an attention without heads, a feed-forward part and a router; and a list of heads."""

    def __init__(self):
        super().__init__()
        part = {"self_attention": nn.ModuleDict({"key": nn.Linear(8, 8)}), "route": nn.Linear(8, 3)}
        part |= {"wide": nn.Linear(8, 12), "narrow": nn.Linear(12, 8)}
        self.blocks, self.heads = nn.ModuleList([nn.ModuleDict(part)]), nn.ModuleList([nn.Linear(8, 8)])


def test_routers_attention_and_layers_outside_the_blocks_are_left_alone():
    assert targets(Mixed()) == ("wide", "narrow")
    model = Mixed()
    del model.blocks[0]["wide"], model.blocks[0]["narrow"]
    assert targets(model) == ("key",), "a router alone is no feed-forward part"
    pool = nn.ModuleDict({"key": nn.Linear(8, 8)})
    pool.num_heads = 2
    assert targets(nn.ModuleDict({"tower": nn.ModuleDict({"pool": pool, "inner": Mixed()})})) == ("wide", "narrow")


def test_a_convolution_over_the_tokens_mixes_them_and_gated_layers_stand_for_the_feed_forward_part():
    mixer = nn.ModuleDict({"inner": nn.Linear(8, 8), "conv": nn.Conv1d(8, 8, 3)})
    part = {"mixer": mixer, "wide": nn.Linear(8, 12), "narrow": nn.Linear(12, 8)}
    assert targets(nn.ModuleList([nn.ModuleDict(part)])) == ("wide", "narrow")
    part |= {f"{name}_proj": nn.Linear(8, 8) for name in ("gate", "up", "down")}
    assert targets(nn.ModuleList([nn.ModuleDict(part)])) == ("gate_proj", "up_proj", "down_proj")
    del part["up_proj"]
    assert targets(nn.ModuleList([nn.ModuleDict(part)])) == ("wide", "narrow", "gate_proj", "down_proj")


def test_other_options_choose_among_the_layers_of_the_default():
    for options, adapted in (
        ({"layers_to_transform": [1]}, ["h.1.mlp.c_fc", "h.1.mlp.c_proj"]),
        ({"exclude_modules": ["c_proj"]}, ["h.0.mlp.c_fc", "h.1.mlp.c_fc"]),
    ):
        model = replace_linear_with_align_lora(family("gpt2"), **options)
        assert adapter_report(model).replaced == [f"transformer.{name}" for name in adapted]


BLOCKS = {
    "gpt_neox": "attention mlp", "falcon": "self_attention mlp", "bloom": "self_attention mlp", "vit": "attention mlp",
    "distilbert": "attention ffn", "clip": "self_attn mlp", "llava": "self_attn mlp",
}  # fmt: skip


MIXED = [*BLOCKS, "phi3", "gpt2", "gemma", "phi", "modernbert"]


@pytest.mark.parametrize("name", MIXED)
def test_the_feed_forward_blocks_of_a_family_become_experts(name, tmp_path):
    model, batch = family(name), FAMILIES[name][2]()
    before = logits(model, batch)
    replace_linear_with_align_lora(model, architecture="mixlora", num_heads=4, r=4, align="kl", num_tasks=2)
    report = adapter_report(model)
    assert all(any(layer.endswith(f".{end}") for end in FAMILIES[name][3]) for layer in report.replaced)
    torch.testing.assert_close(logits(model, batch), before, rtol=1e-5, atol=1e-5)
    model.train()(**batch, task_ids=TASKS).loss.backward()
    assert all(value > 0 for value in align_parts(model).per_layer.values())
    assert align_parts(model).balance > 0
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    assert not torch.allclose(logits(model, batch), before, rtol=1e-3)
    save_adapter(model, tmp_path)
    assert torch.equal(logits(load_adapter(family(name), tmp_path), batch), logits(model, batch))


@pytest.mark.parametrize("name", BLOCKS)
def test_the_blocks_of_a_family_are_found_and_those_of_other_modalities_left_alone(name, tmp_path):
    model, batch = family(name), FAMILIES[name][2]()
    before = logits(model, batch)
    options = {"architecture": "mtlora", "num_heads": 2, "r": 4, "align": "kl", "num_tasks": 2}
    options["target_blocks"] = ["attention", "mlp"]
    replace_linear_with_align_lora(model, options)
    found = adapter_report(model).replaced
    assert {layer.rpartition(".")[2] for layer in found} == set(BLOCKS[name].split())
    assert len(found) == 4
    assert not [layer for layer in found if any(other in layer for other in OTHERS)]
    assert torch.equal(logits(model, batch), before)
    model.train()(**batch, task_ids=TASKS).loss.backward()
    assert all(value > 0 for value in align_parts(model).per_layer.values())
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    save_adapter(model, tmp_path)
    assert torch.equal(logits(load_adapter(family(name), tmp_path), batch), logits(model, batch))
