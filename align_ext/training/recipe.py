"""The training job: it loads, scores, trains, saves, scores again, and verifies the saved adapter."""

import hashlib
import itertools
import json
import time
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.progress import Progress

from align_ext.adapters.adapted_block import adapted_layers
from align_ext.base_model.checks import check_base
from align_ext.base_model.default_targets import with_targets
from align_ext.base_model.dtypes import best_dtype, resolve_dtype, usable_device
from align_ext.base_model.fingerprint import base_name
from align_ext.base_model.select_layers import all_linear, linear_layers, name_matches
from align_ext.base_model.sharded import shard_ranks
from align_ext.config import AUTO, AlignLoraConfig
from align_ext.data.encode import check_conversations, token_rows
from align_ext.data.packing import check_packing
from align_ext.evaluation.evaluate import alignment, score_together
from align_ext.evaluation.rows import ROWS, RowScore, TaskScore, task_scores, write_rows
from align_ext.io.adapter_folder import AdapterFolder, checked_task_names
from align_ext.io.save_adapter import save_adapter
from align_ext.model.load_adapter import load_adapter
from align_ext.model.replace import adapter_report, replace_linear_with_align_lora
from align_ext.system import processes
from align_ext.system.bounds import unknown_name
from align_ext.system.memory import enough_memory
from align_ext.system.messages import shown
from align_ext.system.names import Matcher, shortest_ends
from align_ext.system.terminal import print_line, progress_bars, show_status
from align_ext.system.versions import versions
from align_ext.system.writing import atomic_file, check_space
from align_ext.training.allocates_ranks import check_ranks
from align_ext.training.base import load_job_base
from align_ext.training.cost import describe_adapters, memory_advice, optimizer_state
from align_ext.training.fit import argument_fields, fit, training_arguments
from align_ext.training.job import Job
from align_ext.training.model_card import check_hub, write_card
from align_ext.training.options import TrainOptions
from align_ext.training.record import measure_adapters, shown_answers
from align_ext.training.report import summarise
from align_ext.training.rows import choose, encoded_rows, mixing_note, read_pools, sampler_of, train_rows
from align_ext.training.run_folder import RunFolder
from align_ext.training.trial import try_arguments
from align_ext.training.verify import verify

_WITHOUT_WARMUP = ("constant", "reduce_lr_on_plateau", "greedy")  # schedules that begin at the peak


@dataclass(frozen=True)
class Scores:
    """Scores of the model: of each row, of each task, the alignment loss (see `alignment`), and its adapters' probe."""

    rows: list[RowScore]
    tasks: dict[str, TaskScore]
    align: float | None
    adapters: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Returns all but the rows, JSON-ready."""
        tasks = {task: asdict(score) for task, score in self.tasks.items()}
        return {"tasks": tasks, "align": self.align, "adapters": self.adapters}


@enough_memory("take a smaller model or a narrower --dtype")
def prepare(folder: RunFolder, console: Console, dev_examples: int = 0) -> Job:
    """Loads data and model and adapts the model.

    Args:
        folder: the folder from open_run, with the options.
        console: gets notes.
        dev_examples: at most so many examples of each task to hold out of the training split, to choose options on.

    Raises:
        ValueError: the options, the data or the model cannot be used; the message is one line, and no files are left.
    """
    check_hub(folder.options)
    device, dtype = usable_device(folder.options.device), folder.options.dtype
    # "auto" goes by a measurement, which may differ between processes.
    chosen: Any = processes.by_first(lambda: best_dtype(device)) if dtype == "auto" else resolve_dtype(dtype)
    with processes.all_or_none():
        return _prepare(folder, device, chosen, console, dev_examples)


def _prepare(folder: RunFolder, device: str, dtype: torch.dtype, console: Console, dev_examples: int) -> Job:
    options = folder.options
    if options.resume and folder.checkpoint is None:
        print_line(console, f"{folder.target} holds no checkpoint yet: the run begins")
    if options.load_best_model_at_end or options.early_stopping_patience:
        dev_examples = max(dev_examples, options.eval_examples)  # never chosen on what is scored
    fields = argument_fields(options, device)
    try_arguments(options, fields)
    with show_status(console, "reading the data"):
        pools = read_pools(options, dev_examples)
    names = tuple(pools.tasks)
    _check_metric(options.metric_for_best_model, names)
    config = options.adapter_config(num_tasks=len(names))
    checked_task_names(names, config)
    if config.align is not None and len(names) < 2:
        raise ValueError(f"alignment needs two tasks or more, found only {names[0]!r}: use --align none")
    model, tokenizer = load_job_base(options, dtype, device, lambda line: print_line(console, line))
    # After the model, which each process holds whole until the training begins: ZeRO-3 would load it in parts.
    arguments = training_arguments(folder, fields)
    check_conversations(tokenizer, pools.examples())
    with show_status(console, "choosing examples"):
        data = choose(options, pools, tokenizer, dev_examples)
    by_default = config.target_modules == AUTO and not config.target_blocks
    config = with_targets(config, model)
    with show_status(console, "tokenising"):
        rows, scored = train_rows(options, tokenizer, data), encoded_rows(tokenizer, data, data.test)
    options = options.for_examples(len(rows))
    arguments.max_steps = options.steps
    sampler = sampler_of(options, data, rows["task_ids"])
    for note in filter(None, (_warmup_note(options, arguments), mixing_note(options, sampler, names))):
        print_line(console, note)
    token_ids = itertools.chain((row["input_ids"] for row in rows), token_rows(tokenizer, data.test))
    ran = check_base(model, tokenizer, token_ids, training=True)
    if options.packing:
        check_packing(model, scored)
    if by_default:
        config = _exclude_idle(config, [name for name, _ in linear_layers(model) if name not in ran], ran, console)
    if options.adapter_from is not None and (base := AdapterFolder.read(options.adapter_from).base) is not None:
        base.check(model, "give --model that one, or another --adapter-from")
    transformers.set_seed(options.seed)
    replace_linear_with_align_lora(model, config)
    check_ranks(model, options.steps, divided=options.fsdp or options.deepspeed is not None)
    _check_idle_layers(model, ran)
    if options.adapter_from is not None:
        load_adapter(model, options.adapter_from)
    if folder.checkpoint is not None:
        stored = AdapterFolder.read(folder.checkpoint)
        if stored.base is not None:
            stored.base.check(model, "a run goes on with its own base only: put that back, or start another run")
    examples = itertools.chain(data.train, data.test)
    digest = _digest(_shown_list(map(repr, ((x.task, x.prompt, x.answer, x.choices) for x in examples))))
    if processes.number() == 0:
        check_space(folder.path, _bytes_to_write(model, options))
        encoded = _digest(_shown_list([_shown_list(map(repr, rows)), [repr(scored)]]))
        folder.begin(str(dtype).removeprefix("torch."), device, digest, encoded)
    dev_rows = encoded_rows(tokenizer, data, data.dev) if options.eval_steps else []
    return Job(options, folder, data, model, tokenizer, device, arguments, rows, scored, dev_rows, digest)


def _check_metric(metric: str | None, tasks: Sequence[str]) -> None:
    """Raises ValueError for a metric of the best adapter that no evaluation gives."""
    known = ["eval_loss", *(f"eval_loss/{task}" for task in tasks)]
    if metric is not None and f"eval_{metric.removeprefix('eval_')}" not in known:
        raise ValueError(unknown_name("metric_for_best_model", metric, known))


def _warmup_note(options: TrainOptions, arguments: transformers.TrainingArguments) -> str:
    """Returns a line on a warm-up that is as long as the training, or ""."""
    rise = arguments.get_warmup_steps(options.steps)
    if rise < options.steps or options.lr_scheduler_type in _WITHOUT_WARMUP:
        return ""
    return (
        f"the learning rate rises over {rise} of {options.steps} steps, so that it never reaches lr={options.lr:g}: "
        "lower --warmup, or train longer"
    )


def _exclude_idle(
    config: AlignLoraConfig, idle: Collection[str], ran: frozenset[str], console: Console
) -> AlignLoraConfig:
    """Adds the layers that match target_modules but that the model never runs to exclude_modules."""
    matcher, targets, excluded = Matcher(), config.target_modules, config.exclude_modules
    if isinstance(excluded, str):  # a regular expression, which is the user's choice
        return config
    chosen = [name for name in idle if all_linear(config) or name_matches(matcher, name, targets)]
    patterns = shortest_ends([name for name in chosen if not name_matches(matcher, name, excluded)], ran)
    if patterns:
        print_line(console, f"left out {', '.join(map(shown, patterns))}, whose forward this model does not run here")
    return replace(config, exclude_modules=(*excluded, *patterns))


def _check_idle_layers(model: Any, ran: frozenset[str]) -> None:
    """Raises ValueError if no adapted layer runs, or if a layer that every step needs does not always run."""
    state, layers = model.align_state, adapted_layers(model)
    idle = [name for name, layer in layers.items() if layer.base_name(name) not in ran]
    if idle and (len(idle) == len(layers) or not set(idle).isdisjoint(state.names)):
        cure = ",".join(shortest_ends(idle, ran))
        cure += ", or give --align none" * (len(idle) < len(layers) and state.config.align is not None)
        raise ValueError(
            f"this model never runs {shown(idle[0])} here ({len(idle)} of {len(layers)} adapted layers), so that it "
            f"cannot be trained or aligned: leave it out by --exclude-modules {cure}"
        )
    if any(getattr(module, "layerdrop", 0) for module in model.modules()):
        raise ValueError(
            "the model leaves out layers at random in training, which can be neither aligned nor trained then: set "
            "layerdrop (decoder_layerdrop) to 0 in its config.json"
        )


def _digest(texts: Iterable[str]) -> str:
    """Returns the SHA-256 of a text in parts."""
    found = hashlib.sha256()
    for text in texts:
        found.update(text.encode("utf-8", "surrogatepass"))
    return found.hexdigest()


def _shown_list(parts: Iterable[str | Iterable[str]]) -> Iterator[str]:
    """Yields the repr of a list, in parts, from those of its entries."""
    yield "["
    for number, part in enumerate(parts):
        yield ", " * bool(number)
        yield from [part] if isinstance(part, str) else part
    yield "]"


def _bytes_to_write(model: Any, options: TrainOptions) -> int:
    """Estimates the size of a run's files: the adapter, and up to three checkpoints with both moments of Adam."""
    adapters = sum(parameter.nbytes for parameter in model.parameters() if parameter.requires_grad)
    return adapters * (1 + 3 * 3 * bool(options.save_steps))


@enough_memory("lower --batch-size (--accumulation makes up for it), --eval-batch-size or --seq-len, or give "
               "--gradient-checkpointing")  # fmt: skip
def train(job: Job, console: Console) -> dict[str, Any]:
    """Runs a prepared job and writes its folder: adapter/, rows.jsonl.gz, and finally results.json.

    Each file appears when it is complete, and after training they are kept even if something fails. checkpoints/ is for
    resuming an interrupted run; it is written with save_steps, or when a signal ends the run.

    Returns:
        The content of results.json.
    """
    options = job.options
    model = {"name": base_name(job.model), "dtype": str(job.model.dtype), "device": job.device}
    results: dict[str, Any] = {"options": options.to_dict(), "versions": versions(), "model": model}
    results["data"] = job.data.counts() | {"digest": job.digest}
    results["adapters"] = describe_adapters(job.model)
    sizes = f"{len(job.data.train)} examples to train on, {len(job.data.test)} to score on"
    count = len(job.data.names)
    print_line(console, f"{count} {'task' if count == 1 else 'tasks'}: {sizes}")
    for line in job.data.report():
        print_line(console, f"  {line}")
    print_line(console, f"{str(adapter_report(job.model)).splitlines()[0]}, {job.model.dtype} on {job.device}")
    sharded = options.fsdp or options.deepspeed is not None  # where a process holds parts of what is estimated
    advice = () if sharded else memory_advice(
        job.model, options.batch_size // processes.count(), max(map(len, job.train_rows["input_ids"])),
        job.device, checkpointing=options.gradient_checkpointing, state=optimizer_state(job.arguments),
    )  # fmt: skip
    for line in advice:
        print_line(console, line)
    seconds: dict[str, float] = results.setdefault("seconds", {})
    folder = job.folder
    with progress_bars(console) as bars:
        with _timed(seconds, "score before"):
            before = score(job, bars)
        with _timed(seconds, "train"), _saying_what_is_kept(folder, console):
            results |= fit(job, bars, console)
        if processes.number() == 0 or shard_ranks(job.model.parameters()):
            save_adapter(job.model, folder.path / "adapter", task_names=job.data.names)
        folder.keep = True
        try:
            with _timed(seconds, "score after"):
                after = score(job, bars)
            results["before"], results["after"] = before.to_dict(), after.to_dict()
            results["answers"] = shown_answers(job, before.rows, after.rows)
            with _timed(seconds, "checks"):
                checks = processes.by_first(lambda: verify(job, folder.path / "adapter"))
            results["checks"] = {name: asdict(check) for name, check in checks.items()}
            if processes.number() == 0:
                write_rows(folder.path / ROWS, {"before": before.rows, "after": after.rows}, "when")
                write_card(folder.path / "adapter", results)
        finally:
            if processes.number() == 0:
                with atomic_file(folder.path / "results.json") as new:
                    new.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    if processes.number() == 0:
        summarise(results, folder.target, console)
    return results


@contextmanager
def _timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[name] = round(time.perf_counter() - start, 1)


@contextmanager
def _saying_what_is_kept(folder: RunFolder, console: Console) -> Iterator[None]:
    """After a failure of the block, says which checkpoint is kept and how to go on."""
    try:
        yield
    except BaseException:  # any exception, also a bug of ours
        if last := folder.last_checkpoint():
            print_line(console, f"{last} is kept: --resume goes on from it")
        raise


def score(job: Job, bars: Progress | None = None) -> Scores:
    """Scores the current model on the held-out examples."""
    if bars is not None and bars.disable:
        print_line(bars.console, "scoring")
    size, ids = job.options.eval_batch_size, job.data.ids()
    rows = score_together(job.model, job.tokenizer, job.data.test, size, bars, ids)
    align = alignment(job.model, job.tokenizer, job.data.test, ids, size)
    return Scores(rows, task_scores(rows), align, measure_adapters(job))
