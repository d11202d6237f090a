"""mla_decode over a cache in FP8: every form against the reference, which is exact (tests/whole/test_fp8_cache.py)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from helix_compile.kernels.mla.tuning import POINTER, ROWS, TRANSPOSED, MlaConfig
from helix_compile.kernels.reference import mla_decode_reference
from helix_compile.kernels.reference_fp8 import pack_ds_mla, quantize
from helix_compile.kernels.reference_sparse import mla_decode_slots_reference
from tests.support.mla import MlaInputs, mismatch, mla_inputs, run_form

helix_triton = torch.ops.helix_triton
FORMS = [
    MlaConfig(ROWS, 16, 16, 4, 2),
    MlaConfig(ROWS, 64, 16, 4, 2, parts=2),
    MlaConfig(TRANSPOSED, 16, 16, 4, 2),
    MlaConfig(POINTER, 16, 16, 4, 2),
]
SCALE = torch.tensor(0.013)


@pytest.fixture(autouse=True, scope="module")
def nan_memory() -> Iterator[None]:
    """What torch.empty returns is NaN: outputs and workspaces that a kernel leaves unwritten show."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def in_e4m3(inputs: MlaInputs) -> MlaInputs:
    """The inputs with a cache of SCALE; pages that were NaN keep it, what was stale is 448."""
    return replace(inputs, cache=quantize(inputs.cache, SCALE))


def in_ds_mla(inputs: MlaInputs, beside: int = 0) -> MlaInputs:
    """The inputs with rows of fp8_ds_mla; `beside`: bytes of wider rows that are no part of it, NaN to who reads them."""
    R, pages = inputs.q_latent.shape[3], inputs.cache.shape[:2]
    rows = pack_ds_mla(*inputs.cache.flatten(0, 1).split([R, inputs.cache.shape[2] - R], dim=1))
    wide = torch.nn.functional.pad(rows, (0, beside), value=255)
    return replace(inputs, cache=wide.view(*pages, -1)[..., : rows.shape[1]])


@pytest.mark.parametrize("config", FORMS, ids=str)
def test_each_form_agrees_with_reference(config: MlaConfig) -> None:
    inputs = in_e4m3(mla_inputs([40, 0, 1, 17], T=2, H=20))
    wanted = mla_decode_reference(*inputs.args, cache_scale=SCALE)
    for splits in (1, 4):
        assert mismatch(run_form(config, inputs, splits, SCALE), wanted) is None
    other = mla_decode_reference(*inputs.args, cache_scale=SCALE * 1.01)
    assert mismatch(run_form(config, inputs, 1, SCALE), other) is not None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("R", "r", "beside"), [(32, 16, 0), (20, 6, 12), (150, 6, 0), (512, 64, 256)])
def test_ds_mla_by_pointers(R: int, r: int, beside: int, dtype: torch.dtype) -> None:
    """A last block of 22 values of 150; rows that are a part of wider ones."""
    raw = mla_inputs([33, 0, 9], T=2, H=5, R=R, r=r, page_size=10)
    inputs = in_ds_mla(raw, beside)
    inputs = replace(inputs, q_latent=inputs.q_latent.to(dtype), q_rope=inputs.q_rope.to(dtype))
    first = (inputs.visible - 7).clamp(min=0)
    for window in (None, first):
        got = helix_triton.mla_decode(*inputs.args, first=window)
        wanted = mla_decode_reference(inputs.q_latent.double(), inputs.q_rope.double(), *inputs.args[2:], first=window)
        if dtype is torch.float32:
            assert mismatch(got, wanted, R + r) is None
        else:
            torch.testing.assert_close(got[0].double(), wanted[0], rtol=0, atol=0.02 * float(wanted[0].abs().max()))


@pytest.mark.parametrize(("R", "r", "page_size"), [(32, 16, 16), (24, 8, 10)])
@pytest.mark.parametrize("name", ["e4m3", "ds_mla"])
def test_chosen_slots(name: str, R: int, r: int, page_size: int) -> None:
    raw = mla_inputs([33, 9], T=2, H=5, R=R, r=r, page_size=page_size)
    inputs, keywords = (in_e4m3(raw), {"cache_scale": SCALE}) if name == "e4m3" else (in_ds_mla(raw), {})
    slots = torch.arange(33, dtype=torch.int32).expand(2, 2, 33)[..., ::3].contiguous()
    count = (inputs.visible / 3).ceil().int()
    args = (*inputs.args[:5], slots, count, inputs.scale)
    got = helix_triton.mla_decode_slots(*args, **keywords)
    assert mismatch(got, mla_decode_slots_reference(*args, **keywords)) is None


def test_the_splits_of_a_rank() -> None:
    inputs = in_e4m3(mla_inputs([40, 17], T=1, H=5))
    o, lse = helix_triton.mla_decode.splits(*inputs.args, 2, cache_scale=SCALE)
    merged = torch.ops.helix.merge_lse(o.movedim(3, 0), lse.movedim(3, 0))
    wanted = mla_decode_reference(*inputs.args, cache_scale=SCALE)
    assert mismatch((merged, torch.logsumexp(lse, dim=3)), wanted) is None


def test_fake_says_what_the_kernel_returns() -> None:
    inputs: MlaInputs = in_e4m3(mla_inputs([3, 20], T=2, H=5))
    scale: Tensor = SCALE.clone()
    torch.library.opcheck(
        helix_triton.mla_decode.default,
        inputs.args,
        {"cache_scale": scale},
        test_utils="test_faketensor",  # the schema check would multiply FP8 values
    )
