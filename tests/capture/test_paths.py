"""A layer that asks for a size of 0 or 1 is run there too: torch.export answers such a question once, for good."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from helix_compile import CaptureError, helix_compile
from helix_compile.capture.model import capture
from tests.support.driver import worst_deviation
from tests.support.models import fresh_model

Change = Callable[[Tensor, Any], Tensor]  # what the attention gives, its cache -> what the layer uses


def branching(change: Change, dtype: torch.dtype = torch.float64) -> Any:
    """The short model; the attention of its first layer is changed behind o_proj."""
    model = fresh_model("short", dtype)
    attention = model.model.layers[0].self_attn
    inner = attention.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        length = kwargs["past_key_values"].get_seq_length(0)
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
