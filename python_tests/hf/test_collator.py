"""TaskCollator: ids survive beside the usual tensors, and their absence is loud."""

import datasets
import pytest
import torch
from hf.words import tokenizer
from transformers import default_data_collator

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


@pytest.mark.parametrize("wrong", [[0, 1, 1], "qnli", 0.5, None])
def test_ids_that_are_not_one_integer_are_refused(wrong):
    with pytest.raises(ValueError, match="one integer per example"):
        TaskCollator(tokenizer())([feature(3, wrong)])
