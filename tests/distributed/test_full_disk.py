"""A full disk of one of four ranks that nobody catches: every rank says file and reason, all end, nothing is left.

What the ranks raise, and that they can go on, is checked in test_world.py's one launch.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.distributed.steps import torchrun
from tests.support.disk import REASON

pytestmark = [pytest.mark.slow, pytest.mark.multi_process]


def test_a_save_that_rank_2_can_not_write(tmp_path: Path) -> None:
    result = torchrun("disk_worker.py", str(tmp_path), "save", HELIX_TIMEOUT="60")
    assert result.returncode != 0 and "done" not in result.stdout
    told = rf"HelixError: {tmp_path}/saved/rank_2\.safetensors: can't be written: .*{REASON}"
    assert len(re.findall(rf"HelixError: save: rank 2: {told}", result.stderr)) == 3, result.stderr
    assert len(re.findall(told, result.stderr)) == 4, result.stderr
    assert not list(tmp_path.iterdir())


def test_a_cache_that_rank_2_can_not_write(tmp_path: Path) -> None:
    result = torchrun("disk_worker.py", str(tmp_path), "cache", HELIX_TIMEOUT="60")
    assert result.returncode != 0 and "done" not in result.stdout
    told = rf"RuntimeFault: {tmp_path}/cache\.safetensors: can't write the cache: .*{REASON}"
    for rank in (0, 1, 3):
        lost = rf"helix_compile: rank {rank} lost its peers in step 2 at .*: rank 2 raised at step 2: {told}"
        assert re.search(lost, result.stderr), result.stderr
    assert not list(tmp_path.iterdir())
