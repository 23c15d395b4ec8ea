"""An adapter knows its base: merge, eval and export take it from there, and another one is refused."""

import json

import pytest
import tiny
import torch
from hf.folders import MODELS, as_version_0_1_0, plain, trained
from hf.test_cli_adapters import adapter_folder
from hf.words import llama, model_folder, tokenizer
from hostile import refused
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from align_ext import AlignLoraConfig, load_adapter, replace_linear_with_align_lora, save_adapter
from align_ext.adapters.adapted_linear import AdaptedLinear
from align_ext.base_model.fingerprint import BaseModel, base_name
from align_ext.io.adapter_folder import AdapterFolder


@pytest.mark.parametrize("base", MODELS)
@pytest.mark.parametrize("part", ["first", "last"])
def test_another_base_is_refused_and_the_model_left_as_it_was(base, part, tmp_path):
    save_adapter(trained("lora", base), tmp_path)
    other = plain(base)
    weights = list(other.parameters())
    with torch.no_grad():
        weights[0 if part == "first" else -1].mul_(1.01).add_(0.01)
    flags = [p.requires_grad for p in other.parameters()]
    refused(load_adapter, other, tmp_path, match="belongs to another base model")
    assert [p.requires_grad for p in other.parameters()] == flags
    assert not any(isinstance(m, AdaptedLinear) for m in other.modules())
    load_adapter(other, tmp_path, force=True)


@pytest.mark.parametrize("saved", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("loaded", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_same_base_in_another_precision_is_the_same(saved, loaded, tmp_path):
    save_adapter(trained("lora", dtype=saved), tmp_path)
    load_adapter(plain().to(loaded), tmp_path)


@pytest.mark.parametrize("via", [(torch.float16,), (torch.float16, torch.bfloat16), (torch.bfloat16, torch.float16)])
def test_the_same_base_saved_again_in_another_precision_is_the_same(via, tmp_path):
    save_adapter(trained("lora"), tmp_path)
    again = plain()
    for dtype in via:
        again = again.to(dtype)
    load_adapter(again.float(), tmp_path)


def test_a_base_that_is_a_little_trained_is_another_one():
    record, other = BaseModel.of(plain()), plain()
    with torch.no_grad():
        other.model.layers[0].mlp.up_proj.weight.mul_(1.005)  # about a step of bfloat16
    refused(record.check, other, match="up_proj.*has other values")


@pytest.mark.parametrize("base", MODELS)
@pytest.mark.parametrize("rows", [72, 56])
def test_a_base_with_more_or_fewer_tokens_is_the_same_as_far_as_its_rows_are(base, rows, tmp_path):
    save_adapter(trained("lora", base), tmp_path)
    other = plain(base)
    other.resize_token_embeddings(rows)
    load_adapter(other, tmp_path)
    different = plain(base)
    different.resize_token_embeddings(rows)
    with torch.no_grad():
        different.get_input_embeddings().weight.add_(0.1)
    refused(load_adapter, different, tmp_path, match="belongs to another base model")


@pytest.mark.parametrize("layers", [5, 90])
def test_a_layer_in_the_middle_is_known_too_and_the_record_is_bounded(layers):
    def deep():
        return tiny.llama(num_hidden_layers=layers)

    record, other = BaseModel.of(deep()), deep()
    assert len(record.weights) <= 512
    assert len(json.dumps(record.to_dict())) < 70_000
    record.check(other)
    with torch.no_grad():
        for p in other.model.layers[layers // 2].parameters():
            p.mul_(1.1).add_(0.01)
    refused(record.check, other, match=rf"layers\.{layers // 2}\..*has other values")


def test_the_record_is_small_and_of_the_base_alone(tmp_path):
    model = trained("r_lora")
    record, base = BaseModel.of(model), BaseModel.of(plain())
    assert record == base
    assert BaseModel.from_dict(json.loads(json.dumps(record.to_dict()))) == record
    assert len(json.dumps(record.to_dict())) < 4000
    record.check(model)
    for content in (None, 5, {}, {"name": 1, "weights": {}}, {"name": None, "weights": {"a": [1, 2]}}):
        refused(BaseModel.from_dict, content, match="damaged")


def test_a_base_without_float_weights_is_compared_as_far_as_they_are_there():
    model, record = plain(), BaseModel.of(plain())
    for layer in model.model.layers:
        layer.mlp.up_proj.weight = nn.Parameter(layer.mlp.up_proj.weight.to(torch.int8), requires_grad=False)
    record.check(model)
    with torch.no_grad():
        model.model.embed_tokens.weight.add_(1)
    refused(record.check, model, match="embed_tokens")


def test_the_name_is_a_hub_id_or_an_absolute_path(tmp_path, monkeypatch):
    model = nn.Linear(2, 2)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base").mkdir()
    (tmp_path / "link").symlink_to("base")
    (tmp_path / "hub/models--owner--name/snapshots/0123abc").mkdir(parents=True)
    (tmp_path / "cached").symlink_to(tmp_path / "hub/models--owner--name/snapshots/0123abc")
    for given, name in {
        "base": str(tmp_path / "base"),
        "./base": str(tmp_path / "base"),
        "link": str(tmp_path / "link"),
        "cached": "owner/name",
        "hub/models--owner--name/snapshots/0123abc": "owner/name",
        "owner/name": "owner/name",
        "/root/hub/models--owner--some-name/snapshots/0123abc/subfolder": "owner/some-name",
        "/root/hub/models--gpt2/snapshots/0123abc": "gpt2",
        "/root/hub/models--owner--some-name/snapshots/0123abc": "owner/some-name",
        "": None,
    }.items():
        model.name_or_path = given
        assert base_name(model) == name


def folder_with_base(tmp_path, seed=0):
    """A base on the disk and an adapter that was trained on it."""
    base = model_folder(tmp_path / "base")
    model = replace_linear_with_align_lora(type(llama()).from_pretrained(base), AlignLoraConfig(align=None, r=2))
    save_adapter(model, tmp_path / "adapter")
    return base


def test_merge_eval_and_export_take_the_base_from_the_adapter_and_refuse_another(run, tmp_path):
    base = folder_with_base(tmp_path)
    assert AdapterFolder.read(tmp_path / "adapter").base_name == str(base.resolve())
    llama(seed=1).save_pretrained(tmp_path / "other")
    tokenizer().save_pretrained(tmp_path / "other")
    rows = [{"task": "a", "prompt": "x?", "answer": "y", "split": "test"}]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for command in (
        ["merge", tmp_path / "adapter", "--output", "m"],
        ["export", tmp_path / "adapter", "--output", "e"],
        ["eval", "--adapter", tmp_path / "adapter", "--data", tmp_path / "rows.jsonl", "--examples", 1],
    ):
        code, _, err = run(*command, "--model", tmp_path / "other")
        assert code == 2
        assert "belongs to another base model" in err
        assert "--force" in err
        assert list((tmp_path / "work").glob(command[-1][:1] if command[-2] == "--output" else "none")) == []
        code, _, err = run(*command)
        assert code == 0, err
    assert run("export", tmp_path / "adapter", "--output", "f", "--model", tmp_path / "other", "--force")[0] == 0


def test_an_adapter_without_a_base_asks_for_one(run, tmp_path):
    adapter_folder(tmp_path / "adapter", "hydra")
    as_version_0_1_0(tmp_path / "adapter")
    code, _, err = run("merge", tmp_path / "adapter", "--output", "m", "--approximate", "uniform")
    assert code == 2
    assert "name it with --model" in err


@pytest.mark.parametrize("targets", [["up_proj", "down_proj"], r".*\.(up|down)_proj"])
def test_a_folder_of_stock_peft_without_a_layer_is_refused(targets, tmp_path):
    get_peft_model(plain(), LoraConfig(r=2, target_modules=targets)).save_pretrained(tmp_path)
    load_adapter(plain(), tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file({k: t for k, t in tensors.items() if "layers.1.mlp.up_proj" not in k}, file)
    refused(load_adapter, plain(), tmp_path, match=r"no weights of 1 layers .*layers\.1\.mlp\.up_proj")
    save_file(tensors, file)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"target_modules": ["up_proj"]}))
    refused(load_adapter, plain(), tmp_path, match="does not name 2 layers")


def test_patterns_that_never_end_are_refused_wherever_they_come_from(tmp_path):
    endless = r"(.+)(.+)(.+)(.+)(.+)(.+)(.+)\1\2\3\4\5\6"
    for option in ("target_modules", "exclude_modules"):
        options = {"target_modules": ["up_proj"], option: endless}
        model = plain()
        refused(replace_linear_with_align_lora, model, AlignLoraConfig(**options), match="takes too long|no layer")
        assert all(p.requires_grad for p in model.parameters())
    get_peft_model(plain(), LoraConfig(r=2, target_modules=["up_proj"])).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    for option in ("rank_pattern", "alpha_pattern"):
        for pattern in ("((?:a?){5000}){5000}", "(", "a" * 5000):
            edited = config | {option: {pattern: 2}}
            (tmp_path / "adapter_config.json").write_text(json.dumps(edited))
            refused(load_adapter, plain(), tmp_path, match=option)


@pytest.mark.parametrize(
    "edit",
    [
        {"alpha_pattern": {"up_proj": 1}},
        {"rank_pattern": {"up_proj": 1}},
        {"layers_to_transform": [0]},
        {"exclude_modules": ["up_proj"]},
        {"target_modules": ["down_proj"]},
        {"use_dora": True},
        {"bias": "all"},
        {"lora_bias": True},
        {"init_lora_weights": "pissa"},
        {"peft_type": "LOHA"},
        {"layer_replication": [[0, 1]]},
    ],
    ids=lambda edit: next(iter(edit)),
)
@pytest.mark.parametrize("architecture", ["lora", "m_lora", "multi_adapter"])
def test_what_peft_would_read_otherwise_is_refused(architecture, edit, tmp_path):
    save_adapter(trained(architecture), tmp_path)
    for file in sorted(tmp_path.rglob("adapter_config.json")):
        content = file.read_text()
        file.write_text(json.dumps(json.loads(content) | edit))
        refused(load_adapter, plain(), tmp_path, match=next(iter(edit)))
        file.write_text(content)
        load_adapter(plain(), tmp_path)


def test_a_base_whose_weights_are_packed_beyond_reach_is_compared_as_far_as_they_are_there():
    model, record = plain(), BaseModel.of(plain())
    packed = model.model.layers[0].mlp.up_proj
    weight = packed.weight
    del packed.weight
    refused(record.check, model, match=r"up_proj\.weight.*is not in it")
    packed.weight = lambda: weight  # as torch.ao's int8 layers have it
    record.check(model)


def test_what_was_recorded_before_sharding_counts_only_if_the_shards_hold_it():
    """As where a model is adapted first, sharded, and its real weights loaded at last."""
    model = replace_linear_with_align_lora(llama(), architecture="lora", r=2)
    whole = BaseModel.of(model).weights
    for parameter in model.parameters():
        if not parameter.requires_grad:  # a process's half, as ZeRO-3 holds it
            parameter.ds_id, parameter.ds_tensor = (
                1,
                parameter.detach().flatten()[: (parameter.numel() + 1) // 2].clone(),
            )
    assert BaseModel.of(model).weights == whole
    model.model.norm.weight.ds_tensor.add_(1)
    assert not BaseModel.of(model).weights
