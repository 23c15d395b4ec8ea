"""A number for each task, given as one for all, by name, or both."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from align_ext.data.named_source import pairs_of
from align_ext.system.bounds import unknown_name
from align_ext.system.messages import shown


@dataclass(frozen=True)
class PerTask:
    """A number for each task.

    Attributes:
        others: the number of tasks without a name of their own here.
        named: the numbers of tasks by name.
    """

    others: float
    named: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def read(
        cls, given: float | Iterable[str], others: float, option: str, example: str, allowed: Callable[[str], float]
    ) -> PerTask:
        """Reads the value of an option.

        Args:
            given: a number for all tasks, or texts "name=number", among them at most one "number" for the others.
            others: the number of tasks that are not named.
            option: the option's name for messages.
            example: an example of its texts.
            allowed: makes a number of a text; a ValueError says what the text must be.

        Raises:
            ValueError: it is something else, or a name is there twice.
        """
        if isinstance(given, (int, float)):
            return cls(given)
        texts = list(given)
        plain = [text for text in texts if "=" not in text]
        if len(plain) > 1:
            raise ValueError(f"{option} must be one number for all tasks, or one a task, as {example}")
        numbers = {}
        for name, text in pairs_of([t for t in texts if "=" in t], option, example, last=True).items():
            numbers[name] = _number(option, text, allowed)
        return cls(_number(option, plain[0], allowed) if plain else others, numbers)

    def of(self, task: str) -> float:
        """Returns the number of a task."""
        return self.named.get(task, self.others)

    def check(self, tasks: Iterable[str], option: str) -> None:
        """Raises ValueError for a name that is none of the tasks."""
        known = list(tasks)
        for name in self.named:
            if name not in known:
                raise ValueError(f"{option}: {unknown_name('task', name, known)}")


def _number(option: str, text: str, allowed: Callable[[str], float]) -> float:
    try:
        return allowed(text)
    except ValueError as error:
        raise ValueError(f"{option}: {shown(text)} must be {error}") from error
