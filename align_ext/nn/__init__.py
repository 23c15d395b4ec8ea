"""What sits where a linear layer or a block sat: one architecture a file."""

from align_ext.config import AlignLoraConfig
from align_ext.nn.base import Adapter
from align_ext.nn.hydra import HydraAdapter, HydraSumAdapter
from align_ext.nn.lora import LoraAdapter, MultiAdapter
from align_ext.nn.lora_moe import LoraMoeAdapter
from align_ext.nn.m_lora import MLoraAdapter
from align_ext.nn.mtlora import MtLoraAdapter
from align_ext.nn.r_lora import RLoraAdapter

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
