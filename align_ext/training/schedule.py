"""The schedule of the alignment's weight over the steps of a training."""

import math
from typing import Literal

AlignSchedule = Literal["constant", "linear", "cosine"]


def schedule_factor(schedule: AlignSchedule, warmup: float, step: int, steps: int) -> float:
    """Computes the factor on the alignment weight at a step.

    step / W  before step W = warmup * steps; then, with p = (step - W) / (steps - W),
    1 ("constant"),  1 - p ("linear"),  (1 + cos(pi p)) / 2 ("cosine")
    """
    rise = warmup * steps
    if step < rise:
        return step / rise
    p = (step - rise) / max(steps - rise, 1)
    return {"constant": 1.0, "linear": 1 - p, "cosine": (1 + math.cos(math.pi * p)) / 2}[schedule]
