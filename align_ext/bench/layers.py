"""Measures one adapted layer: forward and backward with the frozen base and dx, relative to the frozen layer."""

import functools
import importlib.util
import itertools
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from align_ext.alignment.context import align_step
from align_ext.architectures import ARCHITECTURES
from align_ext.bench.baselines import ALPHA, LORA, SEVERAL, Make, Sizes, compiled
from align_ext.bench.setting import TASKS, Case, Setting, name_of
from align_ext.bench.timing import ROW_MS, Call, Comparison, Goal, visits, wall_clock
from align_ext.config import AlignLoraConfig
from align_ext.model.replace import replace_linear_with_align_lora
from align_ext.system.terminal import PrintLine

FROZEN = "frozen layer alone"
SINGLE: dict[str, dict[str, Any]] = {"lora": {"architecture": "lora"}, "align_lora, kl": {"architecture": "align_lora"}}
HEADS: dict[str, dict[str, Any]] = {
    "m_lora": {"architecture": "m_lora", "init_lora_weights": "kaiming"},
    "m_lora, offset": {"architecture": "m_lora"},
    "r_lora": {"architecture": "r_lora", "init_lora_weights": "kaiming", "router_init": "kaiming"},
    "r_lora, offset": {"architecture": "r_lora"},
    "hydra": {"architecture": "hydra"},
    "hydra, offset": {"architecture": "hydra", "init_lora_weights": "random_heads"},
    "hydra, input_per_head": {"architecture": "hydra", "dropout_site": "input_per_head"},
    "lora_moe": {"architecture": "lora_moe"},
    # As a layer, and without the losses that depend on parameters or weights alone.
    "mtlora": {"architecture": "mtlora", "target_blocks": (), "balance": None, "spectral": None},
}
COMPILED = [name for name in LORA | SEVERAL if "PEFT" not in name]
FLOAT32 = ", float32 adapters"
# The largest ratios that are goals: name -> float32, 16 bits, and both for wide layers.
GOALS = dict.fromkeys(SINGLE, (1.12, 1.15, 1.04))
GOALS |= dict.fromkeys(("m_lora", "r_lora", "hydra"), (1.15, 1.20, 1.05))
GOALS |= dict.fromkeys(("m_lora, offset", "r_lora, offset", "hydra, offset"), (1.17, 1.22, 1.06))
GOALS |= {"hydra, input_per_head": (1.60, 1.60, 1.18)}
FLOAT32_GOALS = (1.25, 1.08)
WIDE = 2048  # in_features
TINY, TINY_MS = 16, 0.06  # width of a layer that has next to nothing to compute, and what its call may take
IN_A_ROW = 16
PROBED = 128  # tokens


def config(options: dict[str, Any], sizes: Sizes, *, float32: bool) -> AlignLoraConfig:
    """Returns an architecture's options for these sizes, with adapters in float32 or in the base's dtype."""
    several = ARCHITECTURES[options["architecture"]].defaults["num_heads"] is not None
    heads = {"num_heads": sizes.heads} if several else {}
    common = {
        "r": sizes.rank, "lora_alpha": ALPHA, "lora_dropout": sizes.dropout_p, "num_tasks": TASKS,
        "adapter_dtype": "float32" if float32 else "base",
    }  # fmt: skip
    return AlignLoraConfig.from_dict(common | heads | options)


def adapted(row: nn.Sequential, options: dict[str, Any], sizes: Sizes, *, float32: bool = False) -> nn.Module:
    """Adds an adapter of this package to each layer of a row."""
    targets = {"target_modules": [name for name, _ in row.named_children()]}
    return replace_linear_with_align_lora(row, config(options | targets, sizes, float32=float32))


def ours(options: dict[str, Any]) -> Make:
    """Returns a function that makes this package's layer."""

    def make(base: nn.Linear, sizes: Sizes, dtype: torch.dtype) -> nn.Module:
        return adapted(nn.Sequential(base), options, sizes, float32=dtype != base.weight.dtype)

    return make


class GivenGradient(torch.autograd.Function):
    """A loss of value 0 whose gradient in y is dy, as if it came from the model above the layer."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, dy: Tensor) -> Tensor:
        """Returns 0."""
        ctx.save_for_backward(dy)
        return y.new_zeros((), dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, d_loss: Tensor) -> tuple[Tensor, None]:
        """Returns dy."""
        return ctx.saved_tensors[0], None


def training_call(layer: nn.Module, x: Tensor, dy: Tensor) -> Call:
    """Returns a call of forward and backward in training, with alignment if the layer has it."""
    x = x.detach().requires_grad_()
    trained = [x, *(p for p in layer.train().parameters() if p.requires_grad)]
    # A row of one layer is called as the layer itself, as the frozen one and the others are.
    forward = layer[0] if isinstance(layer, nn.Sequential) and len(layer) == 1 else layer
    for weight in trained[1:]:  # heads that are zero would make gradients zero
        nn.init.normal_(weight, std=weight.shape[-1] ** -0.5)
    state: Any = getattr(layer, "align_state", None)
    ids = torch.arange(len(x), device=x.device) % TASKS

    def run() -> None:
        if state is None or not state.config.needs_step:
            forward(x).backward(dy)
        else:
            with align_step(layer, ids) as step:
                y = forward(x)
            step.total(GivenGradient.apply(y, dy)).backward()
        for leaf in trained:
            leaf.grad = None

    return run


def variants(
    makes: dict[str, Make], sizes: Sizes, shape: tuple[int, int], dtype: torch.dtype, device: str
) -> dict[str, Call]:
    """Returns calls of the frozen layer and of the adapted ones; a suffix of the name selects float32 adapters."""
    torch.manual_seed(0)
    n, m = shape
    x, dy = (torch.randn(sizes.tokens, width).to(device, dtype) for width in (n, m))
    base = nn.Linear(n, m, bias=False, device=device, dtype=dtype).requires_grad_(False)
    layers = {
        name: make(base, sizes, torch.float32 if name.endswith(FLOAT32) else dtype) for name, make in makes.items()
    }
    return {name: training_call(layer, x, dy) for name, layer in {FROZEN: base, **layers}.items()}


@functools.cache
def frozen_seconds(shape: tuple[int, int], dtype: torch.dtype, device: str) -> float:
    """Returns the seconds that both passes of a frozen layer take for each of PROBED tokens."""
    n, m = shape
    x, dy, weight = (torch.randn(size).to(device, dtype) for size in ((PROBED, n), (PROBED, m), (m, n)))

    def both(tokens: int) -> None:
        x[:tokens] @ weight.T, dy[:tokens] @ weight

    both(1)  # the first call may compile
    return wall_clock(lambda: both(PROBED)) / 1e3 / PROBED


def takes_too_long(setting: Setting, count: int, tokens: int, shape: tuple[int, int], dtype: torch.dtype) -> bool:
    """Whether a round of so many layers is left out, as one of bfloat16 is on a processor that only emulates it."""
    return count * tokens * frozen_seconds(shape, dtype, setting.device) > setting.longest_round


def available(makes: dict[str, Any]) -> dict[str, Any]:
    """Returns the variants that can run: without those of PEFT if it is not installed."""
    peft = importlib.util.find_spec("peft") is not None
    return {name: make for name, make in makes.items() if peft or not name.startswith("PEFT")}


def goals(names: dict[str, Any], in_features: int, dtype: torch.dtype) -> dict[str, Goal]:
    """Returns the goals of the variants that have one."""
    wide, narrow, result = in_features >= WIDE, dtype != torch.float32, {}
    for name in names:
        plain = name.removesuffix(FLOAT32)
        if plain in GOALS:
            limit = GOALS[plain][2 if wide else narrow]
            result[name] = Goal(limit if plain == name else max(limit, FLOAT32_GOALS[wide]))
    return result


def _cases(kind: str, setting: Setting, makes: dict[str, Make], mixed: dict[str, Make]) -> Iterator[Case]:
    """Yields a case per shape and dtype; the first ones also with torch.compile and, for 16 bits, with `mixed`."""
    for index, (shape, dtype) in enumerate(itertools.product(setting.shapes, setting.dtypes)):
        every = dict(makes)
        if index < setting.compiled:
            every |= {f"{name}, compiled": compiled(makes[name]) for name in COMPILED if name in makes}
        if dtype != torch.float32 and shape in setting.shapes[: setting.mixed]:
            every |= mixed
        yield Case(
            f"{kind}, forward + backward, {setting.sizes}", f"{shape[0]} -> {shape[1]}, {name_of(dtype)}",
            partial(_measured, setting, available(every), shape, dtype),
        )  # fmt: skip


def _measured(
    setting: Setting, makes: dict[str, Make], shape: tuple[int, int], dtype: torch.dtype, _: PrintLine
) -> Iterator[Comparison]:
    if takes_too_long(setting, len(makes), setting.sizes.tokens, shape, dtype):
        return
    calls = variants(makes, setting.sizes, shape, dtype, setting.device)
    for result in visits(calls, setting.rounds, setting.device, seconds=setting.share):
        result.goals = goals(calls, shape[0], dtype)
        yield result


def layers(setting: Setting) -> Iterator[Case]:
    """Measures one adapter: lora, align_lora; plain PyTorch, restructured, compiled, PEFT."""
    makes = {name: ours(options) for name, options in SINGLE.items()}
    mixed = {name + FLOAT32: make for name, make in (makes | LORA).items()}
    yield from _cases("one adapter", setting, makes | LORA, mixed)


def several(setting: Setting) -> Iterator[Case]:
    """Measures several heads: every architecture; the loops of the released code, restructured, compiled."""
    makes = {name: ours(options) for name, options in HEADS.items()}
    mixed = {name + FLOAT32: make for name, make in makes.items()}
    yield from _cases("several heads", setting, makes | SEVERAL, mixed)


def dispatch(setting: Setting) -> Iterator[Case]:
    """Measures the cost of a call that computes almost nothing, and the gain from a second thread."""
    sizes = replace(setting.sizes, tokens=4)
    tiny = f"forward + backward, {TINY} -> {TINY}, {sizes}"
    yield Case(f"calling, {tiny}", f"one of {IN_A_ROW} layers in a row", partial(_calls, setting, sizes, IN_A_ROW))
    yield Case(f"calling, {tiny}", "a step of one layer", partial(_calls, setting, sizes, 1))
    threads = torch.get_num_threads()
    if setting.device == "cpu" and threads > 1:
        for name in (FROZEN, *SINGLE, "r_lora, offset"):
            yield Case(
                f"threads, {setting.shapes[0][0]} -> {setting.shapes[0][1]}, float32, {setting.sizes}", name,
                partial(_over_threads, setting, name, threads),
            )  # fmt: skip


def _calls(setting: Setting, sizes: Sizes, count: int, _: PrintLine) -> Iterator[Comparison]:
    """Measures a step of several layers, divided by their number, which shows the cost of the step itself."""
    torch.manual_seed(0)

    def row() -> nn.Sequential:
        linears = (nn.Linear(TINY, TINY, bias=False, device=setting.device) for _ in range(count))
        return nn.Sequential(*linears).requires_grad_(False)

    own: dict[str, Any] = available(SINGLE | HEADS)
    rows = {FROZEN: row()} | {name: adapted(row(), options, sizes) for name, options in own.items()}
    for name, make in available(LORA).items():
        rows[name] = nn.Sequential(*(make(layer, sizes, torch.float32) for layer in row()))
    x, dy = (torch.randn(sizes.tokens, TINY, device=setting.device) for _ in range(2))
    calls = {name: training_call(layers, x, dy) for name, layers in rows.items()}
    for result in visits(
        calls, setting.rounds, setting.device, host=True, repeats=2 * IN_A_ROW // count, row_ms=ROW_MS,
        seconds=setting.share,
    ):  # fmt: skip
        result = result.per(count)
        if count > 1:
            result.goals = dict.fromkeys(own, Goal(TINY_MS, in_ms=True))
        yield result


def _over_threads(setting: Setting, name: str, threads: int, _: PrintLine) -> Iterator[Comparison]:
    makes = {n: ours(options) for n, options in (SINGLE | HEADS).items() if n == name}
    call = variants(makes, setting.sizes, setting.shapes[0], torch.float32, setting.device)[name]

    def on(count: int) -> Call:
        def run() -> None:
            torch.set_num_threads(count)
            call()
            torch.set_num_threads(threads)

        return run

    calls = {"1 thread": on(1), f"{threads} threads": on(threads)}
    return visits(calls, setting.rounds, setting.device, seconds=setting.share)


AXES = {"tokens": (512, 1024, 2048, 4096), "rank": (4, 8, 16, 32, 64), "heads": (1, 2, 4, 8, 16)}


def sweep(setting: Setting) -> Iterator[Case]:
    """Measures the ratio while one of tokens, rank and heads varies: the points of the plots."""
    kinds = {"align_lora, kl": ours(SINGLE["align_lora, kl"]), "r_lora": ours(HEADS["r_lora"])}
    makes = kinds | {"R-LoRA, loop": SEVERAL["R-LoRA, loop"]}
    for axis, values in AXES.items():
        for value in values:
            sizes = replace(setting.sizes, **{axis: value})
            yield Case(
                f"sweep over {axis}, {setting.shapes[0][0]} -> {setting.shapes[0][1]}, float32", str(sizes),
                partial(_point, setting, makes, sizes, (axis, value)),
            )  # fmt: skip


def _point(
    setting: Setting, makes: dict[str, Make], sizes: Sizes, point: tuple[str, int], _: PrintLine
) -> Iterator[Comparison]:
    calls = variants(makes, sizes, setting.shapes[0], torch.float32, setting.device)
    for result in visits(calls, setting.rounds, setting.device, seconds=lambda: setting.share() / 4):
        result.point = point
        yield result
