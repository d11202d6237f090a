"""Hot loops of stored SASS listings, counted by hand, and the parsers around them."""

from __future__ import annotations

from pathlib import Path

import pytest

from helix_compile.kernels.lab.sass import (
    HotLoop,
    hot_loops,
    parse_jump_table,
    parse_sass,
    partition_warps,
    tensor_core,
    uses_tma,
    warp_instructions_per_token,
)

LISTINGS = Path(__file__).parent / "sass"
# partition 0 begins at 0x150 and partition 1 at 0xc0: ptxas lays them out in any order
JUMP_TABLE = [0x150, 0xC0, 0x2B0]


def listing(name: str) -> str:
    return (LISTINGS / f"{name}.txt").read_text()


def test_one_loop_of_a_compiled_kernel() -> None:
    """A loop over `acc = tl.dot(x, x, acc)` of 16 x 16 tiles, as ptxas wrote it: lines 0x2b0 to 0x3a0."""
    instructions = parse_sass(listing("dot_loop.sm_90"))
    assert len(instructions) == len(listing("dot_loop.sm_90").splitlines())
    (loop,) = hot_loops(instructions, own_warps=4)
    assert loop == HotLoop(0x2B0, 0x3A0, 16, 0, 4, None, True)
    assert warp_instructions_per_token([loop], tokens_per_step=16, ctas_per_token=2) == 16 * 4 / 16 * 2
    assert tensor_core(instructions) == "mma" and not uses_tma(instructions)


def test_warp_partitions() -> None:
    """The loader runs in 2 warps, the tensor core is fed by 1, and the function's own 4 do the rest.

    Not counted: the loop before the tiles, the dispatch, the spins for registers and barriers behind the loops.
    """
    instructions = parse_sass(listing("warp_partitions.sm_100"))
    loops = hot_loops(instructions, 4, partitions=[1, 2], jump_table=JUMP_TABLE)
    assert loops == [
        HotLoop(0xE0, 0x130, 6, 0, 2, 1, True),
        HotLoop(0x170, 0x1B0, 5, 0, 1, 0, True),
        HotLoop(0x230, 0x280, 6, 1, 4, None, True),
    ]
    assert warp_instructions_per_token(loops, tokens_per_step=32) == (6 * 2 + 5 * 1 + 6 * 4) / 32
    assert tensor_core(instructions) == "tcgen05" and uses_tma(instructions)


def test_without_marks_the_largest_loop_counts() -> None:
    text = listing("dot_loop.sm_90").replace("HMMA.16816.F32", "FFMA")
    (loop,) = hot_loops(parse_sass(text), 1)
    assert loop.instructions == 16 and not loop.moves_tiles


def test_partitions_need_the_jump_table() -> None:
    instructions = parse_sass(listing("warp_partitions.sm_100"))
    with pytest.raises(ValueError, match="2 warp partitions, 0 jump table entries"):
        hot_loops(instructions, 4, partitions=[1, 2])


def test_no_loop() -> None:
    assert hot_loops(parse_sass("/*0000*/ EXIT ;\n/*0010*/ BRA 0x10;"), 4) == []


def test_parsers() -> None:
    elf = (
        ".nv.constant4\n0x00000000 0x00000000\n\n.nv.constant2.kernel\n"
        "0x000002a0 0x00002b70 0x000010d0 0x00002ae0\n0x00010fc0\n\n.nv.constant0.kernel\n0x1\n"
    )
    assert parse_jump_table(elf) == [0x2A0, 0x2B70, 0x10D0, 0x2AE0, 0x10FC0]
    assert parse_jump_table(".nv.constant0.kernel\n0x00000000\n") == []
    ttgir = 'module attributes {"ttg.num-warps" = 8 : i32} {\n partition0(%a) num_warps(4) {\n} partition1(%a) num_warps(1) {'
    assert partition_warps(ttgir) == (8, [4, 1])
