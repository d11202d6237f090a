"""The original parameters of a checkpoint folder, read on demand: whole, or one rank's shard straight into its place."""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor
from tqdm import tqdm

from helix_compile.checkpoint.entries import Entry
from helix_compile.checkpoint.files import CheckpointFiles
from helix_compile.checkpoint.names import Assembly, Piece
from helix_compile.errors import PlanError
from helix_compile.layout.degrees import HelixLayout
from helix_compile.plan.helix_plan import ParamShard
from helix_compile.plan.shard import Box, Range, ShardBoxes, cut_param, shard_boxes

_Key = tuple[str, tuple[int, ...], ShardBoxes]


class CheckpointWeights(Mapping[str, Tensor]):
    """Full name -> original parameter or buffer, as `originals(model)` of a loaded model would give them.

    What someone still holds is not read again: ranks in one process share what is equal on them.
    """

    def __init__(
        self,
        files: CheckpointFiles,
        entries: Mapping[str, Entry],
        assembly: Assembly,
        like: dict[str, Tensor],
        computed: dict[str, Tensor],
        device: torch.device,
    ):
        """Args:
        files: of the folder.
        entries: what is stored, by the name of the weight.
        assembly: which entries make up which parameter.
        like: name -> tensor on meta, whose shape and dtype are the wanted ones.
        computed: tensors that no checkpoint holds, such as rotary frequencies.
        device: where what is read is put; on "meta" nothing is read.
        """
        self._files, self._entries, self._assembly = files, entries, assembly
        self._like, self.device = like, device
        self._computed = {n: t.to(device) for n, t in computed.items()}
        self._held: weakref.WeakValueDictionary[_Key, Tensor] = weakref.WeakValueDictionary()
        self._bar: tqdm | None = None

    def hold(self, constants: Mapping[str, Tensor]) -> None:
        """Constants of the model's code, under names that no checkpoint has."""
        self._computed |= {n: t.to(self.device) for n, t in constants.items()}
        self._like |= {n: t.to("meta") for n, t in constants.items()}

    def __iter__(self) -> Iterator[str]:
        return iter(self._like)

    def __len__(self) -> int:
        return len(self._like)

    def __getitem__(self, name: str) -> Tensor:
        """The whole tensor, read now."""
        if name in self._computed:
            return self._computed[name]
        shape = tuple(self._like[name].shape)
        return self._read(name, shape, _whole(shape))

    def part(self, name: str, shard: ParamShard, layout: HelixLayout, rank: int) -> Tensor:
        """`rank`'s shard of a parameter: the values of cut_param of the whole, of which only these are read.

        Raises:
            PlanError: the parameter does not have the shape that the plan was made for.
        """
        if name in self._computed:
            return cut_param(self._computed[name], shard, layout, rank)
        if (got := tuple(self._like[name].shape)) != shard.source_shape:
            raise PlanError(f"parameter {name}: got shape {got}, the plan expects {shard.source_shape}")
        return self._read(name, shard.shape, shard_boxes(shard, layout, rank))

    def fingerprint(self) -> str:
        """One line a stored tensor: name, shape, dtype and some elements of its first and middle row.

        Ranks compare it before they start: little is read, and a value elsewhere that differs is not seen.
        """
        return "\n".join(self._files.sample(name) for name in sorted(self._files.tensors))

    @contextmanager
    def progress(
        self, wanted: Iterable[tuple[str, ParamShard | None]], layout: HelixLayout, ranks: Iterable[int]
    ) -> Iterator[None]:
        """A bar on stderr, in bytes of the checkpoint, while what these ranks want is read."""
        ranks = list(ranks)
        total = 0 if self.device.type == "meta" else self._bytes_of(list(wanted), layout, ranks)
        with tqdm(
            total=total, desc="checkpoint", unit="B", unit_scale=True, unit_divisor=1024, disable=None
        ) as self._bar:
            try:
                yield
            finally:
                self._bar = None

    def _bytes_of(self, wanted: list[tuple[str, ParamShard | None]], layout: HelixLayout, ranks: list[int]) -> int:
        """Stored bytes of what is wanted, each part once however many ranks share it."""
        elements: dict[_Key, int] = {}
        for alias, shard in wanted:
            name = self._assembly.same.get(alias, alias)
            if name in self._computed:
                continue
            for rank in ranks if shard is not None else ranks[:1]:
                shape = tuple(self._like[name].shape) if shard is None else shard.shape
                boxes = _whole(shape) if shard is None else shard_boxes(shard, layout, rank)
                sizes = (math.prod(stop - start for start, stop in box.source) for box in boxes.boxes)
                elements[(name, shape, boxes)] = sum(sizes)
        return sum(
            count * self._entries[self._assembly.tensors[name].pieces[0].key].bits // 8
            for (name, *_), count in elements.items()
        )

    def _read(self, name: str, shape: tuple[int, ...], wanted: ShardBoxes) -> Tensor:
        name = self._assembly.same.get(name, name)
        key = (name, shape, wanted)
        if (held := self._held.get(key)) is not None:
            return held
        dtype = self._like[name].dtype
        if self.device.type == "meta":
            return torch.empty(shape, dtype=dtype, device="meta")
        make = torch.zeros if wanted.padded else torch.empty
        local = make(wanted.local_shape, dtype=dtype)
        for box in wanted.boxes:
            target = local[tuple(slice(*r) for r in box.local)]
            target = target.view([stop - start for start, stop in box.source])
            for piece in self._assembly.tensors[name].pieces:
                self._read_piece(piece, box.source, target)
        read = self._held[key] = local.view(shape).to(self.device)
        return read

    def _read_piece(self, piece: Piece, wanted: tuple[Range, ...], target: Tensor) -> None:
        """Copy the part of `piece` that lies in `wanted` to its place in `target`."""
        taken, places = [], []
        for dim, ((start, stop), begin, size) in enumerate(zip(wanted, piece.start, piece.size, strict=True)):
            low, high = max(start, begin), min(stop, begin + size)
            if low >= high:
                return
            places.append(slice(low - start, high - start))
            if dim not in piece.stacked:
                taken.append((low - begin, high - begin))
        destination = target[tuple(places)]
        for dim in reversed(piece.stacked):
            destination = destination.squeeze(dim)
        entry = self._entries[piece.key]
        entry.copy_part(self._files, tuple(taken), destination)
        if self._bar is not None:
            self._bar.update(destination.numel() * entry.bits // 8)


def _whole(shape: tuple[int, ...]) -> ShardBoxes:
    everything: tuple[Range, ...] = tuple((0, size) for size in shape)
    return ShardBoxes((Box(everything, everything),), shape, padded=False)
