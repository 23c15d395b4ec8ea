"""What the papers print as trained parameters beside what is counted, from configurations alone (`study published`).

Each model is built on the meta device from the few numbers that fix its sizes, so no weights are read and nothing is
downloaded. A share is that of all parameters, the adapters' included, as PEFT prints it. Rank and heads are those that
the paper names, unless the note says otherwise; the layers are those with which its numbers come out, where any do.
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Literal

import torch
import transformers
from rich import box
from rich.console import Console
from rich.table import Table
from torch import nn

from align_ext.config import AUTO, AlignLoraConfig
from align_ext.model.cost import count_parameters, flops_per_token, trained_parameters
from align_ext.model.replace import replace_linear_with_align_lora
from align_ext.system.terminal import print_line, print_table

Unit = Literal["%", "M", "x"]

# Hidden and intermediate size, layers, heads, heads of keys and values, vocabulary, tied embeddings.
_SIZES: Mapping[str, tuple[int, int, int, int, int, int, bool]] = {
    "LLaMA-2-7B": (4096, 11008, 32, 32, 32, 32000, False),
    "Qwen2.5-3B": (2048, 11008, 36, 16, 2, 151936, True),
    "Qwen2.5-7B": (3584, 18944, 28, 28, 4, 152064, False),
}
_QV: dict[str, Any] = {"target_modules": ("q_proj", "v_proj")}
_QKV: dict[str, Any] = {"target_modules": ("q_proj", "k_proj", "v_proj")}
_HYDRA, _M_LORA, _LORA = ({"architecture": name} for name in ("hydra", "m_lora", "lora"))
_R16: dict[str, Any] = {"r": 16, "num_heads": 16}
_BLOCK = {"architecture": "mtlora", "target_blocks": ("mlp",), **_R16}


@dataclass(frozen=True)
class Published:
    """A number that a paper prints, and the settings under which it is counted here.

    Attributes:
        paper: the number of the paper on arXiv.
        table: the table of the paper.
        method: what the row is of.
        model: a key of the models' sizes.
        printed: the number as the paper prints it, with its digits.
        unit: "%" of all parameters, "M" for millions of trained parameters, "x" for FLOPs over those with LoRA.
        options: the options of AlignLoraConfig.
        note: how the settings differ from those named, or what would give the printed number.
        counted: the number that is counted.
        parameters: the trained parameters that are counted.
    """

    paper: str
    table: str
    method: str
    model: str
    printed: str
    unit: Unit
    options: Mapping[str, Any]
    note: str = ""
    counted: float = 0.0
    parameters: int = 0

    @property
    def agrees(self) -> bool:
        """Whether the counted number, rounded to the digits of the printed one, is the printed one."""
        return self.rounded == self.printed

    @property
    def rounded(self) -> str:
        """The counted number with the digits of the printed one."""
        return f"{self.counted:.{len(self.printed.partition('.')[2])}f}"

    @property
    def settings(self) -> str:
        """The settings in few words: rank, heads, groups, and the layers or blocks."""
        config = AlignLoraConfig(**self.options)
        words = [f"r {config.r}", f"N {config.num_heads}" if config.num_heads else ""]
        words += [f"G {config.routing_groups}" if (config.routing_groups or 1) > 1 else ""]
        named = config.target_modules != AUTO
        layers = " ".join(name.removesuffix("_proj") for name in config.target_modules) if named else "mlp"
        words += [f"{' '.join(config.target_blocks)} block" if config.target_blocks else layers]
        return ", ".join(word for word in words if word)


def _align(table: str, method: str, model: str, printed: str, options: Mapping[str, Any], note: str = "") -> Published:
    return Published("2508.05078", table, method, model, printed, "%", options, note)


def _mtlora(method: str, printed: str, unit: Unit, options: Mapping[str, Any], note: str = "") -> Published:
    table = "Table 6" if unit == "x" else "ablation"
    return Published("2603.01526", table, method, "LLaMA-2-7B", printed, unit, options, note)


_FEWER_HEADS = "3 heads, not those named"
_ONE_BLOCK = "one block a layer"
_ROWS = (
    _align("Table 1", "heads and router", "Qwen2.5-3B", "0.45", {**_HYDRA, "r": 4, "num_heads": 5}),
    _align("Table 1", "heads and router", "Qwen2.5-3B", "0.45", {**_HYDRA, "r": 4, "num_heads": 3}, "3 heads: 0.458"),
    _align("Table 1", "heads", "Qwen2.5-3B", "0.41", {**_M_LORA, "r": 4, "num_heads": 5}),
    _align("Table 1", "heads", "Qwen2.5-3B", "0.41", {**_M_LORA, "r": 4, "num_heads": 3}, _FEWER_HEADS),
    _align("Table 2", "LoRA", "LLaMA-2-7B", "0.06", {**_LORA, **_QV, "r": 8}),
    _align("Table 2", "LoRA, larger rank", "LLaMA-2-7B", "0.34", {**_LORA, **_QV, "r": 30}, "r 44 gives 0.34"),
    _align("Table 3", "LoRA", "Qwen2.5-7B", "0.10", {**_LORA, "r": 4}),
    _align("Table 3", "LoRA", "Qwen2.5-7B", "0.20", {**_LORA, "r": 8}),
    _align("Table 3", "LoRA", "Qwen2.5-7B", "0.22", {**_LORA, "r": 9}),
    _align("Table 3", "LoRA", "Qwen2.5-7B", "0.25", {**_LORA, "r": 10}),
    _align("Table 3", "heads and router", "Qwen2.5-7B", "0.25", {**_HYDRA, "r": 4, "num_heads": 10}),
    _align("Table 3", "heads and router", "Qwen2.5-7B", "0.25", {**_HYDRA, "r": 4, "num_heads": 3}, _FEWER_HEADS),
    _align("Table 3", "heads", "Qwen2.5-7B", "0.22", {**_M_LORA, "r": 4, "num_heads": 10}),
    _align("Table 3", "heads", "Qwen2.5-7B", "0.22", {**_M_LORA, "r": 4, "num_heads": 3}, _FEWER_HEADS),
    _align("Tables 5, 6", "Align-LoRA", "Qwen2.5-3B", "0.42", {"r": 8}, "r 9 gives 0.41"),
    _align("Table 7", "LoRA", "Qwen2.5-3B", "0.08", {**_LORA, **_QKV, "r": 8}),
    _mtlora("HydraLoRA", "75.5", "M", {**_HYDRA, **_QV, **_R16}),
    _mtlora("HydraLoRA", "1.11", "%", {**_HYDRA, **_QV, **_R16}),
    _mtlora("+ block", "37.7", "M", {**_BLOCK, "routing_groups": 1}, _ONE_BLOCK),
    _mtlora("+ block", "0.56", "%", {**_BLOCK, "routing_groups": 1}, _ONE_BLOCK),
    _mtlora("all: mtLoRA", "39.8", "M", {**_BLOCK, "routing_groups": 2}, _ONE_BLOCK),
    _mtlora("all: mtLoRA", "0.59", "%", {**_BLOCK, "routing_groups": 2}, _ONE_BLOCK),
    _mtlora("HydraLoRA", "1.124", "x", {**_HYDRA, **_QV, **_R16}, "adapters: 1% of the base"),
)


def published() -> list[Published]:
    """Returns the papers' numbers, each with what is counted under its settings; takes seconds and no weights."""
    return [_count(row) for row in _ROWS]


def show(console: Console) -> None:
    """Prints the papers' numbers and the counted ones side by side, a table for each paper."""
    rows = published()
    for paper in dict.fromkeys(row.paper for row in rows):
        table = Table(title=paper, box=box.SIMPLE_HEAD, title_justify="left")
        for column in ("table", "what", "model", "settings"):
            table.add_column(column, overflow="fold")
        for column in ("printed", "counted"):
            table.add_column(column, justify="right", no_wrap=True)
        table.add_column("agree")
        table.add_column("note", overflow="fold")
        for row in rows:
            if row.paper == paper:
                same = "yes" if row.agrees else "no"
                printed = f"{row.printed} {row.unit}"
                table.add_row(row.table, row.method, row.model, row.settings, printed, row.rounded, same, row.note)
        print_table(console, table)
    print_line(console, "%: of all parameters, the adapters' included; M: millions of trained parameters;")
    print_line(console, "x: the FLOPs of a token over those with LoRA of that rank.")
    print_line(console, f"{sum(row.agrees for row in rows)} of {len(rows)} agree to the digits printed.")


def meta_model(name: str) -> nn.Module:
    """Builds the architecture of a model on the meta device: sizes without weights.

    Args:
        name: "LLaMA-2-7B", "Qwen2.5-3B" or "Qwen2.5-7B".

    Raises:
        ValueError: the name is none of these.
    """
    if name not in _SIZES:
        raise ValueError(f"name={name!r} is no model of the papers: give one of {', '.join(_SIZES)}")
    hidden, intermediate, layers, heads, kv_heads, vocabulary, tied = _SIZES[name]
    kind = transformers.LlamaConfig if name.startswith("LLaMA") else transformers.Qwen2Config
    config = kind(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=vocabulary,
        tie_word_embeddings=tied,
    )
    with torch.device("meta"):
        model: nn.Module = transformers.AutoModelForCausalLM.from_config(config)
    return model


_model = lru_cache(maxsize=None)(meta_model)


def _count(row: Published) -> Published:
    config, model = AlignLoraConfig(**row.options), _model(row.model)
    parameters = trained_parameters(config, model)
    if row.unit == "M":
        counted = parameters / 1e6
    elif row.unit == "%":
        counted = 100 * parameters / (count_parameters(model).total + parameters)
    else:
        lora = AlignLoraConfig(architecture="lora", r=config.r, target_modules=config.target_modules)
        counted = _flops(model, config) / _flops(model, lora)
    return replace(row, counted=counted, parameters=parameters)


def _flops(model: nn.Module, config: AlignLoraConfig) -> int:
    flops = flops_per_token(replace_linear_with_align_lora(copy.deepcopy(model), config))
    return flops.base + flops.adapters
