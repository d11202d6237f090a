"""Code for segments, by torch's Inductor: once for each that differs, whatever rank, layer, module or world calls it.

What is packed, merged and scaled around the exchange is written out in torch's own ops first, so that it is fused with its
neighbours; attention, append and experts stay calls of their ops. Code for any B and T: no guard is left that would ask at a step,
so what tracing assumed of the sizes is tried here with others.
"""

from __future__ import annotations

import hashlib
import logging
import shutil
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, fx
from torch._dynamo.eval_frame import innermost_fn
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv, statically_known_true
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes, _get_current_dispatch_mode_stack
from torch.utils._sympy.functions import FloorDiv

from helix_compile.capture.model import CAPTURING
from helix_compile.errors import LoweringError, LoweringUnavailable
from helix_compile.ir.fakes import FRESH_B, FreshSizes
from helix_compile.ir.graph import input_ref, placeholders, ring_name
from helix_compile.ir.ops import overload
from helix_compile.ir.sizes import HINT_S, HINT_T, size_text
from helix_compile.kernels.ops import HELIX_OPS
from helix_compile.worlds.program import SegmentCall

Code = Callable[..., Sequence[Any]]


class Inductor:
    """Code by Inductor. See SegmentCompiler."""

    unit = "segment"

    def is_known(self, call: SegmentCall) -> bool:
        """See SegmentCompiler."""
        return is_known(call.segment, call.bound)

    def code(self, call: SegmentCall) -> Code:
        """See SegmentCompiler."""
        return code_of(call.segment, call.bound, call.where)

    def made_for(self, ranks: Sequence[Any]) -> tuple[Any, ...]:
        """The dispatch modes around the caller."""
        return open_modes()


class _HoldsForSomeSizes(LoweringError):
    """Code that relies on a size that the graph leaves open."""


# fused with what is around them: none is worth a call
WRITTEN_OUT = (
    "shard_index",
    "first_visible",
    "heads_of_rank",
    "embed_rows",
    "best_word",
    "best_of_words",
    "pack_heads",
    "unpack_heads",
    "merge_lse",
    "total_lse",
    "apply_sinks",
    "rescale_by_lse",
    "rows_of_part",
    "place_rows",
)


class _TablesAsTheyAre(CustomGraphPass):
    """On a CPU cos and sin of torch and of Inductor's code differ in the last digit, one value of float32 in four.

    Every head of every layer reads the tables of positions: what computes them stays calls of torch's own functions. So do exp and
    log of what integers alone give (temperatures that grow with the position); those of activations are fused.
    """

    def __call__(self, graph: fx.Graph) -> None:
        """Mark them for Inductor; `graph` is what it will write code for."""
        aten, of_integers = torch.ops.aten, set[fx.Node]()
        for node in graph.nodes:
            value = node.meta.get("val")
            if node.op == "placeholder":
                if not isinstance(value, Tensor) or not value.is_floating_point():
                    of_integers.add(node)
                continue
            if all(source in of_integers for source in node.all_input_nodes):
                of_integers.add(node)
            rounds = node.target in (aten.cos.default, aten.sin.default)
            rounds |= node in of_integers and node.target in (aten.exp.default, aten.log.default)
            if rounds and isinstance(value, Tensor) and value.device.type == "cpu" and value.dtype == torch.float32:
                node.meta["should_fallback"] = True

    def uuid(self) -> bytes:
        """Part of the key by which Inductor keeps code on disk."""
        return get_hash_for_files((__file__,))


# bfloat16 and float16 rounded where the ops alone would round: what is compiled and what is interpreted are equal bit for bit
# on as many threads as torch has when it runs, not when it was compiled
_OPTIONS = {
    "emulate_precision_casts": True,
    "compile_threads": 1,
    "cpp.dynamic_threads": True,
    "post_grad_custom_post_pass": _TablesAsTheyAre(),
}
# on a CPU what calls the kernels is C++ too: an eighth of a small step less, for a build that takes up to a quarter longer
_ON_CPU = {"cpp_wrapper": True}
_TRIED = ((1, 1, 0), (1, 5, 3), (3, 1, 7), (3, 4, 1), (8, 1, 4096), (2, 512, 0))  # B, T, S
_KEPT = 512
_CODE: OrderedDict[str, Code] = OrderedDict()


def check_inductor(device: torch.device) -> None:
    """Raise LoweringUnavailable where Inductor can't compile: before anything is captured."""
    if device.type in ("cpu", "meta"):
        from torch._inductor import config, exc

        known = config.cpp.cxx
        names = [n for n in (known if isinstance(known, (tuple, list)) else [known]) if n]
        try:
            from torch._inductor.cpp_builder import get_cpp_compiler

            found = shutil.which(get_cpp_compiler()) is not None
        except (exc.InvalidCxxCompiler, OSError):
            found = False
        if not found:
            raise LoweringUnavailable(
                f"lower='inductor' compiles C++ on a CPU and finds no compiler (looked for {', '.join(names) or 'g++'}); install "
                "g++, or set CXX, or use lower='reference'"
            )


def code_of(segment: fx.GraphModule, bound: Mapping[int, Any], name: str) -> Code:
    """What computes `segment`; compiled unless one like it is known.

    Dispatch modes that are open now are part of it: what they would change of an op is changed in the code.

    Args:
        segment: takes and returns tensors alone.
        bound: arguments that are known already, by place: their strides are relied on.
        name: for messages.

    Raises:
        LoweringError: Inductor can't compile it, or code for any B and T would differ from the graph.
    """
    key = segment_key(segment, bound)
    with CAPTURING:  # a trace patches what all threads share
        if key not in _CODE:
            modes = list(_get_current_dispatch_mode_stack())
            with _disable_current_modes():
                try:
                    code = _compile(segment, bound, name, modes)
                except _HoldsForSomeSizes:  # of sparse attention: k is the lesser of top_k and the slots that there are
                    code = _compile(segment, bound, name, modes, pages_open=False)
                _CODE[key] = _of_parts(segment, code)
            if len(_CODE) > _KEPT:
                _CODE.popitem(last=False)
        _CODE.move_to_end(key)
        return _CODE[key]


def open_modes() -> tuple[str, ...]:
    """The dispatch modes around the caller, with what they were told: code is made for these."""
    return tuple(
        f"{type(mode).__qualname__} {sorted((k, repr(v)) for k, v in vars(mode).items() if not k.startswith(('_', 'old_')))}"
        for mode in _get_current_dispatch_mode_stack()
    )


def is_known(segment: fx.GraphModule, bound: Mapping[int, Any]) -> bool:
    """Is there code for it already?"""
    return segment_key(segment, bound) in _CODE


def segment_key(segment: fx.GraphModule, bound: Mapping[int, Any]) -> str:
    """Equal for segments that compute the same on tensors of one layout. Nodes go by their place, not by name."""
    number: dict[fx.Node, int] = {}
    lines = list(open_modes())
    places = iter(range(len(segment.graph.nodes)))
    for node in segment.graph.nodes:
        number[node] = len(number)
        if node.op == "placeholder":
            value = bound.get(next(places), node.meta["val"])
            lines.append(_tensor_text(node, value))
        else:
            args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), lambda n: _Place(number[n]))
            lines.append(f"{node.op} {node.target} {args} {kwargs}")
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


class _Place(int):
    """A node, as text."""

    def __repr__(self) -> str:
        return f"%{int(self)}"


def _tensor_text(node: fx.Node, value: Tensor) -> str:
    shape, strides = map(size_text, node.meta["val"].shape), map(size_text, value.stride())
    return f"{value.dtype} {value.device} [{', '.join(shape)}] [{', '.join(strides)}] {_open_dim(node)}"


def _open_dim(node: fx.Node) -> int | None:
    """Of a cache the pages, of a page table those of a sequence: a capacity, which the code does not rely on."""
    ref = input_ref(node)
    if ref.kind == "cache":
        return 0
    return 1 if ref.name == "page_table" or ref.name.startswith(ring_name("table")) else None


def references() -> dict[Any, Any]:
    """Overload -> what computes it in torch's own ops, of each op of WRITTEN_OUT."""
    return {overload(op.name): op.function for op in HELIX_OPS if op.name.split(".")[0] in WRITTEN_OUT}


def _narrow_bmm(a: Tensor, b: Tensor) -> Tensor:
    """On a CPU Inductor writes out a product of one row or one column: in 16 bits each term would be rounded before the sum."""
    one = statically_known_true(a.shape[1] == 1) or statically_known_true(b.shape[2] == 1)
    if not one or a.device.type != "cpu" or a.dtype not in (torch.bfloat16, torch.float16):
        return NotImplemented
    return torch.bmm(a.float(), b.float()).to(a.dtype)


def _compile(
    segment: fx.GraphModule,
    bound: Mapping[int, Any],
    name: str,
    modes: Sequence[TorchDispatchMode],
    pages_open: bool = True,
) -> Code:
    import torch._inductor

    sizes = FreshSizes()
    fakes = [
        sizes.tensor(
            p.meta["val"],
            bound[i].stride() if i in bound else None,
            _open_dim(p) if pages_open or input_ref(p).kind == "cache" else None,
        )
        for i, p in enumerate(placeholders(segment.graph))
    ]

    def computed(*tensors: Tensor) -> Any:
        with ExitStack() as inside:  # nearer than the trace: what is recorded is what they make of an op
            for mode in modes:
                inside.enter_context(mode)
            return segment(*tensors)

    try:
        with torch.no_grad():
            table = {**references(), torch.ops.aten.bmm.default: _narrow_bmm}
            traced = make_fx(computed, decomposition_table=table, tracing_mode="symbolic")(*fakes)
            examples = [n.meta["val"] for n in placeholders(traced.graph)]
            on_cpu = all(example.device.type == "cpu" for example in examples)
            options = {"config_patches": {**_OPTIONS, **(_ON_CPU if on_cpu else {})}}
            with _without_shim_warnings():
                code = torch._inductor.standalone_compile(
                    traced, examples, dynamic_shapes="from_graph", options=options
                )
    except Exception as error:  # Inductor's own classes are many
        first = str(error).strip().split("\n")[0]
        raise LoweringError(
            f"{name}: Inductor does not compile this segment: {type(error).__name__}: {first}; lower='reference' computes it as it is"
        ) from error
    check_sizes(sizes.environment, name)
    # without what Dynamo puts around it: a tenth of a ms a call
    return innermost_fn(getattr(code, "_compiled_fn", code))


@contextmanager
def _without_shim_warnings() -> Iterator[None]:
    """C++ calls cos and sin through torch's dispatcher, as is meant here; Inductor says so for each."""
    log = logging.getLogger("torch._inductor.ir")

    def keep(record: logging.LogRecord) -> bool:
        return "c-shim" not in str(record.msg)

    log.addFilter(keep)
    try:
        yield
    finally:
        log.removeFilter(keep)


def _of_parts(segment: fx.GraphModule, code: Code) -> Code:
    """Code of a segment that knows parts of a batch; where these are more than its sequences the graph: code divides by their rows."""
    values = [v for n in segment.graph.nodes if isinstance(v := n.meta.get("val"), Tensor)]
    shapes: list[Any] = [v.shape for v in values]  # torch's stubs know no symbols in them
    sizes = [size.node.expr for shape in shapes for size in shape if isinstance(size, torch.SymInt)]
    cuts = [cut for size in sizes for cut in size.atoms(FloorDiv) if len(cut.args[0].free_symbols) == 1]
    rows = {symbol for cut in cuts for symbol in cut.args[0].free_symbols}
    shown = [
        (place, dim)
        for place, taken in enumerate(placeholders(segment.graph))
        for dim, size in enumerate(taken.meta["val"].shape)
        if isinstance(size, torch.SymInt) and size.node.expr in rows
    ]
    if not shown:
        return code
    (place, dim), parts = shown[0], max(int(cut.args[1]) for cut in cuts)
    return lambda *tensors: (code if tensors[place].shape[dim] >= parts else segment)(*tensors)


def check_sizes(environment: ShapeEnv, name: str) -> None:
    """What was assumed of sizes that the graph leaves open must hold for all."""
    hints = getattr(environment, "backed_var_to_val", None) or environment.var_to_val  # torch 2.13 renamed it
    if fixed := [f"{s} = {known}" for s, known in environment.replacements.items() if s in hints]:
        raise _HoldsForSomeSizes(
            f"{name}: Inductor's code would hold for some sizes alone ({', '.join(fixed)}); use lower='reference'"
        )
    place = {FRESH_B: 0, HINT_T: 1, HINT_S: 2}
    for guard in environment.guards:
        # code is made for sizes >= 2, and computes 1 too: nothing in it is broadcast by a size. And for parts of a batch that have as many
        # rows, of as many sequences as that takes: it computes less too
        least = 2 * max((int(f.args[1]) for f in guard.expr.atoms(FloorDiv) if f.args[1].is_Integer), default=1)
        for tried in _TRIED:
            numbers = {s: max(2, tried[place[int(h)]]) if int(h) in place else int(h) for s, h in hints.items()}
            numbers |= {s: max(least + n % 2, n) for s, n in numbers.items() if int(hints[s]) == FRESH_B}
            if guard.expr.subs(numbers) == False:  # noqa: E712  sympy's own false
                raise LoweringError(
                    f"{name}: Inductor's code assumes {guard.expr}, which B, T, S = {tried} does not meet; use lower='reference'"
                )
