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
RAISED = r"rank 2 raised at step 3: {}"
OTHER_DTYPE = r"RuntimeFault: rank 2, node layer_2\.segment_1: param self_attn\.o_proj\.weight is torch\.float64 \[.*compiled for torch\.float32"
OTHER_SHAPE = r"RuntimeFault: ranks disagree in step 3: rank 2 has input_ids \[2, 2\]"
ANYWHERE = r"layer_0\.wait_tensor(_1)?"  # rank 2 takes no part in the step
CASES = {
    "inside-exception": (RAISED.format(r"ValueError: weights of layer 7 are NaN"), NODE),
    "inside-kill": (DIED, NODE),
    "inside-hang": (DIED, NODE),
    "dtype": (RAISED.format(OTHER_DTYPE), ANYWHERE),
    "shape": (RAISED.format(OTHER_SHAPE), ANYWHERE),
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
    cause, node = CASES[kind]
    result = torchrun("compiled_fault_worker.py", str(saved), kind, HELIX_TIMEOUT="20", seconds=300)
    assert result.returncode != 0 and "done" not in result.stdout
    for rank in (0, 1, 3):
        text = rf"helix_compile: rank {rank} lost its peers in step 3 at graph node '{node}': {cause}"
        assert re.search(text, result.stderr), result.stderr


def test_other_ids_of_one_rank_are_named_by_all_when_the_next_step_begins(saved: Path) -> None:
    result = torchrun("compiled_fault_worker.py", str(saved), "ids", HELIX_TIMEOUT="20", seconds=300)
    assert result.returncode != 0 and "done" not in result.stdout
    text = r"RuntimeFault: ranks disagree in step 3: rank 2 has input_ids \[2, 1\] \(digest .*; it was run .*start them again"
    assert len(re.findall(text, result.stderr)) == 4, result.stderr
    assert "lost its peers" not in result.stderr
