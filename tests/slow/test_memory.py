"""Peak memory: four virtual ranks cost little more than the model, and a long prompt little more than its cache."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def measured_by(script: str, *options: str) -> dict[str, float]:
    """In a process of its own: a high-water mark that another test raised would hide everything."""
    run = subprocess.run(
        [sys.executable, str(BENCHMARKS / script), "--cp", "4", "--json", *options],
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(run.stdout.splitlines()[-1])


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc")
def test_four_ranks_hold_the_weights_once() -> None:
    measured = measured_by("memory.py")
    assert measured["weights"] >= 500e6
    assert measured["deviation"] <= 1e-5
    assert measured["extra"] <= 1.25 * measured["weights"]


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc")
def test_a_prompt_of_64k_tokens_is_bounded() -> None:
    """The end of a 64K prompt, where context is longest: 173 MB; chunks of 512 take 314 MB, unbounded scores too 1,216 MB."""
    measured = measured_by("prefill_memory.py", "--tokens", "65536", "--resident", "65024")
    assert measured["chunk"] == 64
    assert measured["extra"] <= 256 * 2**20
