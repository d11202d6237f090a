"""Rank models of an ONNX export, run as threads, with an exchange that knows nothing of ours but the ledger of who is in which group."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

PATIENCE = 60.0  # seconds that a rank waits for the others


class Exchange:
    """Collectives between threads: the members of a group meet, and each takes its part of what all brought."""

    def __init__(self, groups: dict[str, list[list[int]]]):
        self._groups = groups
        self._barriers = {(a, tuple(g)): threading.Barrier(len(g)) for a, gs in groups.items() for g in gs}
        self._brought: dict[tuple[str, int], Any] = {}

    def meet(self, rank: int, axis: str, size: int, x: np.ndarray) -> list[np.ndarray]:
        """What every member brought, in the order of the axis."""
        members = next(g for g in self._groups[axis] if rank in g)
        assert len(members) == size, (axis, members, size)
        barrier = self._barriers[axis, tuple(members)]
        self._brought[axis, rank] = x
        barrier.wait(PATIENCE)
        parts = [self._brought[axis, member] for member in members]
        assert len({(p.shape, p.dtype) for p in parts}) == 1
        barrier.wait(PATIENCE)
        return parts

    def run(self, rank: int, op: str, x: np.ndarray, axis: str, size: int, reduce_op: str | None = None) -> np.ndarray:
        """One collective as helix.collective defines it."""
        parts = self.meet(rank, axis, size, x)
        place = next(g for g in self._groups[axis] if rank in g).index(rank)
        if op in ("AllReduce", "ReduceScatter"):
            assert reduce_op == "sum"
            total = np.sum(np.stack(parts), axis=0, dtype=np.promote_types(x.dtype, np.float32)).astype(x.dtype)
            return total if op == "AllReduce" else np.split(total, size)[place]
        if op == "AllGather":
            return np.concatenate(parts)
        assert op == "AllToAllSingle"
        return np.concatenate([np.split(part, size)[place] for part in parts])

    def abort(self) -> None:
        """A rank has failed: the others stop waiting."""
        for barrier in self._barriers.values():
            barrier.abort()


def reference_rank(path: Path, rank: int, exchange: Exchange) -> Callable[[dict[str, Any]], list[Any]]:
    """The model of a rank in onnx's own reference evaluator."""

    def collective(op: str) -> type[OpRun]:
        def _run(self: Any, x: Any, axis: Any = None, group_size: Any = None, reduce_op: Any = None) -> tuple[Any]:
            return (exchange.run(rank, op, x, axis, group_size, reduce_op),)

        return type(op, (OpRun,), {"op_domain": "helix.collective", "_run": _run})

    ops = [collective(op) for op in ("AllReduce", "ReduceScatter", "AllGather", "AllToAllSingle")]

    class Rank(ReferenceEvaluator):
        """Functions are evaluated by objects of this class: they know the collectives too."""

        def __init__(self, proto: Any, **keywords: Any):
            super().__init__(proto, **{**keywords, "new_ops": ops})

    model = Rank(onnx.load(path))
    return lambda feeds: model.run(None, feeds)


class OnnxRanks:
    """All ranks of an export, with the cache that each keeps between steps."""

    def __init__(self, folder: Path, manifest: dict[str, Any], make_rank: Callable[..., Any] = reference_rank):
        self.manifest, self.exchange = manifest, Exchange(manifest["groups"])
        self._ranks = [make_rank(folder / f"rank{r}.onnx", r, self.exchange) for r in range(manifest["ranks"])]
        inputs = {i["name"]: i for i in manifest["inputs"]}
        self._sites = [name for name in inputs if name.startswith("cache_")]
        self._pages = inputs["page_table"]["shape"][1]
        kinds = {name: (inputs[name]["shape"], inputs[name]["dtype"]) for name in self._sites}
        self.caches = [{n: np.zeros(shape, dtype) for n, (shape, dtype) in kinds.items()} for _ in self._ranks]
        self.lengths: np.ndarray | None = None

    def step(self, ids: Any, mask: Any) -> list[np.ndarray]:
        """Logits [B, T, vocab] of every rank."""
        ids, mask = np.asarray(ids), np.asarray(mask)
        B = len(ids)
        if self.lengths is None:
            self.lengths = np.zeros(B, np.int64)
        positions = np.where(mask > 0, np.cumsum(mask, axis=1) - 1 + self.lengths[:, None], -1)
        step = {
            "input_ids": ids.astype(np.int64),
            "positions": positions.astype(np.int64),
            "page_table": np.arange(B * self._pages, dtype=np.int64).reshape(B, self._pages),
        }
        results: list[Any] = [None] * len(self._ranks)
        threads = [threading.Thread(target=self._run, args=(r, step, results)) for r in range(len(self._ranks))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        failed = [x for x in results if isinstance(x, BaseException)]
        # a barrier that another rank's failure broke is the consequence
        failed.sort(key=lambda x: isinstance(x, threading.BrokenBarrierError))
        if failed:
            raise failed[0]
        self.lengths = self.lengths + mask.sum(axis=1)
        for cache, (_, *outputs) in zip(self.caches, results, strict=True):
            cache.update(zip(self._sites, outputs, strict=True))
        return [logits for logits, *_ in results]

    def _run(self, rank: int, step: dict[str, Any], results: list[Any]) -> None:
        try:
            results[rank] = self._ranks[rank]({**step, **self.caches[rank]})
        except BaseException as error:
            results[rank] = error
            self.exchange.abort()


def largest_difference(a: Sequence[np.ndarray]) -> float:
    """How far the ranks are from the first one."""
    return max(float(np.abs(x - a[0]).max()) for x in a)
