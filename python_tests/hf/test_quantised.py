"""Quantised bases: the adapters' gradients are those of the same weights in float32, whatever ran before."""

import copy

import bitsandbytes
import pytest
import torch
from hf.words import model_folder, qwen3, tokenizer, wide_qwen2
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from align_ext import count_parameters, replace_linear_with_align_lora, unload

TASKS = torch.tensor([0, 0, 1, 1])
FORMATS = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    "8 bits": {"load_in_8bit": True},
}


def batch():
    ids = torch.randint(4, len(tokenizer()), (4, 12), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "labels": ids}


def loaded(folder, form):
    config = BitsAndBytesConfig(**FORMATS[form], bnb_4bit_compute_dtype=torch.float32)
    return AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=config, device_map={"": "cpu"}, dtype=torch.float32
    )


def evaluate(model, **inputs):
    with torch.no_grad():
        model.eval()(**batch(), **inputs)
    return model.train()


def adapted(model):
    torch.manual_seed(0)
    replace_linear_with_align_lora(model, num_tasks=2, lora_dropout=0.0, target_modules="all-linear")
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model.train()


def gradients(model):
    model.zero_grad()
    model(**batch(), task_ids=TASKS).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


def in_float32(model):
    """A model of the same weights in float32."""
    plain = type(model)(model.config).train()
    for name, module in plain.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head":
            weight = model.get_submodule(name).weight
            module.weight.data = bitsandbytes.functional.dequantize_4bit(weight.data, weight.quant_state).float()
    own = {name: x for name, x in model.state_dict().items() if x.is_floating_point() and "absmax" not in name}
    plain.load_state_dict({name: x for name, x in own.items() if name in plain.state_dict()}, strict=False)
    return plain


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("made", [wide_qwen2, qwen3])  # with and without biases
def test_gradients_are_the_same_after_the_model_ran_in_eval_mode(tmp_path, made, form):
    model_folder(tmp_path, model=made)
    model = adapted(loaded(tmp_path, form))
    before = gradients(model)
    after = gradients(evaluate(model, task_ids=TASKS))
    assert len(before) == 28
    for name, gradient in before.items():
        torch.testing.assert_close(after[name], gradient, rtol=1e-5, atol=1e-6 * float(gradient.abs().max()))


@pytest.mark.parametrize("form", ["nf4", "fp4"])
@pytest.mark.parametrize("ran", [False, True])  # before it got adapters, when bitsandbytes may have packed its weights
def test_gradients_are_those_of_the_same_weights_in_float32(tmp_path, form, ran):
    model_folder(tmp_path, model=wide_qwen2)
    quantised = loaded(tmp_path, form)
    quantised = adapted(evaluate(quantised) if ran else quantised)
    plain = in_float32(unload(copy.deepcopy(quantised)))
    found, expected = gradients(evaluate(quantised, task_ids=TASKS)), gradients(adapted(plain))
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-5 * float(gradient.abs().max()))


class Constant(nn.Linear):
    """A layer that computes outside of autograd."""

    def forward(self, x):
        return super().forward(x.detach())


def test_a_base_layer_that_loses_the_gradient_is_an_error_and_no_silent_zero():
    torch.manual_seed(0)
    layers = [nn.Linear(8, 8), Constant(8, 8)]
    model = replace_linear_with_align_lora(nn.Sequential(*layers), target_modules=["0", "1"], align=None).train()
    with pytest.raises(RuntimeError, match=r"base layer \(Constant\) loses the gradient"):
        model(torch.randn(3, 8))
    with torch.no_grad():
        model(torch.randn(3, 8))


@pytest.mark.parametrize("form", FORMATS)
def test_a_quantised_weight_counts_the_elements_that_it_stands_for(tmp_path, form):
    model_folder(tmp_path, model=qwen3)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert count_parameters(loaded(tmp_path, form)).total == count_parameters(plain).total
