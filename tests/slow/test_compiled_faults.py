"""Faults of one rank while all run a whole model in compiled segments: every survivor says who, when and where, as node by node."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from helix_compile import helix_compile
from tests.distributed.steps import MIXED, torchrun
from tests.support.models import fresh_model

pytestmark = [pytest.mark.slow, pytest.mark.multi_process]
NODE = r"layer_2\.wait_tensor_1"  # the sum behind the segment in which rank 2 stops
DIED = r"rank 2 died or is stuck without an exception; last sign of life: step 3, \d+\.\ds ago"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A module that has compiled its segments, so that the ranks read their code from disk."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("compiled") / "saved"
    helix_compile(fresh_model("short", torch.float32), world="virtual", lower="inductor", **MIXED).save(folder)
    return folder


def test_every_survivor_names_the_rank_that_was_killed(saved: Path) -> None:
    result = torchrun("compiled_fault_worker.py", str(saved), "inside-kill", HELIX_TIMEOUT="20", seconds=300)
    assert result.returncode != 0 and "done" not in result.stdout
    for rank in (0, 1, 3):
        text = rf"helix_compile: rank {rank} lost its peers in step 3 at graph node '{NODE}': {DIED}"
        assert re.search(text, result.stderr), result.stderr
