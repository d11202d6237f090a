"""The kernels on a CUDA device: the cases of the interpreter, graphs captured and replayed, the whole tiny model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import helix_compile.kernels.catalog
from helix_compile import helix_compile
from helix_compile.kernels.reference import cache_append_reference, gqa_decode_reference, mla_decode_reference
from helix_compile.kernels.reference_fp8 import FP8, pack_ds_mla, quantize
from helix_compile.kernels.reference_sparse import kth_candidate_reference
from helix_compile.kernels.registry import Capacity, Site, select_kernel
from helix_compile.kernels.target import device_target
from tests.kernels.test_reference_fp8 import hard_values
from tests.support.driver import STEPS, Reference, deviation, left_padded, random_ids
from tests.support.gqa import GqaStep
from tests.support.kernel_cases import CASES, KernelCase, expected_results, on_device, results, worst_deviation
from tests.support.models import fresh_model
from tests.support.sparse_steps import candidates_of_ranks

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

# against float64 from the same inputs: the output and the weights p are rounded to the dtype
LIMIT = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
SELECTION = ("index_scores", "topk_candidates", "kth_candidate", "select_slots", "mla_decode_slots")
CAPTURED = ("mla_decode", "cache_append", "merge_lse", "moe_experts", "gqa_decode", *SELECTION)


def triton_op(op: str) -> Any:
    return getattr(torch.ops.helix_triton, op)


def skip_unless_supported(case: KernelCase, arguments: tuple[Any, ...]) -> None:
    site = Site(case.op, arguments, Capacity(max_batch_size=8, max_slots=1024))
    choice = select_kernel(site, device_target(torch.device("cuda")))
    if choice.kernel is None:
        pytest.skip(choice.reason)


@pytest.mark.parametrize("dtype", LIMIT, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_case_on_the_device(case: KernelCase, dtype: torch.dtype) -> None:
    for seed in (0, 1):
        arguments = case.arguments(dtype, seed)
        on_card = on_device(arguments, "cuda")
        skip_unless_supported(case, on_card)
        got = results(triton_op(case.op), on_card, case)
        assert worst_deviation(got, expected_results(case, arguments), case.exact) <= LIMIT[dtype]


def real_shape(heads: int, T: int) -> tuple[Any, ...]:
    """Arguments with R = 512, r = 64 over lengths around the borders of a page, of a tile and of a split; bf16."""
    lengths = (0, 1, 63, 64, 65, 127, 128, 129, 4097)
    step = GqaStep(lengths, T, 1, heads, 576, 1, 128, torch.bfloat16)
    q, cache, _, table, visible, scale = step.arguments()
    return q[..., :512].contiguous(), q[..., 512:].contiguous(), cache[:, :, 0], table, visible, scale


ROWS = [(16, 1), (16, 2), (32, 1), (20, 3), (16, 5), (128, 1), (128, 5)]  # heads and T of each form


@pytest.mark.parametrize(("heads", "T"), ROWS)
def test_mla_decode_at_the_real_shape(heads: int, T: int) -> None:
    args = real_shape(heads, T)
    case = KernelCase("mla_decode", "real", lambda dtype, seed: args)
    got = results(triton_op("mla_decode"), on_device(args, "cuda"))
    assert worst_deviation(got, expected_results(case, args)) <= LIMIT[torch.bfloat16]


@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize("B", [9, 72])  # 72 sequences of 8 KV heads fill a card twice
@pytest.mark.parametrize("T", [1, 5])
def test_gqa_decode_at_a_real_shape(T: int, B: int, joint: bool) -> None:
    """`joint`: K and V are views of one cache, as in the rewritten graph."""
    lengths = (0, 1, 63, 64, 65, 127, 128, 129, 1025) * (B // 9)
    args = GqaStep(lengths, T, 8, 8, 128, 128, 128, torch.bfloat16).arguments()
    case = KernelCase("gqa_decode", "real", lambda dtype, seed: args)
    q, k, v, *rest = on_device(args, "cuda")
    if joint:
        both = torch.cat([k, v], dim=-1)
        k, v = both[..., :128], both[..., 128:]
    got = results(triton_op("gqa_decode"), (q, k, v, *rest))
    assert worst_deviation(got, expected_results(case, args)) <= LIMIT[torch.bfloat16]


@pytest.mark.parametrize(("heads", "T"), ROWS)
def test_mla_decode_of_an_fp8_cache(heads: int, T: int) -> None:
    """Against float64 over what the FP8 cache says: its own rounding is no part of the difference."""
    q, q_rope, cache, table, visible, scale = real_shape(heads, T)
    R, cache_scale = q.shape[3], torch.tensor(0.01)
    rows = pack_ds_mla(*cache.flatten(0, 1).split([R, cache.shape[2] - R], dim=1)).view(*cache.shape[:2], -1)
    for stored, own in ((quantize(cache.nan_to_num(0.0), cache_scale), cache_scale), (rows, None)):
        args = (q, q_rope, stored, table, visible, scale)
        expected = mla_decode_reference(q.double(), q_rope.double(), *args[2:], cache_scale=own)
        on_card = None if own is None else own.cuda()
        got = torch.ops.helix_triton.mla_decode(*on_device(args, "cuda"), cache_scale=on_card)
        assert worst_deviation(list(got), list(expected)) <= LIMIT[torch.bfloat16]


def test_gqa_decode_of_an_fp8_cache() -> None:
    q, k, v, *rest = GqaStep((0, 1, 64, 129, 1025), 2, 8, 8, 128, 128, 128, torch.bfloat16).arguments()
    scale = torch.tensor(0.01)
    args = (q, quantize(k.nan_to_num(0.0), scale), quantize(v.nan_to_num(0.0), scale), *rest)
    expected = gqa_decode_reference(q.double(), *args[1:], cache_scale=scale)
    got = torch.ops.helix_triton.gqa_decode(*on_device(args, "cuda"), cache_scale=scale.cuda())
    assert worst_deviation(list(got), list(expected)) <= LIMIT[torch.bfloat16]


@pytest.mark.parametrize("name", ["e4m3", "ds_mla"])
def test_bits_of_an_append_in_fp8(name: str) -> None:
    """The card rounds as the reference does: every code, ties, zeros, what lies beyond 448."""
    draw, pages, page, B, T = torch.Generator().manual_seed(0), 8, 128, 4, 64
    scale = torch.tensor(0.7) if name == "e4m3" else None
    hard = torch.from_numpy(hard_values()).float()
    latent, rope = (hard[torch.randint(0, len(hard), (B, T, w), generator=draw)] for w in (512, 64))
    cache = torch.zeros(pages, page, 576 if name == "e4m3" else 656, dtype=torch.uint8)
    cache = cache.view(FP8) if name == "e4m3" else cache
    slots = torch.arange(B * T).view(B, T) % 250
    args = (cache, torch.arange(pages).view(B, 2), slots, slots.int() + 1, latent, rope)
    there = on_device(args, "cuda")
    torch.ops.helix_triton.cache_append(*there, cache_scale=None if scale is None else scale.cuda())
    cache_append_reference(*args, cache_scale=scale)
    assert torch.equal(there[0].cpu().view(torch.uint8), cache.view(torch.uint8))


@pytest.mark.parametrize("kind", ["random", "few", "same", "hard"])
def test_selection_at_the_real_size(kind: str) -> None:
    """131,072 tokens on four ranks, top 2,048: rows in parts, thousands of ties; the same bits each time."""
    check_selection("cuda", kind, [[131072, 90001], [2047, 0]], 32768, 2048)


def check_selection(device: str, kind: str, lengths: list[list[int]], n: int, top_k: int) -> None:
    cp, tokens_per_block = 4, 64
    ranks, found = candidates_of_ranks(kind, lengths, n, top_k, cp, tokens_per_block, seed=0)
    bound = kth_candidate_reference(found, top_k)
    calls = [("kth_candidate", (found, top_k))]
    for rank, (scores, visible) in enumerate(ranks):
        ledger = (torch.tensor(rank), top_k, cp, tokens_per_block)
        calls += [("topk_candidates", (scores, visible, *ledger)), ("select_slots", (scores, visible, *bound, *ledger))]
    for op, arguments in calls:
        case = KernelCase(op, "real", lambda dtype, seed, arguments=arguments: arguments, exact=True)
        for _ in range(2):
            got = results(triton_op(op), on_device(arguments, device))
            assert worst_deviation(got, expected_results(case, arguments), exact=True) == 0


@pytest.mark.parametrize("case", [c for c in CASES if c.op in CAPTURED], ids=str)
def test_replay_of_a_captured_launch_is_the_eager_launch(case: KernelCase) -> None:
    """Captured with one set of values and lengths, replayed with another: nothing was read on the host."""
    dtype = torch.bfloat16
    static, fresh = (on_device(case.arguments(dtype, seed), "cuda") for seed in (0, 1))
    skip_unless_supported(case, static)
    op = triton_op(case.op)
    eager = results(op, on_device(fresh, "cuda"), case)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # compiles before the capture
        results(op, on_device(static, "cuda"), case)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = results(op, static, case)
    for _ in range(2):
        _overwrite(static, fresh)
        graph.replay()
        torch.cuda.synchronize()
        # sums of experts may be taken in another order
        exact = case.op != "moe_experts"
        assert worst_deviation(replayed, [e.cpu() for e in eager], exact) <= LIMIT[dtype]


def _overwrite(static: tuple[Any, ...], fresh: tuple[Any, ...]) -> None:
    for old, new in zip(static, fresh, strict=True):
        if isinstance(old, Tensor):
            assert old.shape == new.shape and old.stride() == new.stride()
            old.copy_(new)
        else:
            assert old == new


@pytest.mark.parametrize("experts", ["batched_mm", "grouped_mm"])
def test_tiny_deepseek_v3_by_kernels(experts: str) -> None:
    """Four virtual ranks on one device against the unmodified model there, fp32, ragged prompt and steps after it."""
    model = fresh_model(dtype=torch.float32, experts=experts).cuda()
    compiled = helix_compile(model, cp=4, lower="triton", max_seq_len=64, tokens_per_block=4)
    reference = Reference(model)
    lengths = [6, 11, 9]
    for number, tokens in enumerate((max(lengths), *STEPS)):
        mask = left_padded(lengths) if number == 0 else torch.ones(3, tokens, dtype=torch.int64)
        ids = random_ids(model, 3, tokens).cuda()
        got = compiled(ids, mask.cuda())
        expected = reference.step(ids, mask.cuda())
        assert deviation(got.cpu(), expected.cpu(), mask) <= 2e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_tiny_deepseek_v3_in_16_bit(dtype: torch.dtype) -> None:
    """Kernels and reference of the same rewritten graph: both round, at different places."""
    model = fresh_model(dtype=dtype, experts="grouped_mm").cuda()
    by_kernels, by_reference = (
        helix_compile(model, cp=4, lower=lower, max_seq_len=64) for lower in ("triton", "reference")
    )
    for tokens in (9, 1, 3):
        ids = random_ids(model, 2, tokens).cuda()
        mask = torch.ones(2, tokens, dtype=torch.int64)
        assert deviation(by_kernels(ids).cpu(), by_reference(ids).cpu(), mask) <= 2 * LIMIT[dtype]
