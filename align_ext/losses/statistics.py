"""The statistics of the tasks' latents that each alignment loss is computed from."""

from align_ext.losses.kl import KlAlignment, KlStatistics
from align_ext.losses.l2 import L2Alignment, L2Statistics
from align_ext.losses.mmd import MmdAlignment, MmdStatistics

Statistics = KlStatistics | MmdStatistics | L2Statistics
Alignment = KlAlignment | MmdAlignment | L2Alignment
STATISTICS: dict[str, type[Statistics]] = {"kl": KlStatistics, "mmd": MmdStatistics, "l2": L2Statistics}
