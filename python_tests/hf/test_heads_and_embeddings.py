"""LoRA beside the output head and beside embeddings, also where they are one tensor; in PEFT's form, both ways."""

import copy

import pytest
import torch
from hf.families import family
from hf.folders import logits
from hf.test_biases import moved
from hf.test_token_rows import gemma, padded, tied
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tiny import batch, gpt2, llama
from transformers import TrainingArguments

from align_ext import (
    AlignLoraConfig,
    adapter_report,
    disable_adapter,
    export_peft,
    load_adapter,
    merge_and_unload,
    replace_linear_with_align_lora,
    save_adapter,
    unload,
)
from align_ext.evaluation.likelihood import _float32_head
from align_ext.training.checks import refuse_fused_head

WEIGHTS = "adapter_model.safetensors"
CASES = {
    "a head": (llama, ["q_proj", "lm_head"]),
    "a tied head": (tied, ["q_proj", "lm_head"]),
    "a tied head, Conv1D": (gpt2, ["c_attn", "lm_head"]),
    "a head alone": (llama, r"lm_head"),
    "an embedding": (llama, ["q_proj", "embed_tokens"]),
    "a tied embedding": (tied, ["q_proj", "embed_tokens"]),
    "an embedding alone": (llama, ["embed_tokens"]),
    "tied, both": (tied, ["embed_tokens", "lm_head"]),
    "embeddings of positions, Conv1D, tied": (gpt2, ["c_attn", "wte", "wpe"]),
    "scaled, tied": (gemma, ["q_proj", "embed_tokens"]),
    "padded": (padded, ["embed_tokens"]),
}


def untied():
    """The tied model with a copy of the weight in its head."""
    model = llama()
    model.load_state_dict(tied().state_dict())
    return model


@pytest.mark.parametrize("case", CASES)
def test_it_is_trained_saved_and_read_as_by_peft(case, tmp_path):
    make, targets = CASES[case]
    options = {"r": 2, "target_modules": targets, "lora_dropout": 0.0}
    theirs = moved(get_peft_model(make().double(), LoraConfig(**options)))
    theirs.save_pretrained(tmp_path / "theirs")  # which holds the weights of the base too
    ours = load_adapter(make().double(), tmp_path / "theirs")
    expected = logits(theirs)
    assert (expected - logits(make().double())).abs().max() > 1e-2
    torch.testing.assert_close(logits(ours), expected)
    save_adapter(ours, tmp_path / "ours")
    export_peft(ours, tmp_path / "exported")
    for folder in ("ours", "exported"):
        stock = PeftModel.from_pretrained(make().double(), tmp_path / folder)
        torch.testing.assert_close(logits(stock), expected)
    kept = {key for key in load_file(tmp_path / "theirs" / WEIGHTS) if "base_layer" not in key}
    assert load_file(tmp_path / "ours" / WEIGHTS).keys() == kept
    inputs, _ = batch()
    for model in (theirs, ours):
        torch.manual_seed(0)  # of GPT-2's dropout
        model.train()(**inputs).loss.backward()
    adopted = {n: p.grad for n, p in theirs.named_parameters() if p.requires_grad}
    for name, parameter in ours.named_parameters():
        if parameter.requires_grad:
            layer, part = name.split(".adapter.")
            end = f"{part}.default" if "embedding" in part else f"{part}.default.weight"
            torch.testing.assert_close(parameter.grad, adopted[f"base_model.model.{layer}.{end}"])
    again = load_adapter(make().double(), tmp_path / "ours")
    assert torch.equal(logits(again), logits(ours))
    load_adapter(moved(again), tmp_path / "ours")  # into a model that has adapters, as a checkpoint
    assert torch.equal(logits(again), logits(ours))
    adopted = replace_linear_with_align_lora(theirs, align=None)
    torch.testing.assert_close(logits(adopted), expected)


@pytest.mark.parametrize("case", [case for case in CASES if "head" not in case])
def test_dora_of_an_embedding_is_pefts(case, tmp_path):
    make, targets = CASES[case]
    options = {"r": 2, "target_modules": targets, "use_dora": True}
    theirs = moved(get_peft_model(make().double(), LoraConfig(**options)))
    theirs.save_pretrained(tmp_path / "theirs")
    ours, expected = load_adapter(make().double(), tmp_path / "theirs"), logits(theirs)
    torch.testing.assert_close(logits(ours), expected)
    for model in (theirs, ours):
        torch.manual_seed(0)  # of GPT-2's dropout
        model.train()(**batch()[0]).loss.backward()
    gradients = {n.removeprefix("base_model.model."): p.grad for n, p in theirs.named_parameters() if p.requires_grad}
    for name, parameter in ours.named_parameters():
        if parameter.requires_grad:
            name = name.replace(".adapter", "") + ".default"
            torch.testing.assert_close(parameter.grad, gradients.get(name, gradients.get(f"{name}.weight")))
    save_adapter(ours, tmp_path / "ours")
    torch.testing.assert_close(logits(PeftModel.from_pretrained(make().double(), tmp_path / "ours")), expected)
    assert torch.equal(logits(load_adapter(make().double(), tmp_path / "ours")), logits(ours))
    torch.testing.assert_close(logits(replace_linear_with_align_lora(theirs, align=None)), expected)
    fresh = replace_linear_with_align_lora(make().double(), architecture="lora", **options)
    torch.testing.assert_close(logits(fresh), logits(make().double()))
    if "tied" not in case:
        torch.testing.assert_close(logits(merge_and_unload(ours)), expected)


def test_an_embedding_whose_weight_another_one_reads_is_not_adapted(tmp_path):
    with pytest.raises(ValueError, match=r"shared matched, but its weight is that of encoder\.embed_tokens too, "):
        replace_linear_with_align_lora(family("t5"), target_modules=["shared"], architecture="lora")
    get_peft_model(family("t5"), LoraConfig(target_modules=["shared", "q"])).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"the folder has an adapter of shared, which cannot have one: its weight"):
        load_adapter(family("t5"), tmp_path)


@pytest.mark.parametrize("case", CASES)
def test_merged_where_no_tie_would_break_disabled_and_unloaded(case):
    make, targets = CASES[case]
    model = moved(replace_linear_with_align_lora(make(), r=2, align=None, target_modules=targets))
    expected, base = logits(model), logits(make())
    with disable_adapter(model):
        assert torch.equal(logits(model), base)
    model.tie_weights()
    assert torch.equal(logits(model), expected)
    if "tied" in case:
        with pytest.raises(
            ValueError, match=r"cannot be merged: its weight is that of .* too, .*tie_word_embeddings=F"
        ):
            merge_and_unload(model)
    else:
        torch.testing.assert_close(logits(merge_and_unload(copy.deepcopy(model))), expected, rtol=1e-5, atol=1e-5)
    unloaded, plain = unload(model), make()
    assert torch.equal(logits(unloaded), base)
    for one in (unloaded, plain):
        tie = one.get_output_embeddings().weight is one.get_input_embeddings().weight
        assert tie == ("tied" in case)


def test_the_cure_for_a_tied_head_merges(tmp_path):
    model = moved(replace_linear_with_align_lora(tied(), r=2, align=None, target_modules=["lm_head"]))
    save_adapter(model, tmp_path)
    merged = merge_and_unload(load_adapter(untied(), tmp_path))
    torch.testing.assert_close(logits(merged), logits(model), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("make", [llama, tied])
def test_all_linear_leaves_the_head_out_as_in_peft(make, tmp_path):
    report = adapter_report(replace_linear_with_align_lora(make(), target_modules="all-linear"))
    assert "lm_head" not in report.replaced
    get_peft_model(make(), LoraConfig(target_modules="all-linear")).save_pretrained(tmp_path)
    load_adapter(make(), tmp_path)


@pytest.mark.parametrize("architecture", ["m_lora", "hydra", "multi_adapter", "align_lora"])
def test_a_head_with_every_architecture(architecture, tmp_path):
    options = {"r": 2, "num_tasks": 3, "architecture": architecture, "target_modules": ["lm_head", "up_proj"]}
    model = moved(replace_linear_with_align_lora(tied(), AlignLoraConfig(**options)))
    inputs, tasks = batch()
    model.train()(**inputs, task_ids=tasks).loss.backward()
    assert model.lm_head.adapter.lora_A.grad.abs().max() > 0
    task = 1 if architecture == "multi_adapter" else None
    save_adapter(model, tmp_path)
    assert torch.equal(logits(load_adapter(tied(), tmp_path), task), logits(model, task))


def test_a_folder_of_stock_peft_that_has_lost_the_heads_weights_is_refused(tmp_path):
    get_peft_model(llama(), LoraConfig(target_modules=["q_proj", "lm_head"])).save_pretrained(tmp_path)
    file = tmp_path / WEIGHTS
    save_file({key: t for key, t in load_file(file).items() if "lm_head.lora" not in key}, file)
    with pytest.raises(ValueError, match=r"no weights of 1 layers .*\['lm_head'\]"):
        load_adapter(llama(), tmp_path)


@pytest.mark.parametrize("options", [{"target_modules": ["lm_head"]}, {"trainable_token_indices": [3, 5]}])
def test_scores_in_16_bits_take_the_whole_head_in_float32(options):
    model = moved(replace_linear_with_align_lora(tied().bfloat16(), r=2, align=None, **options)).eval()
    inputs, _ = batch()
    with torch.no_grad(), _float32_head(model) as head:
        del inputs["labels"]
        found = head.log_probs(model, inputs, [0, 1], [2, 3])
        hidden = model.model(**inputs).last_hidden_state[[0, 1], [2, 3]].float()
        adapter = model.lm_head.adapter
        weight = model.lm_head.base_layer.weight.float()
        if "target_modules" in options:
            weight = weight + adapter.delta_weight()
        else:
            weight[[3, 5]] = adapter.rows
    torch.testing.assert_close(found, (hidden @ weight.T).log_softmax(-1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
def test_one_adapter_for_both_modules_of_a_tie_is_refused(target):
    options = {"target_modules": ["q_proj", target], "ensure_weight_tying": True}
    with pytest.raises(ValueError, match=f"ensure_weight_tying=True and adapts .*{target}, whose weight"):
        replace_linear_with_align_lora(tied(), LoraConfig(**options))
    replace_linear_with_align_lora(llama(), LoraConfig(**options))
    replace_linear_with_align_lora(tied(), LoraConfig(**options | {"target_modules": "all-linear"}))


def test_ligers_fused_loss_which_reads_the_heads_weight_is_refused(tmp_path):
    head = replace_linear_with_align_lora(llama(), r=2, align=None, target_modules=["lm_head"])
    other = replace_linear_with_align_lora(llama(), r=2, align=None)
    fused = TrainingArguments(tmp_path, use_liger_kernel=True)
    not_fused = TrainingArguments(
        tmp_path, use_liger_kernel=True, liger_kernel_config={"fused_linear_cross_entropy": False}
    )
    for args, model in (fused, other), (not_fused, head), (TrainingArguments(tmp_path), head):
        refuse_fused_head(args, model)
    with pytest.raises(ValueError, match="fused_linear_cross_entropy reads the weight of the output head past"):
        refuse_fused_head(fused, head)
