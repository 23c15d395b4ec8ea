"""A tiny model of each of many families of transformers, and a batch for it: four samples, some of them padded."""

import torch
import transformers as hf

VOCAB, WIDTH, INNER, SAMPLES, LENGTH = 40, 16, 24, 4, 7
SPECIAL = {"vocab_size": VOCAB, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SIZES = {"hidden_size": WIDTH, "num_hidden_layers": 2, "intermediate_size": INNER, "num_attention_heads": 2}
TEXT = SPECIAL | SIZES
GROUPED = TEXT | {"num_key_value_heads": 1, "head_dim": 8}
SHORT = SPECIAL | {"n_embd": WIDTH, "n_layer": 2, "n_head": 2}
SIDES = SPECIAL | {
    "d_model": WIDTH, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2, "encoder_ffn_dim": INNER,
    "decoder_attention_heads": 2, "decoder_ffn_dim": INNER, "decoder_start_token_id": 1,
}  # fmt: skip
SEEN = SIZES | {"image_size": 8, "patch_size": 4}
EXPERTS = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
HYBRID = GROUPED | EXPERTS | {"attn_layer_period": 2, "attn_layer_offset": 1}
STATE = TEXT | {"state_size": 4}
OF_QWEN2_VL = {"depth": 2, "embed_dim": WIDTH, "hidden_size": WIDTH, "num_heads": 2, "mlp_ratio": 2, "patch_size": 4}
ROPE = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}


def text():
    """Token ids, the last of some rows padding, with a mask."""
    mask = torch.arange(LENGTH) < torch.tensor([7, 5, 6, 7])[:, None]
    ids = torch.randint(4, VOCAB - 2, (SAMPLES, LENGTH), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids.masked_fill(~mask, 0), "attention_mask": mask.long()}


def labelled():
    """Text whose tokens are the labels."""
    batch = text()
    return batch | {"labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)}


def both_sides():
    """Text, and the tokens of an encoder-decoder's decoder."""
    batch = labelled()
    return batch | {"decoder_input_ids": batch["labels"].clamp_min(0)}


def classes():
    return text() | {"labels": torch.arange(SAMPLES) % 2}


def _numbers(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def images():
    return {"pixel_values": _numbers(SAMPLES, 3, 8, 8), "labels": torch.arange(SAMPLES) % 2}


def pairs():
    return text() | {"pixel_values": _numbers(SAMPLES, 3, 8, 8), "return_loss": True}


def _with_image(tokens):
    """Text that begins, after its first token, with so many tokens of an image (number 3)."""
    batch = labelled()
    batch["input_ids"][:, 1 : 1 + tokens], batch["labels"][:, 1 : 1 + tokens] = 3, -100
    return batch


def pictured():
    return _with_image(4) | {"pixel_values": _numbers(SAMPLES, 3, 8, 8)}


def patches():
    """One token for the four patches of an image, as Qwen2-VL has them."""
    batch, sizes = _with_image(1), torch.tensor([[1, 2, 2]] * SAMPLES)
    kinds = (batch["input_ids"] == 3).int()
    return batch | {"pixel_values": _numbers(SAMPLES * 4, 96), "image_grid_thw": sizes, "mm_token_type_ids": kinds}


def sound():
    batch = both_sides()
    return {"input_features": _numbers(SAMPLES, 4, 12), **{k: batch[k] for k in ("labels", "decoder_input_ids")}}


GATED, FC, DENSE = ["gate_proj", "up_proj", "down_proj"], ["fc1", "fc2"], ["dense_h_to_4h", "dense_4h_to_h"]
C_FC, BERT = ["c_fc", "mlp.c_proj"], ["intermediate.dense", "output.dense"]
# name -> class, options of its configuration, batch, and the layers that are adapted by default
FAMILIES = {
    "llama": ("LlamaForCausalLM", TEXT, labelled, GATED),
    "gemma": ("GemmaForCausalLM", GROUPED, labelled, GATED),
    "phi3": ("Phi3ForCausalLM", TEXT, labelled, ["gate_up_proj", "down_proj"]),
    "gpt2": ("GPT2LMHeadModel", SHORT, labelled, C_FC),
    "gpt_bigcode": ("GPTBigCodeForCausalLM", SHORT, labelled, C_FC),
    "gpt_neox": ("GPTNeoXForCausalLM", TEXT, labelled, DENSE),
    "falcon": ("FalconForCausalLM", TEXT, labelled, DENSE),
    "bloom": ("BloomForCausalLM", SHORT | {"hidden_size": WIDTH}, labelled, DENSE),
    "opt": ("OPTForCausalLM", TEXT | {"ffn_dim": INNER, "word_embed_proj_dim": WIDTH}, labelled, FC),
    "phi": ("PhiForCausalLM", TEXT, labelled, FC),
    "mamba": ("MambaForCausalLM", STATE, labelled, ["in_proj"]),
    "mamba2": ("Mamba2ForCausalLM", STATE | {"num_heads": 4, "head_dim": 8, "n_groups": 1}, labelled, ["in_proj"]),
    "jamba": ("JambaForCausalLM", HYBRID, labelled, GATED),
    "rwkv": (
        "RwkvForCausalLM", TEXT | {"attention_hidden_size": WIDTH, "rescale_every": 0}, labelled,
        ["feed_forward.key", "feed_forward.receptance", "feed_forward.value"],
    ),
    "mixtral": ("MixtralForCausalLM", GROUPED | EXPERTS, labelled, ["q_proj", "k_proj", "v_proj", "o_proj"]),
    "qwen2_moe": ("Qwen2MoeForCausalLM", GROUPED | EXPERTS | {"shared_expert_intermediate_size": 24}, labelled, GATED),
    "bert": ("BertForSequenceClassification", TEXT, classes, BERT),
    "roberta": ("RobertaForMaskedLM", TEXT, labelled, BERT),
    "distilbert": (
        "DistilBertForSequenceClassification",
        SPECIAL | {"dim": WIDTH, "hidden_dim": INNER, "n_layers": 2, "n_heads": 2}, classes, ["lin1", "lin2"],
    ),
    "modernbert": (
        "ModernBertForSequenceClassification", TEXT | {"cls_token_id": 1, "sep_token_id": 2}, classes, ["Wi", "mlp.Wo"],
    ),
    "vit": ("ViTForImageClassification", SEEN, images, FC),
    "swin": (
        "SwinForImageClassification",
        {"image_size": 8, "patch_size": 2, "embed_dim": 8, "depths": [1, 1], "num_heads": [2, 2], "window_size": 2},
        images, ["fc1", "fc2", "reduction"],
    ),
    "convnext": (
        "ConvNextForImageClassification",
        {"patch_size": 1, "hidden_sizes": [8, WIDTH], "depths": [1, 1], "num_stages": 2},
        images, ["pwconv1", "pwconv2"],
    ),
    "clip": ("CLIPModel", {"text_config": TEXT, "vision_config": SEEN, "projection_dim": WIDTH}, pairs, FC),
    "t5": (
        "T5ForConditionalGeneration",
        SPECIAL | {"d_model": WIDTH, "d_kv": 8, "d_ff": INNER, "num_layers": 2, "num_heads": 2},
        both_sides, ["wi", "wo"],
    ),
    "bart": ("BartForConditionalGeneration", SIDES, both_sides, FC),
    "whisper": (
        "WhisperForConditionalGeneration",
        SIDES | {"num_mel_bins": 4, "max_source_positions": 6, "max_target_positions": 16, "init_std": 0.3}, sound, FC,
    ),
    "llava": (
        "LlavaForConditionalGeneration",
        {"vision_config": SEEN | {"model_type": "clip_vision_model"}, "text_config": TEXT | {"model_type": "llama"},
         "image_token_index": 3, "vision_feature_layer": -1}, pictured, GATED,
    ),
    "qwen2_vl": (
        "Qwen2VLForConditionalGeneration",
        {"text_config": GROUPED | {"rope_parameters": ROPE}, "vision_config": OF_QWEN2_VL, "image_token_id": 3,
         "vision_start_token_id": 38, "video_token_id": 39}, patches, GATED,
    ),
}  # fmt: skip


def family(name):
    """A model of the family with random weights, always the same."""
    kind, options, _, _ = FAMILIES[name]
    model_class = getattr(hf, kind)
    torch.manual_seed(0)
    return model_class(model_class.config_class(**options)).eval()
