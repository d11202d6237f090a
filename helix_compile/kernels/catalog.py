"""The one list of kernels: importing this module registers them. It needs Triton."""

from __future__ import annotations

import helix_compile.kernels.cache_append
import helix_compile.kernels.gqa.decode
import helix_compile.kernels.merge
import helix_compile.kernels.mla.decode
import helix_compile.kernels.moe.experts
import helix_compile.kernels.moe.router
import helix_compile.kernels.pack_heads
import helix_compile.kernels.rope_heads
import helix_compile.kernels.sparse.decode
import helix_compile.kernels.sparse.kth
import helix_compile.kernels.sparse.scores
import helix_compile.kernels.sparse.select
import helix_compile.kernels.sparse.topk  # noqa: F401
