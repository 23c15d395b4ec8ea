"""trainable_token_indices: rows of embeddings, and of the head that is tied to them; in PEFT's form, both ways."""

import copy
import json

import pytest
import torch
from hf.folders import files, logits
from hf.test_biases import bert, check_saved, moved
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from tiny import VOCAB, batch, gpt2, llama

from align_ext import (
    AlignLoraConfig,
    adapter_report,
    add_adapter,
    disable_adapter,
    export_peft,
    load_adapter,
    merge_and_unload,
    replace_linear_with_align_lora,
    save_adapter,
    set_adapter,
    unload,
)
from align_ext.adapters.trained_rows import TokenRows
from align_ext.model.memory import training_memory
from align_ext.training.options import TrainOptions

WEIGHTS, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"
ROWS = "token_adapter.trainable_tokens_delta"


def tied():
    return llama(tie_word_embeddings=True)


def padded():
    """Of which one trained row is the padding's, which its embedding gives no gradient."""
    return llama(pad_token_id=3)


def gemma():
    """Whose embeddings are multiplied by a number."""
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "head_dim": 8, "vocab_size": VOCAB}
    return Gemma3ForCausalLM(Gemma3TextConfig(**sizes))


def bart():
    """Whose weight is at four places."""
    from transformers import BartConfig, BartForConditionalGeneration

    torch.manual_seed(0)
    sizes = {f"{part}_{what}": n for part in ("encoder", "decoder") for what, n in LAYERS.items()}
    config = BartConfig(**sizes, d_model=32, vocab_size=VOCAB, scale_embedding=True, dropout=0.0)
    return BartForConditionalGeneration(config)


LAYERS = {"layers": 1, "attention_heads": 4, "ffn_dim": 48}
CASES = {
    "an embedding": (llama, [7, 3, 12]),
    "an embedding by name": (llama, {"embed_tokens": [7, 3, 12]}),
    "an embedding and a head": (llama, {"embed_tokens": [7, 3], "lm_head": [2]}),
    "a tie": (tied, [7, 3, 12]),
    "a tie, both named": (tied, {"embed_tokens": [7, 3], "lm_head": [7, 3]}),
    "Conv1D": (gpt2, {"wte": [7, 3]}),
    "padding": (padded, [7, 3]),
    "scaled": (gemma, [7, 3]),
    "a tie of four": (bart, [7, 3]),
}


def options_of(case):
    make, rows = CASES[case]
    target = {gpt2: "c_attn"}.get(make, "q_proj")
    return make, {"r": 2, "target_modules": [target], "trainable_token_indices": rows, "lora_dropout": 0.0}


@pytest.mark.parametrize("case", CASES)
def test_rows_are_trained_saved_and_read_as_by_peft(case, tmp_path):
    make, options = options_of(case)
    theirs = moved(get_peft_model(make(), LoraConfig(**options)))
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load_adapter(make(), tmp_path / "theirs")
    expected = logits(theirs)
    assert (expected - logits(make())).abs().max() > 1e-2
    torch.testing.assert_close(logits(ours), expected, rtol=1e-5, atol=1e-5)
    save_adapter(ours, tmp_path / "ours")
    export_peft(ours, tmp_path / "exported")
    for folder in ("ours", "exported"):
        stock = PeftModel.from_pretrained(make(), tmp_path / folder)
        torch.testing.assert_close(logits(stock), expected, rtol=1e-5, atol=1e-5)
        content = json.loads((tmp_path / folder / PEFT_CONFIG).read_text())
        assert content["trainable_token_indices"] == options["trainable_token_indices"]
    written = {key: tensor.shape for key, tensor in load_file(tmp_path / "ours" / WEIGHTS).items()}
    assert written == {key: tensor.shape for key, tensor in load_file(tmp_path / "theirs" / WEIGHTS).items()}
    again = load_adapter(make(), tmp_path / "ours")
    assert torch.equal(logits(again), logits(ours))
    load_adapter(moved(again), tmp_path / "ours")  # into a model that has adapters, as a checkpoint
    assert torch.equal(logits(again), logits(ours))


@pytest.mark.parametrize("case", CASES)
def test_gradients_are_pefts_of_the_rows_alone(case, tmp_path):
    make, options = options_of(case)
    theirs = moved(get_peft_model(make().double(), LoraConfig(**options))).train()
    theirs.save_pretrained(tmp_path)
    ours = load_adapter(make().double(), tmp_path).train()
    ours.gradient_checkpointing_enable()
    inputs, _ = batch()
    for model in (theirs, ours):
        torch.manual_seed(0)  # of GPT-2's dropout
        model(**inputs).loss.backward()
    found = {n: p for n, p in ours.named_parameters() if p.requires_grad and n.endswith("adapter.rows")}
    expected = {n: p for n, p in theirs.named_parameters() if "trainable_tokens_delta" in n}
    assert len(found) == len(expected) == (2 if case == "an embedding and a head" else 1)
    for name, parameter in found.items():
        peft_name = f"base_model.model.{name.removesuffix('adapter.rows')}{ROWS}.default"
        torch.testing.assert_close(parameter.grad, expected[peft_name].grad)
    trained = {n for n, p in ours.named_parameters() if p.requires_grad and "lora_" not in n}
    assert trained == found.keys()


@pytest.mark.parametrize("case", CASES)
def test_merged_disabled_and_unloaded(case):
    make, options = options_of(case)
    model = moved(replace_linear_with_align_lora(make(), align=None, **options))
    expected, base = logits(model), logits(make())
    with disable_adapter(model):
        assert torch.equal(logits(model), base)
    merged = merge_and_unload(copy.deepcopy(model))
    torch.testing.assert_close(logits(merged), expected, rtol=1e-5, atol=1e-5)
    plain = make()
    tie = plain.get_output_embeddings().weight is plain.get_input_embeddings().weight
    assert (merged.get_output_embeddings().weight is merged.get_input_embeddings().weight) == tie
    model.tie_weights()  # as FSDP's preparation does
    assert torch.equal(logits(model), expected)
    assert torch.equal(model.get_output_embeddings().weight, merged.get_output_embeddings().weight)
    unloaded = unload(model)
    assert torch.equal(logits(unloaded), base)
    assert (unloaded.get_output_embeddings().weight is unloaded.get_input_embeddings().weight) == tie
    assert {*map(type, unloaded.modules())} == {*map(type, plain.modules())}


@pytest.mark.parametrize("architecture", ["m_lora", "hydra", "multi_adapter", "mtlora"])
def test_beside_every_architecture(architecture, tmp_path):
    options = {"r": 2, "num_tasks": 3, "architecture": architecture, "trainable_token_indices": [5, 9]}
    model = moved(replace_linear_with_align_lora(tied(), AlignLoraConfig(**options)))
    check_saved(architecture, tied, model, tmp_path)


def test_a_compiled_model_in_16_bits_computes_the_same():
    model = llama(tie_word_embeddings=True, num_hidden_layers=1).bfloat16()
    model = moved(replace_linear_with_align_lora(model, r=2, align=None, trainable_token_indices=[5, 9]))
    assert model.model.embed_tokens.adapter.rows.dtype == torch.float32
    inputs, _ = batch()
    plain = model.eval()(**inputs).logits
    model.compile(backend="eager", fullgraph=True)
    torch.testing.assert_close(model(**inputs).logits, plain)


def resized(seed):
    """With six tokens more, whose rows are others with each seed."""
    model = tied()
    torch.manual_seed(seed)
    model.resize_token_embeddings(VOCAB + 6, mean_resizing=False)
    with torch.no_grad():
        model.get_input_embeddings().weight[VOCAB:] = torch.randn(6, 48)
    return model


@pytest.mark.parametrize("whole", [False, True])
def test_tokens_that_were_added_come_back_into_other_random_rows(whole, tmp_path):
    rows = list(range(VOCAB, VOCAB + 6))
    theirs = moved(get_peft_model(resized(1), LoraConfig(target_modules=["q_proj"], trainable_token_indices=rows)))
    theirs.save_pretrained(tmp_path / "theirs", save_embedding_layers=whole)  # True: as after resizing a hub's model
    loaded = load_adapter(resized(2), tmp_path / "theirs")
    torch.testing.assert_close(logits(loaded), logits(theirs), rtol=1e-5, atol=1e-5)
    save_adapter(loaded, tmp_path / "ours")
    assert torch.equal(logits(load_adapter(resized(3), tmp_path / "ours")), logits(loaded))
    other = resized(4)
    with torch.no_grad():
        other.get_input_embeddings().weight[:VOCAB] += 1
    with pytest.raises(ValueError, match=r"another base|not the model's"):
        load_adapter(other, tmp_path / ("theirs" if whole else "ours"))


def test_a_head_with_a_bias_has_no_form_for_peft(tmp_path):
    model = replace_linear_with_align_lora(bert(), r=2, target_modules=["query"], trainable_token_indices=[5])
    with pytest.raises(ValueError, match=r"no form .*PEFT leaves out the bias of cls\.predictions\.decoder"):
        export_peft(model, tmp_path / "peft")
    save_adapter(moved(model), tmp_path / "ours")
    assert PEFT_CONFIG not in files(tmp_path / "ours")
    assert torch.equal(logits(load_adapter(bert(), tmp_path / "ours")), logits(model))


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (llama, {"trainable_token_indices": [VOCAB]}, "embed_tokens has 64 rows, and none of token 64"),
        (llama, {"trainable_token_indices": {"embed": [1]}}, "the model has no module 'embed'"),
        (llama, {"trainable_token_indices": {"norm": [1]}}, "norm is a LlamaRMSNorm, not an embedding"),
        (tied, {"trainable_token_indices": {"lm_head": [1]}}, "lm_head and model.embed_tokens are one tensor: name"),
        (
            tied,
            {"trainable_token_indices": {"embed_tokens": [1], "lm_head": [2]}},
            "are one tensor, of which two sets of rows",
        ),
        (llama, {"trainable_token_indices": [1], "modules_to_save": ["embed_tokens"]}, "trained whole too"),
        (tied, {"trainable_token_indices": [1], "modules_to_save": ["lm_head"]}, r"trained whole too \(lm_head\)"),
        (llama, {"trainable_token_indices": {"up_proj": [1]}}, "adapted or trained whole too"),
    ],
)
def test_what_cannot_be_trained_by_rows_is_refused_with_its_cure(make, options, message):
    model = make()
    with pytest.raises(ValueError, match=f"trainable_token_indices: .*{message}"):
        replace_linear_with_align_lora(model, **options)
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("value", [[1, 1], [-1], ["a"], [1.5], {"embed_tokens": []}, {"": [1]}, {"a": {}}, 3.5, "a"])
def test_what_is_no_list_of_tokens_is_refused(value):
    with pytest.raises(ValueError, match="trainable_token_indices must be different numbers of tokens"):
        AlignLoraConfig(trainable_token_indices=value)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("5,9", (5, 9)),
        ("none", ()),
        ("embed_tokens=[5,9],lm_head=[2]", {"embed_tokens": [5, 9], "lm_head": [2]}),
        ({"embed_tokens": [5]}, {"embed_tokens": [5]}),
    ],
)
def test_the_command_takes_them_as_text(text, value):
    made = TrainOptions.from_mapping({"trainable_token_indices": text})
    assert made.adapter_config(2).trainable_token_indices == value
    assert TrainOptions.from_mapping(made.to_dict()) == made
    assert AlignLoraConfig.from_dict(json.loads(json.dumps(made.adapter_config(2).to_dict()))) == made.adapter_config(2)


def test_other_rows_are_not_taken_for_those_of_a_folder(tmp_path):
    options = {"r": 2, "target_modules": ["q_proj"], "architecture": "lora"}
    save_adapter(replace_linear_with_align_lora(llama(), **options, trainable_token_indices=[1, 2]), tmp_path)
    other = replace_linear_with_align_lora(llama(), **options, trainable_token_indices=[1, 3])
    with pytest.raises(ValueError, match="trainable_token_indices"):
        load_adapter(other, tmp_path)
    for file in (PEFT_CONFIG, "align_lora_config.json"):
        text = (tmp_path / file).read_text()
        (tmp_path / file).write_text(json.dumps(json.loads(text) | {"trainable_token_indices": [1, 3]}))
        with pytest.raises(ValueError, match=r"has trainable_token_indices=.*edited"):
            load_adapter(llama(), tmp_path)
        (tmp_path / file).write_text(text)


def test_no_weight_of_the_models_size_is_made(tmp_path, monkeypatch):
    monkeypatch.setattr(TokenRows, "merged", None)
    model = replace_linear_with_align_lora(tied(), architecture="lora", trainable_token_indices=[1, 3])
    model.train()(**batch()[0]).loss.backward()
    save_adapter(model, tmp_path)
    load_adapter(tied(), tmp_path)


def test_the_report_and_the_estimate_of_memory_know_the_rows():
    model = replace_linear_with_align_lora(tied(), r=2, align=None, trainable_token_indices=[1, 2])
    assert "trained rows of model.embed_tokens: 2" in str(adapter_report(model))
    without = replace_linear_with_align_lora(tied(), r=2, align=None)
    more = training_memory(model, 2, 8).adapters - training_memory(without, 2, 8).adapters
    assert more == 2 * 48 * 4


def test_adapters_by_name_have_biases_rows_and_heads_of_their_own():
    """Each computes as alone, whichever is active before."""
    options = {
        "rows": {"trainable_token_indices": [1, 2], "target_modules": ["c_attn"]},
        "biases": {"bias": "all", "lora_bias": True, "target_modules": ["c_attn"]},
        "head": {"target_modules": ["lm_head", "wte"]},
    }
    options = {name: {"r": 2, "architecture": "lora", **more} for name, more in options.items()}
    alone = {name: logits(moved(replace_linear_with_align_lora(gpt2(), **more))) for name, more in options.items()}
    model = replace_linear_with_align_lora(gpt2(), r=2, architecture="lora", target_modules=["c_fc"])
    for name, more in options.items():
        torch.manual_seed(0)  # of GPT-2's own start, after which adapters get their first values
        gpt2()
        add_adapter(model, name, **more)
        set_adapter(model, name)
        moved(model)
    for name in (*options, *options):
        set_adapter(model, name)
        assert torch.equal(logits(model), alone[name])
    assert torch.equal(logits(unload(model)), logits(gpt2()))
