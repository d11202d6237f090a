"""HELIX_DUMP_VALUES=dir: what each node of each rank computes in the first steps, for `helix-compile compare`.

    plan.json                     the plan of the module
    rank_R_step_S.safetensors     of each value up to WHOLE elements all; of a larger one SAMPLE at places that follow from its
                                  shape, and what lies on the rank of about SHARED of the whole value, which no layout changes
    rank_R_step_S.json            of each value: node, layer, shape, dtype, layout, norm, largest element; written last

A step's files come both or not at all. Values in layers are named by layer; parameters are written in step 0 alone, and
caches never: what is written to them is. The first module of a process that takes a step writes to dir, later ones to dir/module_2, ...
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor, fx
from torch.distributed.tensor.placement_types import Shard
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from helix_compile.errors import HelixError
from helix_compile.files import StagedFiles
from helix_compile.ir.collectives import WAIT
from helix_compile.ir.graph import input_ref, is_param, placeholders
from helix_compile.ir.leaves import Leaf
from helix_compile.ir.origin import CAPTURED, ORIGIN, SOURCE, STAGE
from helix_compile.ir.sizes import layout_text
from helix_compile.ir.stage import OUTER, body_of
from helix_compile.layout.degrees import HelixMesh
from helix_compile.layout.placement import parse_layout
from helix_compile.plan.helix_plan import HelixPlan

FOLDER, STEPS = "HELIX_DUMP_VALUES", "HELIX_DUMP_VALUES_STEPS"
DEFAULT_STEPS = 4
WHOLE, SAMPLE, SHARED = 1024, 64, 128
VERSION = 2
ATTENTION_OUTPUT, LAYER_OUTPUT, LOGITS, PARAMETER = "attn_out", "output", "logits", "parameter"


def layer_name(index: int) -> str:
    """How the values of a layer are named: "layer_3"."""
    return f"layer_{index}"


def file_stem(rank: int | str, step: int | str) -> str:
    """Name of a step's two files without their ends."""
    return f"rank_{rank}_step_{step}"


@cache
def sampled_places(shape: tuple[int, ...]) -> Tensor:
    """Flat indices of the elements that are kept of a value: the same for the same shape, in any run."""
    count = math.prod(shape)
    if count <= WHOLE:
        return torch.arange(count)
    # multiples of the golden ratio: spread evenly, and in step with no dim
    return torch.tensor(sorted((i * 0x9E3779B97F4A7C15 % 2**64) * count >> 64 for i in range(1, SAMPLE + 1)))


@cache
def shared_places(shape: tuple[int, ...]) -> Tensor:
    """Coordinates [n, dims] of elements of a whole value that are kept however it is cut and padded; n is about SHARED.

    Drawn in a cube whose sides are powers of two, one after the other: a shape that padding makes longer has the same
    places where both have elements, also where a side doubles (a coordinate there is the one here, or beyond).
    """
    bits = [(size - 1).bit_length() for size in shape]
    draws = math.ceil(SHARED * 2 ** sum(bits) / max(1, math.prod(shape)))
    drawn = ([_mixed(k, d) % 2**b for d, b in enumerate(bits)] for k in range(draws))
    kept = [at for at in drawn if all(c < size for c, size in zip(at, shape, strict=True))]
    return torch.tensor(kept, dtype=torch.int64).reshape(-1, len(shape))


def _mixed(k: int, dim: int) -> int:
    """64 bits that look drawn (splitmix64): another 64 for each draw and dim, the same in every run."""
    z = ((k << 8 | dim) + 1) * 0x9E3779B97F4A7C15 % 2**64
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ z >> 27) * 0x94D049BB133111EB % 2**64
    return z ^ z >> 31


class Cut(NamedTuple):
    """Which part of a value a rank has: the `place`-th of `parts` along `dim`."""

    dim: int
    parts: int
    place: int


def cut_of(layout: str, rank: int, mesh: HelixMesh) -> Cut | None:
    """The part that a rank has of a value of this layout; None where the rank has all of it, or parts are no shards."""
    try:
        placements = parse_layout(layout)
    except ValueError:  # "-", or a packed buffer
        return None
    if len(placements) != 1:
        return None
    ((axis, placement),) = placements.items()
    if type(placement) is not Shard or axis not in mesh.groups:
        return None
    group = next(group for group in mesh.groups[axis] if rank in group)
    return Cut(placement.dim, len(group), group.index(rank))


@cache
def kept_places(shape: tuple[int, ...], cut: Cut | None) -> Tensor:
    """Flat indices, ascending, of the elements that are kept of a rank's part of a value."""
    own = sampled_places(shape)
    if len(own) == math.prod(shape):
        return own
    dim, parts, place = cut or (0, 1, 0)
    at = shared_places(tuple(size * parts if d == dim else size for d, size in enumerate(shape)))
    first = torch.tensor([place * size if d == dim else 0 for d, size in enumerate(shape)])
    mine = at - first
    mine = mine[((mine >= 0) & (mine < torch.tensor(shape))).all(1)]
    return torch.cat([own, flat_places(mine, shape)]).unique()


def flat_places(at: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Flat indices [n] of coordinates [n, dims]."""
    flat = torch.zeros(len(at), dtype=torch.int64)
    for d, size in enumerate(shape):
        flat = flat * size + at[:, d]
    return flat


def token_dims(shape: tuple[int, ...], batch: int, tokens: int) -> tuple[int, ...]:
    """Where a value has its tokens: dims of B and T, the one dim of B * T, or () where it has a row for none."""
    for dims in ((0, 1), (0, 2), (1, 2)):
        enough = len(shape) > dims[1] and (dims == (0, 1) or len(shape) >= 4)
        if enough and (shape[dims[0]], shape[dims[1]]) == (batch, tokens):
            return dims
    return (0,) if len(shape) > 1 and shape[0] == batch * tokens else ()


@dataclass(frozen=True)
class ValueEntry:
    """What JSON says of a value; `place` is "outer" or a layer.

    Attributes:
        role: "attn_out" (its site in the layer behind it, from the second on), "output" of a layer, "logits", "parameter", or "".
        layout: how it lies over the ranks, as layout_text() has it; "-" where that is not known.
        norm: 2-norm of the finite elements; as `largest`, padding aside.
        largest: of the finite elements by magnitude.
        nonfinite: elements that are inf or NaN.
        reads: parameters and values of its graph that it is computed from.
        through: of a part that is no graph the narrowest dtype that it computes in, where that is not its own; else "".
    """

    place: str
    name: str
    role: str
    op: str
    shape: list[int]
    dtype: str
    layout: str
    norm: float
    largest: float
    nonfinite: int
    origin: list[str]
    source: str
    captured: bool
    reads: list[str]
    through: str = ""


_CLAIMED: dict[Path, int] = {}  # modules of this process that write below a folder: not another run's files


class ValueDump:
    """Where one module writes what it computes; recorder() once a step."""

    def __init__(self, folder: Path, steps: int, plan: HelixPlan):
        self._root, self._steps, self._plan = folder, steps, plan
        self._folder: Path | None = None
        self._taken = 0

    @classmethod
    def from_environment(cls, plan: HelixPlan) -> ValueDump | None:
        """None where HELIX_DUMP_VALUES is not set.

        Raises:
            HelixError: it is no folder, or has another run's values; HELIX_DUMP_VALUES_STEPS is no number of steps.
        """
        folder, text = os.environ.get(FOLDER), os.environ.get(STEPS, str(DEFAULT_STEPS))
        if not folder:
            return None
        if not text.isdecimal() or int(text) < 1:
            raise HelixError(f"{STEPS} must be a number of steps >= 1, got {text!r}")
        root = Path(folder).absolute()
        try:
            root.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise HelixError(f"{FOLDER}={folder}: can't be made a folder of values: {error}") from error
        if root not in _CLAIMED and any(root.glob(f"{file_stem('*', '*')}.json")):
            raise HelixError(f"{FOLDER}={folder}: holds the values of another run; choose another folder, or delete it")
        return cls(root, int(text), plan)

    def recorder(self, graph: fx.GraphModule, caches: list[Tensor], mask: Tensor, leads: bool) -> StepRecorder | None:
        """What the world calls after every node of the next step; None when enough steps are written.

        Args:
            graph: the outer graph that runs.
            caches: of all ranks in this process; nothing that lies in them is written.
            mask: [B, T], 1 = token.
            leads: this process writes the plan.
        """
        if self._taken >= self._steps:
            return None
        if self._folder is None:
            number = _CLAIMED[self._root] = _CLAIMED.get(self._root, 0) + 1
            self._folder = self._root if number == 1 else self._root / f"module_{number}"
            if leads:
                with StagedFiles(self._folder, "plan") as files:
                    files.write_text("plan.json", self._plan.to_json())
                    files.move()
        self._taken += 1
        return StepRecorder(self._folder, self._taken - 1, graph, self._plan, caches, mask)


class StepRecorder:
    """A hook of World.run: keeps a few elements of each value; write() when the step is done."""

    def __init__(
        self, folder: Path, step: int, graph: fx.GraphModule, plan: HelixPlan, caches: list[Tensor], mask: Tensor
    ):
        self._folder, self._step, self._mask = folder, step, mask
        self._padded = not bool(mask.bool().all())
        self._caches = {cache.untyped_storage().data_ptr() for cache in caches}
        self._outer = set(graph.graph.nodes)
        self._roles, self._mesh = _roles(graph, plan), HelixMesh(plan.layout)
        leaves = [body for body in graph.modules() if isinstance(body, Leaf)]
        self._inside = _Narrowest() if leaves else None
        self._per_rank = _per_rank(graph.graph)
        # a layer's nodes come before its call in the outer graph
        self._open: dict[int, list[tuple[fx.Node, ValueEntry, Tensor]]] = {}
        self._done: dict[int, list[tuple[ValueEntry, Tensor]]] = {}

    def __enter__(self) -> StepRecorder:
        """Around the step: what the user's own modules compute in is seen as they run."""
        if self._inside is not None:
            self._inside.__enter__()
        return self

    def __exit__(self, *raised: Any) -> None:
        if self._inside is not None:
            self._inside.__exit__(*raised)

    def __call__(self, rank: int, node: fx.Node, value: Any) -> None:
        """Keep what compare needs of one value."""
        through = self._inside.taken() if self._inside is not None and node.op == "call_module" else None
        self._keep(rank, node, value, through)
        if self._inside is not None:
            self._inside.taken()  # what was computed here

    def _keep(self, rank: int, node: fx.Node, value: Any, through: torch.dtype | None) -> None:
        done, body = self._done.setdefault(rank, []), self._open.setdefault(rank, [])
        if node in self._outer and node.op == "call_module":
            place = layer_name(node.meta["layer"])
            done += [(_placed(entry, place), kept) for _, entry, kept in body]
            body.clear()
        if not isinstance(value, Tensor) or not self._is_told(node, value):
            return
        entry, kept = self._summary(rank, node, value)
        if through is not None and through.itemsize < value.dtype.itemsize:
            entry = replace(entry, through=str(through).removeprefix("torch."))
        if node in self._outer:
            done.append((entry, kept))
        else:
            body.append((node, entry, kept))

    def write(self) -> None:
        """The files of every rank in this process.

        Raises:
            HelixError: the disk refuses; names the file.
        """
        for rank, values in self._done.items():
            stem = file_stem(rank, self._step)
            head = {"version": VERSION, "rank": rank, "step": self._step, "mask": self._mask.tolist()}
            text = json.dumps({**head, "values": [vars(entry) for entry, _ in values]}, separators=(",", ":"))
            tensors = {f"{entry.place}.{entry.name}": kept for entry, kept in values}
            with StagedFiles(self._folder, stem) as files:
                files.write(f"{stem}.safetensors", partial(save_file, tensors))
                files.write_text(f"{stem}.json", text)
                files.move()

    def _is_told(self, node: fx.Node, value: Tensor) -> bool:
        if node.op != "placeholder":
            return value.untyped_storage().data_ptr() not in self._caches
        if is_param(node):  # in the graph that computes with it
            reads = any(user.op != "call_module" for user in node.users)
            return self._step == 0 and reads
        return input_ref(node).kind == "input"

    def _summary(self, rank: int, node: fx.Node, value: Tensor) -> tuple[ValueEntry, Tensor]:
        value = value.detach()
        value = torch.view_as_real(value.resolve_conj()) if value.is_complex() else value
        shape, layout = tuple(value.shape), self._layout(node)
        places = kept_places(shape, cut_of(layout, rank, self._mesh)).to(value.device)
        kept = value.reshape(-1) if len(places) == value.numel() else value[torch.unravel_index(places, shape)]
        is_call = node.op == "call_module" and node in self._outer  # in a body it is a part that is no graph
        parameter = is_param(node)
        norm, largest, nonfinite = _figures(value if parameter else self._unpadded(value))
        entry = ValueEntry(
            place=layer_name(node.meta["layer"]) if is_call else OUTER,
            name=LAYER_OUTPUT if is_call else node.name,
            role=LAYER_OUTPUT if is_call else PARAMETER if parameter else self._roles.get(node, ""),
            op="" if node.op == "placeholder" else str(node.target),
            shape=list(shape),
            dtype=str(value.dtype).removeprefix("torch."),
            layout=layout,
            norm=norm,
            largest=largest,
            nonfinite=nonfinite,
            origin=list(node.meta.get(ORIGIN, [])),
            source=node.meta.get(SOURCE, ""),
            captured=node.meta.get(STAGE) == CAPTURED,
            reads=[n.name for n in node.all_input_nodes] if not is_call else [],
        )
        return entry, kept.to("cpu", copy=True).contiguous()

    def _layout(self, node: fx.Node) -> str:
        if node not in self._outer:
            return layout_text(node)
        return "kvp:L" if node in self._per_rank else "R"

    def _unpadded(self, value: Tensor) -> Tensor:
        dims = token_dims(tuple(value.shape), *self._mask.shape) if self._padded else ()
        if not dims:
            return value
        kept = self._mask.bool().to(value.device)
        return value.movedim(dims, (0, 1))[kept] if len(dims) == 2 else value[kept.flatten()]


def _placed(entry: ValueEntry, place: str) -> ValueEntry:
    return replace(entry, place=place)


class _Narrowest(TorchDispatchMode):
    """The narrowest floating-point dtype that operators gave since it was asked last."""

    def __init__(self) -> None:
        super().__init__()
        self._dtype: torch.dtype | None = None

    def taken(self) -> torch.dtype | None:
        """None where there was none."""
        dtype, self._dtype = self._dtype, None
        return dtype

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.is_floating_point():
                known = self._dtype
                self._dtype = tensor.dtype if known is None or tensor.dtype.itemsize < known.itemsize else known
        return out


def _figures(value: Tensor) -> tuple[float, float, int]:
    """2-norm and largest magnitude of the finite elements, and how many are not."""
    if value.numel() == 0:
        return 0.0, 0.0, 0
    if not value.is_floating_point():
        value = value.double()
    elif value.dtype.itemsize == 1:  # float8 has no arithmetic
        value = value.float()
    largest, nonfinite = _largest(value), 0
    if not math.isfinite(largest):
        finite = value.isfinite()
        nonfinite = value.numel() - int(finite.sum())
        value = value[finite]
        largest = _largest(value) if value.numel() else 0.0
    # a large weight is not copied for the sake of its norm's last digits
    wide = torch.float64 if value.dtype == torch.float64 or value.numel() <= 2**24 else torch.float32
    return float(torch.linalg.vector_norm(value, dtype=wide)), largest, nonfinite


def _largest(value: Tensor) -> float:
    low, high = torch.aminmax(value)
    return float(torch.maximum(low.abs(), high.abs()))


def _roles(graph: fx.GraphModule, plan: HelixPlan) -> dict[fx.Node, str]:
    """Values that mean the same in every layout: attention outputs of the bodies, logits of the outer graph."""
    roles: dict[fx.Node, str] = {}
    output = next(n for n in graph.graph.nodes if n.op == "output").args[0]
    if isinstance(output, fx.Node):
        roles[output] = LOGITS
    targets = {str(n.target) for n in graph.graph.nodes if n.op == "call_module"}
    for body in (b for b in plan.bodies if b.name in targets):
        nodes = body_of(graph, body.name).graph
        for number, attention in enumerate(body.attentions):
            weight = next((n for n in placeholders(nodes) if input_ref(n).name == attention.output_weight), None)
            product = next(iter(weight.users), None) if weight is not None else None
            if product is not None and ORIGIN in product.meta:
                # the sum over ranks and the bias behind it stand for the same captured node
                last = [n for n in nodes.nodes if n.meta.get(ORIGIN) == product.meta[ORIGIN]][-1]
                roles[last] = ATTENTION_OUTPUT + (f"_{number}" if number else "")
    return roles


def _per_rank(outer: fx.Graph) -> set[fx.Node]:
    """Nodes around the layers that differ on each rank: what is computed from a rank's own number."""
    found: set[fx.Node] = set()
    for node in outer.nodes:
        cut = node.meta.get("sharded") and any(
            u.op == "call_function" for u in node.users
        )  # by no layer: embedding, head
        own = node.op == "placeholder" and (cut or input_ref(node).name.endswith("_rank"))
        # what a collective gives is the same on every rank: a sum over all, or all parts
        made = node.op == "call_function" and node.target is not WAIT and any(n in found for n in node.all_input_nodes)
        if own or made:
            found.add(node)
    return found
