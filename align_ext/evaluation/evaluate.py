"""Scores a model on held-out examples: loss per task, accuracy per task, and the alignment of the tasks' latents."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from rich.progress import Progress
from torch import Tensor, nn
from transformers import GenerationConfig

from align_ext.adapters.capture import capture_latents
from align_ext.alignment.context import set_task
from align_ext.alignment.model_state import find_state
from align_ext.alignment.tokens import NO_TASK
from align_ext.base_model.checks import learned_positions, running
from align_ext.data.collator import TaskCollator
from align_ext.data.encode import answer_tokens, encode, features, prompt_tokens
from align_ext.data.rows import Example
from align_ext.losses.statistics import STATISTICS
from align_ext.losses.tokens import TokenTasks
from align_ext.system.bounds import is_whole


@dataclass(frozen=True)
class TaskScore:
    """One task's result; the standard errors are of its examples as a sample, None where there is one alone.

    Attributes:
        loss: negative log-likelihood of the gold answer per token, over all answer tokens of the task.
        score: share of right choices, or mean score of generated answers.
        examples: how many were scored.
        loss_error: standard error of the loss as a ratio, sqrt(n / (n - 1) Σ (nll_i - loss tokens_i)²) / Σ tokens_i.
        score_error: standard error of the score, s / sqrt(n).
        greedy: mean score of generated answers where score is of choices, if asked for.
        greedy_error: its standard error.
    """

    loss: float
    score: float
    examples: int
    loss_error: float | None = None
    score_error: float | None = None
    greedy: float | None = None
    greedy_error: float | None = None


@dataclass(frozen=True)
class _Row:
    """One answer to one prompt: the gold one (choice == label) or another choice."""

    example: int
    choice: int
    task: int
    prompt: list[int]
    answer: list[int]


def answer_nll(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Computes the negative log-likelihood of each supervised token.

    Args:
        logits: [B, S, vocab], of the next token.
        labels: int64 [B, S], -100 where unsupervised.

    Returns:
        nll: float32 [K], K supervised tokens (the first position of a row predicts nothing and never counts).
        rows: int64 [K], the row of each.
    """
    targets = labels[:, 1:].to(logits.device)
    rows, columns = torch.nonzero(targets != -100, as_tuple=True)
    nll = nn.functional.cross_entropy(logits[rows, columns].float(), targets[rows, columns], reduction="none")
    return nll, rows


@torch.no_grad()
def evaluate(
    model: Any,
    tokenizer: Any,
    examples: Sequence[Example],
    batch_size: int = 16,
    progress: Progress | None = None,
    ids: Mapping[str, int] | None = None,
    *,
    greedy: bool = False,
) -> dict[str, TaskScore]:
    """Scores a causal language model on each task, in eval mode.

    With choices, the answer with the smallest negative log-likelihood per token is the model's; without, it
    generates greedily, up to a few tokens more than the longest gold answer of the task, and the example's scorer
    judges. Of the model's own generation_config only the special tokens' ids count.

    Args:
        model: any transformers model that generates.
        tokenizer: its tokenizer.
        examples: of any number of tasks.
        batch_size: rows in a forward.
        progress: a running rich display to which a bar is added.
        ids: each task's id, for a model that has an adapter for each task (multi_adapter).
        greedy: answers are generated to examples with choices too.

    Raises:
        ValueError: the model has an adapter for each task, and ids lacks one; or the model cannot run or generate.
    """
    tasks = _task_ids(model, examples, ids)
    rows = _rows(tokenizer, examples, tasks)
    free = [i for i, example in enumerate(examples) if greedy or not example.choices]
    bar = None if progress is None else progress.add_task("evaluating", total=len(rows) + len(free))

    def advance(count: int) -> None:
        if progress is not None and bar is not None:
            progress.advance(bar, count)

    with _eval_mode(model), _greedy_alone(model, tokenizer):
        sums = _choice_nll(model, tokenizer, rows, batch_size, advance)
        generated: dict[int, float] = {}
        # Task by task: an answer may be as long as the longest of its task, and a model may need to know the task.
        for _, same in itertools.groupby(sorted(free, key=lambda i: examples[i].task), lambda i: examples[i].task):
            group = list(same)
            with _named_task(model, tasks[group[0]]):
                generated |= _generated_scores(model, tokenizer, examples, group, batch_size, advance)
    if progress is not None and bar is not None:
        progress.remove_task(bar)

    return {
        task: _task_score([i for i, example in enumerate(examples) if example.task == task], examples, sums, generated)
        for task in dict.fromkeys(example.task for example in examples)
    }


def _task_score(
    mine: list[int],
    examples: Sequence[Example],
    sums: Mapping[tuple[int, int], tuple[float, int]],
    generated: Mapping[int, float],
) -> TaskScore:
    """The result of one task's examples, from the answers' (NLL, tokens) and the scores of what was generated."""
    gold = [sums[i, max(examples[i].label, 0)] for i in mine]
    tokens = sum(count for _, count in gold)
    loss = sum(nll for nll, _ in gold) / tokens
    residuals = sum((nll - loss * count) ** 2 for nll, count in gold)
    chosen = {}
    for i in mine:
        if choices := examples[i].choices:
            per_token = [sums[i, c][0] / sums[i, c][1] for c in range(len(choices))]
            best = min(range(len(per_token)), key=per_token.__getitem__)
            chosen[i] = float(best in (examples[i].label, *examples[i].also))
    score, score_error = mean_and_error([chosen.get(i, generated.get(i, 0.0)) for i in mine])
    both = [generated[i] for i in mine] if chosen and all(i in generated for i in mine) else []
    return TaskScore(
        loss, score, len(mine),
        math.sqrt(residuals * len(mine) / (len(mine) - 1)) / tokens if len(mine) > 1 else None,
        score_error, *(mean_and_error(both) if both else (None, None)),
    )  # fmt: skip


def mean_and_error(values: Sequence[float]) -> tuple[float, float | None]:
    """The mean and its standard error, s / sqrt(n) with s² = Σ (x - mean)² / (n - 1); None for one value."""
    n, mean = len(values), sum(values) / len(values)
    return mean, math.sqrt(sum((x - mean) ** 2 for x in values) / (n * (n - 1))) if n > 1 else None


@torch.no_grad()
def alignment(
    model: nn.Module, tokenizer: Any, examples: Sequence[Example], ids: dict[str, int], batch_size: int = 16
) -> float | None:
    """Computes the alignment loss over all tokens of some examples, without dropout; None if alignment is off.

    Also None with align_statistics="position": examples of different lengths have no positions in common.
    """
    state = find_state(model)
    if state is None or state.config.align is None or state.config.align_statistics == "position":
        return None
    state.tasks = max(state.tasks, len(ids))  # batches without the last task have moments of the same shape
    rows = sorted(features(tokenizer, examples, ids), key=lambda row: len(row["input_ids"]))
    collate, statistics, sizes = TaskCollator(tokenizer), None, (len(state.names), state.tasks, state.rank)
    with _eval_mode(model), capture_latents(model) as captured:
        for batch in _batches(rows, batch_size):
            inputs = {name: x.to(_device(model)) for name, x in collate(batch).items()}
            with running(model, "be run"):
                model(**inputs)
            counts = inputs["labels"] != -100 if state.config.response_only else inputs["attention_mask"] != 0
            tokens = TokenTasks(torch.where(counts, inputs["task_ids"][:, None], NO_TASK))
            latents = {number: captured[name].z for number, name in enumerate(state.names)}
            part: Any = STATISTICS[state.config.align].of(latents, tokens, sizes, state.config)
            statistics = part if statistics is None else statistics.merge(part)
    return None if statistics is None else float(statistics.evaluate(state.config).value)


@contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def plain_generation(model: Any, tokenizer: Any) -> GenerationConfig:
    """How a model generates where nothing but its logits decides: its special tokens' ids, and no other option of it.

    It ends at the tokenizer's end token and at each of the model's own.
    """
    own = model.generation_config.to_dict()
    ends = own.get("eos_token_id")
    ends = [*(ends if isinstance(ends, list) else [ends]), tokenizer.eos_token_id]
    first = {
        name: own[name] for name in ("bos_token_id", "decoder_start_token_id") if is_whole(own.get(name), 0, 2**31)
    }
    return GenerationConfig(
        do_sample=False, pad_token_id=tokenizer.pad_token_id,
        eos_token_id=[end for end in dict.fromkeys(ends) if is_whole(end, 0, 2**31)] or None, **first,
    )  # fmt: skip


@contextmanager
def _greedy_alone(model: Any, tokenizer: Any) -> Iterator[None]:
    """Gives a model its plain generation: generate() takes what it is not told from the model's own configuration."""
    before, model.generation_config = model.generation_config, plain_generation(model, tokenizer)
    try:
        yield
    finally:
        model.generation_config = before


def _task_ids(model: nn.Module, examples: Sequence[Example], ids: Mapping[str, int] | None) -> list[int]:
    """The id of each example's task; -1 where none is told and the model needs none."""
    missing = sorted({example.task for example in examples} - set(ids or {}))
    if missing and _by_task(model):
        raise ValueError(f"a multi_adapter model is scored with the id of every task: ids lacks {', '.join(missing)}")
    return [(ids or {}).get(example.task, -1) for example in examples]


def _by_task(model: nn.Module) -> bool:
    state = find_state(model)
    return state is not None and state.config.architecture == "multi_adapter"


@contextmanager
def _named_task(model: nn.Module, task: int) -> Iterator[None]:
    """Names the task of what is generated to a model that has an adapter for each."""
    state = find_state(model)
    if state is None or not _by_task(model):
        yield
        return
    before = state.task
    set_task(model, task)
    try:
        yield
    finally:
        state.task = before


def _rows(tokenizer: Any, examples: Sequence[Example], tasks: Sequence[int]) -> list[_Row]:
    """Every answer to every prompt, longest first, so that too large a batch fails at once and padding is little."""
    rows = []
    for i, example in enumerate(examples):
        prompt = prompt_tokens(tokenizer, example.prompt)
        for choice, answer in enumerate(example.choices or (example.answer,)):
            rows.append(_Row(i, choice, tasks[i], prompt, answer_tokens(tokenizer, answer)))
    return sorted(rows, key=lambda row: -len(row.prompt) - len(row.answer))


def _choice_nll(
    model: Any, tokenizer: Any, rows: list[_Row], batch_size: int, advance: Any
) -> dict[tuple[int, int], tuple[float, int]]:
    """(sum of the NLL, number of tokens) of each answer, by (example, choice)."""
    sums, state = {}, find_state(model)
    for batch in _batches(rows, batch_size):
        width = max(len(row.prompt) + len(row.answer) for row in batch)
        ids = torch.full((len(batch), width), tokenizer.pad_token_id)
        labels, mask = torch.full_like(ids, -100), torch.zeros_like(ids)
        for i, row in enumerate(batch):
            start, end = len(row.prompt), len(row.prompt) + len(row.answer)
            ids[i, :end] = torch.tensor(row.prompt + row.answer)
            labels[i, start:end] = ids[i, start:end]
            mask[i, :end] = 1
        inputs = {"input_ids": ids, "attention_mask": mask}
        if _by_task(model):
            inputs["task_ids"] = torch.tensor([row.task for row in batch])
        if state is not None and state.config.routing == "sequence":
            inputs["labels"] = labels  # they tell where the prompt ends
        inputs = {name: x.to(_device(model)) for name, x in inputs.items()}
        with running(model, "score answers"):
            nll, where = answer_nll(model(**inputs, use_cache=False).logits, labels)
        per_row = torch.zeros(len(batch), device=nll.device).index_add_(0, where, nll).tolist()
        for row, value in zip(batch, per_row, strict=True):
            sums[row.example, row.choice] = (value, len(row.answer))
        advance(len(batch))
    return sums


def _generated_scores(
    model: Any, tokenizer: Any, examples: Sequence[Example], free: list[int], batch_size: int, advance: Any
) -> dict[int, float]:
    """The score of a greedy answer to each free-text example."""
    scores = {}
    encoded = {i: encode(tokenizer, examples[i].prompt, examples[i].answer) for i in free}
    longest = max(len(answer) for _, answer in encoded.values()) + 4
    free = sorted(free, key=lambda i: len(encoded[i][0]))
    for batch, most in _with_room(_batches(free, batch_size), encoded, longest, learned_positions(model)):
        width = max(len(encoded[i][0]) for i in batch)
        ids = torch.full((len(batch), width), tokenizer.pad_token_id)
        mask = torch.zeros_like(ids)
        for row, i in enumerate(batch):
            prompt = encoded[i][0]
            ids[row, width - len(prompt) :] = torch.tensor(prompt)
            mask[row, width - len(prompt) :] = 1
        how = copy.deepcopy(model.generation_config)
        how.max_new_tokens = most
        inputs = {"input_ids": ids.to(_device(model)), "attention_mask": mask.to(_device(model))}
        with running(model, "generate answers"):
            out = model.generate(**inputs, generation_config=how).cpu()
        for i, text in zip(batch, tokenizer.batch_decode(out[:, width:], skip_special_tokens=True), strict=True):
            scores[i] = examples[i].score(text)
        advance(len(batch))
    return scores


def _with_room(
    batches: Iterator[Sequence[int]], encoded: Mapping[int, tuple[list[int], list[int]]], most: int, room: int | None
) -> Iterator[tuple[Sequence[int], int]]:
    """Batches and how many tokens to generate; each example alone where not all could have so many."""
    for batch in batches:
        if room is None or max(len(encoded[i][0]) for i in batch) + most <= room:
            yield batch, most
        else:
            yield from (([i], min(most, max(room - len(encoded[i][0]), 1))) for i in batch)


def _batches(rows: Sequence[Any], size: int) -> Iterator[Any]:
    for start in range(0, len(rows), size):
        yield rows[start : start + size]


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device
