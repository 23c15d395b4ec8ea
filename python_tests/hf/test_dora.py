"""DoRA in a model, and between PEFT and here: the same logits and gradients, folders that both read, nothing lost."""

import json

import pytest
import torch
from hf.folders import logits, plain, trained
from hf.test_replace import gpt2, qwen2
from peft import LoraConfig, PeftModel, get_peft_model
from rich.console import Console
from tiny import batch, llama

from align_ext import (
    add_adapter,
    add_weighted_adapter,
    count_parameters,
    disable_adapter,
    export_peft,
    flops_per_token,
    load_adapter,
    merge_and_unload,
    replace_linear_with_align_lora,
    save_adapter,
    set_adapter,
    unload,
)
from align_ext.adapters.adapted_block import adapted_layers
from align_ext.cli import convert
from align_ext.io.peft_format import PEFT_CONFIG
from align_ext.merging.arithmetic import read_lora
from align_ext.system.tensors import read_tensors, write_tensors

BASES = {"llama": (llama, ["up_proj", "q_proj"]), "gpt2": (gpt2, ["c_fc"]), "qwen2": (qwen2, ["q_proj"])}


def of_peft(base, dtype=torch.float64):
    """A PeftModel with DoRA whose A, B and m hold no value of their start."""
    make, targets = BASES[base]
    config = LoraConfig(r=4, lora_alpha=6, use_dora=True, target_modules=targets, fan_in_fan_out=base == "gpt2")
    model = get_peft_model(make().to(dtype), config, autocast_adapter_dtype=False)
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def step(model):
    model.zero_grad()
    output = model(**batch()[0])
    output.loss.backward()
    return output.logits.detach()


@pytest.mark.parametrize("base", BASES)
def test_an_adopted_model_has_pefts_parameters_logits_and_gradients(base):
    model = of_peft(base)
    expected = step(model)
    trained = {id(p): p.grad.clone() for p in model.parameters() if p.requires_grad}
    assert len(trained) % 3 == 0
    ours = replace_linear_with_align_lora(model, align=None).eval()
    assert ours.align_state.config.use_dora
    assert {id(p) for p in ours.parameters() if p.requires_grad} == trained.keys()
    assert (step(ours) - expected).abs().max() < 1e-12 * expected.abs().max()
    for parameter in ours.parameters():
        if parameter.requires_grad:
            grad = trained[id(parameter)]
            assert (parameter.grad - grad).abs().max() < 1e-10 * grad.abs().max()


@pytest.mark.parametrize("base", BASES)
def test_pefts_folder_loads_and_ours_is_pefts(base, tmp_path):
    model, make = of_peft(base, torch.float32), BASES[base][0]
    model.save_pretrained(tmp_path / "theirs")
    ours = load_adapter(make(), tmp_path / "theirs")
    torch.testing.assert_close(logits(ours), logits(model), rtol=1e-5, atol=1e-6)
    save_adapter(ours, tmp_path / "ours")
    assert torch.equal(logits(load_adapter(make(), tmp_path / "ours")), logits(ours))
    again = PeftModel.from_pretrained(make(), tmp_path / "ours")
    torch.testing.assert_close(logits(again), logits(model), rtol=0, atol=0)


def test_off_it_is_the_base_and_merged_it_is_itself():
    model, inputs = trained("DoRA", lora_dropout=0.3).eval(), batch()[0]
    expected = logits(model)
    with torch.no_grad(), disable_adapter(model):
        assert torch.equal(model(**inputs).logits, plain().eval()(**inputs).logits)
    assert torch.equal(logits(model), expected)
    torch.testing.assert_close(logits(merge_and_unload(model)), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(logits(unload(trained("DoRA"))), logits(plain()))


@pytest.mark.parametrize("kind", ["DoRA", "m_lora, DoRA"])
def test_what_vllm_and_llama_cpp_cannot_read_is_not_written_for_them(kind, tmp_path):
    with pytest.raises(ValueError, match=r"use_dora=True: vLLM and llama\.cpp read no DoRA: merge the adapter"):
        export_peft(trained(kind), tmp_path / "x")
    assert not (tmp_path / "x").exists()
    save_adapter(trained(kind), tmp_path / "adapter")
    request = convert.Request(str(tmp_path / "adapter"), "no/such/model", str(tmp_path / "x"), None, False)
    with pytest.raises(ValueError, match=r"use_dora=True: vLLM and llama\.cpp read no DoRA"):  # before a base is loaded
        convert.export(request, False, Console())
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("kind", ["DoRA", "m_lora, DoRA"])
def test_adapters_of_dora_are_not_added_up(kind, tmp_path):
    save_adapter(trained(kind), tmp_path)
    with pytest.raises(ValueError, match="only plain LoRA adapters can be composed: it is DoRA"):
        read_lora(tmp_path)
    with pytest.raises(ValueError, match="only plain LoRA adapters can be composed: it is DoRA"):
        add_weighted_adapter(trained(kind), ["default"], [0.5], "half")


def test_it_is_one_of_several_adapters_of_a_model():
    model = trained("lora").eval()
    first = logits(model)
    other = trained("DoRA").align_state.config
    add_adapter(model, "dora", other)
    set_adapter(model, "dora")
    assert torch.equal(logits(model), logits(plain()))  # at its start
    for layer in adapted_layers(model).values():
        layer.adapter.lora_magnitude_vector.data.mul_(2)
    assert not torch.allclose(logits(model), logits(plain()))
    set_adapter(model, "default")
    assert torch.equal(logits(model), first)


@pytest.mark.parametrize("said", [True, False])
def test_a_folder_whose_files_disagree_is_refused(said, tmp_path):
    of_peft("llama").save_pretrained(tmp_path) if not said else get_peft_model(
        llama(), LoraConfig(target_modules=["up_proj"])
    ).save_pretrained(tmp_path)
    config = json.loads((tmp_path / PEFT_CONFIG).read_text())
    (tmp_path / PEFT_CONFIG).write_text(json.dumps(config | {"use_dora": said}))
    with pytest.raises(ValueError, match=f"has use_dora={said}, but .* of DoRA: one of them was edited"):
        load_adapter(llama(), tmp_path)


def test_it_is_loaded_only_into_its_own_kind(tmp_path):
    save_adapter(trained("DoRA"), tmp_path)
    with pytest.raises(ValueError, match="has use_dora=True, the model's adapters use_dora=False"):
        load_adapter(trained("lora"), tmp_path)
    save_adapter(trained("lora"), tmp_path)
    with pytest.raises(ValueError, match="has use_dora=False, the model's adapters use_dora=True"):
        load_adapter(trained("DoRA"), tmp_path)


@pytest.mark.parametrize("kind", ["lora", "m_lora"])
def test_a_folder_from_before_dora_loads(kind, tmp_path):
    model = trained(kind)
    save_adapter(model, tmp_path)
    for file in tmp_path.glob("*.json"):
        content = json.loads(file.read_text())
        assert content.pop("use_dora") is False
        file.write_text(json.dumps(content))
    for file in tmp_path.glob("*.safetensors"):
        tensors, record = read_tensors(file)
        record.get("options", {}).pop("use_dora", None)
        write_tensors(file, tensors, {key: value for key, value in record.items() if key != "tensors"})
    assert torch.equal(logits(load_adapter(plain(), tmp_path)), logits(model))


def test_parameters_and_operations_are_counted():
    dora, lora = trained("DoRA", lora_dropout=0.1), trained("lora", lora_dropout=0.1)
    layers = [module for module in dora.modules() if hasattr(module, "adapter")]
    outputs = sum(layer.out_features for layer in layers)
    assert count_parameters(dora).trainable - count_parameters(lora).trainable == outputs
    again = sum(2 * layer.in_features * layer.out_features for layer in layers)  # the base's product with dropout(x)
    assert flops_per_token(dora).adapters - flops_per_token(lora).adapters == again
    with_masks_on_latents = trained("m_lora, DoRA", lora_dropout=0.1), trained("m_lora", lora_dropout=0.1)
    one, other = (flops_per_token(model).adapters for model in with_masks_on_latents)
    assert one == other
