"""Count the SASS instructions of hot loops, for every warp that runs them. A static count: it is not speed.

    listing (cuobjdump -sass) -> instructions -> basic blocks -> dominators -> natural loops -> innermost ones

A loop is a backward branch whose target dominates it (a branch to a lower address alone is none: code that ptxas moved
out of line jumps back, too). Loops are left out that

    hold another loop: the outer one runs once where the inner one runs many times;
    are spins: at most SPIN_SIZE instructions that wait for a barrier, for registers or for tensor memory to be free;
    dispatch: the loop in which worker warps wait for the next partition (it holds the indirect branch).

Hot are those of the rest that compute, move or hand over tiles: they hold a tensor-core instruction, a TMA load, an
access to tensor memory or to a memory barrier. A partition without such a loop counts its largest one (dots without
tensor cores). Two such loops in one partition are both counted.

Counted are the instructions of the loop that lie between target and branch; what ptxas moved behind the branch is the
retry of a wait that failed, and how often that runs is unknown.

Warps of a loop: the function's own ("ttg.num-warps" in the TTGIR) unless a warp partition holds it. Workers reach
partition i through entry i of the jump table of the one indirect branch (BRX, table in constant bank 2); the partitions
stand in the TTGIR in the same order with num_warps(n) each. A loop belongs to the partition whose entry dominates it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

import networkx as nx

SPIN_SIZE = 8


_WAITS = ("SYNCS", "USETMAXREG", "UTCATOMSWS", "NANOSLEEP", "ACQBULK")


_SPILLS = ("LDL", "STL")


_TILES = ("UTMALDG", "LDTM", "STTM")


_TENSOR_CORE = {
    "tcgen05": ("UTCHMMA", "UTCQMMA", "UTCIMMA", "UTCOMMA", "UTCMXQMMA"),
    "wgmma": ("HGMMA", "QGMMA", "IGMMA", "BGMMA"),
    "mma": ("HMMA", "QMMA", "IMMA", "BMMA", "DMMA", "OMMA"),
}


_LINE = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:(@!?U?P\w+)\s+)?([A-Z][A-Z0-9_]*(?:\.[A-Za-z0-9_]+)*)([^;]*);")


_ADDRESS = re.compile(r"0x([0-9a-f]+)")


@dataclass(frozen=True)
class Instruction:
    """One line of a SASS listing.

    Attributes:
        address: in the function.
        opcode: with its suffixes, such as "BRA.U".
        operands: the text behind it.
        guarded: runs under a predicate.
    """

    address: int
    opcode: str
    operands: str
    guarded: bool

    @property
    def base(self) -> str:
        """The opcode without suffixes."""
        return self.opcode.partition(".")[0]

    @property
    def target(self) -> int | None:
        """Where a direct branch or call goes."""
        found = _ADDRESS.findall(self.operands)
        return int(found[-1], 16) if self.base in ("BRA", "CALL", "BSSY") and found else None

    @property
    def falls_through(self) -> bool:
        """The next instruction may run after this one."""
        if self.guarded or self.base not in ("BRA", "BRX", "JMX", "EXIT", "RET"):
            return True
        # a uniform branch names its predicate among the operands
        return self.base == "BRA" and self.operands.strip() != self.operands.split(",")[-1].strip()

    @property
    def is_spill(self) -> bool:
        """Touches local memory."""
        return self.base in _SPILLS


@dataclass(frozen=True)
class HotLoop:
    """An innermost loop.

    Attributes:
        start, end: addresses of the first instruction and of the branch back.
        instructions: SASS instructions between them that belong to it.
        spill_ops: those that touch local memory.
        warps: that run it.
        partition: number of the warp partition; None: the function's own warps.
        moves_tiles: holds what marks a loop as hot.
    """

    start: int
    end: int
    instructions: int
    spill_ops: int
    warps: int
    partition: int | None = None
    moves_tiles: bool = False


def parse_sass(listing: str) -> list[Instruction]:
    """Instructions of a listing with one function."""
    return [
        Instruction(int(address, 16), opcode, operands.strip(), bool(guard))
        for address, guard, opcode, operands in _LINE.findall(listing)
    ]


def parse_jump_table(elf: str) -> list[int]:
    """Addresses in constant bank 2 (cuobjdump -elf); empty where no indirect branch needs one."""
    found = re.search(r"^\.nv\.constant2\.\S+\n((?:[ \t]*0x[0-9a-f]{8}.*\n)+)", elf, re.MULTILINE)
    return [int(word, 16) for word in _ADDRESS.findall(found[1])] if found else []


def partition_warps(ttgir: str) -> tuple[int, list[int]]:
    """Warps of the function itself and of its warp partitions, in the order of the TTGIR."""
    own = re.search(r'"ttg\.num-warps" = (\d+)', ttgir)
    assert own is not None, "TTGIR without ttg.num-warps"
    return int(own[1]), [int(n) for n in re.findall(r"\bnum_warps\((\d+)\)", ttgir)]


def tensor_core(instructions: Iterable[Instruction]) -> str:
    """The newest kind of tensor-core instruction that a kernel holds, or "none"."""
    bases = {i.base for i in instructions}
    return next((kind for kind, names in _TENSOR_CORE.items() if bases & {*names}), "none")


def uses_tma(instructions: Iterable[Instruction]) -> bool:
    """True where tensors are moved by TMA."""
    return any(i.base.startswith("UTMA") for i in instructions)


def hot_loops(
    instructions: list[Instruction],
    own_warps: int,
    partitions: list[int] | None = None,
    jump_table: list[int] | None = None,
) -> list[HotLoop]:
    """Hot loops by address, each with its warps; see the rules above.

    Args:
        instructions: of one function.
        own_warps: warps of the function outside warp partitions.
        partitions: warps of each warp partition.
        jump_table: where the indirect branch goes; entry i is partition i.

    Raises:
        ValueError: warp partitions without an entry in the jump table.
    """
    partitions, jump_table = partitions or [], jump_table or []
    if len(jump_table) < len(partitions):
        raise ValueError(f"{len(partitions)} warp partitions, {len(jump_table)} jump table entries")
    flow = _control_flow(instructions, jump_table)
    entry = instructions[0].address
    # networkx before 3.6 holds the entry as its own dominator, later ones leave it out
    above = {**nx.immediate_dominators(flow, entry), entry: entry}
    loops = {h: body for h, body in _natural_loops(flow, above).items() if not _waits(flow, body)}
    found = []
    for header, body in sorted(loops.items()):
        if any(other in body for other in loops if other != header):
            continue
        last = max(block for block in body if header in flow.successors(block))
        inside = [i for b in body if header <= b <= last for i in flow.nodes[b]["instructions"]]
        owners = [i for i in range(len(partitions)) if _dominates(above, jump_table[i], header)]
        found.append(
            HotLoop(
                start=header,
                end=max(i.address for i in inside),
                instructions=len(inside),
                spill_ops=sum(i.is_spill for i in inside),
                warps=partitions[owners[0]] if owners else own_warps,
                partition=owners[0] if owners else None,
                moves_tiles=_touches_tiles(inside) or any(i.base == "SYNCS" for i in inside),
            )
        )
    return [loop for loop in found if loop.moves_tiles or loop is _stand_in(found, loop.partition)]


def _stand_in(loops: list[HotLoop], partition: int | None) -> HotLoop | None:
    """The largest loop of a partition that has none with a mark."""
    own = [loop for loop in loops if loop.partition == partition]
    if any(loop.moves_tiles for loop in own):
        return None
    return max(own, key=lambda loop: loop.instructions)


def warp_instructions_per_token(loops: list[HotLoop], tokens_per_step: int, ctas_per_token: int = 1) -> float:
    """Instructions of all warps of all CTAs that share a KV token, per token."""
    per_step = sum(loop.instructions * loop.warps for loop in loops)
    return per_step / tokens_per_step * ctas_per_token


def _control_flow(instructions: list[Instruction], jump_table: list[int]) -> nx.DiGraph:
    """Basic blocks, called by their first address."""
    addresses = [i.address for i in instructions]
    known = set(addresses)
    starts = {addresses[0], *(t for i in instructions if (t := i.target) in known and t is not None)}
    starts |= {a for a in jump_table if a in known}
    for this, after in zip(instructions, addresses[1:], strict=False):
        if this.base in ("BRA", "BRX", "JMX", "EXIT", "RET", "CALL", "BSYNC"):
            starts.add(after)
    flow, block = nx.DiGraph(), addresses[0]
    for i in instructions:
        block = i.address if i.address in starts else block
        flow.add_node(block)
        flow.nodes[block].setdefault("instructions", []).append(i)
    rejoin: dict[str, int] = {}
    blocks = list(flow.nodes)
    for block, after in zip(blocks, [*blocks[1:], None], strict=True):
        body = flow.nodes[block]["instructions"]
        # a divergent region ends where the BSSY of its barrier register says
        rejoin |= {i.operands.split(",")[0]: i.target for i in body if i.base == "BSSY" and i.target}
        last = body[-1]
        goes = [last.target] if last.base in ("BRA", "CALL") else []
        goes += jump_table if last.base == "BRX" else []
        goes += [rejoin.get(last.operands)] if last.base == "BSYNC" else []
        goes += [after] if last.falls_through else []
        flow.add_edges_from((block, to) for to in goes if to in flow)
    return flow


def _natural_loops(flow: nx.DiGraph, above: dict[int, int]) -> dict[int, set[int]]:
    """Header -> blocks of every natural loop; loops with the same header are one."""
    loops: dict[int, set[int]] = {}
    for block in above:
        for header in flow.successors(block):
            if _dominates(above, header, block):
                before = flow.subgraph(above.keys() - {header})
                inside = nx.ancestors(before, block) | {block} if block != header else set()
                loops.setdefault(header, {header}).update(inside)
    return loops


def _dominates(above: dict[int, int], one: int, other: int) -> bool:
    """Every way from the entry to `other`, which can be reached, passes `one`."""
    while other in above and other != one and other != above[other]:
        other = above[other]
    return other == one


def _touches_tiles(inside: list[Instruction]) -> bool:
    return tensor_core(inside) != "none" or any(i.base in _TILES for i in inside)


def _waits(flow: nx.DiGraph, body: set[int]) -> bool:
    """A spin, or the dispatch of warp partitions."""
    inside = [i for block in body for i in flow.nodes[block]["instructions"]]
    if len(inside) == 1 or any(i.base == "BRX" for i in inside):
        return True  # one: the end of a function, never left
    waits = len(inside) <= SPIN_SIZE and any(i.base in _WAITS for i in inside)
    return waits and not _touches_tiles(inside)
