"""The oracle: every operator in plain PyTorch, same names and signatures, ten lines each. Read by tests only."""

from align_ext.reference.gaussian_kl import gaussian_kl, gaussian_kl_tables, task_moments
from align_ext.reference.grouped_lora import grouped_lora

__all__ = ["gaussian_kl", "gaussian_kl_tables", "grouped_lora", "task_moments"]
