"""What is trained beside the adapters: saved, loaded, merged, taken back, exported; by stock PEFT too, or refused."""

import copy

import pytest
import torch
from hf.folders import as_version_0_1_0, assert_same_bits, files, logits, state
from peft import LoraConfig, PeftModel, get_peft_model
from rich.console import Console
from safetensors.torch import load_file, save_file
from tiny import VOCAB, batch, gpt2, llama, qwen2
from torch import nn

from align_ext import (
    AlignLoraConfig,
    adapter_report,
    export_peft,
    load_adapter,
    merge_and_unload,
    replace_linear_with_align_lora,
    save_adapter,
    set_task,
    unload,
)
from align_ext.base_model.modules_to_save import find_extra_tensors, tensors_of
from align_ext.io.inspect_adapter import inspect_adapter

TRAINED, PEFT_CONFIG = "align_trained.safetensors", "adapter_config.json"
KINDS = {
    "lora": {"architecture": "lora"},
    "m_lora": {"architecture": "m_lora"},
    "multi_adapter": {"architecture": "multi_adapter"},
    "hydra": {"architecture": "hydra"},
    "blocks": {"architecture": "mtlora"},
}


def tied():
    return llama(tie_word_embeddings=True)


def mixtral():
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": 1, "num_local_experts": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return MixtralForCausalLM(MixtralConfig(**sizes, **heads, vocab_size=VOCAB))


# what is trained by name, whether PEFT has a form of it, and under which names it is saved
CASES = {
    "a norm": (llama, ["model.norm.weight"], True, None),
    "norms of layers": (llama, [f"model.layers.{i}.input_layernorm.weight" for i in range(2)], True, None),
    "a head": (llama, ["lm_head.weight"], True, None),
    "an embedding": (llama, ["model.embed_tokens.weight"], True, None),
    "an embedding that is the head": (tied, ["model.embed_tokens.weight"], True, ["lm_head.weight"]),
    "whole attention": (gpt2, [f"transformer.h.0.attn.c_attn.{p}" for p in ("weight", "bias")], True, None),
    "a bias alone": (gpt2, ["transformer.ln_f.bias"], False, None),
    "an adapted layer's bias": (qwen2, ["model.layers.1.self_attn.q_proj.bias"], False, None),
    "experts": (mixtral, ["model.layers.0.mlp.experts.down_proj"], False, None),
}
TARGETS = {"gpt2": ["c_fc"], "qwen2": ["q_proj", "v_proj"], "mixtral": ["q_proj"]}


def trained(make, names, **options):
    """A model with adapters whose values and those of the named tensors are not those of the start."""
    model = make()
    targets = TARGETS.get(make.__name__, ["up_proj"])
    options = {"r": 3, "lora_dropout": 0.0, "num_tasks": 3, "target_modules": targets} | options
    replace_linear_with_align_lora(model, AlignLoraConfig(**options))
    every = tensors_of(model)
    torch.manual_seed(5)
    with torch.no_grad():
        for name in names:
            every[name].requires_grad_(True).add_(0.2 * torch.randn_like(every[name]))
        for name, tensor in model.named_parameters():
            if "lora_" in name:
                tensor.add_(0.1 * torch.randn_like(tensor))
    return model


def of_task(kind):
    return 1 if kind == "multi_adapter" else None


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kind", ["lora", "m_lora"])
def test_it_comes_back_to_the_bit_and_stock_peft_computes_the_same_where_it_has_a_form(kind, case, tmp_path):
    make, names, with_peft, more = CASES[case]
    model = trained(make, names, **KINDS[kind])
    expected = logits(model)
    unchanged = trained(make, [], **KINDS[kind])
    assert (logits(unchanged) - expected).abs().max() > 1e-3
    save_adapter(model, tmp_path)
    loaded = load_adapter(make(), tmp_path)
    assert torch.equal(logits(loaded), expected)
    assert set(find_extra_tensors(loaded).tensors) == set(names) | set(more or ())
    assert_same_bits(find_extra_tensors(loaded).tensors, find_extra_tensors(model).tensors)
    assert (tmp_path / TRAINED).exists() == (kind != "lora" or not with_peft)
    if with_peft:
        theirs = PeftModel.from_pretrained(make(), tmp_path)
        torch.testing.assert_close(logits(theirs), expected, rtol=1e-5, atol=1e-5)
        export_peft(model, tmp_path / "peft")
        torch.testing.assert_close(logits(load_adapter(make(), tmp_path / "peft")), expected, rtol=1e-5, atol=1e-5)
    else:
        assert PEFT_CONFIG not in files(tmp_path)
        with pytest.raises(ValueError, match=f"no form of this adapter: {names[0]} is trained .* rest of its module"):
            export_peft(model, tmp_path / "peft")
    assert torch.equal(logits(unload(loaded)), logits(make()))


@pytest.mark.parametrize("kind", KINDS)
def test_every_architecture_keeps_it_in_its_folder(kind, tmp_path):
    model = trained(llama, ["model.norm.weight", "model.embed_tokens.weight"], **KINDS[kind])
    expected = logits(model, of_task(kind))
    save_adapter(model, tmp_path)
    loaded = load_adapter(llama(), tmp_path)
    assert torch.equal(logits(loaded, of_task(kind)), expected)
    if kind == "multi_adapter":
        theirs = PeftModel.from_pretrained(llama(), tmp_path / "tasks" / "1")
        torch.testing.assert_close(logits(theirs), expected, rtol=1e-5, atol=1e-5)
    console = Console(record=True, width=200)
    inspect_adapter(tmp_path, console)
    line = next(line for line in console.export_text().splitlines() if line.startswith("trained beside them"))
    assert "3,120 values" in line  # 48 and 64 * 48
    assert "model.norm.weight" in line


@pytest.mark.parametrize("make", [llama, tied])
def test_the_merged_model_has_the_trained_values(make, tmp_path):
    model = trained(make, ["model.embed_tokens.weight", "model.norm.weight"], architecture="lora")
    expected = logits(model)
    merge_and_unload(model)
    torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-5)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == (make is tied)
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(logits(type(model).from_pretrained(tmp_path)), expected, rtol=1e-5, atol=1e-5)


def test_training_goes_on_to_the_bit(tmp_path):
    def step(model):
        inputs, tasks = batch()
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
        model.train()(**inputs, task_ids=tasks).loss.backward()
        optimizer.step()
        return state(model) | {name: t.detach().clone() for name, t in find_extra_tensors(model).tensors.items()}

    model = trained(tied, ["model.embed_tokens.weight", "model.layers.0.input_layernorm.weight"])
    save_adapter(model, tmp_path)
    loaded, start = load_adapter(tied(), tmp_path), find_extra_tensors(model).tensors["lm_head.weight"].clone()
    after = step(model)
    assert not torch.equal(after["lm_head.weight"], start)
    assert_same_bits(step(loaded), after)


def test_a_model_that_trains_something_else_is_refused_and_left_as_it_was(tmp_path):
    save_adapter(trained(llama, ["model.norm.weight"]), tmp_path)
    for names, message in ([], r"1 are unexpected \['model.norm.weight'\].*beside"), (["lm_head.weight"], "1 keys are"):
        model = trained(llama, names)
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        with pytest.raises(ValueError, match=message):
            load_adapter(model, tmp_path)
        assert_same_bits(model.state_dict(), before)


def test_values_that_do_not_fit_leave_a_plain_model_as_it_was(tmp_path):
    save_adapter(trained(llama, ["model.norm.weight"]), tmp_path)
    as_version_0_1_0(tmp_path)
    file, key = tmp_path / "adapter_model.safetensors", "base_model.model.model.norm.weight"
    for change, message in (
        (torch.ones(7), r"model\.norm\.weight is \[7\]"),
        (torch.full((48,), float("nan")), "not finite"),
        (torch.ones(48, dtype=torch.int64), "is torch.int64"),
    ):
        save_file(load_file(file) | {key: change}, file)
        model = llama()
        with pytest.raises(ValueError, match=message):
            load_adapter(model, tmp_path)
        assert_same_bits(model.state_dict(), llama().state_dict())


def test_a_wider_value_is_rounded_to_the_models_precision_and_said(tmp_path, caplog):
    save_adapter(trained(llama, ["model.norm.weight"]), tmp_path)
    loaded = load_adapter(llama().bfloat16(), tmp_path)
    assert "model.norm.weight is rounded to torch.bfloat16" in caplog.text
    original = load_file(tmp_path / "adapter_model.safetensors")["base_model.model.model.norm.weight"]
    assert torch.equal(loaded.model.norm.weight, original.bfloat16())


@pytest.mark.parametrize("modules", [["lm_head"], ["lm_head", "norm"], ["model.layers.1.mlp.down_proj"]])
def test_folders_of_stock_peft_load_with_their_modules(modules, tmp_path):
    torch.manual_seed(6)
    peft = get_peft_model(llama(), LoraConfig(r=2, target_modules=["up_proj"], modules_to_save=modules))
    with torch.no_grad():
        for parameter in peft.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    peft.save_pretrained(tmp_path)
    loaded = load_adapter(llama(), tmp_path)
    torch.testing.assert_close(logits(loaded), logits(peft))
    save_adapter(loaded, tmp_path / "again")
    torch.testing.assert_close(logits(PeftModel.from_pretrained(llama(), tmp_path / "again")), logits(peft))


def test_a_module_without_its_tensors_is_refused(tmp_path):
    save_adapter(trained(llama, ["model.norm.weight", "lm_head.weight"]), tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    save_file({key: t for key, t in load_file(file).items() if "lm_head" not in key}, file)
    with pytest.raises(ValueError, match="has no tensors of modules_to_save='lm_head'"):
        load_adapter(llama(), tmp_path)


def test_an_embedding_that_peft_trained_apart_from_the_head_is_not_loaded_into_both(tmp_path):
    peft = get_peft_model(tied(), LoraConfig(r=2, target_modules=["up_proj"], modules_to_save=["embed_tokens"]))
    with torch.no_grad():
        peft.base_model.model.model.embed_tokens.modules_to_save["default"].weight.add_(1)
    peft.save_pretrained(tmp_path)
    model = tied()
    with pytest.raises(ValueError, match=r"lm_head\.weight are one tensor in this model, but not in the adapter"):
        load_adapter(model, tmp_path)
    assert_same_bits(model.state_dict(), tied().state_dict())


@pytest.mark.parametrize("module", ["embed_tokens", "lm_head"])
def test_an_adopted_module_that_was_tied_names_the_tie_before_another_base(module, tmp_path):
    peft = get_peft_model(tied(), LoraConfig(target_modules=["up_proj"], modules_to_save=[module]))
    save_adapter(replace_linear_with_align_lora(peft, align=None), tmp_path)
    with pytest.raises(ValueError, match=r"are one tensor in this model.*tie_word_embeddings=False"):
        load_adapter(tied(), tmp_path)


@pytest.mark.parametrize("modules", [("embed_tokens",), ("lm_head",), ("lm_head", "embed_tokens")])
def test_a_tied_tensor_is_kept_under_each_of_its_names(modules):
    model = replace_linear_with_align_lora(tied(), num_tasks=2, modules_to_save=modules)
    with torch.no_grad():
        model.lm_head.weight.add_(1)
    assert torch.equal(logits(unload(model)), logits(tied()))


def test_what_was_trained_without_being_kept_cannot_be_taken_back():
    model = trained(llama, ["model.norm.weight"])
    before = logits(model)
    with pytest.raises(ValueError, match=r"model\.norm\.weight was trained beside .* load the base model again"):
        unload(model)
    assert torch.equal(logits(model), before)
    kept = replace_linear_with_align_lora(llama(), modules_to_save=["norm"])
    with torch.no_grad():
        kept.model.norm.weight.add_(1)
    assert torch.equal(logits(unload(kept)), logits(llama()))


class Normed(nn.Module):
    """With buffers that training changes, and names that end alike."""

    def __init__(self):
        super().__init__()
        self.up, self.bn, self.subnorm, self.norm = nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return self.norm(self.subnorm(self.bn(self.up(x))))


def test_buffers_of_a_trained_module_are_part_of_it(tmp_path):
    torch.manual_seed(0)
    base, x = Normed(), torch.randn(6, 4)
    model = replace_linear_with_align_lora(copy.deepcopy(base), r=2, target_modules=["up"], align=None)
    model.bn.requires_grad_(True)
    model.train()(x)
    save_adapter(model, tmp_path)
    loaded = load_adapter(copy.deepcopy(base), tmp_path).eval()
    assert torch.equal(loaded.bn.running_mean, model.bn.running_mean)
    assert torch.equal(loaded(x), model.eval()(x))
    assert torch.equal(unload(loaded)(x), base.eval()(x))


def test_a_name_that_peft_would_take_for_another_modules_is_not_given_to_it(tmp_path):
    model = replace_linear_with_align_lora(Normed(), r=2, target_modules=["up"], align=None)
    model.norm.requires_grad_(True)
    with pytest.raises(ValueError, match="modules_to_save would take subnorm for a module"):
        export_peft(model, tmp_path / "peft")
    save_adapter(model, tmp_path)
    assert PEFT_CONFIG not in files(tmp_path)
    assert torch.equal(load_adapter(Normed(), tmp_path, force=True).norm.weight, model.norm.weight)


def test_checkpoints_of_versions_before_load(tmp_path):
    names = ["model.layers.1.self_attn.q_proj.bias", "model.norm.weight"]
    model = trained(qwen2, names, architecture="lora")
    for name in names:
        tensors_of(model)[name].requires_grad_(False)
    save_adapter(model, tmp_path)
    own = {
        "model.layers.1.self_attn.q_proj.base_layer.bias": tensors_of(model)[names[0]],
        names[1]: model.model.norm.weight,
    }
    save_file({name: tensor.detach().clone() for name, tensor in own.items()}, tmp_path / TRAINED)
    as_version_0_1_0(tmp_path)
    text = (tmp_path / PEFT_CONFIG).read_text()
    (tmp_path / PEFT_CONFIG).write_text(text.replace('  "modules_to_save": null,\n', ""))
    # Equal but for the order of a sum: what has a trained bias is no product with a frozen weight any more.
    torch.testing.assert_close(logits(load_adapter(qwen2(), tmp_path)), logits(model))


def classifier(kind, **options):
    import transformers

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    name, _, task = kind.partition(" ")
    sizes |= {"num_key_value_heads": 2} if name in ("Llama", "Qwen2") else {}
    config = getattr(transformers, f"{name}Config")(**sizes | options, vocab_size=VOCAB, pad_token_id=0, num_labels=3)
    return getattr(transformers, f"{name}For{task}")(config).eval()


NEW_HEADS = {
    "Llama SequenceClassification": (["score"], ["up_proj", "down_proj"]),
    "Llama TokenClassification": (["score"], "all-linear"),
    "Qwen2 QuestionAnswering": (["qa_outputs"], "all-linear"),
    "Bert SequenceClassification": (["classifier"], ["query", "classifier"]),
    "Bert MultipleChoice": (["classifier"], ["query"]),
    "Roberta SequenceClassification": (["classifier"], "all-linear"),  # of two layers
    "Bert MaskedLM": ([], ["query"]),
}


@pytest.mark.parametrize("kind", NEW_HEADS)
def test_a_new_head_is_trained_by_default_and_reported_and_saved(kind, tmp_path):
    heads, targets = NEW_HEADS[kind]
    options = {"r": 2, "target_modules": targets, "align": None}
    model = replace_linear_with_align_lora(classifier(kind), **options)
    report = adapter_report(model)
    assert report.trained == heads
    assert not any(name.startswith(tuple(heads)) for name in report.replaced if heads)
    assert not heads or f"trained whole beside them: {heads[0]}" in str(report)
    names = {n for n, p in model.named_parameters() if p.requires_grad and "lora_" not in n}
    assert names == {n for n, _ in model.named_parameters() if n.startswith(tuple(heads)) and heads}
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    save_adapter(model, tmp_path)
    inputs = {"input_ids": batch()[0]["input_ids"][:, None] if "Multiple" in kind else batch()[0]["input_ids"]}
    with torch.no_grad():
        expected = model.eval()(**inputs)[0]
        assert torch.equal(load_adapter(classifier(kind), tmp_path).eval()(**inputs)[0], expected)
        theirs = PeftModel.from_pretrained(classifier(kind), tmp_path).eval()
        torch.testing.assert_close(theirs(**inputs)[0], expected, rtol=1e-5, atol=1e-5)


def test_the_head_stays_frozen_where_nothing_is_to_be_saved():
    model = replace_linear_with_align_lora(classifier("Llama SequenceClassification"), modules_to_save=())
    assert adapter_report(model).trained == []
    assert not model.score.weight.requires_grad


@pytest.mark.parametrize(
    "kind", ["Llama SequenceClassification", "Qwen2 QuestionAnswering", "Roberta SequenceClassification"]
)
def test_stock_peft_loads_a_folder_of_a_head_that_stayed_frozen(kind, tmp_path):
    targets = ["query"] if "Roberta" in kind else ["up_proj"]
    model = replace_linear_with_align_lora(classifier(kind), r=2, target_modules=targets, modules_to_save=())
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    save_adapter(model, tmp_path / "saved")
    export_peft(model, tmp_path / "exported")
    for folder in ("saved", "exported"):
        theirs = PeftModel.from_pretrained(classifier(kind), tmp_path / folder).eval()
        with torch.no_grad():
            expected = model.eval()(batch()[0]["input_ids"])[0]
            torch.testing.assert_close(theirs(batch()[0]["input_ids"])[0], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("name", "message"), [("scor", "no module 'scor'"), ("act_fn", "no parameters of floating")])
def test_modules_that_cannot_be_trained_are_refused(name, message):
    model = llama()
    with pytest.raises(ValueError, match=f"modules_to_save: .*{message}"):
        replace_linear_with_align_lora(model, modules_to_save=[name])
    assert all(p.requires_grad for p in model.parameters())


def test_a_module_that_is_trained_whole_is_not_adapted(tmp_path):
    options = {"modules_to_save": ["layers.0.mlp"], "architecture": "multi_adapter", "num_tasks": 2}
    model = replace_linear_with_align_lora(llama(), **options)
    assert len(adapter_report(model).replaced) == 3
    assert "trained whole" in adapter_report(model).skipped["model.layers.0.mlp.up_proj"]
    save_adapter(model, tmp_path)
    loaded = load_adapter(llama(), tmp_path)
    assert find_extra_tensors(loaded).modules == ("model.layers.0.mlp",)
    set_task(loaded, 1)
