"""The one list of kernels: importing this module registers them. It needs Triton."""

from __future__ import annotations

from helix_compile.kernels import merge_lse  # noqa: F401 # registers helix_triton::merge_lse
