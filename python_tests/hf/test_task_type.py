"""An adapter says which kind of model it is for, and stock PEFT's class for that kind loads it."""

import json

import peft
import pytest
import torch
import transformers as hf
from hf.families import classes, family
from hf.kinds import VOCAB, adapted, bart, bert, made, padded, t5, whisper

from align_ext import load_adapter, save_adapter

LLAMA = {"vocab_size": VOCAB, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
MODELS = {
    "LlamaForCausalLM": (lambda: hf.LlamaConfig(**LLAMA, num_attention_heads=2), "CAUSAL_LM"),
    "LlamaForSequenceClassification": (
        lambda: hf.LlamaConfig(**LLAMA, num_attention_heads=2, num_labels=3, pad_token_id=0), "SEQ_CLS"
    ),
    "T5ForConditionalGeneration": (t5, "SEQ_2_SEQ_LM"),
    "BartForConditionalGeneration": (bart, "SEQ_2_SEQ_LM"),
    "BertForSequenceClassification": (lambda: bert(num_labels=3), "SEQ_CLS"),
    "BertForTokenClassification": (lambda: bert(num_labels=5), "TOKEN_CLS"),
    "BertForQuestionAnswering": (bert, "QUESTION_ANS"),
    "BertModel": (bert, "FEATURE_EXTRACTION"),
    "BertForMaskedLM": (bert, None),
    "WhisperForConditionalGeneration": (whisper, None),
}  # fmt: skip
AUTO = {
    "CAUSAL_LM": peft.AutoPeftModelForCausalLM,
    "SEQ_2_SEQ_LM": peft.AutoPeftModelForSeq2SeqLM,
    "SEQ_CLS": peft.AutoPeftModelForSequenceClassification,
    "TOKEN_CLS": peft.AutoPeftModelForTokenClassification,
    "QUESTION_ANS": peft.AutoPeftModelForQuestionAnswering,
    "FEATURE_EXTRACTION": peft.AutoPeftModelForFeatureExtraction,
}


@pytest.mark.parametrize("kind", MODELS)
def test_stock_pefts_class_of_the_kind_loads_the_adapter(tmp_path, kind):
    make, task_type = MODELS[kind]
    plain = made(kind, make(), torch.float32)
    plain.save_pretrained(tmp_path / "base")
    base = getattr(hf, kind).from_pretrained(tmp_path / "base")
    leave = ("classifier", "score", "qa_outputs")
    model = adapted(base, r=2, exclude_modules=leave).eval()
    save_adapter(model, tmp_path / "adapter")
    assert json.loads((tmp_path / "adapter/adapter_config.json").read_text())["task_type"] == task_type
    if task_type is None:
        found = peft.PeftModel.from_pretrained(
            getattr(hf, kind).from_pretrained(tmp_path / "base"), tmp_path / "adapter"
        )
    else:
        found = AUTO[task_type].from_pretrained(tmp_path / "adapter")
    ids, mask = padded([7, 5])
    inputs = {"input_ids": ids, "attention_mask": mask}
    if task_type == "SEQ_2_SEQ_LM":
        inputs["decoder_input_ids"] = ids[:, :4]
    if "Whisper" in kind:
        inputs = {"input_features": torch.randn(2, 4, 12), "decoder_input_ids": ids[:, :4]}
    with torch.no_grad():
        here, there = model(**inputs)[0], found.eval()(**inputs)[0]
    assert (here - there).abs().max() < 1e-5 * here.abs().max()


@pytest.mark.parametrize("options", [{}, {"bias": "all", "modules_to_save": ["pooler"]}])
def test_a_classifier_that_peft_wrote_again_loads(options, tmp_path):
    """PEFT then names its head twice; biases of a module that is trained whole are written twice."""
    config = peft.LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS", **options)
    peft.get_peft_model(family("bert"), config).save_pretrained(tmp_path / "once")
    stock = peft.PeftModel.from_pretrained(family("bert"), tmp_path / "once", is_trainable=True)
    with torch.no_grad():
        for parameter in stock.parameters():
            parameter.add_(parameter.requires_grad * torch.randn_like(parameter))
    stock.save_pretrained(tmp_path / "twice")
    loaded, inputs = load_adapter(family("bert"), tmp_path / "twice"), classes()
    torch.testing.assert_close(loaded(**inputs).logits, stock(**inputs).logits)
