"""How a matcher says that a candidate is no site."""

from __future__ import annotations

from torch import fx

from helix_compile.matches import MatchFailure
from helix_compile.passes.fx_edit import source_line


class Reject(Exception):
    """Unwinds one candidate; becomes a MatchFailure."""

    def __init__(self, reason: str, node: fx.Node, depth: int):
        super().__init__(reason)
        self.failure = MatchFailure(reason, node.name, source_line(node), depth)
