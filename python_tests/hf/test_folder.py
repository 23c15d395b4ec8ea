"""Folders of every architecture: the same bits for us, the same logits for stock PEFT, errors for what is damaged."""

import json
import math
import os

import pytest
import torch
from hf.folders import (
    ARCHITECTURES,
    BLOCKS,
    DORA,
    MIXTURES,
    MODELS,
    ONE_LORA,
    ROUTED,
    TASKED,
    TASKS,
    assert_same_bits,
    files,
    logits,
    plain,
    state,
    trained,
)
from peft import PeftModel
from safetensors.torch import load_file
from tiny import batch
from torch import nn

from align_ext import (
    export_peft,
    load_adapter,
    merge_and_unload,
    replace_linear_with_align_lora,
    save_adapter,
    set_task,
)
from align_ext.io.adapter_folder import AdapterFolder

WEIGHTS, STATE = "adapter_model.safetensors", "align_lora_heads.safetensors"
CARD, PEFT_CONFIG, OUR_CONFIG = "README.md", "adapter_config.json", "align_lora_config.json"
KEY = "model.layers.0.mlp.up_proj"
each_model = pytest.mark.parametrize("base", MODELS)


@each_model
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_what_is_loaded_is_what_was_saved_to_the_bit(kind, base, tmp_path):
    model = trained(kind, base)
    save_adapter(model, tmp_path / "adapter")
    generator = torch.get_rng_state()
    loaded = load_adapter(plain(base), tmp_path / "adapter")
    assert torch.equal(torch.get_rng_state(), generator)  # no first values are drawn that nobody needs
    assert loaded.align_state.config == model.align_state.config
    assert_same_bits(state(loaded), state(model))
    for task in range(TASKS) if kind in TASKED else [None]:
        assert torch.equal(logits(loaded, task), logits(model, task))


@each_model
@pytest.mark.parametrize("kind", ONE_LORA | DORA)
def test_stock_peft_and_the_merged_model_compute_the_same(kind, base, tmp_path):
    model = trained(kind, base)
    save_adapter(model, tmp_path / "adapter")
    expected = logits(model)
    assert (expected - logits(plain(base))).abs().max() > 1e-2
    theirs = PeftModel.from_pretrained(plain(base), tmp_path / "adapter")
    torch.testing.assert_close(logits(theirs), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits(merge_and_unload(model)), expected, rtol=1e-5, atol=1e-5)
    keys = load_file(tmp_path / "adapter" / WEIGHTS)
    ends = ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector")
    ends = (".lora_A", ".lora_E", ".lora_B") if kind == "adalora" else ends
    assert all(key.startswith("base_model.model.") and key.endswith(ends) for key in keys)


@each_model
def test_stock_peft_computes_the_same_from_each_tasks_folder(base, tmp_path):
    model = trained("multi_adapter", base)
    save_adapter(model, tmp_path, task_names=["a", "b b", "ü"])
    for task, name in enumerate(["a", "b b", "ü"]):
        expected = logits(model, task)
        theirs = PeftModel.from_pretrained(plain(base), tmp_path / "tasks" / name)
        torch.testing.assert_close(logits(theirs), expected, rtol=1e-5, atol=1e-5)
        ours = load_adapter(plain(base), tmp_path / "tasks" / name)
        torch.testing.assert_close(logits(ours), expected, rtol=1e-5, atol=1e-5)
    assert json.loads((tmp_path / OUR_CONFIG).read_text())["task_names"] == ["a", "b b", "ü"]
    assert model.align_state.task == TASKS - 1  # as set_task left it


@pytest.mark.parametrize("kind", ROUTED | BLOCKS | MIXTURES)
def test_an_adapter_that_peft_has_no_form_of_is_nothing_that_peft_would_misread(kind, tmp_path):
    model = trained(kind)
    save_adapter(model, tmp_path / "adapter")
    assert files(tmp_path / "adapter") == [CARD, OUR_CONFIG, STATE]
    with pytest.raises(ValueError, match=r"Can't find 'adapter_config\.json'"):
        PeftModel.from_pretrained(plain(), tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"PEFT has no form of this adapter: .*(router|blocks)"):
        export_peft(model, tmp_path / "exported")
    assert not (tmp_path / "exported").exists()


def test_the_peft_form_of_two_heads_and_their_offset_by_hand(tmp_path):
    model = nn.Sequential(nn.Linear(2, 2, bias=False))
    options = {"architecture": "m_lora", "num_heads": 2, "r": 1, "lora_alpha": 3, "target_modules": ["0"]}
    replace_linear_with_align_lora(model, **options)
    adapter = model[0].adapter
    with torch.no_grad():
        adapter.lora_A.copy_(torch.tensor([[1.0, 2.0]]))
        adapter.lora_B.copy_(torch.tensor([[[1.0], [0.0]], [[4.0], [-1.0]]]))
        adapter.lora_A0.copy_(torch.tensor([[3.0, 0.0]]))
        adapter.lora_B0.copy_(torch.tensor([[0.0], [7.0]]))
    export_peft(model, tmp_path / "adapter")
    tensors = load_file(tmp_path / "adapter" / WEIGHTS)
    assert tensors["base_model.model.0.lora_A.weight"].tolist() == [[1, 2], [3, 0]]
    assert tensors["base_model.model.0.lora_B.weight"].tolist() == [[5, 0], [-1, -7]]
    config = json.loads((tmp_path / "adapter" / PEFT_CONFIG).read_text())
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (2, 6, False)  # 6 / 2 = 3 / 1


def test_alpha_grows_by_the_root_of_two_with_rslora(tmp_path):
    save_adapter(trained("m_lora, rslora"), tmp_path)
    config = json.loads((tmp_path / PEFT_CONFIG).read_text())
    assert config["use_rslora"]
    assert math.isclose(config["lora_alpha"] / math.sqrt(config["r"]), 5 / math.sqrt(3))


@pytest.mark.parametrize("kind", [*ONE_LORA, *TASKED])
def test_an_exported_folder_is_stock_pefts_alone_and_both_load_it(kind, tmp_path):
    model, task = trained(kind), 1 if kind in TASKED else None
    export_peft(model, tmp_path / "adapter", task=task)
    assert files(tmp_path / "adapter") == [CARD, PEFT_CONFIG, WEIGHTS]
    expected = logits(model, task)
    for reader in (PeftModel.from_pretrained, load_adapter):
        loaded = reader(plain(), tmp_path / "adapter")
        torch.testing.assert_close(logits(loaded), expected, rtol=1e-5, atol=1e-5)


def test_a_task_has_to_be_named_and_to_exist_for_its_export(tmp_path):
    model = trained("multi_adapter")
    with pytest.raises(ValueError, match="name one with set_task"):
        export_peft(model, tmp_path / "x")
    with pytest.raises(ValueError, match="task=3: the model has an adapter for each of 3 tasks"):
        export_peft(model, tmp_path / "x", task=3)
    with pytest.raises(ValueError, match="each of 0 tasks"):
        export_peft(trained("lora"), tmp_path / "x", task=0)
    set_task(model, 2)
    export_peft(model, tmp_path / "x")
    torch.testing.assert_close(logits(load_adapter(plain(), tmp_path / "x")), logits(model), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["multi_adapter", "hydra"])
def test_tasks_beyond_those_that_are_named_are_called_by_their_numbers(kind, tmp_path):
    model = trained(kind, num_tasks=5)
    save_adapter(model, tmp_path, task_names=["a", "b", "c"])
    assert AdapterFolder.read(tmp_path).task_names == ("a", "b", "c", "3", "4")
    again = load_adapter(plain(), tmp_path)
    if kind == "multi_adapter":
        assert sorted(os.listdir(tmp_path / "tasks")) == ["3", "4", "a", "b", "c"]
        for each in (model, again):
            set_task(each, 4)
    torch.testing.assert_close(logits(again), logits(model), rtol=0, atol=0)


@pytest.mark.parametrize(
    "names",
    [list("abcd"), "abc", None, ["2", "b"], ["a", None, "c"], ["a", "b", "a"], ["a", "b", "../c"], [".."], ["a", ""]],
)
def test_task_names_that_do_not_fit_are_refused(names, tmp_path):
    with pytest.raises(ValueError, match="task_names"):
        save_adapter(trained("multi_adapter"), tmp_path / "adapter", task_names=names)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "kind", ["align_lora", "PiSSA", "m_lora, rslora", "multi_adapter", "r_lora", "mtlora beside blocks"]
)
def test_training_goes_on_to_the_bit(kind, tmp_path):
    def step(model):
        torch.manual_seed(3)  # of the dropout
        inputs, tasks = batch()
        inputs["labels"][:, :4] = -100
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
        model.train()(**inputs, **({"task_ids": tasks} if model.align_state.config.needs_ids else {})).loss.backward()
        optimizer.step()
        return state(model)

    model = trained(kind, lora_dropout=0.2, spectral_steps=8) if kind != "align_lora" else trained(kind)
    save_adapter(model, tmp_path)
    loaded, before = load_adapter(plain(), tmp_path), state(model)
    after = step(model)
    assert any(not torch.equal(after[name], before[name]) for name in before)
    assert_same_bits(step(loaded), after)
    if "lora_age" in "".join(after):
        assert {int(tensor) for name, tensor in after.items() if name.endswith("lora_age")} == {8}


def test_layers_of_different_ranks_and_scalings_keep_their_weights_as_they_are(tmp_path):
    from peft import LoraConfig, get_peft_model

    options = {"rank_pattern": {"down_proj": 2}, "alpha_pattern": {"down_proj": 10}}
    peft = get_peft_model(plain(), LoraConfig(r=4, target_modules=["up_proj", "down_proj"], **options))
    for name, p in peft.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p, std=0.1)
    peft.save_pretrained(tmp_path / "theirs")
    expected = logits(peft)
    torch.testing.assert_close(logits(load_adapter(plain(), tmp_path / "theirs")), expected)
    model = replace_linear_with_align_lora(peft, align=None)
    save_adapter(model, tmp_path / "adapter")
    export_peft(model, tmp_path / "exported")
    loaded = load_adapter(plain(), tmp_path / "adapter")
    assert torch.equal(logits(loaded), logits(model))
    named = {name.removeprefix("base_model.model."): tensor for name, tensor in state(model).items()}
    assert_same_bits(state(loaded), named)
    for folder in ("adapter", "exported"):
        torch.testing.assert_close(logits(PeftModel.from_pretrained(plain(), tmp_path / folder)), expected)
    torch.testing.assert_close(logits(load_adapter(plain(), tmp_path / "exported")), expected)


@pytest.mark.parametrize(
    ("kind", "other", "option"),
    [
        ("m_lora", {"r": 5}, "r=3"),
        ("lora", {"lora_alpha": 7}, "lora_alpha=5"),
        ("m_lora", {"use_rslora": True}, "use_rslora=False"),
        ("m_lora", {"num_heads": 2}, "num_heads=3"),
        ("m_lora", {"reduce": "mean"}, "reduce='sum'"),
        ("m_lora", {"init_lora_weights": "kaiming", "lora_dropout": 0.1}, "init_lora_weights='random_heads'"),
        ("m_lora, rslora", {"spectral": "uniform"}, "spectral='paper'"),
        ("m_lora", {"architecture": "r_lora"}, "architecture='m_lora'"),
        ("lora_moe", {"top_k": 1}, "top_k=2"),
        ("hydra", {"router_temperature": 2.0}, "router_temperature=1.0"),
        ("multi_adapter", {"num_tasks": 4}, "num_tasks=3"),
        ("mtlora", {"routing_groups": 4}, "routing_groups=2"),
        ("lora", {"target_modules": ["up_proj"]}, r"target_modules=\('up_proj', 'down_proj'\) in the folder"),
    ],
)
def test_a_model_adapted_with_other_options_is_refused_by_the_options_name(kind, other, option, tmp_path):
    save_adapter(trained(kind), tmp_path)
    model = trained(kind, **other)
    before = state(model)
    with pytest.raises(ValueError, match=option):
        load_adapter(model, tmp_path)
    assert_same_bits(state(model), before)


def test_options_of_the_training_alone_may_differ(tmp_path):
    model = trained("align_lora")
    save_adapter(model, tmp_path)
    other = trained("lora", lora_dropout=0.3, init_lora_weights="gaussian")
    assert torch.equal(logits(load_adapter(other, tmp_path)), logits(model))


def test_weights_are_widened_but_never_rounded(tmp_path):
    double = trained("m_lora", dtype=torch.float64)
    save_adapter(double, tmp_path / "double")
    with pytest.raises(ValueError, match=r"is torch\.float64, which the model's torch\.float32 would round"):
        load_adapter(plain(), tmp_path / "double")
    half = trained("m_lora", dtype=torch.bfloat16, adapter_dtype="base")
    save_adapter(half, tmp_path / "half")
    assert load_file(tmp_path / "half" / STATE)[f"{KEY}.lora_A"].dtype == torch.bfloat16
    loaded = load_adapter(plain(), tmp_path / "half")
    assert_same_bits(
        state(loaded), {name: tensor.to(state(loaded)[name].dtype) for name, tensor in state(half).items()}
    )
