"""The model "align" for EleutherAI's lm-evaluation-harness: a base model with an adapter of any architecture.

    pip install lm-eval
    python -m align_ext.evaluation.lm_eval run --model align --model_args pretrained=M,adapter=FOLDER --tasks arc_easy

or, in Python,  lm_eval.simple_evaluate(align_lm(MODEL, FOLDER), tasks=["arc_easy"]).
"""

import functools
import inspect
import logging
import re
import sys
from typing import Any

from align_ext.base_model.dtypes import usable_device
from align_ext.evaluation.evaluate import plain_generation
from align_ext.evaluation.scored_model import ModelRequest
from align_ext.io.adapter_folder import AdapterFolder

logger = logging.getLogger(__name__)


def align_lm(
    pretrained: str | None = None, adapter: str | None = None, task: str | int | None = None, **options: Any
) -> Any:
    """Returns a model of the harness (lm_eval.models.huggingface.HFLM) for a base model and an adapter's folder.

    Args:
        pretrained: the base model, a folder or hub id; None: SmolLM2-135M-Instruct.
        adapter: a folder of save_adapter or stock PEFT; None: no adapter.
        task: for an adapter by task, the name or number of the task to use.
        **options: merge, dtype, device as in `align-lora eval`, also "cuda:1"; where a device cannot be used, a
            warning says so and the CPU is taken. Other options are those of HFLM (batch_size, ...).

    Raises:
        ValueError: the model or adapter cannot be loaded; an adapter by task has no task; or the adapter has
            routing="sequence", whose router would see the answers that the harness scores.
        ModuleNotFoundError: lm-eval is not installed.
    """
    return _model_class()(pretrained=pretrained, adapter=adapter, task=task, **options)


@functools.cache
def _model_class() -> Any:
    """Returns the model class "align" of the harness; defined in a function, since lm-eval is not a dependency."""
    try:
        from lm_eval.api.registry import register_model
        from lm_eval.models.huggingface import HFLM
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"the harness needs {error.name}: pip install lm-eval", name=error.name) from error

    @register_model("align")
    class AlignLM(HFLM):  # type: ignore[misc, unused-ignore]
        def __init__(
            self, pretrained: str | None = None, adapter: str | None = None, task: str | int | None = None, *,
            merge: bool = False, dtype: str = "auto", device: str | None = None, **options: Any,
        ) -> None:  # fmt: skip
            if not isinstance(merge, bool):
                raise ValueError(f"merge={merge!r} must be True or False")
            unknown = options.keys() - inspect.signature(HFLM.__init__).parameters.keys()
            if unknown:
                names = ", ".join(sorted(unknown))
                raise ValueError(f"model_args: {names} is no option of align (pretrained, adapter, task, merge, dtype, "
                                 "device) or of the harness's own model")  # fmt: skip
            config = None if adapter is None else AdapterFolder.read(adapter).config
            if config is not None and config.row.by_task and task is None:
                raise ValueError("the adapter has one part for each task: name one, as task=...")
            if config is not None and config.routing == "sequence":
                raise ValueError('an adapter with routing="sequence" would route by the answers that are scored: use '
                                 "`align-lora eval`, which routes by the prompts alone")  # fmt: skip
            place = _place(device or "auto")
            request = ModelRequest(model=pretrained, adapter=adapter, merge=merge, dtype=dtype, device=place)
            model, tokenizer = request.load(None if task is None else str(task))
            model.generation_config = plain_generation(model, tokenizer)  # tasks of the harness add their options
            super().__init__(pretrained=model, tokenizer=tokenizer, **options)

    return AlignLM


def _place(device: str) -> str:
    """Returns the device, or as the harness's own models do, the CPU where it cannot be used."""
    try:
        return usable_device(device)
    except ValueError as error:
        logger.warning("%s; it goes on with the CPU", error)
        return "cpu"


def main() -> None:
    """Runs the harness's command line with the model "align"; an error is one line and exit code 2."""
    arguments = " ".join(sys.argv[1:])
    # Without the option, the harness requires a GPU.
    if "run" in sys.argv[1:2] and not re.search(r"(^| )(--device|--config|-C)\b", arguments):
        sys.argv += ["--device", "auto"]
    try:
        _model_class()
        from lm_eval.__main__ import cli_evaluate

        cli_evaluate()
    except (ValueError, OSError, LookupError, ModuleNotFoundError, TypeError) as error:
        print(f"align: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
