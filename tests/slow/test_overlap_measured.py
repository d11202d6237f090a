"""Real gloo processes with slowed links and longer attention: the measured gain of overlap="hopb" is the predicted one within 15 %."""

from __future__ import annotations

import json

import pytest
import torch

from helix_compile import helix_compile
from tests.distributed.steps import OVERLAP, OVERLAP_BATCH, SLOWED, torchrun
from tests.support.models import fresh_model

pytestmark = [pytest.mark.slow, pytest.mark.multi_process]


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict[str, float]]]:
    folder = tmp_path_factory.mktemp("overlap")
    result = torchrun("overlap_worker.py", str(folder), processes=2)
    assert result.returncode == 0, result.stderr
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


def test_the_measured_gain_is_the_predicted_one(measured: list[dict[str, dict[str, float]]]) -> None:
    model, predicted = fresh_model("short", torch.float32), {}
    for overlap in ("none", "hopb"):
        compiled = helix_compile(model, overlap=overlap, world="virtual", **OVERLAP)
        predicted[overlap] = {name: own.predicted(compiled, OVERLAP_BATCH) for name, own in SLOWED.items()}
    for name in SLOWED:
        expected = predicted["none"][name] - predicted["hopb"][name]
        assert (expected > 0) == (name != "latency alone")
        for seen in measured:
            saved = seen[name]["none"] - seen[name]["hopb"]
            assert saved == pytest.approx(expected, rel=0.15), (name, seen[name], predicted)
            ratio, asked = seen[name]["none"] / seen[name]["hopb"], predicted["none"][name] / predicted["hopb"][name]
            assert ratio == pytest.approx(asked, rel=0.15), name
