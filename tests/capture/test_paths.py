"""A layer that asks for a size of 0 or 1 is run there too: torch.export answers such a question once, for good."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers.models.llama.modeling_llama as modeling_llama
from torch import Tensor, nn
from transformers import DynamicCache

from helix_compile import CaptureError, helix_compile, verify
from helix_compile.capture import model as model_capture
from helix_compile.capture import trial
from helix_compile.capture.model import capture
from tests.support.driver import worst_deviation
from tests.support.gqa_models import fresh_gqa
from tests.support.models import fresh_model

Change = Callable[[Tensor, Any], Tensor]  # what the attention gives, its cache -> what the layer uses


def branching(change: Change, dtype: torch.dtype = torch.float64) -> Any:
    """The short model; the attention of its first layer is changed behind o_proj."""
    model = fresh_model("short", dtype)
    attention = model.model.layers[0].self_attn
    inner = attention.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        length = next(x for x in kwargs.values() if isinstance(x, DynamicCache)).get_seq_length(0)  # of any name
        out, weights = inner(*args, **kwargs)
        return change(out, length), weights

    attention.forward = forward
    return model


def one_token(out: Tensor, length: Any) -> Tensor:
    return out * 0.5 if out.shape[1] == 1 else out


def empty_cache(out: Tensor, length: Any) -> Tensor:
    return out * 0.5 if length == 0 else out


def one_sequence(out: Tensor, length: Any) -> Tensor:
    return out * 0.5 if out.shape[0] == 1 else out


def other_constant(out: Tensor, length: Any) -> Tensor:
    return out * (0.9 if out.shape[1] == 1 else 1.1)


def other_op(out: Tensor, length: Any) -> Tensor:
    return torch.tanh(out) if out.shape[1] == 1 else torch.sin(out)


@pytest.mark.parametrize(
    ("change", "where"),
    [
        (one_token, "B=2, T=1, S=5"),
        (empty_cache, "B=2, T=3, S=0"),
        pytest.param(one_sequence, "B=1, T=3, S=5", marks=pytest.mark.slow),
        (other_constant, "B=2, T=1, S=5"),
        pytest.param(other_op, "B=2, T=1, S=5", marks=pytest.mark.slow),
    ],
)
def test_another_path_is_refused_with_its_place(change: Change, where: str) -> None:
    model = branching(change)
    with pytest.raises(CaptureError) as caught:
        capture(model)
    line = change.__code__.co_firstlineno + 1
    assert f"takes another path at {where} than at B=2, T=3, S=5" in str(caught.value)
    assert f"test_paths.py:{line} (`torch." in str(caught.value)


@pytest.mark.parametrize("dtype", [pytest.param(torch.float32, marks=pytest.mark.slow), torch.bfloat16])
def test_rounding_does_not_hide_it(dtype: torch.dtype) -> None:
    with pytest.raises(CaptureError, match="takes another path at B=2, T=1"):
        capture(branching(one_token, dtype))


def packed(out: Tensor, length: Any) -> Tensor:
    """Other calls, the same values: as a fast path for decoding may be."""
    return (out.squeeze(1) + 0.0).unsqueeze(1) if out.shape[1] == 1 else out


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_another_way_to_the_same_values_is_accepted(dtype: torch.dtype) -> None:
    model = branching(packed, dtype)
    assert capture(model).bodies
    if dtype is torch.float64:
        compiled = helix_compile(model, cp=2, max_seq_len=64, max_batch_size=3, tokens_per_block=2)
        assert worst_deviation(model, compiled, [6, 1, 9]) <= 1e-10


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda out, length: out * 0.5 if out.shape[1] > 16 else out, "2 <= T and T <= 16"),
        (lambda out, length: out * 0.5 if length > 20 else out, "2 <= S and S <= 20"),
    ],
)
def test_a_branch_on_a_size_is_told_as_one(change: Change, said: str) -> None:
    with pytest.raises(CaptureError) as caught:
        capture(branching(change))
    assert f"({said}: the forward branches on a size, or computes with it as a number" in str(caught.value)


@pytest.mark.parametrize(
    ("change", "where"),
    [
        (lambda out, length: out * 0.5 if out.shape[:2] == (1, 1) else out, "B=1, T=1, S=5"),
        (lambda out, length: out * 0.5 if out.shape[1] == 1 and length == 0 else out, "B=2, T=1, S=0"),
    ],
)
def test_a_branch_on_two_sizes_together_is_refused(change: Change, where: str) -> None:
    with pytest.raises(CaptureError, match=f"takes another path at {where}"):
        capture(branching(change))


@pytest.mark.parametrize(
    "change",
    [
        lambda out, length: out * (3 if out.shape[1] == 1 else 2),
        lambda out, length: out - length if out.shape[1] == 1 else length - out,
        lambda out, length: out.roll(1 if out.shape[1] == 1 else 2, -1),
        lambda out, length: out * torch.tensor([3.0 if out.shape[1] == 1 else 2.0]).double(),
    ],
    ids=["an int", "the order", "an argument", "a constant"],
)
def test_numbers_and_order_are_part_of_a_path(change: Change) -> None:
    with pytest.raises(CaptureError, match=r"takes another path at B=2, T=1|made from a size|holds for some sizes"):
        capture(branching(change))


@pytest.mark.parametrize(
    "change",
    [
        lambda out, length: out * 0.5 if out.shape[0] * out.shape[1] > 30 else out,
        lambda out, length: out * 0.5 if out.shape[1] >= 4 * out.shape[0] else out,
    ],
    ids=["B * T", "T against B"],
)
def test_a_threshold_of_several_sizes_is_refused(change: Change) -> None:
    with pytest.raises(CaptureError, match="takes another path at B=1, T=67, S=0"):
        capture(branching(change))


@pytest.fixture
def scaled_mlp(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[Any, Tensor], float]], None]:
    """Every LlamaMLP multiplies its result by what a function of itself and its input says."""

    def patch(factor: Callable[[Any, Tensor], float]) -> None:
        forward = modeling_llama.LlamaMLP.forward
        monkeypatch.setattr(
            modeling_llama.LlamaMLP,
            "forward",
            lambda self, x: forward(self, x) * (f if (f := factor(self, x)) else 1.0),
        )

    return patch


@pytest.mark.fresh_capture
@pytest.mark.parametrize("source", ["folder", "meta", "large"])
def test_a_path_is_compared_on_small_random_weights_where_there_are_none(
    source: str, scaled_mlp: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model: Any = fresh_gqa("llama", num_hidden_layers=1, dtype=torch.float32)
    if source == "folder":
        model.save_pretrained(tmp_path)
        model = tmp_path
    elif source == "meta":
        model = model.to("meta")
    else:
        monkeypatch.setattr(trial, "COMPARED_BYTES", 0)
    scaled_mlp(lambda self, x: 50.0 if x.shape[1] == 1 else 0.0)
    with pytest.raises(CaptureError, match=r"LlamaDecoderLayer takes another path at B=2, T=1, S=5"):
        helix_compile(model, cp=2, max_seq_len=64)


@pytest.mark.fresh_capture
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_random_weights_find_no_difference_where_there_is_none(
    dtype: torch.dtype, scaled_mlp: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trial, "COMPARED_BYTES", 0)
    scaled_mlp(lambda self, x: 1.0 + 1e-9 if x.shape[1] == 1 else 0.0)
    assert not capture(fresh_gqa("llama", num_hidden_layers=1, dtype=dtype)).notes


@pytest.mark.fresh_capture
@pytest.mark.parametrize("alone", [0, 1, 2])
def test_one_layer_of_several_that_branches_is_seen(alone: int, scaled_mlp: Any) -> None:
    """The layers are one function at every other size, and would share a body."""
    model = fresh_gqa("llama", num_hidden_layers=3)
    for number, layer in enumerate(model.model.layers):
        layer.mlp.number = number
    scaled_mlp(lambda self, x: 50.0 if x.shape[1] == 1 and self.number == alone else 0.0)
    with pytest.raises(CaptureError, match=r"takes another path at B=2, T=1, S=5"):
        capture(model)


@pytest.mark.parametrize("meta", [False, True])
@pytest.mark.parametrize("place", ["model.norm", "model.embed_tokens", "lm_head"])
def test_the_graph_around_the_layers_is_compared_too(place: str, meta: bool) -> None:
    class Branching(nn.Module):
        def __init__(self, inner: nn.Module):
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            out = self.inner(x)
            return out * 2.0 if x.shape[1] == 1 else out

        def __getattr__(self, name: str) -> Any:
            return super().__getattr__(name) if name == "inner" else getattr(self.inner, name)

    model = fresh_gqa("llama", num_hidden_layers=1)
    parent, _, name = place.rpartition(".")
    setattr(model.get_submodule(parent), name, Branching(model.get_submodule(place)).eval())
    with pytest.raises(CaptureError, match=r"LlamaForCausalLM, around its layers, takes another path at B=2, T=1, S=5"):
        capture(model.to("meta") if meta else model)


def test_a_path_that_can_not_be_tried_is_a_note_and_a_finding() -> None:
    def failing(out: Tensor, length: Any) -> Tensor:
        if out.shape[1] == 1 and type(out) is Tensor and out.device.type != "meta":
            raise ArithmeticError("not on random numbers")
        return out.neg().neg() if out.shape[1] == 1 else out

    model = branching(failing)
    compiled = helix_compile(model, cp=2, max_seq_len=64, tokens_per_block=4)
    (note,) = [n for n in compiled.plan.notes if "another path at B=2, T=1, S=5" in n]
    assert note.startswith("not compared: DeepseekV3DecoderLayer") and "ArithmeticError: not on random numbers" in note
    assert "HX504" in {f.code for f in verify(compiled, model).findings}


@pytest.mark.parametrize("where", ["in the part", "beside it"])
def test_a_layer_with_a_part_that_no_graph_holds_is_compared_by_numbers(where: str) -> None:
    class OnData(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            factor = 2.0 if where == "in the part" and x.shape[1] == 1 else 1.0
            return x * factor if bool(x.abs().sum() >= 0) else x

    class Around(nn.Module):
        def __init__(self, inner: nn.Module):
            super().__init__()
            self.inner, self.part = inner, OnData()

        def forward(self, x: Tensor) -> Tensor:
            out = self.part(self.inner(x))
            return out * 50.0 if where == "beside it" and x.shape[1] == 1 else out

    model = fresh_gqa("llama", num_hidden_layers=1)
    model.model.layers[0].mlp = Around(model.model.layers[0].mlp).eval()
    if where == "in the part":  # the user's own module runs there, and branches as it likes
        assert capture(model).leaves and not capture(model).notes
    else:
        with pytest.raises(CaptureError, match=r"takes another path at B=2, T=1, S=5.*OnData, which branches on data"):
            capture(model)


@pytest.mark.parametrize(
    "differs",
    [lambda x: False, lambda x: x.shape[1] == 1, lambda x: x.shape[0] > 30],
    ids=["in nothing", "for one token", "for many sequences"],
)
def test_layers_share_what_is_around_their_own_parts(
    differs: Callable[[Tensor], bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    class OnData(nn.Module):
        def __init__(self, factor: float):
            super().__init__()
            self.factor = factor

        def forward(self, x: Tensor) -> Tensor:
            return x * self.factor if bool(x.abs().sum() >= 0) else x

    class Around(nn.Module):
        def __init__(self, inner: nn.Module, number: int):
            super().__init__()
            self.inner, self.part, self.number = inner, OnData(1.0 + number), number

        def forward(self, x: Tensor) -> Tensor:
            out = self.part(self.inner(x))
            return out * 50.0 if self.number and differs(x) else out

    model = fresh_gqa("llama", num_hidden_layers=2)
    for number, layer in enumerate(model.model.layers):
        layer.mlp = Around(layer.mlp, number).eval()
    exported: list[Any] = []
    once = model_capture.capture_body
    monkeypatch.setattr(
        model_capture, "capture_body", lambda layer, *given: (exported.append(layer), once(layer, *given))[1]
    )
    try:
        compiled = helix_compile(model, cp=2, max_seq_len=64, max_batch_size=3, tokens_per_block=2)
    except CaptureError as error:
        assert (differs(torch.zeros(40, 1)) and "takes another path" in str(error)) or "holds for some sizes" in str(
            error
        )
        return
    assert not differs(torch.zeros(40, 1)) and len(exported) == 1
    assert worst_deviation(model, compiled, [6, 1, 9]) <= 1e-10
