"""What the Triton at hand can compile, found by compiling: no version is asked for.

Triton 3.6 can't give the accumulators of two halves to the warps of a specialised loop; 3.7 and newer can.
"""

from __future__ import annotations

import contextlib
import functools
import os
import sys
from collections.abc import Iterator

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from helix_compile.kernels.mla.launch import decode_case
from helix_compile.kernels.mla.tuning import ROWS, MlaConfig
from helix_compile.kernels.registry import CompileCase

# small: a second of compilation, and Triton keeps what succeeds in its cache
PROBE = MlaConfig(ROWS, 64, 64, 8, 2, parts=2, warp_specialize=True)


HEADS, R, ROPE, PAGE = 64, 64, 16, 64


@functools.cache
def specialises_halves(capability: int) -> bool:
    """True if a warp-specialised loop over two halves compiles; also where Triton interprets, and can't be asked."""
    if capability < 100 or triton.knobs.runtime.interpret:
        return True
    case = decode_case(PROBE, HEADS, R, ROPE, PAGE, torch.bfloat16, torch.bfloat16)
    try:
        with _without_stderr():
            triton.compile(case_source(case), target=GPUTarget("cuda", capability, 32), options=case.options)
    except RuntimeError:  # a compiler pass that fails
        return False
    return True


@contextlib.contextmanager
def _without_stderr() -> Iterator[None]:
    """A pass that fails prints the whole module to the descriptor."""
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def case_source(case: CompileCase) -> ASTSource:
    """What Triton compiles for a case.

    Raises:
        TypeError: an argument has neither a type nor a value.
    """
    names, position = case.function.arg_names, case.function.arg_names.index
    missing = [a for a in names if a not in case.signature and a not in case.constexprs]
    if missing:
        raise TypeError(f"no type and no value for {', '.join(missing)}")
    return ASTSource(
        case.function,
        {a: "constexpr" if a in case.constexprs else case.signature[a] for a in names},
        {(position(a),): value for a, value in case.constexprs.items()},
        {(position(a),): [["tt.divisibility", 16]] for a in case.divisible_by_16},
    )
