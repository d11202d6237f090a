"""How a matcher says that a candidate is no site."""

from __future__ import annotations

from torch import fx

from helix_compile.matches import MatchFailure
from helix_compile.passes.fx_edit import aten, is_call, source_line


class Reject(Exception):
    """Unwinds one candidate; becomes a MatchFailure."""

    def __init__(self, reason: str, node: fx.Node, depth: int):
        super().__init__(reason)
        self.failure = MatchFailure(reason, node.name, source_line(node), depth)


def unknown_in_scores(step: fx.Node) -> str:
    """Why an op between the scores and their softmax is no part of attention in normal form."""
    if is_call(step, *_MASKING):
        return (
            f"the scores are masked by `{step.target}`, expected a mask that is added to them: 0 where a key is visible, a "
            "large negative number where it is not (nearest that works: scores + mask, or scaled_dot_product_attention)"
        )
    return f"the score chain holds `{step.target}` (sinks, a cap or a bias?)"


_MASKING = (
    aten.masked_fill.Scalar, aten.masked_fill.Tensor, aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf,
)  # fmt: skip
