"""index_scores by Triton against its reference: keys that are a part of wider rows, in pages of NaN."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

import helix_compile.kernels.catalog  # noqa: F401
from helix_compile.ir.ops import helix
from helix_compile.kernels.registry import Site
from helix_compile.kernels.sparse.scores import INDEX_SCORES, index_scores_triton
from helix_compile.kernels.target import offline_target
from tests.support.kernel_checks import (
    CAPACITY,
    INTERPRETED,
    assert_case_is_complete,
    assert_kernel_close,
    poisoned_memory,
)
from tests.support.sparse_steps import SparseStep

# a tile has 16 slots here: none visible, within the first, at its border and at a page's, several
STEPS = [
    SparseStep((0, 3, 16, 17), T=3, page_size=5),
    SparseStep((48, 1, 31), J=8, index_width=16, page_size=16),
    SparseStep((40,), T=1, J=17, index_width=20, page_size=1),
]


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("step", STEPS, ids=["borders", "whole-tiles", "pages-of-one"])
def test_agrees_with_the_reference(step: SparseStep, splits: int) -> None:
    arguments = step.indexer(seed=splits)
    with poisoned_memory():
        got = index_scores_triton(*arguments, splits)
    assert got.dtype == torch.float32
    assert_kernel_close(got, helix.index_scores(*arguments))
    visible = arguments[4]
    assert torch.equal(got == -torch.inf, torch.arange(got.shape[2]) >= visible[..., None])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bit_keys_and_queries(dtype: torch.dtype) -> None:
    """Products of 16-bit values are exact in float32: nothing is rounded on the way."""
    arguments = replace(STEPS[1], dtype=dtype).indexer()
    q, w, cache, *rest = arguments
    assert_kernel_close(index_scores_triton(*arguments), helix.index_scores(q.float(), w, cache.float(), *rest))


def test_a_score_does_not_depend_on_where_its_slot_lies(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks, pages and tiles differ; the same key has the same bits everywhere."""
    # the interpreter's dot is a BLAS: on some processors a column's bits hang on which of a tile it is
    monkeypatch.setattr(np, "matmul", lambda a, b, **_: (a[..., None] * b[..., None, :, :]).sum(axis=-2))
    q, w, cache, table, _, scale = SparseStep((40,), J=8, index_width=16, page_size=4).indexer()
    slot = torch.arange(40)
    cache[table[0, slot // 4], slot % 4] = torch.randn(16)
    for splits in (1, 3):
        got = index_scores_triton(q, w, cache, table, torch.tensor([[40]], dtype=torch.int32), scale, splits)
        assert len(set(got[0, 0, :40].tolist())) == 1


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy's, of the interpreter's dot
def test_faults_reach_the_score() -> None:
    """A NaN key is no 0 after relu, and an infinite one is not hidden by heads that pad the tile."""
    arguments = SparseStep((20,), J=3, page_size=5).indexer()
    q, w, cache, table, _, _ = arguments
    q.abs_(), w.abs_()
    cache[table[0, 1], 2, 4], cache[table[0, 2], 0] = torch.nan, torch.inf
    got, wanted = index_scores_triton(*arguments), helix.index_scores(*arguments)
    assert got[0, 0, 7].isnan() and got[0, 0, 10] == torch.inf
    assert_kernel_close(got, wanted)


def test_queries_and_weights_of_any_layout() -> None:
    q, w, *rest = STEPS[0].indexer()
    turned = q.permute(3, 2, 0, 1).contiguous().permute(2, 3, 1, 0), w.transpose(0, 1).contiguous().transpose(0, 1)
    by_head = q.transpose(1, 2).contiguous().transpose(1, 2), w
    for other in (turned, by_head):
        assert torch.equal(index_scores_triton(*other, *rest), index_scores_triton(q, w, *rest))


def test_what_it_refuses_and_what_it_compiles() -> None:
    arguments = replace(STEPS[1], dtype=torch.bfloat16, index_width=128).indexer()
    q, _, cache, _, visible, _ = arguments

    def reason(**change: object) -> str:
        named = dict(zip(("q", "w", "cache", "table", "visible", "scale"), arguments, strict=True)) | change
        return str(INDEX_SCORES.supports(Site("index_scores", tuple(named.values()), CAPACITY), INTERPRETED))

    assert reason() == "None"
    assert "float64" in reason(q=q.double(), cache=cache.double())
    assert "keys of torch.float32" in reason(cache=cache.float())
    assert "int32" in reason(visible=visible.long())
    assert "stride" in reason(cache=cache.mT.contiguous().mT)
    assert "300" in reason(q=q.new_zeros(1, 1, 8, 300))
    for target in (INTERPRETED, offline_target("sm_90"), offline_target("sm_100")):
        (case,) = INDEX_SCORES.cases(Site("index_scores", arguments, CAPACITY), target)
        assert_case_is_complete(case)
        assert case.kv_tokens_per_step == case.constexprs["BLOCK_N"]
