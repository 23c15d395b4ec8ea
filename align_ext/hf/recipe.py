"""The training job: load, score, train, score again, save, and prove that the saved adapter is the trained one."""

from __future__ import annotations

import functools
import json
import platform
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch.utils.data import Subset

from align_ext.config import AUTO
from align_ext.diagnostics.backend import has_kernel
from align_ext.hf.collator import TaskCollator
from align_ext.hf.evaluate import TaskScore, alignment, evaluate
from align_ext.hf.export import PEFT_CONFIG, load_adapter, save_adapter
from align_ext.hf.merge import merge_and_unload
from align_ext.hf.models import best_dtype, default_targets, load_model
from align_ext.hf.options import TrainOptions
from align_ext.hf.replace import adapted_layers, adapter_report, replace_linear_with_align_lora
from align_ext.hf.tasks import TaskData, encode, features, fits, mixing_order, read_tasks, select
from align_ext.hf.trainer import AlignTrainer, align_training_arguments

# Largest difference of two models' float32 logits, relative to the largest logit, that is rounding and nothing else.
_SAME = 1e-4
# transformers renamed the argument within version 5 and warns of the old name.
_CHECKPOINTING = next(
    name
    for name in ("activation_checkpointing", "gradient_checkpointing")
    if hasattr(transformers.TrainingArguments, name)
)


@dataclass
class Job:
    """Everything a run needs, checked: what can be wrong with the options or the data is wrong before it exists."""

    options: TrainOptions
    target: Path
    data: TaskData
    model: Any
    tokenizer: Any
    device: str


@dataclass(frozen=True)
class Scores:
    """The model's state at one time: by task, and the alignment of all tasks (None: alignment is off)."""

    tasks: dict[str, TaskScore]
    align: float | None


@dataclass(frozen=True)
class Check:
    """Whether two models compute the same: largest difference of their logits relative to the largest logit.

    Where an architecture has no such second model, passed is None and detail says why.
    """

    passed: bool | None
    difference: float | None
    detail: str = ""


def prepare(options: TrainOptions, console: Console) -> Job:
    """Loads data and model and adapts the model.

    Raises:
        ValueError: the options, the data or the model cannot be used; the message is one line, and nothing is written.
    """
    target, device = _free_target(options), _device(options)
    count = max(options.train_examples, options.eval_examples)
    pools = read_tasks(options.data, options.tasks, count=count, seed=options.seed)
    config = options.adapter_config(num_tasks=len(pools))
    if config.align is not None and len(pools) < 2:
        raise ValueError(f"alignment needs two tasks or more, found only {next(iter(pools))!r}: use --align none")
    dtype = best_dtype(device) if options.dtype == "auto" else options.dtype
    model, tokenizer = load_model(options.model, dtype, lambda line: _say(console, line))
    fit = functools.partial(fits, tokenizer, max_tokens=options.seq_len)
    data = select(pools, options.train_examples, options.eval_examples, fit)
    if options.adapter["target_modules"] == AUTO and not config.target_blocks:
        targets, note = default_targets(model)
        config = options.adapter_config(len(pools), targets)
        if note:
            _say(console, note)
    transformers.set_seed(options.seed)
    replace_linear_with_align_lora(model.to(device), config)
    return Job(options, target, data, model, tokenizer, device)


def train(job: Job, console: Console) -> dict[str, Any]:
    """Runs a prepared job and writes its folder: adapter/, results.json, losses.png (with matplotlib).

    The folder appears in one step, and only with a trained adapter in it; after training it is kept whatever fails.

    Returns:
        The content of results.json.
    """
    model = {"name": job.model.name_or_path, "dtype": str(job.model.dtype), "device": job.device}
    results: dict[str, Any] = {"options": job.options.to_dict(), "versions": _versions(), "model": model}
    left_out = f" ({job.data.left_out} too long, left out)" if job.data.left_out else ""
    sizes = f"{len(job.data.train)} examples to train on, {len(job.data.test)} to score on{left_out}"
    _say(console, f"{len(job.data.names)} tasks: {sizes}")
    _say(console, f"{str(adapter_report(job.model)).splitlines()[0]}, {job.model.dtype} on {job.device}")
    seconds: dict[str, float] = results.setdefault("seconds", {})
    with _new_folder(job) as folder, _bars(console) as bars:
        with _timed(seconds, "score before"):
            before = score(job, bars)
        with _timed(seconds, "train"):
            results["losses"] = _fit(job, folder.path / "trainer", bars, console)
        shutil.rmtree(folder.path / "trainer", ignore_errors=True)
        save_adapter(job.model, folder.path / "adapter", task_names=job.data.names)
        folder.keep = True
        try:
            with _timed(seconds, "score after"):
                after = score(job, bars)
            results["before"], results["after"] = asdict(before), asdict(after)
            with _timed(seconds, "checks"):
                checks = verify(job, folder.path / "adapter")
            results["checks"] = {name: asdict(check) for name, check in checks.items()}
            results["plot"] = plot_losses(results["losses"], folder.path / "losses.png")
        finally:
            (folder.path / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    _summarise(results, job.target, console)
    return results


@contextmanager
def _timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[name] = round(time.perf_counter() - start, 1)


def score(job: Job, bars: Progress | None = None) -> Scores:
    """Scores the model as it is on the held-out examples."""
    if bars is not None and bars.disable:
        _say(bars.console, "scoring")
    size, ids = job.options.eval_batch_size, job.data.ids()
    return Scores(
        evaluate(job.model, job.tokenizer, job.data.test, size, bars, ids),
        alignment(job.model, job.tokenizer, job.data.test, ids, size),
    )


def _fit(job: Job, scratch: Path, bars: Progress, console: Console) -> list[dict[str, float]]:
    """Trains the adapters and returns the log: one entry per logging step."""
    options, ids = job.options, job.data.ids()
    order = mixing_order(
        [ids[x.task] for x in job.data.train], options.batch_size, options.steps * options.accumulation, options.seed
    )
    trainer = AlignTrainer(
        model=job.model,
        args=align_training_arguments(
            str(scratch),
            learning_rate=options.lr,
            warmup_steps=options.warmup,
            max_steps=options.steps,
            per_device_train_batch_size=options.batch_size,
            gradient_accumulation_steps=options.accumulation,
            **({_CHECKPOINTING: True} if options.gradient_checkpointing else {}),
            logging_steps=options.log_steps,
            logging_first_step=True,
            save_strategy="no",
            use_cpu=job.device == "cpu",
            seed=options.seed,
            disable_tqdm=True,
        ),
        train_dataset=Subset(features(job.tokenizer, job.data.train, ids), order),  # type: ignore[arg-type]
        data_collator=TaskCollator(job.tokenizer),
        task_names=job.data.names,
        in_order=True,
        callbacks=[_ShowProgress(bars, console, options.steps)],
    )
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train()
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def verify(job: Job, adapter: Path) -> dict[str, Check]:
    """Compares, in float32, the trained model with what can be made of the saved adapter.

    That is the base with the adapter loaded again by load_adapter, and, where the architecture allows it, the merged
    model and stock PEFT's reading of the folder. Uses the job's model up. A check that cannot be made has failed and
    says why.
    """
    some, ids = job.data.test[:: max(1, len(job.data.test) // 4)], job.data.ids()
    by_task = job.options.adapter["architecture"] == "multi_adapter"
    batches = []
    for example in some:
        prompt, answer = encode(job.tokenizer, example.prompt, example.answer)
        batches.append({"input_ids": torch.tensor([prompt + answer], device=job.device)})
        if by_task:
            batches[-1]["task_ids"] = torch.tensor([ids[example.task]], device=job.device)

    @torch.no_grad()
    def logits(model: Any) -> torch.Tensor:
        return torch.cat([model(**batch, use_cache=False).logits[0].cpu() for batch in batches])

    def base() -> Any:
        return load_model(job.options.model, torch.float32)[0].to(job.device)

    trained = logits(job.model.float().eval())
    models = {
        "loaded again": lambda: load_adapter(base(), adapter).eval(),
        "merged": lambda: merge_and_unload(job.model),
        "stock PEFT": lambda: peft.PeftModel.from_pretrained(base(), str(adapter)).eval(),
    }
    reasons = {"merged": _cannot_merge(job.model), "stock PEFT": _not_for_peft(job.model, adapter)}
    checks = {}
    for name, make in models.items():
        if reason := reasons.get(name):
            checks[name] = Check(None, None, reason)
            continue
        try:
            difference = float((logits(make()) - trained).abs().max() / trained.abs().max())
            checks[name] = Check(difference <= _SAME, difference)
        except Exception as error:  # the training is done and kept; a check reports whatever stops it
            checks[name] = Check(False, None, f"{type(error).__name__}: {error}")
    return checks


def _cannot_merge(model: Any) -> str | None:
    reasons = (layer.cannot_merge() for layer in adapted_layers(model).values())
    return next((reason for reason in reasons if reason is not None), None)


def _not_for_peft(model: Any, adapter: Path) -> str | None:
    """Why stock PEFT does not read an adapter folder: it holds no configuration for it."""
    if not adapter.is_dir() or (adapter / PEFT_CONFIG).is_file():
        return None
    return f"PEFT's LoRA cannot express architecture {model.align_state.config.architecture!r}"


def plot_losses(losses: list[dict[str, float]], file: Path) -> str | None:
    """Draws the logged losses over the steps; returns the file's name, or None without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    figure = Figure(figsize=(9, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    steps = [entry["step"] for entry in losses]
    for name in sorted({key for entry in losses for key in entry if key.startswith("loss/")} | {"lm_loss"}):
        style = {"color": "black", "linewidth": 2} if name == "lm_loss" else {"alpha": 0.7}
        left.plot(steps, [entry.get(name, float("nan")) for entry in losses], label=name.removeprefix("loss/"), **style)
    left.set(xlabel="step", ylabel="loss per answer token")
    left.legend(fontsize="small")
    right.plot(steps, [entry.get("align_loss", float("nan")) for entry in losses], color="black")
    right.set(xlabel="step", ylabel="alignment loss")
    figure.savefig(file, dpi=120)
    return file.name


class _ShowProgress(transformers.TrainerCallback):
    """A rich bar for the optimizer steps, or lines where there is no terminal."""

    def __init__(self, bars: Progress, console: Console, steps: int) -> None:
        self.bars, self.console = bars, console
        self.bar = bars.add_task("training", total=steps)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.bars.advance(self.bar)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **_: Any) -> None:
        if "lm_loss" not in logs:
            return
        text = f"loss {logs['lm_loss']:.3f}"
        for name in ("align", "balance", "spectral"):
            if f"{name}_loss" in logs:
                text += f", {name} {logs[f'{name}_loss']:.3g}"
        self.bars.update(self.bar, description=f"training  {text}")
        if self.bars.disable:
            _say(self.console, f"step {state.global_step}/{state.max_steps}  {text}")

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.bars.remove_task(self.bar)


def _bars(console: Console) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)


def _summarise(results: dict[str, Any], target: Path, console: Console) -> None:
    table = Table("task", title="held-out examples, before -> after training")
    for title in ("examples", "loss", "score"):
        table.add_column(title, justify="right")
    before, after = results["before"], results["after"]
    for name, old in before["tasks"].items():
        new = after["tasks"][name]
        table.add_row(
            name,
            str(old["examples"]),
            f"{old['loss']:.3f} -> {new['loss']:.3f}",
            f"{old['score']:.2f} -> {new['score']:.2f}",
        )
    console.print(table)
    if before["align"] is not None:
        _say(console, f"alignment loss {before['align']:.4g} -> {after['align']:.4g}")
    for name, check in results["checks"].items():
        verdict = "same logits" if check["passed"] else "OTHER LOGITS"
        found = check["detail"] or f"{verdict} (relative difference {check['difference']:.1e})"
        _say(console, f"{name}: " + ("does not apply: " if check["passed"] is None else "") + found)
    if results["plot"] is None:
        _say(console, "no loss plot: matplotlib is not installed")
    times = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in results["seconds"].items())
    _say(console, f"wrote {target} ({times})")


def _say(console: Console, line: str) -> None:
    console.print(line, highlight=False, soft_wrap=True)


def _versions() -> dict[str, str]:
    modules = ("torch", "transformers", "peft")
    return {"align_ext": version("align_ext"), "python": platform.python_version(), **{m: version(m) for m in modules}}


def _device(options: TrainOptions) -> str:
    """The device to train on: a GPU only where this build has the adapters' kernels for it."""
    if not torch.cuda.is_available():
        missing = "torch sees no GPU here"
    elif not has_kernel("grouped_lora", "cuda"):
        missing = "this build has no CUDA kernels of the adapters"
    else:
        return "cpu" if options.device == "cpu" else "cuda"
    if options.device == "cuda":
        raise ValueError(f"device=cuda, but {missing}: use --device cpu")
    return "cpu"


def _free_target(options: TrainOptions) -> Path:
    """The output folder, which must be new, empty or, with overwrite, a folder at all."""
    if options.output is None:
        names = ["align_lora_run", *(f"align_lora_run-{n}" for n in range(2, 10_000))]
        return Path(next(name for name in names if not Path(name).exists()))
    target = Path(options.output).expanduser()
    if target.exists() and not target.is_dir():
        raise ValueError(f"the output {options.output!r} is a file")
    if target.is_dir() and any(target.iterdir()) and not options.overwrite:
        raise ValueError(f"the output folder {options.output!r} is not empty: use --overwrite, or another --output")
    parent = next(p for p in target.absolute().parents if p.exists())
    try:
        tempfile.TemporaryDirectory(dir=parent).cleanup()
    except OSError as error:
        raise ValueError(f"the output folder {options.output!r} cannot be made: {error}") from error
    return target


@dataclass
class _Folder:
    path: Path
    keep: bool = False


@contextmanager
def _new_folder(job: Job) -> Iterator[_Folder]:
    """A folder beside the target that takes its place at the end if `keep` is set, and vanishes otherwise."""
    job.target.parent.mkdir(parents=True, exist_ok=True)
    folder = _Folder(Path(tempfile.mkdtemp(prefix=f".{job.target.name}-", dir=job.target.parent)))
    try:
        yield folder
    finally:
        if folder.keep:
            folder.path.chmod(0o755)
            old = Path(tempfile.mkdtemp(prefix=f".{job.target.name}-old-", dir=job.target.parent))
            if job.target.exists():
                job.target.rename(old / "old")
            folder.path.rename(job.target)
            shutil.rmtree(old, ignore_errors=True)
        else:
            shutil.rmtree(folder.path, ignore_errors=True)
