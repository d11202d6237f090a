"""What tests start under torchrun ends with them, also where workers have sessions of their own and hold the output open."""

from __future__ import annotations

import sys
import time

import pytest

from tests.distributed.steps import launch

# as torchrun's agent: a worker in another session that outlives it, with its output
_AGENT = """
import subprocess, sys, time
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
time.sleep(float(sys.argv[1]))
"""


def test_a_command_that_takes_too_long_is_ended_with_its_workers() -> None:
    start = time.monotonic()
    with pytest.raises(AssertionError, match="not done after 2 s"):
        launch([sys.executable, "-c", _AGENT, "600"], 2)
    assert time.monotonic() - start < 60  # it would wait for the worker's end
