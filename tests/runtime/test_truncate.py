"""truncate(): after a rollback everything is as if the rejected tokens had never been."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor

from helix_compile import HelixModule, RuntimeFault, helix_compile
from helix_compile.layout.ledger import positions_on_rank
from helix_compile.runtime import step as step_inputs
from helix_compile.verifier.numeric.reference import WidenedIslands
from tests.support.driver import Reference, deviation, left_padded, random_ids
from tests.support.models import tiny_model

DRAFTS = 19  # with blocks of 3 on four ranks, over a page boundary of every rank
# tokens of each row that a step brings (0: idle), and how many of them stay
ROUNDS = (
    ((DRAFTS, DRAFTS, DRAFTS), (1, 0, DRAFTS)),
    ((3, 0, DRAFTS), (3, 0, 2)),
    ((DRAFTS, 4, 1), (0, 1, 1)),
    ((1, 1, 1), (1, 1, 1)),
    ((5, 7, 6), (2, 7, 0)),
)


def prompt_lengths(cp: int, tokens_per_block: int) -> list[int]:
    """Just before the second page of the first rank, just before the next owner, and one token."""
    return [126 * cp - 2, max(2, cp * tokens_per_block - 1), 1]


def compiled_for(cp: int, tokens_per_block: int) -> HelixModule:
    return helix_compile(
        tiny_model("short"), cp=cp, tokens_per_block=tokens_per_block, max_batch_size=3, max_seq_len=128 * cp + 80
    )


def ragged_step(counts: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Random ids and their mask: each row's tokens first, padding behind them."""
    ids = random_ids(tiny_model("short"), len(counts), max(counts))
    return ids, (torch.arange(max(counts)) < torch.tensor(counts)[:, None]).long()


def worst_over_rollbacks(compiled: HelixModule, cp: int, tokens_per_block: int) -> float:
    """Largest deviation from the original, whose cache transformers itself crops, row by row."""
    model, mask = tiny_model("short"), left_padded(prompt_lengths(cp, tokens_per_block))
    rows = [Reference(model) for _ in mask]
    ids = random_ids(model, *mask.shape)
    worst = 0.0
    with WidenedIslands():
        compiled(ids, mask, logits_to_keep=1)
        for row, reference in enumerate(rows):
            alone = ids[row, mask[row] > 0][None]
            reference.step(alone, torch.ones_like(alone))
        for counts, stay in ROUNDS:
            ids, mask = ragged_step(counts)
            lengths = compiled.lengths
            logits = compiled(ids, mask)
            compiled.truncate(lengths + torch.tensor(stay))
            for row, (reference, new, kept) in enumerate(zip(rows, counts, stay, strict=True)):
                if new == 0:
                    continue
                ones = torch.ones(1, new, dtype=torch.int64)
                expected = reference.step(ids[row : row + 1, :new], ones)
                worst = max(worst, deviation(logits[row : row + 1, :new], expected, ones))
                reference.cache.crop(kept - new)
                reference.mask = reference.mask[:, : reference.mask.shape[1] + kept - new]
    assert compiled.lengths.tolist() == [r.cache.get_seq_length() for r in rows]
    return worst


@pytest.mark.parametrize(
    ("cp", "tokens_per_block"),
    [
        pytest.param(cp, size, marks=() if (cp, size) in ((2, 3), (3, 1), (4, 32)) else pytest.mark.slow)
        for cp in (1, 2, 3, 4)
        for size in (1, 3, 32)
    ],
)
def test_steps_of_several_tokens_with_rollback(cp: int, tokens_per_block: int) -> None:
    """Over blocks, pages and owners, ragged, with rows that idle, keep nothing or keep all."""
    compiled = compiled_for(cp, tokens_per_block)
    assert worst_over_rollbacks(compiled, cp, tokens_per_block) <= 1e-10


def keep_seeing(compiled: HelixModule) -> None:
    """Break it: what a rank has once shown of a sequence, it shows to every later query."""
    seen: dict[int, Tensor] = {}

    def not_lowered(visible: Tensor, rank: Tensor) -> Tensor:
        before = seen.get(int(rank), torch.zeros_like(visible[:, :1]))
        seen[int(rank)] = torch.maximum(before, visible.amax(dim=1, keepdim=True))
        return torch.where(visible > 0, torch.maximum(visible, before), 0)

    graph = compiled.graph.graph
    index = next(n for n in graph.nodes if n.target is torch.ops.helix.shard_index.default)
    visible = next(n for n in index.users if n.args[1] == 1)
    with graph.inserting_after(visible):
        broken = graph.call_function(not_lowered, (visible, index.args[1]))
    visible.replace_all_uses_with(broken, delete_user_cb=lambda user: user is not broken)
    compiled.graph.recompile()


def test_a_rollback_that_does_not_lower_visible_is_seen() -> None:
    compiled = compiled_for(2, 3)
    keep_seeing(compiled)
    assert worst_over_rollbacks(compiled, 2, 3) > 1e-4
    plain, broken = compiled_for(2, 3), compiled_for(2, 3)
    keep_seeing(broken)
    for counts in ((9, 9, 9), (1, 1, 1), (5, 5, 5)):  # without a rollback it is no fault at all
        ids, mask = ragged_step(counts)
        assert torch.equal(plain(ids, mask), broken(ids, mask))


def behind(compiled: HelixModule, value: float) -> None:
    """Write `value` over every slot of every rank that no token of the batch is in."""
    options, kvp = compiled.plan.options, compiled.plan.layout.kvp
    for rank in compiled.ranks:
        kvp_rank = compiled.plan.layout.index("kvp", rank.rank)
        for cache in rank.cache:
            free = torch.ones(cache.shape[:2], dtype=torch.bool)
            for pages, length in zip(compiled.page_table, compiled.lengths.tolist(), strict=True):
                held = len(positions_on_rank(length, kvp_rank, kvp, options.tokens_per_block))
                slots = torch.arange(held)
                free[pages[slots // cache.shape[1]], slots % cache.shape[1]] = False
            cache[free] = value


@pytest.mark.parametrize("lengths", [7, [130, 7, 0], torch.tensor([128, 11, 1])], ids=str)
def test_bits_do_not_depend_on_what_was_taken_back(lengths: Any) -> None:
    """The same chunks: the same bits, whatever lies behind the lengths; and the freed room is room again."""
    once, never = compiled_for(2, 3), compiled_for(2, 3)
    kept = [lengths] * 3 if isinstance(lengths, int) else [int(n) for n in lengths]
    ids, mask = ragged_step(tuple(kept))
    for compiled in (once, never):
        compiled(ids, mask)
    rejected, _ = ragged_step((50, 50, 50))
    for _ in range(9):  # 9 times 50 tokens are more than there is room for
        once(rejected)
        once.truncate(lengths)
        assert once.lengths.tolist() == kept
    behind(once, torch.nan)
    for counts in ((4, 4, 4), (1, 0, 1), (40, 3, 1)):
        ids, mask = ragged_step(counts)
        new = mask > 0
        assert torch.equal(once(ids, mask)[new], never(ids, mask)[new])


WRONG: list[tuple[Any, str]] = [
    (6, "sequence 1: got length 6, expected 0 to 5"),
    (-1, "sequence 0: got length -1, expected 0 to 9"),
    ([9, 6], "sequence 1: got length 6, expected 0 to 5"),
    (torch.tensor([3, -2]), "sequence 1: got length -2, expected 0 to 5"),
    ([1], "got 1 lengths for a batch of 2 sequences"),
    (torch.tensor([1, 1, 1]), "got 3 lengths for a batch of 2 sequences"),
    (True, "the length of sequence 0 must be an int, got True (bool)"),
    ([2, 1.0], "the length of sequence 1 must be an int, got 1.0 (float)"),
    ("12", "the length of sequence 0 must be an int, got '12' (str)"),
    (None, "got None (NoneType)"),
    (torch.tensor([1.0, 1.0]), "got a tensor of shape (2,) and torch.float32"),
    (torch.tensor([True, True]), "got a tensor of shape (2,) and torch.bool"),
    (torch.tensor(3), "got a tensor of shape () and torch.int64"),
]


def test_refusals_change_nothing() -> None:
    compiled = compiled_for(2, 3)
    with pytest.raises(RuntimeFault, match="there are no sequences yet"):
        compiled.truncate(0)
    ids, mask = ragged_step((9, 5))
    compiled(ids, mask)
    before = [c.clone() for rank in compiled.ranks for c in rank.cache]
    for lengths, message in WRONG:
        with pytest.raises(RuntimeFault, match=re.escape(message)):
            compiled.truncate(lengths)
        assert compiled.lengths.tolist() == [9, 5]
    compiled.truncate(torch.tensor([9, 5], dtype=torch.int32))
    compiled.truncate([0, 4])
    after = [c for rank in compiled.ranks for c in rank.cache]
    assert compiled.lengths.tolist() == [0, 4]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    with pytest.raises(RuntimeFault, match="the batch has 2 sequences"):  # B stays until reset()
        compiled(ids[:1])


def test_only_the_last_logits_of_a_long_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever chunk they fall in; the cache gets every token."""
    compiled = compiled_for(2, 3)
    ids, _ = ragged_step((14, 14))
    for width in (4, 512):
        monkeypatch.setattr(step_inputs, "MAX_CHUNK", width)
        compiled.reset()
        whole = compiled(ids)
        for keep in (0, 1, 2, 3, 6, 13, 14, 99):
            compiled.reset()
            assert torch.equal(compiled(ids, logits_to_keep=keep), whole[:, -keep:])
            assert compiled.lengths.tolist() == [14, 14]
    for keep in (-1, True, 1.0, None):
        with pytest.raises(RuntimeFault, match="logits_to_keep must be an int >= 0"):
            compiled(ids[:, :1], logits_to_keep=keep)
    assert compiled.lengths.tolist() == [14, 14]
