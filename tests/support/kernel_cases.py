"""One small call of every op that has a kernel: the interpreter and a device are judged by the same cases.

Arguments are made on the CPU from a seed; other seeds give other values (and other lengths) of the same shapes. What
nobody may read is poisoned.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from helix_compile.kernels.exchange import pack_heads_reference
from tests.support.gqa import STALE, GqaStep

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


def _mla(H: int, R: int, r: int, page: int, T: int, lengths: tuple[int, ...]) -> Callable:
    """One KV head of width R + r whose first R channels are the values."""

    def arguments(dtype: torch.dtype, seed: int) -> Arguments:
        step = GqaStep(_rolled(lengths, seed), T, 1, H, R + r, 1, page, dtype)
        q, cache, _, table, visible, scale = step.arguments(seed)
        return (q[..., :R].contiguous(), q[..., R:].contiguous(), cache[:, :, 0], table, visible, scale)

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


def _append(R: int, r: int, page: int, heads: tuple[int, ...] = ()) -> Callable:
    """`heads` (K,): K and V of K KV heads, else a latent and a rope part."""

    def arguments(dtype: torch.dtype, seed: int) -> Arguments:
        draw = torch.Generator().manual_seed(seed)
        B, T, pages = 3, 4, 3
        cache = torch.full((B * pages, page, *heads, R + r), STALE, dtype=dtype)
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


CASES = [
    KernelCase("mla_decode", "tiny", _mla(5, 20, 6, 5, 2, (0, 4, 6, 11))),
    KernelCase("mla_decode", "16-heads", _mla(16, 512, 64, 128, 1, (127, 0, 129))),
    KernelCase("mla_decode", "mtp", _mla(20, 64, 16, 64, 5, (65, 1, 200))),
    KernelCase("mla_decode", "tiny-window", _mla(5, 20, 6, 5, 2, (0, 4, 6, 11)), reach=4),
    KernelCase("mla_decode", "window", _mla(16, 512, 64, 128, 3, (127, 0, 300)), reach=100),
    KernelCase("merge_lse", "4-peers", _merge(4, 5, 20)),
    KernelCase("merge_lse", "wide", _merge(3, 2, 512)),
    KernelCase("pack_heads", "odd", _pack(6, 5, 2), exact=True),
    KernelCase("pack_heads", "wide", _pack(16, 512, 4), exact=True),
    KernelCase("unpack_heads", "wide", _unpack(16, 512, 4), exact=True),
    KernelCase("cache_append", "odd", _append(20, 6, 5), exact=True),
    KernelCase("cache_append", "kv-heads", _append(10, 6, 5, heads=(3,)), exact=True),
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
]
