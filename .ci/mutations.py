"""Breaks the seam and the kernels on purpose, one place at a time, and sees that some test falls each time.

Python mutants run the Python tests named with them; C++ mutants run a C++ test. Works on a copy of the tree, with the
extension built in place (pip install -e .). Exits with 1 unless every mutant is killed.

Usage: python .ci/mutations.py [--check] [word]; --check runs nothing and looks for the places and tests alone.
"""

import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]


class Mutant(NamedTuple):
    """A change of the sources and the test that must notice it."""

    what: str
    file: str
    before: str
    after: str
    test: str  # pytest arguments, or the name of a C++ test


BATCH = "python_tests/test_batch.py -k 'exact_in_every_mode and False or reference_amount or parts_add_up'"
STEP, OUTPUTS = "align_ext/alignment/step.py", "align_ext/alignment/outputs.py"
# fmt: off
MUTANTS = [  # the seam, from task ids to the gradient in every latent
    Mutant("drop the KL term", STEP, "LATENT: self._weight * scale", "LATENT: 0.0 * scale", BATCH),
    Mutant("the KL without a gradient", STEP,
           "differentiate(d_total, ctx", "differentiate(d_total, 0 * ctx", BATCH),
    Mutant("detach z", "align_ext/alignment/tap.py",
           "return *dy, step.pop_gradient(layer, LATENT), dw", "return *dy, None, dw", BATCH),
    Mutant("ignore the attention mask", "align_ext/alignment/tokens.py",
           "TokenTasks(torch.where(keep.to(ids.device), ids, NO_TASK))", "TokenTasks(ids.expand(keep.shape))", BATCH),
    Mutant("ignore the incoming gradient", STEP,
           "differentiate(d_total, ctx.factor", "differentiate(d_total / d_total, ctx.factor", BATCH),
    Mutant("record again in recomputation", OUTPUTS,
           "_current_graph_task_id() != -1:\n            return",
           "_current_graph_task_id() == -2:\n            return", BATCH),
    Mutant("recompute in the wrong step", "align_ext/alignment/activation_checkpoint.py",
           "outer, state.current = state.current, step\n            try:\n                return function",
           "outer = state.current\n            try:\n                return function", BATCH),
    Mutant("a step stays in backward", OUTPUTS,
           "self.state.in_backward[:] = [step for step in self.state.in_backward if step is not self]",
           "pass", "python_tests/test_batch.py python_tests/test_batch_errors.py -k disarmed"),
    Mutant("forget the number of processes", STEP,
           "factors[LATENT] * world * parts", "factors[LATENT] * parts", "python_tests/test_batch.py -k two_processes"),
    Mutant("merge moments without the shift of means", "align_ext/losses/kl.py",
           "m1 + m2 + delta * delta * n1 * share", "m1 + m2", "python_tests/test_batch.py -k two_processes"),
    Mutant("exact accumulation with other dropout masks than its first pass", "align_ext/training/trainer.py",
           "part.restore_rng()", "pass", "python_tests/hf/test_trainer.py -k exact_accumulation"),
    # the kernels
    Mutant("ignore the dropout mask in z", "csrc/cpu/skinny.cpp",
           "xd[i] = masks.template apply<W, A>(load_x(x.at[t + i] + c), t + i, c);",
           "xd[i] = load_x(x.at[t + i] + c);", "test_grouped_lora"),
    Mutant("ignore the dropout mask in dx", "csrc/cpu/skinny.cpp",
           "term.scale * masks[k].template apply<W, A>(sum, row, column)", "term.scale * sum", "test_grouped_lora"),
    Mutant("forget the scale of kept elements", "csrc/cpu/projection_block.cpp",
           "term.g.row(i)[j] *= term.scale", "term.g.row(i)[j] *= 1", "test_grouped_lora"),
    Mutant("give every head the first head's mask on x", "csrc/cpu/projection.cpp",
           "mask.first = k * plan.shape.in_dim;", "", "test_dropout_sum"),
    Mutant("leave the last chunk of rows out of dA and dB", "csrc/cpu/projection.cpp",
           "add_up<A>(partials, int64_t(chunks.size()), scale",
           "add_up<A>(partials, std::max<int64_t>(int64_t(chunks.size()) - 1, 1), scale", "test_grouped_lora"),
    Mutant("begin every row's mask in a whole byte", "csrc/cpu/dropout.h",
           "{bytes + bit / 8, uint32_t(bit % 8)}", "{bytes + bit / 8, 0}", "test_philox"),
    Mutant("rows in a row all have the first one's mask", "csrc/cpu/skinny.h",
           "return number(rows.first) % 8 + i * row_elements;", "return number(rows.first) % 8;", "test_grouped_lora"),
    Mutant("forget the mean in the softmax's backward", "csrc/cpu/routed_lora.cpp",
           "w[h] * (d[h] - mean)", "w[h] * d[h]", "test_routed_lora"),
    Mutant("forget the routing weights in dB", "csrc/cpu/projection_block.cpp",
           "weights.data ? scratch.weighted : scratch.u", "scratch.u", "test_routed_lora"),
    Mutant("drop the variances' term of the KL", "csrc/cpu/gaussian_kl.cpp",
           "active / sums.v[l] * sums.spread[l] + ", "", "test_gaussian_kl"),
    Mutant("ignore ddof", "csrc/cpu/gaussian_kl.cpp",
           "scale * 2 * d_var / (layer.n(i) - layer.args.ddof)", "scale * 2 * d_var / layer.n(i)", "test_gaussian_kl"),
    Mutant("count pairs of different tiles of the MMD once", "csrc/cpu/mk_mmd.cpp",
           "(i == j ? 1 : 2) * omega", "omega", "test_mk_mmd"),
    Mutant("forget a head's latent mask on CUDA", "csrc/cuda/projection.cu",
           "total += latent_mask(params, masks, row, j) * du(j);", "total += du(j);", "test_dropout_sum_cuda"),
    Mutant("mask a router's input on CUDA", "csrc/cuda/heads.cuh",
           "router ? logits : kAllRanks, scale_of", "kAllRanks, scale_of", "test_routed_lora_cuda"),
    Mutant("give every group of outputs the first one's weights on CUDA", "csrc/cuda/projection.cuh",
           "w + (row * output_groups + output_group) * heads", "w + row * output_groups * heads",
           "test_routed_lora_cuda"),
    Mutant("keep only the last group of outputs in dz on CUDA", "csrc/cuda/projection.cu",
           "total += w * group_sum(job, row, group, j)", "total = w * group_sum(job, row, group, j)",
           "test_routed_lora_cuda"),
    Mutant("give every head the first head's mask on x on CUDA", "csrc/cuda/mma.cuh",
           "(index * cols + col + column(at % kUnits))", "(col + column(at % kUnits))", "test_dropout_sum_cuda"),
    Mutant("add chunks of rows from the last on CUDA", "csrc/cuda/projection.cu",
           "sum_of_partials(sums, chunks, gradient.stride, e)",
           "sum_of_partials(sums + (chunks - 1) * gradient.stride, chunks, -gradient.stride, e)",
           "test_row_chunks_cuda"),
    Mutant("let a chunk of rows run into the next group on CUDA", "csrc/cuda/row_tile.cuh",
           "end - begin < chunk_rows ? end : begin + chunk_rows", "begin + chunk_rows", "test_row_chunks_cuda"),
    Mutant("copy the first row of a thread for all where rows are not aligned on CUDA", "csrc/cuda/tile.cuh",
           "opaque(uint32_t(rows_[u])) * m.cols", "opaque(uint32_t(rows_[0])) * m.cols", "test_grouped_lora_cuda"),
    Mutant("give siblings the first layer's mask on a CPU", "csrc/cpu/sibling_lora.cpp",
           "= dropout_of(args, i);", "= dropout_of(args, 0);", "test_sibling_lora"),
    Mutant("leave the first sibling's dx out on a CPU", "csrc/cpu/sibling_lora.cpp",
           "i == 0 ? first.dx_in : first.dx", "first.dx_in", "test_sibling_lora"),
    Mutant("number the masks of siblings as if all were as wide as the first", "csrc/ops/sibling_lora.h",
           "args.layers[k].projection", "args.layers[0].projection", "test_sibling_lora"),
    Mutant("read all siblings' latents from the first one's ranks on CUDA", "csrc/cuda/sibling_lora.cu",
           "partials + i * shared.stride", "partials", "test_sibling_lora_cuda"),
    Mutant("pack no offset of siblings on CUDA", "csrc/cuda/sibling_heads.cuh",
           "{inputs.A0, start + ranks, int(s.offset_rank)}", "{inputs.A0, start + ranks, 0}",
           "test_sibling_lora_cuda"),
    Mutant("read all siblings' dR from the first one's ranks on CUDA", "csrc/cuda/sibling_heads.cuh",
           "d_a.sums[0] + logit * n", "d_a.sums[0] + l.first_logit * n", "test_sibling_lora_cuda"),
    Mutant("leave the sums of an only chunk of siblings on CUDA", "csrc/cuda/projection.cu",
           "(chunks == 1 && !gradient.of_only_chunks)", "chunks == 1", "test_sibling_lora_cuda"),
    Mutant("leave a layer's own number of latent masks out on CUDA", "csrc/cuda/projection.cu",
           "(params.first_number + column)", "column", "test_sibling_lora_cuda"),
    Mutant("take siblings for alike whatever their options are", "align_ext/adapters/siblings.py",
           "common not in (None, (given.common, layer.adapter.dropout_p))", "False",
           "python_tests/test_siblings.py -k not_like"),
    Mutant("forget siblings in what is called together", "align_ext/adapters/siblings.py",
           "return self._kept.pop(layer, None)", "return None", "python_tests/test_siblings.py -k operators"),
    Mutant("take a tensor that was changed in place for the same one", "align_ext/adapters/siblings.py",
           "x._version, *(", "*(", "python_tests/test_siblings.py -k in_place"),
    Mutant("drop a split of split-K on CUDA", "csrc/cuda/projection.cuh",
           "for (int64_t i = 0; i < count; ++i) total += partials[i",
           "for (int64_t i = 0; i < 1; ++i) total += partials[i", "test_grouped_lora_cuda"),
]
UNITS = [  # bfloat16 units, by emulated instructions
    Mutant("AMX: no mask where x is copied", "csrc/cpu/bf16/amx_panels.cpp",
           "if constexpr (kMasked) lanes &= kept_lanes(masks.at[i + k], c);", "", "test_grouped_lora_emulated"),
    Mutant("AMX: leave out the ranks of the short tile", "csrc/cpu/bf16/amx_panels.cpp",
           "if (j == rank) continue;", "continue;", "test_grouped_lora_emulated"),
    Mutant("AMX: tiles of other rows than their sums", "csrc/cpu/bf16/amx_panels.cpp",
           "add_outer_tiles<kShort, kShort + 1, kShort + 2>", "add_outer_tiles<4, kShort + 1, kShort + 2>",
           "test_grouped_lora_emulated"),
    Mutant("bfloat16 units: leave padding ranks unwritten", "csrc/cpu/bf16/pack.cpp",
           "_mm512_storeu_si512(row, rounded_pairs(even, odd));",
           "if (j < rank) _mm512_storeu_si512(row, rounded_pairs(even, odd));", "test_grouped_lora_emulated"),
    Mutant("AMX: leave all terms but the last out of dx", "csrc/cpu/bf16/amx_rank_add.cpp",
           "if (k > 0) v = plus(v, load_sums(further + offset));", "", "test_routed_lora_emulated"),
    Mutant("dot products: leave the terms before a mask out of dx", "csrc/cpu/bf16/dots.cpp",
           "has_before ? plus(at(i, line), load_sums(before[i] + first)) : at(i, line)", "false ? Pair{} : at(i, line)",
           "test_routed_lora_emulated"),
    Mutant("dot products: count the terms before a mask twice", "csrc/cpu/bf16/dots.cpp",
           "sum[i][2 * line] = sum[i][2 * line + 1] = __m512{};", "", "test_routed_lora_emulated"),
    Mutant("dot products: no mask where x is loaded", "csrc/cpu/bf16/dots.cpp",
           "if constexpr (kMasked) lanes &= kept_lanes(masks.at[i], c);", "", "test_grouped_lora_emulated"),
    Mutant("dot products: the columns of dA as they were unpacked", "csrc/cpu/bf16/dots.cpp",
           "low, high, 0, 1, 8, 9, 2, 3, 10, 11", "low, high, 0, 1, 2, 3, 8, 9, 10, 11", "test_grouped_lora_emulated"),
    Mutant("dot products: take a row beyond the last one into dA", "csrc/cpu/bf16/dots.cpp",
           "t + 1 < count ? load_line<kMasked, kWhole>(x, masks, t + 1, c, lanes) : __m512i{}",
           "load_line<kMasked, kWhole>(x, masks, t, c, lanes)", "test_grouped_lora_emulated"),
    Mutant("dot products: the first panels again in each panel of dB", "csrc/cpu/bf16/dots.cpp",
           "outer_lines(outer, x, masks, first, last);", "outer_lines(outer, x, masks, 0, last);",
           "test_grouped_lora_emulated"),
    Mutant("dot products: the last panel alone in dz", "csrc/cpu/bf16/dots.cpp",
           "first ? dots : load<32>(out) + dots", "dots", "test_grouped_lora_emulated"),
    Mutant("dot products: the factors of the first term for all", "csrc/cpu/bf16/dots.cpp",
           "factors += factor_tiles(term.rank);", "", "test_routed_lora_emulated"),
]
# fmt: on
if platform.machine() == "x86_64":  # elsewhere nothing runs that they change
    MUTANTS += UNITS


# What orders the threads of a kernel. ptx.cuh defines cp_async_wait, and does not use it.
BARRIER = re.compile(r"^ *(?:__syncthreads|__syncwarp|cp_async_wait<.*>)\(.*\);.*$", re.MULTILINE)


def barriers() -> Iterator[Mutant]:
    """Each barrier and wait of the CUDA kernels, taken out; the SIMT engine must notice."""
    for path in sorted((ROOT / "csrc/cuda").glob("*.cu*")):
        if path.name == "ptx.cuh":
            continue
        text, file = path.read_text(), str(path.relative_to(ROOT))
        test = {".cu": f"test_{path.stem}_cuda"}.get(path.suffix, "test_grouped_lora_cuda")
        of_heads = dict.fromkeys(["shrink.cuh", "projection.cu"], "test_routed_lora_cuda")
        test = ({"launch.cuh": "test_simt_block_sum"} | of_heads).get(path.name, test)
        for found in BARRIER.finditer(text):
            number, begin = text.count("\n", 0, found.start()) + 1, max(found.start() - 200, 0)
            before, end = text[begin : found.end()], text[begin : found.start()]
            yield Mutant(f"without the barrier in line {number} of {path.name}", file, before, end, test)


def apply(mutant: Mutant, tree: Path) -> str | None:
    """Writes the mutant into a tree and returns the file's text as it was; None if it does not fit the tree."""
    if misplaced(mutant, tree):
        return None
    path = tree / mutant.file
    text = path.read_text()
    path.write_text(text.replace(mutant.before, mutant.after))
    return text


def misplaced(mutant: Mutant, tree: Path) -> str | None:
    """What of a mutant is not in a tree: its place just once, or the files of its test; None if all is there."""
    path = tree / mutant.file
    times = path.read_text().count(mutant.before) if path.is_file() else 0
    if times != 1:
        return f"{mutant.what}: its place is {times} times in {mutant.file}"
    files = [word for word in mutant.test.split() if word.endswith(".py")]
    files = [f"cpp_tests/{mutant.test.removesuffix('_emulated')}.cpp"] if mutant.file.startswith("csrc") else files
    missing = [file for file in files if not (tree / file).is_file()]
    return f"{mutant.what}: there is no test {', '.join(missing)}" if missing else None


def outcome(mutant: Mutant, tree: Path) -> int:
    """The exit code of a mutant's test in a tree: 0 passed, 1 failed; anything else is no verdict."""
    environment = os.environ | {"PYTHONPATH": str(tree), "HF_HUB_OFFLINE": "1"}
    if mutant.file.startswith("csrc"):
        build = f"cmake -S . -B build -G Ninja -DALIGN_TESTS=ON && cmake --build build --target {mutant.test}"
        subprocess.run(build, shell=True, cwd=tree, check=True, capture_output=True)
        command = f"ctest --test-dir build -R '^{mutant.test}$' || exit 1"
    else:
        command = f"{sys.executable} -m pytest -x -q -n0 -p no:cacheprovider {mutant.test}"
    return subprocess.run(command, shell=True, cwd=tree, env=environment, capture_output=True, check=False).returncode


def main() -> int:
    """Runs all mutants, or those whose description holds the word given."""
    words = [word for word in sys.argv[1:] if word != "--check"]
    chosen = [mutant for mutant in (*MUTANTS, *barriers()) if not words or words[0] in mutant.what]
    if "--check" in sys.argv:
        wrong = [line for mutant in chosen if (line := misplaced(mutant, ROOT))]
        print("\n".join([*wrong, f"{len(chosen) - len(wrong)} of {len(chosen)} mutants fit the sources"]))
        return 1 if wrong else 0
    verdicts = {0: "SURVIVED", 1: "killed"}
    sound: set[str] = set()  # tests seen to pass without a mutation: only then does a failure mean something
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        shutil.copytree(ROOT, tree, ignore=shutil.ignore_patterns(".git", "build", "__pycache__"))
        for mutant in chosen:
            if mutant.test not in sound and outcome(mutant, tree) == 0:
                sound.add(mutant.test)
            if mutant.test not in sound:
                verdict = "TEST IS BROKEN"
            elif (original := apply(mutant, tree)) is None:
                verdict = "DOES NOT APPLY"
            else:
                verdict = verdicts.get(outcome(mutant, tree), "NO VERDICT")
                (tree / mutant.file).write_text(original)
            failed += verdict != "killed"
            print(f"{verdict:16s}{mutant.what} ({mutant.file})", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
