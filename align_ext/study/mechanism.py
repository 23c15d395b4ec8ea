"""What training did to a model's adapters: heads, latents, gradients, spectra and routers in one dictionary."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from align_ext.diagnostics.bands import Bands, gradient_bands, head_bands
from align_ext.diagnostics.conflict import gradient_cosines
from align_ext.diagnostics.cosines import pairs
from align_ext.diagnostics.heads import copy_heads, head_similarity
from align_ext.diagnostics.latents import example_latents, task_divergence
from align_ext.diagnostics.module_types import by_block, by_component
from align_ext.diagnostics.record import Recording, record_adapters
from align_ext.diagnostics.routing import routing
from align_ext.diagnostics.separation import separation, tsne

_DIGITS = 6  # significant ones, so that the last bits of a sum do not show


def mechanism(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    task_names: Sequence[str],
    initial_heads: Mapping[str, Tensor] | None = None,
) -> dict[str, Any]:
    """Measures all that applies to a model of any architecture, with one forward and one backward of the data.

    Keys (each with its formula in the function that it comes from); those that do not apply are left out:
        divergence: tasks, kl [M][M] (task_divergence), dimensions (over which it is a sum).
        heads, heads_change: type of module -> the mean cosine of pairs of heads, one a layer (head_similarity; the
            second of B_i - B_i(0)).
        latents: layer, tasks, labels (index per point), points [[x, y]] (tsne of example_latents), probe_accuracy,
            probe_chance, silhouette (separation).
        conflict: component, block: type -> the share of pairs of tasks, over all layers, whose gradients have a
            negative cosine; cosine: the same two with the mean cosine (gradient_cosines).
        bands: of ("heads": head_bands, "gradients": gradient_bands), bands, alignment, energy, chance.
        routing: entropy: type -> one a layer; load, importance: type -> N means over the layers (routing).

    Args:
        model: with adapters; left as it was.
        batches: the model's inputs with task_ids, labels and attention_mask, as record_adapters takes them; sorted by
            length they take the least time. Latents are left out where a task has less than two rows.
        task_names: the name of each task id.
        initial_heads: what copy_heads(model) returned before training.

    Returns:
        A JSON-ready dictionary, numbers rounded to 6 significant digits.

    Raises:
        ValueError: a task has no rows, there are other tasks, or an error of record_adapters; scikit-learn is missing.
    """
    recording = record_adapters(model, batches, gradients=True)
    found, names = set(recording.tasks.tolist()), list(task_names)
    if found != set(range(len(names))):
        raise ValueError(f"the batches hold the task ids {sorted(found)}, but task_names has {len(names)} names")
    result: dict[str, Any] = {}
    several = any(len(B) > 1 for B in copy_heads(model).values())
    if several:
        result |= _of_heads(model, initial_heads)
    if len(names) > 1:
        dimensions = max(z.shape[-1] for z in recording.latents.values())
        result["divergence"] = {"tasks": names, "kl": task_divergence(recording), "dimensions": dimensions}
        result |= _latents(recording, names)
        result["conflict"] = _conflict(recording)
    bands = head_bands(model, initial_heads) if several else gradient_bands(model, recording)
    if bands.names:
        result["bands"] = _as_dict(bands, "heads" if several else "gradients")
    if recording.weights:
        result["routing"] = _routing(recording)
    return _rounded(result)


def _of_heads(model: nn.Module, start: Mapping[str, Tensor] | None) -> dict[str, Any]:
    found = {"heads": _by_layer(head_similarity(model))}
    if start is not None:
        found["heads_change"] = _by_layer(head_similarity(model, start))
    return {key: value for key, value in found.items() if value}


def _by_layer(layers: Mapping[str, Tensor]) -> dict[str, list[Tensor]]:
    """Returns the mean over the pairs of each layer, by type of module; layers without a direction are left out."""
    means = {name: pairs(matrix).mean() for name, matrix in layers.items()}
    return by_component({name: mean for name, mean in means.items() if not mean.isnan()})


def _latents(recording: Recording, names: list[str]) -> dict[str, Any]:
    examples = example_latents(recording)
    if int(torch.bincount(examples.tasks).min()) < 2:
        return {}
    apart = separation(examples.points, examples.tasks)
    found = {
        "layer": examples.layer, "tasks": names, "labels": examples.tasks, "points": tsne(examples.points),
        "probe_accuracy": apart.accuracy, "probe_chance": apart.chance, "silhouette": apart.silhouette,
    }  # fmt: skip
    return {"latents": found}


def _conflict(recording: Recording) -> dict[str, Any]:
    component = by_component({n: pairs(m) for n, m in gradient_cosines(recording, "component").items()})
    block = by_block({n: pairs(m) for n, m in gradient_cosines(recording, "block").items()})
    levels = {
        level: {kind: torch.cat(cosines) for kind, cosines in kinds.items() if any(map(len, cosines))}
        for level, kinds in (("component", component), ("block", block))
    }
    share = {
        level: {kind: (cosines < 0).double().mean() for kind, cosines in kinds.items()}
        for level, kinds in levels.items()
    }
    return share | {
        "cosine": {level: {kind: cosines.mean() for kind, cosines in kinds.items()} for level, kinds in levels.items()}
    }


def _as_dict(bands: Bands, of: str) -> dict[str, Any]:
    return {
        "of": of, "bands": list(bands.names), "alignment": bands.alignment, "energy": bands.energy,
        "chance": bands.chance,
    }  # fmt: skip


def _routing(recording: Recording) -> dict[str, Any]:
    by_type = by_component(routing(recording))
    return {
        "entropy": {kind: [layer.entropy for layer in layers] for kind, layers in by_type.items()},
        "load": {kind: torch.stack([layer.load for layer in layers]).mean(0) for kind, layers in by_type.items()},
        "importance": {
            kind: torch.stack([layer.importance for layer in layers]).mean(0) for kind, layers in by_type.items()
        },
    }


def _rounded(value: Any) -> Any:
    """Returns a JSON-ready copy: tensors as lists, floats of 6 significant digits."""
    if isinstance(value, Tensor):
        return _rounded(value.tolist())
    if isinstance(value, float):
        return float(f"{value:.{_DIGITS}g}")
    if isinstance(value, Mapping):
        return {key: _rounded(part) for key, part in value.items()}
    return [_rounded(part) for part in value] if isinstance(value, list) else value
