"""`align-lora bench`: measures what adapters and losses cost here."""

from pathlib import Path
from typing import Annotated

import typer

from align_ext.cli.app import UserError, app
from align_ext.system.messages import shown
from align_ext.system.terminal import continue_without_output
from align_ext.system.writing import check_file


@app.command()
def bench(
    only: Annotated[str | None, typer.Option(help="suites, with commas between them [all but quantised]")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="sizes that say nothing, to see that it runs")] = False,
    full: Annotated[bool, typer.Option("--full", help="more rounds and variants: about an hour on two cores")] = False,
    device: Annotated[str, typer.Option(help="auto (a GPU if there is one), cpu or cuda")] = "auto",
    model: Annotated[
        str | None, typer.Option(help="of step and decode: random, smollm2, a folder or a hub id [random]")
    ] = None,
    json: Annotated[Path | None, typer.Option(help="write every measured time to this file")] = None,
    plot: Annotated[Path | None, typer.Option(help="write plots of the sweep to this file; needs matplotlib")] = None,
    check: Annotated[
        bool, typer.Option("--check", help="exit code 1 unless no cell of restructured is slower, and none open")
    ] = False,
    save: Annotated[
        bool,
        typer.Option("--save", help="write the figures to a file named after the machine; other suites in it stay"),
    ] = False,
    folder: Annotated[
        Path | None, typer.Argument(help="of --save [docs/measurements of a checkout, else the current folder]")
    ] = None,
) -> None:
    """Measures what adapters and alignment losses cost here, beside plain PyTorch and PEFT; under ten minutes.

    The variants of a table take turns, so that whatever else the machine does meets them all. A ratio is the median
    of a variant's times divided by the first variant's just before and just after, followed by its quartiles: 1.10
    means that the adapter adds 10% to the frozen layer. The rounds are spread over the whole run, so that another
    run's medians lie within these quartiles or near them. It ends by the clock: a slow machine has fewer rounds, leaves
    out what would take too long, and says so. Times in ms hold for the machine of the first line only.

    Suites:

    restructured: lora, m_lora, r_lora and hydra of 128 to 2048 tokens, beside the same mathematics as one product of
    concatenated heads. The report ends with the cells in which ours is slower: in three of four paired turns.

    layers: one adapted layer, forward and backward, with the frozen product and dx: lora and align_lora, against plain
    PyTorch, a hand-written restructuring, torch.compile of both, and PEFT's layer.

    heads: the same for the architectures with several heads, against the loops of the released codes, restructured and
    compiled.

    losses: gaussian_kl and mk_mmd, value and gradient, against the sum over pairs of tasks; dropout inside the op
    against nn.Dropout. Here the ratio says how much longer the others take.

    dispatch: what a call costs that has nothing to compute, and what the second thread brings.

    sweep: the ratio against tokens, rank and heads, the loss against tasks: what --plot draws.

    step: whole training steps of a 135M model, each variant in a process of its own: tokens per second, peak memory;
    layers that read the same x as one operator and each by itself.

    quantised: the same with the model's weights in nf4 by bitsandbytes, beside PEFT; only when it is named.

    decode: one token at a time, adapters merged into the weights and beside them.

    Examples: align-lora bench --save; align-lora bench --only restructured --check; align-lora bench --only step
    --model smollm2; align-lora bench --only sweep --plot cost.png
    """
    from align_ext.bench import plots, restructured, run, saved
    from align_ext.bench.timing import MARK

    try:
        if quick and full:
            raise ValueError("give --quick or --full, not both")
        names = run.chosen(only)
        how = run.setting(device, "quick" if quick else "full" if full else "normal", model)
        if check and "restructured" not in names:
            raise ValueError(f"--check is about the suite restructured, which --only {only} leaves out: add it")
        if folder is not None and not save:
            raise ValueError(f"{shown(str(folder))} is the folder of --save: give that too, or leave it out")
        if quick and save:
            raise ValueError("--quick measures nothing worth keeping: leave out --save, or take --json")
        file = saved.file_in(folder, how.device) if save else None
        if file is not None:
            check_file("save", file, saved.MARK)
        if json is not None:
            check_file("json", json, f'"written_by": "{MARK}"')
        if plot is not None:
            plots.check(plot)
    except ValueError as error:
        raise UserError(str(error)) from error
    if json is not None or plot is not None or file is not None:
        continue_without_output()
    try:
        outcome = run.run(names, how, json, plot, file)
    except ValueError as error:
        raise UserError(str(error)) from error
    except ModuleNotFoundError as error:
        raise UserError(f"this suite needs {error.name}: pip install {error.name}") from error
    if check and not restructured.holds(*outcome.restructured):
        raise typer.Exit(1)
