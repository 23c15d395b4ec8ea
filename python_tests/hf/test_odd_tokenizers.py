"""Tokenizer files that say odd things, and paths below homes that do not exist: right, or one line."""

import json

import pytest
import torch
from hf.test_cli_adapters import adapter_folder
from hf.words import llama, model_folder, tokenizer, write_rows
from hostile import refused
from tokenizers import normalizers

from align_ext.base_model.load import load_model
from align_ext.data.collator import TaskCollator
from align_ext.data.encode import text_batch


def edited(folder, **entries):
    """A model's folder whose tokenizer_config.json has other entries."""
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | entries))
    return folder


def few(command, folder, data):
    """Flags of a short run of a command."""
    own = ["--steps", 1, "--batch-size", 4, "--eval-examples", 2] if command == "train" else ["--examples", 2]
    return [command, "--model", folder, "--data", data, "--dtype", "float32", *own]


INPUTS = [
    ["input_ids"],
    pytest.param(["input_ids", "token_type_ids"], marks=pytest.mark.slow),
    pytest.param(["input_ids", "token_type_ids", "attention_mask"], marks=pytest.mark.slow),
]


@pytest.mark.parametrize("names", INPUTS)
def test_the_mask_is_there_whatever_the_names_of_inputs_are(names, run, tmp_path):
    adapter_folder(tmp_path / "a", "lora")
    adapter_folder(tmp_path / "h", "hydra")
    said = []
    for folder in (model_folder(tmp_path / "plain"), edited(model_folder(tmp_path / "m"), model_input_names=names)):
        to = tmp_path / f"of-{folder.name}"
        code, _, err = run("export", tmp_path / "a", "--model", folder, "--output", to / "x", "--verify")
        assert code == 0, err
        approximate = ["--approximate", "uniform", "--output", to / "y"]
        code, merged, err = run("merge", tmp_path / "h", "--model", folder, *approximate)
        assert code == 0, err
        code, _, err = run(*few("train", folder, write_rows(tmp_path / "rows.jsonl")), "--output", to / "z")
        assert code == 0, err
        losses = json.loads((to / "z/results.json").read_text())["losses"]
        said.append((merged.partition("KL")[2].partition("\n")[0], losses[0]["loss"]))
    assert said[0] == said[1]


def test_the_collator_pads_masks_and_leaves_the_users_tokenizer_alone():
    words = tokenizer()
    words.model_input_names = ["input_ids"]
    rows = [{"input_ids": [5] * n, "attention_mask": [1] * n, "labels": [5] * n, "task_ids": 0} for n in (2, 4)]
    batch = TaskCollator(words)(rows)
    assert batch["attention_mask"].tolist() == [[1, 1, 0, 0], [1, 1, 1, 1]]
    assert words.model_input_names == ["input_ids"]


@pytest.mark.parametrize("value", ["x", "512", [1], {}, True])
def test_a_largest_length_that_is_no_number_names_folder_and_entry(value, run, tmp_path):
    folder = edited(model_folder(tmp_path / "m"), model_max_length=value)
    data = write_rows(tmp_path / "rows.jsonl")
    for command in ("train", "eval"):
        code, _, err = run(*few(command, folder, data))
        assert (code, len(err.splitlines())) == (2, 1)
        assert f"{tmp_path / 'm'}: model_max_length=" in err


@pytest.mark.parametrize(
    "entries",
    [
        {"model_input_names": 5}, {"model_input_names": [1]}, {"model_input_names": []}, {"padding_side": "top"},
        {"pad_token": 7}, {"eos_token": []}, {"truncation_side": 1}, {"extra_special_tokens": 3},
        {"clean_up_tokenization_spaces": "x"}, {"added_tokens_decoder": 4}, {"model_max_length": None},
        {"model_max_length": -1}, {"model_max_length": 1.5},
    ],
)  # fmt: skip
def test_whatever_another_entry_is_the_answer_is_a_result_or_one_line(entries, run, tmp_path):
    folder = edited(model_folder(tmp_path / "m"), **entries)
    code, _, err = run(*few("eval", folder, write_rows(tmp_path / "rows.jsonl")))
    assert code in (0, 2), err
    assert code == 0 or ("tokenizer" in err or str(folder) in err)
    assert code == 0 or len(err.splitlines()) == 1


def silent(folder):
    """A model's folder whose tokenizer makes nothing of z."""
    words = tokenizer()
    words._tokenizer.normalizer = normalizers.Replace("z", "")
    words.save_pretrained(model_folder(folder))
    return folder


def test_prompts_of_which_no_token_is_made_are_one_line(run, tmp_path):
    adapter_folder(tmp_path / "h", "hydra")
    flags = ["--model", silent(tmp_path / "m"), "--approximate", "uniform", "--prompts", "lines", "--output"]
    (tmp_path / "work/lines").write_text("zzz\nz\n")
    code, _, err = run("merge", tmp_path / "h", *flags, "o")
    assert (code, err.count("\n"), (tmp_path / "work/o").exists()) == (2, 1, False)
    assert "makes no token of any of the prompts" in err
    (tmp_path / "work/lines").write_text("zzz\nhello\n")
    code, out, err = run("merge", tmp_path / "h", *flags, "o")
    assert code == 0, err
    assert "of 5 tokens" in " ".join(out.split())


def test_a_batch_of_texts_holds_those_that_are_some_tokens(tmp_path):
    _, words = load_model(str(silent(tmp_path / "m")))
    batch = text_batch(words, ["zz", "ab", "abc"])
    assert batch["attention_mask"].tolist() == [[1, 1, 0], [1, 1, 1]]
    with torch.no_grad():
        assert llama()(**batch).logits.isfinite().all()
    refused(text_batch, words, ["z", "zz"], match="makes no token of any")


@pytest.mark.parametrize("command", ["train", "eval", "merge", "export", "resume"])
def test_a_home_that_does_not_exist_names_the_option(command, run, tmp_path):
    folder, data, nowhere = model_folder(tmp_path / "m"), write_rows(tmp_path / "rows.jsonl"), "~nobody-of-this-name/x"
    adapter_folder(tmp_path / "a", "lora")
    given = {
        "train": [*few("train", folder, data), "--output", nowhere],
        "resume": [*few("train", folder, data), "--resume", "--output", nowhere],
        "eval": [*few("eval", folder, data), "--json", nowhere],
    }.get(command, [command, tmp_path / "a", "--model", folder, "--output", nowhere])
    code, _, err = run(*given)
    assert (code, err.count("\n")) == (2, 1)
    assert f"{'--json' if command == 'eval' else '--output'} '{nowhere}'" in err
    assert list((tmp_path / "work").iterdir()) == []
