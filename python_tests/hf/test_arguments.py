"""What is no model or no folder is refused by the name of the argument."""

import os

import pytest
from hf.folders import plain, trained
from hostile import refused

from align_ext import count_parameters, export_peft, load_adapter, merge_and_unload, save_adapter, set_task, unload


@pytest.mark.parametrize("folder", [None, 5, b"x", ["a"], "", " "], ids=repr)
def test_what_is_no_folder_is_refused_and_nothing_is_written(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused(load_adapter, plain(), folder, match="folder=")
    for write in (save_adapter, export_peft):
        refused(write, trained("lora"), folder, match="folder=")
    assert os.listdir() == []


@pytest.mark.parametrize("model", [None, {}, 5], ids=repr)
def test_what_is_no_model_is_refused(model, tmp_path):
    for call in (load_adapter, save_adapter, export_peft, set_task):
        refused(call, model, tmp_path, match="model must be a torch module")
    for call in (merge_and_unload, unload, count_parameters):
        refused(call, model, match="model must be a torch module")


def test_a_value_of_another_kind_is_refused_by_the_name_of_its_argument(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = trained("multi_adapter")
    for task in (1.0, True, "1"):
        refused(set_task, model, task, match="task must be an integer")
        refused(export_peft, model, tmp_path / "x", task, match="task=")
    refused(set_task, trained("lora", num_tasks=None), 0, match="task=0: the model knows of no tasks: give num_tasks")
    for batch in (5, "x", [1]):
        refused(merge_and_unload, trained("hydra"), "uniform", batch, match="batch=")
    for write in (save_adapter, export_peft):
        refused(write, trained("lora"), "x" * 5000, match="File name too long")
    assert os.listdir() == []
