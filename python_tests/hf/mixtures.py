"""Tiny mixtures of experts of several families, and adapters of their experts with random values."""

import torch
from tiny import TASKS, VOCAB, batch

from align_ext import AlignLoraConfig, replace_linear_with_align_lora
from align_ext.adapters.adapted_block import adapted_layers

_SIZES = {"hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 16, "num_hidden_layers": 2}
_HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "num_experts_per_tok": 2}
MIXTURES = {
    "Mixtral": {"num_local_experts": 4},
    "GptOss": {"num_local_experts": 4},  # biases, tensors [E, in, out], gate and up interleaved
    "NemotronH": {"n_routed_experts": 4, "layers_block_type": ["moe", "attention"]},  # no gate
    "DeepseekV3": {
        "n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1, "n_group": 2, "topk_group": 1,
        "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8,
        "head_dim": 4, "num_key_value_heads": 4,
    },
    "Glm4Moe": {"n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1},
    "Qwen3Next": {
        "num_experts": 4, "shared_expert_intermediate_size": 16, "layer_types": ["linear_attention", "full_attention"],
    },
    "Qwen3Moe": {"num_experts": 4, "mlp_only_layers": [0]},  # one dense layer
    "Ernie4_5_Moe": {"moe_num_experts": 4, "moe_num_shared_experts": 1, "moe_layer_start_index": 1},
    "Llama4Text": {"num_local_experts": 2, "interleave_moe_layer_step": 2},  # experts of another form
}  # fmt: skip


KINDS = ("Mixtral", "GptOss", "NemotronH", "DeepseekV3", "Glm4Moe", "Qwen3Moe")  # with transformers' experts interface
ALIGN_WEIGHT = 0.3
_UP = {"NemotronH": "experts.up_proj"}


def mixture(kind, **options):
    """A tiny model in eval mode; kind: the beginning of its configuration's name."""
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(
        **{**_SIZES, **_HEADS, **MIXTURES[kind], **options}, vocab_size=VOCAB
    )
    model = transformers.AutoModelForCausalLM.from_config(config).float().eval()
    for name, parameter in model.named_parameters():
        if name.endswith("proj_bias"):
            torch.nn.init.normal_(parameter)
    return model


def names(kind):
    return [_UP.get(kind, "experts.gate_up_proj"), "experts.down_proj"]


def options(kind, **others):
    plain = {"r": 3, "lora_alpha": 6, "lora_dropout": 0.0, "num_tasks": TASKS, "align_weight": ALIGN_WEIGHT}
    return plain | {"target_modules": ["q_proj"], "target_parameters": names(kind)} | others


def adapted(kind, dtype=torch.float32, model=None, **others):
    """A mixture whose adapters hold random values, in train mode."""
    model = (model or eager(kind)).to(dtype)
    if kind == "DeepseekV3":
        others = {"target_modules": ["q_b_proj"]} | others
    replace_linear_with_align_lora(model, AlignLoraConfig(**options(kind, **others)))
    generator = torch.Generator().manual_seed(1)  # the same values in every dtype
    with torch.no_grad():
        for layer in adapted_layers(model).values():
            for parameter in layer.adapter.parameters():
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model.train()


def eager(kind):
    """The base, whose experts are computed as they are written."""
    model = mixture(kind)
    model.set_experts_implementation("eager")
    return model


@torch.no_grad()
def logits(model):
    return model.eval()(input_ids=batch()[0]["input_ids"], use_cache=False).logits


def loss_of(model, ids=None):
    inputs, tasks = batch()
    return model(
        **inputs, use_cache=False, **({} if ids == "none" else {"task_ids": tasks if ids is None else ids})
    ).loss


def gradients(model):
    return {
        f"{name}.{part}": p.grad for name, layer in adapted_layers(model).items()
        for part, p in layer.adapter.named_parameters()
    }  # fmt: skip
