"""One rank that does everything a real rank can do, once, and writes what it saw: the checks are in test_world.py.

torchrun --nproc-per-node 4 world_worker.py FOLDER     (FOLDER/virtual: a module saved by the virtual world;
FOLDER/damaged: the model as transformers saves it, with a file cut off)
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.utils._python_dispatch import TorchDispatchMode

from helix_compile import HelixError, HelixModule, helix_compile, verify
from helix_compile.worlds.distributed import DistributedWorld
from tests.distributed.steps import (
    FP8_HEADS,
    FP8_LATENTS,
    MIXED,
    OPTIONS,
    STEP_TOKENS,
    grouped_model,
    padded_model,
    prompts,
    run_steps,
    sparse_model,
    windowed_model,
)
from tests.support import captures
from tests.support.disk import full_after
from tests.support.graphs import stage_text
from tests.support.models import fresh_model
from tests.support.recording import FakeGraphs
from tests.support.run_faults import FAULTS, dump_run

HOST_READ = "helix_compile.worlds.program.host_read"  # our references as if each were a kernel


class Wire(TorchDispatchMode):
    """Counts what c10d is asked to move, from its own arguments: bytes that leave this rank, all_reduce as a ring."""

    def __init__(self) -> None:
        super().__init__()
        self.sent = 0.0
        self.groups: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        if name.startswith("_c10d_functional::") and "wait" not in name:
            members = dist.get_world_size(dist.distributed_c10d._resolve_process_group(args[-1]))
            shares = {"all_reduce": 2 / members, "all_to_all_single": 1 / members, "all_gather_into_tensor": 1.0}
            share = shares[name.split("::")[1]]
            self.sent += (members - 1) * share * args[0].numel() * args[0].element_size()
            self.groups.add(args[-1])
        return func(*args, **(kwargs or {}))


class Order(TorchDispatchMode):
    """Attention and what c10d is asked to do, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        if name.startswith("_c10d_functional::") or name == "helix::mla_decode":
            self.calls.append(name.split("::")[1])
        return func(*args, **(kwargs or {}))


def moved(wire: Wire, compiled: HelixModule) -> list[float]:
    """Bytes that c10d was asked to move, that the world counted, and that the plan says of the steps."""
    counted, planned = compiled.world.sent_bytes[0], sum(map(compiled.plan.egress_bytes_per_rank, STEP_TOKENS))
    return [wire.sent, float(counted), float(planned)]


def refusal(act: Callable[[], Any]) -> str:
    """The text of the error that `act` must raise."""
    try:
        act()
    except HelixError as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was raised"


def main(folder: Path) -> None:
    """Every check in one launch: starting four processes is what costs."""
    said: dict[str, Any] = {}
    seen: dict[str, Tensor] = {}
    ids, mask = prompts()

    loaded = HelixModule.load(folder / "virtual")
    rank = loaded.ranks[0].rank
    seen["loaded"] = run_steps(loaded)

    model = fresh_model("short", torch.float32)
    four = helix_compile(model, cp=4, **OPTIONS)
    mixed = helix_compile(model, cp=2, tpa=2, **OPTIONS)
    with Wire() as wire:
        seen["cp4"] = run_steps(four)
    said["wire"] = moved(wire, four)
    counted = list(four.world.sent_bytes), four.world.num_collectives.copy()
    with Wire() as wire:
        seen["cp2_tpa2"] = run_steps(mixed)
    said["wire_mixed"] = moved(wire, mixed)
    said["groups_used"] = len(wire.groups)
    said["collectives"] = [list(map(str, x)) for x in sorted(four.world.num_collectives.items())]
    said["texts"] = [stage_text(c.graph) for c in (loaded, four, mixed)]

    # a batch in parts; of one sequence one part is empty
    parted = helix_compile(model, cp=4, **OPTIONS, overlap="hopb")
    with Order() as order:
        seen["parts"] = run_steps(parted)
    said["order"] = order.calls
    for name, module in (("cp4", four), ("parts", parted)):
        module.reset()
        seen[f"{name}_one"] = module(ids[:1])
    with Wire() as wire:
        run_steps(parted)
    said["wire_parts"] = moved(wire, parted)
    seen["parts_ag_rs"] = run_steps(helix_compile(model, cp=4, **OPTIONS, merge="ag_rs", overlap="hopb"))

    # steps that are recorded and replayed, in pieces between the collectives of gloo; rank 1 forgets, and records while others replay
    fake = FakeGraphs()
    with patch("helix_compile.module.recorder_for", lambda device: fake), patch(HOST_READ, lambda node: ""):
        replayed = helix_compile(model, cp=4, **OPTIONS)
    assert replayed.replays is not None
    seen["recorded"] = run_steps(replayed)
    if rank == 1:
        replayed.replays.clear()
    seen["replayed"] = run_steps(replayed)
    tape = replayed.replays.recordings[-1]
    alike = [list(replayed.world.sent_bytes) == counted[0], replayed.world.num_collectives == counted[1]]
    said["replays"] = [tape.pieces, tape.apart_calls, tape.collectives.total(), [p.replays for p in fake.pieces], alike]
    # as over nccl, whose collectives are launches: nothing stands apart
    with (
        patch("helix_compile.module.recorder_for", lambda device: FakeGraphs()),
        patch(HOST_READ, lambda node: ""),
        patch.object(DistributedWorld, "host_collectives", ""),
    ):
        whole = helix_compile(model, cp=4, **OPTIONS)
        assert whole.replays is not None
        seen["recorded_whole"], seen["replayed_whole"] = run_steps(whole), run_steps(whole)
    tape = whole.replays.recordings[-1]
    alike = [list(whole.world.sent_bytes) == counted[0], whole.world.num_collectives == counted[1]]
    said["replays_whole"] = [tape.pieces, tape.apart_calls, alike]

    # other kinds of site
    grouped = helix_compile(grouped_model(), **MIXED)
    with Wire() as wire:
        seen["grouped"] = run_steps(grouped)
    said["wire_grouped"] = moved(wire, grouped)
    padded = helix_compile(padded_model(), **MIXED, pad_heads=True)
    with Wire() as wire:
        seen["padded"] = run_steps(padded)
    said["wire_padded"] = moved(wire, padded)
    # embedding and head cut by rows of the vocabulary: 97 words on four ranks
    cut = helix_compile(grouped_model(), **MIXED, head="shard", pad_heads=True)
    with Wire() as wire:
        seen["cut_vocabulary"] = run_steps(cut)
    said["wire_cut_vocabulary"] = moved(wire, cut)
    seen["cut_vocabulary_greedy"] = cut.generate(*prompts(), max_new_tokens=6, do_sample=False)
    chooses = sparse_model()
    # two collectives that the others have not: both ways to agree on a choice
    gathers = helix_compile(chooses, cp=4, **OPTIONS)
    with Wire() as wire:
        seen["sparse"] = run_steps(gathers)
    said["wire_sparse"] = moved(wire, gathers)
    owners = helix_compile(chooses, **MIXED, topk_exchange="owner")
    with Wire() as wire:
        seen["sparse_owner"] = run_steps(owners)
    said["wire_sparse_owner"] = moved(wire, owners)
    alone = helix_compile(windowed_model(), **MIXED, window="replicate")
    with Wire() as wire:
        seen["window_alone"] = run_steps(alone)
    said["wire_window_alone"] = moved(wire, alone)
    seen["fp8 latents"] = run_steps(helix_compile(model, cp=4, **OPTIONS, **FP8_LATENTS))
    seen["fp8 heads"] = run_steps(helix_compile(grouped_model(), **MIXED, **FP8_HEADS))
    said["kinds_texts"] = [stage_text(c.graph) for c in (grouped, padded, cut, gathers, owners, alone)]
    said["ranks"] = [r.rank for r in four.ranks]
    # what this rank's parameters keep alive, against the parameters themselves
    held = loaded.ranks[0].params.values()
    said["storages"] = [
        sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in held}.values()),
        sum(t.numel() * t.itemsize for t in held),
    ]

    # two models take turns, each with its own cache
    four.reset(), mixed.reset()
    turns = [(four(ids, mask), mixed(ids, mask)), (four(ids[:, -1:]), mixed(ids[:, -1:]))]
    seen["turns_cp4"], seen["turns_cp2_tpa2"] = (torch.cat(x, dim=1) for x in zip(*turns, strict=True))

    four.reset()
    seen["stage_ffn"] = four.run_stage("ffn", ids, mask)

    # generation: the ranks' own seeds differ, rank 0's counts
    torch.manual_seed(100 + rank)
    greedy: dict[str, Any] = {"attention_mask": mask, "max_new_tokens": 6, "pad_token_id": 0, "do_sample": False}
    seen["greedy"] = four.generate(ids, **greedy)
    seen["sampled"] = four.generate(ids, **{**greedy, "do_sample": True, "temperature": 3.0})
    said["max_time"] = refusal(lambda: four.generate(ids, max_time=1.0, **greedy))

    # worlds by group and by mesh; two replicas of two ranks each
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("tpa", "kvp"))
    groups = len(dist.distributed_c10d._world.pg_map)
    seen["mesh"] = run_steps(helix_compile(model, cp=2, tpa=2, world=mesh, **OPTIONS))
    said["new_groups"] = len(dist.distributed_c10d._world.pg_map) - groups
    seen["replica"] = run_steps(helix_compile(model, cp=2, world=mesh["kvp"].get_group(), **OPTIONS))

    said["wrong_size"] = refusal(lambda: helix_compile(model, cp=4, world=mesh["kvp"], **OPTIONS))
    said["reversed_mesh"] = refusal(
        lambda: helix_compile(model, cp=4, world=dist.DeviceMesh("cpu", [3, 2, 1, 0]), **OPTIONS)
    )
    said["verify"] = refusal(lambda: verify(four, model))
    said["not_a_world"] = refusal(lambda: helix_compile(model, cp=4, world=4, **OPTIONS))

    # what differs is told to all, and the ranks go on
    four.reset()
    odd = ids if rank != 2 else ids[:, 1:]
    said["shape"] = refusal(lambda: four(odd))
    said["ids"] = refusal(lambda: four(ids if rank != 1 else ids.flip(1)))
    said["lengths_after"] = four.lengths.tolist()
    seen["goes_on"] = run_steps(four)
    odd_plan = {**OPTIONS, "tokens_per_block": 4 if rank != 2 else 8}
    version = "2.0.0" if rank == 1 else torch.__version__
    with patch("torch.__version__", version):
        said["plan"] = refusal(lambda: helix_compile(model, cp=4, **odd_plan))

    # runs to be compared: the values of two equal ones, and of faults of one rank
    for name, fault in FAULTS.items():
        dump_run(four, folder / "runs" / name, fault)

    # the disk of rank 2 is full
    with full_after(1000) if rank == 2 else nullcontext():
        said["full_disk"] = refusal(lambda: four.save(folder / "new" / "full"))
    seen["after_full_disk"] = run_steps(four)

    four.save(folder / "distributed")
    said["again"] = refusal(lambda: four.save(folder / "distributed"))
    seen["reloaded"] = run_steps(HelixModule.load(folder / "distributed"))

    # a folder that is damaged on the node of rank 2; the others have the model captured, which is cheap
    source = folder / "damaged" if rank == 2 else model
    said["damaged"] = refusal(lambda: helix_compile(source, cp=4, **OPTIONS))
    # damaged for all alike, but on rank 1 in another way
    source = folder / ("damaged_for_all" if rank != 1 else "damaged_for_1")
    said["damaged_for_all"] = refusal(lambda: helix_compile(source, cp=4, **OPTIONS))
    seen["after_damage"] = run_steps(helix_compile(model, cp=4, **OPTIONS))

    # what a rank was given for the last step is compared when something leaves the module
    four.reset()
    four(ids, mask)
    four(ids[:, :1])
    four(ids[:, :1] if rank != 1 else ids[:, :1] + 1)
    said["last_step"] = refusal(four.export_shards)
    said["after_last_step"] = refusal(lambda: four(ids[:, :1]))

    with torch.no_grad():
        model.lm_head.weight[5, 7] += 0.5 if rank == 3 else 0.0
    said["weights"] = refusal(lambda: helix_compile(model, cp=4, **OPTIONS))

    save_file({n: t.contiguous() for n, t in seen.items()}, folder / f"seen_{rank}.safetensors")
    (folder / f"said_{rank}.json").write_text(json.dumps(said))


if __name__ == "__main__":
    torch.set_num_threads(1)
    captures.share()
    main(Path(sys.argv[1]))
