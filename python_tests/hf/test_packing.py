"""Packed rows: no example sees another, losses are those of rows by themselves, and texts that are cut say so."""

import copy

import pytest
import torch
from hf.runs import options, prepare, run
from hf.words import gpt2, llama, model_folder, qwen2, tokenizer, write_rows
from transformers import BloomConfig, BloomForCausalLM, MambaConfig, MambaForCausalLM

from align_ext.data import packing
from align_ext.data.encode import features
from align_ext.data.packing import PackedCollator, check_packing, cut_texts
from align_ext.data.rows import Example
from align_ext.training.options import TrainOptions

IDS = {"a": 0, "b": 1}


def example(number):
    return Example("ab"[number % 2], f"q{number}", "x" * (1 + number % 5))


EXAMPLES = [example(i) for i in range(14)]


def rows():
    return list(features(tokenizer(), EXAMPLES, IDS))


def pack(*given):
    return list(packing.pack(*given))


def test_by_hand():
    given = [
        {"input_ids": ids, "labels": ids, "attention_mask": [1] * len(ids), "task_ids": task}
        for ids, task in (([1, 2, 3], 1), ([4, 5], 0), ([6, 7, 8, 9], 1), ([10, 11], 1))
    ]
    assert pack(given, 5) == [
        {"input_ids": [6, 7, 8, 9], "labels": [-100, 7, 8, 9], "position_ids": [0, 1, 2, 3], "task_ids": 1},
        {"input_ids": [1, 2, 3, 10, 11], "labels": [-100, 2, 3, -100, 11], "position_ids": [0, 1, 2, 0, 1],
         "task_ids": 1},
        {"input_ids": [4, 5], "labels": [-100, 5], "position_ids": [0, 1], "task_ids": 0},
    ]  # fmt: skip
    batch = PackedCollator(tokenizer())(pack(given, 5)[1:])
    assert {name: x.tolist() for name, x in batch.items()} == {
        "input_ids": [[1, 2, 3, 10, 11, 4, 5]], "labels": [[-100, 2, 3, -100, 11, -100, 5]],
        "position_ids": [[0, 1, 2, 0, 1, 0, 1]], "task_ids": [[1, 1, 1, 1, 1, 0, 0]],
    }  # fmt: skip
    with pytest.raises(ValueError, match="a row of 4 tokens does not fit into packed rows of 3"):
        pack(given, 3)


def test_nothing_is_lost_or_mixed_and_rows_are_filled():
    packed = pack(rows(), 40)
    assert [pack(rows(), 40), len(packed) < len(EXAMPLES)] == [packed, True]
    for task in (0, 1):
        tokens = sorted(t for row in packed if row["task_ids"] == task for t in row["input_ids"])
        assert tokens == sorted(t for row in rows() if row["task_ids"] == task for t in row["input_ids"])
    assert max(len(row["input_ids"]) for row in packed) <= 40


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("made", [llama, qwen2, gpt2])
def test_losses_and_gradients_equal_those_of_rows_by_themselves(made, attention):
    model = made().double()
    model.set_attn_implementation(attention)
    check_packing(model, rows())
    items = sum(label != -100 for row in rows() for label in row["labels"])
    collate, results = PackedCollator(tokenizer()), []
    for some in (rows(), pack(rows(), 40)):
        model.zero_grad()
        batch = {name: x for name, x in collate(some).items() if name != "task_ids"}
        loss = model(**batch, num_items_in_batch=items, use_cache=False).loss
        loss.backward()
        results.append((loss.detach(), next(model.parameters()).grad.clone()))
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)  # the loss is computed in float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_to_16_bits_is_no_reason_to_refuse_a_model(dtype):
    check_packing(llama(dtype), rows())


def test_models_in_which_examples_would_see_each_other_are_refused():
    sizes = {"vocab_size": len(tokenizer()), "hidden_size": 32, "initializer_range": 0.3}
    torch.manual_seed(0)
    mamba = MambaForCausalLM(MambaConfig(**sizes, num_hidden_layers=2, state_size=4)).eval()
    bloom = BloomForCausalLM(BloomConfig(**sizes, n_layer=2, n_head=4)).eval()
    for model in (mamba, bloom):
        with pytest.raises(ValueError, match="leave --packing out"):
            check_packing(model, rows())


@pytest.mark.parametrize("text", ["abcdefghij" * 5, "a b " * 9 + "end", "äöü\U0001f600" * 8])
def test_a_text_is_cut_into_pieces_that_hold_all_of_it(text):
    made = tokenizer()
    whole = Example("t", (), text)
    pieces = list(cut_texts(made, [whole, example(0)], 12))
    assert pieces.pop() == example(0)
    assert "".join(piece.answer for piece in pieces) == text
    assert [piece.ends for piece in pieces] == [False] * (len(pieces) - 1) + [True]
    of_pieces = list(features(made, pieces, {"t": 0}))
    assert {len(row["input_ids"]) for row in of_pieces[:-1]} == {12}
    joined = [token for row in of_pieces for token in row["input_ids"]]
    assert joined == next(features(made, [whole], {"t": 0}))["input_ids"]
    assert list(cut_texts(made, [whole], 500)) == [whole]


@pytest.mark.parametrize("architecture", ["align_lora", "multi_adapter"])
def test_a_packed_run_learns_the_same_as_rows_by_themselves(place, architecture):
    write_rows(place / "rows.jsonl", [
        {"task": task, "prompt": f"{task}{i}", "completion": task * 3} for task in "ab" for i in range(8)
    ])  # fmt: skip
    common = {"architecture": architecture, "align": "none", "mixing": "equal", "steps": 2, "eval_examples": 2,
              "lora_dropout": 0.0, "log_steps": 1, "seq_len": 8 * 6}  # fmt: skip
    packed = prepare(place, **common, packing=True, batch_size=2, output="packed")
    plain = prepare(place, **common, batch_size=12, per_task=6, output="plain")
    assert [len(row["input_ids"]) for row in packed.train_rows] == [42, 42], "six examples of 2 + 1 + 3 + 1 tokens"
    assert len(plain.train_rows) == 12
    first, _ = run(place, **common, packing=True, batch_size=2, output="one")
    second, _ = run(place, **common, batch_size=12, per_task=6, output="two")
    for entry, other in zip(first["losses"], second["losses"], strict=True):
        for name in ("lm_loss", "loss/a", "loss/b"):
            assert entry[name] == pytest.approx(other[name], rel=1e-5)
    assert first["after"]["tasks"]["a"]["loss"] == pytest.approx(second["after"]["tasks"]["a"]["loss"], rel=1e-4)


def test_alignment_counts_the_same_tokens(place):
    common = {"align": "kl", "steps": 2, "eval_examples": 2, "lora_dropout": 0.0, "log_steps": 1, "seq_len": 4000,
              "train_examples": 8}  # fmt: skip
    packed, _ = run(place, **common, packing=True, batch_size=4, output="one")
    plain, _ = run(place, **common, batch_size=16, per_task=8, output="two")
    assert packed["losses"][0]["align_loss"] == pytest.approx(plain["losses"][0]["align_loss"], rel=1e-4)
    assert packed["losses"][-1]["align_loss"] > 0


def test_long_texts_are_left_out_or_with_packing_cut_and_counted(place):
    texts = [{"task": "t", "text": f"{i} " + "word " * 12} for i in range(6)]
    write_rows(place / "rows.jsonl", [*texts, *({"task": "q", "prompt": f"p{i}", "answer": "a"} for i in range(6))])
    with pytest.raises(ValueError, match=r"'t' has no examples to score on: all 6 are too long for seq_len=30: give"):
        prepare(place, seq_len=30, eval_examples=2)
    job = prepare(place, seq_len=30, eval_examples=2, packing=True, output="cut")
    assert job.data.notes[-2:] == (
        "train: 8 examples were cut into 16 pieces of at most 30 tokens",
        "test: 4 examples were cut into 8 pieces of at most 30 tokens",
    )
    assert max(len(row["input_ids"]) for row in job.train_rows) == 30
    results, said = run(place, seq_len=30, eval_examples=2, packing=True, output="ran", steps=2)
    assert results["after"]["tasks"]["t"]["score"] is None
    assert "were cut into 16 pieces" in said


@pytest.mark.parametrize("option", [{"align_statistics": "position"}, {"architecture": "mtlora", "router": "mlp",
                                                                       "routing": "sequence"}])  # fmt: skip
def test_options_about_whole_rows_are_refused(option):
    with pytest.raises(ValueError, match=r"packing: .* is about whole rows"):
        TrainOptions.from_mapping({**option, "packing": True})


def test_a_model_that_cannot_be_packed_leaves_no_files(place, tmp_path):
    torch.manual_seed(0)
    sizes = {"vocab_size": len(tokenizer()), "hidden_size": 32, "n_layer": 2, "n_head": 4, "initializer_range": 0.3}

    def bloom():
        return BloomForCausalLM(BloomConfig(**sizes, pad_token_id=0, eos_token_id=1))

    model_folder(place / "bloom", model=bloom)
    with pytest.raises(ValueError, match="leave --packing out"):
        prepare(place, model=str(place / "bloom"), packing=True, align="none")
    assert not (place / "work/out").exists()
    assert copy.copy(options(place)).packing is False
