"""The one list of kernels: importing this module registers them. It needs Triton."""

from __future__ import annotations

import helix_compile.kernels.cache_append  # noqa: F401
import helix_compile.kernels.fused  # noqa: F401
import helix_compile.kernels.gqa_decode  # noqa: F401
import helix_compile.kernels.merge_lse  # noqa: F401
import helix_compile.kernels.mla_decode  # noqa: F401
import helix_compile.kernels.moe_experts  # noqa: F401
import helix_compile.kernels.moe_router  # noqa: F401
import helix_compile.kernels.pack_heads  # noqa: F401
import helix_compile.kernels.rope_heads  # noqa: F401
