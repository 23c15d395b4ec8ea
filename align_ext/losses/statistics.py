"""The statistics of the tasks' latents that each alignment loss is computed from."""

from align_ext.losses.kl import KlStatistics
from align_ext.losses.mmd import MmdStatistics

Statistics = KlStatistics | MmdStatistics
STATISTICS: dict[str, type[Statistics]] = {"kl": KlStatistics, "mmd": MmdStatistics}
