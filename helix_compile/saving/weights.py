"""The weights of a saved module: rank_R.safetensors and views.json.

A storage is kept once, in the file of the first rank that uses it, and views.json says which part each rank sees; so
a reload is bitwise: the same views on aligned memory. Ranks of their own processes keep compact pieces instead, and
what is replicated, in rank 0's file alone.
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from helix_compile.errors import HelixError
from helix_compile.files import StagedFiles
from helix_compile.ir.graph import input_ref, inputs_of
from helix_compile.runtime.claims import short_digest
from helix_compile.runtime.compiled import CompiledModule
from helix_compile.runtime.rank import Rank
from helix_compile.worlds.world import World


@dataclass(frozen=True)
class SavedWeights:
    """What this process writes.

    Attributes:
        files: file name -> storages as 1-D tensors.
        views: rank -> parameter -> file, storage, shape, stride, offset; of all ranks.
    """

    files: dict[str, dict[str, Tensor]]
    views: dict[str, Any]

    def write(self, files: StagedFiles) -> None:
        """This process's files."""
        for name, tensors in self.files.items():
            files.write(name, partial(save_file, tensors))


def gather_weights(compiled: CompiledModule) -> SavedWeights:
    """The weights of the ranks in this process, and every rank's views. Collective on real ranks."""
    if len(compiled.ranks) == compiled.plan.layout.world_size:
        return SavedWeights(*_storages(compiled.ranks))
    world, (rank,) = compiled.world, compiled.ranks
    everyone = world.gather_texts(json.dumps(_replicated(compiled, rank)))
    leaders, own = json.loads(everyone[0]), json.loads(everyone[rank.rank])
    shared = set() if world.is_leader else {n for n in own if leaders.get(n) == own[n]}
    pieces = {n: t for n, t in rank.params.items() if n not in shared}
    files, views = _pieces(rank.rank, pieces)
    texts = world.gather_texts(json.dumps([views, sorted(shared)]))
    said = [json.loads(text) for text in texts]
    common = said[0][0]
    everything = {str(r): {**views, **{name: common[name] for name in names}} for r, (views, names) in enumerate(said)}
    return SavedWeights(files, everything)


def _storages(ranks: list[Rank]) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """All ranks' whole storages, each once."""
    known: dict[tuple[int, torch.dtype], tuple[str, str]] = {}
    files: dict[str, dict[str, Tensor]] = {}
    views: dict[str, Any] = {}
    for rank in ranks:
        file = _file_of(rank.rank)
        files[file], views[str(rank.rank)] = {}, {}
        for name, tensor in rank.params.items():
            key = (tensor.untyped_storage().data_ptr(), tensor.dtype)
            if key not in known or tensor.numel() == 0:
                known[key] = (file, name)
                files[file][name] = _whole(tensor)
            views[str(rank.rank)][name] = _view(tensor, *known[key])
    return files, views


def _pieces(rank: int, params: dict[str, Tensor]) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """One rank's parameters as compact copies, a tied one once."""
    known: dict[tuple, str] = {}
    held: dict[str, Tensor] = {}
    views = {}
    for name, tensor in params.items():
        key = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        if key not in known or tensor.numel() == 0:
            known[key] = name
            held[name] = tensor.clone() if _is_part(tensor) else tensor
        views[name] = _view(held[known[key]], _file_of(rank), known[key])
    return {_file_of(rank): {name: _whole(t) for name, t in held.items()}}, views


def _replicated(compiled: CompiledModule, rank: Rank) -> dict[str, str]:
    """Digest of each parameter that the plan does not cut; an edit of one rank shows."""
    digests = {}
    for node in inputs_of(compiled.graph.graph, "param"):
        if not node.meta.get("sharded"):
            name = input_ref(node).name
            stored: Any = rank.params[name].cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
            digests[name] = hashlib.sha256(stored).hexdigest()
    return digests


def _file_of(rank: int) -> str:
    return f"rank_{rank}.safetensors"


def _whole(tensor: Tensor) -> Tensor:
    """The storage behind a tensor, 1-D, on the CPU."""
    whole = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    whole.set_(tensor.untyped_storage())
    return whole.cpu()


def _view(tensor: Tensor, file: str, storage: str) -> dict[str, Any]:
    return {
        "file": file,
        "storage": storage,
        "shape": list(tensor.shape),
        "stride": list(tensor.stride()),
        "offset": tensor.storage_offset(),
    }


def read_params(
    folder: Path, views: dict[str, Any], device: torch.device, world: World
) -> dict[int, dict[str, Tensor]]:
    """By rank and name, the tensors of the ranks in this process; no storage that only other ranks use is read.

    Raises:
        HelixError: names the file, or the rank and parameter.
    """
    alone = len(world.ranks) < world.mesh.world_size
    users: dict[str, dict[str, list[tuple[int, str]]]] = defaultdict(lambda: defaultdict(list))
    for rank in world.ranks:
        for name, view in views[str(rank)].items():
            users[view["file"]][view["storage"]].append((rank, name))
    found: dict[tuple[int, str], Tensor] = {}
    for file in sorted(users):
        if file not in map(_file_of, range(world.mesh.world_size)):
            raise HelixError(f"views.json: {file!r} is not the file of a rank")
        for storage, whole in _read(folder / file, users[file]):
            # a clone is aligned; a tensor inside the file is not, and BLAS then rounds differently
            there = whole.clone().to(device)
            for rank, name in users[file][storage]:
                tensor = _seen(there, views[str(rank)][name], f"rank {rank}, {name}")
                found[(rank, name)] = tensor.clone() if alone and _is_part(tensor) else tensor
    return {rank: {n: found[(rank, n)] for n in views[str(rank)]} for rank in world.ranks}


def _read(path: Path, wanted: dict[str, list[tuple[int, str]]]) -> Iterator[tuple[str, Tensor]]:
    try:
        with safe_open(path, framework="pt") as file:
            there = set(file.keys())
            for storage, ((rank, name), *_) in wanted.items():
                if storage not in there:
                    raise HelixError(f"views.json: rank {rank}, {name}: {path.name} holds no {storage!r}")
                yield storage, file.get_tensor(storage)
    except (OSError, SafetensorError) as error:
        raise HelixError(f"{path}: can't be read: {error}") from error


def _seen(storage: Tensor, view: dict[str, Any], where: str) -> Tensor:
    try:
        return storage.as_strided(view["shape"], view["stride"], view["offset"])
    except (LookupError, TypeError, RuntimeError) as error:
        raise HelixError(f"views.json: {where}: {error}") from error


def _is_part(tensor: Tensor) -> bool:
    return tensor.untyped_storage().nbytes() != tensor.numel() * tensor.itemsize


def files_digest(folder: Path) -> str:
    """Of a saved folder: views.json, and the name and size of each rank's file."""
    sizes = sorted(f"{path.name} {path.stat().st_size}" for path in folder.glob("rank_*.safetensors"))
    return short_digest("\n".join([(folder / "views.json").read_text(), *sizes]))
