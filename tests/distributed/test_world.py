"""Four real processes against the virtual world and the original model: one launch, many checks.

The bytes are counted by a hook on what c10d is handed, which knows nothing of the world's own counter.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from helix_compile import HelixModule, compare, helix_compile
from tests.distributed.steps import (
    FP8_HEADS,
    FP8_LATENTS,
    MIXED,
    OPTIONS,
    grouped_model,
    padded_model,
    prompts,
    run_steps,
    sparse_model,
    torchrun,
    windowed_model,
)
from tests.support.disk import REASON
from tests.support.graphs import stage_text
from tests.support.models import fresh_model
from tests.support.run_faults import FAULTS, check_found, dump_run

pytestmark = pytest.mark.multi_process
LIMIT = 1e-5
STEPS = (
    "loaded",
    "cp4",
    "recorded",
    "replayed",
    "cp2_tpa2",
    "mesh",
    "replica",
    "goes_on",
    "after_full_disk",
    "reloaded",
    "after_damage",
)


class Launch:
    """What the ranks saw and said, and the virtual module that they are compared with."""

    def __init__(self, folder: Path):
        self.folder = folder
        model = fresh_model("short", torch.float32)
        self.virtual = helix_compile(model, cp=4, world="virtual", **OPTIONS)
        self.virtual.save(folder / "virtual")
        model.save_pretrained(folder / "damaged", max_shard_size="60KB")
        cut = sorted((folder / "damaged").glob("*.safetensors"))[1]
        self.cut_off = cut.name
        os.truncate(cut, 5000)
        for copy in ("damaged_for_all", "damaged_for_1"):
            shutil.copytree(folder / "damaged", folder / copy)
        result = torchrun("world_worker.py", str(folder))
        assert result.returncode == 0, result.stderr
        self.stderr = result.stderr
        self.seen = [load_file(folder / f"seen_{r}.safetensors") for r in range(4)]
        self.said: list[dict[str, Any]] = [json.loads((folder / f"said_{r}.json").read_text()) for r in range(4)]


@pytest.fixture(scope="module")
def launch(tmp_path_factory: pytest.TempPathFactory) -> Launch:
    torch.manual_seed(0)
    return Launch(tmp_path_factory.mktemp("ranks"))


def close(got: Tensor, expected: Tensor) -> bool:
    return bool((got - expected).abs().max() <= LIMIT * expected.abs().max())


def test_logits_are_those_of_the_virtual_world(launch: Launch) -> None:
    expected = run_steps(launch.virtual)
    assert expected.abs().max() > 0.1
    assert {n: close(launch.seen[0][n], expected) for n in STEPS} == dict.fromkeys(STEPS, True)


def test_a_batch_in_parts_is_the_batch_and_one_part_is_on_its_way_while_the_next_attends(launch: Launch) -> None:
    """Bit for bit where nothing is summed by gloo in between; in the order in which c10d was called."""
    a_layer = ["mla_decode", "all_to_all_single", "mla_decode", "all_to_all_single", "wait_tensor", "wait_tensor"]
    a_layer += ["all_reduce", "wait_tensor"] * 2
    for seen, said in zip(launch.seen, launch.said, strict=True):
        assert torch.equal(seen["parts"], seen["cp4"]) and torch.equal(seen["parts_one"], seen["cp4_one"])
        assert said["order"] == a_layer * 2 * 3  # layers, steps
        assert len(set(said["wire_parts"])) == 1
    assert close(launch.seen[0]["parts_ag_rs"], run_steps(launch.virtual))


def test_other_kinds_of_site_are_those_of_the_virtual_world_too(launch: Launch) -> None:
    """Grouped-query attention with its KV heads cut over tpa, the same with zero heads, and sparse attention, by both exchanges: the
    choice is a rank's own, of candidates that came over the wire; and a window that every rank holds by itself. Layers that are
    leaves, which every rank captures anew, are in tests/slow/test_attentions_by_ranks.py.
    """
    grouped = helix_compile(grouped_model(), world="virtual", **MIXED)
    padded = helix_compile(padded_model(), world="virtual", **MIXED, pad_heads=True)
    cut = helix_compile(grouped_model(), world="virtual", **MIXED, head="shard", pad_heads=True)
    chooses = sparse_model()
    gathers = helix_compile(chooses, cp=4, world="virtual", **OPTIONS)
    owners = helix_compile(chooses, world="virtual", **MIXED, topk_exchange="owner")
    made = {"grouped": grouped, "padded": padded, "cut_vocabulary": cut}
    alone = helix_compile(windowed_model(), world="virtual", **MIXED, window="replicate")
    made |= {"sparse": gathers, "sparse_owner": owners, "window_alone": alone}
    for name, virtual in made.items():
        assert close(launch.seen[0][name], run_steps(virtual)), name
    for said in launch.said:
        assert said["kinds_texts"] == [stage_text(c.graph) for c in made.values()]
    ids, mask = prompts()
    greedy = grouped_model().generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False)
    assert [seen["cut_vocabulary_greedy"].tolist() for seen in launch.seen] == [greedy.tolist()] * 4


def test_fp8_caches_are_those_of_the_virtual_world(launch: Launch) -> None:
    latents = helix_compile(fresh_model("short", torch.float32), cp=4, world="virtual", **OPTIONS, **FP8_LATENTS)
    heads = helix_compile(grouped_model(), world="virtual", **MIXED, **FP8_HEADS)
    for name, virtual, exact in (("latents", latents, launch.virtual), ("heads", heads, None)):
        expected = run_steps(virtual)
        assert close(launch.seen[0][f"fp8 {name}"], expected), name
        assert exact is None or not close(expected, run_steps(exact))


def test_all_ranks_have_the_same_bits(launch: Launch) -> None:
    first = launch.seen[0]
    assert len(first) >= len(STEPS)
    for seen in launch.seen[1:]:
        # a replica of two ranks is compared with the other one too: same kernels, same order
        assert [n for n in first if not torch.equal(first[n], seen[n])] == []


@pytest.mark.parametrize("name", FAULTS)
def test_compared_runs_name_the_first_wrong_node_and_rank(launch: Launch, name: str) -> None:
    comparison = compare(launch.folder / "runs" / "plain", launch.folder / "runs" / name)
    assert comparison.found.by_rank
    check_found(name, comparison.found)


def test_a_run_on_real_ranks_is_that_of_the_virtual_world(launch: Launch) -> None:
    dump_run(launch.virtual, launch.folder / "runs" / "virtual", FAULTS["plain"])
    comparison = compare(launch.folder / "runs" / "plain", launch.folder / "runs" / "virtual")
    assert comparison.equal and comparison.found.by_rank, str(comparison)


def test_steps_are_replayed_between_collectives(launch: Launch) -> None:
    """Each collective of gloo stands apart, started and waited for, once a step whatever the peers do; nothing else does."""
    for rank, said in enumerate(launch.said):
        pieces, apart, collectives, replays, alike = said["replays"]
        assert apart == 2 * collectives > 0 and pieces > collectives and alike == [True, True]
        # of one token, and the prompt that came again
        assert replays == ([1] * 2 * pieces if rank == 1 else [3] * pieces + [1] * pieces)
        assert said["replays_whole"] == [1, 0, [True, True]]
    for name in ("recorded", "replayed", "recorded_whole", "replayed_whole"):
        assert torch.equal(launch.seen[0][name], launch.seen[0]["cp4"])


def test_two_models_take_turns_and_keep_their_caches(launch: Launch) -> None:
    ids, mask = prompts()
    launch.virtual.reset()
    expected = torch.cat([launch.virtual(ids, mask), launch.virtual(ids[:, -1:])], dim=1)
    for name in ("turns_cp4", "turns_cp2_tpa2"):
        assert close(launch.seen[1][name][mask_of(mask)], expected[mask_of(mask)])


def mask_of(mask: Tensor) -> Tensor:
    return torch.cat([mask, torch.ones(len(mask), 1)], dim=1) > 0


def test_an_earlier_stage_runs(launch: Launch) -> None:
    ids, mask = prompts()
    launch.virtual.reset()
    expected = launch.virtual(ids, mask)[mask > 0]
    assert close(launch.seen[2]["stage_ffn"][mask > 0], expected)


def test_tokens_are_those_of_the_original_model_and_of_rank_0s_seed(launch: Launch) -> None:
    ids, mask = prompts()
    greedy: dict[str, Any] = {"attention_mask": mask, "max_new_tokens": 6, "pad_token_id": 0}
    original = fresh_model("short", torch.float32)
    assert launch.seen[3]["greedy"].tolist() == original.generate(ids, do_sample=False, **greedy).tolist()
    torch.manual_seed(100)
    sampled = launch.virtual.generate(ids, do_sample=True, temperature=3.0, **greedy).tolist()
    assert sampled != launch.seen[3]["greedy"].tolist()
    assert all(seen["sampled"].tolist() == sampled for seen in launch.seen)


def test_a_folder_that_is_damaged_on_one_rank_is_told_on_all(launch: Launch) -> None:
    folder = launch.folder / "damaged"
    own = f"CheckpointError: {folder}: 1 problem(s) with its files; nothing was read:\n  {launch.cut_off} (5000 bytes)"
    assert launch.said[2]["damaged"].startswith(own)
    for rank in (0, 1, 3):
        assert launch.said[rank]["damaged"] == (
            f"RuntimeFault: rank {rank} lost its peers before step 1: rank 2 raised at step 0: CheckpointError: {folder}: "
            "1 problem(s) with its files; nothing was read:"
        )
    assert f"helix_compile: rank 2: {own}" in launch.stderr


def test_a_long_error_of_several_ranks_is_said_whole_once(launch: Launch) -> None:
    """Of a folder that is damaged for ranks 0, 2 and 3; rank 1 has another folder, so an error of its own."""
    whole = []
    for rank, said in enumerate(launch.said):
        first, *rest = said["damaged_for_all"].split("\n")
        folder = launch.folder / ("damaged_for_1" if rank == 1 else "damaged_for_all")
        start = f"CheckpointError: {folder}: 1 problem(s) with its files; nothing was read:"
        assert first.startswith(start)
        assert f"helix_compile: rank {rank}: {first}\n" in launch.stderr
        if rest:
            assert rest[0].startswith(f"  {launch.cut_off} (5000 bytes)") and first == start
            whole.append(rank)
    assert len(whole) == 2 and 1 in whole
    (teller,) = set(whole) - {1}
    told = f"(the same error as rank {teller}'s, which has it whole)"
    short = [r for r, said in enumerate(launch.said) if said["damaged_for_all"].endswith(told)]
    assert short == sorted({0, 2, 3} - {teller})
    assert launch.stderr.count(f"{launch.cut_off} (5000 bytes)") == 3  # rank 2 alone, and these two


def test_graphs_are_the_same_text_everywhere(launch: Launch) -> None:
    text = stage_text(launch.virtual.graph)
    assert all(said["texts"][:2] == [text, text] for said in launch.said)
    mixed = {said["texts"][2] for said in launch.said}
    assert len(mixed) == 1 and mixed != {text}


def test_c10d_was_asked_to_move_what_the_plan_says(launch: Launch) -> None:
    run_steps(launch.virtual)
    for rank, said in enumerate(launch.said):
        # owners of 39, 3 and 3 queries: two ranks pad each buffer to an even number
        kinds = ("grouped", "padded", "cut_vocabulary", "sparse", "sparse_owner", "window_alone")
        for name in ("wire", "wire_mixed", "wire_parts", *(f"wire_{kind}" for kind in kinds)):
            wire, counted, planned = said[name]
            assert wire == counted == planned > 0, name
        assert said["wire"][1] == launch.virtual.world.sent_bytes[rank]
        assert said["groups_used"] == 2  # in the mixed world: kvp of two ranks, and the world
    counts = [list(map(str, x)) for x in sorted(launch.virtual.world.num_collectives.items())]
    assert all(said["collectives"] == counts for said in launch.said)


def test_a_rank_holds_its_own_shard_and_no_more(launch: Launch) -> None:
    for rank, said in enumerate(launch.said):
        assert said["ranks"] == [rank]
        kept, own = said["storages"]
        assert kept <= own
        assert own == sum(t.numel() * t.itemsize for t in launch.virtual.ranks[rank].params.values())


def test_models_share_groups(launch: Launch) -> None:
    assert {said["new_groups"] for said in launch.said} == {0}  # a second model, by a mesh


def test_what_the_ranks_save_loads_in_the_virtual_world(launch: Launch) -> None:
    for seen in launch.seen:
        assert torch.equal(seen["reloaded"], seen["cp4"])
    loaded = HelixModule.load(launch.folder / "distributed", world="virtual")
    assert close(run_steps(loaded), launch.seen[0]["cp4"])
    sizes = [(launch.folder / "distributed" / f"rank_{r}.safetensors").stat().st_size for r in range(4)]
    assert sizes[1] == sizes[2] == sizes[3] < sizes[0]  # what is replicated is kept once
    assert not list((launch.folder / "distributed").glob(".*"))


def test_a_full_disk_of_one_rank_is_told_on_all_and_leaves_nothing(launch: Launch) -> None:
    file = launch.folder / "new" / "full" / "rank_2.safetensors"
    told = f"HelixError: {file}: can't be written: Error while serializing: I/O error: {REASON}"
    for rank, said in enumerate(launch.said):
        assert said["full_disk"].startswith(told if rank == 2 else f"HelixError: save: rank 2: {told}")
    assert not (launch.folder / "new").exists()


def test_refusals(launch: Launch) -> None:
    expected = {
        "max_time": "max_time=1.0 is refused on real ranks",
        "wrong_size": "cp*tpa = 4*1 = 4 ranks, but the process group has 2 processes",
        "reversed_mesh": "lists its ranks as [3, 2, 1, 0]",
        "verify": "this process holds 1 of 4 ranks",
        "not_a_world": "option world=4 is unknown",
        "again": "holds a saved module already",
    }
    for said in launch.said:
        assert [n for n, text in expected.items() if text not in said[n]] == []


def test_ranks_that_disagree_are_all_told_who_and_what(launch: Launch) -> None:
    for said in launch.said:
        assert "rank 2 has input_ids [3, 12]" in said["shape"]
        assert "rank 0 has [3, 13]" in said["shape"]
        assert "rank 1 has input_ids [3, 13] (digest" in said["ids"]
        assert said["lengths_after"] == []
        version = f"before the first step: rank 1 has torch version 2.0.0, rank 0 has {torch.__version__}; "
        assert version + "rank 2 has option tokens_per_block 8, rank 0 has 4" in said["plan"]
        assert "before the first step: rank 3 has weights" in said["weights"]
        assert "plan" not in said["weights"]


def test_other_ids_in_the_last_step_are_found_before_its_cache_leaves(launch: Launch) -> None:
    for said in launch.said:
        found = re.fullmatch(
            r"RuntimeFault: (ranks disagree in step \d+: rank 1 has input_ids \[3, 1\].*); it was run .*",
            said["last_step"],
        )
        assert found and found[1] in said["after_last_step"]
        assert said["after_last_step"].startswith("RuntimeFault: these ranks can't go on")
