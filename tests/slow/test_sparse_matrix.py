"""Every family of sparse attention over plans that are drawn so that each value of each factor occurs: see DEGREES and below."""

from __future__ import annotations

import random
from functools import cache
from typing import Any

import pytest
import torch
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from helix_compile import helix_compile
from helix_compile.capture.captured import CapturedGraph
from helix_compile.capture.model import capture
from helix_compile.errors import RuntimeFault
from helix_compile.verifier.numeric.reference import WidenedIslands
from tests.support.driver import random_ids
from tests.support.families import FAMILIES, fresh_family
from tests.support.sparse import sparse_deviation

pytestmark = pytest.mark.slow
LIMIT = 1e-10
TOP_K = 7  # no degree but 1 divides it
HEADS = 48
STEPS = (1, 2, 3, 5, 1)
NAMES = ("deepseek_v32", "glm_moe_dsa", "axk2", "hy_v4", "dots3_note", "mistral_large4")
WHOLE_Q = ("mistral_large4",)  # its query is scaled by position, which can't be cut by heads: tpa = 1
OTHER_HEADS = ("dots3_note",)  # its layers with windows have 64

DEGREES = [(cp, tpa) for cp in (1, 2, 3, 4, 8) for tpa in (1, 2)]
BLOCKS = [1, 3, 32]
# of the prompt: below, at and above k; a row of one token leaves shards empty on all degrees, 41 tokens of blocks of 32 most
LENGTHS = [[7, 1, 41], [6, 8, 7], [41, 3, 6], [2, 1, 5], [17, 7, 1]]
EXCHANGES = [{"topk_exchange": x, "merge": m} for x in ("gather", "owner") for m in ("a2a", "ag_rs")]
TIES = [False, False, True]  # all scores of the first indexer are 0: they tie across all ranks

Plan = tuple[tuple[int, int], int, list[int], dict[str, str], bool]


def drawn_plans(name: str) -> list[Plan]:
    """One plan for each degree; the other factors go round in an order of the family's own."""
    draw = random.Random(name)
    degrees = [(cp, 1 if name in WHOLE_Q else tpa) for cp, tpa in DEGREES]
    columns = []
    for values in (BLOCKS, LENGTHS, EXCHANGES, TIES):
        column: list[Any] = [values[i % len(values)] for i in range(len(degrees))]
        draw.shuffle(column)
        columns.append(column)
    return list(zip(degrees, *columns, strict=True))


@cache
def captured_model(name: str, ties: bool) -> tuple[Any, CapturedGraph]:
    model = fresh_family(name, index_topk=TOP_K, num_attention_heads=HEADS, num_key_value_heads=HEADS)
    if ties:
        first = next(m for n, m in model.named_modules() if n.endswith("indexer.weights_proj"))
        with torch.no_grad():
            first.weight.zero_()
    return model, capture(model)


@pytest.mark.parametrize(("name", "plan"), [(n, p) for n in NAMES for p in drawn_plans(n)], ids=str)
def test_exact(name: str, plan: Plan) -> None:
    """Against the unmodified model, whose ties go by position; caches are poisoned, so that what nobody wrote shows."""
    (cp, tpa), tokens_per_block, lengths, exchange, ties = plan
    model, graph = captured_model(name, ties)
    options = {"cp": cp, "tpa": tpa, "tokens_per_block": tokens_per_block, **(exchange if cp > 1 else {})}
    if name in OTHER_HEADS and cp == 3:
        options["pad_heads"] = True
    compiled = helix_compile(graph, max_batch_size=3, max_seq_len=64, **options, **FAMILIES[name].options)
    for rank in compiled.ranks:
        for tensor in rank.cache:
            tensor.fill_(torch.nan)
    assert sparse_deviation(model, compiled, lengths, STEPS) <= LIMIT


def test_each_value_is_drawn_for_each_family() -> None:
    for name in NAMES:
        degrees, *columns = (list(column) for column in zip(*drawn_plans(name), strict=True))
        assert {cp for cp, _ in degrees} == {1, 2, 3, 4, 8}
        assert {tpa for _, tpa in degrees} == ({1} if name in WHOLE_Q else {1, 2})
        for drawn, values in zip(columns, (BLOCKS, LENGTHS, EXCHANGES, TIES), strict=True):
            assert all(value in drawn for value in values)


def test_a_cache_of_transformers_of_windows_beside_indexers() -> None:
    """dots3: its windows' layers forget, and a cache without a config has no place for index keys."""
    model = fresh_family("dots3_note", sliding_window=5)
    compiled = helix_compile(model, cp=2, max_batch_size=2, max_seq_len=64)
    ids, probe = random_ids(model, 2, 9), random_ids(model, 2, 2)
    for length, whole in ((4, False), (9, True)):  # four tokens: nothing is forgotten yet
        cache = DynamicCache(config=model.config)
        if whole:
            cache.layers = [DynamicLayer() if type(x) is DynamicSlidingWindowLayer else x for x in cache.layers]
        with WidenedIslands(), torch.no_grad():
            model(input_ids=ids[:, :length], past_key_values=cache)
            compiled.import_cache(cache)
            expected = model(input_ids=probe, past_key_values=cache).logits
            got = compiled(probe)
        assert ((got - expected).abs().max() / expected.abs().max()).item() <= LIMIT
    forgetful = DynamicCache(config=model.config)
    with torch.no_grad():
        model(input_ids=ids, past_key_values=forgetful)
    with pytest.raises(
        RuntimeFault, match="of a model with an indexer make one with the config, and before the prefill put a Dyn"
    ):
        compiled.import_cache(forgetful)
