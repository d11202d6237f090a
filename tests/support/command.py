"""The console script in this process: the import of torch and transformers, 4 CPU seconds, is paid once."""

from __future__ import annotations

import io
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from unittest import mock

import helix_compile.cli.commands as cli


def run_here(*arguments: str) -> subprocess.CompletedProcess[str]:
    """What `helix-compile *arguments` prints, and its exit status."""
    out, err = io.StringIO(), io.StringIO()
    command = ["helix-compile", *arguments]
    with redirect_stdout(out), redirect_stderr(err), mock.patch.object(sys, "argv", command):
        try:
            cli.main()
            status: object = 0
        except SystemExit as end:
            status = end.code or 0
    assert isinstance(status, int), status
    return subprocess.CompletedProcess(command, status, out.getvalue(), err.getvalue())
