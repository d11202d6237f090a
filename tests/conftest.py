"""Every test starts from the same seed and one torch thread (two workers with two threads each starve each other)."""

from __future__ import annotations

import gc
import os
import shutil
import tempfile

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before any kernel is imported: it is read when one is defined

torch.set_num_threads(1)
gc.set_threshold(
    200_000, 20, 100
)  # graphs are many small objects: looking through them again and again is a fifth of the time

from helix_compile.capture import model as capture_model  # noqa: E402  Triton reads its variable before
from tests.support.captures import FOLDER, remembered  # noqa: E402
from tests.support.interpreter import without_bookkeeping  # noqa: E402

without_bookkeeping()

_IS_FIRST = FOLDER not in os.environ  # workers of xdist, and what tests launch, use the folder of the first process
if _IS_FIRST:
    os.environ[FOLDER] = tempfile.mkdtemp(prefix="helix-captures-")

_ANEW = capture_model._captured
capture_model._captured = remembered(_ANEW)  # at once: fixtures of a module are made before those of a test


@pytest.fixture(autouse=True)
def shared_captures(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Models of one structure are captured once a run, but for tests that ask otherwise."""
    if request.node.get_closest_marker("fresh_capture") is not None:
        monkeypatch.setattr(capture_model, "_captured", _ANEW)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def pytest_unconfigure() -> None:
    """The folder goes with the run."""
    if _IS_FIRST:
        shutil.rmtree(os.environ[FOLDER], ignore_errors=True)
