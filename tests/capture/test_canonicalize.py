"""Checks go, B and T come from one node, dead code goes; the numbers stay."""

from __future__ import annotations

import torch
from torch import Tensor, fx

from helix_compile.capture.body import canonicalize
from helix_compile.ir.graph import aten, calls, placeholders
from tests.support.graphs import captured_tiny


class Sizes(torch.nn.Module):
    """Takes B from the mask and T from the positions, as models do; holds a check and a dead op."""

    def forward(self, x: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
        torch._check(mask.shape[0] >= 1)
        _ = x.exp()
        flat = x.view(mask.shape[0], -1)
        return flat.view(mask.shape[0], positions.shape[1], x.shape[2])


def exported() -> fx.GraphModule:
    B, T, S = (torch.export.Dim(n, max=99) for n in "BTS")
    args = (torch.randn(2, 3, 4), torch.ones(2, 5), torch.ones(2, 3, dtype=torch.int64))
    program = torch.export.export(
        Sizes(), args, dynamic_shapes=({0: B, 1: T}, {0: B, 1: S}, {0: B, 1: T}), strict=False
    )
    return program.run_decompositions({}).graph_module


def test_sizes_come_from_the_anchor_and_dead_code_goes() -> None:
    gm = exported()
    x, mask, positions = placeholders(gm.graph)
    canonicalize(gm.graph, x)
    gm.recompile()
    assert not mask.users and not positions.users
    assert {n.args[0] for n in calls(gm.graph, aten.sym_size.int)} == {x}
    assert not calls(gm.graph, aten.exp.default)
    value = torch.randn(1, 6, 4)
    (out,) = gm(value, torch.ones(1, 9), torch.ones(1, 6, dtype=torch.int64))
    assert torch.equal(out, value)


def test_a_captured_body_holds_no_checks() -> None:
    for body in captured_tiny().bodies.values():
        targets = {str(n.target) for n in body.graph.nodes}
        assert not {t for t in targets if "assert" in t or "sym_constrain" in t}
        sizes = calls(body.graph, aten.sym_size.int)
        assert {n.args[0] for n in sizes if n.args[1] < 2} == {placeholders(body.graph)[0]}
