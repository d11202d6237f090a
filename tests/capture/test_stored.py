"""What a layer leaves for later ones in a mapping that all are handed: recorded, put back, and told by its sizes."""

from __future__ import annotations

from collections import UserDict
from typing import Any

import torch
from torch import Tensor, nn

from helix_compile.capture.returned import returned_by
from helix_compile.ir.leaves import Returned, Size, Stored, TensorLike, record_call


class Shared(UserDict):
    """As transformers' KVSharingDict: no dict, so that nobody takes it apart."""


HIDDEN, K, V = torch.zeros(2, 3, 4), torch.ones(2, 1, 8, 4), torch.full((2, 1, 8, 4), 2.0)
LIKE = TensorLike((Size("B"), Size("", 1), Size("ST"), Size("", 4)), torch.float32)


def test_what_is_in_a_mapping_is_handed_to_the_layer() -> None:
    call = record_call((HIDDEN,), {"shared": Shared({"full": (K, V), "alone": K}), "mask": V})
    assert call.shares and call.names == ["shared_full_0", "shared_full_1", "shared_alone_0", "mask"]
    _, kwargs = call.rebuild(HIDDEN, [K + 1, V + 1, K, V], None)
    assert isinstance(kwargs["shared"], Shared) and kwargs["shared"]["alone"] is K
    assert torch.equal(kwargs["shared"]["full"][1], V + 1) and kwargs["mask"] is V


def test_layers_are_apart_by_what_they_read_of_it_alone() -> None:
    texts = {record_call((HIDDEN,), {"shared": Shared(x)}).constants() for x in ({}, {"full": (K, V)})}
    assert len(texts) == 1


def test_what_a_layer_leaves_is_one_of_its_results() -> None:
    form = Returned(stored=(Stored(1, "full", 0, LIKE), Stored(1, "full", 1, LIKE), Stored(1, "alone", -1, LIKE)))
    call = record_call((HIDDEN,), {"shared": Shared()}, form)
    args, kwargs = call.rebuild(HIDDEN, [], None)
    assert call.as_returned([HIDDEN, K, V, V], args, kwargs) is HIDDEN
    assert call.results(HIDDEN, args, kwargs) == [HIDDEN, K, V, V]
    assert kwargs["shared"]["full"] == (K, V) and kwargs["shared"]["alone"] is V


def test_streams_in_front_lie_behind_tokens_where_they_are_captured() -> None:
    streams = torch.arange(4 * 2 * 3 * 5.0).view(4, 2, 3, 5)
    call = record_call((streams,), {}, Returned(streams_first=True))
    assert call.hidden.shape == (2, 3, 4, 5)
    args, kwargs = call.rebuild(call.hidden, [], None)
    assert torch.equal(args[0], streams)
    assert torch.equal(call.results(streams, args, kwargs)[0], call.hidden)
    assert torch.equal(call.as_returned([call.hidden], args, kwargs), streams)


class Layer(nn.Module):
    """4 heads, a top-4 and as many channels as some runs have tokens: numbers that sizes may be mistaken for."""

    def __init__(self, stores: bool):
        super().__init__()
        self.stores = stores

    def forward(self, hidden: Tensor, past: Tensor, shared: Shared) -> Any:
        B, T = hidden.shape[:2]
        total = past.shape[1] + T
        if self.stores:
            shared["kv"] = hidden.new_zeros(B, 4, total, 5), hidden.new_zeros(B, 4, total, 16)
        return hidden, hidden.new_zeros(B, T, min(total, 4))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Layer(False), Layer(True), Layer(False)])
        self.weight = nn.Parameter(torch.zeros(1))

    def run(self, device: torch.device, B: int, T: int, S: int) -> None:
        hidden, past, shared = torch.zeros(B, T, 13, device=device), torch.zeros(B, S, device=device), Shared()
        for layer in self.layers:
            hidden, _ = layer(hidden, past, shared)


def test_sizes_are_told_from_numbers() -> None:
    model = Model()
    first, second, third = returned_by(model, model.layers, model.run)
    assert first == third and not first.stored and second.is_tuple
    (chosen,) = first.others
    assert chosen is not None and chosen.sizes == (Size("B"), Size("T"), Size("ST", 4))
    assert [(x.leaf, x.key, x.place) for x in second.stored] == [(2, "kv", 0), (2, "kv", 1)]
    assert second.stored[0].like.sizes == (Size("B"), Size("", 4), Size("ST"), Size("", 5))
    assert second.stored[1].like.sizes == (Size("B"), Size("", 4), Size("ST"), Size("", 16))
