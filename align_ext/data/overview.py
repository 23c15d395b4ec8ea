"""What a data set holds before it is trained on: lengths, padding, overlap of splits, and what of a row is learnt."""

import itertools
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from align_ext.data.rows import Example
from align_ext.data.task_sampler import TaskSampler

_PUNCTUATION = re.compile("[.,;:!?'\"\u2018\u2019\u201c\u201d\u00ab\u00bb\u2026\u3001\u3002]+")
_BATCHES = 2000  # the most batches whose padding is counted


def lengths(tokens: Iterable[int]) -> dict[str, int]:
    """Returns the least, the median, the 95th percentile and the largest number of tokens of rows, and their sum."""
    counts = sorted(tokens)
    if not counts:
        return {}
    named = {"min": 0, "median": (len(counts) - 1) // 2, "p95": -(-95 * len(counts) // 100) - 1, "max": -1}
    return {name: counts[index] for name, index in named.items()} | {"sum": sum(counts)}


def padding(rows: Sequence[Mapping[str, Any]], batch_size: int, sampler: TaskSampler) -> dict[str, float]:
    """Counts the padding of the batches that a run will have, at most the first 2,000.

    Args:
        rows: the rows to train on.
        batch_size: the rows in a batch.
        sampler: the order of the rows.

    Returns:
        batches: how many were counted; tokens: their tokens; padding: the share of all computed tokens that are none.
    """
    order = iter(sampler)
    batches = tokens = computed = 0
    for _ in range(min(sampler.batches, _BATCHES)):
        counts = [len(rows[index]["input_ids"]) for index in itertools.islice(order, batch_size)]
        batches, tokens = batches + 1, tokens + sum(counts)
        computed += max(counts) * len(counts)
    return {"batches": batches, "tokens": tokens, "padding": 1 - tokens / computed}


def overlaps(train: Iterable[Example], test: Iterable[Example]) -> list[tuple[Example, Example, bool]]:
    """Returns pairs of an example to train on and one to score on, of any tasks, that ask the same.

    Two prompts ask the same if their texts are equal (the third entry is True), or equal but for case, punctuation and
    spaces; plain texts are compared as prompts are. Each example to train on is in one pair at most.
    """
    exact: dict[str, Example] = {}
    near: dict[str, Example] = {}
    for example in test:
        exact.setdefault(example.asked, example)
        near.setdefault(normalised(example.asked), example)
    pairs = []
    for example in train:
        if (other := exact.get(example.asked)) is not None:
            pairs.append((example, other, True))
        elif (other := near.get(normalised(example.asked))) is not None:
            pairs.append((example, other, False))
    return pairs


def normalised(text: str) -> str:
    """Returns a text in lower case without punctuation at the ends of words; signs such as + - * / % stay."""
    plain = unicodedata.normalize("NFKC", text).casefold()
    return " ".join(_PUNCTUATION.sub(" ", plain).split()) or text


def learnt_parts(tokenizer: Any, row: Mapping[str, Any]) -> list[tuple[str, bool]]:
    """Returns the text of a row in parts, each with whether it is learnt."""
    parts = itertools.groupby(zip(row["input_ids"], row["labels"], strict=True), key=lambda pair: pair[1] != -100)
    return [
        (tokenizer.decode([token for token, _ in pairs], clean_up_tokenization_spaces=False), learnt)
        for learnt, pairs in parts
    ]
