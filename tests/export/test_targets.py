"""What inspect says of where a plan can go: what each target says itself when it is asked for."""

from __future__ import annotations

import sys
from typing import Any

import pytest

from helix_compile import HelixModule, helix_compile
from helix_compile.errors import ExportError
from helix_compile.export.formats import FORMATS
from helix_compile.export.targets import targets_of
from tests.export.test_onnx_ranks import compiled_tiny
from tests.support.gqa_models import fresh_gqa
from tests.whole.test_windows import windowed


@pytest.fixture(autouse=True)
def no_torch_tensorrt(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine without it."""
    monkeypatch.setitem(sys.modules, "torch_tensorrt", None)


def stops(compiled: HelixModule) -> dict[str, str]:
    return {target.name: target.stops for target in targets_of(compiled)}


def test_a_plan_on_a_cpu() -> None:
    """Every lowering and every format once; the report and its JSON say the same."""
    compiled = compiled_tiny()
    found = stops(compiled)
    assert list(found) == ["reference", "inductor", "triton", "cpp", "tensorrt", *FORMATS]
    free = {name for name, why in found.items() if not why}
    assert free >= {"reference", "inductor", "cpp", *FORMATS} and "tensorrt" not in free
    assert "torch_tensorrt, which is not installed" in found["tensorrt"]
    inspection = compiled.inspect()
    assert {t["name"]: t["stops"] for t in inspection.facts["targets"]} == found
    assert "can go to: reference, inductor" in str(inspection) and "not to tensorrt" in str(inspection)


def test_what_the_plan_itself_stops() -> None:
    """Grouped-query attention has no C++, float64 no engine, a cache in FP8 no ONNX: each as the target itself refuses."""
    gqa = helix_compile(fresh_gqa("qwen3"), cp=2, lower="reference", max_batch_size=2, max_seq_len=64)
    found = stops(gqa)
    assert found["cpp"].startswith("lower='cpp' has no C++ for any op of this plan: cache_append, gqa_decode")
    assert found["tensorrt"] == "lower='tensorrt': engines know no float64" and not found["onnx"]
    fp8: Any = compiled_tiny(cache_dtype="fp8_e4m3")
    with pytest.raises(ExportError, match=r"caches in FP8 \(cache_dtype='fp8_e4m3'\) are not exported") as refused:
        fp8.export("never-written")
    assert stops(fp8)["onnx"] == str(refused.value)


def test_rings_are_refused_by_name() -> None:
    """window="replicate": what a step is given for it is no input of a rank's model."""
    model = windowed("gemma3", 7)
    compiled = helix_compile(model, cp=4, tokens_per_block=3, max_batch_size=3, max_seq_len=600, window="replicate")
    assert stops(compiled)["onnx"].startswith("format=onnx: window='replicate' keeps the last tokens in rings")
    assert not stops(compiled)["pt2"]
