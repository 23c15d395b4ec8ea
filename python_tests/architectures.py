"""The architectures' options that tests of layers and of steps go through, by name."""

from typing import Any

from align_ext import AlignLoraConfig

ARCHITECTURES = {
    "lora": {"architecture": "lora"},
    "lora, gaussian": {"architecture": "lora", "init_lora_weights": "gaussian"},
    "lora, orthogonal": {"architecture": "lora", "init_lora_weights": "orthogonal"},
    "lora, pissa": {"architecture": "lora", "init_lora_weights": "pissa"},
    "lora, DoRA": {"architecture": "lora", "use_dora": True},
    "align_lora": {"architecture": "align_lora", "use_rslora": True},
    "multi_adapter": {"architecture": "multi_adapter"},
    "multi_adapter, gaussian": {"architecture": "multi_adapter", "init_lora_weights": "gaussian"},
    "lora_moe, dense": {"architecture": "lora_moe"},
    "lora_moe, top 2": {"architecture": "lora_moe", "top_k": 2},
    "lora_moe, orthogonal": {"architecture": "lora_moe", "init_lora_weights": "orthogonal", "router_temperature": 0.5},
    "hydra": {"architecture": "hydra"},
    "hydra, gaussian": {"architecture": "hydra", "init_lora_weights": "gaussian", "dropout_site": "input_per_head"},
    "hydra, random heads": {"architecture": "hydra", "init_lora_weights": "random_heads"},
    "hydra without router": {"architecture": "hydra", "router": None},
    "hydra without router, orthogonal": {"architecture": "hydra", "router": None, "init_lora_weights": "orthogonal"},
    "r_lora": {"architecture": "r_lora"},
    "r_lora, kaiming": {"architecture": "r_lora", "init_lora_weights": "kaiming"},
    "m_lora, sum": {"architecture": "m_lora"},
    "m_lora, mean": {"architecture": "m_lora", "reduce": "mean"},
    "m_lora, DoRA": {"architecture": "m_lora", "use_dora": True},
    "mtlora, one group": {"architecture": "mtlora", "target_blocks": (), "routing_groups": 1},
    "mtlora, two groups": {"architecture": "mtlora", "target_blocks": ()},
    "mtlora, random heads": {"architecture": "mtlora", "target_blocks": (), "init_lora_weights": "random_heads"},
    "mtlora, by sequence": {
        "architecture": "mtlora", "target_blocks": (), "router": "mlp", "routing": "sequence",
    },
    "mtlora, blocks": {"architecture": "mtlora", "target_blocks": ("attention", "mlp")},
    "multilora": {"architecture": "multilora"},
    "moelora": {"architecture": "moelora"},
    "mtlora_cvpr": {"architecture": "mtlora_cvpr"},
    "nlora, nystrom": {"architecture": "nlora"},
    "nlora, kaiming": {"architecture": "nlora", "init_lora_weights": "kaiming"},
    "malora": {"architecture": "malora", "shared_rank": 6},
    "mixlora": {"architecture": "mixlora"},
    "adalora": {"architecture": "adalora"},
}  # fmt: skip
# What the papers compare with. Their operators are those of the others, so that slow tests leave them out.
COMPARED = ["multilora", "moelora", "mtlora_cvpr", "nlora, nystrom", "nlora, kaiming", "malora", "adalora"]
FROM_WEIGHT = ["lora, pissa", "nlora, nystrom"]  # which start from the base weight
ON_LAYERS = [name for name in ARCHITECTURES if name not in ("mtlora, blocks", "mixlora")]


def config_of(name: str, **options: Any) -> AlignLoraConfig:
    """The options of an architecture with others on top; 3 heads where it has some."""
    options = ARCHITECTURES[name] | options
    config = AlignLoraConfig(**{"num_tasks": 3} | options)
    if config.num_heads is not None and "num_heads" not in options:
        config = AlignLoraConfig(**{"num_tasks": 3, "num_heads": 3} | options)
    return config


HEADS = [name for name in ON_LAYERS if config_of(name).num_heads is not None]
ROUTED = [name for name in ON_LAYERS if config_of(name).router is not None]
MERGEABLE = [name for name in ON_LAYERS if name not in ROUTED]
