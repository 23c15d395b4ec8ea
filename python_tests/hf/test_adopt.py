"""PEFT models that come with adapters: what can be taken over exactly is, everything else is refused by its name."""

import pytest
import torch
from hf.folders import logits
from peft import LoHaConfig, LoraConfig, PeftModel, PromptTuningConfig, get_peft_model, inject_adapter_in_model
from tiny import VOCAB, llama, qwen2

from align_ext import adapter_report, load_adapter, replace_linear_with_align_lora, save_adapter, unload


def with_peft(**options):
    return get_peft_model(llama(), LoraConfig(**{"target_modules": ["up_proj"]} | options))


def mixtral(**options):
    from transformers import MixtralConfig, MixtralForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_local_experts": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    model = MixtralForCausalLM(MixtralConfig(**sizes, **heads, vocab_size=VOCAB))
    return get_peft_model(model, LoraConfig(**options))


def second_adapter():
    model = with_peft()
    model.add_adapter("second", LoraConfig(target_modules=["up_proj"]))
    return model


def switched_off():
    model = with_peft()
    model.base_model.disable_adapter_layers()
    return model


def for_inference(**options):
    return with_peft(**options).requires_grad_(False)


def with_biases(bias):
    """For inference: nothing tells any more that its biases were trained."""
    model = get_peft_model(qwen2(), LoraConfig(target_modules=["q_proj"], bias=bias))
    return model.requires_grad_(False)


def with_a_trained_base_layer():
    model = with_peft()
    model.get_base_model().model.layers[0].mlp.up_proj.base_layer.requires_grad_(True)
    return model


def injected(start):
    return inject_adapter_in_model(LoraConfig(target_modules=["up_proj"], init_lora_weights=start), llama())


UNFIT = {
    "PiSSA": (lambda: with_peft(init_lora_weights="pissa"), "init_lora_weights='pissa', which changes .* base"),
    "fast PiSSA": (lambda: with_peft(init_lora_weights="pissa_niter_2"), "init_lora_weights='pissa_niter_2'"),
    "OLoRA": (lambda: with_peft(init_lora_weights="olora"), "init_lora_weights='olora'"),
    "MiCA": (lambda: with_peft(init_lora_weights="mica"), "init_lora_weights='mica'"),
    "without a PeftModel": (lambda: injected("olora"), "init_lora_weights='olora'"),
    "repeated layers": (lambda: with_peft(layer_replication=[[0, 2], [1, 2]]), "layer_replication"),
    "experts": (
        lambda: mixtral(target_modules=["q_proj"], target_parameters=["mlp.experts.gate_up_proj"]),
        "experts cannot be adopted.*load the folder into the base model by load_adapter",
    ),
    "a layer's parameter": (
        lambda: mixtral(target_modules=["v_proj"], target_parameters=["q_proj.weight"]),
        "q_proj cannot be adopted",
    ),
    "biases of its layers": (lambda: with_biases("lora_only"), "bias='lora_only'.*load_adapter the folder"),
    "all biases": (lambda: with_biases("all"), "bias='all'.*load_adapter the folder"),
    "an adapted layer's own weight": (with_a_trained_base_layer, r"also trains .*base_layer\.weight"),
    "two adapters": (second_adapter, "several PEFT adapters"),
    "an adapter that is off": (switched_off, "disabled: enable it first"),
    "aLoRA": (lambda: for_inference(alora_invocation_tokens=[1]), "a variant .ALoraLinearVariant. that plain LoRA"),
    "tokens": (lambda: for_inference(trainable_token_indices=[1, 2]), "embed_tokens in a way that cannot be adopted"),
    "another method": (
        lambda: get_peft_model(llama(), LoHaConfig(target_modules=["up_proj"])),
        "of type LOHA, which cannot be adopted",
    ),
    "prompts": (
        lambda: get_peft_model(llama(), PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")),
        "of type PROMPT_TUNING",
    ),
}


@pytest.mark.parametrize("case", UNFIT)
def test_what_a_plain_lora_cannot_take_over_is_refused_and_the_model_left_as_it_was(case):
    make, message = UNFIT[case]
    torch.manual_seed(0)
    model = make()
    before = [(n, type(m)) for n, m in model.named_modules()], [p.requires_grad for p in model.parameters()]
    with pytest.raises(ValueError, match=message):
        replace_linear_with_align_lora(model, target_modules="all-linear")
    after = [(n, type(m)) for n, m in model.named_modules()], [p.requires_grad for p in model.parameters()]
    assert after == before


@pytest.mark.parametrize("start", [True, "gaussian", "orthogonal"])
def test_a_start_beside_the_untouched_base_is_adopted(start):
    for model in (with_peft(init_lora_weights=start), injected(start)):
        assert len(adapter_report(replace_linear_with_align_lora(model)).adopted) == 2


def test_modules_that_peft_trains_whole_are_adopted_with_their_values(tmp_path):
    torch.manual_seed(4)
    peft = with_peft(modules_to_save=["lm_head", "model.norm"])
    with torch.no_grad():
        for parameter in peft.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    expected = logits(peft)
    trained = {id(p) for p in peft.parameters() if p.requires_grad}
    model = replace_linear_with_align_lora(peft, align=None)
    assert {id(p) for p in model.parameters() if p.requires_grad} == trained
    assert set(adapter_report(model).trained) == {"lm_head", "model.norm"}
    torch.testing.assert_close(logits(model), expected)
    save_adapter(model, tmp_path)
    assert torch.equal(logits(load_adapter(llama(), tmp_path)), logits(model))
    torch.testing.assert_close(logits(PeftModel.from_pretrained(llama(), tmp_path)), expected)
    assert torch.equal(logits(unload(model)), logits(llama()))


def test_a_peft_adapter_that_came_after_ours_is_never_saved_as_if_it_were_ours(tmp_path):
    model = replace_linear_with_align_lora(llama(), align=None, target_modules=["up_proj"])
    outer = get_peft_model(model, LoraConfig(target_modules=["q_proj"]))
    for given in (model, outer):
        with pytest.raises(ValueError, match=r"q_proj has an adapter of PEFT's own, .*would not come back"):
            save_adapter(given, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()
