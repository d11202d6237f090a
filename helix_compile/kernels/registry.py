"""The registry of kernels: which op of a provider computes a helix:: op, where it can, what it compiles to and launches.

    register_kernel(...)          in each kernel file, once, at import
    register_cpp_kernel(...)      the same of C++ for a CPU
    select_kernel(site, target)   the kernel, or the reason why the reference runs instead

A CompileCase is what offline compilation reads and what runs. Triton reads facts off the values when it launches
(integers that are 1, multiples of 16, aligned pointers); offline there are example tensors, whose strides may be symbolic
in B and T: a fact holds there only if it holds for every B and T.

Nothing here imports Triton; kernels/catalog.py does, by importing the kernel files.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

from helix_compile.kernels.ops import OPS, Op
from helix_compile.kernels.target import CPP, KernelTarget
from helix_compile.kernels.triton_ops import define_triton_op, triton_type


def launch(case: CompileCase, grid: tuple[int, ...], arguments: dict[str, Any]) -> None:
    """Run `case.function` on `grid` with `arguments`, the value of every argument that is no constexpr.

    The grid depends on shapes alone, so a launch can be captured in a CUDA graph. An empty grid launches nothing.
    """
    if 0 in grid:
        return
    case.function[grid](**arguments, **case.constexprs, **case.options)


def specialize(case: CompileCase, arguments: dict[str, Any]) -> CompileCase:
    """`case` as a launch with `arguments` compiles it: ones become constants, multiples of 16 are known as such.

    Args:
        case: what a launcher builds.
        arguments: the value of every argument that is no constexpr; tensors may be fake, integers symbolic.
    """
    integers = {
        name: value
        for name, value in arguments.items()
        if not isinstance(value, (Tensor, float)) and name in case.signature
    }
    ones = {name: 1 for name, value in integers.items() if statically_known_true(value == 1)}
    # an allocation is aligned, so only the place of a view inside of it counts
    byte_offsets = {
        name: value.storage_offset() * value.dtype.itemsize
        for name, value in arguments.items()
        if isinstance(value, Tensor)
    }
    divisible = tuple(
        name for name, value in {**byte_offsets, **integers}.items() if statically_known_true(value % 16 == 0)
    )
    signature = {name: kind for name, kind in case.signature.items() if name not in ones}
    return replace(case, signature=signature, constexprs={**case.constexprs, **ones}, divisible_by_16=divisible)


@dataclass(frozen=True)
class Capacity:
    """What a plan promises about sizes that a graph leaves open.

    Attributes:
        max_batch_size: sequences.
        max_slots: slots of one sequence on one rank (the fullest), a multiple of the page size.
    """

    max_batch_size: int
    max_slots: int


@dataclass(frozen=True)
class Site:
    """One call of an op: what selection may look at.

    Attributes:
        op: base name, such as "mla_decode".
        args: example values: fake tensors (symbolic in B and T), numbers.
        capacity: of the plan.
        keywords: the same for what is given by its name.
    """

    op: str
    args: tuple[Any, ...]
    capacity: Capacity
    keywords: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class CompileCase:
    """One Triton function with everything that its compilation depends on; a launch is made from the same object.

    Attributes:
        kernel: name in tables, such as "mla_decode".
        function: the jit function.
        signature: argument -> Triton type for every argument that is no constexpr ("*bf16", "i32", "fp32",
            "tensordesc<bf16[64,256]>"), in any order.
        constexprs: argument -> value.
        options: num_warps, num_stages, ...
        divisible_by_16: arguments (pointers, strides) that a launch knows to be multiples of 16.
        config: short text for tables ("C2, BLOCK_H 64, BLOCK_N 64").
        kv_tokens_per_step: KV tokens that one step of the hot loop of one CTA covers; None: not an attention kernel.
        ctas_per_kv_token: CTAs that visit each KV token (row tiles times channel halves).
        fallback: not what the plan selects on this target, but what it would fall back to.
    """

    kernel: str
    function: Any
    signature: dict[str, str]
    constexprs: dict[str, Any]
    options: dict[str, Any]
    divisible_by_16: tuple[str, ...] = ()
    config: str = ""
    kv_tokens_per_step: int | None = None
    ctas_per_kv_token: int = 1
    fallback: bool = False


class Launch(NamedTuple):
    """The arguments of launch()."""

    case: CompileCase
    grid: tuple[int, ...]
    arguments: dict[str, Any]


# what an op returns, and the launches that fill it; made from example tensors it is good for compilation
Prepared = tuple[Any, list[Launch]]


def launch_of(
    kernel: str,
    function: Any,
    grid: tuple[int, ...],
    arguments: dict[str, Any],
    constexprs: dict[str, Any],
    *,
    config: str = "",
    num_warps: int = 4,
    num_stages: int = 1,
) -> Launch:
    """The launch of a case whose signature follows from its arguments; see CompileCase. `config`: the blocks if not given."""
    config = config or ", ".join(f"{name} {value}" for name, value in constexprs.items() if name.startswith("BLOCK"))
    signature = {name: triton_type(value) for name, value in arguments.items()}
    options = {"num_warps": num_warps, "num_stages": num_stages}
    return Launch(CompileCase(kernel, function, signature, constexprs, options, config=config), grid, arguments)


def run(prepared: Prepared) -> Any:
    """The result, filled."""
    result, launches = prepared
    for step in launches:
        launch(*step)
    return result


def cases_of(prepared: Prepared) -> list[CompileCase]:
    """What the launches compile."""
    return [specialize(step.case, step.arguments) for step in prepared[1]]


@dataclass(frozen=True)
class Kernel:
    """What computes an op.

    Attributes:
        op: base name of the helix:: op; "cache_append.norm_rope": a fused form of it, with more arguments.
        target: the provider's overload; it takes the op's arguments first, positional.
        supports: None where it can compute a site on a target, else the reason why not.
        cases: what has to be compiled for a site on a target.
    """

    op: str
    target: torch._ops.OpOverload
    supports: Callable[[Site, KernelTarget], str | None]
    cases: Callable[[Site, KernelTarget], list[CompileCase]]


@dataclass(frozen=True)
class Choice:
    """The outcome for one site: a kernel, or None and the reason."""

    kernel: Kernel | None
    reason: str


# filled at import of the kernel files and never after
_KERNELS: dict[str, Kernel] = {}
_CPP_KERNELS: dict[str, Kernel] = {}
_CPP_LIBRARY = torch.library.Library("helix_cpp", "DEF")  # kept alive: dropping it unregisters the ops


def register_kernel(
    op: Op,
    launcher: Callable[..., Any],
    supports: Callable[[Site, KernelTarget], str | None],
    cases: Callable[[Site, KernelTarget], list[CompileCase]],
) -> Kernel:
    """Make `launcher` the kernel of `op`; see Kernel.

    Raises:
        TypeError: an op of that name is registered already, or a form does not begin with the arguments of its op.
    """
    if op.name in _KERNELS:
        raise TypeError(f"a kernel for {op.name} is registered already")
    base = OPS[op.name.partition(".")[0]]
    wanted, own = (o.schema.removeprefix(o.name).split(") -> ") for o in (base, op))
    positional = wanted[0].partition(", *, ")[0]
    if not own[0].startswith(positional) or own[1] != wanted[1]:
        raise TypeError(f"{op.schema} does not begin like {base.schema}")
    kernel = _KERNELS[op.name] = Kernel(op.name, define_triton_op(op, launcher), supports, cases)
    return kernel


def register_launches(
    op: Op, prepare: Callable[..., Prepared], supports: Callable[[Site, KernelTarget], str | None]
) -> Kernel:
    """register_kernel of what `prepare` makes of the op's arguments, on any target."""
    return register_kernel(
        op,
        lambda *args, **keywords: run(prepare(*args, **keywords)),
        supports,
        lambda site, target: cases_of(prepare(*site.args, **site.keywords)),
    )


def register_cpp_kernel(
    op: Op, launcher: Callable[..., Any], supports: Callable[[Site, KernelTarget], str | None]
) -> Kernel:
    """Make `launcher` helix_cpp::op, which computes it on a CPU; on any other device the reference does."""
    _CPP_LIBRARY.define(op.schema, tags=(torch.Tag.pt2_compliant_tag,))
    _CPP_LIBRARY.impl(op.name, op.function, "CompositeExplicitAutograd")
    _CPP_LIBRARY.impl(op.name, launcher, "CPU")
    torch.library.register_fake(f"helix_cpp::{op.name}", op.fake, lib=_CPP_LIBRARY)
    target = getattr(torch.ops.helix_cpp, op.name).default
    kernel = _CPP_KERNELS[op.name] = Kernel(op.name, target, supports, lambda site, target: [])
    return kernel


def kernel_of(op: str) -> Kernel | None:
    """The registered Triton kernel of an op."""
    return _KERNELS.get(op)


def registered_kernels() -> list[Kernel]:
    """Every Triton kernel that was registered, in that order."""
    return list(_KERNELS.values())


def has_cpp(op: str) -> bool:
    """Is there C++ for an op (of some dtypes)?"""
    return op in _CPP_KERNELS


def select_kernel(site: Site, target: KernelTarget) -> Choice:
    """The kernel of a site on a target, or the reason why its torch reference runs."""
    of_cpu = target.arch == CPP
    kernel = _CPP_KERNELS.get(site.op) if of_cpu else kernel_of(site.op)
    if kernel is None:
        return Choice(None, f"no {'C++' if of_cpu else 'Triton'} kernel for {site.op}")
    reason = kernel.supports(site, target)
    return Choice(None, reason) if reason else Choice(kernel, "C++" if of_cpu else f"Triton kernel for {target.arch}")
