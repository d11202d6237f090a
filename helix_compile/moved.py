"""Modules that docs and examples of version 0.1 named, and where they are now. Goes with the next version.

`import helix_compile` installs MovedModules behind Python's own finders, so an old name still imports, and warns.
"""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

MOVED = {
    "helix_compile.checkpoint_load": "helix_compile.checkpoint.model",
    "helix_compile.costs": "helix_compile.predict.costs",
    "helix_compile.dynamic_cache": "helix_compile.cache.transfer",
    "helix_compile.graph_queries": "helix_compile.predict.schedule",
    "helix_compile.handover": "helix_compile.cache.shards",
    "helix_compile.handover_file": "helix_compile.cache.file",
    "helix_compile.numerics": "helix_compile.verifier.numeric.reference",
    "helix_compile.ops": "helix_compile.ir.ops",
    "helix_compile.options": "helix_compile.config.options",
    "helix_compile.passes.check_layouts": "helix_compile.passes.typing.check_layouts",
    "helix_compile.passes.fx_edit": "helix_compile.ir.graph",
    "helix_compile.passes.typing_rules": "helix_compile.passes.typing.aten_rules",
    "helix_compile.verification": "helix_compile.verifier.verify",
}


class MovedModules(MetaPathFinder, Loader):
    """Finds and loads the modules of MOVED by their old names: the module itself, not a copy of it."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        """Only what moved is found here."""
        return ModuleSpec(name, self) if name in MOVED else None

    def exec_module(self, module: ModuleType) -> None:
        """The import statement takes what sys.modules holds under the old name after this."""
        old = module.__name__
        warnings.warn(f"{old} is {MOVED[old]} now; the old name goes with the next version", DeprecationWarning, 2)
        sys.modules[old] = importlib.import_module(MOVED[old])
