"""Replicated parameters are shared and shards are views: four virtual ranks cost little more than the model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "memory.py"


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc")
def test_four_ranks_hold_the_weights_once() -> None:
    """In a process of its own: a high-water mark that another test raised would hide everything."""
    run = subprocess.run(
        [sys.executable, str(BENCHMARK), "--cp", "4", "--json"],
        capture_output=True,
        text=True,
        check=True,
    )
    measured = json.loads(run.stdout.splitlines()[-1])
    assert measured["weights"] >= 500e6
    assert measured["deviation"] <= 1e-5
    assert measured["extra"] <= 1.25 * measured["weights"]
