"""One small call of every op that has a kernel: the interpreter and a device are judged by the same cases.

Arguments are made on the CPU from a seed; other seeds give other values (and other lengths) of the same shapes. What
nobody may read is poisoned.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from helix_compile.kernels.exchange import pack_heads_reference
from helix_compile.kernels.reference_sparse import kth_candidate_reference
from helix_compile.layout.ledger import owner_rank
from tests.support.gqa import STALE, GqaStep
from tests.support.sparse_steps import SparseStep, candidates_of_ranks, shard_scores

Arguments = tuple[Any, ...]


@dataclass(frozen=True)
class KernelCase:
    """One call.

    Attributes:
        op: base name.
        name: of the case.
        arguments: of the op, for a dtype and a seed.
        exact: a copy, which is judged bit by bit; else the reference runs in float64.
        reach: of attention with a window: how many local slots a row sees at most; rows that see fewer are among them.
    """

    op: str
    name: str
    arguments: Callable[[torch.dtype, int], Arguments]
    exact: bool = False
    reach: int = 0

    def keywords(self, arguments: Arguments) -> dict[str, Tensor]:
        """What the op is given by name, where these are its arguments."""
        if not self.reach:
            return {}
        visible = arguments[4]
        spread = torch.arange(visible.numel(), device=visible.device).view(visible.shape) % 3
        return {"first": (visible - self.reach + spread).clamp(min=0).minimum(visible).int()}

    def __str__(self) -> str:
        return f"{self.op}-{self.name}"


def on_device(arguments: Arguments, device: str | torch.device) -> Arguments:
    """A copy of every tensor on `device`; views of one buffer stay strided as they are."""
    return tuple(
        torch.empty_strided(a.shape, a.stride(), dtype=a.dtype, device=device).copy_(a) if isinstance(a, Tensor) else a
        for a in arguments
    )


def results(op: Any, arguments: Arguments, case: KernelCase | None = None) -> list[Tensor]:
    """What a call leaves, of a case with what it is given by name: its results, then the arguments that its schema says it writes."""
    out = op(*arguments, **(case.keywords(arguments) if case else {}))
    written = [
        a
        for a, spec in zip(arguments, op.default._schema.arguments, strict=False)
        if spec.alias_info is not None and spec.alias_info.is_write
    ]
    return [*([out] if isinstance(out, Tensor) else out), *written]


def expected_results(case: KernelCase, arguments: Arguments) -> list[Tensor]:
    """By the reference on the CPU, from copies; in float64 unless the case is exact."""
    copies = on_device(arguments, "cpu")
    if not case.exact:
        copies = tuple(a.double() if isinstance(a, Tensor) and a.is_floating_point() else a for a in copies)
    return results(getattr(torch.ops.helix, case.op), copies, case)


def worst_deviation(got: list[Tensor], expected: list[Tensor], exact: bool = False) -> float:
    """Over all results, relative to the largest value of each; what is no float, -inf and NaN must be the same."""
    worst = 0.0
    assert len(got) == len(expected)
    for a, b in zip(got, expected, strict=True):
        a = a.cpu()
        assert a.shape == b.shape
        if exact or not a.is_floating_point():
            assert a.dtype == b.dtype and torch.equal(a.nan_to_num(), b.nan_to_num())
            continue
        finite = b.isfinite()
        assert torch.equal(a.isfinite(), finite)
        assert torch.equal(a[~finite].double().nan_to_num(), b[~finite].double().nan_to_num())
        largest = max(float(b[finite].abs().max()), 1e-30) if bool(finite.any()) else 1.0
        difference = (a.double() - b.double())[finite]
        worst = max([worst, *([float(difference.abs().max()) / largest] if len(difference) else [])])
    return worst


def _rolled(lengths: tuple[int, ...], seed: int) -> tuple[int, ...]:
    return lengths[seed % len(lengths) :] + lengths[: seed % len(lengths)]


def _mla(H: int, R: int, r: int, page: int, T: int, lengths: tuple[int, ...], beside: int = 0) -> Callable:
    """One KV head of width R + r whose first R channels are the values; `beside`: channels of the rows that are no part."""

    def arguments(dtype: torch.dtype, seed: int) -> Arguments:
        step = GqaStep(_rolled(lengths, seed), T, 1, H, R + r, 1, page, dtype)
        q, cache, _, table, visible, scale = step.arguments(seed)
        rows = torch.nn.functional.pad(cache[:, :, 0], (0, beside), value=torch.nan)[..., : R + r]
        return (q[..., :R].contiguous(), q[..., R:].contiguous(), rows, table, visible, scale)

    return arguments


def _gqa(T: int, K: int, G: int, D: int, page: int, lengths: tuple[int, ...]) -> Callable:
    return lambda dtype, seed: GqaStep(_rolled(lengths, seed), T, K, G, D, D, page, dtype).arguments(seed)


def _merge(P: int, H: int, W: int) -> Callable:
    """Parts that are views of a packed buffer, some dead and full of NaN, one row dead in all."""

    def arguments(dtype: torch.dtype, seed: int) -> Arguments:
        draw = torch.Generator().manual_seed(seed)
        o, lse = (torch.randn(P, 3, 2, H, W, generator=draw).to(dtype), torch.randn(P, 3, 2, H, generator=draw))
        o[0, 1], lse[0, 1] = torch.nan, -torch.inf
        o[:, 2, 0], lse[:, 2, 0] = torch.nan, -torch.inf
        wide_o, wide_lse = o.new_empty(P, o[0].numel() + 64), lse.new_empty(P, lse[0].numel() + 64)
        views = (wide_o[:, : o[0].numel()].view(o.shape), wide_lse[:, : lse[0].numel()].view(lse.shape))
        return views[0].copy_(o), views[1].copy_(lse)

    return arguments


def _pack(H: int, W: int, peers: int) -> Callable:
    def arguments(dtype: torch.dtype, seed: int) -> Arguments:
        draw = torch.Generator().manual_seed(seed)
        lse = torch.randn(3, 2, H, generator=draw)
        lse[1] = -torch.inf
        return torch.randn(3, 2, H, W, generator=draw).to(dtype), lse, peers

    return arguments


def _unpack(H: int, W: int, peers: int) -> Callable:
    def arguments(dtype: torch.dtype, seed: int) -> Arguments:
        o, lse, _ = _pack(H, W, peers)(dtype, seed)
        return pack_heads_reference(o, lse, peers), o, lse

    return arguments


def _append(R: int, r: int, page: int, heads: tuple[int, ...] = (), beside: int = 0) -> Callable:
    """`heads` (K,): K and V of K KV heads, else a latent and a rope part; `beside`: channels before and behind these."""

    def arguments(dtype: torch.dtype, seed: int) -> Arguments:
        draw = torch.Generator().manual_seed(seed)
        B, T, pages = 3, 4, 3
        cache = torch.full((B * pages, page, *heads, beside + R + r + beside), STALE, dtype=dtype)
        cache = cache[..., beside : beside + R + r]
        slots = torch.randint(0, page * pages - T, (B, 1), generator=draw) + torch.arange(T)
        slots[torch.rand(B, T, generator=draw) < 0.4] = -1
        new = (torch.randn(B, T, *heads, w, generator=draw).to(dtype) for w in (R, r))
        table = torch.randperm(B * pages, generator=draw).view(B, pages)
        return cache, table, slots, (slots + 1).int(), *new

    return arguments


def _experts(N: int, D: int, F: int, E: int) -> Callable:
    """E experts here out of 2 * E; some get no token."""

    def arguments(dtype: torch.dtype, seed: int) -> Arguments:
        draw = torch.Generator().manual_seed(seed)
        ids = torch.rand(N, 2 * E, generator=draw).topk(3).indices
        x, gate_up, down = (torch.randn(shape, generator=draw).to(dtype) for shape in ((N, D), (E, 2, F, D), (E, D, F)))
        weights = torch.rand(N, 3, generator=draw).to(dtype)
        return x, ids, weights, gate_up / D**0.5, down / F**0.5, torch.tensor(E // 2)

    return arguments


def _router(N: int, E: int, n_group: int, topk_group: int, top_k: int) -> Callable:
    """Logits in steps of 1/4, so that many tie; none negative: sigmoid(x) + sigmoid(-x) = 1 would tie by rounding."""

    def arguments(dtype: torch.dtype, seed: int) -> Arguments:
        draw = torch.Generator().manual_seed(seed)
        logits = torch.randint(0, 17, (N, E), generator=draw).float() / 4
        return logits, torch.zeros(E), n_group, topk_group, top_k, True, 2.5

    return arguments


def _rope(H: int, r: int) -> Callable:
    def arguments(dtype: torch.dtype, seed: int) -> Arguments:
        draw = torch.Generator().manual_seed(seed)
        angle = torch.randn(3, 2, r // 2, generator=draw).repeat(1, 1, 2)
        q = torch.randn(3, H, 2, r, generator=draw).to(dtype)
        return q, angle.cos().to(dtype), angle.sin().to(dtype), True

    return arguments


def _index(step: SparseStep) -> Callable:
    return lambda dtype, seed: replace(step, dtype=dtype, lengths=_rolled(step.lengths, seed)).indexer(seed)


def _slots(step: SparseStep) -> Callable:
    return lambda dtype, seed: replace(step, dtype=dtype, lengths=_rolled(step.lengths, seed)).attention(seed)


# scores are chosen from a grid or near each other; half of the hard ones are above 0.0 and -0.0, where a top_k then ends
def _candidates(kind: str, visible: list[list[int]], n: int, top_k: int) -> Callable:
    """Rank 1 of 3 with blocks of 4. Scores are float32 whatever the dtype."""

    def arguments(dtype: torch.dtype, seed: int) -> Arguments:
        scores, seen = shard_scores(kind, visible[seed % 2 :] + visible[: seed % 2], n, seed)
        return scores, seen, torch.tensor(1), top_k, 3, 4

    return arguments


def _kth(kind: str, lengths: list[list[int]], n: int, top_k: int) -> Callable:
    return lambda dtype, seed: (candidates_of_ranks(kind, lengths, n, top_k, 3, 4, seed)[1], top_k)


def _select(kind: str, lengths: list[list[int]], n: int, top_k: int) -> Callable:
    def arguments(dtype: torch.dtype, seed: int) -> Arguments:
        ranks, found = candidates_of_ranks(kind, lengths, n, top_k, 3, 4, seed)
        score, position = kth_candidate_reference(found, top_k)
        rank = owner_rank(int(position[0, 0]), 3, 4)  # the k-th key of the first query is its own
        return (*ranks[rank], score, position, torch.tensor(rank), top_k, 3, 4)

    return arguments


CASES = [
    KernelCase("mla_decode", "tiny", _mla(5, 20, 6, 5, 2, (0, 4, 6, 11))),
    KernelCase("mla_decode", "16-heads", _mla(16, 512, 64, 128, 1, (127, 0, 129))),
    KernelCase("mla_decode", "part-of-rows", _mla(5, 32, 16, 16, 2, (17, 0, 33), beside=16)),
    KernelCase("mla_decode", "mtp", _mla(20, 64, 16, 64, 5, (65, 1, 200))),
    KernelCase("mla_decode", "no-rope", _mla(16, 512, 0, 128, 1, (127, 0, 129))),
    KernelCase("mla_decode", "tiny-no-rope", _mla(5, 20, 0, 5, 2, (0, 4, 6, 11))),
    KernelCase("mla_decode", "tiny-window", _mla(5, 20, 6, 5, 2, (0, 4, 6, 11)), reach=4),
    KernelCase("mla_decode", "window", _mla(16, 512, 64, 128, 3, (127, 0, 300)), reach=100),
    KernelCase("merge_lse", "4-peers", _merge(4, 5, 20)),
    KernelCase("merge_lse", "wide", _merge(3, 2, 512)),
    KernelCase("pack_heads", "odd", _pack(6, 5, 2), exact=True),
    KernelCase("pack_heads", "wide", _pack(16, 512, 4), exact=True),
    KernelCase("unpack_heads", "wide", _unpack(16, 512, 4), exact=True),
    KernelCase("cache_append", "odd", _append(20, 6, 5), exact=True),
    KernelCase("cache_append", "no-rope", _append(20, 0, 5), exact=True),
    KernelCase("cache_append", "kv-heads", _append(10, 6, 5, heads=(3,)), exact=True),
    KernelCase("cache_append", "part-of-rows", _append(20, 6, 5, beside=3), exact=True),
    KernelCase("cache_append", "no-rope", _append(12, 0, 5), exact=True),
    KernelCase("cache_append", "wide", _append(512, 64, 128), exact=True),
    KernelCase("moe_experts", "odd", _experts(7, 72, 40, 4)),
    KernelCase("moe_experts", "one-token", _experts(1, 128, 64, 8)),
    KernelCase("moe_router", "v3", _router(5, 256, 8, 4, 8)),
    KernelCase("moe_router", "odd", _router(3, 12, 3, 2, 5)),
    KernelCase("rope_heads", "odd", _rope(5, 6)),
    KernelCase("gqa_decode", "tiny", _gqa(2, 2, 3, 20, 5, (0, 4, 6, 11))),
    KernelCase("gqa_decode", "group-of-8", _gqa(1, 2, 8, 128, 128, (127, 0, 129))),
    KernelCase("gqa_decode", "mha", _gqa(5, 3, 1, 64, 64, (65, 1, 200))),
    KernelCase("gqa_decode", "tiny-window", _gqa(2, 2, 3, 20, 5, (0, 4, 6, 11)), reach=4),
    KernelCase("gqa_decode", "window", _gqa(3, 2, 8, 128, 128, (127, 0, 300)), reach=100),
    KernelCase("index_scores", "tiny", _index(SparseStep((0, 4, 11), T=3))),
    KernelCase("index_scores", "page-borders", _index(SparseStep((15, 16, 33), J=8, index_width=16, page_size=16))),
    KernelCase("topk_candidates", "few-values", _candidates("few", [[0, 70], [69, 5]], 75, 33), exact=True),
    KernelCase("topk_candidates", "all-tied", _candidates("same", [[100], [40]], 100, 7), exact=True),
    KernelCase("topk_candidates", "hard", _candidates("hard", [[90], [3]], 100, 54), exact=True),
    KernelCase("topk_candidates", "near", _candidates("near", [[70], [69]], 75, 11), exact=True),
    KernelCase("topk_candidates", "k-beyond", _candidates("random", [[9], [0]], 10, 64), exact=True),
    KernelCase("kth_candidate", "hard", _kth("hard", [[70], [18]], 30, 42), exact=True),
    KernelCase("kth_candidate", "all-tied", _kth("same", [[5, 6, 60]], 30, 7), exact=True),
    KernelCase("kth_candidate", "near", _kth("near", [[70], [12]], 30, 12), exact=True),
    KernelCase("select_slots", "few-values", _select("few", [[70, 4], [200, 0]], 75, 33), exact=True),
    KernelCase("select_slots", "all-tied", _select("same", [[200], [9]], 75, 40), exact=True),
    KernelCase("select_slots", "hard", _select("hard", [[200], [30]], 75, 120), exact=True),
    KernelCase("mla_decode_slots", "tiny", _slots(SparseStep((0, 4, 11), T=3))),
    KernelCase("mla_decode_slots", "no-rope", _slots(SparseStep((5, 16, 47), m=40, R=32, r=0, page_size=16))),
    KernelCase("mla_decode_slots", "several-tiles", _slots(SparseStep((5, 16, 47), m=40, R=32, r=16, page_size=16))),
    KernelCase("mla_decode_slots", "16-heads", _slots(SparseStep((127, 0, 33), 1, 64, 16, 512, 64, 3, 128, 128))),
    KernelCase("mla_decode_slots", "no-rope", _slots(SparseStep((0, 30), m=17, H=16, R=32, r=0, page_size=16))),
]
