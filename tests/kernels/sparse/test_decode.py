"""mla_decode_slots by Triton against its reference: each query its own list, in a cache of NaN that is a part of wider rows."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import helix_compile.kernels.catalog  # noqa: F401
from helix_compile.ir.ops import helix
from helix_compile.kernels.mla.tuning import POINTER, ROWS, TRANSPOSED, MlaConfig
from helix_compile.kernels.registry import Capacity, Site
from helix_compile.kernels.sparse.decode import MLA_DECODE_SLOTS, mla_decode_slots_triton
from helix_compile.kernels.target import offline_target
from tests.support.kernel_checks import CAPACITY, INTERPRETED, assert_case_is_complete, poisoned_memory
from tests.support.mla import mismatch
from tests.support.sparse_steps import SparseStep

# how rows are loaded: gathered by TMA, which wants rows of 16 bytes' multiple and powers of two, or by pointers
GATHERED = SparseStep((15, 16, 40), T=2, m=33, H=17, R=32, r=16, index_width=16, page_size=5)
FORMS = [
    MlaConfig(ROWS, 16, 16, 4, 2, parts=2),
    MlaConfig(ROWS, 64, 16, 4, 2),
    MlaConfig(TRANSPOSED, 16, 16, 4, 2),
    MlaConfig(TRANSPOSED, 32, 16, 4, 2, parts=2),
    MlaConfig(POINTER, 16, 16, 4, 2),
]
# a tile has 16 places here: lists of none, below, at and beyond a tile; a list that is full; heads beyond a tile of 16
STEPS = {
    "tiny": SparseStep((0, 2, 20), T=3, m=17),
    "tiles": SparseStep((15, 16, 40), m=33, H=17, R=32, r=16, page_size=16),
    "no-rope": SparseStep((9, 30), T=1, m=20, r=0, R=16, page_size=3),
}


@pytest.mark.parametrize("splits", [1, 4])
@pytest.mark.parametrize("step", STEPS.values(), ids=STEPS)
def test_agrees_with_the_reference(step: SparseStep, splits: int) -> None:
    arguments = step.attention(seed=splits)
    with poisoned_memory():
        got = mla_decode_slots_triton(*arguments, splits)
    assert mismatch(got, helix.mla_decode_slots(*arguments)) is None


@pytest.mark.parametrize("config", FORMS, ids=str)
def test_each_form(config: MlaConfig) -> None:
    """Pages smaller than a tile; places past the count of a list load a row of it once more, never one of NaN."""
    arguments = GATHERED.attention(seed=1)
    with poisoned_memory():
        got = mla_decode_slots_triton(*arguments, 2, config)
    assert mismatch(got, helix.mla_decode_slots(*arguments)) is None


def test_every_slot_in_order_is_mla_decode() -> None:
    """The two kernels share a loop; a list of all visible slots gives the same bits."""
    q, q_rope, cache, table, *_ = SparseStep((33, 5), m=35, page_size=7).attention()
    cache.nan_to_num_(nan=0.5)
    slots = torch.arange(35, dtype=torch.int32).expand(2, 1, 35)
    visible = torch.tensor([[33], [5]], dtype=torch.int32)
    chosen = mla_decode_slots_triton(q, q_rope, cache, table, visible, slots, visible, 0.3)
    dense = torch.ops.helix_triton.mla_decode(q, q_rope, cache, table, visible, 0.3)
    assert all(torch.equal(a, b) for a, b in zip(chosen, dense, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bit_caches(dtype: torch.dtype) -> None:
    arguments = replace(STEPS["tiles"], dtype=dtype).attention()
    o, lse = mla_decode_slots_triton(*arguments, 4)
    wide = [a.float() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in arguments]
    o_wanted, lse_wanted = helix.mla_decode_slots(*wide)
    assert o.dtype == dtype and lse.dtype == torch.float32
    slack = 2 * torch.finfo(dtype).eps  # p and o are rounded once each
    assert (o.float() - o_wanted).abs().max() <= slack * o_wanted.abs().max()
    torch.testing.assert_close(lse, lse_wanted, rtol=2e-6, atol=2e-6)


def test_what_it_refuses_and_what_it_compiles() -> None:
    step = SparseStep((9, 30), m=2048, H=128, R=512, r=64, index_width=128, page_size=16, dtype=torch.bfloat16)
    arguments = step.attention()
    q, q_rope, cache, _, _, slots, *_ = arguments

    def reason(**change: object) -> str:
        named = (
            dict(zip(("q", "q_rope", "cache", "table", "visible", "slots", "count", "scale"), arguments, strict=True))
            | change
        )
        return str(MLA_DECODE_SLOTS.supports(Site("mla_decode_slots", tuple(named.values()), CAPACITY), INTERPRETED))

    assert reason() == "None"
    assert "float64" in reason(q=q.double(), q_rope=q_rope.double(), cache=cache.double())
    assert "slots torch.int64" in reason(slots=slots.long())
    assert "stride" in reason(cache=cache.mT.contiguous().mT)
    assert "scale" in reason(scale=0.0)
    for arch in ("sm_90", "sm_100"):
        cases = MLA_DECODE_SLOTS.cases(Site("mla_decode_slots", arguments, Capacity(8, 32768)), offline_target(arch))
        for case in cases:
            assert_case_is_complete(case)
        assert {case.kernel for case in cases} == {"mla_decode_slots", "merge_splits"}
        by_pointers = [case for case in cases if "ROW_STRIDE" in case.constexprs]
        assert {case.fallback for case in by_pointers} == {arch == "sm_100"}
        for case in by_pointers:
            assert (case.constexprs["ROW_STRIDE"], case.constexprs["PAGE_STRIDE"]) == (704, 16 * 704)
        gathered = [case for case in cases if case.signature.get("k_desc") == "tensordesc<bf16[1,256]>"]
        assert bool(gathered) == (arch == "sm_100")
