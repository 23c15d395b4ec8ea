"""load_adapter takes hub ids: what is downloaded, of which revision, and what is said where nothing comes."""

import huggingface_hub
import pytest
import torch
from hf import hub
from hf.folders import files, logits, plain, trained

from align_ext import load_adapter, save_adapter
from align_ext.io.adapter_folder import AdapterFolder

NAME = "we/ours"


@pytest.fixture
def served(tmp_path, monkeypatch):
    """A hub, an empty cache, and no folder here that is called like a repository."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    with hub.hub() as server:
        hub.connect(monkeypatch, server)
        yield server


def contents(model, folder):
    save_adapter(model, folder)
    kept = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    unwanted = {"adapter_model.bin": b"pickled", "model.safetensors": b"the whole model", "code.py": b"print()"}
    return kept | unwanted


@pytest.mark.parametrize("kind", ["lora", "hydra", "multi_adapter"])
def test_a_repository_is_loaded_and_only_its_tensors_and_options_are_downloaded(kind, served, tmp_path, monkeypatch):
    model, task = trained(kind), 1 if kind == "multi_adapter" else None
    served.files[NAME] = contents(model, tmp_path / "adapter")
    assert torch.equal(logits(load_adapter(plain(), NAME), task), logits(model, task))
    saved = [name for name in files(tmp_path / "adapter") if not name.endswith(".md")]
    assert files(AdapterFolder.read(NAME).path) == saved
    assert set(served.given) <= set(saved)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert torch.equal(logits(load_adapter(plain(), NAME), task), logits(model, task)), "of the cache"


def test_a_revision_is_that_of_the_repository(served, tmp_path):
    first, second = trained("lora"), trained("m_lora")
    served.files[f"{NAME}@v1"] = contents(first, tmp_path / "first")
    served.files[NAME] = contents(second, tmp_path / "second")
    assert torch.equal(logits(load_adapter(plain(), NAME, revision="v1")), logits(first))
    assert torch.equal(logits(load_adapter(plain(), NAME)), logits(second))
    with pytest.raises(ValueError, match=r"'we/ours', and the hub does not give it at revision='v2': "):
        load_adapter(plain(), NAME, revision="v2")
    with pytest.raises(ValueError, match=r"revision='v1' goes with a hub id \(owner/name\), not with "):
        load_adapter(plain(), tmp_path / "first", revision="v1")


def test_a_folder_is_never_asked_of_the_hub(served, tmp_path):
    served.files[NAME] = contents(trained("m_lora"), tmp_path / "theirs")
    model = trained("lora")
    save_adapter(model, NAME)
    assert torch.equal(logits(load_adapter(plain(), NAME)), logits(model))
    with pytest.raises(ValueError, match="we/others is no adapter folder"):
        load_adapter(plain(), "we/others")
    assert not served.given


@pytest.mark.parametrize("case", ["offline", "unknown", "refused"])
def test_what_does_not_come_is_one_line_with_the_cure(case, served, run, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", case == "offline")
    served.refused = "/we/" * (case == "refused")
    reason = {"offline": "HF_HUB_OFFLINE is set", "unknown": "404|Not Found", "refused": "403|no right"}[case]
    with pytest.raises(ValueError, match=reason) as caught:
        load_adapter(plain(), NAME)
    assert str(caught.value).startswith("there is no adapter folder 'we/ours', and the hub does not give it: ")
    assert str(caught.value).endswith("(hf download we/ours)")
    assert "\n" not in str(caught.value)


def test_commands_take_a_hub_id_too(served, tmp_path, run, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)  # which `run` has set
    served.files[NAME] = contents(trained("lora"), tmp_path / "adapter")
    code, out, _ = run("inspect", NAME)
    assert code == 0
    assert "architecture  lora" in out
