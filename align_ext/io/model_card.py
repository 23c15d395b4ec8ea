"""The model card of an adapter's folder, README.md: what it is, how to load it, and the block that the hub reads."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml
from torch import nn

from align_ext.base_model.fingerprint import base_name
from align_ext.base_model.task_type import transformers_model
from align_ext.config import AlignLoraConfig
from align_ext.io.peft_format import PEFT_CONFIG
from align_ext.system.reading import exists, read_text
from align_ext.system.writing import atomic_file

CARD = "README.md"
_SEAL, _MAXIMUM = "<!-- written by align_ext, ", 1 << 20
_BY_PEFT = """
from peft import PeftModel  # in the place of align_ext
model = PeftModel.from_pretrained(base, "FOLDER")
"""


@dataclass(frozen=True)
class CardFacts:
    """What a card says.

    Attributes:
        base: the base model's hub id or path, if it is known.
        base_class: the class of transformers that loads the base; None: it is no model of transformers.
        architecture: the adapters' architecture.
        rank: their rank.
        parameters: the number of trained parameters.
        tasks: the names of the tasks, if they are known.
        options: the options that differ from their defaults.
        training: how it was trained: the end of a sentence, and further paragraphs.
        taken_by: what takes the options.
    """

    base: str | None
    base_class: str | None
    architecture: str
    rank: int
    parameters: int
    tasks: Sequence[str]
    options: Mapping[str, Any]
    training: str
    taken_by: str

    @classmethod
    def of(cls, model: nn.Module, config: AlignLoraConfig, parameters: int, tasks: Sequence[str]) -> CardFacts:
        """Returns what is known of a model's adapters without their training."""
        inner, defaults = transformers_model(model), AlignLoraConfig().to_dict()
        return cls(
            base_name(model), None if inner is None else type(inner).__name__, config.architecture, config.r,
            parameters, tasks, {name: value for name, value in config.to_dict().items() if value != defaults[name]},
            f"written by align_ext {version('align_ext')}.", "`AlignLoraConfig`",
        )  # fmt: skip

    @property
    def hub_id(self) -> str | None:
        """The base's hub id; None if it is a folder, which means nothing to others."""
        return None if self.base is None or Path(self.base).is_absolute() else self.base

    def metadata(self, *, peft: bool) -> dict[str, Any]:
        """Returns the block that the hub and PEFT read; the licence is the user's to add.

        Args:
            peft: whether the folder has PEFT's files.
        """
        tags = [f"base_model:adapter:{self.hub_id}"] * (self.hub_id is not None)
        tags += ["lora", "multi-task", "align-lora", self.architecture]
        tags += ["transformers"] * (self.base_class is not None)
        about = {"library_name": "peft" if peft else "align_ext", "tags": list(dict.fromkeys(tags))}
        return about if self.hub_id is None else {"base_model": self.hub_id} | about

    def text(self, *, peft: bool) -> str:
        """Returns the card, sealed, so that has_own_card knows it again."""
        count = f" for {len(self.tasks)} {'task' if len(self.tasks) == 1 else 'tasks'}" * bool(self.tasks)
        name = "an unnamed model" if self.base is None else self.hub_id or Path(self.base).name
        base = "base = ...  # the model that it was trained on"
        if self.base is not None and self.base_class is not None:
            base = (
                f'from transformers import {self.base_class}\nbase = {self.base_class}.from_pretrained("{name}")'
                + "  # its folder" * (self.hub_id is None)
            )
        text = f"""---
{_yaml(self.metadata(peft=peft))}---

# Adapter of {name}{count}

{"An" if self.architecture[0] in "aeiou" else "A"} {self.architecture} adapter of rank {self.rank} \
({self.parameters:,} trained parameters){f" for the tasks {', '.join(self.tasks)}" * bool(self.tasks)}, {self.training}

## Use

```python
{base}

from align_ext import load_adapter
model = load_adapter(base, "FOLDER")
{_BY_PEFT * peft}```

## Options

What is not named has its default; {self.taken_by} takes these.

```yaml
{_yaml(self.options)}```
"""
        return _sealed(text)


def has_own_card(folder: str | os.PathLike[str]) -> bool:
    """Whether a folder holds a README.md that is not, letter for letter, a card written here: it is the user's."""
    file = Path(folder) / CARD
    if not os.path.lexists(file):
        return False
    try:
        text = read_text(file, _MAXIMUM)
    except ValueError:
        return True
    return text != _sealed(text.rpartition(_SEAL)[0])


def update_card(folder: str | os.PathLike[str], facts: CardFacts) -> None:
    """Writes the card of an adapter's folder, or only its block for the hub if the user has a README.md there."""
    file, peft = Path(folder) / CARD, exists(Path(folder) / PEFT_CONFIG)
    with atomic_file(file) as new:
        if not has_own_card(folder):
            new.write_text(facts.text(peft=peft), encoding="utf-8")
            return
        from huggingface_hub import ModelCard  # imported here, since saving needs torch alone

        card = ModelCard.load(file)
        about = facts.metadata(peft=peft)
        tags = list(dict.fromkeys([*(card.data.tags or []), *about.pop("tags")]))
        for name, value in (about | {"tags": tags}).items():
            card.data[name] = value
        card.save(new)


def _yaml(content: Mapping[str, Any]) -> str:
    return yaml.safe_dump(dict(content), sort_keys=False, allow_unicode=True)


def _sealed(text: str) -> str:
    return f"{text}{_SEAL}{hashlib.sha256(text.encode()).hexdigest()[:16]}; edited, it is never replaced -->\n"
