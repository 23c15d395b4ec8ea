"""Packs the rows of a task into rows of a given number of tokens, in which no example sees another."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from align_ext.base_model.checks import model_errors
from align_ext.data.collator import TaskCollator
from align_ext.data.encode import encode_example
from align_ext.data.rows import Example

_PORTION = 4 << 20  # tokens
_CHECKED = 24  # the tokens of each of two examples with which a model is checked
# Relative to the largest logit. Rounding differs between a row alone and behind another one (bfloat16: 0.024 in
# SmolLM2-135M, where examples that see each other differ by 0.7), but not with what stands before it.
_CLOSE = {torch.float32: 1e-4, torch.float64: 1e-6}
_CLOSE_16_BIT, _SAME = 0.1, 1e-4


def pack(rows: Sequence[Mapping[str, Any]], tokens: int) -> Iterator[dict[str, Any]]:
    """Packs rows by TRL's best-fit-decreasing; a packed row has examples of one task.

    Of a task with more than 4 million tokens, rows are packed in portions of so many.

    Args:
        rows: rows of `features`, each of at most so many tokens.
        tokens: the most tokens of a packed row.

    Yields:
        Rows with input_ids, labels (-100 at the first token of each example), task_ids, and position_ids, which begin
        at 0 with each example. The tasks have the order of their first rows.

    Raises:
        ValueError: a row is longer.
    """
    of_task: dict[int, list[int]] = {}
    for index, row in enumerate(rows):
        of_task.setdefault(row["task_ids"], []).append(index)
        if (length := len(row["input_ids"])) > tokens:
            raise ValueError(f"a row of {length} tokens does not fit into packed rows of {tokens}")
    for task, indices in of_task.items():
        portion: list[Mapping[str, Any]] = []
        size = 0
        for index in indices:
            portion.append(rows[index])
            size += len(portion[-1]["input_ids"])
            if size >= _PORTION:
                yield from _packed(portion, task, tokens)
                portion, size = [], 0
        if portion:
            yield from _packed(portion, task, tokens)


def _packed(rows: Sequence[Mapping[str, Any]], task: int, tokens: int) -> Iterator[dict[str, Any]]:
    import datasets
    import trl

    columns = {"input_ids": [row["input_ids"] for row in rows], "labels": [[-100, *row["labels"][1:]] for row in rows]}
    shows = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        table = trl.pack_dataset(datasets.Dataset.from_dict(columns), tokens, "bfd", {"batch_size": len(rows)})
    finally:
        if not shows:
            datasets.enable_progress_bars()
    for row in table:
        positions = list(chain.from_iterable(map(range, row["seq_lengths"])))
        yield {
            "input_ids": row["input_ids"], "labels": row["labels"], "position_ids": positions, "task_ids": task
        }  # fmt: skip


class PackedCollator:
    """Collates packed rows into one row without padding, [1, N], and other rows as TaskCollator.

    A batch without attention_mask, whose position_ids begin at 0 with each example, is what transformers takes for
    packed: its masks, and FlashAttention, keep the examples apart.

    Args:
        tokenizer: the tokenizer, to pad rows that are not packed.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.padded, self.flat = TaskCollator(tokenizer), TaskCollator(_flatten)

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> Any:
        """Returns a batch with task_ids [1, N] of packed rows, or as TaskCollator."""
        return (self.flat if "position_ids" in features[0] else self.padded)(features)


def _flatten(features: list[dict[str, Any]]) -> dict[str, Tensor]:
    names = ("input_ids", "labels", "position_ids")
    return {name: torch.tensor([list(chain.from_iterable(row[name] for row in features))]) for name in names}


def cut_texts(tokenizer: Any, examples: Iterable[Example], tokens: int) -> Iterator[Example]:
    """Cuts plain texts of more tokens into pieces of at most so many; the end token follows the last piece alone.

    Raises:
        ValueError: a text must be cut, and the tokenizer does not tell where its tokens are (a slow tokenizer).
    """
    for example in examples:
        yield from _pieces(tokenizer, example, tokens)


def _pieces(tokenizer: Any, example: Example, tokens: int) -> Iterator[Example]:
    if not example.is_text or _length(tokenizer, example) <= tokens:
        yield example
        return
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(f"{example.where or example.task}: a text is cut by a fast tokenizer only: shorten the text")
    text = example.answer
    offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    first = begins = 0
    while first < len(offsets):
        for last in range(min(first + tokens, len(offsets)), first, -1):
            ends = last == len(offsets)
            piece = replace(example, answer=text[begins : None if ends else offsets[last - 1][1]], ends=ends)
            if piece.answer and 2 <= _length(tokenizer, piece) <= tokens:
                break
        else:
            raise ValueError(f"{example.where or example.task}: the text cannot be cut into pieces of {tokens} tokens")
        yield piece
        first, begins = last, begins + len(piece.answer)


def _length(tokenizer: Any, example: Example) -> int:
    prompt, (answer,) = encode_example(tokenizer, example)
    return len(prompt) + len(answer)


@torch.no_grad()
def check_packing(model: Any, rows: Sequence[Mapping[str, Any]]) -> None:
    """Checks that a model computes the same of an example alone and behind others in a packed row.

    Args:
        model: a causal language model.
        rows: two rows of `features` or more.

    Raises:
        ValueError: the examples of a row see each other: the model, or its attention, knows no packed rows.
    """
    device = next(model.parameters()).device
    first, second = (list(row["input_ids"])[:_CHECKED] for row in (rows[0], rows[-1]))

    def logits(*parts: list[int]) -> Tensor:
        positions = [position for part in parts for position in range(len(part))]
        inputs = {"input_ids": list(chain(*parts)), "position_ids": positions}
        tensors = {name: torch.tensor([values], device=device) for name, values in inputs.items()}
        with model_errors(model, "run on packed rows: leave --packing out"):
            output = model(**tensors, use_cache=False)
        return output.logits[0, -len(parts[-1]) :].float()

    training = model.training
    model.eval()
    try:
        alone, behind, other = logits(second), logits(first, second), logits(first[::-1], second)
    finally:
        model.train(training)
    scale, close = float(alone.abs().max()), _CLOSE.get(model.dtype, _CLOSE_16_BIT)
    differences = (float((behind - one).abs().max()) / scale for one in (alone, other))
    if not all(difference <= most for difference, most in zip(differences, (close, _SAME), strict=True)):
        raise ValueError(
            "packing: the examples of a packed row see each other in this model, so that its losses would be others: "
            "leave --packing out"
        )
