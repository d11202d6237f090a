"""Fuzzed hand-overs: a RuntimeFault with nothing written, or the very cache, in order; any sender, chunks and padding."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from helix_compile import HelixModule, RuntimeFault, helix_compile
from helix_compile.cache.shards import CacheEntries, join_shards, shards_of_sender
from tests.support.handover import dealt, random_entries, untouched
from tests.support.models import tiny_model

R, r, SITES, ROOM = 20, 6, 2, 40
PLANS = ((1, 1, 4), (4, 1, 3), (2, 2, 5))
ODD: list[Any] = [None, 3, "x", [], [None], torch.ones(2), torch.ones(1, 2, 3), True, [1.5], {}]


@cache
def module(plan: tuple[int, int, int]) -> HelixModule:
    cp, tpa, tokens_per_block = plan
    return helix_compile(
        tiny_model("short"), cp=cp, tpa=tpa, tokens_per_block=tokens_per_block, max_seq_len=ROOM, max_batch_size=3
    )


@st.composite
def batches(draw: st.DrawFn) -> CacheEntries:
    lengths = draw(st.lists(st.integers(0, ROOM), min_size=1, max_size=3))
    lengths[0] = max(1, lengths[0])
    return random_entries(lengths, [R] * SITES, [r] * SITES, seed=draw(st.integers(0, 9)))


def padded(entries: CacheEntries, pads: list[int]) -> tuple[list[list[Tensor]], Tensor]:
    """The same tokens behind (and before) columns of NaN, with the mask that says which are tokens."""
    B, S = entries.latents[0].shape[:2]
    mask = torch.zeros(B, S + max(pads), dtype=torch.int64)
    for row, (pad, n) in enumerate(zip(pads, entries.lengths.tolist(), strict=True)):
        mask[row, pad : pad + n] = 1
    moved = []
    for part in entries[:2]:
        moved.append([])
        for tensor in part:
            wide = tensor.new_full((B, mask.shape[1], tensor.shape[2]), torch.nan)
            for row, n in enumerate(entries.lengths.tolist()):
                wide[row, mask[row] > 0] = tensor[row, :n]
            moved[-1].append(wide)
    return moved, mask


def check_good(plan: Any, entries: CacheEntries, way: str, draw: Any) -> None:
    """By any way, the cache that comes out is the one that went in."""
    compiled = module(plan)
    compiled.reset()
    lengths = entries.lengths.tolist()
    if way == "padded":
        parts, mask = padded(entries, [draw(st.integers(0, 5)) for _ in lengths])
        compiled.import_cache(*parts, lengths, mask)
    elif way == "chunks":
        start = 0
        while start < max(lengths):
            stop = start + draw(st.integers(1, 20))
            part = [[t[:, start:stop] for t in tensors] for tensors in entries[:2]]
            compiled.import_cache(*part, (entries.lengths.clamp(max=stop) - start).clamp(min=0), append=start > 0)
            start = stop
    else:
        prompts = [draw(st.integers(0, n)) for n in lengths] if way == "restarts" else None
        cp, block = draw(st.integers(1, 5)), draw(st.integers(1, 9))
        rotation = "restarts_at_decode" if prompts is not None else "global"
        parts = dealt(entries, cp, block, prompts)
        shards = shards_of_sender(*parts, lengths, tokens_per_block=block, rotation=rotation, prompt_lengths=prompts)
        compiled.import_cache(*join_shards(shards))
    out = compiled.export_cache()
    pairs = zip(
        (*entries.latents, *entries.k_ropes, entries.lengths), (*out.latents, *out.k_ropes, out.lengths), strict=True
    )
    assert all(torch.equal(a, b) for a, b in pairs)


def check_bad(plan: Any, entries: CacheEntries, append: bool, draw: Any) -> None:
    """One argument spoilt: refused with nothing written, or taken because it changes no token."""
    compiled = module(plan)
    if not append:
        compiled.reset()
    given: dict[str, Any] = {
        "latents": entries.latents,
        "k_ropes": entries.k_ropes,
        "lengths": entries.lengths.tolist(),
        "mask": None,
    }
    name = draw(st.sampled_from(sorted(given)))
    spoil = draw(st.sampled_from(["odd", "longer", "wider", "negative"]))
    if spoil == "odd" or name == "mask":
        given[name] = draw(st.sampled_from(ODD))
    elif name == "lengths":
        given[name] = [n + ROOM for n in given[name]] if spoil != "negative" else [-1] * len(given[name])
    elif spoil == "longer":
        given[name] = given[name] * 2
    else:
        site = draw(st.integers(0, SITES - 1))
        wrong = [*given[name]]
        wrong[site] = torch.cat([wrong[site]] * 2, dim=draw(st.integers(0, 2)))
        given[name] = wrong
    if name == "mask" and given["mask"] is None:
        return  # no mask is no fault
    with untouched(compiled), pytest.raises(RuntimeFault):
        compiled.import_cache(**given, append=append)


def fuzzed(examples: int, body: Any, *strategies: Any) -> None:
    quick = settings(
        max_examples=examples, deadline=None, database=None, suppress_health_check=list(HealthCheck), derandomize=True
    )
    cases = st.tuples(*strategies, st.data())
    quick(given(cases)(lambda case: body(*case[:-1], case[-1].draw)))()


WAYS = st.sampled_from(["padded", "chunks", "sender", "restarts"])


@pytest.mark.parametrize("examples", [50, pytest.param(1500, marks=pytest.mark.slow)])
def test_any_cache_by_any_way(examples: int) -> None:
    fuzzed(examples, check_good, st.sampled_from(PLANS), batches(), WAYS)


@pytest.mark.parametrize("examples", [50, pytest.param(1500, marks=pytest.mark.slow)])
def test_any_spoilt_argument(examples: int) -> None:
    fuzzed(examples, check_bad, st.sampled_from(PLANS), batches(), st.booleans())
