"""Loads the model to score: a base model alone, with an adapter, or with a merged adapter."""

from dataclasses import dataclass
from typing import Any

from align_ext.alignment.context import set_task
from align_ext.base_model.checks import check_base
from align_ext.base_model.dtypes import best_dtype, usable_device
from align_ext.base_model.load import load_model
from align_ext.io.adapter_folder import AdapterFolder, task_number
from align_ext.model.load_adapter import load_adapter
from align_ext.model.load_base import load_base
from align_ext.model.merge import merge_and_unload
from align_ext.system import processes


@dataclass(frozen=True)
class ModelRequest:
    """Describes the model to score.

    Attributes:
        model: the base model, a folder or hub id; None: that of the adapter, or else SmolLM2-135M-Instruct.
        adapter: a folder of save_adapter or stock PEFT; None: no adapter.
        merge: whether to merge the adapter into the weights.
        dtype: as in load_model; "auto": best_dtype of the device.
        device: "auto", "cpu" or "cuda".
        force: whether to accept an adapter of another base model.
    """

    model: str | None = None
    adapter: str | None = None
    merge: bool = False
    dtype: str = "auto"
    device: str = "auto"
    force: bool = False

    def __post_init__(self) -> None:
        if self.merge and self.adapter is None:
            raise ValueError("--merge goes with --adapter: without one there is nothing to merge")

    def load(self, task: str | None = None) -> tuple[Any, Any]:
        """Loads the base model with its adapter in eval mode, and the tokenizer.

        Args:
            task: the name or number of the task of an adapter by task.

        Raises:
            ValueError: as in load_model, check_base, load_adapter and merge_and_unload; or there is no such task.
        """
        model, tokenizer = self.load_base()
        check_base(model, tokenizer)
        return self.put_adapter(model, task), tokenizer

    def load_base(self) -> tuple[Any, Any]:
        """Loads the base model on its device, and the tokenizer."""
        device = usable_device(self.device)
        # "auto" goes by a measurement, which may differ between processes.
        dtype = processes.by_first(lambda: best_dtype(device)) if self.dtype == "auto" else self.dtype
        if self.adapter is None:
            model, tokenizer = load_model(self.model, dtype)
        else:
            model, tokenizer = load_base(self.model, AdapterFolder.read(self.adapter), dtype)
        return model.to(device), tokenizer

    def put_adapter(self, model: Any, task: str | None = None) -> Any:
        """Loads the adapter into the base model, or merges it; returns the model in eval mode."""
        if self.adapter is not None:
            load_adapter(model, self.adapter, force=self.force)
            if task is not None:
                set_task(model, task_number(AdapterFolder.read(self.adapter), task))
            if self.merge:
                try:
                    merge_and_unload(model)
                except ValueError as error:
                    if "approximate=" not in str(error):
                        raise
                    raise ValueError(
                        f"{error} (with `align-lora merge`, and score the model that it writes)"
                    ) from error
        return model.eval()
