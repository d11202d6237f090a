"""Kernels are operators: export, save and load, and torch.compile keep each as one node; nothing reads values on the host."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import triton
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import helix_compile.kernels.catalog  # noqa: F401  registers the kernels
import helix_compile.kernels.registry as launch_module
from helix_compile import LoweringUnavailable
from helix_compile.kernels.registry import launch, registered_kernels
from helix_compile.kernels.target import device_target
from tests.support.kernel_cases import CASES, Arguments, on_device

# arguments of the forms that CASES, which is by base op, does not call; each from those of its base op
FUSED = {
    "mla_decode.splits": lambda a: (*a, 3),
    "pack_heads.splits": lambda a: (*_in_splits(*a[:2]), a[2], a[0].dtype),
    "cache_append.norm_rope": lambda a: (*a, *_norm_and_rope(a[4], a[5]), True),
}
READS_A_VALUE = ("_local_scalar_dense", "nonzero", "is_nonzero", "unique", "masked_select")


def _in_splits(o: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """Two float32 parts of [B, T, H, *]; the second saw nothing."""
    parts, statistics = torch.stack([o.float(), o.float()], 3), torch.stack([lse, lse], 3)
    statistics[..., 1] = -torch.inf
    return parts, statistics


def _norm_and_rope(latent: Tensor, k_rope: Tensor) -> tuple[Any, ...]:
    angle = torch.linspace(0, 3, k_rope.numel()).view(k_rope.shape)
    return torch.linspace(0.5, 2, latent.shape[2]), 1e-6, angle.cos(), angle.sin()


def arguments_of(op: str, seed: int = 0) -> Arguments:
    base = op.partition(".")[0]
    case = next(c for c in CASES if c.op == base)
    arguments = case.arguments(torch.float32, seed)
    return FUSED[op](arguments) if op in FUSED else arguments


OVERLOADS = {kernel.op: kernel.target for kernel in registered_kernels()}


class Call(nn.Module):
    """A module that calls one operator on tensors given and constants fixed; what it writes is returned too."""

    def __init__(self, target: Any, arguments: Arguments):
        super().__init__()
        self.target = target
        self.constants = [None if isinstance(a, Tensor) else a for a in arguments]
        aliases = [a.alias_info for a in target._schema.arguments]
        self.written = [i for i, a in enumerate(aliases) if a is not None and a.is_write]

    def forward(self, *tensors: Tensor) -> list[Tensor]:
        given = iter(tensors)
        arguments = [next(given) if c is None else c for c in self.constants]
        out = self.target(*arguments)
        return [*([out] if isinstance(out, Tensor) else out), *(arguments[i] for i in self.written)]


def tensors_of(arguments: Arguments) -> tuple[Tensor, ...]:
    return tuple(a for a in on_device(arguments, "cpu") if isinstance(a, Tensor))


def assert_same(got: list[Tensor], wanted: list[Tensor]) -> None:
    """Bit by bit, NaN where NaN is; rows that saw nothing are not written by kernels that leave parts."""
    assert len(got) == len(wanted)
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def test_every_registered_form_is_called_here() -> None:
    assert set(OVERLOADS) == {c.op for c in CASES} - {"unpack_heads"} | set(FUSED)
    assert set(FUSED) <= set(OVERLOADS)


@pytest.fixture(autouse=True)
def written_memory() -> Any:
    """torch.empty gives the same bits each time: an output that a kernel leaves unwritten is NaN in every run."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("op", OVERLOADS, ids=str)
def test_export_and_reload_keep_the_node(op: str, tmp_path: Path) -> None:
    arguments = arguments_of(op)
    module = Call(OVERLOADS[op], arguments)
    program = torch.export.export(module, tensors_of(arguments), strict=False)
    torch.export.save(program, tmp_path / "program.pt2")
    loaded = torch.export.load(tmp_path / "program.pt2")
    for one in (program, loaded, loaded.run_decompositions({})):  # the last one wraps an op that writes
        assert [t for n in one.graph.nodes for t in (n.target, *n.args[:1]) if t in OVERLOADS.values()] == [
            OVERLOADS[op]
        ]
    assert_same(loaded.module()(*tensors_of(arguments)), module(*tensors_of(arguments)))


@pytest.mark.parametrize("op", OVERLOADS, ids=str)
def test_torch_compile_keeps_the_node(op: str) -> None:
    """fullgraph, so a graph break is an error; aot_eager also functionalises what the op writes."""
    arguments = arguments_of(op)
    module = Call(OVERLOADS[op], arguments)
    torch._dynamo.reset()  # one forward, many modules: they would count as recompilations
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    assert_same(compiled(*tensors_of(arguments)), module(*tensors_of(arguments)))


@pytest.mark.parametrize("op", OVERLOADS, ids=str)
def test_schema_and_fake_say_what_the_kernel_does(op: str) -> None:
    """What the schema calls unwritten stays as it is, and the fake's shapes, strides and dtypes are the kernel's."""
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(OVERLOADS[op], on_device(arguments_of(op), "cpu"), test_utils=checks)


class RefuseValues(TorchDispatchMode):
    """Fails where the host reads a tensor's value, or makes a shape of one: what a CUDA graph can't record."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.__name__.partition(".")[0]
        assert name not in READS_A_VALUE, f"{name} waits for the device"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("op", OVERLOADS, ids=str)
def test_a_launch_follows_from_shapes_alone(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two calls with other values and lengths: the same kernels, grids, scalars and strides, and no value is read."""
    seen: list[list[Any]] = []

    def record(case: Any, grid: Any, values: dict[str, Any]) -> None:
        shapes = {
            name: (tuple(v.shape), v.stride(), v.dtype) if isinstance(v, Tensor) else v
            for name, v in values.items()
            if not name.endswith("desc")
        }
        seen[-1].append((case.kernel, case.config, tuple(grid), shapes))

    for module in _launchers():
        monkeypatch.setattr(module, "launch", record)
    for seed in (0, 1):
        seen.append([])
        arguments = on_device(arguments_of(op, seed), "cpu")
        with RefuseValues():
            OVERLOADS[op](*arguments)
    assert seen[0] and seen[0] == seen[1]


def _launchers() -> list[Any]:
    import sys

    return [
        m
        for name, m in list(sys.modules.items())
        if name.startswith("helix_compile.kernels.") and getattr(m, "launch", None) is launch
    ]


def test_a_host_read_would_be_caught() -> None:
    with RefuseValues(), pytest.raises(AssertionError, match="waits for the device"):
        torch.ones(2).sum().item()
    assert launch_module.launch is launch


@pytest.mark.parametrize("op", OVERLOADS, ids=str)
def test_a_cpu_without_the_interpreter_is_refused(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a saved graph finds it that is loaded where TRITON_INTERPRET is not set."""
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    device_target.cache_clear()
    try:
        with pytest.raises(LoweringUnavailable, match="TRITON_INTERPRET=1"):
            OVERLOADS[op](*arguments_of(op))
    finally:
        device_target.cache_clear()
