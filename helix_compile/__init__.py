"""helix_compile: rewrite a decode step for Helix parallelism (arXiv 2507.07120) as a torch.fx pass.

compiled = helix_compile(model, cp=4)
logits = compiled(input_ids)
print(compiled.inspect())
print(verify(compiled, model))
"""

from __future__ import annotations

from helix_compile.capture.captured import CapturedGraph
from helix_compile.capture.model import capture
from helix_compile.compile import helix_compile
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
from helix_compile.plan.helix_plan import HelixPlan
from helix_compile.verifier.report import Finding, VerificationReport
from helix_compile.verifier.verify import assert_equivalent, verify

__version__ = "0.1.0"
__all__ = [
    "CaptureError",
    "CapturedGraph",
    "CheckpointError",
    "Finding",
    "HelixError",
    "HelixModule",
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
    "helix_compile",
    "verify",
]
