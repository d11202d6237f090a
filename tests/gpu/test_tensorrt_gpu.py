"""lower="tensorrt" on a card with torch_tensorrt: engines that TensorRT builds are their pieces. Never run yet."""

from __future__ import annotations

import pytest
import torch

from helix_compile import LoweringUnavailable, helix_compile, verify
from helix_compile.runtime.tensorrt import load_torch_tensorrt
from tests.support.driver import worst_deviation
from tests.support.models import fresh_model

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.fixture(autouse=True)
def there_is_torch_tensorrt() -> None:
    try:
        load_torch_tensorrt()
    except LoweringUnavailable as error:
        pytest.skip(str(error))


def test_engines_are_their_pieces_and_the_step_is_the_model() -> None:
    """float32 without TF32: ragged prompt and steps; then each call of an engine against its piece, by verify."""
    model = fresh_model("short", torch.float32).cuda()
    compiled = helix_compile(model, cp=2, lower="tensorrt", max_batch_size=4, max_seq_len=64)
    with torch.device("cuda"):
        assert worst_deviation(model, compiled, [5, 2, 7]) <= 1e-4
    report = verify(compiled, model)
    assert report.ok, str(report)


def test_bfloat16() -> None:
    model = fresh_model("short", torch.bfloat16).cuda()
    compiled = helix_compile(model, cp=2, lower="tensorrt", max_batch_size=4, max_seq_len=64)
    report = verify(compiled, model)
    assert report.ok, str(report)
