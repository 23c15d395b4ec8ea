"""The options of the training job that are about its data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from align_ext.config import Mixing
from align_ext.data.encode import TrainedTurns
from align_ext.data.named_source import named_sources
from align_ext.data.per_task import PerTask
from align_ext.system.bounds import documented, integer_rule, integer_text, is_positive, is_whole, option
from align_ext.system.messages import shown
from align_ext.system.names import check_names

_MOST = 10**9  # the largest number of examples
_EXAMPLES = 500


def _count(text: str) -> float:
    """Reads a number of examples."""
    if not text.isdecimal() or not 1 <= int(text) <= _MOST:
        raise ValueError("a positive integer")
    return int(text)


def _weight(text: str) -> float:
    """Reads a weight."""
    try:
        weight = float(text)
    except ValueError:
        weight = 0.0
    if not is_positive(weight):
        raise ValueError("a positive number")
    return weight


def _temperature(value: Any) -> str | None:
    return None if 1 <= value <= 1e30 else "a number of at least 1"


@documented
@dataclass(frozen=True)
class DataOptions:
    """Which examples are trained on and scored, and how they are mixed."""

    data: str | list[Any] | None = option(
        None,
        "a file (.jsonl, .json, .csv, .tsv, .parquet, .txt), a folder of files or a hub dataset, with name= before it "
        "to name its task, or name.task those of its column task; several times: several sources; none: built-in tasks",
    )
    columns: tuple[str, ...] = option(
        (),
        "names that columns have in the sources, as prompt=question,completion=solution; in a file, a source may be "
        "a mapping of path, name, split, columns of its own, and rows, the most that are read",
    )
    ignore_columns: tuple[str, ...] = option((), "columns of the rows to leave out, separated by commas")
    tasks: tuple[str, ...] = option(
        (), "names of the tasks to keep, separated by commas; none: all. Without data: generators of reasoning-gym"
    )
    seq_len: int = option(
        256, "longest prompt and answer in tokens; longer examples are left out, never cut", integer_rule(maximum=10**8)
    )
    trained_turns: TrainedTurns = option(
        "all", "of a conversation learn all turns of the assistant, or the last alone, which is what is scored"
    )
    packing: bool = option(
        False,
        "put several examples of a task, which do not see each other, into each row of seq_len tokens; plain texts "
        "that are longer are cut. batch_size and per_task then count rows",
    )
    train_examples: int | tuple[str, ...] = option(
        _EXAMPLES,
        "at most so many examples of each task to train on; or of some, as news=100,chat=2000, or 300,news=100",
    )
    eval_examples: int = option(16, "at most so many held-out examples of each task to score", integer_rule(1, 10**9))
    mixing: Mixing = option(
        "equal", "shares of the tasks: proportional (to their examples), temperature, equal or round_robin"
    )
    mixing_temperature: float = option(
        2.0, "T of --mixing temperature: from proportional (1) towards equal", _temperature
    )
    mixing_weights: tuple[str, ...] = option(
        (), "by what the shares of tasks are multiplied, as news=2,chat=0.5; 1 for tasks that are not named"
    )
    per_task: int = option(
        2,
        "least number of examples of a task in a micro-batch that holds the task; half a micro-batch at most",
        integer_rule(maximum=10**6),
    )
    data_seed: int | None = option(
        None,
        "of the choice and the order of the training examples, the same for every architecture; none: the seed",
        integer_rule(0, 2**32 - 1, "in 0 .. 2**32-1", none=True),
    )

    @property
    def train_counts(self) -> PerTask:
        """The most examples of each task to train on."""
        return PerTask.read(self.train_examples, _EXAMPLES, "train_examples", "news=100,chat=2000", _count)

    @property
    def weights(self) -> PerTask:
        """By what the share of each task is multiplied."""
        return PerTask.read(self.mixing_weights, 1.0, "mixing_weights", "news=2,chat=0.5", _weight)

    def check_data(self) -> None:
        """Raises ValueError for a value that the rules of single options do not see."""
        check_names(self.tasks, "tasks")
        named_sources(self.data, self.columns)
        count = self.train_examples
        if not count or (isinstance(count, int) and not is_whole(count, 1, _MOST)):
            raise ValueError(f"train_examples must be {integer_text(count, _MOST)}, got {shown(count)}")
        self.train_counts  # noqa: B018 (which reads and checks it)
        if self.weights.named and self.mixing == "round_robin":
            raise ValueError("mixing_weights: --mixing round_robin takes the tasks in turn: take equal, or no weights")
