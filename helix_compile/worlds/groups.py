"""Which processes are the ranks, and the process group of each mesh axis: axis -> rank lists -> group.

Groups are deduplicated by rank set and kept with their parent group, so several Helix models in one process share
them, and the world axis is the parent group itself. Graphs never hold a group's name: it differs between ranks.
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Iterator, Mapping
from datetime import timedelta
from itertools import count
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from helix_compile.errors import LayoutError, LoweringUnavailable, PlanError
from helix_compile.layout.degrees import HelixMesh

AXES_OF_GRAPHS = ("kvp", "tpa", "world")
_TORCHRUN = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


# kept with a parent group: the groups made of it by global ranks, and the numbers of the worlds that run on it. Both go
# when torch destroys the parent: nothing here may hold the parent, or gloo's threads outlive it and abort at exit
_GROUPS: WeakKeyDictionary[Any, dict[tuple[int, ...], Any]] = WeakKeyDictionary()
_NUMBERS: WeakKeyDictionary[Any, Iterator[int]] = WeakKeyDictionary()


def open_parent(world: object, mesh: HelixMesh, device: torch.device, timeout: timedelta) -> Any:
    """The process group whose members are the ranks of `mesh`, in order.

    Args:
        world: "distributed" (torch's default group, made from torchrun's environment if there is none), a
            ProcessGroup, or a DeviceMesh, flattened.
        device: where the ranks compute; a new group is nccl on CUDA, else gloo.
        timeout: of a group made here. A group that exists keeps its own.

    Raises:
        LoweringUnavailable: "distributed" without a group and without torchrun's environment.
        LayoutError: another number of processes than ranks, or ranks that are out of order or lack this process.
        PlanError: `world` is none of the three.
    """
    if world == "distributed":
        parent = _default_group(mesh, device, timeout)
    elif isinstance(world, DeviceMesh):
        parent = _flattened(world, timeout)
    elif isinstance(world, dist.ProcessGroup):
        parent = world
    else:
        raise PlanError(
            f"option world={world!r} is unknown; expected 'auto', 'virtual', 'distributed', a ProcessGroup or a DeviceMesh"
        )
    _check_size(parent.size(), mesh, "the process group")
    if dist.get_backend(parent) == "nccl" and device.type == "cpu":
        raise LayoutError('the process group is nccl, the weights are on the CPU; pass device="cuda" or a gloo group')
    return parent


def early_store() -> Any:
    """A store that the ranks share before they meet: of torch's default group, else of torchrun's agent, else None."""
    if dist.group.WORLD is not None:
        return dist.group.WORLD.get_group_store()
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        return next(dist.rendezvous("env://"))[0]
    return None


def given_groups(groups: Mapping[str, Any], parent: Any, mesh: HelixMesh) -> dict[str, str]:
    """Axis -> name of the group that the caller has for it.

    Raises:
        LayoutError: an axis that graphs do not know, or a group of other ranks than the axis has.
    """
    everyone, names = dist.get_process_group_ranks(parent), {}
    for axis, group in groups.items():
        if axis not in AXES_OF_GRAPHS:
            raise LayoutError(f"group: axis {axis!r} is unknown; one of {', '.join(AXES_OF_GRAPHS)}")
        expected = [everyone[m] for m in mesh.members(axis, parent.rank())]
        if (got := dist.get_process_group_ranks(group)) != expected:
            raise LayoutError(f"group: that of axis {axis!r} has processes {got}, expected {expected}")
        names[axis] = str(group.group_name)
    return names


def axis_groups(
    parent: Any, mesh: HelixMesh, timeout: timedelta, given: Mapping[str, str] | None = None
) -> dict[str, str]:
    """Axis -> name of this rank's group, of those `given` or else one of ours; an axis of one rank has none. What is missing is made.

    Collective: every rank of `parent` calls it with the same mesh.
    """
    everyone = tuple(dist.get_process_group_ranks(parent))
    names = {}
    for axis in AXES_OF_GRAPHS:
        members = mesh.members(axis, parent.rank())
        if given and axis in given:
            names[axis] = given[axis]
        elif len(members) > 1:
            names[axis] = _group_of(parent, tuple(everyone[m] for m in members), timeout).group_name
    return names


def local_device(device: torch.device) -> torch.device:
    """A device "cuda" without an index is the GPU of torchrun's LOCAL_RANK."""
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return device


def _default_group(mesh: HelixMesh, device: torch.device, timeout: timedelta) -> Any:
    if not dist.is_initialized():
        if missing := [name for name in _TORCHRUN if name not in os.environ]:
            raise LoweringUnavailable(
                f'world="distributed": {", ".join(missing)} not set and no process group exists; start the script by '
                f'torchrun --nproc-per-node {mesh.world_size}, or use world="virtual", all ranks in this process'
            )
        _check_size(int(os.environ["WORLD_SIZE"]), mesh, "torchrun's WORLD_SIZE")
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timeout)
        atexit.register(_leave)
    return dist.group.WORLD


def _leave() -> None:
    """Close the group that was opened here, unless the user has."""
    if dist.is_initialized():
        dist.destroy_process_group()


def _check_size(processes: int, mesh: HelixMesh, what: str) -> None:
    if processes != mesh.world_size:
        layout = mesh.layout
        raise LayoutError(
            f"cp*tpa = {layout.kvp}*{layout.tpa} = {mesh.world_size} ranks, but {what} has {processes} processes; "
            f"start {mesh.world_size} processes, choose cp*tpa = {processes}, or pass a group of {mesh.world_size}"
        )


def _flattened(mesh: DeviceMesh, timeout: timedelta) -> Any:
    ranks = tuple(mesh.mesh.flatten().tolist())
    if list(ranks) != sorted(ranks):
        raise LayoutError(
            f"world: the DeviceMesh lists its ranks as {list(ranks)}; a process group orders them ascending, "
            "so rank r of Helix must be the r-th smallest: pass a mesh in ascending order"
        )
    if dist.get_rank() not in ranks:
        raise LayoutError(f"world: process {dist.get_rank()} is not in the DeviceMesh of ranks {list(ranks)}")
    return mesh.get_group() if mesh.ndim == 1 else _group_of(dist.group.WORLD, ranks, timeout)


def _group_of(parent: Any, ranks: tuple[int, ...], timeout: timedelta) -> Any:
    """The group of these global ranks; made once for a parent."""
    if ranks == tuple(dist.get_process_group_ranks(parent)):
        return parent
    known = _GROUPS.setdefault(parent, {})
    if ranks not in known:
        # only members call: a sibling group (another replica of the model) has other axes to make
        known[ranks] = dist.new_group(
            list(ranks), timeout=timeout, backend=dist.get_backend(parent), use_local_synchronization=True
        )
    return known[ranks]


def next_world(parent: Any) -> int:
    """Number of a new world on `parent`; equal on all ranks, which compile their models in one order."""
    return next(_NUMBERS.setdefault(parent, count(1)))
