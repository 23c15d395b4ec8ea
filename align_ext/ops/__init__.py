"""The operators: tensors in, tensors out, no modules and no models."""

from align_ext.ops.gaussian_kl import gaussian_kl, gaussian_kl_tables, task_moments
from align_ext.ops.grouped_lora import dropout_rng, grouped_lora

__all__ = ["dropout_rng", "gaussian_kl", "gaussian_kl_tables", "grouped_lora", "task_moments"]
