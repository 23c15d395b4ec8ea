"""Scores a model on held-out examples: loss and accuracy per task, and the alignment loss of the tasks' latents."""

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
from align_ext.base_model.checks import learned_positions, model_errors
from align_ext.data.collator import TaskCollator
from align_ext.data.encode import answer_tokens, encode, features, prompt_tokens
from align_ext.data.rows import Example
from align_ext.losses.statistics import STATISTICS
from align_ext.losses.tokens import TokenTasks
from align_ext.system.bounds import is_whole


@dataclass(frozen=True)
class TaskScore:
    """The result of one task; the standard errors take its examples as a sample, and are None for a single example.

    Attributes:
        loss: negative log-likelihood of the gold answer per token, over all answer tokens of the task.
        score: the fraction of right choices, or the mean score of generated answers.
        examples: the number of scored examples.
        loss_error: standard error of the loss as a ratio, sqrt(n / (n - 1) Σ (nll_i - loss tokens_i)²) / Σ tokens_i.
        score_error: standard error of the score, s / sqrt(n).
        greedy: the mean score of generated answers if score is about choices; only on request.
        greedy_error: the standard error of greedy.
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
    """One answer to one prompt: the right one (choice == label) or another choice."""

    example: int
    choice: int
    task: int
    prompt: list[int]
    answer: list[int]


def answer_nll(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Computes the negative log-likelihood of each supervised token.

    Args:
        logits: [B, S, vocab], for the next token.
        labels: int64 [B, S], -100 for tokens that are not supervised.

    Returns:
        nll: float32 [K], for the K supervised tokens (the first token of a row is not predicted and never counts).
        rows: int64 [K], the row of each token.
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

    With choices, the model's answer is the one with the smallest negative log-likelihood per token. Without choices,
    the model generates greedily, up to a few tokens more than the longest right answer of the task, and the example's
    scorer scores the text. Only the special tokens' ids of the model's generation_config are used.

    Args:
        model: any transformers model that can generate.
        tokenizer: its tokenizer.
        examples: examples of any number of tasks.
        batch_size: the number of rows in a forward.
        progress: a running rich display to which a bar is added.
        ids: the id of each task, for a model with one adapter per task (multi_adapter).
        greedy: whether to generate answers also for examples with choices.

    Raises:
        ValueError: ids lacks a task of a multi_adapter, or the model cannot run or generate.
    """
    tasks = _task_ids(model, examples, ids)
    rows = _rows(tokenizer, examples, tasks)
    free = [i for i, example in enumerate(examples) if greedy or not example.choices]
    bar = None if progress is None else progress.add_task("evaluating", total=len(rows) + len(free))

    def advance(count: int) -> None:
        if progress is not None and bar is not None:
            progress.advance(bar, count)

    with _eval_mode(model), _plain_generation_config(model, tokenizer):
        sums = _choice_nll(model, tokenizer, rows, batch_size, advance)
        generated: dict[int, float] = {}
        # Task by task, since the longest answer differs between tasks, and a multi_adapter needs the task.
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
    indices: list[int],
    examples: Sequence[Example],
    sums: Mapping[tuple[int, int], tuple[float, int]],
    generated: Mapping[int, float],
) -> TaskScore:
    """Returns the result of one task from the (NLL, tokens) of answers and the scores of generated answers."""
    gold = [sums[i, max(examples[i].label, 0)] for i in indices]
    tokens = sum(count for _, count in gold)
    loss = sum(nll for nll, _ in gold) / tokens
    residuals = sum((nll - loss * count) ** 2 for nll, count in gold)
    chosen = {}
    for i in indices:
        if choices := examples[i].choices:
            per_token = [sums[i, c][0] / sums[i, c][1] for c in range(len(choices))]
            best = min(range(len(per_token)), key=per_token.__getitem__)
            chosen[i] = float(best in (examples[i].label, *examples[i].also))
    score, score_error = mean_and_error([chosen.get(i, generated.get(i, 0.0)) for i in indices])
    both = [generated[i] for i in indices] if chosen and all(i in generated for i in indices) else []
    return TaskScore(
        loss, score, len(indices),
        math.sqrt(residuals * len(indices) / (len(indices) - 1)) / tokens if len(indices) > 1 else None,
        score_error, *(mean_and_error(both) if both else (None, None)),
    )  # fmt: skip


def mean_and_error(values: Sequence[float]) -> tuple[float, float | None]:
    """Returns the mean and its standard error s / sqrt(n), s² = Σ (x - mean)² / (n - 1), None for one value."""
    n, mean = len(values), sum(values) / len(values)
    return mean, math.sqrt(sum((x - mean) ** 2 for x in values) / (n * (n - 1))) if n > 1 else None


@torch.no_grad()
def alignment(
    model: nn.Module, tokenizer: Any, examples: Sequence[Example], ids: dict[str, int], batch_size: int = 16
) -> float | None:
    """Computes the alignment loss over all tokens of examples, without dropout; None if alignment is off.

    Also None with align_statistics="position", since examples of different lengths have different positions.
    """
    state = find_state(model)
    if state is None or state.config.align is None or state.config.align_statistics == "position":
        return None
    state.tasks = max(state.tasks, len(ids))  # so that the moments of all batches have one shape
    rows = sorted(features(tokenizer, examples, ids), key=lambda row: len(row["input_ids"]))
    collate, statistics, sizes = TaskCollator(tokenizer), None, (len(state.names), state.tasks, state.rank)
    with _eval_mode(model), capture_latents(model) as captured:
        for batch in _batches(rows, batch_size):
            inputs = {name: x.to(_device(model)) for name, x in collate(batch).items()}
            with model_errors(model, "be run"):
                model(**inputs)
            counts = inputs["labels"] != -100 if state.config.response_only else inputs["attention_mask"] != 0
            tokens = TokenTasks(torch.where(counts, inputs["task_ids"][:, None], NO_TASK))
            latents = {number: captured[name].z for number, name in enumerate(state.names)}
            batch_statistics: Any = STATISTICS[state.config.align].of(latents, tokens, sizes, state.config)
            statistics = batch_statistics if statistics is None else statistics.merge(batch_statistics)
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
    """Returns a greedy generation config with the model's special tokens and no other option of the model.

    Generation ends at the tokenizer's end token and at each end token of the model.
    """
    options = model.generation_config.to_dict()
    ends = options.get("eos_token_id")
    ends = [*(ends if isinstance(ends, list) else [ends]), tokenizer.eos_token_id]
    names = ("bos_token_id", "decoder_start_token_id")
    start_tokens = {name: options[name] for name in names if is_whole(options.get(name), 0, 2**31)}
    return GenerationConfig(
        do_sample=False, pad_token_id=tokenizer.pad_token_id,
        eos_token_id=[end for end in dict.fromkeys(ends) if is_whole(end, 0, 2**31)] or None, **start_tokens,
    )  # fmt: skip


@contextmanager
def _plain_generation_config(model: Any, tokenizer: Any) -> Iterator[None]:
    """Sets plain_generation on the model, since generate() takes missing options from the model's configuration."""
    before, model.generation_config = model.generation_config, plain_generation(model, tokenizer)
    try:
        yield
    finally:
        model.generation_config = before


def _task_ids(model: nn.Module, examples: Sequence[Example], ids: Mapping[str, int] | None) -> list[int]:
    """Returns the id of each example's task, or -1 if it is not given and not needed."""
    missing = sorted({example.task for example in examples} - set(ids or {}))
    if missing and _by_task(model):
        raise ValueError(f"a multi_adapter model is scored with the id of every task: ids lacks {', '.join(missing)}")
    return [(ids or {}).get(example.task, -1) for example in examples]


def _by_task(model: nn.Module) -> bool:
    state = find_state(model)
    return state is not None and state.config.architecture == "multi_adapter"


@contextmanager
def _named_task(model: nn.Module, task: int) -> Iterator[None]:
    """Sets the task for generation in a model with one adapter per task."""
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
    """Returns every answer to every prompt, longest first, so that a too large batch fails early; padding is small."""
    rows = []
    for i, example in enumerate(examples):
        prompt = prompt_tokens(tokenizer, example.prompt)
        for choice, answer in enumerate(example.choices or (example.answer,)):
            rows.append(_Row(i, choice, tasks[i], prompt, answer_tokens(tokenizer, answer)))
    return sorted(rows, key=lambda row: -len(row.prompt) - len(row.answer))


def _choice_nll(
    model: Any, tokenizer: Any, rows: list[_Row], batch_size: int, advance: Any
) -> dict[tuple[int, int], tuple[float, int]]:
    """Returns (sum of the NLL, number of tokens) of each answer, by (example, choice)."""
    sums, state = {}, find_state(model)
    for batch in _batches(rows, batch_size):
        length = max(len(row.prompt) + len(row.answer) for row in batch)
        ids = torch.full((len(batch), length), tokenizer.pad_token_id)
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
            inputs["labels"] = labels  # the router needs the end of the prompt
        inputs = {name: x.to(_device(model)) for name, x in inputs.items()}
        with model_errors(model, "score answers"):
            nll, row_of_token = answer_nll(model(**inputs, use_cache=False).logits, labels)
        per_row = torch.zeros(len(batch), device=nll.device).index_add_(0, row_of_token, nll).tolist()
        for row, value in zip(batch, per_row, strict=True):
            sums[row.example, row.choice] = (value, len(row.answer))
        advance(len(batch))
    return sums


def _generated_scores(
    model: Any, tokenizer: Any, examples: Sequence[Example], free: list[int], batch_size: int, advance: Any
) -> dict[int, float]:
    """Returns the score of a greedy answer to each example."""
    scores = {}
    encoded = {i: encode(tokenizer, examples[i].prompt, examples[i].answer) for i in free}
    longest = max(len(answer) for _, answer in encoded.values()) + 4
    free = sorted(free, key=lambda i: len(encoded[i][0]))
    for batch, max_new_tokens in _with_room(_batches(free, batch_size), encoded, longest, learned_positions(model)):
        length = max(len(encoded[i][0]) for i in batch)
        ids = torch.full((len(batch), length), tokenizer.pad_token_id)
        mask = torch.zeros_like(ids)
        for row, i in enumerate(batch):
            prompt = encoded[i][0]
            ids[row, length - len(prompt) :] = torch.tensor(prompt)
            mask[row, length - len(prompt) :] = 1
        generation_config = copy.deepcopy(model.generation_config)
        generation_config.max_new_tokens = max_new_tokens
        inputs = {"input_ids": ids.to(_device(model)), "attention_mask": mask.to(_device(model))}
        with model_errors(model, "generate answers"):
            output = model.generate(**inputs, generation_config=generation_config).cpu()
        for i, text in zip(batch, tokenizer.batch_decode(output[:, length:], skip_special_tokens=True), strict=True):
            scores[i] = examples[i].score(text)
        advance(len(batch))
    return scores


def _with_room(
    batches: Iterator[Sequence[int]], encoded: Mapping[int, tuple[list[int], list[int]]], limit: int, room: int | None
) -> Iterator[tuple[Sequence[int], int]]:
    """Yields batches and the number of tokens to generate; splits a batch without room for so many tokens."""
    for batch in batches:
        if room is None or max(len(encoded[i][0]) for i in batch) + limit <= room:
            yield batch, limit
        else:
            yield from (([i], min(limit, max(room - len(encoded[i][0]), 1))) for i in batch)


def _batches(rows: Sequence[Any], size: int) -> Iterator[Any]:
    for start in range(0, len(rows), size):
        yield rows[start : start + size]


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device
