"""Every option of an adapter, with the symbol it has in the papers. Names follow PEFT's LoraConfig."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

Architecture = Literal["align_lora", "lora"]
Align = Literal["kl"]

DEFAULT_WEIGHT: Mapping[str, float] = {"kl": 0.1}
_FROM_ARCHITECTURE = "auto"  # align's default: "kl" for align_lora, None for every other architecture


def unknown_name(kind: str, name: str, allowed: Iterable[str]) -> str:
    """A message for a name that is not one of the allowed ones, with the nearest of them."""
    allowed = list(allowed)
    nearest = difflib.get_close_matches(name, allowed, n=1)
    hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
    return f"unknown {kind} {name!r}{hint} (known: {', '.join(allowed)})"


@dataclass(frozen=True)
class AlignLoraConfig:
    """Options of the adapters and of the alignment loss; validated when made.

    Attributes:
        architecture: "align_lora" (Align-LoRA, 2508.05078: one adapter, the tasks' latents aligned) or "lora".
        r: rank of A and B.
        lora_alpha: alpha; the scaling is s = alpha / r.
        lora_dropout: p, dropout on the adapter's input, in [0, 1).
        target_modules: suffixes of module names, a regular expression for the whole name, or "all-linear".
        exclude_modules: suffixes, or a regular expression, of modules to leave alone.
        use_rslora: s = alpha / sqrt(r) (2312.03732).
        align: "kl" (eq. 5) or None; by default "kl" for align_lora and None for every other architecture.
        align_weight: lambda in  loss + lambda * align;  None: 0.1 for "kl".
        num_tasks: M; None takes the largest task id seen so far plus one (one process only).
        align_eps: added to every variance of z.
        align_ddof: 0: population variance, 1: sample variance.
        align_pairs: "sum" over the pairs of tasks (eq. 5) or "mean".
        align_layers: "mean" over the adapted layers or "sum".
        response_only: only tokens with a label count in the alignment (default: all but padding).
        adapter_dtype: dtype of A and B: "float32" (PEFT's default, also on a 16-bit base) or "base".
    """

    architecture: Architecture = "align_lora"
    r: int = 8
    lora_alpha: float = 32
    lora_dropout: float = 0.1
    target_modules: tuple[str, ...] | str = ("gate_proj", "up_proj", "down_proj")
    exclude_modules: tuple[str, ...] | str = ()
    use_rslora: bool = False
    align: Align | Literal["auto"] | None = _FROM_ARCHITECTURE  # type: ignore[assignment]
    align_weight: float | None = None
    num_tasks: int | None = None
    align_eps: float = 1e-6
    align_ddof: int = 0
    align_pairs: Literal["sum", "mean"] = "sum"
    align_layers: Literal["mean", "sum"] = "mean"
    response_only: bool = False
    adapter_dtype: Literal["float32", "base"] = "float32"

    def __post_init__(self) -> None:
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            if isinstance(value, str):
                try:
                    re.compile(value)
                except re.error as error:
                    raise ValueError(f"{name}={value!r} is no regular expression: {error}") from error
            elif isinstance(value, Iterable):
                object.__setattr__(self, name, tuple(value))
            else:
                raise ValueError(f"{name} must be module names or a regular expression, got {value!r}")
        if self.architecture not in get_args(Architecture):
            raise ValueError(unknown_name("architecture", str(self.architecture), get_args(Architecture)))
        if self.align == _FROM_ARCHITECTURE:
            object.__setattr__(self, "align", "kl" if self.architecture == "align_lora" else None)
        if self.align is not None and self.align not in get_args(Align):
            raise ValueError(unknown_name("align", str(self.align), [*get_args(Align), "None"]))
        if self.align is not None and self.align_weight is None:
            object.__setattr__(self, "align_weight", DEFAULT_WEIGHT[self.align])
        self._check_ranges()

    def _check_ranges(self) -> None:
        def is_int(value: Any) -> bool:
            return isinstance(value, int) and not isinstance(value, bool)

        def is_finite(value: Any) -> bool:
            return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)

        rules = {
            "r": (is_int(self.r) and self.r > 0, "a positive integer"),
            "lora_alpha": (is_finite(self.lora_alpha) and self.lora_alpha > 0, "a positive number"),
            "lora_dropout": (is_finite(self.lora_dropout) and 0 <= self.lora_dropout < 1, "in [0, 1)"),
            "target_modules": (
                len(self.target_modules) > 0 and all(isinstance(t, str) and t for t in self.target_modules),
                'suffixes of module names, a regular expression or "all-linear"',
            ),
            "exclude_modules": (
                all(isinstance(t, str) and t for t in self.exclude_modules),
                "suffixes of module names or a regular expression",
            ),
            "align_weight": (
                self.align_weight is None or (is_finite(self.align_weight) and self.align_weight >= 0),
                "a number >= 0, or None for the default",
            ),
            "num_tasks": (
                self.num_tasks is None or (is_int(self.num_tasks) and self.num_tasks > 0),
                "a positive integer, or None",
            ),
            "align_eps": (is_finite(self.align_eps) and self.align_eps > 0, "a positive number"),
            "align_ddof": (self.align_ddof in (0, 1), "0 or 1"),
            "use_rslora": (isinstance(self.use_rslora, bool), "true or false"),
            "response_only": (isinstance(self.response_only, bool), "true or false"),
            "align_pairs": (self.align_pairs in ("sum", "mean"), '"sum" or "mean"'),
            "align_layers": (self.align_layers in ("mean", "sum"), '"mean" or "sum"'),
            "adapter_dtype": (self.adapter_dtype in ("float32", "base"), '"float32" or "base"'),
        }
        for name, (valid, allowed) in rules.items():
            if not valid:
                raise ValueError(f"{name} must be {allowed}, got {getattr(self, name)!r}")

    @property
    def scaling(self) -> float:
        """S = alpha / r, or alpha / sqrt(r) with use_rslora."""
        return self.lora_alpha / (math.sqrt(self.r) if self.use_rslora else self.r)

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dictionary; from_dict(to_dict()) is equal, also through JSON."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    @classmethod
    def from_dict(cls, options: Mapping[str, Any]) -> AlignLoraConfig:
        """The inverse of to_dict.

        Raises:
            ValueError: an unknown option (with the nearest known one), or a value out of range.
        """
        known = [field.name for field in fields(cls)]
        for name in options:
            if name not in known:
                raise ValueError(unknown_name("option", name, known))
        return cls(**options)
