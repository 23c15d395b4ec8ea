"""Scores a model on held-out examples: results of rows and tasks, and the alignment loss of the tasks' latents."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal

import torch
from rich.progress import Progress
from torch import nn
from transformers import GenerationConfig

from align_ext.adapters.capture import capture_latents
from align_ext.alignment.context import set_task
from align_ext.alignment.model_state import find_state, require_state
from align_ext.alignment.tokens import NO_TASK
from align_ext.base_model.checks import learned_positions, model_errors
from align_ext.base_model.sharded import shard_ranks
from align_ext.config import Align
from align_ext.data.collator import TaskCollator
from align_ext.data.encode import encode_example, features, gold_tokens
from align_ext.data.rows import Example
from align_ext.data.tasks import row_ids
from align_ext.evaluation.likelihood import Question, answer_nll, by_task
from align_ext.evaluation.rows import RowScore, TaskScore, task_scores
from align_ext.losses.statistics import STATISTICS
from align_ext.losses.tokens import Latents, TokenTasks
from align_ext.system import processes
from align_ext.system.bounds import is_whole

Generate = Literal["free", "all", "none"]


@torch.no_grad()
def score_rows(
    model: Any,
    tokenizer: Any,
    examples: Sequence[Example],
    batch_size: int = 16,
    progress: Progress | None = None,
    ids: Mapping[str, int] | None = None,
    *,
    generate: Generate = "free",
) -> list[RowScore]:
    """Scores a causal language model on each example, in eval mode.

    Likelihoods are those of likelihood.answer_nll. Where answers are generated, the model generates greedily, up to a
    few tokens more than the longest right answer of the task, and the example's scorer scores the text. Only the
    special tokens' ids of the model's generation_config are used.

    Args:
        model: any transformers model that can generate.
        tokenizer: its tokenizer.
        examples: examples of any number of tasks.
        batch_size: the number of answers in a forward.
        progress: a running rich display to which a bar is added.
        ids: the id of each task, for a model whose adapters depend on it.
        generate: whether to generate answers to examples without choices ("free"), to "all", or to "none".

    Raises:
        ValueError: ids lacks a task that the adapters depend on, or the model cannot run or generate.
    """
    tasks = _task_ids(model, examples, ids)
    questions = [_question(tokenizer, example, task) for example, task in zip(examples, tasks, strict=True)]
    wanted = {"all": lambda _: True, "free": lambda x: not x.choices, "none": lambda _: False}[generate]
    free = [i for i, x in enumerate(examples) if wanted(x) and not x.is_text]  # nothing is asked by a plain text
    answers = sum(len(question.answers) for question in questions)
    bar = None if progress is None else progress.add_task("evaluating", total=answers + len(free))

    def advance(count: int) -> None:
        if progress is not None and bar is not None:
            progress.advance(bar, count)

    with eval_mode(model), _plain_generation_config(model, tokenizer):
        sums = answer_nll(model, tokenizer.pad_token_id, questions, batch_size, advance)
        generated: dict[int, tuple[float, str]] = {}
        # Task by task, since the longest answer differs between tasks, and an adapter by task needs it.
        for _, same in itertools.groupby(sorted(free, key=lambda i: examples[i].task), lambda i: examples[i].task):
            group = list(same)
            with _named_task(model, tasks[group[0]]):
                generated |= _generated(model, tokenizer, examples, group, batch_size, advance)
    if progress is not None and bar is not None:
        progress.remove_task(bar)
    return [
        RowScore(
            name, x.task, x.label, x.also, nll, tuple(map(len, question.answers)), *generated.get(i, (None, None))
        )
        for i, (name, x, nll, question) in enumerate(zip(row_ids(examples), examples, sums, questions, strict=True))
    ]  # fmt: skip


def score_together(
    model: Any, tokenizer: Any, examples: Sequence[Example], *args: Any, **options: Any
) -> list[RowScore]:
    """Scores each example by score_rows, with the same arguments; processes that have joined divide the examples.

    Where they hold parts of the model's parameters, each forward needs all of them, and each scores all examples.
    """
    if processes.count() == 1 or shard_ranks(model.parameters()):
        return score_rows(model, tokenizer, examples, *args, **options)
    rows = processes.divided(examples, lambda own: score_rows(model, tokenizer, own, *args, **options))
    return [replace(row, id=name) for row, name in zip(rows, row_ids(examples), strict=True)]


def evaluate(
    model: Any, tokenizer: Any, examples: Sequence[Example], *args: Any, **options: Any
) -> dict[str, TaskScore]:
    """Scores a model on each task: task_scores(score_rows(...)), with the same arguments."""
    return task_scores(score_rows(model, tokenizer, examples, *args, **options))


def _question(tokenizer: Any, example: Example, task: int) -> Question:
    prompt, answers = encode_example(tokenizer, example)
    return Question(prompt, tuple(answers), task)


@torch.no_grad()
def alignment(
    model: nn.Module, tokenizer: Any, examples: Sequence[Example], ids: Mapping[str, int], batch_size: int = 16,
    kind: Align | None = None,
) -> float | None:  # fmt: skip
    """Computes the alignment loss over all tokens of examples, without dropout, for adapters of any architecture.

    It can be measured whether or not it is trained, so that arms with alignment and without can be compared.

    Args:
        model: a model with adapters; without any the result is None.
        tokenizer: its tokenizer.
        examples: examples of at least two tasks.
        ids: the id of each task.
        batch_size: the number of examples in a forward.
        kind: "kl", "mmd" or "l2"; None: the loss that the model's options name, or "kl".

    Returns:
        The value before its weight; None for a single task, and with align_statistics="position", since examples of
        different lengths have different positions.
    """
    state = find_state(model)
    if state is None or state.config.align_statistics == "position" or len(ids) < 2:
        return None
    kind, together = kind or state.config.align or "kl", None
    for _, _, statistics in _alignments(model, tokenizer, examples, ids, batch_size, kind):
        together = statistics if together is None else together.merge(statistics)
    return None if together is None else float(together.evaluate(state.config).value)


@torch.no_grad()
def alignment_pull(
    model: nn.Module, tokenizer: Any, examples: Sequence[Example], ids: Mapping[str, int], kind: Align
) -> float:
    """Computes how strongly an alignment loss of weight 1 pulls at the latents: sqrt(Σ |d loss / d z|²).

    The sum is over all tokens and adapted layers of one batch of all examples, without dropout.

    Args:
        model: a model with adapters.
        tokenizer: its tokenizer.
        examples: examples of at least two tasks.
        ids: the id of each task.
        kind: the loss.
    """
    state, total = require_state(model), 0.0
    for latents, tokens, statistics in _alignments(model, tokenizer, examples, ids, len(examples), kind):
        of_loss = statistics.evaluate(state.config)
        one = torch.ones((), device=_device(model))
        gradients = of_loss.gradients(latents, tokens, one, 1.0)
        total += sum(float(gradient.double().square().sum()) for gradient in gradients.values())
    return math.sqrt(total)


def _alignments(
    model: nn.Module, tokenizer: Any, examples: Sequence[Example], ids: Mapping[str, int], batch_size: int, kind: Align
) -> Iterator[tuple[Latents, TokenTasks, Any]]:
    """Yields the latents of each batch of examples, the tasks of their tokens, and a loss's statistics."""
    state = require_state(model)
    rows = sorted(features(tokenizer, examples, dict(ids)), key=lambda row: len(row["input_ids"]))
    tasks, collate = max(state.tasks, len(ids)), TaskCollator(tokenizer)
    with eval_mode(model), capture_latents(model) as captured:
        for batch in _batches(rows, batch_size):
            inputs = {name: x.to(_device(model)) for name, x in collate(batch).items()}
            with model_errors(model, "be run"):
                model(**inputs)
            counts = inputs["labels"] != -100 if state.config.response_only else inputs["attention_mask"] != 0
            tokens = TokenTasks(torch.where(counts, inputs["task_ids"][:, None], NO_TASK))
            latents = {number: captured[name].z for number, name in enumerate(sorted(captured))}
            sizes = (len(latents), tasks, max(z.shape[-1] for z in latents.values()))
            yield latents, tokens, STATISTICS[kind].of(latents, tokens, sizes, state.config)


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Puts a model into eval mode for a block."""
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
    if missing and by_task(model):
        kind = require_state(model).config.architecture
        raise ValueError(f"a {kind} model is scored with the id of every task: ids lacks {', '.join(missing)}")
    return [(ids or {}).get(example.task, -1) for example in examples]


@contextmanager
def _named_task(model: nn.Module, task: int) -> Iterator[None]:
    """Sets the task for generation in a model with one adapter per task."""
    state = find_state(model)
    if state is None or not by_task(model):
        yield
        return
    before = state.task
    set_task(model, task)
    try:
        yield
    finally:
        state.task = before


def _generated(
    model: Any, tokenizer: Any, examples: Sequence[Example], free: list[int], batch_size: int, advance: Any
) -> dict[int, tuple[float, str]]:
    """Returns the score and the text of a greedy answer to each example."""
    answers = {}
    encoded = {i: gold_tokens(tokenizer, examples[i]) for i in free}
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
            answers[i] = examples[i].score(text), text
        advance(len(batch))
    return answers


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
