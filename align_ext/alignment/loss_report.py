"""A training step's losses as numbers."""

from dataclasses import dataclass


@dataclass(frozen=True)
class LossReport:
    """The last step's losses, for logging. Reading them waits for the device.

    Attributes:
        lm: the model's own loss.
        align: the alignment value, before the weight; 0 without alignment.
        weight: lambda.
        per_layer: alignment of each adapted layer, by module name.
        per_task: alignment of each task with all others.
        balance: the balance loss, before its weight; None without.
        spectral: the spectral loss, before its weight; None without.
        orthogonality: that of AdaLoRA's P and Q, before its weight; None without.
        pairs: how many pairs of tasks were aligned; None without alignment.
    """

    lm: float
    align: float
    weight: float
    per_layer: dict[str, float]
    per_task: list[float]
    balance: float | None = None
    spectral: float | None = None
    orthogonality: float | None = None
    pairs: float | None = None
