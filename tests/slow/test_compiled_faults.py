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
LOST = r"helix_compile: rank {} lost its peers in step 3 at graph node '{}': {}"
DIED = r"rank 2 died or is stuck without an exception; last sign of life: step 3, \d+\.\ds ago"
RAISED = r"rank 2 raised at step 3: "
DTYPE = r"RuntimeFault: rank 2, node layer_\d\.segment_\d: param self_attn\.o_proj\.weight is torch\.float64 .*compiled for torch\.float32"
SHAPE = r"RuntimeFault: ranks disagree in step 3: rank 2 has input_ids \[2, 2\]"
# what a fault says on the rank itself (None: nothing), and what the others say of it, where
CASES: dict[str, tuple[str | None, str, str]] = {
    "inside-kill": (None, NODE, DIED),
    "inside-hang": (None, NODE, DIED),
    "inside-exception": ("weights of layer 7 are NaN", NODE, RAISED + ".*ValueError: weights of layer 7 are NaN"),
    "dtype": (DTYPE, ".*", RAISED + DTYPE),
    "shape": (SHAPE, ".*", RAISED + SHAPE),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A module that has compiled its segments, so that the ranks read their code from disk."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("compiled") / "saved"
    helix_compile(fresh_model("short", torch.float32), world="virtual", lower="inductor", **MIXED).save(folder)
    return folder


@pytest.mark.parametrize("kind", CASES)
def test_every_survivor_names_the_rank(saved: Path, kind: str) -> None:
    own, node, cause = CASES[kind]
    result = torchrun("compiled_fault_worker.py", str(saved), kind, HELIX_TIMEOUT="20", seconds=300)
    assert result.returncode != 0 and "done" not in result.stdout
    assert own is None or re.search(own, result.stderr), result.stderr
    for rank in (0, 1, 3):
        assert re.search(LOST.format(rank, node, cause), result.stderr), result.stderr


def test_other_ids_are_told_to_all_when_the_next_step_begins(saved: Path) -> None:
    result = torchrun("compiled_fault_worker.py", str(saved), "ids", HELIX_TIMEOUT="20", seconds=300)
    assert result.returncode != 0 and "done" not in result.stdout
    assert result.stderr.count("RuntimeFault: ranks disagree in step 3: rank 2 has input_ids ") == 4, result.stderr
