"""Bases that would be trained or scored as something else than they are: one line before anything is computed."""

import json

import pytest
import torch
from hf.words import gpt2, llama, model_folder, qwen2, tokenizer, write_rows
from hostile import refused
from safetensors.torch import load_file, save_file
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertLMHeadModel,
    ElectraConfig,
    ElectraForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTJConfig,
    GPTJForCausalLM,
    GPTNeoConfig,
    GPTNeoForCausalLM,
    LlamaForSequenceClassification,
    MixtralConfig,
    MixtralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    RobertaConfig,
    RobertaForMaskedLM,
    XLNetConfig,
    XLNetLMHeadModel,
)

from align_ext import replace_linear_with_align_lora, save_adapter
from align_ext.base_model import checks as soundness
from align_ext.base_model.load import load_model

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
WORDS = {"vocab_size": 103, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 1}


def edited(folder, **entries):
    """A folder whose config.json has other entries."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | entries))


def stored(folder, change):
    """A folder whose tensors are changed."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def classifier():
    torch.manual_seed(0)
    return LlamaForSequenceClassification(llama().config)


def mixtral():
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 3}
    return MixtralForCausalLM(MixtralConfig(**SIZES | heads, **WORDS))


def decoder():
    return BertLMHeadModel(BertConfig(**SIZES, **WORDS, is_decoder=True))


def gptj():
    return GPTJForCausalLM(GPTJConfig(**WORDS, n_embd=32, n_layer=1, n_head=4, n_positions=64, rotary_dim=4))


def neo():
    sizes = {"hidden_size": 32, "num_layers": 1, "num_heads": 4, "max_position_embeddings": 64}
    return GPTNeoForCausalLM(GPTNeoConfig(**WORDS, **sizes, attention_types=[[["global"], 1]]))


def tied():
    model = llama()
    model.config.tie_word_embeddings = True
    return type(model)(model.config)


MISSING = {
    "a classifier": lambda f: model_folder(f, model=classifier),
    "the inner model": lambda f: model_folder(f, model=lambda: llama().model),
    "a layer more": lambda f: edited(model_folder(f), num_hidden_layers=3),
    "one norm": lambda f: stored(model_folder(f), lambda t: t.pop("model.layers.1.input_layernorm.weight")),
    "biases": lambda f: edited(model_folder(f), attention_bias=True),
    "another kind": lambda f: edited(model_folder(f), model_type="gpt_neox"),
    "more tokens": lambda f: edited(model_folder(f), vocab_size=110),
    "other widths": lambda f: edited(model_folder(f), intermediate_size=40),
    "fewer heads of keys": lambda f: edited(model_folder(f), num_key_value_heads=2),
}
UNREAD = {
    "a layer less": lambda f: edited(model_folder(f), num_hidden_layers=1),
    "biases": lambda f: edited(model_folder(f, model=qwen2), model_type="llama"),
    "a head": lambda f: stored(model_folder(f), lambda t: t.update({"score.weight": torch.ones(2, 32)})),
}


@pytest.mark.parametrize("kind", MISSING)
def test_a_base_without_all_of_its_weights_is_refused(kind, tmp_path):
    MISSING[kind](tmp_path / "m")
    refused(load_model, str(tmp_path / "m"), "float32", match=r"(lacks|in other shapes).*at random: name a whole")


@pytest.mark.parametrize("kind", UNREAD)
def test_a_base_with_weights_that_nobody_reads_is_refused(kind, tmp_path):
    UNREAD[kind](tmp_path / "m")
    refused(load_model, str(tmp_path / "m"), "float32", match=r"does not read: correct its config\.json")


def old_masks(tensors):
    for layer in range(2):
        tensors[f"transformer.h.{layer}.attn.bias"] = torch.ones(1, 1, 8, 8)
        tensors[f"transformer.h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)


WHOLE = {
    "tied": lambda f: model_folder(f, model=tied),
    "the inner model, tied": lambda f: model_folder(f, model=lambda: tied().model),
    "rotations of old versions": lambda f: stored(
        model_folder(f), lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)})
    ),
    "masks of old versions": lambda f: stored(model_folder(f, model=gpt2), old_masks),
    "a table of sines": lambda f: stored(
        model_folder(f, model=gptj), lambda t: t.update({"transformer.h.0.attn.embed_positions": torch.ones(64, 4)})
    ),
    "a mask": lambda f: stored(
        model_folder(f, model=neo), lambda t: t.update({"transformer.h.0.attn.attention.bias": torch.ones(1, 1, 8, 8)})
    ),
    "positions of old versions": lambda f: stored(
        model_folder(f, model=decoder), lambda t: t.update({"bert.embeddings.position_ids": torch.arange(512)[None]})
    ),
}


@pytest.mark.parametrize("kind", WHOLE)
def test_what_transformers_makes_itself_need_not_be_stored(kind, tmp_path):
    WHOLE[kind](tmp_path / "m")
    load_model(str(tmp_path / "m"), "float32")


def test_every_command_refuses_and_writes_nothing(run, tmp_path):
    edited(model_folder(tmp_path / "m"), num_hidden_layers=3)
    data = write_rows(tmp_path / "rows.jsonl")
    for command in (["train", "--output", "out"], ["eval", "--json", "out"]):
        code, _, err = run(*command, "--model", tmp_path / "m", "--data", data)
        assert code == 2
        assert "lacks 9 weights" in err
        assert len(err.splitlines()) == 1
        assert list((tmp_path / "work").iterdir()) == []


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("place", ["model.layers.1.mlp.down_proj.weight", "model.norm.weight", "lm_head.weight"])
@pytest.mark.parametrize("everywhere", [False, True])
def test_weights_that_are_not_finite_are_named(value, place, everywhere, tmp_path):
    model_folder(tmp_path / "m")
    stored(tmp_path / "m", lambda t: t[place].view(-1)[None if everywhere else slice(3, 4)].fill_(value))
    kind = "NaN" if value != value else "infinite"
    refused(load_model, str(tmp_path / "m"), "float32", match=f"is damaged: values of '{place}' are {kind}")


def test_weights_beyond_float16_name_a_wider_dtype(tmp_path):
    model_folder(tmp_path / "m")
    stored(tmp_path / "m", lambda t: t["model.norm.weight"].fill_(1e6))
    refused(load_model, str(tmp_path / "m"), "float16", match="take a wider --dtype")
    load_model(str(tmp_path / "m"), "bfloat16")


SEE_LATER_ONES = {
    "bert": lambda: BertForMaskedLM(BertConfig(**SIZES, **WORDS)),
    "roberta": lambda: RobertaForMaskedLM(RobertaConfig(**SIZES, **WORDS)),
    "electra": lambda: ElectraForMaskedLM(ElectraConfig(**SIZES, **WORDS, embedding_size=32)),
    "xlnet": lambda: XLNetLMHeadModel(XLNetConfig(vocab_size=103, d_model=32, n_layer=1, n_head=4, d_inner=48)),
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", SEE_LATER_ONES)
def test_a_model_whose_tokens_see_later_ones_is_refused(kind, dtype, tmp_path):
    torch.manual_seed(0)
    model, words = load_model(str(model_folder(tmp_path / "m", model=SEE_LATER_ONES[kind])), dtype)
    runs = (kind, dtype) != ("xlnet", "bfloat16")  # transformers' own cannot
    expected = r"no causal language model: .* see later ones" if runs else "cannot run 8 tokens: expected scalar type"
    refused(soundness.check_base, model, words, match=expected)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("model", [llama, qwen2, gpt2, decoder, mixtral])
def test_a_causal_one_is_not(model, dtype, tmp_path):
    loaded, words = load_model(str(model_folder(tmp_path / "m", model=model)), dtype)
    soundness.check_base(loaded, words, [[5, 6, 7], [8] * 20], training=True)
    assert not loaded.training


def test_the_masked_model_is_refused_by_train_and_eval(run, tmp_path):
    torch.manual_seed(0)
    model_folder(tmp_path / "m", model=SEE_LATER_ONES["bert"])
    data = write_rows(tmp_path / "rows.jsonl")
    for command in ("train", "eval"):
        code, _, err = run(command, "--model", tmp_path / "m", "--data", data, "--dtype", "float32")
        assert code == 2
        assert "is no causal language model" in err
    edited(tmp_path / "m", is_decoder=True)
    assert run("eval", "--model", tmp_path / "m", "--data", data, "--dtype", "float32", "--examples", 2)[0] == 0


def small_gpt2(positions=16):
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(**WORDS, n_embd=32, n_layer=1, n_head=4, n_positions=positions))


def small_opt():
    sizes = {"hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    return OPTForCausalLM(OPTConfig(**WORDS, **sizes, word_embed_proj_dim=32, max_position_embeddings=16))


@pytest.mark.parametrize("model", [small_gpt2, small_opt])
def test_rows_beyond_the_learned_positions_name_the_length_that_fits(model, run, tmp_path):
    model_folder(tmp_path / "m", model=model)
    rows = [{"task": "a", "prompt": "x" * n, "completion": "yes"} for n in (*range(1, 9), 30)] * 3
    data, flags = write_rows(tmp_path / "rows.jsonl", rows), ["--dtype", "float32", "--align", "none"]
    for command in (["train", *flags, "--steps", 1], ["eval", "--dtype", "float32"]):
        code, _, err = run(*command, "--model", tmp_path / "m", "--data", data)
        assert code == 2
        assert "has 16 positions; give a smaller --seq-len" in err
        code, _, err = run(*command, "--model", tmp_path / "m", "--data", data, "--seq-len", 16)
        assert code == 0, err


@pytest.mark.parametrize(
    ("architecture", "command", "cure"),
    [
        ("hydra", ["merge", "--approximate", "uniform", "--prompts", "lines"], "give shorter lines in --prompts"),
        ("lora", ["export", "--verify"], "leave --verify out"),
    ],
)
def test_commands_that_run_prompts_of_their_own_check_the_base_too(architecture, command, cure, run, tmp_path):
    base = model_folder(tmp_path / "m", model=small_gpt2)
    model = replace_linear_with_align_lora(small_gpt2(), architecture=architecture, target_modules=["c_attn"], r=2)
    save_adapter(model, tmp_path / "adapter")
    (tmp_path / "work/lines").write_text("short\n" + "long " * 10)
    code, _, err = run(*command, tmp_path / "adapter", "--model", base, "--output", "o")
    assert (code, (tmp_path / "work/o").exists()) == (2, False)
    assert "(the longest row); it has 16 positions; " + cure in err


def test_an_answer_at_the_last_position_is_generated_whole(run, tmp_path):
    data = [{"task": "a", "prompt": "x" * n, "completion": "y" * (28 - n)} for n in (3, 9, 20)]
    scores = []
    for positions in (30, 64):  # 28 tokens, a line's end and an end token are 30
        model = model_folder(tmp_path / str(positions), model=lambda: small_gpt2(64))
        stored(model, lambda t, n=positions: t.update({"transformer.wpe.weight": t["transformer.wpe.weight"][:n] * 1}))
        edited(model, n_positions=positions)
        file = write_rows(tmp_path / "rows.jsonl", data)
        code, _, err = run(
            "eval", "--model", model, "--data", file, "--dtype", "float32", "--json", f"{positions}.json"
        )
        assert code == 0, err
        scores.append(json.loads((tmp_path / f"work/{positions}.json").read_text())["tasks"])
    assert scores[0] == scores[1]


TOKENS = {
    "a word": lambda t: t.add_tokens(["yes"]),
    "the end": lambda t: t.add_special_tokens({"eos_token": "<e>"}),
    "the padding": lambda t: t.add_special_tokens({"pad_token": "<p>"}),
}


@pytest.mark.parametrize("change", TOKENS.values(), ids=TOKENS)
def test_tokens_without_an_embedding_are_refused_where_the_data_has_them(change, run, tmp_path):
    model_folder(tmp_path / "m")
    words = tokenizer()
    change(words)
    words.save_pretrained(tmp_path / "m")
    data = write_rows(tmp_path / "rows.jsonl")
    for command in ("train", "eval"):
        code, _, err = run(command, "--model", tmp_path / "m", "--data", data)
        assert code == 2
        assert "whose number is 103, and the model has embeddings of 103 tokens" in err


def test_tokens_without_an_embedding_that_the_data_lacks_do_no_harm(tmp_path):
    model_folder(tmp_path / "m")
    words = tokenizer()
    words.add_tokens(["<image>"])
    words.save_pretrained(tmp_path / "m")
    soundness.check_base(*load_model(str(tmp_path / "m"), "float32"), [[5, 6, 7]])


@pytest.mark.parametrize("entry", ["attention_dropout", "num_experts_per_tok"])
def test_what_fails_in_the_first_forward_is_one_line_that_names_the_model(entry, run, tmp_path):
    mixture = MixtralConfig(**SIZES, **WORDS, num_local_experts=4, num_key_value_heads=4)
    model_folder(tmp_path / "m", model=lambda: MixtralForCausalLM(mixture))
    edited(tmp_path / "m", **{entry: 9})
    data = write_rows(tmp_path / "rows.jsonl")
    code, _, err = run("train", "--model", tmp_path / "m", "--data", data, "--output", "out", "--steps", 1)
    assert code == 2
    assert "--model" in err
    assert "cannot run" in err
    assert len(err.splitlines()) == 1
    assert list((tmp_path / "work").iterdir()) == []


def test_logits_that_are_not_finite_name_the_dtype(tmp_path):
    model_folder(tmp_path / "m")
    stored(tmp_path / "m", lambda t: [t[name].fill_(3e38) for name in t if "lm_head" in name])
    refused(soundness.check_base, *load_model(str(tmp_path / "m"), "float32"), match="not finite in float32")


@pytest.mark.parametrize("name", ["a" * 300, "a/" * 3000, "~nobody-of-this-name/x", "x" * 250 + "/y"])
def test_a_name_that_can_be_no_folder_is_one_line_in_every_command(name, run):
    for command in (["train"], ["eval"], ["doctor", "--grad-check"]):
        code, _, err = run(*command, "--model", name)
        assert code == 2
        assert "model" in err
        assert len(err.splitlines()) == 1
