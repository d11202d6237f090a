"""Kernels that stand for several ops of a graph: registered here, put in place by passes/fuse_kernels.py.

Their launchers and cases stand in the file of the op they extend.
"""

from __future__ import annotations

from helix_compile.kernels.cache_append import (
    CACHE_APPEND_NORM_ROPE,
    cache_append_norm_rope_cases,
    cache_append_norm_rope_supports,
)
from helix_compile.kernels.mla_decode import (
    MLA_DECODE_SPLITS,
    mla_splits_cases,
    mla_splits_supports,
)
from helix_compile.kernels.pack_heads import PACK_SPLITS, pack_splits_cases, pack_splits_supports
from helix_compile.kernels.registry import Kernel, register_kernel
from helix_compile.kernels.rope_heads import ROPE_HEADS, rope_heads_cases, rope_heads_supports

register_kernel(
    Kernel(
        op="cache_append.norm_rope",
        target=CACHE_APPEND_NORM_ROPE,
        supports=lambda site, target: cache_append_norm_rope_supports(site.args, target),
        cases=lambda site, target: cache_append_norm_rope_cases(site.args, target),
    )
)
register_kernel(
    Kernel(
        op="rope_heads",
        target=ROPE_HEADS,
        supports=lambda site, target: rope_heads_supports(site.args, target),
        cases=lambda site, target: rope_heads_cases(site.args, target),
    )
)
register_kernel(
    Kernel("mla_decode.splits", MLA_DECODE_SPLITS, mla_splits_supports, mla_splits_cases)
)
register_kernel(
    Kernel(
        op="pack_heads.splits",
        target=PACK_SPLITS,
        supports=lambda site, target: pack_splits_supports(site.args, target),
        cases=lambda site, target: pack_splits_cases(site.args, target),
    )
)
