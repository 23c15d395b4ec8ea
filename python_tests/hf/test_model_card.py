"""The model card of an adapter's folder: what it says runs, and a README.md of the user's stays as it is."""

import re

import pytest
import torch
from hf.trainers import features
from hf.words import llama as base_llama
from huggingface_hub import ModelCard
from tiny import adapted, batch, llama

from align_ext import AlignTrainer, TaskCollator, export_peft, save_adapter, unload
from align_ext.merging.arithmetic import read_lora, write_lora
from align_ext.training.arguments import align_training_arguments

OWN = "# Mine\n\nOf the user.\n"


def card_of(folder):
    return ModelCard.load(folder / "README.md")


def save_and_export(model, folder):
    save_adapter(model, folder / "saved", ("sums", "news"))
    export_peft(model, folder / "exported")
    write_lora(read_lora(folder / "saved"), folder / "composed")


def test_what_the_card_says_of_loading_runs_with_align_ext_and_with_peft(tmp_path, monkeypatch):
    llama().save_pretrained(tmp_path / "base")
    model = adapted(llama().from_pretrained(tmp_path / "base"), torch.float32, num_tasks=2).eval()
    save_adapter(model, tmp_path / "adapter", ("sums", "news"))
    text = card_of(tmp_path / "adapter").text
    assert str(tmp_path) not in text  # a folder's place is nobody else's business
    monkeypatch.chdir(tmp_path)
    ((code),) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    ours, theirs = code.replace("FOLDER", str(tmp_path / "adapter")).split("from peft")
    inputs = {"input_ids": batch()[0]["input_ids"]}
    for run in (ours, ours.partition("\n\nfrom align_ext")[0] + "\nfrom peft" + theirs):
        names = {}
        exec(run, names)
        with torch.no_grad():
            torch.testing.assert_close(names["model"].eval()(**inputs).logits, model(**inputs).logits)
    assert "# Adapter of base for 2 tasks" in text
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert (
        f"An align_lora adapter of rank 4 ({count:,} trained parameters) for the tasks sums, news, written by" in text
    )
    assert "num_tasks: 2\n" in text
    assert "lora_alpha" not in text  # as by default


@pytest.mark.parametrize("name", ["owner/name", "/cache/models--owner--name/snapshots/0123abc"])
def test_the_block_for_the_hub_is_pefts(name, tmp_path):
    model = adapted(base_llama(), torch.float32)
    model.name_or_path = name
    save_and_export(model, tmp_path)
    for folder in ("saved", "exported"):
        about = card_of(tmp_path / folder).data
        assert (about.base_model, about.library_name, about.license) == ("owner/name", "peft", None)
        assert {"base_model:adapter:owner/name", "lora", "transformers", "align_lora"} <= set(about.tags)


def test_a_card_names_no_loader_that_cannot_load_it(tmp_path):
    save_adapter(adapted(architecture="hydra"), tmp_path / "adapter")
    card = card_of(tmp_path / "adapter")
    assert card.data.library_name == "align_ext"
    assert "PeftModel" not in card.text
    assert card.data.base_model is None


def test_a_card_of_ours_is_renewed_and_one_of_the_users_stays(tmp_path):
    first, second = adapted(base_llama(), r=2), adapted(base_llama(), r=3)
    for folder in ("saved", "exported"):
        (tmp_path / folder).mkdir()
    (tmp_path / "exported/README.md").write_text(OWN)
    save_and_export(first, tmp_path)
    (tmp_path / "composed/README.md").write_bytes((tmp_path / "saved/README.md").read_bytes())
    save_and_export(second, tmp_path)
    assert "of rank 3" in (tmp_path / "saved/README.md").read_text()
    assert not (tmp_path / "composed/README.md").exists()
    assert (tmp_path / "exported/README.md").read_text() == OWN
    edited = (tmp_path / "saved/README.md").read_text().replace("# Adapter", "# Our adapter")
    (tmp_path / "saved/README.md").write_text(edited)
    save_and_export(first, tmp_path)
    assert (tmp_path / "saved/README.md").read_text() == edited


def test_the_card_that_trainer_makes_names_the_library(tmp_path):
    model = adapted(base_llama(), torch.float32)
    arguments = align_training_arguments(str(tmp_path / "run"), use_cpu=True)
    trainer = AlignTrainer(model, arguments, train_dataset=features(), data_collator=TaskCollator(0))
    trainer.save_model()
    trainer.create_model_card(tags="mine")
    card = card_of(tmp_path / "run")
    assert card.data.library_name == "peft"
    assert {"mine", "generated_from_trainer", "align_lora"} <= set(card.data.tags)
    before = (tmp_path / "run/README.md").read_text()
    trainer.save_model()
    assert (tmp_path / "run/README.md").read_text() == before
    assert not hasattr(unload(model), "create_or_update_model_card")
