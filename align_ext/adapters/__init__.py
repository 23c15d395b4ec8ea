"""What sits where a linear layer or a block sat: one architecture a file."""

from align_ext.adapters.base import Adapter
from align_ext.adapters.hydra import HydraAdapter, HydraSumAdapter
from align_ext.adapters.lora import LoraAdapter, MultiAdapter
from align_ext.adapters.lora_moe import LoraMoeAdapter
from align_ext.adapters.m_lora import MLoraAdapter
from align_ext.adapters.mtlora import MtLoraAdapter
from align_ext.adapters.r_lora import RLoraAdapter
from align_ext.config import AlignLoraConfig

ARCHITECTURES: dict[str, type[Adapter]] = {
    "lora": LoraAdapter,
    "align_lora": LoraAdapter,
    "multi_adapter": MultiAdapter,
    "lora_moe": LoraMoeAdapter,
    "hydra": HydraAdapter,
    "r_lora": RLoraAdapter,
    "m_lora": MLoraAdapter,
    "mtlora": MtLoraAdapter,
}


def adapter_class(config: AlignLoraConfig) -> type[Adapter]:
    """The architecture that the options name."""
    if config.architecture == "hydra" and config.router is None:
        return HydraSumAdapter
    return ARCHITECTURES[config.architecture]
