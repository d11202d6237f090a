"""The one list of kernels: importing this module registers them. It needs Triton."""

from __future__ import annotations

import helix_compile.kernels.cache_append
import helix_compile.kernels.gqa_decode
import helix_compile.kernels.merge_lse
import helix_compile.kernels.mla_decode
import helix_compile.kernels.moe_experts
import helix_compile.kernels.moe_router
import helix_compile.kernels.pack_heads
import helix_compile.kernels.rope_heads  # noqa: F401
