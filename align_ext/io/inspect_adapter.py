"""Prints the contents of an adapter's folder as a table, without a base model or transformers."""

import os

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor

from align_ext.adapters.adalora import AdaLoraAdapter
from align_ext.adapters.base import Adapter, Factors, at_least_float32
from align_ext.base_model.modules_to_save import describe
from align_ext.config import AlignLoraConfig
from align_ext.io.adapter_folder import AdapterFolder
from align_ext.io.peft_format import PEFT_CONFIG, selected_task, unexportable_reason
from align_ext.system.terminal import print_table


def inspect_adapter(folder: str | os.PathLike[str], console: Console) -> None:
    """Prints architecture, options and tasks of an adapter's folder, and each layer's sizes and norms.

    Raises:
        ValueError: the folder is no adapter's, is damaged, or holds values that are not finite.
    """
    stored = AdapterFolder.read(folder)
    config, adapters = stored.config, stored.adapters
    dtypes = sorted({str(p.dtype).removeprefix("torch.") for a in adapters.values() for p in a.parameters()})
    lines = {
        "architecture": f"{config.architecture}: {config.row.formula} ({config.row.paper})",
        "options": _options(config),
        "parameters": f"{sum(map(_numel, adapters.values())):,} in {len(adapters)} layers, {', '.join(dtypes)}",
        "tasks": ", ".join(stored.task_names) or str(config.num_tasks or "not recorded"),
        "trained beside them": describe(stored.trained) if stored.trained else "nothing",
        "stock PEFT": _peft_support(stored),
        "values": "all finite",
    }
    for title, text in lines.items():
        console.print(Text.assemble((title, "bold"), "  ", text), soft_wrap=True)
    print_table(console, _table(adapters, config))


@torch.no_grad()
def norm_of_update(terms: list[Factors], scaling: float) -> float:
    """Computes the Frobenius norm s ||Σ B A|| from the r x r products BᵀB and A Aᵀ; of experts, over all of them."""
    A = torch.cat([A for A, _ in terms], -2).double()
    B = torch.cat([at_least_float32(B) for _, B in terms], -1).double()
    return scaling * float(((B.mT @ B) * (A @ A.mT)).sum().clamp_min(0).sqrt())


def _table(adapters: dict[str, Adapter], config: AlignLoraConfig) -> Table:
    routed = config.router is not None
    how = (", at equal weights" if routed else "") + (", before DoRA rescales its rows" if config.use_dora else "")
    table = Table(caption=f"s: scaling; norms are Frobenius norms; the update is that of the layer's weight{how}")
    table.add_column("layer", overflow="fold", min_width=8)  # whose ends tell names apart
    titles = ["in", "out", "r", "s", "trained", "A", "B", *(["router"] if routed else []), "update"]
    for title in titles:
        table.add_column(title, justify="right", no_wrap=True)
    for name, adapter in adapters.items():
        params = {"lora_A": adapter.lora_A, "lora_B": adapter.lora_B, **dict(adapter.named_parameters())}
        kept = f"{adapter.kept_rank} of {adapter.r}" if isinstance(adapter, AdaLoraAdapter) else adapter.r
        sizes = (adapter.in_features, adapter.out_features, kept, f"{adapter.scaling:g}")
        parts = ("lora_A", "lora_B", *(["lora_router.lora_R"] if routed else []))
        norms = [f"{_norm(params[part]):.3g}" if part in params else "" for part in parts]  # a block has one router
        cells = [*map(str, sizes), f"{_numel(adapter):,}", *norms, _update(adapter, config)]
        table.add_row(name, *cells)
    return table


def _update(adapter: Adapter, config: AlignLoraConfig) -> str:
    """Returns the norm of the update, or the smallest and largest norm over the tasks."""
    if not config.row.by_task:
        return f"{norm_of_update(adapter.uniform_delta_factors(), adapter.scaling):.3g}"
    norms = []
    for task in range(config.num_tasks or 0):
        with selected_task({"": adapter}, task):
            norms.append(norm_of_update(adapter.delta_factors(), adapter.scaling))
    return f"{min(norms):.3g} .. {max(norms):.3g}"


def _options(config: AlignLoraConfig) -> str:
    names = (
        "r", "lora_alpha", "use_rslora", "use_dora", "lora_dropout", "init_lora_weights", "num_heads", "reduce",
        "router", "routing", "routing_groups", "top_k", "router_temperature", "shared_rank", "target_r",
        "target_blocks", "align", "align_weight", "balance", "spectral",
    )  # fmt: skip
    values = {name: getattr(config, name) for name in names}
    return ", ".join(f"{name}={value}" for name, value in values.items() if value not in (None, False, ()))


def _peft_support(stored: AdapterFolder) -> str:
    if stored.config.row.by_task:
        return f"loads each folder in {stored.path / 'tasks'}, one a task"
    if reason := unexportable_reason(stored.adapters, stored.config):
        return f"cannot: {reason}"
    has_form = (stored.path / PEFT_CONFIG).is_file()
    return "loads this folder" if has_form else "cannot: it would misread the names of layers, or of what is trained"


def _numel(adapter: Adapter) -> int:
    return sum(p.numel() for p in adapter.parameters())


def _norm(tensor: Tensor) -> float:
    return float(tensor.detach().double().norm())
