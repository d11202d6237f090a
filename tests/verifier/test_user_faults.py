"""Faults that a user makes by hand, in words of their own: each is found, and named by layer, parameter or node."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import fx

from helix_compile import HelixModule, helix_compile, verify
from tests.support.models import fresh_model

Break = Callable[[HelixModule], None]


def body(compiled: HelixModule, name: str) -> fx.GraphModule:
    found = compiled.graph.get_submodule(name)
    assert isinstance(found, fx.GraphModule)
    return found


def drop_an_output_bias(compiled: HelixModule) -> None:
    """Zero in a new model: only a bias that is not zero shows that it is gone."""
    gm = body(compiled, "body_0")
    add = next(
        n
        for n in gm.graph.nodes
        if n.target is torch.ops.aten.add.Tensor
        and any(x.op == "placeholder" and "o_proj" in x.name for x in n.all_input_nodes)
    )
    add.replace_all_uses_with(add.args[0])
    gm.recompile()


def drop_a_norm_weight(compiled: HelixModule) -> None:
    """Ones in a new model."""
    gm = body(compiled, "body_0")
    weight = next(n for n in gm.graph.nodes if "kv_a_layernorm" in n.name)
    product = next(iter(weight.users))
    product.replace_all_uses_with(next(a for a in product.args if a is not weight))
    gm.recompile()


def drop_the_last_norm_weight(compiled: HelixModule) -> None:
    graph = compiled.graph.graph
    weight = next(n for n in graph.nodes if n.op == "placeholder" and n.name.endswith("model_norm_weight"))
    product = next(iter(weight.users))
    product.replace_all_uses_with(next(a for a in product.args if a is not weight))
    compiled.graph.recompile()


def skip_a_layer(compiled: HelixModule) -> None:
    graph = compiled.graph.graph
    first, second = [n for n in graph.nodes if n.op == "call_module"][:2]
    second.replace_all_uses_with(first)
    graph.erase_node(second)
    compiled.graph.recompile()


def average_over_ranks(compiled: HelixModule) -> None:
    gm = body(compiled, "body_0")
    start = next(n for n in gm.graph.nodes if "all_reduce" in str(n.target))
    start.args = (start.args[0], "avg", start.args[2])
    gm.recompile()


def call_a_method(compiled: HelixModule) -> None:
    gm = body(compiled, "body_0")
    output = next(n for n in gm.graph.nodes if n.op == "output")
    with gm.graph.inserting_before(output):
        called = gm.graph.call_method("contiguous", (output.args[0],))
    output.args = (called,)
    gm.recompile()


def misspell_a_parameter(compiled: HelixModule) -> None:
    compiled.ranks[1].params["model.nrom.weight"] = torch.ones(72)


def empty_a_parameter(compiled: HelixModule) -> None:
    compiled.ranks[0].params["model.norm.weight"] = None  # type: ignore[assignment] # what a user's slip does


FAULTS: dict[str, tuple[Break, str, str]] = {
    "output bias": (drop_an_output_bias, "HX401", "layer 0"),
    "norm weight": (drop_a_norm_weight, "HX401", "layer 0"),
    "last norm": (drop_the_last_norm_weight, "HX401", "outer graph"),
    "skipped layer": (skip_a_layer, "HX109", "outer graph"),
    "average": (average_over_ranks, "HX105", "all_reduce"),
    "method": (call_a_method, "HX103", "contiguous"),
    "misspelt": (misspell_a_parameter, "HX203", "model.nrom.weight"),
    "empty": (empty_a_parameter, "HX203", "model.norm.weight"),
}


VECTORS = ("output bias", "norm weight", "last norm")  # float32 does not condition them
CASES = [
    pytest.param(f, d, marks=() if d is torch.float64 else pytest.mark.slow)
    for f in FAULTS
    for d in (torch.float64, torch.float32)
    if f not in VECTORS or d is torch.float64
]


@pytest.mark.parametrize(("fault", "dtype"), CASES, ids=str)
def test_found_and_named(fault: str, dtype: torch.dtype) -> None:
    damage, code, place = FAULTS[fault]
    model = fresh_model("short_biased", dtype)
    with torch.no_grad():  # as a new model is: nothing here shows a vector that is left out
        for name, tensor in model.named_parameters():
            if tensor.dim() == 1:
                tensor.fill_(0.0 if name.endswith("bias") else 1.0)
    compiled = helix_compile(model, cp=2, max_seq_len=32, tokens_per_block=2)
    damage(compiled)
    report = verify(compiled, model)
    assert any(f.code == code and place in f.where for f in report.findings), report
    assert not any(f.code == "HX407" for f in report.findings), report
