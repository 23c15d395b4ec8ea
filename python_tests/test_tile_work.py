"""How executed instructions are counted: hand-made listings whose counts are known."""

from collections import Counter

import cuda_static
import pytest
import sass
import tile_work

LOOP = """
        LDGSTS.E.BYPASS.128 [R1], [R2.64] ;
.L_a:
        LDGSTS.E.BYPASS.128 [R1], [R2.64] ;
        HMMA.16816.F32.BF16 R4, R8, R12, R4 ;
        @P0 BRA `(.L_a) ;
        STG.E.128 [R2.64], R4 ;
        EXIT ;
"""
NESTED = """
.L_a:
        LDGSTS.E.BYPASS.128 [R1], [R2.64] ;
.L_b:
        HMMA.16816.F32.BF16 R4, R8, R12, R4 ;
        @P0 BRA `(.L_b) ;
        BAR.SYNC 0x0 ;
        @P1 BRA `(.L_a) ;
        EXIT ;
"""


def executed(listing, trips=lambda loop: 1, cold=lambda i: False, head=0):
    """How often each opcode is executed in one turn of the loop whose head is number `head` of all loops."""
    flow = sass.Flow(sass.parse(listing))
    total = Counter()
    for i, times in flow.executed(sorted(flow.loops)[head], trips, lambda i: cold(flow.code[i])).items():
        total[flow.code[i].base] += times
    return total


def test_a_loop_executes_its_instructions_once():
    assert executed(LOOP) == {"LDGSTS": 1, "HMMA": 1, "BRA": 1}


def test_an_unrolled_loop_executes_as_many_as_it_has():
    assert executed(LOOP.replace("HMMA", "HMMA R0 ;\nHMMA")) == {"LDGSTS": 1, "HMMA": 2, "BRA": 1}


def test_an_inner_loop_counts_as_often_as_it_runs():
    assert executed(NESTED, lambda loop: 10) == {"LDGSTS": 1, "HMMA": 10, "BRA": 11, "BAR": 1}


def test_loops_multiply():
    listing = (
        ".L_a:\nMOV R1 ;\n.L_b:\nIADD3 R0 ;\n.L_c:\nHMMA R0 ;\n@P0 BRA `(.L_c) ;\n@P0 BRA `(.L_b) ;\n"
        "STG R0 ;\n@P1 BRA `(.L_a) ;\nEXIT ;"
    )
    times = executed(listing, lambda loop: {2: 10, 4: 3}[len(loop)])
    assert times == {"MOV": 1, "IADD3": 3, "HMMA": 30, "BRA": 30 + 3 + 1, "STG": 1}


BRANCHED = """
.L_a:
        @P0 BRA `(.L_long) ;
        IADD3 R0 ;
        BRA `(.L_end) ;
.L_long:
        FADD R0 ;
        FADD R1 ;
        FADD R2 ;
.L_end:
        @P1 STG R0 ;
        @P2 BRA `(.L_a) ;
        EXIT ;
"""


def test_of_two_branches_the_longer_is_taken():
    assert executed(BRANCHED) == {"BRA": 2, "FADD": 3, "STG": 1}


def test_a_cold_branch_is_not_taken():
    assert executed(BRANCHED, cold=lambda i: i.base == "FADD") == {"BRA": 3, "IADD3": 1, "STG": 1}


def test_a_loop_all_of_whose_paths_are_cold_is_not_run():
    assert executed(BRANCHED, cold=lambda i: i.base == "STG") == {}
    listing = BRANCHED.replace("FADD R1 ;", ".L_in:\nMUFU R1 ;\n@P3 BRA `(.L_in) ;")
    assert executed(listing, lambda loop: 9) == {"BRA": 2 + 9, "FADD": 2, "MUFU": 9, "STG": 1}
    assert executed(listing, lambda loop: 9, lambda i: i.base == "MUFU") == {"BRA": 3, "IADD3": 1, "STG": 1}


def test_a_loop_that_is_left_in_the_middle_counts_whole():
    listing = (
        ".L_a:\n.L_b:\nHMMA R0 ;\n@P0 BRA `(.L_out) ;\nFADD R0 ;\nBRA `(.L_b) ;\n.L_out:\n@P1 BRA `(.L_a) ;\nEXIT ;"
    )
    listing = listing.replace(".L_b:", "MOV R1 ;\n.L_b:")
    assert executed(listing, lambda loop: 4) == {"MOV": 1, "HMMA": 4, "BRA": 2 * 4 + 1, "FADD": 4}


# A tile of shrink at rank 16: 4 copies, 8 products, and a mask of two rounds of Philox whose lanes are compared.
MASKED = """
.L_tile:
        LDGSTS.E.BYPASS.128 [R1], [R2.64] ;
        LDGSTS.E.BYPASS.128 [R1], [R2.64] ;
        LDGSTS.E.BYPASS.128 [R1], [R2.64] ;
        LDGSTS.E.BYPASS.128 [R1], [R2.64] ;
        @P0 BRA `(.L_products) ;
        IADD3 R9, R9, 0x1, RZ ;
        IMAD.WIDE.U32 R4, R4, -0x326172a9, RZ ;
        IMAD.WIDE.U32 R6, R6, -0x2daee0ad, RZ ;
        IMAD.WIDE.U32 R4, R4, -0x326172a9, RZ ;
        IMAD.WIDE.U32 R6, R6, -0x2daee0ad, RZ ;
        LOP3.LUT R7, R7, 0x7fff7fff, RZ, 0xc0, !PT ;
.L_products:
        LDSM.16.M88.4 R12, [R3] ;
        HMMA.16816.F32.BF16 R16, R12, R20, R16 ;
        HMMA.16816.F32.BF16 R16, R12, R20, R16 ;
        HMMA.16816.F32.BF16 R16, R12, R20, R16 ;
        HMMA.16816.F32.BF16 R16, R12, R20, R16 ;
        HMMA.16816.F32.BF16 R16, R12, R20, R16 ;
        HMMA.16816.F32.BF16 R16, R12, R20, R16 ;
        HMMA.16816.F32.BF16 R16, R12, R20, R16 ;
        HMMA.16816.F32.BF16 R16, R12, R20, R16 ;
        @P3 BRA `(.L_tile) ;
        EXIT ;
"""
SKIP = "        @P0 BRA `(.L_products) ;\n"
PRODUCTS = MASKED.split(".L_products:")[1].split("        @P3 BRA")[0]
TILE = 4 + 1 + 1 + 8 + 1


def parts_of(listing, name="shrink_kernel<Mma<bfloat16, 16>>"):
    kernel = cuda_static.Kernel("op", name, 80, 32, 0, 0, 0, 256, sass.parse(listing))
    (loop,) = tile_work.tile_loops(kernel)
    return loop.parts


def test_a_mask_is_what_is_drawn_and_compared():
    parts = parts_of(MASKED)
    assert parts["tile"].issue == TILE
    assert parts["mask"].issue == 1 + 4 + 1
    assert parts["mask"].product == 4 * 4  # 64-bit products
    assert parts["mask"].integer == 2 * (1 + 1)
    assert parts["tile"].shared == 4 * 4 + 4
    assert parts["mask"].shared == 0


def test_further_blocks_of_units_that_begin_within_one_are_not_run():
    shift = "        @P4 BRA `(.L_whole) ;\n.L_shift:\n        IMAD.WIDE.U32 R4, R4, -0x326172a9, RZ ;\n"
    shift += "        @P5 BRA `(.L_shift) ;\n.L_whole:\n        LOP3"
    assert parts_of(MASKED.replace("        LOP3", shift))["mask"].issue == 1 + 4 + 1 + 1


def test_what_leads_to_a_mask_is_not_run_without_one():
    # Four instructions, after which the blocks may be jumped over, as for rows beyond the last.
    setup = 4 * "        MOV R9, R9 ;\n" + "        @P5 BRA `(.L_products) ;\n        IADD3"
    parts = parts_of(MASKED.replace("        IADD3", setup))
    assert parts["tile"].issue == TILE
    assert parts["mask"].issue == 4 + 1 + 1 + 4 + 1


def test_products_that_follow_a_mask_in_its_block_are_those_of_a_tile():
    draws = MASKED.split(SKIP)[1].split(".L_products:")[0]
    with_products = MASKED.replace(draws, f"{draws}{PRODUCTS}        BRA `(.L_end) ;\n")
    parts = parts_of(with_products.replace("        @P3 BRA", ".L_end:\n        @P3 BRA"))
    assert parts["tile"].issue == TILE
    assert parts["mask"].issue == 1 + 4 + 1 + 1


def test_a_loop_over_masks_or_chunks_of_ranks_runs_once():
    listing = MASKED.replace(SKIP, ".L_mask:\n" + SKIP)
    parts = parts_of(listing.replace("        @P3 BRA", "        @P6 BRA `(.L_mask) ;\n        @P3 BRA"))
    assert parts["tile"].issue == TILE + 1
    assert parts["mask"].issue == 1 + 4 + 1


@pytest.mark.parametrize("predicate", ["", "@P2 "])
def test_single_elements_are_not_copied_where_units_can_be(predicate):
    singles = f"        @P4 BRA `(.L_units) ;\n        {predicate}LDG.E.U16 R8, [R2.64] ;\n        STS.U16 [R1], R8 ;\n"
    listing = MASKED.replace("        LDGSTS", f"{30 * singles}        BRA `(.L_skip) ;\n.L_units:\n        LDGSTS", 1)
    parts = parts_of(listing.replace(SKIP, ".L_skip:\n" + SKIP))
    assert parts["tile"].issue == TILE + 1


STORES = 8 * "        STS.U16 [R0], R1 ;\n"
PIECE = f"""
        @P5 BRA `(.L_old) ;
        BAR.SYNC 0x0 ;
.L_piece:
        LDG.E.128 R4, [R2.64] ;
{STORES}
        @P6 BRA `(.L_piece) ;
.L_old:
{SKIP}"""


def test_a_piece_is_shared_by_its_tiles():
    parts = parts_of(MASKED.replace(SKIP, PIECE))
    assert parts["tile"].issue == TILE + 1
    # 16 ranks of 7 tiles of 8 units are 3.5 for each of 256 threads.
    assert parts["piece"].issue == pytest.approx((1 + 3.5 * 10) / 7)
    assert parts["piece"].shared == pytest.approx(3.5 * (8 * 4 + 4) / 7)  # four elements to a bank


def test_a_loop_of_another_kind_is_refused():
    walk = ".L_walk:\n        LDG.E R0, [R2.64] ;\n        @P5 BRA `(.L_walk) ;\n"
    with pytest.raises(ValueError, match="shrink, rank 16: what is the loop of 2 instructions at 4"):
        parts_of(MASKED.replace(SKIP, walk + SKIP))


def test_loops_that_load_the_same_piece_share_its_units():
    again = PIECE.split("BAR.SYNC 0x0 ;\n")[1].split(".L_old")[0]
    parts = parts_of(MASKED.replace(SKIP, PIECE.replace(".L_old:", again.replace(".L_piece", ".L_others") + ".L_old:")))
    assert parts["piece"].issue == pytest.approx((1 + 3.5 * 10) / 7)


@pytest.mark.parametrize(
    ("line", "unit", "cycles"),
    [
        ("IADD3 R0, R1, R2, RZ", "integer", 2),
        ("IMAD R0, R1, R2, RZ", "product", 2),
        ("IMAD.HI.U32 R0, R1, R2, RZ", "product", 4),
        ("FFMA R0, R1, R2, RZ", "product", 2),
        ("I2F.RP R0, R1", "convert", 8),
        ("LDSM.16.MT88.4 R0, [R1]", "shared", 4),
        ("LDS.128 R0, [R1]", "shared", 4),
        ("@!PT LDS RZ, [RZ]", "shared", 0),
        ("STS [R0], R1", "shared", 1),
        ("STS.U16 [R0], R1", "shared", 1),
        ("LDGSTS.E.BYPASS.LTC128B.128 [R0], [R2.64]", "shared", 4),
        ("STG.E.64 [R2.64], R4", "shared", 2),
        ("SHFL.IDX PT, R0, R1, R2, 0x1f", "shared", 1),
        ("BRA `(.L_x)", "integer", 0),
    ],
)
def test_an_instruction_takes_its_unit(line, unit, cycles):
    (instruction,) = sass.parse(line + " ;")
    work = tile_work.of_instruction(instruction, 80)
    assert (work.issue, getattr(work, unit)) == (1, cycles)


def test_stalls_are_read_from_the_control_word():
    half = 150 * " " + "/* 0x000000ffffa87224 */\n" + 200 * " "
    listing = (
        f"/*0000*/ MOV R0, R1 ; {half}/* 0x000fe200078e00ff */\n/*0010*/ BRA `(.L_x) ; {half}/* 0x000fea0003800000 */"
    )
    assert [(i.base, i.stall) for i in sass.parse(listing)] == [("MOV", 1), ("BRA", 5)]
    assert [i.stall for i in sass.parse("MOV R0, R1 ;")] == [1]


def test_the_table_of_tiles_can_be_read_again(monkeypatch, tmp_path):
    monkeypatch.setattr(cuda_static, "nvcc_version", lambda: "13.0")
    rows = {(80, "float16", "y", 16, "piece"): tile_work.TileWork(1, 2, 3, 4, 5, 6)}
    with (tmp_path / "table.csv").open("w") as file:
        tile_work.write(rows, file)
    assert tile_work.read(tmp_path / "table.csv") == ("13.0", rows)
