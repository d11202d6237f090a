"""helix_compile: rewrite a decode step for Helix parallelism (arXiv 2507.07120) as a torch.fx pass.

compiled = helix_compile(model, cp=4)
logits = compiled(input_ids)
print(compiled.inspect())
print(verify(compiled, model))
"""

from __future__ import annotations

import sys

from helix_compile.cache.file import read_cache, write_cache
from helix_compile.cache.shards import CacheEntries
from helix_compile.capture.captured import CapturedGraph
from helix_compile.capture.model import capture
from helix_compile.checkpoint.model import load_deepseek_v3
from helix_compile.compile import helix_compile
from helix_compile.config.options import HelixOptions
from helix_compile.errors import (
    CaptureError,
    CheckpointError,
    HelixError,
    LayoutError,
    LoweringError,
    LoweringUnavailable,
    MatchError,
    PassError,
    PlanError,
    RuntimeFault,
)
from helix_compile.module import HelixModule
from helix_compile.moved import MovedModules
from helix_compile.passes.typing.aten_rules import elementwise
from helix_compile.passes.typing.check_layouts import typing_rule
from helix_compile.plan.helix_plan import HelixPlan
from helix_compile.verifier.compare.compare import Comparison, compare
from helix_compile.verifier.report import Finding, VerificationReport
from helix_compile.verifier.verify import assert_equivalent, verify

sys.meta_path.append(MovedModules())  # behind the others: only names that are not there any more come to it

__version__ = "0.1.0"
__all__ = [
    "CacheEntries",
    "CaptureError",
    "CapturedGraph",
    "CheckpointError",
    "Comparison",
    "Finding",
    "HelixError",
    "HelixModule",
    "HelixOptions",
    "HelixPlan",
    "LayoutError",
    "LoweringError",
    "LoweringUnavailable",
    "MatchError",
    "PassError",
    "PlanError",
    "RuntimeFault",
    "VerificationReport",
    "assert_equivalent",
    "capture",
    "compare",
    "elementwise",
    "helix_compile",
    "load_deepseek_v3",
    "read_cache",
    "typing_rule",
    "verify",
    "write_cache",
]
