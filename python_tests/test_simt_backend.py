"""The CUDA path, from Python to the kernels, without a GPU: an extension that runs them on the SIMT engine.

Whatever the engine finds in a kernel (races, bounds, memory read before it is written) is an error of the operator.
"""

import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from tiny import adapted, batch, llama
from torch.utils._python_dispatch import TorchDispatchMode

from align_ext import align_parts

TESTS = Path(__file__).parent
OPS = sorted({path.stem for path in (TESTS.parent / "csrc/cuda").glob("*.cu")} - {"projection"})
STEPS = 3
ONE_LAYER = {"num_hidden_layers": 1, "intermediate_size": 56}
TRAINED = {  # each operator trains something: model and options
    "align_lora": ({}, {}),
    "m_lora": (ONE_LAYER, {"architecture": "m_lora", "num_heads": 2, "align": "kl"}),
    "hydra": (ONE_LAYER, {"architecture": "hydra", "num_heads": 3, "balance": "cv2"}),
    "r_lora with mmd": (ONE_LAYER, {"architecture": "r_lora", "num_heads": 2, "align": "mmd"}),
}


@pytest.fixture(scope="session")
def simt_python(native_build, tmp_path_factory):
    """Runs this Python with that extension as align_ext._C; returns what it printed."""
    (extension,) = native_build.glob("_C.*.so")
    environment = os.environ | {"ALIGN_SIMT_EXTENSION": str(extension), "PYTHONPATH": str(TESTS)}
    elsewhere = tmp_path_factory.mktemp("elsewhere")  # the sources beside the tests are not the installed package

    def run(*arguments):
        command = [sys.executable, *map(str, arguments)]
        result = subprocess.run(
            command, env=environment, cwd=elsewhere, capture_output=True, text=True, errors="replace", check=False
        )
        assert result.returncode == 0, f"{result.stdout}\n{result.stderr}"
        return result.stdout

    return run


# The C++ tests run the kernels of all of them on the same engine.
@pytest.mark.parametrize(
    "op",
    [
        "arguments",
        "mk_mmd_layers",
        *(pytest.param(op, marks=[pytest.mark.slow] * (op in ("dropout_sum", "mk_mmd", "routed_lora"))) for op in OPS),
    ],
)
def test_the_tests_of_the_operators_pass_on_the_cuda_kernels(simt_python, op, request):
    share = ("--fuzz=25", "--every=1") if request.config.getoption("--slow") else ("--fuzz=5", "--every=4")
    options = ("-q", "-n0", "-p", "no:cacheprovider", "-p", "simt_extension", "--device=simt", *share)
    output = simt_python("-m", "pytest", *options, TESTS / f"ops/test_{op}.py")
    passed, kernels = (int(re.search(text, output)[1]) for text in (r"(\d+) passed", r"SIMT engine: (\d+) kernels"))
    skipped = Counter()
    for number, reason in re.findall(r"SKIPPED \[(\d+)\] .*?: (.*)", output):
        skipped[reason] += int(number)
    print(f"{op}: {passed} passed, {kernels} kernels, skipped:", dict(skipped))
    assert passed > sum(skipped.values())
    assert kernels > passed / 2  # few tests stop before the kernels, at a bad argument say


UNWRITTEN = """
import simt_extension, torch
from align_ext import ops
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    z, task, tables = torch.zeros(5, 1, dtype=dtype), torch.zeros(5, dtype=torch.int64), torch.zeros(1, 1, 3)
    dz = torch.ops.align_ext.gaussian_kl_backward(torch.ones(()), 1.0, [z], task, tables)
    assert dz.isnan().sum() == dz.numel() - 5 == 11, dz  # one layer's 5 elements, and room up to the next one's place
"""


def test_what_no_kernel_writes_is_nan_in_a_build_for_tests(simt_python):
    simt_python("-c", UNWRITTEN)


def train(sizes, options):
    """Steps of a tiny Llama with its losses, dropout and SGD: losses, gradients and the adapters at the end, by name.

    SGD, for Adam divides by the gradients' own size, which turns the rounding of a tiny one into a whole step.
    """
    model = adapted(llama(**sizes), dtype=torch.float32, lora_dropout=0.1, **options)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    before = {name: p.detach().clone() for name, p in trained.items()}
    optimizer = torch.optim.SGD(trained.values(), lr=0.2)
    torch.manual_seed(0)  # the dropout masks'
    results = {}
    for step in range(STEPS):
        inputs, tasks = batch(step)
        optimizer.zero_grad()
        model(**inputs, task_ids=tasks).loss.backward()
        parts = align_parts(model)
        values = {"lm": parts.lm, "align": parts.align, "balance": parts.balance}
        results |= {f"{step} {name}": torch.tensor(value) for name, value in values.items() if value}
        results |= {f"{step} gradient of {name}": p.grad.clone() for name, p in trained.items()}
        optimizer.step()
    return results | {f"change of {name}": p.detach() - before[name] for name, p in trained.items()}


TRAINING = """
import simt_extension, sys, torch
from test_simt_backend import TRAINED, train
torch.save(train(*TRAINED[sys.argv[2]]), sys.argv[1])
print(simt_extension.launches())
"""


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] * (n in ("m_lora", "hydra"))) for n in TRAINED]
)
def test_training_on_the_cuda_kernels_is_training_on_the_cpu_kernels(simt_python, tmp_path, name):
    kernels = int(simt_python("-c", TRAINING, tmp_path / "results.pt", name))
    actual, expected = torch.load(tmp_path / "results.pt", weights_only=True), train(*TRAINED[name])
    assert kernels >= STEPS * len(OPS)
    assert actual.keys() == expected.keys()
    errors = {name: ((actual[name] - e).abs().max() / e.abs().max()).item() for name, e in expected.items()}
    worst = max(errors, key=errors.get)
    print(f"{kernels} kernels; the largest difference is {errors[worst]:.1e}, of {worst}")
    # Both sum in float32 (eps 6e-8), in other orders: sqrt(1000) roundings of one sum, amplified by the division by
    # small variances in the alignment and carried through two layers and three steps.
    assert errors[worst] < 1e-4, worst


def count_launches(launches, align="kl"):
    """The kernels that each operator launches in a step, call by call."""

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
            before = launches()
            result = operator(*args, **(kwargs or {}))
            if launches() > before:
                counts.setdefault(operator.name(), []).append(launches() - before)
            return result

    steps = []
    for dtype, rank in ((torch.float32, 4), (torch.bfloat16, 4), (torch.bfloat16, 24)):
        model, (inputs, tasks) = adapted(dtype=dtype, r=rank, lora_dropout=0.1, align=align), batch()
        counts = {}
        with Count():
            model(**inputs, task_ids=tasks).loss.backward()
        steps.append(counts)
    return steps


COUNTING = """
import json, simt_extension, sys
from test_simt_backend import count_launches
print(json.dumps(count_launches(simt_extension.launches, sys.argv[1])))
"""


@pytest.mark.parametrize(("align", "most"), [("kl", 4), ("mmd", 8)])
def test_the_alignment_of_all_layers_takes_a_few_launches_and_an_adapted_layer_five(simt_python, align, most):
    """Two more of a layer are the vendor's: the base layer's product, forward and backward."""
    for counts in json.loads(simt_python("-c", COUNTING, align).splitlines()[-1]):
        print(counts)
        for op, layers in (("grouped_lora", 1), ("sibling_lora", 2)):  # down; gate and up
            forward, backward = counts.pop(f"align_ext::{op}"), counts.pop(f"align_ext::{op}_backward")
            assert len(forward) == len(backward) == 2  # layers of the model
            assert max(forward) + max(backward) <= 5 * layers
        assert sum(map(sum, counts.values())) == most
