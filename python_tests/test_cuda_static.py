"""Proofs about the compiled CUDA kernels, without a GPU: what the compiler says of them and what their code holds."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import cuda_static
import pytest
import sass
import tile_work
from cuda_static import MATH, Kernel

ROOT = Path(__file__).parents[1]

# What each loop over a token matrix holds beside its products: 16-byte copies to shared memory, 16-byte stores.
LOOPS = {
    "shrink_kernel": [["LDGSTS.128"]],
    "sweep_kernel": [["LDGSTS.128"]],
    "expand_kernel": [["STG.128"]],
    "backward_kernel": [["LDGSTS.128"], ["STG.128"]],
}
# The products, accumulated in float, and how their operands come from shared memory.
PRODUCTS = {
    "Mma<bfloat16": ["HMMA.F32.BF16", "LDSM"],
    "Mma<float16": ["HMMA.F32", "LDSM"],
    "Ffma<float": ["FFMA", "LDS.128"],
}
RANKS = {
    "shrink_kernel": [16, 32, 64],
    "sweep_kernel": [16],
    "expand_kernel": [16, 32, 64],
    "backward_kernel": [16, 32, 64],
}


@pytest.fixture(scope="session", params=[90, pytest.param(80, marks=pytest.mark.slow)])
def arch(request):
    return request.param


@pytest.fixture(scope="session")
def kernels(arch):
    if cuda_static.find_tool("nvcc") is None:
        pytest.skip("nvcc was not found: nothing is known of the CUDA kernels' machine code")
    return cuda_static.compile_all([arch])


def streams(kernels):
    """Kernels with a loop over a token matrix: kernel, its family, its products."""
    for kernel in kernels:
        if match := MATH.match(kernel.name):
            family, math = match[1], match[2].split(",")[0]
            if math in PRODUCTS:
                product, operands = PRODUCTS[math]
                yield kernel, family, [product, "LDS.128" if family == "shrink_kernel" else operands]


def hot_loops(kernel, family, products):
    """For each kind of loop that the family has: those that hold products, copies and stores."""
    return [(beside, sass.hot_loops(kernel.flow, *products, *beside)) for beside in LOOPS[family]]


def assert_none(complaints):
    lines = [f"{k.source}: {k.name}, sm_{k.arch}: {what}" for k, what in complaints if what]
    assert not lines, "\n" + "\n".join(lines)


# ---- The kernels


def test_no_kernel_spills_or_has_a_stack(kernels):
    def wrong(k):
        local = sum(map(sass.is_local_memory, k.code))
        return (k.spills or k.stack or local) and f"{k.spills} B spilled, {k.stack} B stack, {local} LDL and STL"

    assert kernels
    assert_none((k, wrong(k)) for k in kernels)


def test_two_blocks_of_every_kernel_fit_a_multiprocessor(kernels):
    def wrong(k):
        if ", 64>" in k.name and k.arch == 80:  # by its registers; its shared memory fills sm_80 once
            k = replace(k, shared=0)
        return k.blocks < 2 and f"{k.blocks} block: {k.registers} registers, {k.threads} threads, {k.shared} B shared"

    assert_none((k, wrong(k)) for k in kernels)


def launched_on(kernel):
    """The architectures on which csrc/cuda/plan.h launches a kernel."""
    archs = set(cuda_static.MULTIPROCESSORS)
    if "Mma<" in kernel.name or "sweep" in kernel.name or "32>" in kernel.name:
        archs -= {75}
    if "Ffma<float16" in kernel.name:
        archs &= {75}
    if "Ffma<float, 64>" in kernel.name:
        archs &= {80, 90, 100}
    return archs


def test_the_shared_memory_of_every_kernel_exists_wherever_it_is_launched(kernels):
    def wrong(k):
        lacking = [f"sm_{arch}" for arch in sorted(launched_on(k)) if replace(k, arch=arch).blocks_by_shared == 0]
        return lacking and f"{k.shared} B are too many for {', '.join(lacking)}"

    assert_none((k, wrong(k)) for k in kernels)


def test_no_kernel_adds_floats_by_atomics(kernels):
    assert_none((k, [i.opcode for i in k.code if sass.is_float_atomic(i)]) for k in kernels)


def test_every_projection_kernel_is_compiled_for_every_type_and_rank(kernels):
    found = {MATH.match(k.name).groups() for k, _, _ in streams(kernels)}
    assert found == {
        (family, f"{math}, {rank}>") for family, ranks in RANKS.items() for rank in ranks for math in PRODUCTS
    }


def test_hot_loops_hold_products_16_byte_copies_and_16_byte_stores(kernels):
    assert_none(
        (kernel, not loops and f"no loop holds all of {products + beside}")
        for kernel, family, products in streams(kernels)
        for beside, loops in hot_loops(kernel, family, products)
    )


def test_no_product_is_outside_of_the_hot_loops(kernels):
    def lost(kernel, family, products):
        hot = {id(i) for _, loops in hot_loops(kernel, family, products) for loop in loops for i in loop}
        return [i.opcode for i in kernel.code if i.matches(products[0]) and id(i) not in hot]

    assert_none((k, lost(k, family, products)) for k, family, products in streams(kernels))


def test_a_kernel_has_code_only_where_it_is_used(kernels):
    plain = {k.name for k in kernels if "Ffma<float16" in k.name}  # for sm_75
    assert {k.name for k in kernels if k.empty} == plain


def test_the_table_in_the_documentation_is_of_these_kernels(kernels, arch):
    version, written = cuda_static.read_table((ROOT / "docs/cuda.md").read_text())
    if version != cuda_static.nvcc_version():
        pytest.skip(f"the table is of nvcc {version}, this is {cuda_static.nvcc_version()}")
    written = {row: {f"sm_{arch}": cells[f"sm_{arch}"]} for row, cells in written.items()}
    assert written == cuda_static.cells(kernels), "python benchmarks/cuda_static.py --write docs/cuda.md"


# ---- What a tile takes (tile_work.py)

BUDGET = 1.05  # of what tile_work.csv says


@pytest.fixture(scope="session")
def tile_loops(kernels):
    """The loops of all 16-bit kernels over tiles."""
    return [loop for kernel in kernels for loop in tile_work.tile_loops(kernel)]


def test_every_16_bit_kernel_has_its_loops_over_tiles(tile_loops):
    found = {(loop.kernel.name, loop.name) for loop in tile_loops}
    names = {"shrink_kernel": ["shrink"], "sweep_kernel": ["sweep"], "expand_kernel": ["y"]}
    names["backward_kernel"] = ["dx", "outer"]
    wanted = {(name, loop) for name, _ in found for loop in names[name.split("<")[0]]}
    assert found == wanted
    assert len(found) == len(tile_loops) == 2 * (3 + 1 + 2 * 3 + 2 * 3)  # types, kernels


def test_no_loop_takes_more_instructions_for_a_tile_than_its_budget(tile_loops):
    _, table = tile_work.read()

    def wrong(loop):
        over = []
        for part, work in loop.parts.items():
            budget = BUDGET * table[loop.arch, loop.dtype, loop.name, loop.rank, part].issue
            if work.issue > budget:
                over.append(f"{loop.name}, {part}: {work.issue:.0f} instructions for {budget:.0f}")
        return "; ".join(over)

    assert_none((loop.kernel, wrong(loop)) for loop in tile_loops)


def test_what_a_tile_needs_is_executed_as_often_as_it_needs_it(tile_loops):
    for loop in tile_loops:
        of = {"without": loop.executed(), "masked": loop.executed(mask=True) if "mask" in loop.parts else {}}
        for case, times in of.items():
            count = Counter()
            for i, turns in times.items():
                count["draw" if loop.draws([i]) else loop.code[i].base] += turns / loop.tiles
            if times:
                sums = 2 if loop.name == "sweep" else 1
                what = loop.kernel.name, loop.name, case
                writes = loop.name in {"y", "dx"}
                assert (count["LDGSTS"], count["HMMA"]) == (0 if writes else 4, loop.rank / 2 * sums), what
                # Four Philox blocks of 20 products, of which the first ones of the offset are the same for all four.
                assert count["draw"] in ({0} if case == "without" else {76, 77}), what
                assert count["STG"] >= (4 if writes else 0), what


def test_the_table_of_tiles_is_of_these_kernels(tile_loops, arch):
    version, written = tile_work.read()
    if version != cuda_static.nvcc_version():
        pytest.skip(f"the table is nvcc {version}'s")
    written = {key: work for key, work in written.items() if key[0] == arch}
    assert written == tile_work.table(tile_loops), "python benchmarks/tile_work.py --write"


# ---- The analysis itself

HOT = """
.text.kernel:
        /*0000*/                   LDGSTS.E.BYPASS.128 [R1], [R2.64] ;
        /*0010*/              @!P1 BRA `(.L_x_1) ;
.L_x_0:
        /*0020*/                   LDGSTS.E.BYPASS.128 [R1], desc[UR4][R2.64], P2 ;
        /*0030*/                   HMMA.16816.F32.BF16 R4, R8, R12, R4 ;
        /*0040*/               @P0 BRA `(.L_x_0) ;
.L_x_1:
        /*0050*/                   STG.E.128 [R2.64], R4 ;
        /*0060*/                   EXIT ;
.L_x_2:
        /*0070*/                   BRA `(.L_x_2);
        /*0080*/                   NOP;
"""


def opcodes(loops):
    return [[i.base for i in loop] for loop in loops]


def found(listing, *wanted):
    return opcodes(sass.hot_loops(sass.Flow(sass.parse(listing)), *wanted))


def test_a_hot_loop_is_what_jumps_back():
    assert found(HOT, "HMMA.F32", "LDGSTS.128") == [["LDGSTS", "HMMA", "BRA"]]


@pytest.mark.parametrize("opcode", ["STG.128", "EXIT", "LDSM", "HMMA.F16", "LDGSTS.64"])
def test_what_stands_after_a_loop_or_nowhere_is_not_in_it(opcode):
    assert found(HOT, "HMMA", opcode) == []


def test_products_outside_of_a_loop_do_not_count():
    assert found("HMMA R4, R8, R12, R4 ;\n" + HOT.replace("HMMA", "IADD3"), "HMMA") == []


def test_copies_before_a_loop_do_not_count():
    before, loop = HOT.split(".L_x_0:")
    assert found(before + ".L_x_0:" + loop.replace("LDGSTS", "LDG"), "HMMA", "LDGSTS") == []


def test_a_jump_backwards_is_not_always_a_loop():
    listing = "BRA `(.L_b) ;\n.L_a:\nHMMA R0 ;\nEXIT ;\n.L_b:\nLDGSTS [R0] ;\n@P0 BRA `(.L_a) ;\nEXIT ;"
    assert sass.Flow(sass.parse(listing)).loops == {}


def test_a_block_that_was_moved_out_of_line_belongs_to_its_loop():
    listing = (
        ".L_a:\n@P1 BRA `(.L_cold) ;\n.L_b:\nHMMA R0 ;\n@P0 BRA `(.L_a) ;\nEXIT ;\n.L_cold:\nSTG R0 ;\nBRA `(.L_b) ;"
    )
    assert found(listing, "HMMA", "STG") == [["BRA", "HMMA", "BRA", "STG", "BRA"]]


NESTED = ".L_a:\nLDGSTS [R0] ;\n.L_b:\nHMMA R0 ;\n@P0 BRA `(.L_b) ;\nBAR.SYNC 0x0 ;\n@P1 BRA `(.L_a) ;\nEXIT ;"


def test_the_hot_loop_is_the_innermost_that_holds_all():
    assert found(NESTED, "HMMA") == [["HMMA", "BRA"]]
    assert found(NESTED, "HMMA", "LDGSTS") == [["LDGSTS", "HMMA", "BRA", "BAR", "BRA"]]


def test_all_hot_loops_are_found():
    second = ".L_c:\nHMMA R0 ;\n@P0 BRA `(.L_c) ;\n"
    assert found(second + HOT, "HMMA") == [["HMMA", "BRA"], ["LDGSTS", "HMMA", "BRA"]]


def test_a_loop_may_be_left_by_a_call_of_a_label():
    listing = ".L_a:\nHMMA R0 ;\n@P0 CALL.REL.NOINC `(.L_c) ;\nBRA `(.L_a) ;\n.L_c:\nSTG R0 ;\nEXIT ;"
    assert found(listing, "HMMA") == [["HMMA", "CALL", "BRA"]]
    assert found(listing, "STG") == []


def test_a_subroutine_is_no_part_of_the_loop_that_calls_it():
    loop = ".L_a:\nCALL.REL.NOINC `($__internal_0_$__div) ;\n@P0 BRA `(.L_a) ;\nEXIT ;\n"
    listing = loop + "$__internal_0_$__div:\nFFMA R0 ;\nRET ;"
    assert found(listing, "CALL") == [["CALL", "BRA"]]
    assert found(listing, "FFMA") == []


@pytest.mark.parametrize("condition", ["P1, ", "!P1, ", "UP0, ", ""])
def test_a_conditional_jump_also_falls_through(condition):
    listing = f".L_a:\nBRA {condition}`(.L_c) ;\nHMMA R0 ;\n.L_c:\n@P0 BRA `(.L_a) ;\nEXIT ;"
    assert bool(found(listing, "HMMA")) == bool(condition)


@pytest.mark.parametrize(
    ("opcode", "wanted", "answer"),
    [
        ("STG.E.128", "STG.128", True),
        ("STG.E.64", "STG.128", False),
        ("LDG.E.128", "LDGSTS.128", False),
        ("LDGSTS.E.BYPASS.LTC128B.64", "LDGSTS.128", False),
        ("HMMA.16816.F32.BF16", "HMMA.F32", True),
        ("HMMA.16816.F16", "HMMA.F32", False),
    ],
)
def test_an_opcode_matches_by_its_modifiers(opcode, wanted, answer):
    assert sass.Instruction("", opcode, "").matches(wanted) == answer


@pytest.mark.parametrize(
    ("opcode", "answer"),
    [
        ("RED.E.ADD.F32.FTZ.RN.STRONG.GPU", True),
        ("REDG.E.ADD.F16x2.RN.STRONG.GPU", True),
        ("ATOMG.E.ADD.F64.RN.STRONG.GPU", True),
        ("ATOM.E.ADD.BF16_V2.RN", True),
        ("ATOMS.CAST.SPIN", True),  # adds floats in shared memory
        ("ATOMG.E.CAS.STRONG.GPU", True),
        ("ATOMG.E.ADD.STRONG.GPU", False),
        ("RED.E.ADD.S32.STRONG.GPU", False),
        ("ATOMS.POPC.INC.32", False),
        ("REDUX.SUM", False),
        ("FADD.FTZ", False),
    ],
)
def test_float_atomics_are_recognised(opcode, answer):
    assert sass.is_float_atomic(sass.Instruction("", opcode, "")) == answer


def kernel(arch=80, registers=32, threads=256, shared=0, code=()):
    return Kernel("op", "k<bfloat16>", arch, registers, 0, 0, shared, threads, list(code))


@pytest.mark.parametrize(
    ("values", "blocks"),
    [
        ({"registers": 128}, 2),  # 8 warps of 4096: two of the four register files' 16
        ({"registers": 129}, 1),
        ({"registers": 33}, 6),  # 1280 a warp: 12 in each of four files
        ({}, 8),
        ({"threads": 32}, 32),
        ({"arch": 86}, 6),
        ({"shared": 81 << 10}, 2),  # and 1 KiB each for the system: all of sm_80's 164
        ({"shared": (81 << 10) + 1}, 1),
        ({"shared": 81 << 10, "arch": 90}, 2),
        ({"shared": 32 << 10, "arch": 75}, 2),
    ],
)
def test_blocks_of_a_multiprocessor(values, blocks):
    assert kernel(**values).blocks == blocks


def test_the_compiler_s_report_is_read():
    name = "_ZN5align4cuda12_GLOBAL__N_113shrink_kernelIfEEv9ShrinkJob"
    log = f"""
ptxas info    : Compiling entry function '{name}' for 'sm_80'
ptxas info    : Function properties for {name}
    48 bytes stack frame, 44 bytes spill stores, 40 bytes spill loads
ptxas info    : Used 128 registers, used 1 barriers, 48 bytes cumulative stack size, 256 bytes smem, 584 bytes cmem[0]
"""
    attribute = "//----- nvinfo : EIATTR_MAX_THREADS\n.L_2: .short (.L_4 - .L_3)\n.word 0x00000100\n.word 0x00000001"
    line = "//" + 20 * "-"
    listing = f"{line} .nv.info.{name} {line}\n{attribute}\n{line} .text.{name} {line}\n{HOT}"
    (read,) = cuda_static.parse("op", 80, log, listing)
    assert read.name == "shrink_kernel<float>"
    assert (read.registers, read.spills, read.stack, read.shared, read.threads) == (128, 84, 48, 256, 256)
    assert found(HOT, "HMMA") == opcodes(sass.hot_loops(read.flow, "HMMA"))


def test_the_table_can_be_read_again(monkeypatch):
    monkeypatch.setattr(cuda_static, "nvcc_version", lambda: "13.0")
    store = sass.Instruction("", "STG.E", "")
    rows = cuda_static.cells([kernel(code=[store]), kernel(arch=90, registers=64, code=[store]), kernel(arch=100)])
    assert rows == {("op", "k<T>"): {"sm_80": "32 · 8", "sm_90": "64 · 4", "sm_100": "-"}}
    text = f"before\n{cuda_static.BEGIN}\n{cuda_static.table(rows)}\n{cuda_static.END}\nafter"
    assert cuda_static.read_table(text) == ("13.0", rows)
