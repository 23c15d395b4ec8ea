"""The operators: functions of tensors, without modules or models."""

from align_ext.ops._projection import dropout_rng
from align_ext.ops.dropout_sum import dropout_sum
from align_ext.ops.gaussian_kl import gaussian_kl, gaussian_kl_tables, task_moments
from align_ext.ops.grouped_lora import group_rows, grouped_lora
from align_ext.ops.mk_mmd import mk_mmd
from align_ext.ops.routed_lora import routed_lora
from align_ext.ops.sibling_lora import sibling_lora

__all__ = [
    "dropout_rng",
    "dropout_sum",
    "gaussian_kl",
    "gaussian_kl_tables",
    "group_rows",
    "grouped_lora",
    "mk_mmd",
    "routed_lora",
    "sibling_lora",
    "task_moments",
]
