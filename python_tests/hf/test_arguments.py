"""What is no model or no folder is refused by the name of the argument."""

import os

import pytest
from hf.folders import plain, trained
from hostile import refused

from align_ext import export_peft, load_adapter, merge_and_unload, save_adapter, set_task, unload


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
    for call in (merge_and_unload, unload):
        refused(call, model, match="model must be a torch module")
