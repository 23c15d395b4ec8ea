"""TRL's trainers beside SFT: their reference is the base, and what they write is an adapter's folder."""

import pytest
import torch
from datasets import Dataset
from hf.words import model_folder, tokenizer
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from align_ext import disable_adapter, load_adapter, replace_linear_with_align_lora

OPTIONS = {"architecture": "lora", "target_modules": ["q_proj", "lm_head"], "r": 2, "lora_dropout": 0.0}
ROWS = [{"prompt": "2 + 3 =", "chosen": f" {i}", "rejected": f" {9 - i}"} for i in range(4)]
IDS = {"input_ids": torch.tensor([[5, 6, 7, 8]])}


def trainer(model, folder, **options):
    from trl import DPOConfig, DPOTrainer

    args = {
        "max_steps": 2,
        "learning_rate": 0.1,
        "use_cpu": True,
        "report_to": "none",
        "logging_steps": 1,
        "bf16": False,
    }
    return DPOTrainer(
        model=model, args=DPOConfig(folder, save_strategy="no", disable_tqdm=True, **args | options),
        train_dataset=Dataset.from_list(ROWS), processing_class=tokenizer(),
    )  # fmt: skip


@pytest.mark.parametrize("precompute", [True, False])
def test_dpo_starts_at_its_reference_and_moves_the_adapters_alone(precompute, tmp_path):
    model_folder(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = replace_linear_with_align_lora(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), **OPTIONS)
    dpo = trainer(model, str(tmp_path / "run"), precompute_ref_log_probs=precompute)
    assert (dpo.ref_model is None) == precompute
    dpo.train()
    first, second = (row for row in dpo.state.log_history if "rewards/margins" in row)
    assert first["loss"] == pytest.approx(torch.log(torch.tensor(2.0)).item(), abs=1e-5)
    assert abs(first["rewards/margins"]) < 1e-5 < abs(second["rewards/margins"])
    with torch.no_grad(), disable_adapter(model.eval()):
        assert torch.equal(model(**IDS).logits, base.eval()(**IDS).logits)
    dpo.save_model(str(tmp_path / "saved"))
    with torch.no_grad():
        assert torch.equal(load_adapter(base, tmp_path / "saved").eval()(**IDS).logits, model(**IDS).logits)


def test_an_adopted_model_whose_adapter_trl_would_copy_is_refused_with_the_cure(tmp_path):
    model_folder(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    adopted = replace_linear_with_align_lora(get_peft_model(model, LoraConfig(target_modules=["q_proj"])), align=None)
    with pytest.raises(RuntimeError, match=r"TRL's\), take a plain model with replace_linear_with_align_lora"):
        trainer(adopted, str(tmp_path / "run"))
