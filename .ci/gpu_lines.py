"""The lines of gpu_check.py: everything that an emulator cannot see, each a process of its own."""

from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
OWN = ("regex", "rich", "safetensors", "yaml")  # what the package needs beside torch; its operators do not
OPERATORS = ("grouped_lora", "sibling_lora", "dropout_sum", "routed_lora", "gaussian_kl", "mk_mmd")


class Line(NamedTuple):
    """A row of the table.

    Attributes:
        group: what a run can be limited to, as well as to a name.
        name: of the row.
        checked: what a passed line says.
        code: for `python -c`; or, without it, pytest runs.
        arguments: of the code, or of pytest.
        on_gpu: further arguments, on a GPU.
        dry: further arguments, in a dry run.
        needs: modules; "2 GPUs"; "40 GiB" of memory; "ncu", whose path replaces NCU among the arguments.
        sanitizer: options of compute-sanitizer, which runs the command.
        seconds: after which the line has failed.
        table: whether its output belongs into the results.
    """

    group: str
    name: str
    checked: str
    code: str = ""
    arguments: tuple[str, ...] = ()
    on_gpu: tuple[str, ...] = ()
    dry: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
    sanitizer: tuple[str, ...] = ()
    seconds: int = 900
    table: bool = False


def script(path: str) -> str:
    """Code that runs a file."""
    return f"import runpy, sys; sys.argv[0] = {path!r}; runpy.run_path({path!r}, run_name='__main__')"


def operator(name: str, checked: str = "forward and every gradient, all sizes and dtypes", *needs: str) -> Line:
    """All tests of a file of python_tests/ops."""
    return Line(
        "operators", name, checked, "", (f"python_tests/ops/test_{name}.py",), dry=("--every", "40", "--fuzz", "3"),
        needs=needs,
    )  # fmt: skip


def on_gpu(name: str, checked: str, test: str, *needs: str, seconds: int = 900) -> Line:
    """Tests of python_tests/gpu."""
    arguments = (f"python_tests/gpu/{test}",)
    return Line("streams and memory", name, checked, "", arguments, dry=("--every", "3"), needs=needs, seconds=seconds)


def models(name: str, checked: str, test: str, *needs: str) -> Line:
    """Tests of python_tests/gpu with a model, whose dry run takes a few of many cases."""
    arguments = (f"python_tests/gpu/{test}",)
    return Line("models", name, checked, "", arguments, dry=("--every", "12"), needs=(*OWN, "transformers", *needs))


SMALL = "match_the_reference or many_tiles or float32_adapters or literal_pairs or tables_of_all_layers or same_bits"


def sanitized(tool: str, *options: str, selection: str = SMALL) -> Line:
    """Every operator, every dtype, both passes, under a tool of compute-sanitizer."""
    return Line(
        "compute-sanitizer", tool, "nothing is found in every operator, both passes",
        "", ("python_tests/ops", "--ignore", "python_tests/ops/test_arguments.py", "-k", selection),
        on_gpu=("--every", "4"), dry=("--every", "400"), sanitizer=("--tool", tool, *options), seconds=3600,
    )  # fmt: skip


def benchmark(path: Path) -> Line:
    """A table of times."""
    return Line(
        "benchmarks", f"times of {path.stem.removeprefix('bench_')}", "in a table below; the figure is the last one's",
        script(f"benchmarks/{path.name}"),
        on_gpu=("--device", "cuda"), dry=("--quick",), needs=(*OWN, *NEEDS.get(path.stem, ())), seconds=1800,
        table=True,
    )  # fmt: skip


def adapter_tax(rival: str, *needs: str) -> Line:
    """The time that ours and others' adapters add."""
    checked = f"what adapters add to a frozen layer, beside {rival}'s, in a table below"
    line = benchmark(ROOT / "benchmarks" / ADAPTER_TAX)
    return line._replace(name=f"adapter tax, {rival}", checked=checked, arguments=(rival,), needs=(*line.needs, *needs))


NEEDS = {"bench_align_step": ("transformers",)}
ADAPTER_TAX = "bench_adapter_tax.py"
KERNEL_TIMES = script("benchmarks/kernel_times.py")
KERNELS = (
    "import align_ext; from align_ext.ops._native import build_info; ops = align_ext.backend()['ops']; print(ops);"
    "print('figure:', build_info.cuda_archs or 'SIMT');"
    "assert all(on['cuda'] == 'native' for on in ops.values()) or hasattr(build_info, 'launches')"
)
DOCTOR = "from align_ext.diagnostics import doctor; raise SystemExit(not doctor.run())"
LINES = [
    Line("installation", "kernels", "the build has CUDA kernels of every operator", KERNELS),
    Line("installation", "doctor", "versions go together, the self-tests pass", DOCTOR, needs=OWN),
    *map(operator, OPERATORS),
    operator("philox", "the bits of dropout masks"),
    operator("arguments", "wrong arguments are refused by name", "hypothesis", *OWN),
    on_gpu("the same bits twice", "every operator, both passes, beside other work", "test_streams.py::test_same_bits"),
    on_gpu("side stream", "every operator waits for its stream alone", "test_streams.py::test_side_stream"),
    on_gpu("second device", "tensors of a device that is not current", "test_streams.py::test_second_device", "2 GPUs"),
    on_gpu("views", "views that are not aligned, of any strides", "test_views.py"),
    on_gpu("large", "tensors of more than 2^31 elements", "test_large.py", "40 GiB"),
    on_gpu("CUDA graphs", "a captured forward and backward on new inputs", "test_graphs.py"),
    models("architectures", "gradients of all architectures x checkpointing modes", "test_models.py::test_gradients"),
    models("experts", "gradients of adapted experts, with alignment", "test_models.py::test_experts"),
    models("training twice", "steps of training have the same bits twice", "test_models.py::test_same_training"),
    models("reduce-overhead", "torch.compile's CUDA graphs, with alignment", "test_models.py::test_reduce_overhead"),
    models("Trainer", "AlignTrainer(bf16=True): gradients", "test_trainers.py::test_trainer", "accelerate", "datasets"),
    models("SFTTrainer", "AlignSFTTrainer(bf16=True): gradients", "test_trainers.py::test_sft_trainer", "trl"),
    # Errors of the API are torch's to raise. racecheck and synccheck look at this package's kernels, not at the
    # vendor's. initcheck has to see whatever writes memory, so nothing is filtered: base_out, the form without a GEMM.
    sanitized("memcheck", "--report-api-errors", "no"),
    sanitized("racecheck", "--kernel-name", "kns=5align4cuda"),
    sanitized("synccheck", "--kernel-name", "kns=5align4cuda"),
    sanitized("initcheck", selection=f"({SMALL}) and not weight"),
    Line(
        "kernels", "kernel times", "of each kernel, by torch's profiler, beside the model's", KERNEL_TIMES,
        dry=("--quick",), table=True,
    ),
    Line(
        "kernels", "kernel bytes", "of each kernel, by Nsight Compute, beside the model's", KERNEL_TIMES,
        on_gpu=("--ncu", "NCU"), dry=("--csv", "python_tests/gpu/ncu.csv"), needs=("ncu",), table=True,
    ),
    adapter_tax("loop"),
    adapter_tax("peft", "peft"),
    adapter_tax("unsloth", "unsloth"),
    *(benchmark(path) for path in sorted((ROOT / "benchmarks").glob("bench_*.py")) if path.name != ADAPTER_TAX),
]  # fmt: skip
