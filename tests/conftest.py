"""Every test starts from the same seed and one torch thread (two workers with two threads each starve each other)."""

from __future__ import annotations

import gc
import logging
import os
import shutil
import tempfile
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before any kernel is imported: it is read when one is defined

torch.set_num_threads(1)
gc.set_threshold(
    200_000, 20, 100
)  # graphs are many small objects: looking through them again and again is a fifth of the time
# pytest listens to loggers that do not propagate: for torch's structured trace every graph would be printed, for nobody
logging.getLogger("torch.__trace").propagate = True

from helix_compile.capture import model as capture_model  # noqa: E402  Triton reads its variable before
from tests.support.captures import FOLDER, share  # noqa: E402
from tests.support.interpreter import without_bookkeeping  # noqa: E402

without_bookkeeping()

_IS_FIRST = FOLDER not in os.environ  # workers of xdist, and what tests launch, use the folder of the first process
if _IS_FIRST:
    os.environ[FOLDER] = tempfile.mkdtemp(prefix="helix-captures-")

_ANEW = capture_model._captured
share()  # at once: fixtures of a module are made before those of a test


# dealt out file by file: what takes longest goes first, or one worker ends on it alone. By seconds, in steps of ten or so
LONGEST = (
    "distributed/test_world.py",
    "verifier/test_verify.py",
    "whole/test_exact.py",
    "cli/test_commands.py",
    "cli/test_kernels.py",
    "verifier/mutants/test_self_test.py",
    "whole/test_gqa.py",
    "capture/test_constants.py",
    "capture/test_paths.py",
    "whole/test_other_styles.py",
    "kernels/lab/test_offline.py",
    "whole/test_refusals.py",
    "runtime/test_generation.py",
    "test_readme.py",
    "verifier/test_pair.py",
    "dynamo/test_backend.py",
    "saving/test_saving.py",
    "distributed/test_command.py",
    "distributed/test_faults.py",
    "kernels/lab/test_tune.py",
    "verifier/test_no_false_alarm.py",
    "export/test_onnxruntime.py",
    "export/test_export_command.py",
)


# Ids of tests that only `make test-slow` runs: each takes seconds, and runs no line of the product that the rest does not run
# (`make coverage` says so). A file's own @pytest.mark.slow is for what is too big for CI by nature.
VARIANTS = Path(__file__).with_name("slow_variants.txt")


@pytest.hookimpl(tryfirst=True)  # before -m chooses
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Variants are slow. The longest files first; within a file nothing moves (xdist sorts by number unless told otherwise)."""
    variants = set(VARIANTS.read_text().splitlines())
    found = {item.nodeid: item for item in items if item.nodeid in variants}
    for item in found.values():
        item.add_marker(pytest.mark.slow)
    files = {str(item.path.relative_to(config.rootpath)) for item in items}
    gone = [name for name in variants - set(found) if name.partition("::")[0] in files]
    if gone and not any("::" in argument for argument in config.args):
        raise pytest.UsageError(f"{VARIANTS.name} names tests that are not there: {', '.join(sorted(gone))}")
    tests = Path(__file__).parent
    place = {tests / name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path, len(place)))


def pytest_collection_finish() -> None:
    """What is imported stays: no collection needs to look through it again."""
    gc.collect()
    gc.freeze()


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
