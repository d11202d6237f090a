"""Which form and block sizes a kernel gets, and why: one table, an entry a (op, arch, dtype, shape class).

    mla_config(...)    the first entry that a call satisfies: TMA forms first, pointer loads last
    split_count(...)   how many programs share one sequence's shard

Everything here is a pure function of shapes, dtypes and the target, so that grids are static and a launch can be
captured. An entry's evidence says what chose it: a static table, or a measurement with card and date.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from helix_compile.kernels.target import INTERPRETER, KernelTarget

STATIC = "static table, docs/kernels.md"


H200 = (
    "NVIDIA H200, 2026-11-26, Triton 3.6.0: 276.0 us, B 16, 16,384 slots, 512 + 64 channels, bfloat16; docs/kernels.md"
)


MAX_SPLITS = 64  # the merge holds one part of each split


GATHERED = 64  # rows of a gathered tile lie in any page, so the page size asks for nothing: as if every tile filled one


ROWS, TRANSPOSED, POINTER = "rows", "transposed", "pointer"  # by TMA, by TMA, by loads


@dataclass(frozen=True)
class MlaConfig:
    """How mla_decode is built.

    Attributes:
        form: ROWS, TRANSPOSED or POINTER; says which operand lies on the M side, and how the cache is read.
        block_h: rows (t * H + h) of one program.
        block_n: KV slots of one step.
        num_warps: warps that the compiler starts from (specialisation adds some).
        num_stages: tiles in flight.
        parts: 1, or 2 halves of the channels (TMA forms).
        warp_specialize: ask for producer and consumer warps; Blackwell only.
        packed: rescale accumulators two elements an instruction; Blackwell only.
    """

    form: str
    block_h: int
    block_n: int
    num_warps: int
    num_stages: int
    parts: int = 1
    warp_specialize: bool = False
    packed: bool = False

    def __str__(self) -> str:
        special = ", warp-specialised" if self.warp_specialize else ""
        halves = " in halves" if self.parts == 2 else ""
        return (
            f"{self.form}{halves}, BLOCK_H {self.block_h}, BLOCK_N {self.block_n}, {self.num_warps} warps, "
            f"{self.num_stages} stages{special}"
        )


@dataclass(frozen=True)
class MlaShape:
    """What a choice may depend on.

    Attributes:
        rows: T * H query rows of a sequence.
        R: latent width.
        r: rope width; 0 where there is none.
        page_size: slots of a page.
        itemsize: bytes of an element of q.
        tma: the cache can be described to TMA: rows and base are aligned to 16 bytes.
    """

    rows: int
    R: int
    r: int
    page_size: int
    itemsize: int
    tma: bool


@dataclass(frozen=True)
class MlaEntry:
    """One line of the table.

    Attributes:
        arch: "sm_100" stands for sm_10x, INTERPRETER for itself, "" for any.
        max_rows: the shape class: up to so many rows a sequence; None: any.
        itemsize: bytes of an element of q that it is meant for; None: any.
        scaled: for the FP8 cache with scales; None: either.
        config: the choice.
        evidence: what chose it.
    """

    arch: str
    max_rows: int | None
    itemsize: int | None
    config: MlaConfig
    evidence: str
    scaled: bool | None = None


MLA_DECODE = (
    # two CTAs of 16 rows rather than one of 32: that one spills in its hot loops
    MlaEntry("sm_100", 32, 2, MlaConfig(TRANSPOSED, 16, 64, 4, 2, 2, True, True), STATIC, False),
    MlaEntry("sm_100", None, 2, MlaConfig(ROWS, 64, 64, 8, 2, 2, True), STATIC, False),
    # where the compiler can't specialise a loop over two halves (Triton 3.6)
    MlaEntry("sm_100", 32, 2, MlaConfig(TRANSPOSED, 16, 64, 4, 2, 1, True, True), STATIC, False),
    MlaEntry("sm_100", None, 2, MlaConfig(ROWS, 64, 64, 8, 2, 1, True), STATIC, False),
    MlaEntry("sm_90", 16, 2, MlaConfig(TRANSPOSED, 16, 64, 4, 2), STATIC, False),
    MlaEntry("sm_90", 32, 2, MlaConfig(TRANSPOSED, 32, 64, 4, 2), STATIC, False),
    MlaEntry("sm_90", None, 2, MlaConfig(ROWS, 64, 64, 8, 2), H200, False),
    # FP8: tiles are converted on the way to the dot; halves, and specialised warps, don't compile with that
    MlaEntry("sm_100", 32, 2, MlaConfig(TRANSPOSED, 16, 64, 4, 2), STATIC, True),
    MlaEntry("sm_100", None, 2, MlaConfig(ROWS, 64, 64, 8, 2), STATIC, True),
    MlaEntry("sm_90", 32, 2, MlaConfig(ROWS, 16, 32, 4, 2), STATIC, True),
    MlaEntry("sm_90", None, 2, MlaConfig(ROWS, 64, 64, 8, 2), STATIC, True),
    MlaEntry(INTERPRETER, 32, None, MlaConfig(TRANSPOSED, 16, 16, 4, 2), "runs each form"),
    MlaEntry(INTERPRETER, None, None, MlaConfig(ROWS, 64, 16, 4, 2, 2), "runs each form"),
    MlaEntry(INTERPRETER, None, None, MlaConfig(POINTER, 16, 16, 4, 2), "small tiles: more steps"),
    MlaEntry("", 32, 2, MlaConfig(POINTER, 16, 32, 4, 2), STATIC),
    MlaEntry("sm_100", None, 2, MlaConfig(POINTER, 64, 32, 8, 2), STATIC),
    MlaEntry("sm_90", None, 2, MlaConfig(POINTER, 64, 32, 8, 2), STATIC),
    MlaEntry("", None, 2, MlaConfig(POINTER, 16, 32, 4, 2), STATIC),
    MlaEntry("", None, 4, MlaConfig(POINTER, 16, 16, 4, 1), STATIC),
)


def mla_config(shape: MlaShape, target: KernelTarget, scaled: bool = False, halves: bool = True) -> MlaConfig:
    """The first entry whose class holds the shape and whose form can run it.

    `halves`: the compiler can specialise a loop over two halves (compiler_probe.specialises_halves).
    """
    return next(
        entry.config
        for entry in MLA_DECODE
        if _applies(entry, shape, target, scaled)
        and (halves or entry.config.parts == 1 or not entry.config.warp_specialize)
    )


def pointer_config(shape: MlaShape, target: KernelTarget, scaled: bool = False) -> MlaConfig:
    """What `mla_config` would choose if there were no TMA."""
    return next(
        entry.config for entry in MLA_DECODE if entry.config.form == POINTER and _applies(entry, shape, target, scaled)
    )


def slots_config(shape: MlaShape, target: KernelTarget, halves: bool = True) -> MlaConfig:
    """How mla_decode_slots is built: as mla_decode where TMA gathers rows (Blackwell), else by pointers. See mla_config."""
    if family(target) not in ("sm_100", INTERPRETER):
        return pointer_config(shape, target)
    return mla_config(replace(shape, page_size=GATHERED), target, halves=halves)


def _applies(entry: MlaEntry, shape: MlaShape, target: KernelTarget, scaled: bool) -> bool:
    return (
        entry.arch in ("", family(target))
        and (entry.max_rows is None or shape.rows <= entry.max_rows)
        and entry.itemsize in (None, shape.itemsize)
        and entry.scaled in (None, scaled)
        and form_runs(entry.config, shape)
    )


def form_runs(config: MlaConfig, shape: MlaShape) -> bool:
    """Whether a config can take a shape at all; whether it fits a card, the offline compiler says."""
    if config.block_h >= 64 and (shape.R > 512 or shape.r > 64):
        return False
    # tiles of TMA are powers of two that lie in one page and stay within the shared memory they were chosen for
    powers = all(16 <= size and size & (size - 1) == 0 for size in (shape.R, shape.r or 16))
    tma = shape.tma and powers and 32 <= shape.R <= 512 and shape.r <= 64 and shape.page_size % config.block_n == 0
    return config.form == POINTER or tma


def family(target: KernelTarget) -> str:
    """sm_103 is tuned as sm_100; below and beyond, each architecture is its own."""
    return "sm_100" if 100 <= target.capability < 110 else target.arch


def split_count(
    B: int, T: int, H: int, max_slots: int, target: KernelTarget, block_h: int = 64, block_n: int = 64
) -> int:
    """Splits of a sequence's shard: a power of two that fills the card once, at most one a tile of KV slots.

    Args:
        B: sequences.
        T: new tokens a sequence.
        H: query heads of this rank.
        max_slots: capacity of a sequence's shard; lengths live on the device and may not be asked.
        target: whose streaming multiprocessors are to be filled.
        block_h: rows of a program.
        block_n: slots of a tile.
    """
    programs = max(1, B * -(-T * H // block_h))
    wanted = min(target.sm_count // programs, -(-max_slots // block_n), MAX_SPLITS)
    return 1 << (max(wanted, 1).bit_length() - 1)
