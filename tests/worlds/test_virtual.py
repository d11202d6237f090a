"""The fault reports of the virtual world, subgroups, byte counts, and that it is reproducible."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction

import pytest
import torch
from torch import Tensor, fx

from helix_compile.errors import RuntimeFault
from helix_compile.layout.degrees import HelixLayout, HelixMesh
from helix_compile.worlds.virtual import VirtualWorld

c10d = torch.ops._c10d_functional


def world(kvp: int = 4, tpa: int = 1) -> VirtualWorld:
    return VirtualWorld(HelixMesh(HelixLayout(kvp=kvp, tpa=tpa, ep=1, tpf=kvp * tpa)))


def graph(build: Callable[[fx.Graph, fx.Node], fx.Node]) -> fx.GraphModule:
    made = fx.Graph()
    made.output(build(made, made.placeholder("x")))
    return fx.GraphModule(torch.nn.Module(), made)


def reduced(g: fx.Graph, x: fx.Node, axis: str = "world") -> fx.Node:
    return g.call_function(c10d.all_reduce.default, (x, "sum", axis))


def waited(g: fx.Graph, x: fx.Node) -> fx.Node:
    return g.call_function(c10d.wait_tensor.default, (x,))


def two_sums(g: fx.Graph, x: fx.Node) -> fx.Node:
    return waited(g, reduced(g, waited(g, reduced(g, x))))


def one_sum(g: fx.Graph, x: fx.Node) -> fx.Node:
    return waited(g, reduced(g, x))


def exchange(splits: list[int]) -> Callable[[fx.Graph, fx.Node], fx.Node]:
    def build(g: fx.Graph, x: fx.Node) -> fx.Node:
        return waited(g, g.call_function(c10d.all_to_all_single.default, (x, splits, [1] * 4, "kvp")))

    return build


def inputs(ranks: int = 4) -> list[list[Tensor]]:
    return [[torch.arange(8.0).view(4, 2) + 10 * r] for r in range(ranks)]


def test_dropped_collective_is_a_deadlock_with_ranks_and_node() -> None:
    graphs = [graph(one_sum), graph(one_sum), graph(lambda g, x: x), graph(one_sum)]
    with pytest.raises(
        RuntimeFault, match=r"deadlock: rank 0 waits at wait_tensor_default for \[2\] in group world \(collective #0\)"
    ):
        world().run(graphs, inputs())


def test_different_collective_is_named_by_rank() -> None:
    other = graph(exchange([1, 1, 1, 1]))
    gather = graph(lambda g, x: waited(g, g.call_function(c10d.all_gather_into_tensor.default, (x, 4, "kvp"))))
    with pytest.raises(RuntimeFault, match=r"ranks disagree .*1: 'all_gather_into_tensor'"):
        world().run([other, gather, other, other], inputs())


def test_missing_wait() -> None:
    broken = graph(lambda g, x: g.call_function(torch.add, (reduced(g, x), 1)))
    with pytest.raises(RuntimeFault, match=r"rank 0, node add: \['all_reduce'\] used before wait_tensor"):
        world().run(broken, inputs())


def test_wrong_split_sizes() -> None:
    wrong = graph(exchange([5, 4, 4, 3]))
    graphs = [graph(exchange([1, 1, 1, 1])), wrong, *[graph(exchange([1, 1, 1, 1]))] * 2]
    with pytest.raises(RuntimeFault, match=r"rank 1.*output_split_sizes=\[5, 4, 4, 3\] but peers send \[1, 1, 1, 1\]"):
        world().run(graphs, inputs())


def test_an_extra_local_op_on_one_rank_is_fine() -> None:
    extra = graph(lambda g, x: one_sum(g, g.call_function(torch.mul, (x, 1.0))))
    outputs = world().run([graph(one_sum), extra, graph(one_sum), graph(one_sum)], inputs())
    assert all(torch.equal(o, sum(x[0] for x in inputs())) for o in outputs)


def test_dropped_in_the_middle_is_a_disagreement() -> None:
    graphs = [graph(two_sums), graph(two_sums), graph(one_sum), graph(two_sums)]
    with pytest.raises(RuntimeFault, match=r"deadlock: .*\[2\] in group world \(collective #1\)"):
        world().run(graphs, inputs())


def test_waiting_twice_and_never() -> None:
    def twice(g: fx.Graph, x: fx.Node) -> fx.Node:
        start = reduced(g, x)
        return g.call_function(torch.add, (waited(g, start), waited(g, start)))

    def never(g: fx.Graph, x: fx.Node) -> fx.Node:
        reduced(g, x)
        return x

    with pytest.raises(RuntimeFault, match="waited for twice"):
        world().run(graph(twice), inputs())
    with pytest.raises(RuntimeFault, match=r"never waited for by \[0, 1, 2, 3\]"):
        world().run(graph(never), inputs())


def test_unequal_shapes_and_unknown_axis() -> None:
    ragged = inputs()
    ragged[3][0] = torch.zeros(4, 3)
    with pytest.raises(RuntimeFault, match=r"ranks disagree on the shape of all_reduce"):
        world().run(graph(one_sum), ragged)
    with pytest.raises(RuntimeFault, match="unknown axis 'dp'"):
        world().run(graph(lambda g, x: waited(g, reduced(g, x, "dp"))), inputs())


def test_another_reduction_is_not_taken_for_a_sum() -> None:
    mean = graph(lambda g, x: waited(g, g.call_function(c10d.all_reduce.default, (x, "avg", "world"))))
    with pytest.raises(RuntimeFault, match=r"all_reduce #0 of world.*'avg'.*sums"):
        world().run(mean, inputs())


def test_a_failing_op_names_rank_and_node() -> None:
    broken = graph(lambda g, x: g.call_function(torch.mm, (x, x)))
    with pytest.raises(RuntimeFault, match=r"rank 0, node mm: .*mat1 and mat2"):
        world().run(broken, inputs())


@pytest.mark.parametrize(("axis", "groups"), [("kvp", [[0, 1], [2, 3]]), ("tpa", [[0, 2], [1, 3]])])
def test_subgroups_of_a_two_by_two_world(axis: str, groups: list[list[int]]) -> None:
    values = inputs()
    outputs = world(2, 2).run(graph(lambda g, x: waited(g, reduced(g, x, axis))), values)
    for group in groups:
        for rank in group:
            assert torch.equal(outputs[rank], sum(values[r][0] for r in group))


def test_all_to_all_moves_row_j_to_rank_j_and_counts_bytes() -> None:
    ran = world()
    outputs = ran.run(graph(exchange([1, 1, 1, 1])), inputs())
    for rank, output in enumerate(outputs):
        assert torch.equal(output, torch.stack([x[0][rank] for x in inputs()]))
    assert ran.sent_bytes == [Fraction(3 * 8)] * 4
    ran.reset_counters()
    ran.run(graph(one_sum), inputs())
    assert ran.sent_bytes == [Fraction(2 * 3 * 32, 4)] * 4
    assert ran.num_collectives == {("all_reduce", "world"): 1}


def test_sums_are_in_rank_order_and_rounded_once() -> None:
    values = [[torch.randn(64, dtype=torch.bfloat16)] for _ in range(4)]
    first = world().run(graph(one_sum), values)
    expected = sum(v[0].float() for v in values).bfloat16()
    assert all(torch.equal(o, expected) for o in first)


def test_hook_sees_every_node_of_every_rank() -> None:
    seen: list[tuple[int, str]] = []
    world().run(graph(one_sum), inputs(), hook=lambda rank, node, value: seen.append((rank, node.name)))
    assert {n for r, n in seen if r == 2} == {"x", "all_reduce_default", "wait_tensor_default"}
