"""The oracle: every operator in plain PyTorch with the same name and signature. Only tests and the doctor use it."""

from align_ext.reference.dropout_sum import dropout_sum
from align_ext.reference.gaussian_kl import gaussian_kl, gaussian_kl_tables, task_moments
from align_ext.reference.grouped_lora import grouped_lora
from align_ext.reference.mk_mmd import mk_mmd
from align_ext.reference.routed_lora import routed_lora
from align_ext.reference.sibling_lora import sibling_lora

__all__ = [
    "dropout_sum",
    "gaussian_kl",
    "gaussian_kl_tables",
    "grouped_lora",
    "mk_mmd",
    "routed_lora",
    "sibling_lora",
    "task_moments",
]
