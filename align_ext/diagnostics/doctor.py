"""align-lora doctor: checks that this installation computes correct results on every device."""

from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor

from align_ext import ops, reference
from align_ext.adapters import adapter_class
from align_ext.adapters.mixlora import Rows
from align_ext.alignment.model_state import AlignState
from align_ext.architectures import ARCHITECTURES
from align_ext.config import AlignLoraConfig
from align_ext.diagnostics.cuda_versions import installed_versions
from align_ext.ops._backend import OPS, backend, has_kernel
from align_ext.ops._native import build_info
from align_ext.system.terminal import plain_console, print_table

Test = Callable[[torch.device, torch.dtype], float]

# The largest allowed error against the float64 reference, relative to the largest element of the result.
_ALLOWED = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}


def run(console: Console | None = None) -> bool:
    """Prints what is installed and tests every operator on every device; returns True if all tests pass."""
    console = console or plain_console()
    facts = backend()
    for title in ("versions", "built_with", "devices"):
        text = "  ".join(f"{k}={_format_value(v)}" for k, v in facts[title].items())
        console.print(Text.assemble((title, "bold"), "  ", text))
    cuda = installed_versions()
    console.print(Text.assemble(("CUDA", "bold"), f"  {cuda}"))
    advice = cuda.advice()
    if advice is not None:
        console.print(Text(advice.text, "red" if advice.broken else "yellow"))
    devices = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    table = Table("operator", "device", "path", "self-test", title="operators")
    healthy = advice is None or not advice.broken
    for device in devices:
        for op in OPS:
            if not has_kernel(op, device.split(":")[0]):
                table.add_row(op, device, "none", Text("not in this build", "yellow"))
                continue
            verdict = next(
                filter(None, (_verdict(_TESTS[op], torch.device(device), dtype) for dtype in _ALLOWED)), None
            )
            healthy = healthy and verdict is None
            table.add_row(op, device, "native", _format_verdict(verdict))
    print_table(console, table)
    for device in devices:
        if not all(has_kernel(op, device.split(":")[0]) for op in OPS):
            continue
        verdicts = {name: _verdict(_architecture(name), torch.device(device), torch.float32) for name in ARCHITECTURES}
        healthy = healthy and not any(verdicts.values())
        parts = [part for name, bad in verdicts.items() for part in ("  ", name, " ", _format_verdict(bad))]
        console.print(Text.assemble(("architectures", "bold"), f" on {device}", *parts))
    if facts["built_with"]["cuda_archs"] and torch.version.cuda and not build_info.finds_cuda_stream():
        console.print(Text("the CUDA kernels do not find torch's current stream: this torch is not known", "red"))
        healthy = False
    console.print(Text("healthy", "green") if healthy else Text("broken: rebuild with `pip install .`", "red"))
    return healthy


def _format_verdict(verdict: str | None) -> Text:
    return Text("ok", "green") if verdict is None else Text(verdict, "red")


def _format_value(value: object) -> str:
    return " ".join(value) or "none" if isinstance(value, list) else str(value)


def _verdict(test: Test, device: torch.device, dtype: torch.dtype) -> str | None:
    """Runs a self-test; returns the failure, or None."""
    try:
        error = test(device, dtype)
    except Exception as failure:  # a self-test reports whatever happens
        return f"{dtype}: {type(failure).__name__}: {failure}"
    return None if error <= _ALLOWED[dtype] else f"{dtype}: relative error {error:.1e} > {_ALLOWED[dtype]:.0e}"


def _error(actual: list[Tensor], exact: list[Tensor]) -> float:
    pairs = zip(actual, exact, strict=True)
    return max(((a.cpu().double() - e).abs().max() / e.abs().max().clamp_min(1e-30)).item() for a, e in pairs)


def _gradients(call: Callable[..., tuple[Tensor, ...]], inputs: list[Tensor], grads: list[Tensor]) -> list[Tensor]:
    leaves = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    outputs = call(*leaves)
    torch.autograd.backward(outputs, [g.to(o) for g, o in zip(grads, outputs, strict=True)])
    return [*(output.detach() for output in outputs), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


def _projection_error(
    op: str, device: torch.device, inputs: list[Tensor], grads: list[Tensor], options: dict[str, Any]
) -> float:
    """Returns the error of a projection; inputs: x, adapters, base_out; tensors in options are moved to the device."""

    def call(namespace: Any, target: torch.device) -> Callable[..., tuple[Tensor, ...]]:
        placed = {name: o.to(target) if isinstance(o, Tensor) else o for name, o in options.items()}
        function = getattr(namespace, op)
        return lambda *leaves: function(*leaves[:-1], 0.5, base_out=leaves[-1], **placed)

    exact = _gradients(call(reference, torch.device("cpu")), [t.double() for t in inputs], grads)
    return _error(_gradients(call(ops, device), [t.to(device) for t in inputs], grads), exact)


def _normal(*shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator) for shape in shapes]


def _test_grouped_lora(device: torch.device, dtype: torch.dtype) -> float:
    tensors = _normal((37, 67), (3, 5, 67), (3, 45, 5), (37, 45), (37, 45), (37, 5))
    options = {"group": torch.arange(37) % 3, "dropout_p": 0.2, "rng": torch.tensor([12345, 678])}
    return _projection_error("grouped_lora", device, [t.to(dtype) for t in tensors[:4]], tensors[4:], options)


def _test_sibling_lora(device: torch.device, dtype: torch.dtype) -> float:
    layers = {"A": (5, 67), "B": (45, 5), "weight": (45, 67)}
    tensors = _normal((37, 67), *(shape for shape in layers.values() for _ in range(2)), (37, 45), (37, 45))
    x, *of_layers = (t.to(dtype) for t in tensors[:7])

    def call(namespace: Any, target: torch.device) -> Callable[..., tuple[Tensor, ...]]:
        rng = torch.tensor([12345, 678], device=target)

        def run(x: Tensor, *t: Tensor) -> tuple[Tensor, ...]:
            weight = [of_layer.detach() for of_layer in t[4:]]
            y, *_ = namespace.sibling_lora(x, t[:2], t[2:4], [0.5, 1.0], dropout_p=0.2, rng=rng, weight=weight)
            return (*y,)

        return run

    exact = _gradients(call(reference, torch.device("cpu")), [t.double() for t in (x, *of_layers)], tensors[7:])
    return _error(_gradients(call(ops, device), [t.to(device) for t in (x, *of_layers)], tensors[7:]), exact)


def _test_dropout_sum(device: torch.device, dtype: torch.dtype) -> float:
    tensors = _normal((37, 67), (5, 67), (3, 45, 5), (37, 45), (37, 45), (37, 5))
    options = {"site": "latent", "dropout_p": 0.2, "rng": torch.tensor([12345, 678])}
    return _projection_error("dropout_sum", device, [t.to(dtype) for t in tensors[:4]], tensors[4:], options)


def _test_routed_lora(device: torch.device, dtype: torch.dtype) -> float:
    sizes = [(37, 67), (4, 5, 67), (4, 45, 5), (3 * 4, 67), (37, 45)]
    x, A, B, R, base, *grads = _normal(*sizes, (37, 45), (37, 4, 5), (37, 3, 4))
    options = {"site": "input", "top_k": 2, "dropout_p": 0.2, "rng": torch.tensor([12345, 678])}
    inputs = [t.to(dtype) for t in (x, A, B, R / 67**0.5, base)]
    return _projection_error("routed_lora", device, inputs, grads, options)


def _test_gaussian_kl(device: torch.device, dtype: torch.dtype) -> float:
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(200, 7, generator=generator).to(dtype)
    task = torch.arange(200) % 5 - 1

    def call(op: Callable[..., Tensor], target: torch.device) -> Callable[[Tensor], tuple[Tensor]]:
        return lambda z: (op(z, task.to(target), 4),)

    exact = _gradients(call(reference.gaussian_kl, torch.device("cpu")), [z.double()], [torch.ones(())])
    return _error(_gradients(call(ops.gaussian_kl, device), [z.to(device)], [torch.ones(())]), exact)


def _test_mk_mmd(device: torch.device, dtype: torch.dtype) -> float:
    generator = torch.Generator().manual_seed(0)
    task = torch.arange(200) % 5 - 1
    z = (torch.randn(200, 7, generator=generator) + 0.3 * task[:, None]).to(dtype)

    def call(op: Callable[..., Tensor], target: torch.device) -> Callable[[Tensor], tuple[Tensor]]:
        return lambda z: (op(z, task.to(target), 4, n_max=30),)

    exact = _gradients(call(reference.mk_mmd, torch.device("cpu")), [z.double()], [torch.ones(())])
    return _error(_gradients(call(ops.mk_mmd, device), [z.to(device)], [torch.ones(())]), exact)


def _architecture(name: str) -> Test:
    """Returns the self-test of an architecture on a linear layer 8 -> 8: forward and backward against plain PyTorch."""

    def test(device: torch.device, dtype: torch.dtype) -> float:
        options: dict[str, Any] = {"target_blocks": (), "align": None, "balance": None, "spectral": None}
        config = AlignLoraConfig(architecture=name, r=2, num_tasks=2, **options)  # type: ignore[arg-type]
        adapter = adapter_class(config)(config, 8, 8, *((8, True) if config.row.mixture else ())).eval()
        generator = torch.Generator().manual_seed(0)
        x, base, grad = (torch.randn(6, 8, generator=generator) for _ in range(3))
        for tensor in (*adapter.parameters(), *adapter.buffers()):
            torch.nn.init.normal_(tensor, std=0.5, generator=generator)  # no router is sure
        adapter.state = AlignState(config)
        adapter.state.task = 1
        tensors = [x, base, *(p.detach() for p in adapter.parameters())]

        def ours(x: Tensor, base: Tensor, *parameters: Tensor) -> tuple[Tensor]:
            named = dict(zip((n for n, _ in adapter.named_parameters()), parameters, strict=True))
            if not config.row.mixture:
                return (torch.func.functional_call(adapter, named, (x,), {"base_out": base}),)
            logits = torch.func.functional_call(adapter.lora_router, {"lora_R": named["lora_router.lora_R"]}, (x,))
            rows = adapter.mixture.rows = Rows.of(x, logits, config.latents)  # of a block of this layer alone
            options = {"base_out": rows.repeat(base)}
            return (rows.mix(torch.func.functional_call(adapter, named, (rows.repeated,), options)),)

        def plain(x: Tensor, base: Tensor, *parameters: Tensor) -> tuple[Tensor]:
            named = dict(zip((n for n, _ in adapter.named_parameters()), parameters, strict=True))
            return (base + config.scaling * _low_rank(x, config, named | dict(adapter.named_buffers())),)

        exact = _gradients(plain, [t.double() for t in tensors], [grad])
        adapter.to(device)
        return _error(_gradients(ours, [t.to(device, dtype) for t in tensors], [grad]), exact)

    return test


def _low_rank(x: Tensor, config: AlignLoraConfig, tensors: dict[str, Tensor]) -> Tensor:
    """Computes the architectures' formulas without dropout and scaling: Σ_i w_i B_i A_i x - B0 A0 x."""
    A, B, R = tensors["lora_A"], tensors["lora_B"], tensors.get("lora_router.lora_R")
    if config.architecture == "multi_adapter":
        A, B = A[1], B[1]
    elif config.architecture == "malora":
        A = tensors["lora_C"] @ A
    elif config.architecture == "adalora":
        A = tensors["lora_E"] * A
    elif config.architecture == "nlora":
        B = B @ tensors["lora_N"]
    elif config.architecture == "mtlora_cvpr":
        A, B = A[[0, 2]], B[[0, 2]]
    elif config.architecture == "moelora":
        B = (tensors["lora_gate"] @ tensors["lora_task"][1]).softmax(0)[:, None, None] * B
    elif config.architecture == "multilora":
        B = tensors["lora_scaling"][:, :, None] * B
    A, B = (t if t.dim() == 3 else t[None] for t in (A, B))
    heads = torch.einsum("tn,irn,imr->tim", x, A.expand(len(B), -1, -1), B)
    if R is not None:  # weights [T, G, N], each for 8 / G outputs
        logits = (x @ R.T).unflatten(1, (config.routing_groups or 1, -1))
        least = logits.topk(config.top_k or len(B), 2).values[..., -1:]
        w = logits.masked_fill(logits < least, -torch.inf).softmax(2)
        heads = heads * w.mT.repeat_interleave(8 // w.shape[1], 2)
    offset = x @ tensors["lora_A0"].double().T @ tensors["lora_B0"].double().T if "lora_A0" in tensors else 0.0
    return heads.sum(1) - offset


_TESTS: dict[str, Test] = {
    "grouped_lora": _test_grouped_lora,
    "sibling_lora": _test_sibling_lora,
    "dropout_sum": _test_dropout_sum,
    "routed_lora": _test_routed_lora,
    "gaussian_kl": _test_gaussian_kl,
    "mk_mmd": _test_mk_mmd,
}
