"""The work of `align-lora generate`: answers prompts one by one, or holds a conversation."""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import TextStreamer

from align_ext.alignment.context import set_task
from align_ext.base_model.checks import check_base, model_errors
from align_ext.cli.convert import read_prompts
from align_ext.cli.scored_run import as_stored, base_note, load_run_base
from align_ext.data.conversation import Turn
from align_ext.data.encode import prompt_tokens
from align_ext.evaluation.evaluate import plain_generation
from align_ext.evaluation.scored_model import ModelRequest
from align_ext.io.adapter_folder import AdapterFolder, task_list, task_number
from align_ext.system.ending import received
from align_ext.system.memory import enough_memory
from align_ext.system.messages import shown, shown_path
from align_ext.system.reading import check_folder, exists
from align_ext.system.terminal import print_line, show_status
from align_ext.training.options import TrainOptions

_MOST_TOKENS = 10**6
_HELP = "/reset forgets the turns before, {}/quit ends"


@dataclass(frozen=True)
class AnswerRequest(ModelRequest):
    """The options of `align-lora generate`: the model that answers, and what it is asked."""

    prompt: str | None = None
    file: str | None = None
    base: bool = False
    max_new_tokens: int = 256
    temperature: float = 0.0
    seed: int = 0
    task: str | None = None
    run: TrainOptions | None = None  # of the adapter, where its base was quantised

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.prompt is not None and self.file is not None:
            raise ValueError("--prompt and --file exclude each other: give one of them")
        if self.prompt is not None and not self.prompt.strip():
            raise ValueError("--prompt is empty: write what to answer, or leave it out for a conversation")
        if not 1 <= self.max_new_tokens <= _MOST_TOKENS:
            raise ValueError(f"max_new_tokens must be in 1 .. {_MOST_TOKENS}, got {self.max_new_tokens}")
        if not 0 <= self.temperature <= 100:
            raise ValueError(f"temperature must be in 0 .. 100, got {self.temperature}")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed must be in 0 .. 2**32-1, got {self.seed}")
        if self.adapter is None and (self.base or self.task is not None):
            raise ValueError("--base and --task go with an adapter, and this folder holds a whole model")

    @classmethod
    def of(cls, folder: str, **options: Any) -> AnswerRequest:
        """Makes a request of the command's arguments.

        Args:
            folder: of a run, of an adapter or of a model.
            **options: the other fields.

        Raises:
            ValueError: an option cannot be used.
        """
        check_folder(folder)
        path = Path(folder).expanduser()
        if exists(path / "adapter"):
            return cls(adapter=str(path / "adapter"), **options | as_stored(path, options))
        if exists(path / "config.json"):
            if options["model"] is not None:
                raise ValueError(f"--model names an adapter's base, and {shown_path(path)} holds a whole model")
            return cls(**options | {"model": str(path)})
        return cls(adapter=str(path), **options)

    def load_base(self) -> tuple[Any, Any]:
        """Loads the base model, and the tokenizer; that of a run as it was stored in training."""
        if self.run is None:
            return super().load_base()
        return load_run_base(replace(self, model=self.model or self.run.model), self.run)


@dataclass
class Speaker:
    """A model that answers.

    Attributes:
        name: "base" or "adapter".
        model: in eval mode.
        tokenizer: its tokenizer.
        request: the options.
        turns: the conversation so far.
    """

    name: str
    model: Any
    tokenizer: Any
    request: AnswerRequest
    turns: list[Turn] = field(default_factory=list)

    @property
    def remembers(self) -> bool:
        """Whether it can hold a conversation: the tokenizer has a chat template."""
        return bool(getattr(self.tokenizer, "chat_template", None))

    def answer(self, prompt: str, number: int = 0, *, stream: bool = False) -> str:
        """Answers a prompt, and remembers both as turns.

        Args:
            prompt: the text of the user.
            number: of the prompt; with the seed it decides the random numbers.
            stream: whether to print the text as it comes.

        Raises:
            ValueError: the prompt has no tokens or too many, or the model cannot run; nothing is remembered.
        """
        turns: list[Turn] = [*self.turns, ("user", prompt)]
        tokens = prompt_tokens(self.tokenizer, tuple(turns) if self.remembers else prompt)
        ids = torch.tensor([tokens], device=self.model.device)
        torch.manual_seed(self.request.seed + number)
        streamer = TextStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True) if stream else None
        with model_errors(self.model, "generate answers"):
            output = self.model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), streamer=streamer,
                generation_config=self._config(len(tokens)),
            )  # fmt: skip
        text = str(self.tokenizer.decode(output[0, len(tokens) :], skip_special_tokens=True)).strip()
        if self.remembers:
            self.turns = [*turns, ("assistant", text)]
        return text

    def _config(self, prompt: int) -> Any:
        config = copy.deepcopy(plain_generation(self.model, self.tokenizer))
        limit = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        room = limit - prompt if isinstance(limit, int) else self.request.max_new_tokens
        if room < 1:
            cure = "/reset forgets the turns before" if self.turns else "write a shorter one"
            raise ValueError(f"the prompt has {prompt} tokens, and the model has room for {limit}: {cure}")
        config.max_new_tokens = min(self.request.max_new_tokens, room)
        if self.request.temperature > 0:
            config.update(do_sample=True, temperature=self.request.temperature, top_k=0, top_p=1.0)
        return config


@enough_memory("take a narrower --dtype, leave out --base, or lower --max-new-tokens")
def run(request: AnswerRequest, console: Console) -> None:
    """Answers the prompts of a request, or holds a conversation.

    Raises:
        ValueError: an option cannot be used, or a model or a prompt.
    """
    asked = [] if request.prompt is None else [request.prompt]
    prompts = asked if request.file is None else read_prompts(request.file)
    stored = None if request.adapter is None else AdapterFolder.read(request.adapter)
    if stored is not None and task_number(stored, request.task) is None and stored.config.row.by_task:
        kind = stored.config.architecture
        raise ValueError(f"a {kind} answers as one of its tasks: name it by --task ({task_list(stored)})")
    with show_status(console, "loading the model"):
        speakers = _load(request)
    if request.adapter is not None and request.run is None and (note := base_note(request.adapter)):
        print_line(console, note)
    with torch.inference_mode():
        if not prompts:
            _talk(speakers, stored, console)
        for number, prompt in enumerate(prompts):
            _answer(speakers, prompt, number, console, alone=len(prompts) == 1)


def _load(request: AnswerRequest) -> list[Speaker]:
    """Loads the model that answers, and before it the base alone if it is asked for."""
    model, tokenizer = request.load(request.task)
    name = "model" if request.adapter is None else "adapter"
    speakers = [Speaker(name, model, tokenizer, request)]
    if request.base:
        base, tokenizer = request.load_base()
        check_base(base, tokenizer)
        speakers.insert(0, Speaker("base", base.eval(), tokenizer, request))
    return speakers


def _answer(speakers: list[Speaker], prompt: str, number: int, console: Console, *, alone: bool) -> None:
    """Prints the answers to one prompt: one as it comes, or two beside each other."""
    if not alone:
        print_line(console, f"> {prompt}")
    if len(speakers) == 1:
        speakers[0].answer(prompt, number, stream=True)
    else:
        table = Table(*(speaker.name for speaker in speakers), show_lines=True, expand=True)
        table.add_row(*(speaker.answer(prompt, number) for speaker in speakers))
        console.print(table)
    for speaker in speakers:
        speaker.turns.clear()


def _talk(speakers: list[Speaker], stored: AdapterFolder | None, console: Console) -> None:
    """Reads lines and answers each until the end of the input, /quit or Ctrl-C."""
    several = stored is not None and stored.config.row.by_task
    if sys.stdin.isatty():
        print_line(console, _HELP.format("/task NAME changes the task, " if several else ""))
        if not speakers[0].remembers:
            print_line(console, "the tokenizer has no chat template: each line is a prompt of its own")
    try:
        for number, line in enumerate(_lines()):
            command, _, rest = line.partition(" ")
            if command == "/quit":
                return
            try:
                if command == "/reset":
                    for speaker in speakers:
                        speaker.turns.clear()
                elif command == "/task":
                    _change_task(speakers[-1], stored, rest.strip())
                elif command.startswith("/"):
                    print_line(console, f"unknown command {shown(command)}: /reset, /task NAME or /quit")
                else:
                    for speaker in speakers:
                        if len(speakers) > 1:
                            print_line(console, f"{speaker.name}:")
                        speaker.answer(line, number, stream=True)
            except ValueError as error:
                print_line(console, str(error))
    except KeyboardInterrupt:
        print_line(console, "")
        if received():  # SIGTERM or SIGHUP, which end a command with their own code
            raise


def _lines() -> Iterator[str]:
    """Yields the lines of standard input that are not empty; on a terminal with a prompt, history and editing."""
    terminal = sys.stdin.isatty()
    if terminal:
        with suppress(ImportError):
            import readline  # noqa: F401
    with suppress(EOFError):
        while True:
            if line := input("> " if terminal else "").strip():
                yield line
    if terminal:
        print()


def _change_task(speaker: Speaker, stored: AdapterFolder | None, task: str) -> None:
    if stored is None or not stored.config.row.by_task or speaker.request.merge:
        raise ValueError("/task changes the task of an adapter by task that is not merged, and this is none")
    if not task:
        raise ValueError(f"/task needs a task: {task_list(stored)}")
    set_task(speaker.model, task_number(stored, task))
    speaker.turns.clear()
    speaker.request = replace(speaker.request, task=task)
