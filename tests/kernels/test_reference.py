"""Each reference against an independent formula written here, with poison where nothing may be read."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from helix_compile.ir.ops import helix
from helix_compile.kernels import reference

B, T, H, R, r, PAGE = 3, 2, 4, 8, 6, 5
SCALE = 0.3


def attention_by_hand(q: Tensor, keys: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Q [H, W], keys [S, W] -> o [H, R], lse [H] by exp and sums, no tricks."""
    weights = torch.exp(SCALE * q @ keys.T)
    total = weights.sum(-1, keepdim=True)
    return (weights / total) @ keys[:, :width], total.log().squeeze(-1)


@pytest.fixture
def step() -> dict[str, Tensor]:
    """Rows that see 7 and 9, 0 and 1, 0 and 0 slots; everything that nobody may read is NaN."""
    visible = torch.tensor([[7, 9], [0, 1], [0, 0]], dtype=torch.int32)
    cache = torch.full((8, PAGE, R + r), torch.nan, dtype=torch.float64)
    page_table = torch.tensor([[6, 1], [3, 0], [2, 7]])
    for row in range(B):
        for slot in range(int(visible[row].max())):
            cache[page_table[row, slot // PAGE], slot % PAGE] = torch.randn(R + r)
    q = torch.randn(B, T, H, R + r, dtype=torch.float64)
    return {"q": q, "cache": cache, "page_table": page_table, "visible": visible}


def test_mla_decode_over_pages_and_empty_rows(step: dict[str, Tensor]) -> None:
    q, cache, table, visible = (step[k] for k in ("q", "cache", "page_table", "visible"))
    o, lse = helix.mla_decode(q[..., :R], q[..., R:], cache, table, visible, SCALE)
    for b in range(B):
        flat = cache[table[b]].reshape(-1, R + r)
        for t in range(T):
            if visible[b, t] == 0:
                assert torch.count_nonzero(o[b, t]) == 0 and (lse[b, t] == -torch.inf).all()
                continue
            expected = attention_by_hand(q[b, t], flat[: visible[b, t]], R)
            torch.testing.assert_close(o[b, t], expected[0], rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(lse[b, t], expected[1], rtol=1e-12, atol=1e-12)


def test_mla_decode_in_chunks_of_queries(step: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    args = [step["q"][..., :R], step["q"][..., R:], *(step[k] for k in ("cache", "page_table", "visible"))]
    whole = helix.mla_decode(*args, SCALE)
    monkeypatch.setattr(reference, "SCORE_BYTES", 1)
    parts = helix.mla_decode(*args, SCALE)
    assert all(torch.allclose(a, b, rtol=1e-14) for a, b in zip(whole, parts, strict=True))


def windowed_by_hand(step: dict[str, Tensor], first: Tensor) -> list[Tensor]:
    """mla_decode, row by row."""
    rows = []
    for b in range(B):
        flat = step["cache"][step["page_table"][b]].reshape(-1, R + r)
        for t in range(T):
            start, stop = int(first[b, t]), int(step["visible"][b, t])
            rows.append(
                attention_by_hand(step["q"][b, t], flat[start:stop], R)[0] if stop > start else torch.zeros(H, R)
            )
    return rows


def test_rows_with_a_first_slot(step: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    """No slot below the lowest of a sequence is read; rows that see nothing are 0; in chunks of queries too."""
    q, cache, table, visible = (step[k] for k in ("q", "cache", "page_table", "visible"))
    first = torch.tensor([[6, 8], [0, 1], [0, 0]], dtype=torch.int32)
    cache[table[0, 0]] = torch.nan
    cache[table[0, 1], 0] = torch.nan
    args = (q[..., :R], q[..., R:], cache, table, visible, SCALE)
    for budget in (reference.SCORE_BYTES, 1):
        monkeypatch.setattr(reference, "SCORE_BYTES", budget)
        o, lse = helix.mla_decode(*args, first=first)
        for got, wanted in zip(o.flatten(0, 1), windowed_by_hand(step, first), strict=True):
            torch.testing.assert_close(got, wanted.to(got), rtol=1e-12, atol=1e-12)
        assert torch.equal(lse[..., 0] == -torch.inf, visible <= first)


@pytest.mark.parametrize(("window", "chunk"), [(1, 0), (5, 0), (40, 0), (0, 1), (0, 6), (0, 64)])
@pytest.mark.parametrize(("cp", "tokens_per_block"), [(1, 4), (3, 1), (4, 5)])
def test_first_visible_against_keys_counted_one_by_one(window: int, chunk: int, cp: int, tokens_per_block: int) -> None:
    positions = torch.arange(-1, 150)[None]
    for rank in range(cp):
        got = helix.first_visible(positions, torch.tensor(rank), cp, tokens_per_block, window, chunk)
        held = [p for p in range(150) if p // tokens_per_block % cp == rank]
        for p, first in zip(positions[0].tolist(), got[0].tolist(), strict=True):
            forgotten = [k for k in held if (k <= p - window if window else k < p // chunk * chunk)] if p >= 0 else []
            assert first == len(forgotten)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_statistics_are_float32_or_wider(step: dict[str, Tensor], dtype: torch.dtype) -> None:
    q, cache = step["q"].to(dtype), step["cache"].to(dtype)
    o, lse = helix.mla_decode(q[..., :R], q[..., R:], cache, step["page_table"], step["visible"], SCALE)
    assert o.dtype is dtype and lse.dtype is torch.float32


@pytest.mark.parametrize("cp", [1, 2, 3, 4])
def test_split_over_ranks_and_merged_is_attention(cp: int) -> None:
    """shard_index, cache_append, mla_decode and merge_lse together, T = 3 new tokens over 11 old ones."""
    total, tpb = 14, 2
    keys = torch.randn(total, R + r, dtype=torch.float64)
    q = torch.randn(1, 3, H, R + r, dtype=torch.float64)
    table = torch.arange(3).view(1, 3)
    parts = []
    for rank in range(cp):
        cache = torch.zeros(3, PAGE, R + r, dtype=torch.float64)
        for start, stop in ((0, 11), (11, 14)):
            positions = torch.arange(start, stop)[None]
            slots, visible = helix.shard_index(positions, torch.tensor(rank), cp, tpb)
            new = keys[start:stop][None]
            seen = helix.cache_append(cache, table, slots, visible, new[..., :R], new[..., R:])
            assert torch.equal(seen, visible) and seen is not visible
        parts.append(helix.mla_decode(q[..., :R], q[..., R:], cache, table, seen, SCALE))
    merged = helix.merge_lse(*(torch.stack(p) for p in zip(*parts, strict=True)))
    for t in range(3):
        expected, _ = attention_by_hand(q[0, t], keys[: 12 + t], R)
        torch.testing.assert_close(merged[0, t], expected, rtol=1e-12, atol=1e-12)


def test_shard_index_of_padding() -> None:
    positions = torch.tensor([[-1, -1, 0, 1], [4, 5, -1, -1]])
    for rank in range(2):
        slots, visible = helix.shard_index(positions, torch.tensor(rank), 2, 2)
        assert slots.dtype is torch.int64 and visible.dtype is torch.int32
        assert (slots[positions < 0] == -1).all() and (visible[positions < 0] == 0).all()
    slots, visible = helix.shard_index(positions, torch.tensor(0), 2, 2)
    assert slots.tolist() == [[-1, -1, 0, 1], [2, 3, -1, -1]]
    assert visible.tolist() == [[0, 0, 1, 2], [3, 4, 0, 0]]


def test_cache_append_writes_its_own_slots_only() -> None:
    cache = torch.full((2, PAGE, R + r), 7.0)
    slots = torch.tensor([[-1, 6]])
    latent, k_rope = torch.ones(1, 2, R), torch.full((1, 2, r), 2.0)
    helix.cache_append(cache, torch.tensor([[1, 0]]), slots, slots.int(), latent, k_rope)
    assert (cache[0, 1, :R] == 1).all() and (cache[0, 1, R:] == 2).all()
    cache[0, 1] = 7.0
    assert (cache == 7.0).all()


def test_merge_does_not_read_dead_parts() -> None:
    o = torch.randn(3, B, T, H, R, dtype=torch.float64)
    lse = torch.randn(3, B, T, H, dtype=torch.float64)
    o[1], lse[1] = torch.nan, -torch.inf
    o[:, 2], lse[:, 2] = torch.nan, -torch.inf
    merged = helix.merge_lse(o, lse)
    weights = torch.exp(lse[[0, 2]]) / torch.exp(lse[[0, 2]]).sum(0)
    expected = (weights[..., None] * o[[0, 2]]).sum(0)
    torch.testing.assert_close(merged[:2], expected[:2], rtol=1e-12, atol=1e-12)
    assert torch.count_nonzero(merged[2]) == 0


def test_merge_of_large_statistics_does_not_overflow() -> None:
    lse = torch.tensor([3000.0, 2999.0]).view(2, 1, 1, 1)
    o = torch.tensor([1.0, 0.0]).view(2, 1, 1, 1, 1)
    assert helix.merge_lse(o, lse).item() == pytest.approx(torch.sigmoid(torch.tensor(1.0)).item())


def test_rescaled_parts_sum_to_the_merge() -> None:
    o, lse = torch.randn(3, B, T, H, R), torch.randn(3, B, T, H)
    o[2, 0], lse[2, 0] = torch.nan, -torch.inf
    o[:, 1], lse[:, 1] = torch.nan, -torch.inf
    total = sum(helix.rescale_by_lse(o[i], lse[i], lse) for i in range(3))
    torch.testing.assert_close(total, helix.merge_lse(o, lse))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 2, 3), (2, 3, 8, 20), (1, 3, 6, 5), (2, 1, 3, 1), (1, 3, 3, 5)], ids=str)
@pytest.mark.parametrize("chunks", ["one", "some", "each head"])
def test_pack_and_unpack(dtype: torch.dtype, shape: tuple[int, int, int, int], chunks: str) -> None:
    """Also where a row of 16-bit values has an odd count, so that nothing is aligned, and for chunks of one head."""
    heads = shape[2]
    peers = {"one": 1, "some": 3 if heads % 2 else 2, "each head": heads}[chunks]
    o, lse = (torch.randn(shape).to(dtype), torch.randn(shape[:3]).to(reference.accumulation_dtype(dtype)))
    lse[0, 0, 0] = -torch.inf
    buffer = helix.pack_heads(o, lse, peers)
    sent = o.numel() * o.itemsize + lse.numel() * lse.itemsize
    assert buffer.shape[0] == peers and buffer.numel() * buffer.itemsize == sent
    o_P, lse_P = helix.unpack_heads(buffer, o, lse)
    assert torch.equal(o_P, torch.stack(o.chunk(peers, dim=2)))
    assert torch.equal(lse_P, torch.stack(lse.chunk(peers, dim=2)))


def test_experts_against_a_loop_over_choices() -> None:
    N, D, F, E, k = 7, 6, 5, 8, 3
    x, weights = torch.randn(N, D, dtype=torch.float64), torch.rand(N, k, dtype=torch.float64)
    ids = torch.stack([torch.randperm(E)[:k] for _ in range(N)])
    gate_up, down = (torch.randn(E, 2, F, D, dtype=torch.float64), torch.randn(E, D, F, dtype=torch.float64))
    expected = torch.zeros_like(x)
    for n in range(N):
        for j in range(k):
            gate, up = gate_up[ids[n, j]] @ x[n]
            expected[n] += weights[n, j] * (down[ids[n, j]] @ (gate * gate.sigmoid() * up))
    halves = [
        helix.moe_experts(x, ids, weights, gate_up[e : e + 4, :, f], down[e : e + 4, :, f], torch.tensor(e))
        for e in (0, 4)
        for f in (slice(0, 3), slice(3, 5))
    ]
    torch.testing.assert_close(sum(halves), expected, rtol=1e-12, atol=1e-12)


def test_fakes_agree_with_references() -> None:
    """Shapes and dtypes of the meta implementation are those of the reference, for every op that runs alone."""
    o, lse = torch.randn(B, T, H, R).bfloat16(), torch.randn(B, T, H)
    lse_P = torch.stack([lse, lse])
    calls = [
        (helix.shard_index, (torch.zeros(B, T, dtype=torch.int64), torch.tensor(0), 2, 2)),
        (helix.merge_lse, (torch.stack([o, o]), lse_P)),
        (helix.rescale_by_lse, (o, lse, lse_P)),
        (helix.pack_heads, (o, lse, 2)),
        (helix.unpack_heads, (helix.pack_heads(o, lse, 2), o, lse)),
    ]
    for op, args in calls:
        real = op(*args)
        fake = op(*(a.to("meta") if isinstance(a, Tensor) else a for a in args))
        for a, b in zip(*((x,) if isinstance(x, Tensor) else x for x in (real, fake)), strict=True):
            assert a.shape == b.shape and a.dtype == b.dtype, op


def test_a_nan_in_a_living_part_is_not_hidden() -> None:
    """Only lse = -inf is dead: a shard that went wrong must show in the output."""
    lse = torch.tensor([0.3, torch.nan, -torch.inf], dtype=torch.float64).view(3, 1, 1, 1)
    parts = torch.ones(3, 1, 1, 1, 2, dtype=torch.float64)
    assert helix.merge_lse(parts, lse).isnan().all()
    for rank in (0, 1):
        assert helix.rescale_by_lse(parts[rank], lse[rank], lse).isnan().all()
    assert torch.count_nonzero(helix.rescale_by_lse(parts[2], lse[2], lse)) == 0
