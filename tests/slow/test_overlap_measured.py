"""Real gloo processes with slowed links and longer attention: the measured gain of overlap="hopb" is the predicted one within 15 %."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from helix_compile import helix_compile
from tests.distributed.steps import OVERLAP, OVERLAP_BATCH, SLOWED, torchrun
from tests.support.models import fresh_model

pytestmark = [pytest.mark.slow, pytest.mark.multi_process]


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("overlap")
    result = torchrun("overlap_worker.py", str(folder), processes=2)
    assert result.returncode == 0, result.stderr
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


def test_the_measured_gain_is_the_predicted_one(measured: list[dict[str, Any]]) -> None:
    """Of what attention and the link are given to take, and of what every other node took on this machine where nothing was slowed."""
    model = fresh_model("short", torch.float32)
    compiled = {how: helix_compile(model, overlap=how, world="virtual", **OVERLAP) for how in ("none", "hopb")}
    for name, durations in SLOWED.items():
        alone = {how: durations.predicted(module, OVERLAP_BATCH) for how, module in compiled.items()}
        assert (alone["none"] > alone["hopb"]) == (name != "latency alone")
        for seen in measured:
            steps = seen["steps"][name]
            predicted = {
                how: durations.predicted(module, OVERLAP_BATCH, seen["real"][how]) for how, module in compiled.items()
            }
            said = (name, steps, predicted, alone)
            assert steps["none"] - steps["hopb"] == pytest.approx(predicted["none"] - predicted["hopb"], rel=0.15), said
            assert steps["none"] / steps["hopb"] == pytest.approx(predicted["none"] / predicted["hopb"], rel=0.05), said
