"""The one list of kernels: importing this module registers them. It needs Triton."""

from __future__ import annotations

import helix_compile.kernels.gqa_decode
import helix_compile.kernels.merge_lse  # noqa: F401
