"""Damaged folders are refused, and an interrupted write leaves what was there."""

import json
import math
import os

import pytest
import torch
from hf.folders import files, logits, plain, trained
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tiny import llama, qwen2

from align_ext import export_peft, load_adapter, save_adapter
from align_ext.adapters.adapted_linear import AdaptedLinear
from align_ext.system import tensors as tensors_module

WEIGHTS, STATE = "adapter_model.safetensors", "align_lora_heads.safetensors"
CARD, PEFT_CONFIG, OUR_CONFIG = "README.md", "adapter_config.json", "align_lora_config.json"
KEY = "model.layers.0.mlp.up_proj"


def edit(file, change):
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def rewrite(file, change):
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


def truncate(file):
    file.write_bytes(file.read_bytes()[:-100])


def edit_state(change):
    return lambda folder: rewrite(folder / STATE, change)


def edit_options(file, **options):
    return lambda folder: edit(folder / file, lambda content: content.update(options))


def replace_peft_weights(folder):
    rewrite(folder / WEIGHTS, lambda tensors: tensors[f"base_model.model.{KEY}.lora_A.weight"].mul_(1.1))


DAMAGES = {
    "truncated": (lambda f: truncate(f / STATE), r"heads\.safetensors is damaged"),
    "truncated for PEFT": (lambda f: truncate(f / WEIGHTS), r"model\.safetensors is damaged"),
    "missing": (lambda f: (f / STATE).unlink(), r"align_lora_heads\.safetensors is missing"),
    "a key is missing": (edit_state(lambda t: t.pop(f"{KEY}.lora_B0")), "1 keys are missing"),
    "a key too many": (edit_state(lambda t: t.update({f"{KEY}.lora_X": torch.ones(1)})), "1 are unexpected"),
    "two heads of three": (
        edit_state(lambda t: t.update({f"{KEY}.lora_B": t[f"{KEY}.lora_B"][:2].clone()})),
        r"up_proj\.lora_B is \[2, 80, 3\]",
    ),
    "one dimension": (edit_state(lambda t: t.update({f"{KEY}.lora_A": torch.ones(3)})), r"lora_A is \[3\]"),
    "integers": (edit_state(lambda t: t.update({f"{KEY}.lora_A": t[f"{KEY}.lora_A"].int()})), "A is torch.int32"),
    "not finite": (edit_state(lambda t: t[f"{KEY}.lora_B0"].fill_(math.nan)), "B0 holds values that are not finite"),
    "no weights": (edit_state(lambda t: t.clear()), "it holds no weights"),
    "another adapter for PEFT": (replace_peft_weights, "one of them was replaced"),
    "another alpha for PEFT": (edit_options(PEFT_CONFIG, lora_alpha=9), "has lora_alpha=9, but"),
    "another scaling": (edit_options(OUR_CONFIG, use_rslora=True), "has .*, but .* means"),
    "no JSON": (lambda f: (f / OUR_CONFIG).write_text("{"), r"align_lora_config\.json is damaged"),
    "a JSON list": (lambda f: (f / OUR_CONFIG).write_text("[]"), "holds no JSON object"),
    "an unknown option": (edit_options(OUR_CONFIG, rr=1), "unknown option 'rr'"),
    "a wrong option": (edit_options(OUR_CONFIG, r="3"), "r must be a positive integer"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_folder_is_refused_and_the_model_left_as_it_was(damage, tmp_path):
    change, message = DAMAGES[damage]
    save_adapter(trained("m_lora"), tmp_path)
    change(tmp_path)
    model = plain()
    with pytest.raises(ValueError, match=message):
        load_adapter(model, tmp_path)
    assert not any(isinstance(m, AdaptedLinear) for m in model.modules())
    assert not model._forward_pre_hooks


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("peft_type", "LOHA"),
        ("use_dora", True),
        ("bias", "some"),
        ("init_lora_weights", "pissa"),
        ("modules_to_save", ["lm_head"]),
        ("r", 4),
        ("lora_alpha", "7"),
        ("rank_pattern", {"(": 2}),
    ],
)
def test_a_peft_folder_that_is_no_plain_lora_is_refused_by_its_option(option, value, tmp_path):
    export_peft(trained("lora"), tmp_path)
    edit(tmp_path / PEFT_CONFIG, lambda c: c.update({option: value}))
    with pytest.raises(ValueError, match=option):
        load_adapter(plain(), tmp_path)


def test_the_folder_for_peft_may_be_gone_where_ours_says_all(tmp_path):
    model = trained("m_lora")
    save_adapter(model, tmp_path)
    for name in (WEIGHTS, PEFT_CONFIG):
        (tmp_path / name).unlink()
    assert torch.equal(logits(load_adapter(plain(), tmp_path)), logits(model))


def test_saving_over_another_adapter_leaves_nothing_of_it_and_other_files_alone(tmp_path):
    folder, model = tmp_path / "adapter", trained("lora")
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    save_adapter(trained("multi_adapter"), folder)
    save_adapter(model, folder)
    assert files(tmp_path) == [f"adapter/{name}" for name in (CARD, PEFT_CONFIG, WEIGHTS, OUR_CONFIG, "notes.txt")]
    assert torch.equal(logits(load_adapter(plain(), folder)), logits(model))


@pytest.mark.parametrize("fails", ["save_file", "write_text", *(f"rename {n}" for n in range(1, 9))])
def test_an_interrupted_write_leaves_what_was_there(fails, tmp_path, monkeypatch):
    model, other = trained("m_lora"), trained("m_lora", lora_alpha=9)
    save_adapter(model, tmp_path / "adapter")
    (tmp_path / "adapter/notes.txt").write_text("mine")  # so that it cannot be one exchange of folders
    calls = []

    def interrupted(function, at):
        def call(*args, **kwargs):
            calls.append(args)
            if len(calls) == at:
                raise KeyboardInterrupt
            return function(*args, **kwargs)

        return call

    with monkeypatch.context() as patch:
        if fails == "save_file":
            patch.setattr(tensors_module, "save_file", interrupted(save_file, 2))
        elif fails == "write_text":
            patch.setattr(type(tmp_path), "write_text", interrupted(type(tmp_path).write_text, 2))
        else:
            patch.setattr(os, "rename", interrupted(os.rename, int(fails.split()[1])))
        with pytest.raises(KeyboardInterrupt):
            save_adapter(other, tmp_path / "adapter")
    assert [p.name for p in tmp_path.iterdir()] == ["adapter"]
    assert torch.equal(logits(load_adapter(plain(), tmp_path / "adapter")), logits(model))


def test_an_interrupted_first_write_leaves_nothing(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError("no space left on device")

    monkeypatch.setattr(tensors_module, "save_file", full)
    with pytest.raises(OSError, match="no space"):
        save_adapter(trained("r_lora"), tmp_path / "deep" / "adapter")
    assert list(tmp_path.iterdir()) == []


def test_weights_of_the_base_that_peft_writes_too_must_be_the_models(tmp_path):
    model = get_peft_model(qwen2(), LoraConfig(target_modules=["q_proj"]))
    model.save_pretrained(tmp_path, save_embedding_layers=True)
    torch.testing.assert_close(logits(load_adapter(qwen2(), tmp_path)), logits(model))
    with torch.no_grad():
        model.base_model.model.lm_head.weight += 1
    model.save_pretrained(tmp_path, save_embedding_layers=True)
    plain = qwen2()
    with pytest.raises(ValueError, match=r"lm_head\.weight, not the model's.* name it in modules_to_save"):
        load_adapter(plain, tmp_path)
    assert plain.state_dict().keys() == qwen2().state_dict().keys()
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"modules_to_save": ["lm_head"]}))
    torch.testing.assert_close(logits(load_adapter(qwen2(), tmp_path)), logits(model))


def test_a_folder_of_stock_peft_with_tied_modules_is_read(tmp_path):
    options = {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}
    model = get_peft_model(llama(tie_word_embeddings=True), LoraConfig(**options))
    with torch.no_grad():
        model.base_model.model.model.embed_tokens.modules_to_save["default"].weight.add_(0.1)
    model.save_pretrained(tmp_path)
    loaded = load_adapter(llama(tie_word_embeddings=True), tmp_path)
    torch.testing.assert_close(logits(loaded), logits(model))
