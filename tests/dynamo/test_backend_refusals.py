"""What torch.compile(backend="helix") refuses at compile time, and that a graph of another function is one of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import fx, nn
from transformers import DynamicCache

from helix_compile import CaptureError, HelixError, LayoutError, PlanError, RuntimeFault
from helix_compile.dynamo.check import compared_outputs
from helix_compile.dynamo.frame import traced_frame
from tests.support.gqa_models import fresh_gqa
from tests.support.models import fresh_model, tiny_model

IDS = torch.arange(6).view(2, 3)


@pytest.fixture(autouse=True)
def clean() -> Any:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("options", "kind", "what"),
    [
        ({"cp": 4, "degree": 2}, PlanError, r"unknown options \['degree'\].*tokens_per_block"),
        ({"tpa": 2}, PlanError, r"needs options=\{\"cp\""),
        ({"cp": 0}, LayoutError, "cp must be an int >= 1"),
        ({"cp": 4, "merge": "x"}, PlanError, "merge='x' is unknown"),
    ],
    ids=["unknown", "no_cp", "cp_0", "bad_choice"],
)
def test_options(options: dict[str, Any], kind: type[HelixError], what: str) -> None:
    with pytest.raises(kind, match=what):  # before the model is looked at
        torch.compile(nn.Linear(2, 2), backend="helix", options=options)(torch.ones(1, 2))


def test_a_mode_is_refused() -> None:
    compiled = torch.compile(nn.Linear(2, 2), backend="helix", mode="reduce-overhead")
    with pytest.raises(PlanError, match="mode='reduce-overhead'"):
        compiled(torch.ones(1, 2))


@pytest.mark.parametrize(
    ("options", "kind", "what"),
    [
        ({"cp": 2, "dtype": torch.float32}, PlanError, "dtype=torch.float32 differs"),
        ({"cp": 5, "max_seq_len": 64}, LayoutError, "24"),
    ],
    ids=["other_dtype", "heads"],
)
def test_options_that_do_not_fit_the_model(options: dict[str, Any], kind: type[HelixError], what: str) -> None:
    with pytest.raises(kind, match=what), torch.no_grad():
        torch.compile(tiny_model("short"), backend="helix", options=options)(IDS)


def test_a_graph_break_is_refused_with_its_place() -> None:
    model = fresh_model("short")
    model.model.layers[1].register_forward_pre_hook(breaks)
    place = rf"graph break was at .*test_backend_refusals\.py:{LINE}"
    with pytest.raises(CaptureError, match=place), torch.no_grad():
        torch.compile(model, backend="helix", options={"cp": 4})(IDS)
    torch._dynamo.reset()
    with pytest.raises(CaptureError, match=rf"graph break at .*_refusals\.py:{LINE}"):
        torch.compile(doubled, backend="helix", options={"cp": 4})(torch.ones(1, 2))


def doubled(x: torch.Tensor) -> torch.Tensor:
    y = x + x
    breaks()
    return y


def breaks(*args: Any) -> None:
    torch._dynamo.graph_break()


LINE = breaks.__code__.co_firstlineno + 1


def test_what_is_no_whole_model_is_refused() -> None:
    with pytest.raises(CaptureError, match="that of a function, not a transformers"):
        torch.compile(nn.Linear(2, 2), backend="helix", options={"cp": 4})(torch.ones(1, 2))
    model = tiny_model("short")

    def mine(ids: torch.Tensor) -> torch.Tensor:
        return model(ids).logits.argmax(-1)

    with pytest.raises(CaptureError, match="that of a function"), torch.no_grad():
        torch.compile(mine, backend="helix", options={"cp": 4})(IDS)
    with pytest.raises(CaptureError, match="called with labels="), torch.no_grad():
        torch.compile(model, backend="helix", options={"cp": 4})(IDS, labels=IDS)


def traced(model: Any, past: bool, check: Any) -> None:
    """Trace one step by Dynamo and call check(gm, frame, args) in the place of running its graph."""

    def keep(gm: fx.GraphModule, example_inputs: list[Any]) -> Any:
        frame = traced_frame(gm, example_inputs)

        def call(*args: Any) -> Any:
            check(gm, frame, args)
            return gm(*args)

        return call

    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        if past:
            model(IDS, past_key_values=cache)
        torch.compile(model, backend=keep, fullgraph=True)(IDS, past_key_values=cache)


def scaled(node: fx.Node) -> Any:
    return (node.target, {**node.kwargs, "scale": 0.2500001}) if "scale" in node.kwargs else None


def not_causal(node: fx.Node) -> Any:
    found = node.kwargs.get("is_causal")
    return (node.target, {**node.kwargs, "is_causal": False}) if found else None


def masked_otherwise(node: fx.Node) -> Any:
    found = getattr(node.target, "__name__", "") == "le"
    return (torch.lt, node.kwargs) if found else None


def activated_otherwise(node: fx.Node) -> Any:
    found = getattr(node.target, "__name__", "") == "silu"
    return (torch.nn.functional.gelu, {}) if found else None


@pytest.mark.parametrize("past", [pytest.param(False, marks=pytest.mark.slow), True], ids=["prompt", "step"])
def test_a_graph_that_is_not_the_models_forward_is_refused(past: bool) -> None:
    edits = [scaled, masked_otherwise if past else not_causal, activated_otherwise]
    told = []

    def check(gm: fx.GraphModule, frame: Any, args: tuple) -> None:
        compared_outputs(gm, frame, args)  # as it is, it is the model's forward
        for edit in edits:
            changed = next(n for n in gm.graph.nodes if n.op == "call_function" and edit(n))
            before = changed.target, changed.kwargs
            changed.target, changed.kwargs = edit(changed)
            with pytest.raises(CaptureError, match="the first node that differs") as caught:
                compared_outputs(gm, frame, args)
            told.append((edit, f"`{changed.name}`" in str(caught.value)))
            changed.target, changed.kwargs = before
        compared_outputs(gm, frame, args)

    traced(tiny_model("short"), past, check)
    # a mask is known by its values: what uses it is the first node that differs
    assert told == [(edit, edit is not masked_otherwise) for edit in edits]


def test_a_model_that_changed_is_refused_until_compiled_anew() -> None:
    model = fresh_model("short")
    compiled = torch.compile(model, backend="helix", fullgraph=True, options={"cp": 4, "max_seq_len": 64})
    with torch.no_grad():
        compiled(IDS)
        model.model.layers[0].self_attn.kv_b_proj.weight.mul_(1.5)
        with pytest.raises(RuntimeFault, match=r"1 weights changed.*layers\.0\.self_attn\.kv_b"):
            compiled(IDS)
        mlp = model.model.layers[0].mlp
        before = mlp.act_fn
        mlp.act_fn = nn.GELU().eval()  # Dynamo guards on it and comes with another graph
        with pytest.raises(RuntimeFault, match="a constant, a hook"):
            compiled(IDS)
        mlp.act_fn = before
        torch._dynamo.reset()
        expected = model(IDS).logits
        assert (compiled(IDS).logits - expected).abs().max() <= 1e-10 * expected.abs().max()


@pytest.mark.parametrize(
    "where", [pytest.param("", marks=pytest.mark.slow), "model.layers.1.self_attn.o_proj"], ids=["model", "inside"]
)
def test_a_hook_that_comes_later_is_refused(where: str) -> None:
    model = fresh_gqa()
    compiled = torch.compile(model, backend="helix", options={"cp": 4, "max_seq_len": 64})
    with torch.no_grad():
        expected = model(IDS).logits
        compiled(IDS)
        hook = model.get_submodule(where).register_forward_pre_hook(lambda *args: None)
        with pytest.raises(RuntimeFault, match=rf"{where or 'the model'} has 1 forward hooks, and 0"):
            compiled(IDS)
        hook.remove()
        assert (compiled(IDS).logits - expected).abs().max() <= 1e-10 * expected.abs().max()


class Factor:
    """An object with a number that a layer reads."""

    value = 1.0


@pytest.mark.parametrize("where", ["module", "object"])
def test_a_number_that_was_changed_is_refused(where: str) -> None:
    """Dynamo makes a float that changed an input of its next graph; what no module holds shows in what the forward computes."""
    model, factor = fresh_gqa(num_hidden_layers=1), Factor()
    norm = model.model.layers[0].input_layernorm
    if where == "object":
        model.model.layers[0].mlp.act_fn = ReadsFactor(factor).eval()
    compiled = torch.compile(model, backend="helix", options={"cp": 4, "max_seq_len": 64})
    with torch.no_grad():
        compiled(IDS)
        norm.variance_epsilon, factor.value = (0.1, 1.0) if where == "module" else (norm.variance_epsilon, 1.5)
        with pytest.raises(RuntimeFault, match="was changed since it was compiled"):
            compiled(IDS)


class ReadsFactor(nn.Module):
    """An activation with a number of an object."""

    def __init__(self, factor: Factor):
        super().__init__()
        self.factor = factor

    def forward(self, x: Any) -> Any:
        return nn.functional.silu(x) * self.factor.value


@pytest.mark.slow
def test_a_hook_that_goes_is_refused() -> None:
    model = fresh_gqa()
    hook = model.model.layers[0].register_forward_hook(lambda module, args, out: out * 1.5)
    compiled = torch.compile(model, backend="helix", options={"cp": 4, "max_seq_len": 64})
    with torch.no_grad():
        expected = model(IDS).logits
        assert (compiled(IDS).logits - expected).abs().max() <= 1e-10 * expected.abs().max()
        hook.remove()
        with pytest.raises(RuntimeFault, match="hook"):
            compiled(IDS)
