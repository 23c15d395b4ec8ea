"""Folders of adapted experts: to the bit by ours, PEFT's target_parameters by PEFT; what is refused; the command."""

import io
import json
from pathlib import Path

import pytest
import torch
from hf.folders import assert_same_bits, state
from hf.mixtures import KINDS, adapted, gradients, logits, loss_of, mixture, names, options
from hf.runs import run
from hf.words import model_folder, tokenizer
from peft import LoraConfig, PeftModel, get_peft_model
from rich.console import Console
from transformers import MixtralConfig, MixtralForCausalLM

from align_ext import count_parameters, export_peft, load_adapter, replace_linear_with_align_lora, save_adapter
from align_ext.adapters.adapted_block import adapted_layers
from align_ext.io.inspect_adapter import inspect_adapter

SIZES = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_local_experts": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2,
}  # fmt: skip


def by_peft(kind, folder, *, trainable=False):
    model = PeftModel.from_pretrained(mixture(kind), folder, is_trainable=trainable)
    model.get_base_model().set_experts_implementation("eager")
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_folder_loss_and_gradients_are_those_of_peft(kind, tmp_path):
    model = adapted(kind, align=None)
    save_adapter(model, tmp_path)
    theirs = by_peft(kind, tmp_path, trainable=True).train()
    ours = load_adapter(mixture(kind), tmp_path).train()
    assert_same_bits(state(ours), state(model))
    losses = [loss_of(one, "none") for one in (ours, theirs)]
    torch.testing.assert_close(*losses, rtol=1e-5, atol=0)
    for loss in losses:
        loss.backward()
    found, layers = gradients(ours), adapted_layers(ours)
    by_experts = {name.rpartition(".")[0] for name in layers if "experts" in name}
    for place in by_experts:
        outer = theirs.get_base_model().get_submodule(place)
        wrappers = {"down_proj": outer, names(kind)[0].rpartition(".")[2]: outer.base_layer}
        for tensor, wrapper in wrappers.items():
            A, B = (found[f"{place}.{tensor}.lora_{part}"] for part in "AB")
            close = {"rtol": 1e-3, "atol": 1e-5 * float(B.abs().max())}
            torch.testing.assert_close(A.flatten(0, 1), wrapper.lora_A["default"].weight.grad, **close)
            torch.testing.assert_close(B.permute(1, 2, 0).flatten(1), wrapper.lora_B["default"].weight.grad, **close)
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=1e-4, atol=1e-5)


FORMS = {
    "beside a layer": {},
    "alone": {"target_modules": []},
    "one tensor": {"target_parameters": ["experts.down_proj"]},
    "ranks and alphas": {"rank_pattern": {"down_proj": 2}, "alpha_pattern": {"q_proj": 1.0}, "use_rslora": True},
    "dropout": {"lora_dropout": 0.25, "init_lora_weights": "orthogonal", "r": 4},
}


@pytest.mark.parametrize("kind", ["Mixtral", "GptOss"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.filterwarnings("ignore:The following .*_pattern keys")  # PEFT looks for them among modules alone
def test_a_folder_holds_every_bit_and_peft_computes_the_same(kind, form, tmp_path):
    model = adapted(kind, **FORMS[form])
    expected = logits(model)
    assert (expected - logits(mixture(kind))).abs().max() > 1e-2
    save_adapter(model, tmp_path)
    again = load_adapter(mixture(kind), tmp_path)
    assert_same_bits(state(again), state(model))
    assert again.align_state.config == model.align_state.config
    assert_same_bits(state(load_adapter(adapted(kind, **FORMS[form]), tmp_path)), state(model))
    export_peft(model, tmp_path / "peft")
    for folder in (tmp_path, tmp_path / "peft"):
        torch.testing.assert_close(logits(by_peft(kind, folder)), expected, rtol=1e-4, atol=1e-5)
    plain = load_adapter(mixture(kind), tmp_path / "peft")
    torch.testing.assert_close(logits(plain), expected, rtol=1e-4, atol=1e-5)
    assert bool(plain.align_state.config.target_modules) == (form != "alone")


@pytest.mark.parametrize("targets", [["gate_up_proj", "down_proj"], ["model.layers.1.mlp.experts.gate_up_proj"]])
def test_a_folder_of_stock_peft_is_read_and_written_back(targets, tmp_path):
    theirs = get_peft_model(mixture("Mixtral"), LoraConfig(r=4, target_modules=["q_proj"], target_parameters=targets))
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.2 * torch.randn_like(parameter))
    theirs.save_pretrained(tmp_path)
    ours = load_adapter(mixture("Mixtral"), tmp_path)
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=1e-4, atol=1e-5)
    assert {name for name in adapted_layers(ours) if "experts" in name} == set(
        ours.align_state.config.target_parameters
    )
    save_adapter(ours, tmp_path / "again")
    theirs_again = by_peft("Mixtral", tmp_path / "again")
    assert_same_bits(theirs_again.state_dict(), by_peft("Mixtral", tmp_path).state_dict())


def edited(folder, **changes):
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target_parameters": ["experts.down_proj"]}, "of 2 parameters of .*experts, of which .* names 1 tensors"),
        ({"target_parameters": None}, "does not name .* layers of which there are weights"),
        ({"r": 5}, "no lora_A and lora_B of rank 5 of .*experts.gate_up_proj"),
        ({"target_parameters": [1]}, "target_parameters: 1 is no name"),
    ],
)
def test_a_folder_of_other_parameters_is_refused(changes, message, tmp_path):
    export_peft(adapted("Mixtral"), tmp_path)
    edited(tmp_path, **changes)
    with pytest.raises(ValueError, match=message):
        load_adapter(mixture("Mixtral"), tmp_path)


def test_a_folder_without_all_tensors_that_it_names_in_the_model_is_refused(tmp_path):
    export_peft(adapted("Mixtral", target_parameters=["layers.0.mlp.experts.down_proj"]), tmp_path)
    edited(tmp_path, target_parameters=["experts.down_proj"])
    with pytest.raises(ValueError, match=r"no weights of 1 tensors that its target_parameters=.* names"):
        load_adapter(mixture("Mixtral"), tmp_path)


@pytest.mark.parametrize(
    ("kind", "modules"),
    [("Mixtral", ["q_proj"]), ("Mixtral", None), ("DeepseekV3", None), ("GptOss", None), ("NemotronH", None)],
)
def test_a_lora_config_of_peft_adapts_the_same_tensors(kind, modules):
    """Without target_modules the tensors alone, or PEFT's default layers beside them (NemotronH)."""
    config = LoraConfig(r=2, target_modules=modules, target_parameters=names(kind))
    ours = replace_linear_with_align_lora(mixture(kind), config)
    theirs = get_peft_model(mixture(kind), config)
    assert count_parameters(ours).trainable == theirs.get_nb_trainable_parameters()[0]


REFUSED = {
    "no such parameter": ("Mixtral", {"target_parameters": ["experts.w1"]}, "'experts.w1' matches no parameter"),
    "a layer": ("Mixtral", {"target_parameters": ["q_proj.weight"]}, "q_proj.weight, which cannot be adapted"),
    "another form": ("Llama4Text", {"target_parameters": ["experts.down_proj"]}, "transformers' experts interface"),
    "whole": ("Mixtral", {"modules_to_save": ["experts"]}, "trained whole"),
    "heads": ("Mixtral", {"architecture": "hydra"}, "target_parameters=.*use lora or align_lora"),
    "DoRA": ("Mixtral", {"use_dora": True}, "use_dora=True: DoRA's norms"),
    "PiSSA": ("Mixtral", {"init_lora_weights": "pissa"}, "PiSSA starts from one weight"),
    "nothing": ("Mixtral", {"target_modules": [], "target_parameters": []}, "target_modules must be"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_adapted_is_refused_in_one_line(case):
    kind, others, message = REFUSED[case]
    model = mixture(kind)
    with pytest.raises(ValueError, match=message) as refused:
        replace_linear_with_align_lora(model, **options(kind, **others))
    assert "\n" not in str(refused.value)
    assert all(p.requires_grad for p in model.parameters())


def test_the_command_trains_experts_and_its_checks_are_content(place):
    config = MixtralConfig(**SIZES, vocab_size=len(tokenizer()), pad_token_id=0, eos_token_id=1, bos_token_id=None)
    model_folder(place / "model", model=lambda: MixtralForCausalLM(config))
    changed = {"target_parameters": "experts.gate_up_proj,experts.down_proj", "steps": 2}
    results, said = run(place, **changed)
    assert "adapted 4 layers (2 x down_proj, 2 x gate_up_proj)" in said
    assert all(check["passed"] for check in results["checks"].values())
    assert set(results["checks"]) == {"loaded again", "stock PEFT", "merged"}
    inspect_adapter(Path("out/adapter"), Console(file=io.StringIO()))
