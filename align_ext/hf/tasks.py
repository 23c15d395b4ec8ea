"""The tasks: five built-in ones, local JSON lines or a hub dataset; their examples, splits and tokens."""

from __future__ import annotations

import functools
import gzip
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from huggingface_hub.errors import EntryNotFoundError

from align_ext.config import unknown_name

# reasoning-gym's generators and options: short prompts, and an answer of another form in each.
BUILTIN_TASKS: dict[str, dict[str, Any]] = {
    "chain_sum": {"max_terms": 2, "max_digits": 2},
    "syllogism": {},
    "calendar_arithmetic": {"tasks": ["weekday_of_date"]},
    "time_intervals": {"task_types": ["time_seconds"]},
    "prime_factorization": {"max_value": 300},
}
_CHOICES = {"syllogism": ("Yes", "No")}
# Item i of a generator comes from seed + i, so that seeds this far apart never share an item.
_TEST_SEED = 1_000_000_000

_PROMPTS = ("prompt", "instruction", "question")
_ANSWERS = ("completion", "output", "answer")
_SPLIT = re.compile(r"(?:^|[._-])(?:(train)|test|validation|valid|dev|eval)(?=[._-]|$)")
_TEST_SPLITS = ("test", "validation", "valid", "dev", "eval")


@dataclass(frozen=True)
class Example:
    """One prompt with its answer.

    Attributes:
        task: the task's name.
        prompt: what the model is asked.
        answer: what it learns to say.
        choices: the answers it may choose from, all in the form of `answer`; empty for free text.
        label: the index of `answer` in `choices`, -1 for free text.
        scorer: of a generated text, in [0, 1]; None: equality with `answer`.
    """

    task: str
    prompt: str
    answer: str
    choices: tuple[str, ...] = ()
    label: int = -1
    scorer: Callable[[str], float] | None = field(default=None, repr=False, compare=False)

    def score(self, text: str) -> float:
        """Scores a generated text; whatever a scorer cannot read is wrong."""
        if self.scorer is None:
            return float(text.strip() == self.answer.strip())
        try:
            return float(self.scorer(text.strip()))
        except Exception:  # generated text is arbitrary, and a foreign scorer may stumble over it in any way
            return 0.0


@dataclass(frozen=True)
class TaskData:
    """Examples to train on and examples to score on; a task's id is its place in `names`."""

    names: tuple[str, ...]
    train: list[Example]
    test: list[Example]
    left_out: int = 0

    def ids(self) -> dict[str, int]:
        """Each task's id by its name."""
        return {name: i for i, name in enumerate(self.names)}


# task -> split ("train", "test" or "", undivided) -> examples, in the order in which they are to be taken
Pools = dict[str, dict[str, list[Example]]]


def read_tasks(data: str | None, tasks: Sequence[str] = (), *, count: int = 500, seed: int = 0) -> Pools:
    """Reads the examples of several tasks.

    Args:
        data: a .jsonl or .jsonl.gz file, a folder of such files, or the id of a hub dataset ("owner/name", or
            "owner/name:configuration"); None: the built-in tasks. A row needs a task, a prompt (or instruction, or
            question) and a completion (or output, or answer), and may have choices and label. Files of a folder that
            are named after a split (x.train.jsonl, x.test.jsonl) are kept apart.
        tasks: names of the tasks to keep, all if empty.
        count: how many examples to generate for a split of a built-in task.
        seed: of the generators (to train on; the test is the same for every seed) and of the order.

    Raises:
        ValueError: no such data, a missing column (the message names those found), no examples, or an unknown task.
    """
    if data is None:
        chosen, seeds = _chosen(tuple(BUILTIN_TASKS), tasks), {"train": seed, "test": _TEST_SEED}
        return {name: {split: builtin_examples(name, count, at) for split, at in seeds.items()} for name in chosen}
    source = Path(data).expanduser()
    if source.exists():
        splits = _local_splits(source)
    elif re.fullmatch(r"[\w-][\w.-]*/[\w.-]+(:[\w.-]+)?", data) and not data.endswith((".jsonl", ".gz", ".json")):
        splits = _hub_splits(data)
    else:
        raise ValueError(f"there is no data file or folder {data!r}")
    found = sorted({example.task for examples in splits.values() for example in examples})
    if not found:
        raise ValueError(f"{data!r} holds no examples")
    return {
        name: {split: _shuffled([x for x in examples if x.task == name], seed) for split, examples in splits.items()}
        for name in _chosen(found, tasks)
    }


def select(
    pools: Pools, train_per_task: int, test_per_task: int, fits: Callable[[Example], bool] = lambda _: True
) -> TaskData:
    """Takes the first fitting examples of each task; what is tested is never trained on.

    Args:
        pools: as read_tasks gives them; an undivided pool is tested on its first examples and trained on the others.
        train_per_task: at most so many examples of each task to train on.
        test_per_task: at most so many of each to score on.
        fits: which examples can be used; the others are counted in left_out.

    Raises:
        ValueError: a task has nothing to train or to score on.
    """
    result, left_out = TaskData(tuple(pools), [], []), 0
    for name, splits in pools.items():
        undivided = splits.get("", [])
        tested, long_tests = _take(splits.get("test") or undivided, test_per_task, fits, name, "score")
        prompts = {example.prompt for example in tested}
        others = [example for example in splits.get("train") or undivided if example.prompt not in prompts]
        trained, long_ones = _take(others, train_per_task, fits, name, "train")
        left_out += long_tests + long_ones
        result.train.extend(trained)
        result.test.extend(tested)
    return replace(result, left_out=left_out)


def scored_examples(pools: Pools, most: int, fits: Callable[[Example], bool], *, undivided: bool) -> TaskData:
    """Takes the first fitting examples of each task's test split.

    Args:
        pools: as read_tasks gives them.
        most: of each task.
        fits: which examples can be used; the others are counted in left_out.
        undivided: score also what is in no split.

    Raises:
        ValueError: a task has nothing to score on.
    """
    result, left_out = TaskData(tuple(pools), [], []), 0
    for name, splits in pools.items():
        pool = splits.get("test") or (splits.get("", []) if undivided else [])
        if not pool:
            raise ValueError(f"the task {name!r} has no test split: name a file of examples to score on with --data")
        tested, too_long = _take(pool, most, fits, name, "score")
        result.test.extend(tested)
        left_out += too_long
    return replace(result, left_out=left_out)


def _take(
    pool: Iterable[Example], most: int, fits: Callable[[Example], bool], name: str, purpose: str
) -> tuple[list[Example], int]:
    """The first fitting examples of a pool, and how many before them did not fit."""
    taken: list[Example] = []
    too_long = 0
    for example in pool:
        if len(taken) == most:
            break
        if fits(example):
            taken.append(example)
        else:
            too_long += 1
    if not taken:
        why = f": all {too_long} are too long (seq_len)" if too_long else ""
        raise ValueError(f"the task {name!r} has no examples to {purpose} on{why}")
    return taken, too_long


def builtin_examples(name: str, count: int, seed: int) -> list[Example]:
    """Generates examples of one built-in task, scored by reasoning-gym."""
    import reasoning_gym

    dataset = reasoning_gym.create_dataset(name, size=count, seed=seed, **BUILTIN_TASKS[name])
    choices, examples = _CHOICES.get(name, ()), []
    for entry in (dataset[i] for i in range(count)):
        label = choices.index(entry["answer"]) if choices else -1
        scorer = functools.partial(_generated_score, dataset, entry)
        examples.append(Example(name, entry["question"].strip(), entry["answer"], choices, label, scorer))
    return examples


def example_of(row: dict[str, Any], where: str) -> Example:
    """Reads one row of a file or dataset; `where` opens the message of a ValueError."""

    def first(columns: tuple[str, ...]) -> str:
        present = next((column for column in columns if row.get(column) not in (None, "")), None)
        if present is None:
            found = ", ".join(str(c) for c in row if row[c] not in (None, "")) or "none"
            raise ValueError(f"{where}: no column {' or '.join(columns)}; found {found}")
        return present

    task, prompt, answer = (str(row[first(columns)]) for columns in (("task",), _PROMPTS, _ANSWERS))
    label = row.get("label")
    texts = [str(choice) for choice in row.get("choices") or ()]
    label = label if isinstance(label, int) and 0 <= label < len(texts) else -1
    if texts and not row.get("instruction") and not row.get("prompt"):
        prompt = "\n".join([prompt, *(f"- {text}" for text in texts)])
    choices = _answer_choices(answer, texts, label)
    final = str(row.get("answer") or answer)
    scorer = None if choices else functools.partial(final_answer_score, final)
    return Example(task, prompt, answer, choices, label if choices else -1, scorer)


def final_answer_score(gold: str, text: str) -> float:
    """1 if a generated text ends in the gold answer ("... The answer is X."), as a number or literally, else 0."""
    said = re.split(r"(?i)\bthe (?:correct )?answer is\b", text)[-1].strip().rstrip(".").strip()
    gold = gold.strip().rstrip(".").strip()
    try:
        return float(float(said.replace(",", "").lstrip("$")) == float(gold.replace(",", "").lstrip("$")))
    except ValueError:
        return float(said.casefold() == gold.casefold())


def encode(tokenizer: Any, prompt: str, answer: str) -> tuple[list[int], list[int]]:
    """Tokenises a prompt, through the chat template if there is one, and its answer with the end token."""
    if getattr(tokenizer, "chat_template", None):
        turn = [{"role": "user", "content": prompt}]
        text = tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
        prompt_ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    else:
        prompt_ids = tokenizer(f"{prompt}\n")["input_ids"]
    # Apart from the prompt: so training, scoring and generation see the same tokens, whatever the tokenizer merges.
    answer_ids = tokenizer(answer, add_special_tokens=False)["input_ids"]
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    return list(prompt_ids), list(answer_ids) + end


def fits(tokenizer: Any, example: Example, max_tokens: int) -> bool:
    """Whether the prompt and each possible answer are at most so many tokens; nothing is ever cut."""
    answers = (example.answer, *example.choices)
    return all(sum(map(len, encode(tokenizer, example.prompt, answer))) <= max_tokens for answer in answers)


def features(tokenizer: Any, examples: Iterable[Example], ids: dict[str, int]) -> list[dict[str, Any]]:
    """Features for TaskCollator: tokens, labels on the answer alone (-100 elsewhere), and the task's id."""
    rows = []
    for example in examples:
        prompt, answer = encode(tokenizer, example.prompt, example.answer)
        rows.append(
            {
                "input_ids": prompt + answer,
                "attention_mask": [1] * len(prompt + answer),
                "labels": [-100] * len(prompt) + answer,
                "task_ids": ids[example.task],
            }
        )
    return rows


def _generated_score(dataset: Any, entry: dict[str, Any], text: str) -> float:
    return dataset.score_answer(answer=text, entry=entry)


def _chosen(found: Sequence[str], wanted: Sequence[str]) -> tuple[str, ...]:
    for name in wanted:
        if name not in found:
            raise ValueError(unknown_name("task", name, found))
    return tuple(name for name in found if not wanted or name in wanted)


def _answer_choices(answer: str, texts: list[str], label: int) -> tuple[str, ...]:
    """Every choice in the form that the gold answer has: its text, or its number as in "... is answer3"; or none."""
    if label < 0:
        return ()
    number = str(label + 1)
    if answer.endswith(texts[label]):
        prefix = answer.removesuffix(texts[label])
        return tuple(prefix + text for text in texts)
    if re.search(r"\d+$", answer) and re.search(r"\d+$", answer)[0] == number:  # type: ignore[index]
        return tuple(answer.removesuffix(number) + str(i + 1) for i in range(len(texts)))
    return ()


def _local_splits(source: Path) -> dict[str, list[Example]]:
    """The rows of a file or folder by split: "train", "test", or "" where no file name says which."""
    files = [source] if source.is_file() else sorted(p for p in source.iterdir() if _is_rows(p))
    if not files or not all(_is_rows(file) for file in files):
        raise ValueError(f"{str(source)!r} is no .jsonl or .jsonl.gz file" + (" or holds none" if not files else ""))
    splits: dict[str, list[Example]] = {}
    for file in files:
        found = _SPLIT.search(file.name)
        split = "" if found is None or source.is_file() else "train" if found[1] else "test"
        splits.setdefault(split, []).extend(example_of(row, where) for where, row in _rows(file))
    return splits


def _is_rows(path: Path) -> bool:
    return path.name.endswith((".jsonl", ".jsonl.gz")) and path.is_file()


def _rows(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each row of a file with the words that say where it stands."""
    number = 0
    try:
        with gzip.open(file, "rt", encoding="utf-8") if file.suffix == ".gz" else file.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    row = json.loads(line)
                    if not isinstance(row, dict):
                        raise ValueError("not a JSON object")
                    yield f"{file.name}, line {number}", row
    except (ValueError, OSError, EOFError) as error:  # broken JSON, text or compression
        raise ValueError(f"{file.name}, line {number}: cannot be read ({error})") from error


def _hub_splits(name: str) -> dict[str, list[Example]]:
    """The rows of a hub dataset (or of a copy in the local cache), through the datasets package."""
    import datasets

    from align_ext.hf.models import ask_hub

    repository, _, configuration = name.partition(":")
    cached = Path(datasets.config.HF_DATASETS_CACHE, repository.replace("/", "___")).is_dir()
    # Asked first, because load_dataset retries for half a minute on a dead network.
    error = None if cached else ask_hub(repository, "README.md", "dataset")
    if error is None or isinstance(error, EntryNotFoundError):
        try:
            loaded = datasets.load_dataset(repository, configuration or None)
        except Exception as failure:  # connection, configuration, format: datasets has no common class for them
            error = failure
        else:
            return _named_splits(name, loaded)
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    raise ValueError(f"there is no data file or folder {name!r}, and the hub gives no such dataset: {reason}")


def _named_splits(name: str, loaded: Any) -> dict[str, list[Example]]:
    """The rows of a DatasetDict: its train split, and the first split to test on that it has."""
    test = next((split for split in _TEST_SPLITS if split in loaded), None)
    parts = {"train" if test else "": "train", **({"test": test} if test else {})}
    if "train" not in loaded:
        raise ValueError(f"the dataset {name!r} has no split train (it has {', '.join(loaded)})")
    return {
        split: [example_of(row, f"{name}, {part}, row {i}") for i, row in enumerate(loaded[part])]
        for split, part in parts.items()
    }


def _shuffled(examples: list[Example], seed: int) -> list[Example]:
    """An order that depends on the examples and the seed alone, not on the order of files or rows."""
    return sorted(examples, key=lambda x: hashlib.sha256(f"{seed}\0{x.prompt}\0{x.answer}".encode()).digest())
