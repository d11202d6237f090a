"""Layers that read what an earlier layer caches, and sites without a rope part: exact against the unmodified model.

Gemma 4 with a window of 5 in every second layer: shorter and longer than a block, than a shard and than a prompt. Mistral Large 4
whose layers share latents, with rope and without, and the choice of keys too.
"""

from __future__ import annotations

import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.fx import Node
from transformers import DynamicCache

from helix_compile import HelixModule, MatchError, helix_compile
from helix_compile.capture.captured import CapturedGraph
from helix_compile.capture.model import capture
from helix_compile.ir.graph import helix_op, inputs_of
from helix_compile.ir.sizes import hint_of, shape_of
from helix_compile.ir.stage import bodies_of
from helix_compile.passes.lower.segments import segments_of
from helix_compile.plan.helix_plan import HelixPlan
from helix_compile.verifier.numeric.reference import WidenedIslands
from tests.support.driver import Reference, deviation, left_padded, random_ids
from tests.support.families import fresh_family
from tests.support.sparse import TiesByPosition, sparse_deviation

LIMIT = 1e-10
SLOW = pytest.mark.slow


@cache
def captured_family(name: str, variant: str = "", **changes: Any) -> tuple[Any, CapturedGraph]:
    model = fresh_family(name, variant, **changes)
    return model, capture(model)


def gemma(window: int = 5) -> tuple[Any, CapturedGraph]:
    return captured_family("gemma4", sliding_window=window)


def poisoned(graph: CapturedGraph, **plan: Any) -> HelixModule:
    compiled = helix_compile(graph, **{"tokens_per_block": 3, "max_batch_size": 3, "max_seq_len": 64, **plan})
    for rank in compiled.ranks:
        for held in rank.cache:
            held.fill_(torch.nan)
    return compiled


def check_exact(model: Any, compiled: HelixModule, prompt: list[int]) -> None:
    """A ragged left-padded prompt, then steps of 1, 2 and 5 tokens, of which those of one feed the greedy one."""
    reference, mask = Reference(model), left_padded(prompt)
    # keeps all tokens: transformers' own layer of a window of 1 keeps its keys ([-0:]) and counts none (5.23, off by 1.4)
    reference.cache = DynamicCache()
    torch.manual_seed(1)
    ids = random_ids(model, *mask.shape)
    for tokens in (1, 2, 1, 5, 1, 0):
        with WidenedIslands():
            got, expected = compiled(ids, mask), reference.step(ids, mask)
        assert deviation(got, expected, mask) <= LIMIT
        last = expected[:, -1].argmax(-1)
        assert torch.equal(got[:, -1].argmax(-1), last)
        mask = torch.ones(len(prompt), tokens, dtype=torch.int64)
        ids = last[:, None] if tokens == 1 else random_ids(model, len(prompt), tokens)


PLANS: list[tuple[dict[str, Any], list[int]]] = [
    ({"cp": 2}, [5, 2, 13]),
    ({"cp": 4, "tokens_per_block": 8}, [3, 1, 2]),  # the window is shorter than a block and longer than the prompts
    ({"cp": 4, "tokens_per_block": 1}, [41, 7, 9]),
    ({"cp": 2, "tpa": 2, "merge": "ag_rs"}, [6, 5, 4]),
]


@pytest.mark.parametrize(("plan", "prompt"), PLANS, ids=str)
def test_gemma4(plan: dict[str, Any], prompt: list[int]) -> None:
    model, graph = gemma()
    check_exact(model, poisoned(graph, **plan), prompt)


@SLOW
@pytest.mark.parametrize("window", [1, 2, 11, 23])
@pytest.mark.parametrize(("plan", "prompt"), [*PLANS, ({"cp": 1}, [5, 2, 13])], ids=str)
def test_gemma4_with_other_windows(window: int, plan: dict[str, Any], prompt: list[int]) -> None:
    model, graph = gemma(window)
    check_exact(model, poisoned(graph, **plan), prompt)


def test_a_shared_layer_caches_nothing() -> None:
    """Two of four layers: by the plan, by the caches that ranks hold, and by the graph, which appends twice."""
    _, graph = gemma()
    compiled = poisoned(graph, cp=2)
    layers = {layer.index: layer for layer in graph.layers}
    assert [layers[i].caches for i in range(4)] == [(0,), (1,), (0,), (1,)]
    assert [layers[i].own for i in range(4)] == [(0,), (1,), (), ()]
    widths = 4 * (10 + 10) + 4 * (16 + 16)
    assert compiled.plan.kv_bytes_per_token_per_rank * 2 == widths * 8
    slots = compiled.ranks[0].cache[0].shape[:2].numel()
    assert sum(c.numel() for c in compiled.ranks[0].cache) == slots * widths
    assert len(inputs_of(compiled.graph.graph, "cache")) == 2
    appends = [n for b in bodies_of(compiled.graph).values() for n in b.graph.nodes if helix_op(n) == "cache_append"]
    assert len(appends) == 2
    compiled(torch.zeros(3, 5, dtype=torch.int64))
    assert compiled.world.sent_bytes == [compiled.plan.egress_bytes_per_rank_per_token * 15] * 2


def test_generation_is_transformers_own() -> None:
    model, graph = gemma()
    compiled, prompt = poisoned(graph, cp=4), random_ids(model, 2, 7)
    wanted = model.generate(prompt, max_new_tokens=9, do_sample=False, eos_token_id=None, pad_token_id=0)
    got = compiled.generate(prompt, max_new_tokens=9, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert torch.equal(got, wanted)


def test_a_cache_of_transformers_comes_in_and_is_taken_back() -> None:
    """import_cache of a prefix, truncate(), a folder and back: the same logits as the model's."""
    model, graph = gemma()
    compiled, ids = poisoned(graph, cp=2), random_ids(model, 2, 12)
    with torch.no_grad(), WidenedIslands():
        cached = DynamicCache()  # without a config it keeps all tokens of layers with windows
        model(input_ids=ids[:, :9], past_key_values=cached)
        expected = model(input_ids=ids).logits[:, -1]
        compiled.import_cache(cached)
        compiled(random_ids(model, 2, 3))
        compiled.truncate(9)
        assert deviation(compiled(ids[:, 9:])[:, -1:], expected[:, None], torch.ones(2, 1)) <= LIMIT
        with tempfile.TemporaryDirectory() as folder:
            compiled.save(Path(folder) / "module")
            loaded = HelixModule.load(Path(folder) / "module")
        assert deviation(loaded(ids)[:, -1:], expected[:, None], torch.ones(2, 1)) <= LIMIT


MLA_PLANS = [({"cp": 4, "tokens_per_block": 1}, [5, 2, 13]), ({"cp": 2, "q_proj": "replicate"}, [1, 7, 3])]


@pytest.mark.parametrize(("plan", "prompt"), [MLA_PLANS[0], pytest.param(*MLA_PLANS[1], marks=SLOW)], ids=str)
def test_shared_latents_with_rope_and_without(plan: dict[str, Any], prompt: list[int]) -> None:
    """Log-position scales of q stay what the model has (all heads whole: tpa = 1)."""
    model, graph = captured_family("mistral_large4", "shared")
    compiled = poisoned(graph, **plan)
    assert sparse_deviation(model, compiled, prompt, (1, 2, 5, 1)) <= LIMIT
    assert compiled.plan.kv_bytes_per_token_per_rank * plan["cp"] == 8 * (20 + 6 + 16 + 20 + 16)


@SLOW
def test_gemma3n() -> None:
    """Its hidden states lie as [streams, B, T, D]; layers are fed embeddings of their own."""
    model, graph = captured_family("gemma3n")
    check_exact(model, poisoned(graph, cp=2), [5, 2, 13])


@SLOW
def test_index_keys_alone_are_refused() -> None:
    """A layer with an indexer of its own and another's latents."""
    model = fresh_family("mistral_large4", kv_source_layers=[0, 0], no_rope_layers=[1, 1])
    with pytest.raises(MatchError, match="caches keys of an indexer and no K and V of its own"):
        helix_compile(model, cp=2)


def test_the_plan_and_inspect_say_whose_cache_is_read() -> None:
    _, graph = gemma()
    compiled = poisoned(graph, cp=2)
    assert [a.cache_of for body in compiled.plan.bodies for a in body.attentions] == [(), (), (0,), (1,)]
    assert HelixPlan.from_json(compiled.plan.to_json()) == compiled.plan
    text = " ".join(str(compiled.inspect()).split())
    assert "cache of layer 1" in text and "2 of 4 layers cache nothing of their own" in text


def test_code_of_segments_is_given_whole_tensors() -> None:
    """A layer's embeddings of its own are a part of a tensor of all layers: strides that a body was not captured with."""
    _, graph = gemma()
    stage = segments_of(poisoned(graph, cp=2).stages["lowered"])
    args = [a for n in stage.graph.nodes if n.meta.get("layer") is not None for a in n.args if isinstance(a, Node)]
    made = [a for a in args if a.op == "call_function" and isinstance(a.meta["val"], torch.Tensor)]
    shapes = [(shape_of(a), tuple(map(hint_of, a.meta["val"].stride()))) for a in made]
    assert len(shapes) > 8
    assert all(strides == torch.empty(shape, device="meta").stride() for shape, strides in shapes)


@SLOW
def test_compiled_segments_of_shared_layers() -> None:
    model, graph = gemma()
    check_exact(model, poisoned(graph, cp=2, lower="inductor"), [5, 2, 13])


def test_a_cache_with_empty_layers_comes_in() -> None:
    """Transformers' own for a model whose layers share: an empty layer for each that reads another's."""
    model, graph = captured_family("mistral_large4", "shared")
    compiled, ids = poisoned(graph, cp=2), random_ids(model, 2, 12)
    cached = DynamicCache(config=model.config)
    with torch.no_grad(), WidenedIslands():
        model(input_ids=ids[:, :9], past_key_values=cached)
        assert [layer.keys is None for layer in cached.layers] == [False, False, True, True]
        compiled.import_cache(cached)
        with TiesByPosition(*ids.shape):
            expected = model(input_ids=ids).logits[:, 9:]
        assert deviation(compiled(ids[:, 9:]), expected, torch.ones(2, 3)) <= LIMIT
