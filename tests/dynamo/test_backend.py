"""torch.compile(model, backend="helix"): a user's own decode loop, with transformers' caches.

The reference is the model itself in float64 with a cache of its own. One compiled model serves most tests: a new cache
is a reset.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from transformers import DynamicCache, StaticCache

from helix_compile import RuntimeFault, helix_compile
from helix_compile.backend import compiled_modules
from helix_compile.runtime.claims import graph_digest
from helix_compile.worlds.virtual import VirtualWorld
from tests.support.models import fresh_model
from tests.support.order import A2A, record_walks

OPTIONS = {"cp": 4, "tokens_per_block": 3, "max_seq_len": 96, "max_batch_size": 2}
PROMPT = 7


@pytest.fixture(scope="module")
def model() -> Any:
    return fresh_model("short")


@pytest.fixture(scope="module")
def compiled(model: Any) -> Any:
    torch._dynamo.reset()
    with torch._dynamo.config.patch(recompile_limit=64):  # these tests call it in many ways
        yield torch.compile(model, backend="helix", fullgraph=True, options=dict(OPTIONS))
    torch._dynamo.reset()


def new_cache(kind: str, model: Any) -> Any:
    if kind == "dynamic":
        return DynamicCache(config=model.config)
    return StaticCache(config=model.config, max_cache_len=64)


def prompt(seed: int = 0) -> Tensor:
    return torch.randint(0, 97, (2, PROMPT), generator=torch.Generator().manual_seed(seed))


def step(model: Any, ids: Tensor, cache: Any, **call: Any) -> Tensor:
    with torch.no_grad():
        out = model(input_ids=ids, past_key_values=cache, use_cache=True, **call)
    assert out.past_key_values is cache
    return out.logits


def started(compiled: Any, model: Any, kind: str = "dynamic") -> tuple[Any, Any, Tensor]:
    """A cache of the compiled model and one of the model, both prefilled and one step further; the next token."""
    caches = new_cache(kind, model), new_cache(kind, model)
    ids = prompt()
    for _ in range(2):
        logits = [step(m, ids, c) for m, c in zip((compiled, model), caches, strict=True)]
        check(*logits)
        ids = logits[1][:, -1:].argmax(-1)
    return *caches, ids


def check(got: Tensor, expected: Tensor) -> None:
    assert got.shape == expected.shape and got.dtype == expected.dtype
    # the model's norms and router are fp32 islands: noise of 1e-16 may flip one of their roundings
    assert (got - expected).abs().max() <= 1e-7 * expected.abs().max()


def goes_on(compiled: Any, model: Any, cache: Any, reference: Any, ids: Tensor) -> None:
    """After a refusal nothing is changed: the same step is right."""
    check(step(compiled, ids, cache), step(model, ids, reference))


@pytest.mark.slow
def test_an_fp8_cache_is_an_option_as_any(model: Any) -> None:
    """The same logits as helix_compile with it, step by step; not those without."""
    options = {**OPTIONS, "cache_dtype": "fp8_ds_mla"}
    torch._dynamo.reset()
    user = torch.compile(model, backend="helix", fullgraph=True, options=dict(options))
    own, cache = helix_compile(model, **options), new_cache("dynamic", model)
    for ids in (prompt(), prompt(1)[:, :1], prompt(2)[:, :3]):
        assert torch.equal(step(user, ids, cache), own(ids))
    assert not torch.equal(helix_compile(model, **OPTIONS)(prompt()), step(user, prompt(), new_cache("dynamic", model)))
    torch._dynamo.reset()


@pytest.mark.parametrize("kind", [pytest.param("dynamic", marks=pytest.mark.slow), "static"])
def test_forty_greedy_steps(compiled: Any, model: Any, kind: str) -> None:
    counters.clear()
    mine, reference = new_cache(kind, model), new_cache(kind, model)
    ids = others = prompt()
    graphs = []
    for count in range(40):
        logits, expected = step(compiled, ids, mine), step(model, others, reference)
        check(logits, expected)
        ids, others = logits[:, -1:].argmax(-1), expected[:, -1:].argmax(-1)
        assert torch.equal(ids, others)
        assert int(mine.get_seq_length()) == PROMPT + count
        graphs.append(counters["stats"]["unique_graphs"])
    # prefill, one token, and for a cache that grows one token at any length; then never again
    assert graphs[-1] == (3 if kind == "dynamic" else 2)
    assert graphs[2:] == [graphs[2]] * 38


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_the_users_cache_holds_no_latents(compiled: Any, model: Any, kind: str) -> None:
    mine, reference, _ = started(compiled, model, kind)
    for layer, other in zip(mine.layers, reference.layers, strict=True):
        for got, expected in ((layer.keys, other.keys), (layer.values, other.values)):
            assert got.shape == expected.shape and got.dtype == expected.dtype
            assert got.untyped_storage().nbytes() == got.element_size()
            assert got.isnan().all()  # whoever reads it must not get a number that looks right


@pytest.mark.parametrize(
    ("kind", "positions"),
    [
        ("dynamic", "counted"),
        ("static", "given"),
        pytest.param("dynamic", "given", marks=pytest.mark.slow),
        pytest.param("static", "counted", marks=pytest.mark.slow),
    ],
)
def test_left_padding(compiled: Any, model: Any, kind: str, positions: str) -> None:
    mine, reference, ids = new_cache(kind, model), new_cache(kind, model), prompt(1)
    for count in range(3):
        mask = torch.ones(2, PROMPT + count, dtype=torch.int64)
        mask[0, :3] = 0
        call: dict[str, Tensor] = {"attention_mask": mask}
        if positions == "given":
            call["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        got, expected = step(compiled, ids, mine, **call), step(model, ids, reference, **call)
        if positions == "given":
            check(got[:, -1], expected[:, -1])
        else:
            # the model's tables are fp32 and it counts padding; Helix does not: the same rotation, rounded elsewhere
            assert (got[:, -1] - expected[:, -1]).abs().max() <= 1e-6 * expected.abs().max()
        ids = expected[:, -1:].argmax(-1)
        assert torch.equal(got[:, -1:].argmax(-1), ids)


def test_a_new_cache_is_a_reset_and_the_old_one_is_refused(compiled: Any, model: Any) -> None:
    old, _, ids = started(compiled, model)
    mine, reference, following = started(compiled, model)
    with pytest.raises(RuntimeFault, match="another cache object"):
        step(compiled, ids, old)
    goes_on(compiled, model, mine, reference, following)


def test_a_static_cache_may_be_reset_and_used_again(compiled: Any, model: Any) -> None:
    mine, reference, _ = started(compiled, model, "static")
    mine.reset(), reference.reset()
    ids = prompt(2)
    for _ in range(3):
        got, expected = step(compiled, ids, mine), step(model, ids, reference)
        check(got, expected)
        ids = expected[:, -1:].argmax(-1)


def rewind(cache: Any, model: Any) -> None:
    cache.crop(-1)


def reorder(cache: Any, model: Any) -> None:
    cache.reorder_cache(torch.tensor([1, 0]))


def copy_one(cache: Any, model: Any) -> None:
    cache.layers[1].values = cache.layers[1].values.clone()


def swap(cache: Any, model: Any) -> None:
    cache.layers[0].keys, cache.layers[1].keys = cache.layers[1].keys, cache.layers[0].keys


def fill(cache: Any, model: Any) -> None:
    other = DynamicCache(config=model.config)
    with torch.no_grad():
        model(torch.zeros(2, cache.get_seq_length(), dtype=torch.int64), past_key_values=other)
    cache.layers[0].keys = other.layers[0].keys


@pytest.mark.parametrize(
    "edit",
    [rewind, swap, fill, pytest.param(reorder, marks=pytest.mark.slow), pytest.param(copy_one, marks=pytest.mark.slow)],
)
def test_an_edited_dynamic_cache_is_refused(compiled: Any, model: Any, edit: Any) -> None:
    mine, reference, ids = started(compiled, model)
    before = [(layer.keys, layer.values) for layer in mine.layers]
    edit(mine, model)
    with pytest.raises(RuntimeFault, match=r"cropped, reordered, copied or refilled"):
        step(compiled, ids, mine)
    for layer, (keys, values) in zip(mine.layers, before, strict=True):
        layer.keys, layer.values = keys, values
    goes_on(compiled, model, mine, reference, ids)


def test_a_static_cache_that_was_rewound_or_written_is_refused(compiled: Any, model: Any) -> None:
    mine, reference, ids = started(compiled, model, "static")
    for layer in mine.layers:
        layer.cumulative_length.sub_(1)
    with pytest.raises(RuntimeFault, match="7 columns, 8 were fed"):
        step(compiled, ids, mine)
    mine.layers[1].cumulative_length.add_(1)
    with pytest.raises(RuntimeFault, match=r"different lengths \[7, 8\]"):
        step(compiled, ids, mine)
    mine.layers[0].cumulative_length.add_(1)
    goes_on(compiled, model, mine, reference, ids)
    mine.layers[1].keys.fill_(0.0)
    with pytest.raises(RuntimeFault, match="written in place"):
        step(compiled, ids, mine)


def test_a_cache_that_the_model_filled_is_refused(compiled: Any, model: Any) -> None:
    _, reference, ids = started(compiled, model)
    with pytest.raises(RuntimeFault, match="another cache object"):
        step(compiled, ids, reference)


def test_a_mask_that_changes_its_mind_is_refused(compiled: Any, model: Any) -> None:
    mine, reference, ids = new_cache("dynamic", model), new_cache("dynamic", model), prompt(1)
    mask = torch.ones(2, PROMPT, dtype=torch.int64)
    mask[1, :2] = 0
    step(compiled, ids, mine, attention_mask=mask), step(model, ids, reference, attention_mask=mask)
    ids, wider = ids[:, -1:], torch.cat([mask, mask[:, -1:]], dim=1)
    wrong = wider.clone()
    wrong[1, 1] = 1
    with pytest.raises(RuntimeFault, match=r"first 7 columns.*rows \[1\]"):
        step(compiled, ids, mine, attention_mask=wrong)
    with pytest.raises(RuntimeFault, match="it is missing now"):
        step(compiled, ids, mine)
    with pytest.raises(RuntimeFault, match=r"must be \[B, S \+ T\] = \[2, 8\]"):
        step(compiled, ids, mine, attention_mask=torch.ones(2, 1, dtype=torch.int64))
    got = step(compiled, ids, mine, attention_mask=wider)
    expected = step(model, ids, reference, attention_mask=wider)
    assert (got - expected).abs().max() <= 1e-6 * expected.abs().max()


def test_a_gap_in_the_positions_is_refused(compiled: Any, model: Any) -> None:
    mine, reference, ids = started(compiled, model)
    with pytest.raises(RuntimeFault, match="positions jump"):
        step(compiled, ids, mine, position_ids=torch.tensor([[8], [9]]))
    goes_on(compiled, model, mine, reference, ids)


def test_logits_to_keep(compiled: Any, model: Any) -> None:
    mine, reference = new_cache("dynamic", model), new_cache("dynamic", model)
    check(step(compiled, prompt(), mine, logits_to_keep=2), step(model, prompt(), reference, logits_to_keep=2))


def test_both_front_doors_run_the_same_graph(compiled: Any, model: Any) -> None:
    started(compiled, model)
    (module,) = compiled_modules(compiled)
    twin = fresh_model("short", seed=1)  # a capture of its own
    other = helix_compile(twin, **OPTIONS)
    assert graph_digest(module.graph) == graph_digest(other.graph)
    assert module.plan == other.plan
    different = helix_compile(twin, **{**OPTIONS, "merge": "ag_rs"})
    assert graph_digest(module.graph) != graph_digest(different.graph)


@pytest.mark.slow
def test_a_head_that_is_cut(model: Any) -> None:
    """The logits that a loop of the user's own reads are those of all words, gathered."""
    torch._dynamo.reset()
    cut = torch.compile(model, backend="helix", fullgraph=True, options={**OPTIONS, "head": "shard", "pad_heads": True})
    started(cut, model)
    torch._dynamo.reset()


@pytest.mark.slow
def test_a_batch_in_parts(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a loop of the user's own one part is on its way while the next attends, as in helix_compile's graph, with the bits of one batch."""
    torch._dynamo.reset()
    whole = torch.compile(model, backend="helix", fullgraph=True, options={**OPTIONS, "v_up": "before"})
    prompts = (prompt(), prompt(1)[:, :1], prompt(2)[:, :3])
    cache = new_cache("dynamic", model)
    expected = [step(whole, ids, cache) for ids in prompts]
    torch._dynamo.reset()
    events = record_walks(monkeypatch, VirtualWorld)
    parts = torch.compile(
        model, backend="helix", fullgraph=True, options={**OPTIONS, "v_up": "before", "overlap": "hopb"}
    )
    cache = new_cache("dynamic", model)
    for ids, logits in zip(prompts, expected, strict=True):
        events.clear()
        assert torch.equal(step(parts, ids, cache), logits)
        assert events == dict.fromkeys(range(4), A2A * len(model.model.layers))
    started(parts, model)
    torch._dynamo.reset()
