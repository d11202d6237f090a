"""helix_compile: rewrite a decode step for Helix parallelism (arXiv 2507.07120) as a torch.fx pass.

compiled = helix_compile(model, cp=4)
logits = compiled(input_ids)
print(compiled.inspect())
print(verify(compiled, model))
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

from helix_compile.ir import ops as _ops  # noqa: F401  torch.ops.helix is there after `import helix_compile`
from helix_compile.moved import MovedModules

if TYPE_CHECKING:
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
    from helix_compile.export.loaded import load_exported
    from helix_compile.module import HelixModule
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
    "load_exported",
    "read_cache",
    "typing_rule",
    "verify",
    "write_cache",
]

# where a name lives: it is imported when it is asked for, since transformers alone takes three seconds
_PLACES = {
    "CacheEntries": "cache.shards",
    "CaptureError": "errors",
    "CapturedGraph": "capture.captured",
    "CheckpointError": "errors",
    "Comparison": "verifier.compare.compare",
    "Finding": "verifier.report",
    "HelixError": "errors",
    "HelixModule": "module",
    "HelixOptions": "config.options",
    "HelixPlan": "plan.helix_plan",
    "LayoutError": "errors",
    "LoweringError": "errors",
    "LoweringUnavailable": "errors",
    "MatchError": "errors",
    "PassError": "errors",
    "PlanError": "errors",
    "RuntimeFault": "errors",
    "VerificationReport": "verifier.report",
    "assert_equivalent": "verifier.verify",
    "capture": "capture.model",
    "compare": "verifier.compare.compare",
    "elementwise": "passes.typing.aten_rules",
    "helix_compile": "compile",
    "load_deepseek_v3": "checkpoint.model",
    "load_exported": "export.loaded",
    "read_cache": "cache.file",
    "typing_rule": "passes.typing.check_layouts",
    "verify": "verifier.verify",
    "write_cache": "cache.file",
}


class _Front(ModuleType):
    """The package: public names come from their modules, and rooms are imported when they are named."""

    def __getattr__(self, name: str) -> Any:
        if name in _PLACES:
            value = getattr(importlib.import_module(f"{__name__}.{_PLACES[name]}"), name)
            vars(self)[name] = value
            return value
        try:
            return importlib.import_module(f"{__name__}.{name}")
        except ModuleNotFoundError as error:
            if error.name != f"{__name__}.{name}":
                raise
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}") from None

    def __dir__(self) -> list[str]:
        return sorted({*vars(self), *__all__})

    @property
    def capture(self) -> Any:
        """The function: a room has the same name, which an import would leave here."""
        return importlib.import_module(f"{__name__}.capture.model").capture

    @capture.setter
    def capture(self, room: ModuleType) -> None:
        """Set by the import of the room; it is in sys.modules."""


sys.modules[__name__].__class__ = _Front
