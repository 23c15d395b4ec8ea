"""The command line, align-lora: train, eval, merge, export, inspect, doctor, bench.

A user's mistake is one line on stderr and exit code 2.
"""

from __future__ import annotations

import inspect
import sys
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

from align_ext import ending
from align_ext.hf.options import TrainOptions, known_options
from align_ext.hf.rows import ROWS
from align_ext.reading import line, read_yaml
from align_ext.terminal import guarded, outlive_output, plain_console
from align_ext.writing import check_file

app = typer.Typer(
    name="align-lora",
    help="Multi-task LoRA training with alignment losses.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


_INTERRUPTED = 130  # what a shell reports for Ctrl-C, and typer returns


class Mistake(Exception):
    """Something that the user can put right; its message is the whole answer."""


def train(config: str | None, print_config: bool, **flags: Any) -> None:
    """Fine-tunes a language model on several tasks; with no options a small one on five built-in tasks.

    It scores the model on held-out examples before and after, saves the adapter as a PEFT folder, and checks that stock
    PEFT and the merged model compute the same. Without a GPU and without the hub the default run takes a few minutes.
    """
    try:
        given = read_yaml(config) if config is not None else {}
        options = TrainOptions.from_mapping(given, {name: x for name, x in flags.items() if x is not None})
    except ValueError as error:
        raise Mistake(str(error)) from error
    if print_config:
        typer.echo(yaml.safe_dump(options.to_dict(), sort_keys=False), nl=False)
        return
    outlive_output()
    recipe, console = _on_transformers("training", "recipe"), plain_console()
    from align_ext.hf import soundness
    from align_ext.hf.run_folder import open_run

    with ExitStack() as held:
        try:
            job = recipe.prepare(held.enter_context(open_run(options)), console)
        except (ValueError, OSError) as error:
            raise Mistake(str(error)) from error
        try:
            results = recipe.train(job, console)
        except (FloatingPointError, OSError, soundness.CannotRun) as error:  # it has diverged, or the disk is full
            raise Mistake(str(error)) from error
    if any(check["passed"] is False for check in results["checks"].values()):
        raise typer.Exit(1)


_Force = Annotated[bool, typer.Option("--force", help="go on where the adapter belongs to another base model")]


@app.command("eval")
def evaluate(
    model: Annotated[
        str | None,
        typer.Option(help="folder or hub id; none: the adapter's base, or without one SmolLM2-135M-Instruct"),
    ] = None,
    adapter: Annotated[
        str | None, typer.Option(help="adapter folder of any architecture; none: the base alone")
    ] = None,
    data: Annotated[str | None, typer.Option(help="as in `train`; none: the built-in tasks")] = None,
    ignore_columns: Annotated[str, typer.Option(help="columns of the rows to leave out, separated by commas")] = "",
    tasks: Annotated[str, typer.Option(help="names of the tasks to keep, separated by commas; none: all")] = "",
    examples: Annotated[int, typer.Option(help="at most so many of each task")] = 100,
    batch_size: Annotated[int, typer.Option(help="rows in a forward")] = 16,
    seq_len: Annotated[int, typer.Option(help="longest prompt and answer in tokens; longer ones are left out")] = 256,
    merge: Annotated[bool, typer.Option("--merge", help="score the merged model")] = False,
    dtype: Annotated[str, typer.Option(help="auto, stored, float32, bfloat16 or float16")] = "auto",
    device: Annotated[str, typer.Option(help="auto (a GPU if there is one), cpu or cuda")] = "auto",
    force: _Force = False,
    json: Annotated[str | None, typer.Option(help="file for the results")] = None,
) -> None:
    """Scores a model, with an adapter or without, on the tasks' test splits; a data file is scored as it is.

    For each task, with standard errors: the loss per token of the gold answer; where there are choices, how often the
    gold one has the least loss per token; and the score of greedy answers, by the task's own scorer or else exact
    match. A multi_adapter scores each task with its adapter.

    Example: align-lora eval --adapter run/adapter --tasks syllogism,chain_sum --json scores.json
    """
    given: dict[str, Any] = {name: value for name, value in locals().items() if name != "json"}
    for name in ("tasks", "ignore_columns"):
        given[name] = tuple(word.strip() for word in given[name].split(",") if word.strip())
    if json is not None:
        outlive_output()
    with _on_models("scoring"):
        from align_ext.hf.score import EvalRequest, score

        score(EvalRequest(**given), json, plain_console())


_Folder = Annotated[str, typer.Argument(help="folder of save_adapter or `train` (its adapter/), or of stock PEFT")]
_Model = Annotated[str | None, typer.Option(help="base model: folder or hub id; none: the one the adapter names")]
_Output = Annotated[str, typer.Option(help="new or empty folder for the result; it appears only when it is complete")]
_Task = Annotated[str | None, typer.Option(help="multi_adapter: name or number (from 0) of the task")]


@app.command()
def merge(
    adapter: _Folder,
    output: _Output,
    model: _Model = None,
    task: _Task = None,
    approximate: Annotated[
        str | None, typer.Option(help="uniform: merge routed heads as if their router gave all the same weight")
    ] = None,
    prompts: Annotated[
        str | None,
        typer.Option(help="file of one prompt a line, to measure the approximation on; none: four of ours"),
    ] = None,
    dtype: Annotated[
        str, typer.Option(help="of the merged model: stored (as the base model is), float32, bfloat16 or float16")
    ] = "stored",
    force: _Force = False,
) -> None:
    """Merges an adapter into its base model: writes an ordinary model folder, which needs neither PEFT nor align_ext.

    Exact (in float32, rounded once) for lora, align_lora, m_lora, hydra without a router, and one task of
    multi_adapter. Routed adapters (lora_moe, hydra, r_lora, mtlora) weigh their heads anew for every token and cannot
    be merged exactly: --approximate uniform merges their mean and says how far the outputs moved (KL). Adapters beside
    whole blocks cannot be merged.

    Example: align-lora merge run/adapter --model Qwen/Qwen2.5-0.5B --output merged
    """
    outlive_output()
    with _on_models("merging") as commands:
        request = commands.Request(adapter, model, output, task, force)
        commands.merge(request, approximate, prompts, dtype, plain_console())


@app.command()
def export(
    adapter: _Folder,
    output: _Output,
    model: _Model = None,
    task: _Task = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="read it with PEFT and align_ext and compare logits")
    ] = False,
    force: _Force = False,
) -> None:
    """Writes an adapter as a folder of stock PEFT, which also vLLM and others read, with nothing of ours in it.

    m_lora and hydra without a router become one LoRA, the sum of their heads; a frozen offset doubles its rank;
    multi_adapter becomes one folder a task below the output, or one with --task. Routed adapters and those beside
    blocks have no such form.

    With --verify the exit code is 1 if stock PEFT or align_ext compute other logits from the new folder.

    Example: align-lora export run/adapter --output peft_adapter --verify
    """
    outlive_output()
    with _on_models("exporting") as commands:
        if not commands.export(commands.Request(adapter, model, output, task, force), verify, plain_console()):
            raise typer.Exit(1)


@app.command("inspect")
def inspect_folder(adapter: _Folder) -> None:
    """Shows what an adapter's folder holds: architecture, options, tasks, and each layer's rank, parameters, norms.

    Every file is checked (keys, shapes, finite values, and that the files belong together). Needs no base model.

    Example: align-lora inspect run/adapter
    """
    from align_ext.hf.inspect import inspect_adapter

    try:
        inspect_adapter(adapter, plain_console())
    except ValueError as error:
        raise Mistake(str(error)) from error


@contextmanager
def _on_models(what: str) -> Iterator[Any]:
    """The commands on a base model and an adapter, with transformers quiet; what a user can mend is a Mistake."""
    commands = _on_transformers(what, "commands")
    try:
        yield commands
    except (ValueError, OSError) as error:
        raise Mistake(
            str(error).replace("approximate='uniform'", "--approximate uniform").replace("force=True", "--force")
        ) from error


def _on_transformers(what: str, name: str) -> Any:
    """The module align_ext.hf.<name>, which needs transformers; transformers is quiet from then on."""
    try:
        import transformers

        module = import_module(f"align_ext.hf.{name}")
    except ModuleNotFoundError as error:
        raise Mistake(f"{what} needs {error.name}: pip install 'align_ext[train]'") from error
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    transformers.utils.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    return module


@app.command()
def doctor(
    grad_check: Annotated[
        bool, typer.Option("--grad-check", help="check that the losses reach every adapted layer of a model")
    ] = False,
    model: Annotated[str | None, typer.Option(help="with --grad-check: a folder or hub id [a tiny one]")] = None,
) -> None:
    """Shows versions and devices, and tests every operator on each device; exit code 1 if something is broken.

    With --grad-check: does the alignment reach every layer, under each mode of activation checkpointing?
    """
    if model is not None and not grad_check:
        raise Mistake("--model goes with --grad-check")
    raise typer.Exit(0 if (_grad_check(model) if grad_check else _self_test()) else 1)


def _self_test() -> bool:
    from align_ext.diagnostics import doctor as check

    return check.run()


def _grad_check(model: str | None) -> bool:
    modes = _on_transformers("the gradient check", "check_modes")
    try:
        return modes.check_modes(model, plain_console())
    except ValueError as error:
        raise Mistake(str(error)) from error


@app.command()
def bench(
    only: Annotated[str | None, typer.Option(help="suites, with commas between them; all without it")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="sizes that say nothing, to see that it runs")] = False,
    full: Annotated[bool, typer.Option("--full", help="more rounds and variants: about an hour on two cores")] = False,
    device: Annotated[str, typer.Option(help="auto (a GPU if there is one), cpu or cuda")] = "auto",
    model: Annotated[
        str | None, typer.Option(help="of step and decode: random, smollm2, a folder or a hub id [random]")
    ] = None,
    json: Annotated[Path | None, typer.Option(help="write every measured time to this file")] = None,
    plot: Annotated[Path | None, typer.Option(help="write plots of the sweep to this file; needs matplotlib")] = None,
) -> None:
    """Measures what adapters and alignment losses cost here, beside plain PyTorch and PEFT; under ten minutes.

    The variants of a table take turns, so that whatever else the machine does meets them all. A ratio is the median
    of a variant's times divided by the first variant's just before and just after, followed by its quartiles: 1.10
    means that the adapter adds 10% to the frozen layer. The rounds are spread over the whole run, so that another
    run's medians lie within these quartiles or near them. Times in ms hold for the machine of the first line only.

    Suites:

    layers: one adapted layer, forward and backward, with the frozen product and dx: lora and align_lora, against plain
    PyTorch, a hand-written restructuring, torch.compile of both, and PEFT's layer.

    heads: the same for the architectures with several heads, against the loops of the released codes, restructured and
    compiled.

    losses: gaussian_kl and mk_mmd, value and gradient, against the sum over pairs of tasks; dropout inside the op
    against nn.Dropout. Here the ratio says how much longer the others take.

    dispatch: what a call costs that has nothing to compute, and what the second thread brings.

    sweep: the ratio against tokens, rank and heads, the loss against tasks: what --plot draws.

    step: whole training steps of a 135M model, each variant in a process of its own: tokens per second, peak memory.

    decode: one token at a time, adapters merged into the weights and beside them.

    Examples: align-lora bench --only layers,heads; align-lora bench --only step --model smollm2; align-lora bench
    --only sweep --plot cost.png
    """
    from align_ext.bench import plots, run
    from align_ext.bench.timing import MARK

    try:
        if quick and full:
            raise ValueError("give --quick or --full, not both")
        names = run.chosen(only)
        how = run.setting(device, "quick" if quick else "full" if full else "normal", model)
        if json is not None:
            check_file("json", json, f'"written_by": "{MARK}"')
        if plot is not None:
            plots.check(plot)
    except ValueError as error:
        raise Mistake(str(error)) from error
    if json is not None or plot is not None:
        outlive_output()
    try:
        run.run(names, how, json, plot)
    except ValueError as error:
        raise Mistake(str(error)) from error
    except ModuleNotFoundError as error:
        raise Mistake(f"this suite needs {error.name}: pip install 'align_ext[train]'") from error


def _show_version(wanted: bool) -> None:
    if wanted:
        from align_ext import __version__

        typer.echo(f"align-lora {__version__}")
        raise typer.Exit


@app.callback()
def _app(
    version: Annotated[bool, typer.Option("--version", is_eager=True, callback=_show_version, help="Show it.")] = False,
) -> None:
    pass


def _flags() -> list[inspect.Parameter]:
    """The flags of `train`: its own two and one for each option (hf/options.py), which so exists once."""

    def flag(name: str, kind: Any, text: str, default: Any = None) -> inspect.Parameter:
        annotation = Annotated[kind, typer.Option(help=text, show_default=False)]
        return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)

    flags = [
        flag("config", str | None, "YAML file of these options; flags override it"),
        flag("print_config", bool, "print the options as such a file, and stop", default=False),
    ]
    for name, option in known_options().items():
        kind = option.kind if option.kind in (bool, int, float) else str  # others may be "none", "auto" or a list
        value = ",".join(option.default) if isinstance(option.default, tuple) else option.default
        shown = "" if value in (None, "", False) else f" [{value}]"
        flags.append(flag(name, kind | None, option.help.removesuffix(".") + shown))
    return flags


train.__signature__ = inspect.Signature(_flags())  # type: ignore[attr-defined]
train.__annotations__ = {flag.name: flag.annotation for flag in _flags()}
_ROWS = "\n\n".join(f"{columns}: {meaning}" for columns, meaning in ROWS)
_DATA = (
    "Columns of the rows of --data. A JSON integer counts as text; anything else that is no text is refused, and so is "
    "every other column, unless it holds a number, is named like id, source or category, or --ignore-columns names it."
)
app.command(help=f"{inspect.getdoc(train)}\n\n{_DATA}\n\n{_ROWS}")(train)


def main() -> None:
    """Runs the command line and exits."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # a name may hold letters that the terminal has not
    sys.exit(guarded(_run))


def _run() -> int:
    """Runs the command line, says what was wrong, and returns the exit code."""
    ending.listen()  # before what takes long to import
    try:
        code = app(standalone_mode=False, prog_name="align-lora")
    except (KeyboardInterrupt, typer.Abort):
        code = _INTERRUPTED
    except Exception as error:
        # typer's own errors (unknown flags, missing values) have no common public class over its versions.
        if not isinstance(error, Mistake) and not hasattr(error, "format_message"):
            raise
        text = error.format_message() if hasattr(error, "format_message") else str(error)
        print("align-lora: error: " + line(text, 800), file=sys.stderr)
        code = 2
    if code == _INTERRUPTED and (ended := ending.received()):
        print(f"align-lora: ended by {ended.name}", file=sys.stderr)
        code = 128 + ended
    elif code == _INTERRUPTED:
        print("align-lora: interrupted", file=sys.stderr)
    return code if isinstance(code, int) else 0


if __name__ == "__main__":
    main()
