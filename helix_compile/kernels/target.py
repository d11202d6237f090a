"""What kernels are chosen for: an architecture, and whether Triton compiles for it or interprets; or a CPU, by C++."""

from __future__ import annotations

import functools
import importlib.util
from dataclasses import dataclass

import torch

from helix_compile.errors import LoweringUnavailable

INTERPRETER, CPP = "interpreter", "cpp"


# streaming multiprocessors of the cards that offline compilation stands for: B200, H100 SXM, A100
SM_COUNT = {"sm_100": 148, "sm_90": 132, "sm_80": 108, INTERPRETER: 1}


@dataclass(frozen=True)
class KernelTarget:
    """One architecture.

    Attributes:
        arch: "sm_100", "sm_90", ...; "interpreter" (Triton's, on the CPU, in float arithmetic of the CPU); or "cpp" (no Triton at all).
        sm_count: streaming multiprocessors; split-KV makes about one program for each.
    """

    arch: str
    sm_count: int

    @property
    def capability(self) -> int:
        """100 for sm_100; 0 on a CPU."""
        return 0 if self.arch in (INTERPRETER, CPP) else int(self.arch.removeprefix("sm_"))


def offline_target(arch: str) -> KernelTarget:
    """The target of a compilation without a device.

    Raises:
        LoweringUnavailable: an architecture that is not known.
    """
    if arch == INTERPRETER or arch not in SM_COUNT:
        known = ", ".join(a for a in SM_COUNT if a != INTERPRETER)
        raise LoweringUnavailable(f"arch {arch!r} is unknown; expected one of {known}")
    return KernelTarget(arch, SM_COUNT[arch])


def no_fp8(dtype: torch.dtype, target: KernelTarget) -> str | None:
    """Why kernels of a target can't read or write a cache of this dtype; None where they can. Triton has e4m3 from sm_89 on."""
    if dtype in (torch.float8_e4m3fn, torch.uint8) and 0 < target.capability < 89:
        return f"a cache in FP8; {target.arch} has no e4m3"
    return None


@functools.cache  # asked for at every launch; what it answers can't change while a process runs
def device_target(device: torch.device) -> KernelTarget:
    """The target of kernels that run on `device`: its own architecture, or the interpreter on a CPU.

    Raises:
        LoweringUnavailable: Triton is missing, or can't run here; says what to do.
    """
    if importlib.util.find_spec("triton") is None:
        raise LoweringUnavailable("lower='triton' needs the triton package: pip install 'triton>=3.6'")
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        count = torch.cuda.get_device_properties(device).multi_processor_count
        return KernelTarget(f"sm_{major}{minor}", count)
    if device.type != "cpu":
        raise LoweringUnavailable(
            f"lower='triton' runs on a CUDA device, or on the CPU by Triton's interpreter; got device {device}"
        )
    import triton  # only where kernels are asked for: importing it takes a second

    if not triton.knobs.runtime.interpret:
        raise LoweringUnavailable(
            "lower='triton' on a CPU runs by Triton's interpreter: set TRITON_INTERPRET=1 in the environment before "
            "Python starts, or use lower='reference'"
        )
    return KernelTarget(INTERPRETER, SM_COUNT[INTERPRETER])


def target_for(lower: str, device: torch.device) -> KernelTarget | None:
    """What `lower` asks for on `device`; None: torch references. "auto" is Triton on CUDA >= 9.0, and so is
    what "tensorrt" leaves.

    Raises:
        LoweringUnavailable: "triton" or "cpp" where it can't run.
    """
    if lower in ("cpp", "cpp+inductor"):
        if device.type not in ("cpu", "meta"):
            raise LoweringUnavailable(f"lower={lower!r} is for a CPU; got device {device}; use lower='triton'")
        return KernelTarget(CPP, 1)
    if lower in ("triton", "triton+inductor"):
        return device_target(device)
    if lower in ("auto", "tensorrt") and device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0):
        return device_target(device)
    return None
