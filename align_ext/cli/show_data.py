"""The work of `align-lora data`: what a run would train and score on, counted and shown without the model's weights."""

import json
from collections.abc import Iterable
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from align_ext.base_model.load import load_tokenizer
from align_ext.data.encode import check_conversations, encode_example
from align_ext.data.overview import learnt_parts, lengths, overlaps, padding
from align_ext.data.packing import pack
from align_ext.data.rows import Example
from align_ext.data.tasks import TaskData
from align_ext.system import processes
from align_ext.system.messages import shown
from align_ext.system.terminal import print_line, print_table, show_status
from align_ext.system.writing import atomic_file, check_file, user_path
from align_ext.training.options import TrainOptions
from align_ext.training.rows import choose, encoded_rows, mixing_note, read_pools, sampler_of, train_rows

MARK = "align-lora data"  # identifies files of counts, which may be overwritten
_LETTERS = 1200  # the most letters of an example that are shown
_PAIRS = 3  # the most pairs of examples that ask the same that are shown
_LENGTHS = ("min", "median", "p95", "max")
_MARKS = ("[[", "]]")  # around what is learnt


def show_data(options: TrainOptions, file: str | None, console: Console) -> dict[str, Any]:
    """Prints what a run with these options would train and score on, and writes it as JSON if a file is given.

    Of several processes the first one does, for a run of all of them.

    Returns:
        The content of the file.

    Raises:
        ValueError: an option or the data cannot be used; nothing is written.
    """
    with processes.joined("cpu"):
        shared = options.for_processes(processes.count())
        return processes.by_first(lambda: _show_data(shared, file, console))


def _show_data(options: TrainOptions, file: str | None, console: Console) -> dict[str, Any]:
    path = None if file is None else user_path(file, "--json")
    if path is not None:
        check_file("--json", path, f'"written_by": "{MARK}"')
    pools = read_pools(options)
    with show_status(console, "loading the tokenizer"):
        tokenizer = load_tokenizer(options.model, lambda line: print_line(console, line))
    check_conversations(tokenizer, pools.examples())
    too_long: list[int] = []  # tokens
    with show_status(console, "counting tokens"):
        data = choose(options, pools, tokenizer, too_long=lambda x: too_long.append(_tokens(tokenizer, x)))
        content = _content(options, data, tokenizer, too_long)
    print_table(console, _table(content))
    for line in _remarks(options, content):
        print_line(console, line)
    for task, parts in content["examples"].items():
        print_line(console, "")
        print_line(console, f"the first example of {shown(task)}, what is learnt in {' '.join(_MARKS)}:")
        console.print(_shown_parts(parts), soft_wrap=True)
    if path is not None:
        with atomic_file(path) as new:
            new.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return content


def _content(options: TrainOptions, data: TaskData, tokenizer: Any, too_long: list[int]) -> dict[str, Any]:
    plain = train_rows(options, tokenizer, data, packing=False)
    trained, scored = (_sizes(rows) for rows in (plain, encoded_rows(tokenizer, data, data.test)))
    counts = data.counts()
    for number, splits in enumerate(counts["tasks"].values()):
        for split, usage in splits.items():
            sizes = trained if split == "train" else scored
            usage["tokens"] = lengths(sizes[number] if usage["used"] else [])
    packed = [(row["task_ids"], len(row["input_ids"])) for row in pack(plain, options.seq_len)]
    mixed = [task for task, _ in packed] if options.packing else plain["task_ids"]
    options = options.for_examples(len(mixed))
    sampler = sampler_of(options, data, mixed)
    for number, share in sampler.drawn().items():
        counts["tasks"][data.names[number]]["train"]["share"] = {"asked": sampler.shares[number], "drawn": share}
    found = overlaps(data.train, data.test)
    return {
        "written_by": MARK, "options": options.to_dict(), **counts,
        "too_long": {"rows": len(too_long), "longest": max(too_long, default=0)},
        "mixing": mixing_note(options, sampler, data.names),
        "padding": padding(plain, options.batch_size, sampler_of(options, data, plain["task_ids"])) | {
            "packed_rows": len(packed),
            "filled": sum(size for _, size in packed) / (len(packed) * options.seq_len),
        },
        "overlap": {
            "exact": sum(exact for *_, exact in found), "near": sum(not exact for *_, exact in found),
            "pairs": [[one.where or one.task, other.where or other.task] for one, other, _ in found[:_PAIRS]],
        },
        "examples": {name: learnt_parts(tokenizer, _first(number, plain)) for number, name in enumerate(data.names)},
    }  # fmt: skip


def _tokens(tokenizer: Any, example: Example) -> int:
    prompt, answers = encode_example(tokenizer, example)
    return len(prompt) + max(map(len, answers))


def _sizes(rows: Iterable[dict[str, Any]]) -> dict[int, list[int]]:
    """Returns the numbers of tokens of each task's rows."""
    sizes: dict[int, list[int]] = {}
    for row in rows:
        sizes.setdefault(row["task_ids"], []).append(len(row["input_ids"]))
    return sizes


def _first(task: int, rows: Iterable[dict[str, Any]]) -> dict[str, Any]:
    return next(row for row in rows if row["task_ids"] == task)


def _table(content: dict[str, Any]) -> Table:
    table = Table("task", "split", title="rows, the tokens of those used, and shares of the run's rows")
    for title in ("rows", "used", *_LENGTHS, "of the run"):
        table.add_column(title, justify="right")
    table.add_column("left out")
    for name, splits in content["tasks"].items():
        for number, (split, usage) in enumerate(splits.items()):
            tokens = [
                f"{usage['tokens'][key]:,}" if usage["tokens"] else "-" for key in ("min", "median", "p95", "max")
            ]
            reasons = [f"{count:,} {reason}" for reason, count in usage["left_out"].items()]
            reasons += [f"({usage['repeated']:,} repeated)"] if usage["repeated"] else []
            share = f"{usage['share']['drawn']:.0%}" if split == "train" else ""
            table.add_row(
                Text("" if number else shown(name)[1:-1]), split, f"{usage['rows']:,}", f"{usage['used']:,}", *tokens,
                share, Text(", ".join(reasons)),
            )  # fmt: skip
    return table


def _remarks(options: TrainOptions, content: dict[str, Any]) -> list[str]:
    lines, costs, overlap = list(content["notes"]), content["padding"], content["overlap"]
    lines += [content["mixing"]] * bool(content["mixing"])
    if content["too_long"]["rows"]:
        longest = content["too_long"]["longest"]
        lines.append(
            f"{content['too_long']['rows']:,} rows that were looked at have more than {options.seq_len:,} tokens: "
            f"--seq-len {longest} would keep all of them"
        )
    lines.append(
        f"padding: {costs['padding']:.0%} of the tokens of the first {costs['batches']:,} micro-batches, "
        + ("without packing" if options.packing else "as the run is")
    )
    lines.append(
        f"{'packed' if options.packing else 'with --packing'}: no padding, {costs['packed_rows']:,} rows of at most "
        f"{options.seq_len:,} tokens, {costs['filled']:.0%} full"
    )
    same = f"{overlap['exact']:,} training prompts are also scored, {overlap['near']:,} but for case and punctuation"
    examples = "; ".join(f"{one} and {other}" for one, other in overlap["pairs"])
    lines.append(same + (f" ({examples})" if examples else ""))
    return lines


def _shown_parts(parts: list[tuple[str, bool]]) -> Text:
    """Returns a text with marks and colour around what is learnt; a long part is cut in the middle."""
    text, most = Text(), _LETTERS // max(len(parts), 1)
    for part, learnt in parts:
        cut = len(part) - most
        part = part if cut <= 0 else f"{part[: most // 2]} [... {cut:,} letters ...] {part[len(part) - most // 2 :]}"
        text.append(part.join(_MARKS) if learnt else part, style="bold green" if learnt else "dim")
    return text
