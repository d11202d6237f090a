"""Ranks that are given different ids: named at once, at the next step, or never; the last step's at an explicit synchronisation."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import fx

from helix_compile.errors import RuntimeFault
from helix_compile.worlds.agreement import AgreedInputs, InputTexts, StepAgreement
from helix_compile.worlds.guard import RankGuard
from tests.distributed.steps import torchrun

DIFFERS = r"ranks disagree in step {}: rank 1 has input_ids \[2, 1\] \(digest [0-9a-f]{{8}}\), rank 0 has \[2, 1\] \(digest [0-9a-f]{{8}}\)"
LATE = DIFFERS + "; it was run .*start them again"
STUCK = "these ranks can't go on, start them again; what happened: RuntimeFault: " + LATE


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("checks")
    result = torchrun("check_worker.py", str(folder), processes=2, HELIX_TIMEOUT="20")
    assert result.returncode == 0, result.stderr
    return [json.loads((folder / f"{r}.json").read_text()) for r in range(2)]


EXPECTED: list[tuple[str, list[tuple[int, str]], int]] = [
    # the first step waits: nothing was run, and the ranks go on
    ("deferred-1", [(1, DIFFERS.format(1) + "$")], 5),
    ("deferred-3", [(4, LATE.format(3)), (5, STUCK.format(3)), (0, LATE.format(3))], 3),
    ("deferred-5", [(0, LATE.format(5))], 5),
    ("every-1", [(1, DIFFERS.format(1) + "$")], 5),
    ("every-3", [(3, DIFFERS.format(3) + "$")], 5),
    ("every-5", [(5, DIFFERS.format(5) + "$")], 4),
    ("off-1", [], 5),
    ("off-3", [], 5),
    ("off-5", [], 5),
    *((f"{check}-0", [], 5) for check in ("deferred", "every", "off")),
]


@pytest.mark.multi_process
@pytest.mark.parametrize(("case", "said", "done"), EXPECTED, ids=[case for case, _, _ in EXPECTED])
def test_both_ranks_name_the_step_when_it_is_due(
    seen: list[dict[str, Any]], case: str, said: list[tuple[int, str]], done: int
) -> None:
    for rank in range(2):
        got = seen[rank][case]
        assert [step for step, _ in got["said"]] == [step for step, _ in said], got
        assert all(re.match(text, heard) for (_, text), (_, heard) in zip(said, got["said"], strict=True)), got
        assert got["done"] == done


# what follows needs no process group: a store in memory stands for torchrun's, a thread for a rank


def on_ranks(act: Callable[[int, StepAgreement], Any], check: str = "deferred", count: int = 3) -> list[Any]:
    """What `act` gives, or the text of what it raises, by rank."""
    store = dist.HashStore()
    guards = [RankGuard(store, r, count, timedelta(seconds=5)) for r in range(count)]

    def run(rank: int) -> Any:
        try:
            return act(rank, StepAgreement(guards[rank], check))
        except RuntimeFault as error:
            return str(error)

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(run, range(count)))


def take(agreement: StepAgreement, *ids: torch.Tensor) -> list[str]:
    said = []
    for given in ids:
        agreement.guard.step += 1
        said.append(agreement.begin({"input_ids": given}, "input_ids"))
    return said


def test_many_steps_reuse_few_keys_and_never_wait_for_a_peer_that_is_ahead() -> None:
    """Ranks without collectives drift as far as they can; what one writes over is read by nobody any more."""

    def act(rank: int, agreement: StepAgreement) -> int:
        take(agreement, *(torch.full((1, 1), step) for step in range(200)))
        agreement.settle("end")
        return agreement.guard.store.num_keys()

    records, posts = 3, 3 * 4 * 2
    assert on_ranks(act) == [records + posts] * 3


def test_a_change_of_shape_waits_and_is_refused_before_anything_ran() -> None:
    """All change it, one to another size: every rank hears it in that step, and the next one may be taken."""

    def act(rank: int, agreement: StepAgreement) -> list[str]:
        one, two, three = torch.zeros(1, 1), torch.zeros(2, 1), torch.zeros(3, 1)
        return take(agreement, one, one, three if rank == 2 else two, two, two)

    first, *others = on_ranks(act)
    assert first == others[0] == others[1]
    assert first[0] == first[1] == first[3] == first[4] == ""
    assert re.match(r"ranks disagree in step 3: rank 2 has input_ids \[3, 1\].*, rank 0 has \[2, 1\]", first[2])


def test_a_rank_whose_shape_alone_changes_does_not_run_the_step() -> None:
    def act(rank: int, agreement: StepAgreement) -> list[str]:
        one = torch.zeros(1, 1)
        return take(agreement, one, one, torch.zeros(2, 1) if rank == 1 else one)

    first, alone, third = on_ranks(act)
    assert first == third == ["", "", ""]
    assert alone.startswith("ranks disagree in step 3: rank 1 has input_ids [2, 1]")
    assert alone.endswith("the ranks whose shapes are those of the step before have begun it: start them again")


def test_a_tensor_is_read_again_when_it_changed() -> None:
    texts, table = InputTexts(), torch.arange(4)
    before = texts.of({"page_table": table})
    assert texts.of({"page_table": table}) == before
    table[0] = 9
    edited = texts.of({"page_table": table})
    assert edited != before and texts.of({"page_table": table.clone()}) == edited


def test_inputs_follow_an_edit_of_the_graph() -> None:
    graph, agreed = fx.Graph(), AgreedInputs()
    ids, rank = graph.placeholder("input_ids"), graph.placeholder("kvp_rank")
    ids.meta["input"], rank.meta["input"] = ["input", "input_ids"], ["input", "kvp_rank"]
    a, b, c = (torch.tensor(n) for n in range(3))
    assert agreed.of(graph, [a, b]) == {"input_ids": a}
    with graph.inserting_before(ids):
        graph.placeholder("more").meta["input"] = ["input", "more"]
    assert agreed.of(graph, [c, a, b]) == {"more": c, "input_ids": a}


class LateStore:
    """A rank's view of a store in which others see its post of a step when it posts the next one; of the first step at once."""

    def __init__(self, shared: dist.Store):
        self._shared, self._own, self._late = shared, dict[str, str](), list[tuple[str, str]]()

    def set(self, key: str, value: str) -> None:
        if not key.startswith("post/"):
            return self._shared.set(key, value)
        self._own[key] = value
        self._late.append((key, value))
        if len(self._late) > 1 or value.startswith("1 "):
            self._shared.set(*self._late.pop(0))

    def check(self, keys: list[str]) -> bool:
        return self._shared.check([key for key in keys if key not in self._own])

    def multi_get(self, keys: list[str]) -> list[bytes]:
        return [self._own[key].encode() if key in self._own else self._shared.get(key) for key in keys]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._shared, name)


@pytest.mark.parametrize("check", ["deferred", "every"])
def test_a_post_that_is_seen_a_step_late_holds_up_every_alone(check: str) -> None:
    """Deferred needs a step's posts when the next one begins; `every` can't begin the step without them."""
    shared = dist.HashStore()
    guards = [RankGuard(LateStore(shared), rank, 2, timedelta(seconds=1)) for rank in range(2)]

    def run(rank: int) -> Any:
        try:
            return take(StepAgreement(guards[rank], check), *(torch.full((1, 1), step) for step in range(20)))
        except RuntimeFault as error:
            return f"{guards[rank].step}: {error}"

    with ThreadPoolExecutor(2) as pool:
        said = list(pool.map(run, range(2)))
    if check == "deferred":
        assert said == [[""] * 20] * 2
    else:
        assert all(text.startswith("2: ") and "rank" in text for text in said), said
