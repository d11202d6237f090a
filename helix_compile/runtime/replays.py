"""Steps that are replayed: which shapes were recorded, on which inputs, and until when a recording holds.

A shape (the end of the graph, B, T) is run as it is when it comes first, recorded when it comes again, and replayed from then on. So
a length that comes once is not recorded, and each rank takes part in the same collectives whatever it has recorded. Inputs of a step are
copied to tensors that stay, outputs are copied out. A recording ends when anything that it was made of is another object, lies
elsewhere or otherwise: programs (made anew after an edit of graph or parameters), parameters, caches.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from helix_compile.config.options import HelixOptions
from helix_compile.errors import RuntimeFault
from helix_compile.ir.host_reads import what_is_read
from helix_compile.runtime.ends import KEPT as ENDS
from helix_compile.runtime.watch import layouts_of
from helix_compile.worlds.program import Program
from helix_compile.worlds.tape import Recorder, Tape
from helix_compile.worlds.world import World

RECORDED_TOKENS = 32  # T of the longest step that is recorded: a token with its drafts, not a prompt
KEPT = 8  # recordings of one module
_REMEMBERED = 64  # shapes that came once

_Key = tuple[Any, ...]


@dataclass(frozen=True)
class _Recording:
    """A step that was recorded.

    Attributes:
        held, layouts: the tensors that its programs run on, and where and how these lay.
        inputs: what the tape reads of a step, by name.
    """

    held: list[Tensor]
    layouts: list[list[Any]]
    inputs: dict[str, Tensor]
    tape: Tape

    @property
    def holds(self) -> bool:
        """Would the same programs run on the same memory now?"""
        return layouts_of(self.held) == self.layouts


class ReplayedSteps:
    """The recordings of one module.

    Args:
        recorder: makes pieces; of this module alone.
        world: runs the programs.
    """

    def __init__(self, recorder: Recorder, world: World):
        self._recorder, self._world = recorder, world
        self._programs: dict[str, list[Program]] = {}  # of each end; after an edit it is another list
        self._recordings: OrderedDict[_Key, _Recording] = OrderedDict()
        self._came: OrderedDict[_Key, None] = OrderedDict()

    @property
    def recordings(self) -> list[Tape]:
        """The tapes that are kept, the least recently used first."""
        return [recording.tape for recording in self._recordings.values()]

    def run(
        self, programs: list[Program], end: str, step: Mapping[str, Tensor], agreed: Mapping[str, Tensor]
    ) -> list[Any]:
        """A step as World.run_programs() takes it; outputs are the caller's own.

        Args:
            end: which end of the graph they run.
            step: its inputs, on the device or (but for input_ids) on the host.
        """
        B, T = step["input_ids"].shape
        others = any(program.others for program in programs)
        if others or T > RECORDED_TOKENS or _get_current_dispatch_mode_stack():  # a mode wants to see every op
            return self._world.run_programs(programs, step, agreed)
        if programs is not self._programs.get(end):
            self._forget_end(end)
            while len(self._programs) >= ENDS:
                self._forget_end(next(iter(self._programs)))
            self._programs[end] = programs
        key = _key(end, B, T)
        recording = self._recordings.get(key)
        if recording is not None and not recording.holds:
            self._forget([key])
            recording = None
        if recording is None and key not in self._came:
            self._came[key] = None
            if len(self._came) > _REMEMBERED:
                self._came.popitem(last=False)
            own = {name: value.clone() for name, value in step.items()}  # laid out as what is read later
            warmed: list[Any] = self._recorder.warm_up(lambda: self._world.run_programs(programs, own, agreed))
            return warmed
        if recording is None:
            recording = self._new(programs, step)
        _fill(recording.inputs, step)
        try:
            outputs = self._world.run_programs(programs, recording.inputs, agreed, recording.tape)
        except RuntimeFault as error:
            if recording.tape.is_done or not isinstance(error.__cause__, RuntimeError) or error.is_said:
                raise
            raise RuntimeFault(
                f"{error}; the step was being recorded in a CUDA graph: cuda_graphs=False launches it instead"
            ) from error
        self._recordings[key] = recording
        self._recordings.move_to_end(key)
        if len(self._recordings) > KEPT:
            self._forget([next(iter(self._recordings))])
        return _copied(outputs)

    def clear(self) -> None:
        """Forget every recording, and what came once."""
        self._forget([*self._recordings, *self._came])

    def _forget_end(self, end: str) -> None:
        self._forget([key for key in (*self._recordings, *self._came) if key[0] == end])
        self._programs.pop(end, None)

    def _forget(self, keys: Sequence[_Key]) -> None:
        """What is played again may be under way: it goes when that is done."""
        if any(key in self._recordings for key in keys):
            self._recorder.wait()
        for key in keys:
            self._recordings.pop(key, None)
            self._came.pop(key, None)

    def _new(self, programs: list[Program], step: Mapping[str, Tensor]) -> _Recording:
        held = [tensor for program in programs for tensor in program.held]
        names = {name for program in programs for name in program.inputs}
        with torch.inference_mode(False):  # written at steps in any mode
            inputs = {name: torch.empty_like(value) for name, value in step.items() if name in names}
        return _Recording(held, layouts_of(held), inputs, Tape(self._recorder))


def replay_facts(
    options: HelixOptions, device: torch.device, stage: fx.GraphModule, host_collectives: str
) -> dict[str, Any]:
    """Are steps replayed, why or why not, and what stands apart: node and reason. For reports.

    Args:
        stage: what runs: the lowered stage, or its segments.
        host_collectives: see World.
    """
    others, reads = what_is_read(stage)
    if not options.cuda_graphs:
        why = "cuda_graphs=False"
    elif options.builds_engines:
        why = "lower='tensorrt': no engine was recorded in a CUDA graph yet"
    elif device.type != "cuda":
        why = f"on {device.type}: CUDA graphs are a card's"
    elif others:
        why = f"{others}: nothing that replays a step can know what it does"
    else:
        apart = [{"node": node, "why": reason} for node, reason in reads]
        apart += [{"node": "collectives", "why": host_collectives}] if host_collectives else []
        how = "in pieces between calls that stand apart" if apart else "one graph a step"
        return {"used": True, "why": f"steps of up to {RECORDED_TOKENS} tokens a sequence, {how}", "apart": apart}
    return {"used": False, "why": why, "apart": []}


def _fill(places: Mapping[str, Tensor], step: Mapping[str, Tensor]) -> None:
    for name, place in places.items():
        place.copy_(step[name], non_blocking=True)


def _key(end: str, B: int, T: int) -> _Key:
    """What chooses the launches of a step besides the programs: its shape, and torch's own settings."""
    matmul = torch.backends.cuda.matmul
    return (
        end,
        B,
        T,
        torch.get_float32_matmul_precision(),
        torch.are_deterministic_algorithms_enabled(),
        matmul.allow_fp16_reduced_precision_reduction,
        matmul.allow_bf16_reduced_precision_reduction,
    )


def _copied(outputs: list[Any]) -> list[Any]:
    """Tensors of their own in place of what the next step writes over."""
    copies: dict[int, Tensor] = {}

    def copy(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if id(value) not in copies:
            copies[id(value)] = value.clone()
        return copies[id(value)]

    copied: list[Any] = pytree.tree_map(copy, outputs)
    return copied
