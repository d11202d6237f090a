"""C++ for the CPU that runs: built once by the compiler that torch's Inductor uses, into Inductor's folder on disk.

    library(source, bfloat16)   the loaded library, or a sentence that says why there is none

Another process that asks for the same source finds it there (TORCHINDUCTOR_CACHE_DIR). A build takes seconds, for one dtype.
"""

from __future__ import annotations

import functools
import subprocess
from ctypes import CDLL
from pathlib import Path

import torch

# how C++ spells an entry, and what sums of it are kept in
CPP_TYPE = {
    torch.float32: ("float", "float"),
    torch.bfloat16: ("c10::BFloat16", "float"),
    torch.float16: ("c10::Half", "float"),
    torch.float64: ("double", "double"),
}


@functools.cache
def library(source: Path, dtype: torch.dtype) -> CDLL | str:
    """The code of `source` for entries of `dtype`; never raises what a machine without a compiler would."""
    from torch._inductor.codecache import CppCodeCache  # slow to import, and only where C++ is asked for

    entry, kept = CPP_TYPE[dtype]
    types = f"#include <c10/util/BFloat16.h>\n#include <c10/util/Half.h>\nusing Entry = {entry};\nusing Sum = {kept};\n"
    try:
        built = CppCodeCache.load(types + source.read_text())
    except (RuntimeError, OSError, ImportError, subprocess.SubprocessError) as error:  # no compiler is a RuntimeError
        first = str(error).strip().split("\n")[0]
        return f"C++ can't be built here: {type(error).__name__}: {first}"
    assert isinstance(built, CDLL)
    return built
