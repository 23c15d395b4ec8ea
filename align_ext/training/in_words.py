"""What a run did, in words for its terminal, its report and its model card."""

from collections.abc import Mapping
from typing import Any


def adapter_step(results: Mapping[str, Any]) -> int:
    """Returns the step of a run's adapter: the last one, or the best one with load_best_model_at_end.

    Args:
        results: the content of the run's results.json.
    """
    options, steps = results["options"], results.get("steps") or {}
    best = steps.get("best") if options.get("load_best_model_at_end") else None
    return int(steps.get("done", options["steps"]) if best is None else best)


def shown_steps(results: Mapping[str, Any]) -> str:
    """Returns the steps of a run in words: those that were planned, those of them that were done, and adapter_step."""
    planned = results["options"]["steps"]
    done, kept = (results.get("steps") or {}).get("done", planned), adapter_step(results)
    text = f"{done:,} of " * (done != planned) + f"{planned:,} step{'s' * (planned != 1)}"
    return text + f" (the adapter is that of step {kept:,})" * (kept != done)


def shown_times(results: Mapping[str, Any]) -> dict[str, float]:
    """Returns the seconds of a run's parts by name; that of a training that was resumed says from which step on."""
    begun = (results.get("steps") or {}).get("begun", 0)
    later = {"train": f"train from step {begun:,} on"} if begun else {}
    return {later.get(name, name): seconds for name, seconds in results.get("seconds", {}).items()}


def stored_bits(options: Mapping[str, Any]) -> str:
    """Returns how the base model's weights were stored while it trained: " in 4 bits", or "" as they are."""
    return next((f" in {bits} bits" for bits in (4, 8) if options.get(f"load_in_{bits}bit")), "")
