"""Attention to a part of a batch: the bits of the whole one, since kernels choose by the sequences of all."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import helix_compile.kernels.catalog  # noqa: F401  registers helix_triton
from helix_compile.ir.ops import helix
from helix_compile.kernels.reference_parts import place_rows_reference, rows_of_part_reference
from helix_compile.kernels.target import INTERPRETER, KernelTarget
from tests.support.gqa import GqaStep
from tests.support.mla import mla_inputs

FEW = KernelTarget(INTERPRETER, 8)  # 4 sequences of a row each are split in 2, 2 of them in 4


def _latents() -> tuple[tuple[Any, ...], list[int]]:
    return mla_inputs([200, 3, 150, 90]).args, [0, 1, 3, 4]


def _grouped() -> tuple[tuple[Any, ...], list[int]]:
    return GqaStep((200, 3, 150, 90), K=1).arguments(), [0, 3, 4]


def _slots() -> tuple[tuple[Any, ...], list[int]]:
    *row, scale = mla_inputs([200, 200, 150, 90]).args
    slots = torch.arange(90, dtype=torch.int32).expand(4, 1, 90).contiguous()
    count = torch.full((4, 1), 90, dtype=torch.int32)
    return (*row, slots, count, scale), [0, 1, 3, 4, 5, 6]


CASES = {"mla_decode": _latents, "gqa_decode": _grouped, "mla_decode_slots": _slots}
MODULES = {"mla_decode": "mla", "gqa_decode": "gqa", "mla_decode_slots": "sparse"}


@pytest.mark.parametrize("op", CASES)
def test_splits_are_those_of_the_whole_batch(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In parts of 1 and 3 sequences; a kernel that does not know of the others splits otherwise, and rounds otherwise."""
    monkeypatch.setattr(f"helix_compile.kernels.{MODULES[op]}.decode.device_target", lambda device: FEW)
    arguments, of_rows = CASES[op]()
    call = getattr(torch.ops.helix_triton, op).default

    def parts(**more: Any) -> list[Tensor]:
        found = []
        for rows in (slice(0, 1), slice(1, 1), slice(1, 4)):
            own = [a[rows] if place in of_rows else a for place, a in enumerate(arguments)]
            found.append(call(*own, **more))
        return [torch.cat(items) for items in zip(*found, strict=True)]

    whole = call(*arguments)
    assert all(map(torch.equal, parts(batch=arguments[0]), whole))
    assert not all(map(torch.equal, parts(), whole))
    reference = getattr(helix, op)(*arguments)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(whole, reference, strict=True))


@pytest.mark.parametrize("B", [0, 1, 2, 5, 7])
@pytest.mark.parametrize("parts", [1, 2, 3])
def test_every_row_is_of_one_part(B: int, parts: int) -> None:
    x = torch.arange(B * 2.0).view(B, 2) + 1
    rows = [rows_of_part_reference(x, part, parts) for part in range(parts)]
    assert torch.equal(torch.cat(rows), x) and max(map(len, rows)) - min(map(len, rows)) <= 1
    placed = [place_rows_reference(own, x, part, parts) for part, own in enumerate(rows)]
    assert torch.equal(sum(placed, torch.zeros(B, 2)), x)
    for part, own in enumerate(rows):
        taken = helix.rows_of_part(x, part, parts)
        assert torch.equal(taken, own) and (
            not len(own) or taken.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()
        )
        assert torch.equal(rows_of_part_reference(helix.place_rows(own, x, part, parts), part, parts), own)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_a_part_without_a_sequence_is_packed_and_read(dtype: torch.dtype) -> None:
    o, lse = torch.zeros(0, 1, 4, 6, dtype=dtype), torch.zeros(0, 1, 4, dtype=torch.promote_types(dtype, torch.float32))
    buffer = helix.pack_heads(o, lse, 2)
    assert buffer.shape == (2, 0)
    parts, lse_P = helix.unpack_heads(buffer, o, lse)
    assert (parts.shape, lse_P.shape, parts.dtype, lse_P.dtype) == ((2, 0, 1, 2, 6), (2, 0, 1, 2), dtype, lse.dtype)
    assert helix.merge_lse(parts, lse_P).shape == (0, 1, 2, 6)
