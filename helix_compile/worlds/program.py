"""One rank's step as a flat list of calls: what a walk would look up at every node is looked up once.

Bodies are followed into, parameters and caches are bound, a segment is one call. What is left of a step are calls of segments, of
the few ops between them, and the collectives, started and waited for in the order of the graph.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from functools import partial
from operator import attrgetter
from types import BuiltinFunctionType
from typing import Any, NamedTuple

from torch import Tensor, fx

from helix_compile.errors import RuntimeFault
from helix_compile.ir.collectives import COLLECTIVE_OF, WAIT
from helix_compile.ir.graph import input_ref, is_call, placeholders
from helix_compile.ir.host_reads import foreign_code, host_read, host_reads
from helix_compile.ir.leaves import Leaf
from helix_compile.ir.sizes import shape_text
from helix_compile.worlds.tape import Tape
from helix_compile.worlds.walk import Pending, Post, rank_fault

_STEP = "input"  # the kind of an outer graph's inputs that every step brings anew


class SegmentCall(NamedTuple):
    """A segment where it is called.

    Attributes:
        where: of the call, as faults name it.
        segment: its graph.
        bound: its arguments that never change, by place: parameters, caches, numbers of a rank.
    """

    where: str
    segment: fx.GraphModule
    bound: dict[int, Any]


class _Do(NamedTuple):
    """One call.

    Attributes:
        call: what is called; of a collective its name, of a wait None.
        takes: registers of its arguments.
        gives: registers of what it returns: one, or one for each item of a tuple (0: not read).
        dead: registers that nobody reads afterwards.
        where: the node, as faults name it.
        apart: why a piece of a tape can't hold it; "" if it can, None: it launches nothing.
        later: what is called from the second step on, where this is another.
    """

    call: Any
    takes: tuple[int, ...]
    gives: tuple[int, ...] | int
    dead: tuple[int, ...]
    where: str
    apart: str | None = ""
    later: Any = None


class Program:
    """The step of one rank.

    Attributes:
        rank: whose.
        inputs: name of a step's input -> register.
        others: code in it that is not ours, which nothing that replays a step can know; "" if there is none.

    Args:
        rank: whose.
        stage: an outer graph whose bodies are cut in segments.
        bound: its inputs that never change, by node.
        code: a segment where it is called -> what computes it: takes its tensors, returns a tuple. Not asked where none is cut.
    """

    def __init__(
        self,
        rank: int,
        stage: fx.GraphModule,
        bound: Mapping[fx.Node, Any],
        code: Callable[[SegmentCall], Callable[..., Any]],
    ):
        self.rank, self.others = rank, ""
        self.inputs: dict[str, int] = {}
        self._registers: list[Any] = [None]
        self._steps: list[_Do] = []
        self._code = code
        self._pending: dict[int, str] = {}  # register of a collective that was started -> which
        self._unsure: set[int] = set()  # registers of what functions give: of any dtype, at any step
        self._is_first = True
        values: list[Any] = []
        for node in placeholders(stage.graph):
            if node in bound:
                values.append(self._constant(bound[node]))
            else:
                kind, name = input_ref(node)
                assert kind == _STEP, (kind, name)
                self.inputs[name] = self._new()
                values.append(self.inputs[name])
        self._output = self._flatten(stage, values, "")
        self._free_dead()

    @property
    def calls(self) -> int:
        """How many calls a step makes, collectives and their waits among them."""
        return len(self._steps)

    @property
    def held(self) -> list[Tensor]:
        """The tensors that it runs on at every step: parameters, caches, numbers of the rank, constants of graphs."""
        return [value for value in self._registers if isinstance(value, Tensor)]

    @property
    def apart(self) -> list[tuple[str, str]]:
        """(node, why) of the calls that no tape can hold."""
        return [(step.where, step.apart) for step in self._steps if step.apart]

    def walk(
        self, step: Mapping[str, Tensor], post: Post, tape: Tape | None = None
    ) -> Generator[tuple[Pending, str], Tensor | None, Any]:
        """One step; yields where it waits, wants the value sent back, and returns the output. As Walk.graph().

        Args:
            tape: records it.
        """
        registers = self._registers.copy()
        for name, register in self.inputs.items():
            registers[register] = step[name]
        for call, takes, gives, dead, where, apart, _ in self._steps:
            arguments = [registers[i] for i in takes]
            result: Any
            if call is None:
                (pending,) = arguments
                if not isinstance(pending, Pending):
                    raise rank_fault(self.rank, where, "wait_tensor on a value that no collective is computing")
                received = yield pending, where
                result = received
            elif isinstance(call, str):
                result = post(call, tuple(arguments), where)
            else:
                try:
                    if tape is None or apart is None:
                        result = call(*arguments)
                    elif apart:
                        result = tape.apart(partial(self._guarded, call, where), arguments)
                    else:
                        result = tape.launch(call, arguments)
                except RuntimeFault:
                    raise
                except Exception as error:
                    raise rank_fault(self.rank, where, f"{_name(call)}: {type(error).__name__}: {error}") from error
            if isinstance(gives, int):
                registers[gives] = result
            else:
                for register, value in zip(gives, result, strict=True):
                    registers[register] = value
            for register in dead:
                registers[register] = None
        if self._is_first:
            self._is_first = False
            self._steps = [step._replace(call=step.later) if step.later else step for step in self._steps]
        return registers[self._output]

    def _guarded(self, call: Any, where: str, *arguments: Any) -> Any:
        """What a tape calls at later steps."""
        try:
            return call(*arguments)
        except RuntimeFault:
            raise
        except Exception as error:
            raise rank_fault(self.rank, where, f"{_name(call)}: {type(error).__name__}: {error}") from error

    def _new(self) -> int:
        self._registers.append(None)
        return len(self._registers) - 1

    def _constant(self, value: Any) -> int:
        self._registers.append(value)
        return len(self._registers) - 1

    def _flatten(self, module: fx.GraphModule, inputs: Sequence[Any], path: str) -> Any:
        """Calls of `module`; its output as a register, or a tuple of them."""
        at: dict[fx.Node, Any] = dict(zip(placeholders(module.graph), inputs, strict=True))
        for node in module.graph.nodes:
            where = f"{path}{node.name}"
            if node.op == "output":
                return fx.map_arg(node.args[0], at.__getitem__)
            if node.op == "get_attr":
                at[node] = self._constant(attrgetter(str(node.target))(module))
            elif node.op == "call_module":
                at[node] = self._call_module(module, node, at, where)
            elif is_call(node, operator.getitem) and isinstance(at[node.args[0]], (tuple, list)):
                at[node] = at[node.args[0]][node.args[1]]
            elif node.op == "call_function":
                at[node] = self._call_function(node, at, where)
            elif node.op != "placeholder":
                raise rank_fault(self.rank, where, f"a {node.op} node can't be run; use call_function")
        raise rank_fault(self.rank, path, "the graph has no output")

    def _call_module(self, module: fx.GraphModule, node: fx.Node, at: Mapping[fx.Node, Any], where: str) -> Any:
        called = module.get_submodule(str(node.target))
        if isinstance(called, Leaf):
            return self._add(called, node, at, where)
        assert isinstance(called, fx.GraphModule)
        if "segment" not in node.meta:
            return self._flatten(called, [at[n] for n in node.args], f"{where}.")
        takes = self._not_pending(where, tuple(at[n] for n in node.args))
        known = {place: self._registers[i] for place, i in enumerate(takes) if self._registers[i] is not None}
        # what is closed, an exported program, shows none: load_exported() has held weights to the walk
        inputs = placeholders(called.graph)
        for place, value in known.items() if inputs else ():
            self._check_bound(where, inputs[place], value)
        brought = [(place, n) for place, n in enumerate(inputs) if place not in known]
        gives = tuple(self._new() for _ in node.meta["val"])
        apart = next((f"it holds `{name}`: {why}" for name, why in host_reads(called)), "")
        code = self._code(SegmentCall(where, called, known))
        unsure = [(place, n) for place, n in brought if takes[place] in self._unsure]
        later = self._of_dtypes(code, where, unsure) if unsure else code
        self._steps.append(_Do(self._of_dtypes(code, where, brought), takes, gives, (), where, apart, later))
        return gives

    def _check_bound(self, where: str, taken: fx.Node, value: Any) -> None:
        """What is given once and for all must be what the graph says: code reads memory as that."""
        expected = taken.meta.get("val")
        if not (isinstance(value, Tensor) and isinstance(expected, Tensor)):
            return
        first = int(input_ref(taken).kind == "cache")  # how many pages it has is left open
        sizes = zip(expected.shape[first:], value.shape[first:], strict=False)
        fits = value.dtype == expected.dtype and value.device.type == expected.device.type
        fits = fits and (not first or value.is_contiguous())
        if not fits or value.dim() != expected.dim() or any(isinstance(n, int) and n != m for n, m in sizes):
            what = " ".join(filter(None, input_ref(taken))) or f"constant {taken.name}"
            raise rank_fault(
                self.rank,
                where,
                f"{what} is {value.dtype} {list(value.shape)} with strides {list(value.stride())} on {value.device.type}; compiled for {expected.dtype} "
                f"{shape_text(expected)} on {expected.device.type}: give it one like that, or run_stage('lowered', ...), which computes "
                "node by node",
            )

    def _of_dtypes(
        self, code: Callable[..., Any], where: str, brought: list[tuple[int, fx.Node]]
    ) -> Callable[..., Any]:
        """`code`, where what a step brings has the dtypes that the graph says.

        Code gives what it gave before, so one step shows that; what a user's function gives is only known when it did.
        """
        wanted = [(place, n.meta["val"].dtype) for place, n in brought if isinstance(n.meta.get("val"), Tensor)]

        def checked(*tensors: Any) -> Any:
            for place, dtype in wanted:
                if tensors[place].dtype is not dtype:
                    name = dict(brought)[place].name
                    raise rank_fault(
                        self.rank,
                        where,
                        f"`{name}` is {tensors[place].dtype}, and the graph says {dtype}: set its node's meta['val']",
                    )
            return code(*tensors)

        checked.__name__ = _name(code)
        return checked

    def _call_function(self, node: fx.Node, at: Mapping[fx.Node, Any], where: str) -> int:
        if node.target is WAIT:
            return self._add(None, node, at, where)
        if node.target in COLLECTIVE_OF:
            name = COLLECTIVE_OF[node.target].name
            register = self._add(name, node, at, where)
            self._pending[register] = name
            return register
        return self._add(node.target, node, at, where)

    def _add(self, call: Any, node: fx.Node, at: Mapping[fx.Node, Any], where: str) -> int:
        if call is not None and not isinstance(call, str):
            self.others = self.others or foreign_code(call)
        nested = node.kwargs or any(isinstance(a, (list, tuple)) and _has_nodes(a) for a in node.args)
        if nested:
            sources = node.all_input_nodes
            target, args, kwargs = call, node.args, node.kwargs

            def call(*values: Any) -> Any:
                value_of = dict(zip(sources, values, strict=True)).__getitem__
                return target(*fx.map_arg(args, value_of), **fx.map_arg(kwargs, value_of))

            call.__name__ = str(target)
            takes = tuple(at[n] for n in sources)
        else:
            takes = tuple(at[a] if isinstance(a, fx.Node) else self._constant(a) for a in node.args)
        if call is not None:
            self._not_pending(where, takes)
        gives = self._new()
        computes = call is not None and not isinstance(call, str)
        if computes or not self._unsure.isdisjoint(takes):
            self._unsure.add(gives)
        self._steps.append(_Do(call, takes, gives, (), where, host_read(node) if _launches(node) else None))
        return gives

    def _not_pending(self, where: str, takes: tuple[int, ...]) -> tuple[int, ...]:
        if early := [self._pending[i] for i in takes if i in self._pending]:
            raise rank_fault(self.rank, where, f"{early} used before wait_tensor")
        return takes

    def _free_dead(self) -> None:
        """A value is dropped behind its last reader; what is bound is the rank's own."""
        made = {i for step in self._steps for i in _registers_of(step.gives)}
        kept = set(_registers_of(self._output))
        last: dict[int, int] = {}
        for number, step in enumerate(self._steps):
            last |= dict.fromkeys((*step.takes, *_registers_of(step.gives)), number)
        dead: dict[int, list[int]] = {}
        for register, number in last.items():
            if register in made and register not in kept:
                dead.setdefault(number, []).append(register)
        self._steps = [step._replace(dead=tuple(dead.get(n, ()))) for n, step in enumerate(self._steps)]


def _registers_of(value: Any) -> Iterator[int]:
    if isinstance(value, int):
        yield value
    else:
        for item in value:
            yield from _registers_of(item)


def _launches(node: fx.Node) -> bool:
    """False for sizes and views: what they give is the same at every step of a shape."""
    if isinstance(node.target, BuiltinFunctionType) or getattr(node.target, "is_view", False):
        return False
    return isinstance(node.meta.get("val"), (Tensor, list, tuple)) or "val" not in node.meta


def _has_nodes(value: Any) -> bool:
    found: list[fx.Node] = []
    fx.map_arg(value, found.append)
    return bool(found)


def _name(call: Any) -> str:
    return str(getattr(call, "__name__", call) if not hasattr(call, "_schema") else call)
