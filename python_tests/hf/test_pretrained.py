"""save_pretrained of a model with adapters, and what writes by it: a folder that comes back as what was trained."""

import copy

import pytest
import torch
from hf.folders import ARCHITECTURES, TASKED, logits, plain, trained
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from torch import nn
from transformers import EncoderDecoderModel, Trainer, TrainingArguments

from align_ext import load_adapter, merge_and_unload, replace_linear_with_align_lora, unload


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_it_writes_the_adapter(kind, tmp_path):
    model, task = trained(kind), 1 if kind in TASKED else None
    model.save_pretrained(tmp_path)
    assert not (tmp_path / "model.safetensors").exists()
    assert torch.equal(logits(load_adapter(plain(), tmp_path), task), logits(model, task))


def test_a_copy_writes_its_own_values(tmp_path):
    model = trained("lora")
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.model.layers[0].mlp.up_proj.adapter.lora_B.add_(1)
    other.save_pretrained(tmp_path / "other")
    model.save_pretrained(tmp_path / "model")
    for folder, of in (("other", other), ("model", model)):
        assert torch.equal(logits(load_adapter(plain(), tmp_path / folder)), logits(of))
    assert not torch.equal(logits(other), logits(model))


def test_transformers_own_trainer_writes_it_too(tmp_path):
    model = trained("lora", align=None)
    rows = [{"input_ids": list(range(1, 9)), "labels": list(range(1, 9))}] * 4
    options = {"max_steps": 2, "save_steps": 1, "use_cpu": True, "report_to": "none", "disable_tqdm": True}
    runner = Trainer(model, TrainingArguments(str(tmp_path), **options), train_dataset=rows)
    with pytest.warns(UserWarning, match=r"cannot read them .*resume_from_checkpoint.*use AlignTrainer"):
        runner.train()
    runner.save_model(str(tmp_path / "last"))
    for folder in ("checkpoint-2", "last"):
        assert torch.equal(logits(load_adapter(plain(), tmp_path / folder)), logits(model))


def test_transformers_own_trainer_that_could_not_load_its_best_checkpoint_says_so_at_the_first(tmp_path):
    rows = [{"input_ids": list(range(1, 9)), "labels": list(range(1, 9))}] * 4
    options = {"max_steps": 4, "save_steps": 1, "eval_steps": 1, "eval_strategy": "steps", "use_cpu": True}
    args = TrainingArguments(str(tmp_path), load_best_model_at_end=True, report_to="none", **options)
    runner = Trainer(trained("lora", align=None), args, train_dataset=rows, eval_dataset=rows)
    with pytest.raises(ValueError, match=r"load_best_model_at_end=True: Trainer .*use AlignTrainer"):
        runner.train()
    assert runner.state.global_step == 1


def test_processes_that_do_not_write_write_nothing(tmp_path):
    trained("lora").save_pretrained(tmp_path / "adapter", is_main_process=False)
    assert not (tmp_path / "adapter").exists()


def test_an_adopted_peft_model_writes_what_peft_reads(tmp_path):
    peft = get_peft_model(plain(), LoraConfig(target_modules=["up_proj"], init_lora_weights=False))
    expected = logits(peft)
    replace_linear_with_align_lora(peft, align=None).save_pretrained(tmp_path)
    torch.testing.assert_close(logits(PeftModel.from_pretrained(plain(), tmp_path)), expected)


def test_a_part_of_the_model_and_a_push_on_the_way_are_refused_with_the_cure(tmp_path):
    model = trained("lora")
    with pytest.raises(RuntimeError, match=r"LlamaModel is a part of .*save_adapter\(model, folder\)"):
        model.model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"call model\.push_to_hub"):
        model.save_pretrained(tmp_path / "adapter", push_to_hub=True)
    inner = plain()
    replace_linear_with_align_lora(nn.ModuleList([inner]), target_modules=["up_proj"], align=None)
    with pytest.raises(RuntimeError, match="LlamaForCausalLM is a part of"):
        inner.save_pretrained(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("end", [merge_and_unload, unload])
def test_a_model_without_adapters_is_saved_as_before(end, tmp_path):
    model = end(trained("lora"))
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(type(model).from_pretrained(tmp_path)), logits(model))
    assert "save_pretrained" not in model.model.__dict__


def adopted(how):
    """A model with PEFT's adapter, adopted, and the model that was given to us."""
    if how == "transformers' own":
        outer = inject_adapter_in_model(LoraConfig(target_modules=["up_proj"], init_lora_weights=False), plain())
        outer._hf_peft_config_loaded = True  # as add_adapter leaves it, which asks for PEFT 0.22
    else:
        outer = get_peft_model(plain(), LoraConfig(target_modules=["up_proj"], init_lora_weights=False))
    given = outer.get_base_model() if how == "inside" else outer
    return outer, replace_linear_with_align_lora(given, align=None)


@pytest.mark.parametrize("how", ["PeftModel", "inside", "transformers' own"])
@pytest.mark.parametrize("end", [merge_and_unload, unload])
def test_an_adopted_peft_model_ends_as_its_plain_model(end, how, tmp_path):
    outer, model = adopted(how)
    expected = logits(plain() if end is unload else model)
    result = end(model)
    assert type(result) is type(plain())
    result.save_pretrained(tmp_path / "plain")
    torch.testing.assert_close(logits(type(result).from_pretrained(tmp_path / "plain")), expected)
    if how == "PeftModel":
        with pytest.raises(RuntimeError, match=r"no adapter any more.*save the plain model"):
            outer.save_pretrained(tmp_path / "adapter")
        assert not (tmp_path / "adapter").exists()


PEFTS_OWN = ["merge_and_unload", "unload", "merge_adapter", "unmerge_adapter", "load_adapter"]


@pytest.mark.parametrize("method", PEFTS_OWN)
def test_pefts_own_methods_would_pass_over_the_adapters_and_say_so(method):
    outer, model = adopted("PeftModel")
    for module in (outer, outer.base_model, copy.deepcopy(outer)):
        with pytest.raises(RuntimeError, match=rf"PEFT's {method} would pass over .*merge_and_unload\(model\)"):
            getattr(module, method)()
    unload(model)
    assert method not in outer.__dict__


def encoder_decoder():
    from transformers import BertConfig, BertLMHeadModel, BertModel

    options = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = BertConfig(**options, intermediate_size=16)
    encoder = replace_linear_with_align_lora(BertModel(config), align=None, target_modules=["query"])
    decoder = BertLMHeadModel(BertConfig(**config.to_dict() | {"is_decoder": True, "add_cross_attention": True}))
    return EncoderDecoderModel(encoder=encoder, decoder=decoder)


def around_the_inner_model():
    model = plain()
    replace_linear_with_align_lora(model.model, align=None)
    return model


def adapted_by_peft_too():
    return get_peft_model(trained("lora"), LoraConfig(target_modules=["q_proj"]))


OUTER = {
    "the model around": around_the_inner_model,
    "two models": encoder_decoder,
    "PEFT around": lambda: adopted("inside")[0],
    "another PEFT adapter": adapted_by_peft_too,
}


@pytest.mark.parametrize("outer", OUTER)
def test_a_model_around_the_adapted_one_is_refused_with_the_cure(outer, tmp_path):
    model = OUTER[outer]()
    with pytest.raises(RuntimeError, match=rf"this {type(model).__name__} holds .*save_adapter\(model, folder\)"):
        model.save_pretrained(tmp_path)
    assert not list(tmp_path.rglob("*.safetensors"))


def test_a_state_dict_for_ones_own_use_is_given(tmp_path):
    model, other = around_the_inner_model(), around_the_inner_model()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.adapter.lora_B.add_(1)
    other.load_state_dict(copy.deepcopy(model).state_dict())
    assert torch.equal(logits(other), logits(model))


def test_unload_takes_off_what_was_merged_by_hand():
    model = trained("lora")
    model.model.layers[0].mlp.up_proj.merge()
    assert torch.equal(logits(unload(model)), logits(plain()))
