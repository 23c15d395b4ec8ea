"""The built-in tasks: examples that generators of reasoning-gym make."""

import functools
import os
from collections.abc import Sequence
from typing import Any

from align_ext.data.on_disk import Examples, ExampleStore
from align_ext.data.rows import Example
from align_ext.system.bounds import unknown_name

# reasoning-gym's generators and options, chosen for short prompts and answers of different forms.
BUILTIN_TASKS: dict[str, dict[str, Any]] = {
    "chain_sum": {"max_terms": 2, "max_digits": 2},
    "syllogism": {},
    "calendar_arithmetic": {"tasks": ["weekday_of_date"]},
    "time_intervals": {"task_types": ["time_seconds"]},
    "prime_factorization": {"max_value": 300},
}
_CHOICES = {"syllogism": ("Yes", "No")}
# These follow the order of a set, which Python draws anew in every process unless PYTHONHASHSEED is a number.
BY_HASH_ORDER = frozenset(
    {"isomorphic_strings", "knight_swap", "polynomial_multiplication", "ransom_note", "word_ladder"}
)
# Item i of a generator uses seed + i, so seeds with this distance share no item.
_TEST_SEED, _DEV_SEED = 1_000_000_000, 2_000_000_000
DEV = "dev"
"""The split of generated examples to choose options on; of other data they are taken off the training split."""


def generated(name: str, train: int, test: int, dev: int, seed: int, store: ExampleStore) -> dict[str, Examples]:
    """Returns the examples of a task by split: so many of each, from seeds that share none."""
    parts = {"train": (train, seed), "test": (test, _TEST_SEED), **({DEV: (dev, _DEV_SEED)} if dev else {})}
    return {split: Examples(store).add(builtin_examples(name, *part)) for split, part in parts.items()}


def check_generators(names: Sequence[str]) -> None:
    """Raises ValueError for a task that is no generator of reasoning-gym, or one that differs between processes."""
    from reasoning_gym.factory import DATASETS

    for name in names:
        if name not in BUILTIN_TASKS and name not in DATASETS:
            raise ValueError(unknown_name("task", name, [*BUILTIN_TASKS, *DATASETS]))
        if name in BY_HASH_ORDER and not os.environ.get("PYTHONHASHSEED", "").isdigit():
            raise ValueError(
                f"task {name!r}: its generator makes other examples in every process, so that several processes or a "
                "resumed run would not agree on them: begin the command with PYTHONHASHSEED=0, or leave the task out"
            )


def builtin_examples(name: str, count: int, seed: int) -> list[Example]:
    """Generates examples of one of reasoning-gym's tasks, scored by it; others than BUILTIN_TASKS by their defaults.

    Raises:
        ValueError: the generator has no defaults, or it judges answers and knows none.
    """
    import reasoning_gym

    try:
        dataset = reasoning_gym.create_dataset(name, size=max(count, 1), seed=seed, **BUILTIN_TASKS.get(name, {}))
    except AssertionError as error:
        raise ValueError(
            f"task {name!r}: its generator makes nothing by its defaults ({error}): leave it out"
        ) from None
    choices, examples = _CHOICES.get(name, ()), []
    for entry in (dataset[i] for i in range(count)):
        if entry["answer"] is None:
            raise ValueError(f"task {name!r}: its generator judges answers and knows none to learn: leave it out")
        label = choices.index(entry["answer"]) if choices else -1
        scorer = functools.partial(_generated_score, dataset, entry)
        examples.append(Example(name, entry["question"].strip(), entry["answer"], choices, label, scorer))
    return examples


def _generated_score(dataset: Any, entry: dict[str, Any], text: str) -> float:
    return dataset.score_answer(answer=text, entry=entry)
