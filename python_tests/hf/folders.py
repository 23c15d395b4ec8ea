"""Models of every architecture whose adapters hold no value of their start any more, and what they compute."""

import copy
import functools
import json

import torch
from hf.test_replace import gpt2, qwen2
from safetensors.torch import load_file, save_file
from tiny import TASKS, batch, llama

from align_ext import AlignLoraConfig, replace_linear_with_align_lora, set_task
from align_ext.adapters.adapted_block import adapted_layers

MODELS = {
    "llama": (llama, {"target_modules": ["up_proj", "down_proj"]}),
    "gpt2": (gpt2, {"target_modules": ["c_attn", "c_fc"]}),  # Conv1D
    "qwen2": (qwen2, {"target_modules": ["q_proj", "v_proj"]}),  # with biases
}
ONE_LORA = {
    "lora": {"architecture": "lora"},
    "align_lora": {"architecture": "align_lora"},
    "mean of heads": {"architecture": "m_lora", "reduce": "mean"},
    "PiSSA": {"architecture": "lora", "init_lora_weights": "pissa"},
    "PiSSA, rslora": {"architecture": "align_lora", "init_lora_weights": "pissa", "use_rslora": True},
    "m_lora": {"architecture": "m_lora"},
    "m_lora, rslora": {"architecture": "m_lora", "use_rslora": True, "spectral": "paper"},
    "hydra without router": {"architecture": "hydra", "router": None, "lora_dropout": 0.1},
    "multilora": {"architecture": "multilora"},
    "nlora": {"architecture": "nlora"},
    "adalora": {"architecture": "adalora"},
}  # what is one change of the weight, hence one LoRA
DORA = {
    "DoRA": {"architecture": "lora", "use_dora": True},
    "m_lora, DoRA": {"architecture": "m_lora", "use_dora": True},
}  # what is one change of the weight, and in PEFT's form has a magnitude beside
TASKED = {
    "multi_adapter": {"architecture": "multi_adapter"},
    "moelora": {"architecture": "moelora", "num_heads": 3},
    "mtlora_cvpr": {"architecture": "mtlora_cvpr"},
}
ROUTED = {
    "hydra": {"architecture": "hydra"},
    "lora_moe": {"architecture": "lora_moe", "top_k": 2},
    "malora": {"architecture": "malora", "num_heads": 3, "shared_rank": 5},
    "r_lora": {"architecture": "r_lora"},
    "mtlora": {"architecture": "mtlora", "target_blocks": ()},
    "sequence router": {"architecture": "mtlora", "target_blocks": (), "router": "mlp", "routing": "sequence"},
}
BLOCKS = {
    "mtlora beside blocks": {"architecture": "mtlora", "target_blocks": ("attention", "mlp")},
    "lora beside blocks": {"architecture": "lora", "target_blocks": ("mlp",)},
}
MIXTURES = {
    "mixlora": {"architecture": "mixlora", "num_heads": 4, "router_temperature": 0.5, "target_modules": "all-linear"}
}
ARCHITECTURES = ONE_LORA | DORA | TASKED | ROUTED | BLOCKS | MIXTURES


def trained(kind, base="llama", dtype=torch.float32, **options):
    """A tiny model with adapters of random values, in train mode."""
    targets = MODELS[base][1]
    defaults = {"r": 3, "lora_alpha": 5, "lora_dropout": 0.0, "num_tasks": TASKS} | targets
    model, options = plain(base).to(dtype), defaults | ARCHITECTURES[kind] | options
    torch.manual_seed(2)
    replace_linear_with_align_lora(model, AlignLoraConfig(**options))
    with torch.no_grad():
        for layer in adapted_layers(model).values():
            for tensor in layer.adapter.state_dict().values():
                if tensor.is_floating_point():
                    tensor.add_(0.2 * torch.randn_like(tensor))
                else:
                    tensor.fill_(7)  # the projectors' age
    return model.train()


@functools.cache
def _made(base):
    return MODELS[base][0]()


def plain(base="llama"):
    """The base model."""
    return copy.deepcopy(_made(base))


@torch.no_grad()
def logits(model, task=None):
    """In evaluation; of a task, where the model has adapters."""
    if task is not None:
        set_task(model, task)
    inputs = batch()[0]
    inputs["labels"][:, :4] = -100  # the prompt, which a sequence router looks at
    if getattr(model, "peft_type", None) == "ADALORA":  # PEFT's own computes no loss in inference
        del inputs["labels"]
    training = model.training
    result = model.eval()(**inputs).logits
    model.train(training)
    return result


def state(model):
    """What the adapters hold, by name."""
    return {
        f"{name}.{part}": tensor.clone()
        for name, layer in adapted_layers(model).items()
        for part, tensor in layer.adapter.state_dict().items()
    }


def assert_same_bits(a, b):
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) and a[name].dtype == b[name].dtype for name in a)


def as_version_0_1_0(folder):
    """Takes the records of digests, options and the base from a folder."""
    for file in folder.rglob("*.safetensors"):
        save_file(load_file(file), file)
    for file in folder.rglob("align_lora_config.json"):
        content = json.loads(file.read_text())
        content.pop("digest", None)
        file.write_text(json.dumps(content))


def files(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())
