"""Engines of TensorRT for pieces (passes/lower/pieces.py): a piece is exported with its weights bound, and one engine is built of it.

What builds an engine is handed in; TorchTensorRT, by torch_tensorrt.dynamo.compile, where nothing is. There is no fallback: a piece that
is not one engine as a whole is a LoweringError, and where torch_tensorrt can't be loaded nothing is captured.

Nothing here has built or run an engine on a card yet: what is tested is all around the builder, and torch_tensorrt's own dry run
(docs/exports.md).
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import operator
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from typing import Any, Protocol
from weakref import WeakValueDictionary

import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram
from torch.utils._python_dispatch import _disable_current_modes

from helix_compile.capture.model import CAPTURING
from helix_compile.errors import LoweringError, LoweringUnavailable, RuntimeFault
from helix_compile.ir.graph import is_call, placeholders
from helix_compile.ir.sizes import HINT_B, HINT_T, hint_of
from helix_compile.plan.helix_plan import HelixPlan
from helix_compile.runtime.inductor import segment_key
from helix_compile.runtime.rank import Rank
from helix_compile.runtime.step import MAX_CHUNK
from helix_compile.runtime.watch import state_of
from helix_compile.worlds.program import SegmentCall

_INSTALL = "pip install 'helix-compile[tensorrt]' on a machine with an NVIDIA card"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# of torch_tensorrt.dynamo.compile, which swallows what it does not know; scripts/tensorrt_dryrun.py holds them against a wheel
COMPILE_KEYWORDS: Mapping[str, Any] = {
    "require_full_compilation": True,  # else what has no converter would run in torch
    "min_block_size": 1,  # else a small piece would
    "pass_through_build_failures": True,
    "disable_tf32": True,  # float32 is float32
    "truncate_double": False,
    "immutable_weights": True,  # an edited weight is another engine
    "cache_built_engines": False,
    "reuse_cached_engines": False,
}
OF_A_PIECE = ("exported_program", "arg_inputs", "device", "use_fp32_acc")


@dataclass(frozen=True)
class EngineInput:
    """What an engine takes at one place.

    Attributes:
        name: of the value in the lowered graph.
        smallest, usual, largest: shapes; B and T from 1 to their capacity, the usual step is a token of a full batch.
    """

    name: str
    dtype: torch.dtype
    smallest: tuple[int, ...]
    usual: tuple[int, ...]
    largest: tuple[int, ...]


Engine = Callable[..., Any]


class EngineBuilder(Protocol):
    """Makes one engine."""

    def __call__(self, program: ExportedProgram, inputs: Sequence[EngineInput], where: str) -> Engine:
        """What computes `program`, whose weights are its own, for all shapes that `inputs` allow.

        Args:
            program: takes `inputs`, returns a tuple of tensors.
            inputs: one for each input.
            where: the piece's call, for messages.

        Raises:
            LoweringError: it is not one engine as a whole.
        """


def check_tensorrt(device: torch.device, builder: EngineBuilder | None) -> None:
    """Raise LoweringUnavailable where no engine can be built: before anything is captured. On meta none is."""
    if builder is not None or device.type == "meta":
        return
    load_torch_tensorrt()
    if device.type != "cuda":
        raise LoweringUnavailable(
            f"lower='tensorrt' builds engines for an NVIDIA card; got device {device}: give device='cuda', or use lower='inductor'"
        )


def load_torch_tensorrt() -> Any:
    """The package.

    Raises:
        LoweringUnavailable: it is not there, or can't load; says which.
    """
    try:
        with redirect_stdout(sys.stderr):  # its import prints what it lacks, and stdout may be a JSON document
            return importlib.import_module("torch_tensorrt")
    except ModuleNotFoundError as error:
        if error.name == "torch_tensorrt":
            raise LoweringUnavailable(
                f"lower='tensorrt' needs the package torch_tensorrt, which is not installed: {_INSTALL}, or use lower='inductor'"
            ) from error
        raise _not_loaded(error) from error
    except (
        Exception
    ) as error:  # a bare Exception where libraries of CUDA or TensorRT are missing, OSError from the linker
        raise _not_loaded(error) from error


def _not_loaded(error: Exception) -> LoweringUnavailable:
    first = (str(error).strip() or "no message").split("\n")[0]
    return LoweringUnavailable(
        f"lower='tensorrt': torch_tensorrt is installed and can't be loaded: {type(error).__name__}: {first}; "
        "it wants the libraries of CUDA and TensorRT that it was built for. Nearest that works: lower='inductor'"
    )


class TorchTensorRT:
    """The builder of torch_tensorrt. See EngineBuilder.

    Raises:
        LoweringUnavailable: as load_torch_tensorrt(); or its compile() knows a keyword no more.
    """

    def __init__(self, device: torch.device):
        self._package, self._device = load_torch_tensorrt(), device
        known = inspect.signature(self._package.dynamo.compile).parameters
        if lost := [name for name in (*COMPILE_KEYWORDS, *OF_A_PIECE) if name not in known]:  # it would swallow them
            raise LoweringUnavailable(
                f"lower='tensorrt': compile() of torch_tensorrt {getattr(self._package, '__version__', '')} has no "
                f"{', '.join(lost)}; expected 2.13.0's; use lower='inductor'"
            )

    def __call__(self, program: ExportedProgram, inputs: Sequence[EngineInput], where: str) -> Engine:
        """See EngineBuilder."""
        built = self.compiled(program, inputs, where)
        self._check(built, len(inputs), where)
        engine: Engine = built
        return engine

    def compiled(
        self, program: ExportedProgram, inputs: Sequence[EngineInput], where: str, **further: Any
    ) -> fx.GraphModule:
        """What compile() makes of a piece.

        Args:
            program, inputs, where: see EngineBuilder.
            further: keywords of compile(), such as dryrun.

        Raises:
            LoweringError: it refuses.
        """
        if wrong := [f"{i.name}: {i.dtype}" for i in inputs if i.dtype not in DTYPES]:
            raise LoweringError(
                f"{where}: TensorRT computes in float32, float16 and bfloat16, got {', '.join(wrong)}; "
                "compile with dtype=torch.float32, or use lower='inductor'"
            )
        wanted = [
            self._package.Input(min_shape=i.smallest, opt_shape=i.usual, max_shape=i.largest, dtype=i.dtype)
            for i in inputs
        ]
        accumulate = any(i.dtype is torch.float16 for i in inputs)  # in float32, as torch does
        try:
            with redirect_stdout(sys.stderr):
                made: fx.GraphModule = self._package.dynamo.compile(
                    program,
                    arg_inputs=wanted,
                    device=self._device,
                    use_fp32_acc=accumulate,
                    **COMPILE_KEYWORDS,
                    **further,
                )
        except Exception as error:  # AssertionError where an op has no converter, TensorRT's own where it can't build
            first = (str(error).strip() or "no message").split("\n")[0]
            raise LoweringError(
                f"{where}: torch_tensorrt builds no engine of this piece: {type(error).__name__}: {first}; lower='inductor' "
                "compiles it without"
            ) from error
        return made

    def _check(self, built: fx.GraphModule, inputs: int, where: str) -> None:
        """One engine, with these inputs and no op beside it: torch_tensorrt hands back what it could not convert, too."""
        kind = self._package.dynamo.runtime.TorchTensorRTModule
        engines = [module for module in built.modules() if isinstance(module, kind)]
        beside = [n.name for n in built.graph.nodes if n.op == "call_function" and not is_call(n, operator.getitem)]
        if len(engines) != 1 or beside:
            raise LoweringError(
                f"{where}: torch_tensorrt made {len(engines)} engines and left {beside or 'no op'} to torch; expected one engine "
                "and nothing beside it; use lower='inductor'"
            )
        if (got := len(engines[0].input_binding_names)) != inputs:
            raise LoweringError(
                f"{where}: its engine takes {got} inputs, expected {inputs}: weights would be handed in at every step; "
                "use lower='inductor'"
            )


class Engines:
    """The engines of one module's pieces. See SegmentCompiler.

    An engine holds its weights, so pieces share one where they compute the same with the very same weights: the prologue of all virtual
    ranks. Kept as long as a program calls it; a weight that was assigned, or edited in place, is another engine.

    Args:
        builder: of each.
        plan: its capacity is what engines are built for.
    """

    unit = "engine"

    def __init__(self, builder: EngineBuilder, plan: HelixPlan):
        self._builder = builder
        options = plan.options
        self._most = {HINT_B: options.max_batch_size, HINT_T: min(MAX_CHUNK, options.max_seq_len, plan.longest_step)}
        self._known: WeakValueDictionary[str, _Built] = WeakValueDictionary()

    def is_known(self, call: SegmentCall) -> bool:
        """See SegmentCompiler."""
        return self._key(call) in self._known

    def code(self, call: SegmentCall) -> _Built:
        """See SegmentCompiler."""
        key = self._key(call)
        with CAPTURING:  # torch.export patches what all threads share
            built = self._known.get(key)
            if built is None:
                self._known[key] = built = self._build(call)
        return built

    def made_for(self, ranks: Sequence[Rank]) -> tuple[Any, ...]:
        """How often each weight was written: an engine has a copy."""
        return tuple(0 if t.is_inference() else t._version for rank in ranks for t in rank.params.values())

    def _key(self, call: SegmentCall) -> str:
        weights = [(place, *state_of(tensor), tensor.device) for place, tensor in sorted(call.bound.items())]
        return hashlib.sha256(f"{segment_key(call.segment, call.bound)} {weights}".encode()).hexdigest()

    def _build(self, call: SegmentCall) -> _Built:
        free = [place for place in range(len(placeholders(call.segment.graph))) if place not in call.bound]
        with _disable_current_modes(), torch.inference_mode(False), torch.no_grad():
            program, inputs = export_piece(call.segment, call.bound, self._most, call.where)
            engine = self._builder(program, inputs, call.where)
        return _Built(engine, free, inputs, [*call.bound.values()], call.where)


class _Built:
    """An engine, as a program calls it: with all tensors of the piece, weights among them.

    Args:
        held: its weights: their addresses are a part of what it is known by.
    """

    def __init__(
        self, engine: Engine, free: Sequence[int], inputs: Sequence[EngineInput], held: Sequence[Tensor], where: str
    ):
        self._engine, self._free, self._held, self._where = engine, free, held, where
        self._inputs = inputs
        self.__name__ = f"engine of {where}"

    def __call__(self, *tensors: Tensor) -> Sequence[Tensor]:
        """The values that the piece returns."""
        given = [tensors[place] for place in self._free]
        for tensor, expected in zip(given, self._inputs, strict=True):
            if any(map(operator.gt, tensor.shape, expected.largest)):
                raise RuntimeFault(
                    f"{self._where}: `{expected.name}` is {list(tensor.shape)}, and its engine was built for up to "
                    f"{list(expected.largest)}; feed the prompt in shorter steps"
                )
        result = self._engine(*given)
        return (result,) if isinstance(result, Tensor) else tuple(result)


def export_piece(
    piece: fx.GraphModule, bound: Mapping[int, Tensor], most: Mapping[int, int], where: str
) -> tuple[ExportedProgram, list[EngineInput]]:
    """A piece as a program of free B and T whose weights are its own.

    Args:
        piece: takes and returns tensors alone.
        bound: its weights, by place.
        most: the largest B and T, by their hints.
        where: for messages.

    Raises:
        LoweringError: torch.export does not take it, or fixes a size.
    """
    dims = {hint: Dim(name, min=1, max=most[hint]) for hint, name in ((HINT_B, "B"), (HINT_T, "T")) if most[hint] > 1}
    module, free = _with_weights(piece, bound)
    examples, shapes, inputs = list[Tensor](), list[dict[int, Any]](), list[EngineInput]()

    def sized(node: fx.Node, of: Mapping[int, int]) -> tuple[int, ...]:
        return tuple(of[hint_of(s)] if isinstance(s, torch.SymInt) else s for s in node.meta["val"].shape)

    for node in free:
        value = node.meta["val"]
        tried = {hint: min(hint, largest) for hint, largest in most.items()}  # 1 would be fixed
        examples.append(torch.zeros(sized(node, tried), dtype=value.dtype, device=_device(value, bound)))
        found = {d: dims.get(hint_of(s)) for d, s in enumerate(value.shape) if isinstance(s, torch.SymInt)}
        shapes.append({d: dim for d, dim in found.items() if dim is not None})
        usual = {HINT_B: most[HINT_B], HINT_T: 1}
        inputs.append(
            EngineInput(
                node.name, value.dtype, sized(node, dict.fromkeys(most, 1)), sized(node, usual), sized(node, most)
            )
        )
    try:
        program = torch.export.export(module, tuple(examples), dynamic_shapes=tuple(shapes))
    except Exception as error:  # torch.export's own classes are many
        first = (str(error).strip() or "no message").split("\n")[0]
        raise LoweringError(
            f"{where}: torch.export does not take this piece: {type(error).__name__}: {first}; use lower='inductor'"
        ) from error
    return program, inputs


def _device(value: Tensor, bound: Mapping[int, Tensor]) -> torch.device:
    """Where its weights are: graphs of a capture may say another place."""
    return next((tensor.device for tensor in bound.values()), value.device)


def _with_weights(piece: fx.GraphModule, bound: Mapping[int, Tensor]) -> tuple[fx.GraphModule, list[fx.Node]]:
    """The piece with what is bound as its own buffers, and the placeholders that are left."""
    root, graph, new, free = nn.Module(), fx.Graph(), dict[fx.Node, fx.Node](), list[fx.Node]()
    for place, node in enumerate(placeholders(piece.graph)):
        if place in bound:
            continue
        new[node] = graph.placeholder(node.name)
        free.append(node)
    for place, node in enumerate(placeholders(piece.graph)):
        if place in bound:
            root.register_buffer(f"weight_{place}", bound[place])
            new[node] = graph.get_attr(f"weight_{place}")
    for node in piece.graph.nodes:
        if node.op != "placeholder":
            new[node] = graph.node_copy(node, new.__getitem__)
    return fx.GraphModule(root, graph), free
