"""Tiny real models of many kinds, batches for them, and what their alignment is, written out in plain PyTorch."""

import types

import literal
import torch
import transformers as hf
from torch.nn.functional import linear

from align_ext import AlignLoraConfig, replace_linear_with_align_lora
from align_ext.adapters.adapted_block import adapted_layers

VOCAB, TASKS, WEIGHT, WIDTH = 40, 3, 0.5, 16


def t5(**options):
    sizes = {"d_model": WIDTH, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2, "dropout_rate": 0.0}
    return hf.T5Config(**sizes, vocab_size=VOCAB, decoder_start_token_id=0, **options)


def bart(**options):
    sizes = {"d_model": WIDTH, "encoder_layers": 2, "decoder_layers": 2, "dropout": 0.0, "max_position_embeddings": 40}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24}
    return hf.BartConfig(**sizes, **heads, vocab_size=VOCAB, **options)


def whisper():
    sizes = {"d_model": WIDTH, "encoder_layers": 2, "decoder_layers": 2, "dropout": 0.0, "num_mel_bins": 4}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24}
    places = {"max_source_positions": 6, "max_target_positions": 40, "decoder_start_token_id": 1, "init_std": 0.3}
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    return hf.WhisperConfig(**sizes, **heads, **places, **special, vocab_size=VOCAB)


def bert(width=WIDTH, **options):
    sizes = {"hidden_size": width, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return hf.BertConfig(**sizes, **still, vocab_size=VOCAB, max_position_embeddings=40, **options)


def two_berts():
    """An encoder and a decoder of different widths, so that a layer between them projects."""
    return hf.EncoderDecoderConfig.from_encoder_decoder_configs(
        bert(24), bert(is_decoder=True, add_cross_attention=True), decoder_start_token_id=1, pad_token_id=0
    )


def made(kind, config, dtype=torch.float64):
    """A model of a class of transformers with a random start."""
    torch.manual_seed(0)
    return getattr(hf, kind)(config).to(dtype)


def adapted(model, **options):
    """The model in training with adapters on its linear layers, B not zero."""
    options = {"r": 4, "lora_dropout": 0.0, "align_weight": WEIGHT, "num_tasks": TASKS} | options
    replace_linear_with_align_lora(model, AlignLoraConfig(**{"target_modules": "all-linear"} | options))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("lora_B"):
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.train()


def padded(rows, longest=None, fill=0, seed=0):
    """Rows of random tokens of these lengths, and their mask."""
    generator = torch.Generator().manual_seed(seed)
    longest = longest or max(rows)
    ids = torch.randint(3, VOCAB, (len(rows), longest), generator=generator)
    mask = torch.arange(longest) < torch.tensor(rows)[:, None]
    return ids.masked_fill(~mask, fill), mask.long()


def by_hand(model, inputs, tokens_of, lm_of=lambda output: output.loss):
    """Each layer's alignment and every gradient of lm + WEIGHT * their mean; the adapters in plain PyTorch.

    Args:
        model: with adapters, which it is used up for.
        inputs: of its forward, without task_ids.
        tokens_of: name of a layer -> the task of each of its tokens, -1 where it does not count.
    """
    found = {}
    for name, layer in adapted_layers(model).items():

        def forward(self, x, name=name):
            z = linear(x, self.adapter.lora_A)
            found[name] = z.reshape(-1, z.shape[-1])
            return self.base_layer(x) + self.adapter.scaling * linear(z, self.adapter.lora_B)

        layer.forward = types.MethodType(forward, layer)
        layer._forward_pre_hooks.clear()
    config = model.align_state.config
    for handle in model.align_state.handles:
        handle.remove()
    lm = lm_of(model(**inputs))
    losses = {name: literal.kl(z, tokens_of(name), config) for name, z in found.items()}
    (lm + WEIGHT * sum(losses.values()) / len(losses)).backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {name: loss.item() for name, loss in losses.items()}, gradients
