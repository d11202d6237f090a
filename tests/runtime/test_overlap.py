"""A batch in parts where steps are prepared: segments, compiled code, recorded pieces and torch.compile keep the order and the bits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._sympy.functions import FloorDiv
from transformers import DynamicCache

from helix_compile import HelixModule, helix_compile
from helix_compile.ir.graph import placeholders
from helix_compile.ir.stage import bodies_of, body_of
from helix_compile.passes.lower.segments import segments_of
from helix_compile.runtime import inductor
from helix_compile.runtime.segments import bound_inputs
from helix_compile.worlds import program
from helix_compile.worlds.program import Program
from tests.support.driver import random_ids
from tests.support.families import fresh_family
from tests.support.models import fresh_model, tiny_model
from tests.support.order import A2A, AG_RS, ProgramEvents
from tests.support.recording import FakeGraphs

OPTIONS: dict[str, Any] = {"cp": 2, "tokens_per_block": 2, "max_batch_size": 5, "max_seq_len": 64}


def same_bits(model: Any, plain: HelixModule, parted: HelixModule, batches: tuple[int, ...] = (1, 2, 5)) -> None:
    for B in batches:
        plain.reset(), parted.reset()
        for T in (4, 1, 1, 1):
            ids = random_ids(model, B, T)
            assert torch.equal(plain(ids), parted(ids)), (B, T)


@pytest.mark.parametrize("merge", ["a2a", pytest.param("ag_rs", marks=pytest.mark.slow)])
def test_segments_lie_between_start_and_wait(merge: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next part's attention is a segment between a part's start and its wait; what needs B of a part's rows is told of all."""
    model = tiny_model("short", torch.float32)
    options = {**OPTIONS, "merge": merge, "v_up": "before"}
    plain, parted = helix_compile(model, **options), helix_compile(model, **options, overlap="hopb")
    stage = segments_of(parted.graph)
    recorded = ProgramEvents(monkeypatch)
    events = recorded.of(parted.graph)
    programs = [
        Program(
            r.rank,
            stage,
            bound_inputs(stage, r, parted.plan.layout, parted.device),
            lambda call: recorded.told(call.segment, call.segment),
        )
        for r in parted.ranks
    ]
    monkeypatch.setattr(parted, "programs", lambda *_: programs)
    ids = random_ids(model, 3, 4)
    assert torch.equal(plain(ids), parted(ids))
    assert events == dict.fromkeys(range(2), (A2A if merge == "a2a" else AG_RS) * 2)
    same_bits(model, plain, parted)
    for segment in bodies_of(body_of(stage, "body_0")).values():
        sizes = [
            s.node.expr for p in placeholders(segment.graph) for s in p.meta["val"].shape if isinstance(s, torch.SymInt)
        ]
        alone = {size for size in sizes if size.is_Symbol}
        assert all(size.free_symbols <= alone for size in sizes if size.atoms(FloorDiv))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "options"),
    [
        (lambda: fresh_model("short", torch.bfloat16), {"v_up": "before"}),
        (lambda: fresh_model("short", torch.float32), {"v_up": "after"}),
        (lambda: fresh_model("short", torch.float32), {"merge": "ag_rs"}),
        (lambda: fresh_family("granite_swa", dtype=torch.float32), {}),
        (lambda: fresh_family("glm_moe_dsa", dtype=torch.float32), {}),
    ],
    ids=["bfloat16", "after", "ag_rs", "sinks", "sparse"],
)
def test_compiled_code_keeps_the_order(make: Any, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """What Inductor generates is called in the order of the graph, and computes what the graph does; parts of no row too."""
    model = make()
    recorded, made = ProgramEvents(monkeypatch), inductor.code_of
    monkeypatch.setattr(
        "helix_compile.runtime.inductor.code_of",
        lambda segment, bound, name: recorded.told(segment, made(segment, bound, name)),
    )
    parted = helix_compile(model, **OPTIONS, **options, lower="inductor", overlap="hopb")
    interpreted = helix_compile(model, **OPTIONS, **options, overlap="hopb")
    events = recorded.of(parted.graph)
    limit = {torch.float32: 1e-5, torch.bfloat16: 0.0}[model.dtype]
    for B in (3, 1, 2, 5):
        interpreted.reset(), parted.reset()
        for T in (4, 1, 2):
            ids = random_ids(model, B, T)
            events.clear()
            got, expected = parted(ids), interpreted(ids)
            assert (got - expected).abs().max() <= limit * expected.abs().max(), (B, T)
            wanted = AG_RS if options.get("merge") == "ag_rs" else A2A
            assert events == dict.fromkeys(range(2), wanted * len(parted.plan.cached))


def test_pieces_hold_the_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Recorded and replayed: one piece, the same bits, and of each rank's launches attention to both parts before the first is merged."""
    monkeypatch.setattr(program, "host_read", lambda node: "")
    model, fake = tiny_model("short", torch.float32), FakeGraphs()
    options = {**OPTIONS, "lower": "reference"}
    plain = helix_compile(model, **options)
    with monkeypatch.context() as patch:
        patch.setattr("helix_compile.module.recorder_for", lambda device: fake)
        parted = helix_compile(model, **options, overlap="hopb")
    same_bits(model, plain, parted, (3, 1))
    assert parted.replays is not None
    assert [(tape.pieces, tape.apart_calls) for tape in parted.replays.recordings] == [(1, 0)] * 2
    calls = [str(c.call).split(".")[1] for c in fake.pieces[0].calls]
    kept = [c for c in calls if c in ("mla_decode", "merge_lse")]
    assert kept == (["mla_decode"] * 4 + ["merge_lse"] * 4) * 2  # two ranks, two parts, two layers


@pytest.mark.slow
def test_torch_compile_has_parts_too() -> None:
    model = fresh_model("short", torch.float32)
    plain = helix_compile(model, **OPTIONS)
    torch._dynamo.reset()
    entered = torch.compile(model, backend="helix", fullgraph=True, options={**OPTIONS, "overlap": "hopb"})
    ids, cache = random_ids(model, 3, 5), DynamicCache(config=model.config)
    for part in (ids, ids[:, :1], ids[:, :3]):
        with torch.no_grad():
            logits = entered(input_ids=part, past_key_values=cache, use_cache=True).logits
        assert torch.equal(logits, plain(part))
    torch._dynamo.reset()
