"""Bases that load and then fail, or change, as they run: one line in every command, and no run changes a base."""

import json

import pytest
import torch
from hf.words import llama, model_folder, qwen2, tokenizer, write_rows
from hostile import refused
from torch import nn
from transformers import (
    BartConfig,
    BartForCausalLM,
    BertGenerationConfig,
    BertGenerationDecoder,
    GPT2Config,
    GPT2LMHeadModel,
    MarianConfig,
    MarianForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    ReformerConfig,
    ReformerModelWithLMHead,
    RwkvConfig,
    RwkvForCausalLM,
    TrOCRConfig,
    TrOCRForCausalLM,
    XLNetConfig,
    XLNetLMHeadModel,
)

from align_ext import replace_linear_with_align_lora, save_adapter
from align_ext.base_model.checks import CannotRun, check_base, model_errors
from align_ext.cli import check_modes
from align_ext.data.rows import Example
from align_ext.evaluation.evaluate import evaluate
from align_ext.system.names import shortest_ends
from align_ext.training import recipe

WORDS = {"vocab_size": 103, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 1}
BERT = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
OPT = {"hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "word_embed_proj_dim": 32}
BART = {
    "d_model": 32, "encoder_layers": 1, "decoder_layers": 2, "encoder_attention_heads": 4, "encoder_ffn_dim": 48,
    "decoder_attention_heads": 4, "decoder_ffn_dim": 48, "is_decoder": True, "is_encoder_decoder": False,
}  # fmt: skip
REFORMER = {
    "attn_layers": ["local", "lsh"], "hidden_size": 32, "feed_forward_size": 48, "num_attention_heads": 4,
    "attention_head_size": 8, "local_attn_chunk_length": 8, "lsh_attn_chunk_length": 4, "num_buckets": 4,
    "local_num_chunks_after": 0, "axial_pos_embds": False, "max_position_embeddings": 512, "is_decoder": True,
}  # fmt: skip
RWKV = {"hidden_size": 32, "num_hidden_layers": 4, "attention_hidden_size": 32, "intermediate_size": 48}
XLNET = {"vocab_size": 103, "d_model": 32, "n_layer": 1, "n_head": 4, "d_inner": 48}


def gpt2_cross():
    return GPT2LMHeadModel(GPT2Config(**WORDS, n_embd=32, n_layer=2, n_head=4, add_cross_attention=True))


def trocr():
    sizes = {"d_model": 32, "decoder_layers": 1, "decoder_attention_heads": 4, "decoder_ffn_dim": 48}
    return TrOCRForCausalLM(TrOCRConfig(**WORDS, **sizes))


def bert_generation():
    config = BertGenerationConfig(**WORDS, **BERT, is_decoder=True, add_cross_attention=True)
    return BertGenerationDecoder(config)


def train(run, folder, *flags):
    """Runs `train` for one step on the base in a folder."""
    data = write_rows(folder.parent / "rows.jsonl")
    few = ["--steps", 1, "--batch-size", 4, "--eval-examples", 2, "--dtype", "float32", "--output", "out"]
    return run("train", "--model", folder, "--data", data, *few, *flags)


def is_one_line(code, err, words):
    assert code == 2, err
    assert len(err.splitlines()) == 1
    assert words in err


@pytest.mark.parametrize(
    ("model", "end"),
    [
        (gpt2_cross, "crossattention.c_attn"),
        pytest.param(trocr, "encoder_attn.k_proj", marks=pytest.mark.slow),
        pytest.param(bert_generation, "crossattention", marks=pytest.mark.slow),
    ],
)
def test_cross_attention_without_an_encoder_is_left_alone_or_refused_by_name(model, end, run, tmp_path):
    model_folder(tmp_path / "m", model=model)
    code, _, err = train(run, tmp_path / "m")
    assert code == 0, err
    tensors = json.loads((tmp_path / "work/out/adapter/align_lora_config.json").read_text())
    assert "attn" not in json.dumps(tensors["target_modules"])
    code, _, err = train(run, tmp_path / "m", "--overwrite", "--target-modules", "all-linear")
    is_one_line(code, err, end)
    cure = err.partition("leave it out by --exclude-modules ")[2].partition(", or give --align none")[0]
    flags = ["--overwrite", "--target-modules", "all-linear", "--exclude-modules", cure]
    code, _, err = train(run, tmp_path / "m", *flags)
    assert code == 0, err


@pytest.mark.parametrize("align", ["kl", "none"])
def test_where_none_of_the_adapted_layers_runs_nothing_can_be_trained(align, run, tmp_path):
    model_folder(tmp_path / "m", model=trocr)
    code, _, err = train(run, tmp_path / "m", "--align", align, "--target-modules", "encoder_attn.q_proj")
    is_one_line(code, err, "(1 of 1 adapted layers)")
    flags = ["--align", align, "--target-modules", "encoder_attn.q_proj,self_attn.q_proj"]
    assert train(run, tmp_path / "m", *flags)[0] == (2 if align == "kl" else 0)


@pytest.mark.parametrize("align", ["kl", "none"])
def test_layers_that_are_dropped_at_random_are_refused(align, run, tmp_path):
    model_folder(tmp_path / "m", model=lambda: OPTForCausalLM(OPTConfig(**WORDS, **OPT, layerdrop=0.3)))
    code, _, err = train(run, tmp_path / "m", "--align", align)
    is_one_line(code, err, "set layerdrop (decoder_layerdrop) to 0 in its config.json")


FAIL = {
    "generation": (lambda: BartForCausalLM(BartConfig(**WORDS, **BART)), "cannot generate answers"),
    "marian's": (
        lambda: MarianForCausalLM(MarianConfig(**WORDS, **BART, decoder_start_token_id=0)),
        "cannot generate answers",
    ),
    "batches": (
        lambda: XLNetLMHeadModel(XLNetConfig(**XLNET, attn_type="uni")),
        "cannot run a batch of 2 rows of which one is padded",
    ),
    "chunks": (lambda: ReformerModelWithLMHead(ReformerConfig(**WORDS, **REFORMER)), "cannot"),
}


@pytest.mark.parametrize("kind", FAIL)
def test_what_a_base_raises_as_it_runs_is_one_line(kind, run, tmp_path):
    torch.manual_seed(0)
    model, words = FAIL[kind]
    model_folder(tmp_path / "m", model=model)
    code, _, err = train(run, tmp_path / "m")
    is_one_line(code, err, words)
    rows = tmp_path / "rows.jsonl"
    is_one_line(*run("eval", "--model", tmp_path / "m", "--data", rows, "--dtype", "float32")[::2], words)
    assert list((tmp_path / "work").iterdir()) == []


@pytest.mark.parametrize(
    ("architecture", "command"), [("hydra", ["merge", "--approximate", "uniform"]), ("lora", ["export", "--verify"])]
)
def test_a_base_that_does_not_generate_is_merged_and_verified(architecture, command, run, tmp_path):
    def bart():
        torch.manual_seed(0)
        return BartForCausalLM(BartConfig(**WORDS, **BART)).eval()

    model = replace_linear_with_align_lora(bart(), architecture=architecture, target_modules=["fc1"], r=2)
    save_adapter(model, tmp_path / "adapter")
    base = model_folder(tmp_path / "m", model=bart)
    code, _, err = run(*command, tmp_path / "adapter", "--model", base, "--output", "o")
    assert code == 0, err


def raising(error):
    """A model that scores and does not generate."""
    model = llama()

    def generate(**_):
        raise error

    model.generate = generate
    return model


@pytest.mark.parametrize("error", [AssertionError("no"), IndexError("no"), NotImplementedError()])
def test_an_evaluation_names_the_model_whatever_it_raises(error):
    with pytest.raises(CannotRun, match="cannot generate answers"):
        evaluate(raising(error), tokenizer(), [Example("t", "a", "b")])


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("CUDA out of memory")])
def test_a_lack_of_memory_stays_what_it_is(error):
    with pytest.raises(type(error)), model_errors(llama(), "run"):
        raise error


@pytest.mark.parametrize("every", [0, 2])
def test_a_base_that_divides_its_weights_names_the_entry(every, run, tmp_path):
    torch.manual_seed(0)
    model_folder(tmp_path / "m", model=lambda: RwkvForCausalLM(RwkvConfig(**WORDS, **RWKV, rescale_every=every)))
    code, _, err = train(run, tmp_path / "m")
    if every:
        is_one_line(code, err, 'set "rescale_every": 0 in its config.json')
    else:
        assert code == 0, err


class Codebook(nn.Module):
    """Moves a frozen parameter, and counts, in training or in eval mode."""

    def __init__(self, inner, moves, training):
        super().__init__()
        self.inner, self.moves, self.when = inner, moves, training
        self.codes = nn.Parameter(torch.ones(8, 4), requires_grad=False)
        self.register_buffer("mean", torch.ones(4))
        self.register_buffer("count", torch.tensor(0))

    def forward(self, x):
        if self.training == self.when:
            self.count += 1
            self.mean = 0.9 * self.mean
            if self.moves:
                self.codes.data.mul_(0.9)
        return self.inner(x)


@pytest.mark.parametrize("training", [True, False])
def test_weights_that_move_are_refused_in_either_mode(training):
    model = llama()
    model.model.norm = Codebook(model.model.norm, True, training)
    check = lambda: check_base(model, tokenizer(), [[5, 6, 7]], training=True)  # noqa: E731
    refused(check, match=r"changes the weight 'model\.norm\.codes' as it runs")
    if training:
        check_base(model, tokenizer(), [[5, 6, 7]])


@pytest.mark.parametrize("training", [True, False])
def test_buffers_are_as_before(training):
    model = llama()
    model.model.norm = norm = Codebook(model.model.norm, False, training)
    norm.register_buffer("statistics", torch.zeros(3))
    mean = norm.mean
    check_base(model, tokenizer(), [[5, 6, 7], [8] * 20], training=True)
    assert norm.mean is mean
    assert (norm.mean.tolist(), int(norm.count)) == ([1.0] * 4, 0)


def test_batch_norms_keep_their_statistics():
    model = qwen2()

    class Normed(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner, self.norm = inner, nn.BatchNorm1d(32)

        def forward(self, x):
            return self.inner(self.norm(x.transpose(1, 2)).transpose(1, 2))

    model.model.layers[1].mlp = Normed(model.model.layers[1].mlp)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    check_base(model, tokenizer(), [[5, 6, 7], [8] * 20], training=True)
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, before[name]), name


def test_the_shortest_ends_fit_no_module_that_ran():
    ran = ["a.0.self.q", "a.0.mlp.up", "a.1.mlp.up", "q_proj"]
    assert shortest_ends(["a.0.cross.q", "a.1.cross.q"], ran) == ("cross.q",)
    assert shortest_ends(["b.0.mlp.up", "b.0.mlp.down"], ran) == ("b.0.mlp.up", "down")
    assert shortest_ends(["proj"], ran) == ("proj",)


def test_the_gradient_check_answers_for_a_base_that_cannot_run(run, tmp_path):
    model_folder(tmp_path / "m")
    config = json.loads((tmp_path / "m/config.json").read_text())
    (tmp_path / "m/config.json").write_text(json.dumps(config | {"attention_dropout": 9}))
    code, _, err = run("doctor", "--grad-check", "--model", tmp_path / "m")
    is_one_line(code, err, "in training")
    assert check_modes.batch_of(llama())["input_ids"].shape == (4, 8)


def test_a_run_that_cannot_score_after_training_is_one_line_and_keeps_its_adapter(run, tmp_path, monkeypatch):
    model_folder(tmp_path / "m")
    score, calls = recipe.score, []

    def second(*arguments):
        calls.append(1)
        if len(calls) > 1:
            raise CannotRun("--model m cannot score answers: no")
        return score(*arguments)

    monkeypatch.setattr(recipe, "score", second)
    code, _, err = train(run, tmp_path / "m")
    assert (code, err.splitlines()[-1]) == (2, "align-lora: error: --model m cannot score answers: no")
    assert (tmp_path / "work/out/adapter/adapter_config.json").is_file()
