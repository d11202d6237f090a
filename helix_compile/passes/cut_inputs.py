"""What becomes a rank's share inside a body: parameters take the shard's shape, views forget the head count."""

from __future__ import annotations

from torch import fx

from helix_compile.passes.fx_edit import input_named, node_named
from helix_compile.passes.head_cuts import open_view
from helix_compile.passes.propagate import fake_shard
from helix_compile.plan import BodyPlan


def cut_input(graph: fx.Graph, name: str, body: BodyPlan) -> None:
    """From here on this parameter is the rank's shard: its shape and its layout."""
    node, shard = input_named(graph, "param", name), body.shard(name)
    assert shard is not None, name
    node.meta["val"] = fake_shard(node, shard)
    node.meta["sharded"] = True


def open_views(graph: fx.Graph, names: tuple[str, ...], heads: int) -> None:
    """Views that write the head count get -1 there: a rank has fewer heads."""
    for name in names:
        view = node_named(graph, name)
        view.args = (view.args[0], open_view(view, heads))
