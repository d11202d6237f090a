"""Every test starts from the same seed and one torch thread (two workers with two threads each starve each other)."""

from __future__ import annotations

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)
