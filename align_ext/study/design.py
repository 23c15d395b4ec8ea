"""The design of a study, read from study.yaml: arms, seeds, axes, controls, scoring."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_args

from align_ext.config import Align, AlignLoraConfig
from align_ext.system.bounds import (
    check_options,
    documented,
    integer_rule,
    is_number,
    is_whole,
    not_negative,
    option,
    positive,
    unknown_name,
)
from align_ext.system.messages import shown
from align_ext.system.reading import read_yaml
from align_ext.training.options import TrainOptions, known_options

DESIGN = "study.yaml"
BASE = "base"  # the cell of the model without adapters
Control = Literal["shuffled_ids", "random_partition", "weight_zero", "l2"]
# Options that make the batches of all arms.
_SHARED = (
    "model", "data", "columns", "ignore_columns", "tasks", "steps", "batch_size", "accumulation", "seq_len",
    "trained_turns", "mixing", "mixing_temperature", "per_task", "mixing_weights", "packing", "train_examples",
)  # fmt: skip
# Options of `train` that a study sets itself.
_OWN = (
    "output", "overwrite", "resume", "seed", "data_seed", "log_steps", "save_steps", "eval_steps", "eval_examples",
    "dtype", "device",
)  # fmt: skip
_PATHS = {  # of the fields of Study, where study.yaml has other names
    "parameters": "equal.parameters", "scaling": "equal.scaling", "margin": "compare.margin"
}  # fmt: skip
_EXAMPLES = {  # of what stands under a key
    "train": "{steps: 100}", "arms": "{lora: {architecture: lora}}", "vary": "{lr: [1.0e-4, 3.0e-4]}",
    "equal": "{scaling: 2.0}", "score": "{test: 500}", "score.unseen": "{examples: 100}", "compare": "{with: lora}",
    "equal.parameters": "{architecture: lora, r: 8}", "seeds": "[0, 1, 2]",
}  # fmt: skip


_OF_CONTROL: Mapping[str, Mapping[str, Any]] = {"weight_zero": {"align_weight": 0.0}, "l2": {"align": "l2"}}


@documented
@dataclass(frozen=True)
class Unseen:
    """Tasks that are scored and never trained on."""

    data: str | None = option(None, "as in `train`; none: the data that is trained on")
    tasks: tuple[str, ...] = option((), "names of the tasks to keep; empty: all that are not trained on")
    examples: int = option(100, "at most so many test rows of each task", integer_rule(maximum=10**9))


@documented
@dataclass(frozen=True)
class Score:
    """What is scored in every cell."""

    test: int = option(500, "at most so many test rows of each task", integer_rule(maximum=10**9))
    dev: int = option(0, "at most so many rows off each training split, for `choose`", integer_rule(0, 10**9))
    unseen: Unseen | None = None
    generate: tuple[str, ...] = option((), "tasks whose answers are generated, too; others are scored by likelihood")
    forgetting: int = option(32, "passages of plain text whose loss is measured; 0: none", integer_rule(0, 10**6))
    probe: int = option(16, "test rows of each task on which alignment is measured", integer_rule(0, 10**6))
    decode: int = option(
        16, "tokens that are generated to time decoding, merged and not; 0: none", integer_rule(0, 10**6)
    )
    mechanism: Literal["first", "all", "none"] = option("first", "the seeds that are looked into more deeply")
    batch_size: int = option(32, "answers in a forward", integer_rule(maximum=10**6))


@dataclass(frozen=True)
class Arm:
    """One arm of a study.

    Attributes:
        name: its name in tables.
        options: the options of `train` in which it differs.
        control: what makes it a control, or None. "shuffled_ids": alignment sees the training examples' task ids in a
            random order; "random_partition": it sees tasks drawn at random; "weight_zero": its weight is 0; "l2": an L2
            penalty on the latents in its place, which pulls at them as strongly at the start.
    """

    name: str
    options: Mapping[str, Any]
    control: Control | None = None


@documented
@dataclass(frozen=True)
class Study:
    """A study; the constructor validates it."""

    name: str = option("study", "its name")
    question: str = option("", "what it asks, for the report's first line")
    train: Mapping[str, Any] = field(default_factory=dict)
    steps_per_task: int | None = option(None, "steps for each task in place of `steps`", integer_rule(none=True))
    arms: tuple[Arm, ...] = ()
    seeds: tuple[int, ...] = option((0, 1, 2), "of adapters, dropout, training rows and their order")
    vary: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    choose: tuple[str, ...] = option((), "axes of which each arm takes its best value by the dev rows")
    parameters: Mapping[str, Any] | int | None = option(None, "a number of trained parameters for all arms, or options "
                                                        "whose number it is")  # fmt: skip
    scaling: float | None = option(None, "s = alpha / r for all arms", not_negative)
    score: Score = field(default_factory=Score)
    baseline: str = option("", "the arm that the others are compared with; empty: the first")
    margin: float = option(0.02, 'the difference in accuracy below which arms are "as good as" each other', positive)

    def __post_init__(self) -> None:
        check_options(self, quoted=False, paths=_PATHS)
        if not self.arms:
            raise ValueError(f"arms is empty: name at least one, as   arms: {_EXAMPLES['arms']}")
        names = [arm.name for arm in self.arms]
        if self.baseline and self.baseline not in names:
            raise ValueError(f"compare.with: {unknown_name('baseline arm', self.baseline, names)}")
        object.__setattr__(self, "baseline", self.baseline or names[0])
        for axis in self.choose:
            if axis not in self.vary:
                raise ValueError(f"choose: {unknown_name('axis to choose', axis, self.vary)}")
        if self.choose and not self.score.dev:
            raise ValueError(f"choose={shown(list(self.choose))} needs rows to choose on: set score.dev, as dev: 200")
        for arm in self.arms:
            if arm.control == "l2" and not self.score.probe:
                raise ValueError(f"arm {shown(arm.name)}: control=l2 pulls as strongly as the alignment does on the "
                                 "probe: set score.probe, as probe: 16")  # fmt: skip
        seen: dict[str, Cell] = {}
        for cell in self.cells():
            same = seen.setdefault(repr([cell.arm, self.options_of(cell)]), cell)  # raises
            if same is not cell:
                raise ValueError(f"vary holds the same value twice: the cells {same.label} and {cell.label} are one")
        self.budget()  # raises

    def arm(self, name: str) -> Arm:
        """Returns an arm by its name."""
        return next(arm for arm in self.arms if arm.name == name)

    def cells(self) -> Iterator[Cell]:
        """Yields all cells, seed by seed, so that every arm has a result early.

        An axis align_weight does not apply to an arm that aligns nothing, or with a weight of its own.
        """
        for seed in self.seeds:
            for arm in self.arms:
                axes = {a: v for a, v in self.vary.items() if a != "align_weight" or self._varies_weight(arm)}
                for values in itertools.product(*axes.values()):
                    yield Cell(arm.name, seed, dict(zip(axes, values, strict=True)))

    def _varies_weight(self, arm: Arm) -> bool:
        return arm.control != "weight_zero" and self.align_of(arm) is not None

    def align_of(self, arm: Arm) -> Align | None:
        """Returns the alignment loss that an arm trains, or in whose place it has an L2 penalty."""
        options = {**self.train, **arm.options}
        named = {name: options[name] for name in ("architecture", "align") if name in options}
        chosen: dict[str, Any] = {name: None if value == "none" else value for name, value in named.items()}
        return AlignLoraConfig(**chosen, num_tasks=2).align

    def budget(self) -> TrainOptions | int | None:
        """Returns the number of trained parameters that all arms are matched to, or the options that have it, or None.

        Raises:
            ValueError: as in TrainOptions; the message begins with the path in study.yaml.
        """
        if not isinstance(self.parameters, Mapping):
            return self.parameters
        try:
            return TrainOptions.from_mapping(self.train, self.parameters)
        except ValueError as error:
            places = {**dict.fromkeys(self.train, "train"), **dict.fromkeys(self.parameters, "equal.parameters")}
            raise ValueError(_at(str(error), places, "equal.parameters")) from error

    def options_of(self, cell: Cell, **changed: Any) -> TrainOptions:
        """Returns the training options of a cell, with equal scaling but without matched ranks.

        Raises:
            ValueError: as in TrainOptions; the message begins with the path in study.yaml, or names the arm.
        """
        arm = self.arm(cell.arm)
        of_control = _OF_CONTROL.get(arm.control or "", {})
        options: dict[str, Any] = {**self.train, **arm.options, **cell.vary, **of_control, **changed}
        tasks, named = options.get("tasks"), _words(self.train.get("tasks"), "train.tasks")
        if isinstance(tasks, int):  # an axis of nested sets of tasks: the first so many
            if not is_whole(tasks, 1, len(named)):
                raise ValueError(
                    f"vary.tasks: {shown(tasks)} must be a number of the {len(named)} tasks in train.tasks"
                )
            options["tasks"] = named[:tasks]
        if self.steps_per_task is not None:
            options["steps"] = self.steps_per_task * len(_words(options.get("tasks"), "train.tasks"))
            if not options["steps"]:
                raise ValueError("steps_per_task needs the names of the tasks: set train.tasks")
        own = {"seed": cell.seed, "data_seed": cell.seed, "eval_examples": self.score.test, "log_steps": 1}
        try:
            result = TrainOptions.from_mapping(options, own)
            if self.scaling is not None and "lora_alpha" not in arm.options:
                rank = result.adapter["r"]
                alpha = self.scaling * (rank**0.5 if result.adapter["use_rslora"] else rank)
                result = TrainOptions.from_mapping(result.to_dict(), {"lora_alpha": alpha})
            if arm.control and result.adapter_config(num_tasks=2).align is None:
                raise ValueError(f"control={arm.control}: the arm aligns nothing to control for; add align: kl")
        except ValueError as error:
            given = {"train": self.train, f"arms.{cell.arm}": arm.options, "vary": cell.vary}
            places = {name: place for place, options in given.items() for name in options}
            raise ValueError(_at(str(error), places, f"arm {shown(cell.arm)}")) from error
        return result


def _at(message: str, places: Mapping[str, str], else_at: str) -> str:
    """Returns the message of an error in options with the path in study.yaml in front.

    Args:
        message: begins with the name of the option, or with "unknown" and its name, where it is about one option.
        places: the place in study.yaml of each option that is given.
        else_at: the place of other messages.
    """
    unknown, name = re.fullmatch(r"(unknown )?(\w*).*", message, re.DOTALL).groups()  # type: ignore[union-attr]
    if name not in places:
        return f"{else_at}: {message}"
    return f"{places[name]}.{name}: {message}" if unknown else f"{places[name]}.{message}"


@dataclass(frozen=True)
class Cell:
    """One training run of a study: an arm, a seed and a value on each axis; arm "base": the model alone."""

    arm: str
    seed: int | None
    vary: Mapping[str, Any] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """The cell in words, which is safe as part of a file's name."""
        words = [self.arm, *(f"{axis}={value}" for axis, value in self.vary.items())]
        words += [] if self.seed is None else [f"s{self.seed}"]
        return re.sub(r"[^\w=.+-]", "_", "-".join(words))


def read_study(folder: Path) -> Study:
    """Reads the design in a study's folder.

    Raises:
        ValueError: there is none, an option is unknown (the message suggests one), or a value is out of range.
    """
    file = folder / DESIGN
    if not file.is_file():
        raise ValueError(f"{shown(str(folder))} holds no {DESIGN}: `align-lora study new {folder} --like five-tasks` "
                         "writes one")  # fmt: skip
    content = read_yaml(file)
    try:
        return parse(content)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


def parse(content: Mapping[str, Any]) -> Study:
    """Makes a study of the content of study.yaml.

        study: name                 question: text               seeds: [0, 1, 2]
        train: options of `train` for all arms
        arms: {name: {options of `train` that differ, control: ...}}
        vary: {option: [values]}    choose: [options]            steps_per_task: number
        equal: {parameters: number or options, scaling: number}
        score: the options of Score, unseen: those of Unseen     compare: {with: arm, margin: number}

    Raises:
        ValueError: as in read_study.
    """
    known = ("study", "question", "seeds", "train", "steps_per_task", "arms", "vary", "choose", "equal", "score",
             "compare")  # fmt: skip
    content = _mapping(content, "the design", known)
    equal = _mapping(content.get("equal"), "equal", ("parameters", "scaling"))
    compare = _mapping(content.get("compare"), "compare", ("with", "margin"))
    score = _mapping(content.get("score"), "score", [f.name for f in fields(Score)])
    if (unseen := score.get("unseen")) is not None:
        unseen = _mapping(unseen, "score.unseen", [f.name for f in fields(Unseen)])
        unseen |= {"tasks": _words(unseen.get("tasks"), "score.unseen.tasks")}
        unseen = _checked(Unseen, unseen, "score.unseen")
    score |= {"unseen": unseen, "generate": _words(score.get("generate"), "score.generate")}
    for name, given in _mapping(content.get("arms"), "arms", None).items():
        for option_name in given if isinstance(given, Mapping) else ():
            if str(option_name).replace("-", "_") in _SHARED:
                raise ValueError(f"arm {shown(name)}: {option_name} makes the batches, which all arms share: put it "
                                 "under train, or under vary for all arms")  # fmt: skip
    options = sorted(known_options().items(), key=lambda entry: not entry[1].of_adapter)
    of_arms = ["control", *(name for name, _ in options if name not in {*_SHARED, *_OWN})]
    arms = []
    for name, given in _mapping(content.get("arms"), "arms", None).items():
        own = _train(given, f"arm {shown(name)}", of_arms)
        own.pop("control", None)
        arms.append(Arm(_arm_name(name), own, _control(given, name)))
    vary = {axis: tuple(_list(values, f"vary.{axis}")) for axis, values in _train(content.get("vary"), "vary").items()}
    seeds = tuple(_list(content.get("seeds", [0, 1, 2]), "seeds"))
    for number, seed in enumerate(seeds):
        if not is_whole(seed, 0, 2**32 - 1) or seed in seeds[:number]:
            found = f"{shown(seed)} twice" if seed in seeds[:number] else shown(seed)
            raise ValueError(f"seeds must be different integers in 0 .. 2**32-1, got {found} in {shown(list(seeds))}")
    parameters = equal.get("parameters")
    if isinstance(parameters, Mapping):
        parameters = _train(parameters, "equal.parameters")
    elif parameters is not None and not is_whole(parameters, 1, 2**62):
        raise ValueError(
            "equal.parameters must be a number of parameters or options of an architecture, "
            f"{_example('equal.parameters')}, got {shown(parameters)}"
        )
    margin = compare.get("margin", 0.02)
    return Study(
        name=str(content.get("study") or "study"), question=str(content.get("question") or ""),
        train=_train(content.get("train"), "train"), steps_per_task=content.get("steps_per_task"), arms=tuple(arms),
        seeds=seeds, vary=vary, choose=_words(content.get("choose"), "choose"), parameters=parameters,
        scaling=equal.get("scaling"), score=_checked(Score, score, "score"), baseline=str(compare.get("with") or ""),
        margin=float(margin) if is_number(margin) else margin,
    )  # fmt: skip


def _checked(kind: Any, values: Mapping[str, Any], path: str) -> Any:
    made = kind(**values)
    check_options(made, quoted=False, paths={entry.name: f"{path}.{entry.name}" for entry in fields(kind)})
    return made


def _mapping(value: Any, what: str, known: Any) -> dict[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise ValueError(f"{what} must be a mapping of names to values, {_example(what)}, got {shown(value)}")
    for name in value:
        if known is not None and name not in known:
            raise ValueError(unknown_name(f"option of {what}", str(name), known))
    return dict(value)


def _list(value: Any, what: str) -> list[Any]:
    if not isinstance(value, list) or not value:
        raise ValueError(f"{what} must be a list of values, {_example(what)}, got {shown(value)}")
    return value


def _example(what: str) -> str:
    other = "{architecture: lora}" if what.startswith("arm ") else "[VALUE, VALUE]"
    return f"as {_EXAMPLES.get(what, other)}"


def _words(value: Any, what: str) -> tuple[str, ...]:
    if isinstance(value, str):
        return tuple(word.strip() for word in value.split(",") if word.strip())
    if not isinstance(value, (list, tuple, type(None))):
        raise ValueError(f"{what} must be a list of names, got {shown(value)}")
    return tuple(str(word) for word in value or ())


def _train(value: Any, what: str, known: Sequence[str] = ()) -> dict[str, Any]:
    """Returns options of `train`, with underscores; known: those that may be given, if not all."""
    given = {str(name).replace("-", "_"): x for name, x in _mapping(value, what, None).items()}
    known = known or [name for name in known_options() if name not in _OWN]
    for name in given:
        if name in _OWN:
            raise ValueError(f"{what}: {name} is the study's own, the same for all cells: leave it out (seeds, score)")
        if name not in known:
            raise ValueError(f"{what}: {unknown_name('option', name, known)}")
    return given


def _arm_name(name: Any) -> str:
    if not re.fullmatch(r"[\w.+-]{1,40}", str(name)) or str(name) == BASE:
        raise ValueError(f"the arm's name {shown(name)} must be letters, digits, _ . + and -, and not {BASE!r}")
    return str(name)


def _control(given: Any, name: Any) -> Control | None:
    control = given.get("control") if isinstance(given, Mapping) else None
    if control not in (None, "none", *get_args(Control)):
        raise ValueError(f"arm {shown(name)}: {unknown_name('control', str(control), get_args(Control))}")
    return None if control == "none" else control
