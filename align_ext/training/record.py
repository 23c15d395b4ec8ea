"""What a run records of its adapters and of its answers, before, during and after training, for its report."""

from collections.abc import Sequence
from typing import Any

import transformers
from rich.console import Console

from align_ext.data.collator import TaskCollator
from align_ext.data.conversation import text_with_roles
from align_ext.data.encode import features
from align_ext.diagnostics.cosines import pairs
from align_ext.diagnostics.latents import layer_divergences, task_divergence
from align_ext.diagnostics.record import record_adapters
from align_ext.diagnostics.routing import routing
from align_ext.evaluation.rows import RowScore
from align_ext.system.terminal import print_line
from align_ext.training.job import Job

_PROBE_TOKENS = 1 << 15  # of all tasks together, so that their latents fit into memory whatever the model's size
_PARTS = 4  # of a run, between which the adapters are measured
_SHOWN_ROWS, _ROWS_OF_A_TASK, _LETTERS = 48, 3, 600  # of the answers that are kept


def measure_adapters(job: Job) -> dict[str, Any]:
    """Measures the adapters on a probe of held-out rows, without dropout; the model is left as it was.

    Keys, JSON-ready, of numbers with 6 significant digits; those that do not apply are left out:
        rows: how many rows the probe has, the first ones of each task.
        tasks: the names of the tasks, and
        divergence: [M][M], task_divergence of their latents, and
        layers: module name -> the mean of layer_divergences over the pairs of tasks; all three with two tasks or more.
        routing: module name -> entropy, and load and mean weight of each head; with routers.
        failed: why nothing could be measured.
    """
    rows = _probe(job)
    collate, size = TaskCollator(job.tokenizer), job.options.eval_batch_size
    batches = (collate(rows[start : start + size]) for start in range(0, len(rows), size))
    found: dict[str, Any] = {"rows": len(rows)}
    try:
        recording = record_adapters(job.model, batches)
        if len(job.data.names) > 1:
            found["tasks"] = list(job.data.names)
            found["divergence"] = [[_rounded(x) for x in row] for row in task_divergence(recording).tolist()]
            layers = layer_divergences(recording)
            found["layers"] = {name: _rounded(float(pairs(of).mean())) for name, of in layers.items()}
        if recording.weights:
            found["routing"] = {
                name: {
                    "entropy": _rounded(one.entropy),
                    "load": [_rounded(x) for x in one.load.tolist()],
                    "weight": [_rounded(x) for x in one.importance.tolist()],
                }
                for name, one in routing(recording).items()
            }
    except ValueError as error:  # a model whose layers do not see the batch's tokens trains all the same
        return {"rows": len(rows), "failed": str(error)}
    return found


class MeasureAdapters(transformers.TrainerCallback):
    """Measures the adapters after each quarter of a run but the last: for the log, a console's lines and the trackers.

    A checkpoint holds the log, so that a resumed run has all measures.

    Args:
        job: the run.
        console: gets a line.
        handler: the Trainer's, whose callbacks get the numbers as a log of their own.
    """

    def __init__(self, job: Job, console: Console, handler: transformers.trainer_callback.CallbackHandler) -> None:
        self.job, self.console, self.handler = job, console, handler
        self.steps = {job.options.steps * part // _PARTS for part in range(1, _PARTS)} - {0}

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Measures after the step, if it is one of those."""
        if state.global_step not in self.steps or args.torch_compile:
            return
        found = measure_adapters(self.job)
        state.log_history.append({"step": state.global_step, "adapters": found})
        if text := _in_words(found):
            print_line(self.console, f"step {state.global_step}/{state.max_steps}  {text}")
        if numbers := _numbers(found):
            wanted = control.should_log  # of the losses, which this log is none of
            self.handler.on_log(args, state, control, numbers)
            control.should_log = wanted


def _numbers(found: dict[str, Any]) -> dict[str, float]:
    """Returns what measure_adapters found by name: means over the layers, those of each layer, and of each head."""
    numbers: dict[str, float] = {}
    routers = found.get("routing", {})
    entropies = {name: one["entropy"] for name, one in routers.items()}
    for kind, of in (("divergence", found.get("layers", {})), ("routing_entropy", entropies)):
        numbers |= {f"{kind}/{name}": value for name, value in of.items()}
        numbers |= {kind: sum(of.values()) / len(of)} if of else {}
    for kind in ("load", "weight"):
        of_heads = list(zip(*(one[kind] for one in routers.values()), strict=True))
        numbers |= {f"routing_{kind}/{head}": sum(of) / len(of) for head, of in enumerate(of_heads)}
    return numbers


def _in_words(found: dict[str, Any]) -> str:
    """Returns a line on what measure_adapters found: where the tasks differ most, and the heads' load."""
    parts = []
    if layers := found.get("layers"):
        most = max(layers, key=lambda name: layers[name])
        mean = sum(layers.values()) / len(layers)
        parts.append(f"divergence of tasks {mean:.3g} nats a layer, most in {most} ({layers[most]:.3g})")
    if routers := found.get("routing"):
        loads = [load for one in routers.values() for load in one["load"]]
        entropy = sum(one["entropy"] for one in routers.values()) / len(routers)
        parts.append(f"load of heads {min(loads):.2f} to {max(loads):.2f}, entropy {entropy:.2f}")
    return "; ".join(parts)


def _probe(job: Job) -> list[dict[str, Any]]:
    """Returns the first held-out rows of each task, shortest first: one at least, more within a number of tokens."""
    ids, room = job.data.ids(), _PROBE_TOKENS // len(job.data.names)
    chosen: list[dict[str, Any]] = []
    used = dict.fromkeys(ids.values(), 0)
    for row in features(job.tokenizer, job.data.test, ids):
        task, count = row["task_ids"], len(row["input_ids"])
        if used[task] == 0 or used[task] + count <= room:
            chosen.append(row)
            used[task] += count
    return sorted(chosen, key=lambda row: len(row["input_ids"]))


def _rounded(value: float) -> float:
    return float(f"{value:.6g}")


def shown_answers(job: Job, before: Sequence[RowScore], after: Sequence[RowScore]) -> list[dict[str, Any]]:
    """Returns what the model answered to the first held-out rows of each task, as text of bounded length.

    Args:
        job: its held-out rows.
        before: their scores before training, in the rows' order.
        after: those after training.

    Returns:
        task, prompt, gold, before, after, and the scores of both answers, JSON-ready. The answer to a row with choices
        is its likeliest choice. Plain texts, which ask nothing, are left out.
    """
    of_a_task = min(_ROWS_OF_A_TASK, max(1, _SHOWN_ROWS // len(job.data.names)))
    shown: list[dict[str, Any]] = []
    counts: dict[str, int] = {}
    for example, *scores in zip(job.data.test, before, after, strict=True):
        counts[example.task] = counts.get(example.task, 0) + (not example.is_text)
        if example.is_text or counts[example.task] > of_a_task or len(shown) == _SHOWN_ROWS:
            continue
        texts = [one.text if one.choice is None else example.choices[one.choice] for one in scores]
        entry: dict[str, Any] = {"task": example.task, "prompt": _cut(text_with_roles(example.prompt))}
        entry |= {"gold": _cut(example.answer)}
        for when, text, score in zip(("before", "after"), texts, scores, strict=True):
            entry |= {when: None if text is None else _cut(text), f"{when}_score": score.score}
        shown.append(entry)
    return shown


def _cut(text: str) -> str:
    """Returns a text of bounded length: of a longer one the start and the end, where what is asked often stands."""
    if len(text) <= _LETTERS:
        return text
    return f"{text[: _LETTERS // 3]} [...] {text[-2 * _LETTERS // 3 :]}"
