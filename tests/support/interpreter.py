"""Triton's interpreter without its bookkeeping, which is half of a kernel test: results are bit for bit the same.

The interpreter puts its own functions in place of triton.language's before each launch, and again at each call of a jit
function inside of a kernel, `tl.sum` and `tl.zeros` included; each time it looks through all members of the package. Here
it looks once, and what it would put there is put there again. Another version of Triton may be built otherwise: then
nothing is changed.
"""

from __future__ import annotations

import os
from types import FunctionType
from typing import Any

import triton.language as tl
from triton.runtime import interpreter

Changes = list[tuple[Any, str, Any]]  # object, name, what stands there from now on


class _Patches:
    """What stands in place of triton.language while a kernel runs."""

    def __init__(self, patch: Any):
        self.patch = patch
        self.open: list[tuple[int, ...]] = []  # which modules of the language are patched now, in order
        self.known: dict[tuple[tuple[int, ...], ...], Changes] = {}
        self.scope = interpreter._LangPatchScope()

    def __call__(self, function: FunctionType) -> Any:
        """Patch what `function` sees of the language, unless that is done; the first of a launch is undone at its end."""
        seen = tuple(id(v) for v in function.__globals__.values() if v is tl or v is tl.core)
        if seen not in self.open:
            self.open.append(seen)
            key = tuple(self.open)
            if key not in self.known:
                made = self.patch(function)
                self.known[key] = [(owner, name, getattr(owner, name)) for owner, name, _ in made._changes]
                made.restore()
            for change in self.known[key]:
                self.scope.set_attr(*change)
        return self

    def restore(self) -> None:
        """Called by the launch, after its last program."""
        self.open.clear()
        self.scope.restore()


def without_bookkeeping() -> None:
    """For this process, once."""
    if os.environ.get("TRITON_INTERPRET") != "1" or not hasattr(interpreter, "_LangPatchScope"):
        return
    if not isinstance(interpreter._patch_lang, _Patches):
        interpreter._patch_lang = _Patches(interpreter._patch_lang)
        interpreter._get_np_dtype = _by_type(interpreter._get_np_dtype)


def _by_type(asked: Any) -> Any:
    """The interpreter makes a table of 18 types at each question; a scalar type is known by its name."""
    known: dict[str, Any] = {}

    def np_dtype(kind: Any) -> Any:
        scalar = kind.element_ty if isinstance(kind, tl.block_type) else kind
        name = "pointer" if isinstance(scalar, tl.pointer_type) else scalar.name
        if name not in known:
            known[name] = asked(kind)
        return known[name]

    return np_dtype
