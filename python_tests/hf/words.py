"""A tiny tokenizer that knows every printable character, tiny models that speak it, and rows of two tasks."""

import json
import string

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<bot>{% endif %}"
)


def tokenizer(chat=False):
    vocabulary = ["[PAD]", "[END]", "[UNK]", *string.printable]
    inner = Tokenizer(models.WordLevel({token: i for i, token in enumerate(vocabulary)}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    inner.decoder = decoders.Fuse()
    result = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="[PAD]",
        eos_token="[END]",
        unk_token="[UNK]",
        clean_up_tokenization_spaces=False,
    )
    if chat:
        result.chat_template = TEMPLATE
    return result


_SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
_SPEECH = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None, "initializer_range": 0.2}


def llama(dtype=torch.float32, seed=0, **sizes):
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**_SIZES | sizes, **_SPEECH, vocab_size=len(tokenizer()))).to(dtype).eval()


def qwen2(**sizes):
    torch.manual_seed(0)
    config = Qwen2Config(**_SIZES | sizes, **_SPEECH, num_key_value_heads=2, vocab_size=len(tokenizer()))
    return Qwen2ForCausalLM(config).eval()


def qwen3():
    """Wide enough for bitsandbytes, whose blocks hold 64 weights."""
    torch.manual_seed(0)
    sizes = _SIZES | {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16, "num_key_value_heads": 2}
    return Qwen3ForCausalLM(Qwen3Config(**sizes, **_SPEECH, vocab_size=len(tokenizer()))).eval()


def qwen3_moe():
    torch.manual_seed(0)
    sizes = _SIZES | {"moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2, "head_dim": 8}
    config = Qwen3MoeConfig(**sizes, **_SPEECH, num_key_value_heads=2, vocab_size=len(tokenizer()))
    return Qwen3MoeForCausalLM(config).eval()


def wide_qwen2():
    """With biases, and wide enough for bitsandbytes."""
    return qwen2(hidden_size=64, intermediate_size=128)


def gpt2():
    torch.manual_seed(0)
    config = GPT2Config(**_SPEECH, n_embd=32, n_layer=2, n_head=4, n_positions=128, vocab_size=len(tokenizer()))
    return GPT2LMHeadModel(config).eval()


def model_folder(folder, chat=False, model=llama):
    model().save_pretrained(folder)
    tokenizer(chat).save_pretrained(folder)
    return folder


def rows(count=24):
    """Rows of two tasks: one with choices, one with free text."""
    for i in range(count):
        yes = i % 3 == 0
        yield {
            "task": "threes",
            "instruction": f"3|{i}: yes or no?",
            "choices": ["yes", "no"],
            "label": 0 if yes else 1,
            "answer": "yes" if yes else "no",
            "output": f"the answer is {'yes' if yes else 'no'}",
        }
        yield {"task": "next", "prompt": f"after {i} comes", "completion": str(i + 1)}


def write_rows(file, content=None):
    file.write_text("".join(json.dumps(row) + "\n" for row in (rows() if content is None else content)))
    return file
