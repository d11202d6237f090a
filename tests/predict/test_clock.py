"""The predicted gain of overlap against ranks' clocks: of the virtual world here, of real processes in tests/slow."""

from __future__ import annotations

import pytest
import torch

from helix_compile import HelixModule, helix_compile
from helix_compile.predict.roofline import hopb_time
from tests.distributed.steps import OVERLAP, OVERLAP_BATCH, SLOWED
from tests.support.clock import Clock, Durations
from tests.support.models import tiny_model

MODEL = ("short", torch.float32)


def compiled_with(overlap: str, durations: Durations, **more: object) -> tuple[HelixModule, Clock]:
    options = {**OVERLAP, **more}
    compiled = helix_compile(tiny_model(*MODEL), overlap=overlap, world="virtual", **options)
    return compiled, Clock(compiled, durations)


@pytest.mark.parametrize(
    "name", [n if n != "the exchange is longer" else pytest.param(n, marks=pytest.mark.slow) for n in SLOWED]
)
def test_clocks_of_the_virtual_world_say_what_is_predicted(name: str) -> None:
    """Within 15 % is asked for; here nothing else takes time, so that they are equal. And both are the paper's formula, of two parts."""
    durations, ids, took = SLOWED[name], torch.arange(OVERLAP_BATCH)[:, None], {}
    for overlap in ("none", "hopb"):
        compiled, clock = compiled_with(overlap, durations)
        compiled(ids)
        took[overlap] = max(clock.elapsed)
        assert took[overlap] == pytest.approx(durations.predicted(compiled, OVERLAP_BATCH), rel=1e-9)
        layers = sum(len(body.layers) for body in compiled.plan.bodies)
        sent = float(compiled.plan.bodies[0].collectives[0].egress_bytes_per_rank_per_token) * OVERLAP_BATCH
        parts = 1 if overlap == "none" else 2
        compute, exchange = durations.row * OVERLAP_BATCH / parts, durations.latency + durations.byte * sent / parts
        assert took[overlap] == pytest.approx(layers * hopb_time(parts, compute, exchange, overlap == "hopb"), rel=1e-9)
    assert (took["hopb"] < took["none"]) == (name != "latency alone")


def test_two_exchanges_a_part_and_a_ragged_batch() -> None:
    batch = 3
    durations, ids = Durations(row=0.03, latency=0.01, byte=1e-4), torch.arange(batch)[:, None]
    for overlap in ("none", "hopb"):
        compiled, clock = compiled_with(overlap, durations, merge="ag_rs", cp=4)
        compiled(ids)
        assert clock.elapsed == pytest.approx([durations.predicted(compiled, batch)] * 4, rel=1e-9)


def test_a_wait_that_stands_too_early_is_seen() -> None:
    """What the clock must tell: the same graph, each wait moved behind its start, takes as long as without overlap."""
    durations, ids, took = SLOWED["compute is longer"], torch.arange(OVERLAP_BATCH)[:, None], {}
    for moved in (False, True):
        compiled, clock = compiled_with("hopb", durations)
        for body in compiled.plan.bodies if moved else ():
            module = compiled.graph.get_submodule(body.name)
            for node in [n for n in module.graph.nodes if "wait_tensor" in str(n.target)]:
                node.args[0].append(node)
            module.recompile()
        compiled(ids)
        took[moved] = max(clock.elapsed)
        assert took[moved] == pytest.approx(durations.predicted(compiled, OVERLAP_BATCH), rel=1e-9)
    compiled, clock = compiled_with("none", durations)
    compiled(ids)
    assert took[True] == pytest.approx(max(clock.elapsed), rel=1e-9) and took[False] < 0.85 * took[True]
