"""TaskCollator: ids survive beside the usual tensors, and their absence is loud."""

import datasets
import pytest
import torch
from hf.words import tokenizer
from transformers import default_data_collator
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from align_ext import TaskCollator


def feature(length, task):
    ids = list(range(3, 3 + length))
    return {"input_ids": ids, "attention_mask": [1] * length, "labels": [-100, *ids[1:]], "task_ids": task}


def test_a_tokenizer_pads_every_tensor_to_the_longest_and_the_ids_stay_in_order():
    batch = TaskCollator(tokenizer())([feature(3, 2), feature(5, 0), feature(4, -1)])
    assert batch["task_ids"].tolist() == [2, 0, -1]
    assert batch["task_ids"].dtype == torch.int64
    assert batch["input_ids"].tolist()[0] == [3, 4, 5, 0, 0]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [1, 1, 1, 1, 0]]
    assert batch["labels"].tolist()[2] == [-100, 4, 5, 6, -100]


def test_another_collator_never_sees_the_ids_and_the_features_are_left_as_they_were():
    seen = []

    def inner(features):
        seen.extend(features)
        return default_data_collator(features)

    features = [feature(3, 1), feature(3, 0)]
    assert TaskCollator(inner)(features)["task_ids"].tolist() == [1, 0]
    assert all("task_ids" not in row for row in seen)
    assert features == [feature(3, 1), feature(3, 0)]


def test_rows_of_a_dataset_and_zero_dimensional_tensors_are_ids_too():
    rows = datasets.Dataset.from_list([feature(3, 1), feature(4, 0)]).with_format("torch")
    assert TaskCollator(tokenizer())([rows[0], rows[1]])["task_ids"].tolist() == [1, 0]


def test_a_feature_without_ids_is_an_error_that_names_its_columns_and_the_cure():
    lacking = {k: v for k, v in feature(3, 0).items() if k != "task_ids"}
    with pytest.raises(ValueError, match=r"attention_mask, input_ids, labels.*remove_unused_columns=False"):
        TaskCollator(tokenizer())([feature(3, 0), lacking])


@pytest.mark.parametrize("wrong", [[0, 1], [0, 1, 0.5], "qnli", 0.5, None])
def test_ids_that_are_no_integers_or_of_another_number_than_the_tokens_are_refused(wrong):
    with pytest.raises(ValueError, match="one integer per example or per token"):
        TaskCollator(tokenizer())([feature(3, wrong)])


def test_ids_of_tokens_are_padded_on_the_side_of_the_tokens():
    features = [feature(3, [0, 1, 1]), feature(5, [2, 2, 0, 0, 0]), feature(4, 1)]
    right, left = tokenizer(), tokenizer()
    left.padding_side = "left"
    padded = [[0, 1, 1, -1, -1], [2, 2, 0, 0, 0], [1, 1, 1, 1, -1]]
    assert TaskCollator(right)(features)["task_ids"].tolist() == padded
    padded = [[-1, -1, 0, 1, 1], [2, 2, 0, 0, 0], [-1, 1, 1, 1, 1]]
    assert TaskCollator(left)(features)["task_ids"].tolist() == padded


def test_in_a_batch_without_padding_the_tokens_of_all_examples_have_their_tasks():
    collate = TaskCollator(DataCollatorForLanguageModeling(0, padding_free=True, pad_to_multiple_of=4))
    batch = collate([feature(3, 2), feature(2, 0), feature(2, -1)])
    assert batch["task_ids"].tolist() == [[2, 2, 2, 0, 0, -1, -1, -1]]
    assert batch["task_ids"].shape == batch["input_ids"].shape


def test_where_ids_are_not_required_a_batch_may_be_without_but_not_half_of_it():
    lacking = {k: v for k, v in feature(3, 0).items() if k != "task_ids"}
    collate = TaskCollator(tokenizer(), required=False)
    assert "task_ids" not in collate([lacking, lacking])
    assert collate([feature(3, 1), feature(3, 0)])["task_ids"].tolist() == [1, 0]
    with pytest.raises(ValueError, match="a feature has no task_ids"):
        collate([feature(3, 0), lacking])
