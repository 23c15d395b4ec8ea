"""Layers whose weight is read past their forward: left alone and reported; all others change the output."""

import pytest
import torch
from tiny import VOCAB, gpt2, llama, qwen2
from torch import nn

from align_ext import adapter_report, replace_linear_with_align_lora


class Fused(nn.Module):
    """Reads weights in the ways that models do: handed on, looked at, by a subclass, by its parent, under a switch."""

    def __init__(self, exact=False):
        super().__init__()
        self.handed_on, self.looked_at, self.inner = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.parts, self.switched, self.exact = nn.ModuleList([nn.Linear(4, 4)]), nn.Linear(4, 4), exact
        nn.init.zeros_(self.looked_at.bias)

    def forward(self, x):
        x = x.to(self.looked_at.weight.dtype)
        if isinstance(self.looked_at.weight, nn.Parameter) and self.looked_at.weight.shape[0] == 4:
            x = self.looked_at(x)
        for part in self.parts:
            x = part(x)
        x = self._switched(x)
        return self.inner(self.handed(x)) @ self.parts[0].weight

    def _switched(self, x):
        if self.exact:
            return x @ self.switched.weight.T
        return self.switched(x)

    def handed(self, x):
        weight = self.handed_on.weight
        return x @ weight


class Overriding(Fused):
    def handed(self, x):
        return self.handed_on(x)


def encoder():
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2)


def left_alone(model, **options):
    try:
        replace_linear_with_align_lora(model, **{"target_modules": "all-linear", "r": 2, "align": None} | options)
    except ValueError as error:
        return str(error), []
    report = adapter_report(model)
    return "; ".join(f"{name} matched, but {reason}" for name, reason in report.skipped.items()), report.replaced


def test_layers_of_torchs_encoder_have_no_adapters_that_would_do_nothing_in_evaluation():
    text, adapted = left_alone(nn.ModuleDict({"encoder": encoder(), "head": nn.Linear(8, 8)}))
    assert adapted == ["head"]
    for name in ("linear1", "linear2"):
        assert f"encoder.layers.0.{name} matched, but TransformerEncoderLayer.forward reads its weight" in text
    assert "self_attn.out_proj matched, but" in text


def test_layers_of_torchs_decoder_are_adapted_but_for_its_attention():
    text, adapted = left_alone(nn.TransformerDecoderLayer(8, 2, 16))
    assert adapted == ["linear1", "linear2"]
    assert "MultiheadAttention.forward reads its weight past its forward" in text


@pytest.mark.parametrize(
    ("make", "adapted"),
    [
        (Fused, ["looked_at", "inner", "switched"]),
        (Overriding, ["handed_on", "looked_at", "inner", "switched"]),
        (lambda: Fused(exact=True), ["looked_at", "inner"]),
    ],
)
def test_what_a_method_that_runs_hands_on_is_left_alone(make, adapted):
    assert left_alone(make())[1] == adapted


def test_state_space_models_keep_the_layers_that_their_kernels_read():
    from transformers import MambaConfig, MambaForCausalLM

    config = MambaConfig(hidden_size=16, state_size=4, num_hidden_layers=1, vocab_size=VOCAB)
    text, adapted = left_alone(MambaForCausalLM(config))
    assert adapted == ["backbone.layers.0.mixer.in_proj"]
    assert "mixer.x_proj matched, but MambaMixer" in text


def bloom():
    from transformers import BloomConfig, BloomForCausalLM

    return BloomForCausalLM(BloomConfig(hidden_size=16, n_layer=1, n_head=2, vocab_size=VOCAB))


def t5():
    from transformers import T5Config, T5ForConditionalGeneration

    return T5ForConditionalGeneration(
        T5Config(d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2, vocab_size=VOCAB)
    )


@pytest.mark.parametrize("make", [llama, gpt2, qwen2, bloom, t5])
@pytest.mark.parametrize("training", [True, False])
def test_every_adapter_of_a_usual_model_changes_the_output(make, training):
    torch.manual_seed(0)
    model = make()
    text, adapted = left_alone(model, lora_dropout=0.0)
    assert "past its forward" not in text
    for module in model.modules():
        module.p = 0.0 if isinstance(module, nn.Dropout) else getattr(module, "p", None)
    inputs = {"input_ids": torch.arange(1, 9)[None]} | (
        {"decoder_input_ids": torch.arange(4)[None]} if make is t5 else {}
    )
    with torch.no_grad():
        before = model.train(training)(**inputs).logits
        for name in adapted:
            B = model.get_submodule(name).adapter.lora_B
            B.normal_()
            assert not torch.equal(model(**inputs).logits, before), name
            B.zero_()
