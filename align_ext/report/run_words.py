"""What a training run found, in words that are made from its numbers; what is within noise is called so."""

from collections.abc import Callable, Sequence
from typing import Any

from align_ext.evaluation.rows import repeats
from align_ext.report.conditions import Caution
from align_ext.report.formats import number
from align_ext.report.run_results import Run, TaskChange, is_beyond_noise
from align_ext.report.statistics import Difference

_FEW_ROWS = 30  # held-out rows of a task, below which an interval is wide
_MOST_NAMED = 8
_OVERFIT = 1.02  # how many times its minimum the held-out loss may be in the end


def findings(run: Run) -> list[str]:
    """Returns the findings of a run, the most important first."""
    if not run.changes:
        return ["The run ended before its held-out rows were scored again, so that only its losses are known."]
    sentences = [
        _overall(run, "loss", run.loss, "The loss of held-out answers", " nats a token"),
        *_by_task(run.changes, lambda one: one.loss, lower=True, what="The loss"),
    ]
    if run.score is not None:
        sentences.append(_overall(run, "score", run.score, "The score", ""))
        sentences += _by_task(run.changes, lambda one: one.score, lower=False, what="The score")
    sentences += _of_alignment(run)
    if passed := [name for name, check in run.results.get("checks", {}).items() if check["passed"]]:
        sentences.append(f"The saved adapter gives the logits of the trained model: {', '.join(passed)}.")
    rows = sum(one.before["examples"] for one in run.changes)
    sentences.append(
        f"Intervals are over the {number(rows, 'count')} held-out rows, paired by row, of this one run: another seed "
        "moves the numbers too."
    )
    return sentences


def _overall(run: Run, name: str, change: Difference | None, what: str, unit: str) -> str:
    kind = "nats" if name == "loss" else "two"
    known = [one for one in run.changes if getattr(one, name) is not None]
    if change is None:
        return f"{what} has no interval: it takes two held-out rows of a task."
    before, after = (sum(getattr(one, w)[name] for one in known) / len(known) for w in ("before", "after"))
    span = f"[{number(change.low, kind, True)}, {number(change.high, kind, True)}]"
    mean = f", the mean of {len(known)} tasks" if len(known) > 1 else ""
    if change.error == 0 and change.estimate == 0:
        return f"{what} is {number(after, kind)}{unit} as before{mean}."
    if not is_beyond_noise(change):
        by = number(change.estimate, kind, True)
        return f"{what} did not change by more than noise ({by}{unit} {span}{mean})."
    verb = "fell" if change.estimate < 0 else "rose"
    by = number(change.estimate, kind, True)
    return f"{what} {verb} from {number(before, kind)} to {number(after, kind)}{unit} ({by} {span}{mean})."


def _by_task(
    changes: Sequence[TaskChange], of: Callable[[TaskChange], Difference | None], *, lower: bool, what: str
) -> list[str]:
    """Returns a sentence that sorts the tasks; none for one task."""
    known = [(one.task, found) for one in changes if (found := of(one)) is not None]
    if len(known) < 2:
        return []
    better = [task for task, one in known if is_beyond_noise(one) and (one.estimate < 0) == lower]
    worse = [task for task, one in known if is_beyond_noise(one) and task not in better]
    same = [task for task, one in known if not is_beyond_noise(one)]
    if not better and not worse:
        return [f"{what} of no single task changed by more than noise."]
    if not worse and not same:
        return [f"{what} is better in every task."]
    parts = [f"{word} {_names(tasks)}" for word, tasks in _sorted(better, worse, same) if tasks]
    return [f"{what} is {'; '.join(parts)}."]


def _sorted(better: list[str], worse: list[str], same: list[str]) -> list[tuple[str, list[str]]]:
    return [("better in", better), ("worse in", worse), ("within noise in", same)]


def _of_alignment(run: Run) -> list[str]:
    sentences = []
    before, after = (run.results[when].get("align") for when in ("before", "after"))
    if before is not None and after is not None:
        trained = run.results["adapters"].get("align") is not None
        what = "The alignment loss" if trained else "The alignment loss, which was not trained,"
        verb = "is" if before == after else "fell from" if after < before else "rose from"
        span = f"{before:.3g}" if before == after else f"{before:.3g} to {after:.3g}"
        sentences.append(f"{what} {verb} {span} on held-out rows.")
    first, last = (run.probe(when) for when in ("before", "after"))
    if first.get("layers") and last.get("layers"):
        closer = sum(last["layers"][name] < value for name, value in first["layers"].items() if name in last["layers"])
        sentences.append(f"The tasks' latents are closer than before in {closer} of {len(first['layers'])} layers.")
    if len(last.get("tasks", ())) > 2:
        pairs = [
            (last["divergence"][i][j], one, other)
            for i, one in enumerate(last["tasks"])
            for j, other in enumerate(last["tasks"][:i])
        ]
        _, one, other = max(pairs)
        sentences.append(f"Farthest apart are {other} and {one}.")
    return sentences


def cautions(run: Run) -> list[Caution]:
    """Returns what a reader must know before the numbers: failed checks, tasks that got worse, few or missing rows."""
    kinds = (_failed_checks, _worse, _overfitted, _few_rows, _repeated, _left_out, _unmeasured)
    found = [caution(run) for caution in kinds]
    return [one for one in found if one is not None]


def _failed_checks(run: Run) -> Caution | None:
    failed = [name for name, check in run.results.get("checks", {}).items() if check["passed"] is False]
    text = "The saved adapter does not compute what was trained: do not use it before you know why."
    return Caution("checks", text, failed) if failed else None


def _worse(run: Run) -> Caution | None:
    worse = [one.task for one in run.changes if is_beyond_noise(one.loss) and one.loss and one.loss.estimate > 0]
    text = "The loss of held-out rows rose, by more than noise: train on more rows of these tasks, or for fewer steps."
    return Caution("worse", text, worse) if worse else None


def _overfitted(run: Run) -> Caution | None:
    losses = [(entry["eval_loss"], entry["step"]) for entry in run.results.get("evaluations", [])]
    if len(losses) < 2 or losses[-1][0] <= _OVERFIT * min(losses)[0] or run.options.get("load_best_model_at_end"):
        return None
    least, step = min(losses)
    text = f"The held-out loss was least at step {step} ({least:.3f}) and rose to {losses[-1][0]:.3f}: fewer steps do."
    return Caution("overfitted", text, [])


def _few_rows(run: Run) -> Caution | None:
    few = [f"{one.task} {one.before['examples']}" for one in run.changes if one.before["examples"] < _FEW_ROWS]
    text = f"Fewer than {_FEW_ROWS} held-out rows of a task show large changes only; --eval-examples takes more."
    return Caution("few rows", text, _shortened(few)) if few else None


def _repeated(run: Run) -> Caution | None:
    about = repeats({one.task: one.after for one in run.changes})
    return Caution("repeated", "Repeated held-out rows count once.", about) if about else None


def _left_out(run: Run) -> Caution | None:
    found = []
    for task, splits in run.results["data"].get("tasks", {}).items():
        left_out: dict[str, int] = splits.get("train", {}).get("left_out", {})
        found += [f"{task} {count}" for reason, count in left_out.items() if reason.startswith("too long")]
    text = "Training rows were left out because they are too long; --seq-len takes longer ones."
    return Caution("too long", text, _shortened(found)) if found else None


def _unmeasured(run: Run) -> Caution | None:
    failed = [why for when in ("before", "after") if (why := run.probe(when).get("failed"))]
    return Caution("probe", "The adapters could not be measured on the probe.", failed[:1]) if failed else None


def _names(tasks: Sequence[str]) -> str:
    return ", ".join(tasks) if len(tasks) <= _MOST_NAMED else f"{len(tasks)} tasks"


def _shortened(names: Sequence[str]) -> list[str]:
    more = [f"{len(names) - _MOST_NAMED} more"] if len(names) > _MOST_NAMED + 1 else []
    return [*names[: _MOST_NAMED if more else None], *more]


_WORDS = {
    "loss": "The negative log-likelihood of the right answers, in nats a token; lower is better.",
    "score": "The share of right choices, or the mean score of generated answers, from 0 to 1.",
    "change": "After minus before on the same rows, with the interval in which it would lie with other rows, 19 times "
    "of 20. An interval with 0 in it is noise.",
}
_OF_TASKS = {
    "probe": "A few held-out rows of each task, on which the adapters are measured without dropout.",
    "divergence": "How differently an adapter's latents A x are spread for two tasks: the symmetric KL divergence of "
    "two Gaussians, in nats; 0: no difference.",
}
_OF_ROUTERS = {
    "entropy": "Of a router's weights, divided by its largest possible value.",
    "load": "The share of tokens of which a head is the first choice.",
}


def glossary(run: Run) -> list[tuple[str, str]]:
    """Returns the words of a run's report that a reader may not know."""
    probe: dict[str, Any] = run.probe("after")
    words = _WORDS | (_OF_TASKS if probe.get("divergence") else {}) | (_OF_ROUTERS if probe.get("routing") else {})
    return list(words.items())
