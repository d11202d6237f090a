"""A rank raises, is killed or hangs: every survivor says who, where and when; nothing hangs, no process is left."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist

from helix_compile.worlds.agreement import difference
from helix_compile.worlds.guard import RankGuard, is_transport_error
from helix_compile.worlds.peers import EXIT_STATUS, Life, is_dead, own_life
from tests.distributed.steps import ROOT, launch_nodes, torchrun

DIED = r"rank 2 died or is stuck without an exception; last sign of life: step {}, \d+\.\ds ago"
RAISED = r"rank 2 raised at step 3: ValueError: weights of layer 7 are NaN"
slow = pytest.mark.slow
FIRST, SECOND = "wait_tensor_default", "wait_tensor_default_1"
CASES = [
    ("inside-exception", "deferred", RAISED, SECOND),
    ("inside-kill", "deferred", DIED.format(3), SECOND),
    pytest.param("inside-exit", "deferred", DIED.format(3), SECOND, marks=slow),
    pytest.param("inside-hang", "deferred", DIED.format(3), SECOND, marks=slow),
    pytest.param("inside-stop", "deferred", DIED.format(3), SECOND, marks=slow),
    pytest.param("inside-kill", "off", DIED.format(3), SECOND, marks=slow),
    pytest.param("before-exception", "every", RAISED, "input_ids", marks=slow),
    pytest.param("before-exit", "every", DIED.format(2), "input_ids", marks=slow),
    pytest.param("before-kill", "every", DIED.format(2), "input_ids", marks=slow),
    pytest.param("before-hang", "every", DIED.format(2), "input_ids", marks=slow),
    pytest.param("before-stop", "every", DIED.format(2), "input_ids", marks=slow),
    *(
        pytest.param(f"inside-{kind}", "deferred program", cause, SECOND, marks=slow)
        for kind, cause in (("exception", RAISED), ("kill", DIED.format(3)), ("hang", DIED.format(3)))
    ),
    # without a wait before the step the others are at its first collective, or, where it is not theirs, at the next
    pytest.param("before-exception", "deferred", RAISED, f"{FIRST}|{SECOND}", marks=slow),
    pytest.param("before-kill", "deferred", DIED.format(2), f"{FIRST}|{SECOND}", marks=slow),
    pytest.param("before-hang", "deferred", DIED.format(2), f"{FIRST}|{SECOND}", marks=slow),
]


@pytest.mark.multi_process
@pytest.mark.parametrize(("kind", "check", "cause", "node"), CASES)
def test_every_survivor_names_the_rank(kind: str, check: str, cause: str, node: str) -> None:
    result = torchrun("fault_worker.py", kind, *check.split(), HELIX_TIMEOUT="5", seconds=120)
    assert result.returncode != 0
    for rank in (0, 1, 3):
        text = rf"helix_compile: rank {rank} lost its peers in step 3 at graph node '({node})': {cause}\n"
        assert re.search(text, result.stderr), result.stderr
    assert "done" not in result.stdout


@slow
@pytest.mark.multi_process
@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("plan", "ranks disagree before the first step: rank 2 has option cp 4, rank 0 has 2"),
        ("weights", "ranks disagree before the first step: rank 2 has weights 0a1b, rank 0 has 77ff"),
    ],
)
def test_every_rank_is_told_what_differs(kind: str, text: str) -> None:
    result = torchrun("fault_worker.py", kind, HELIX_TIMEOUT="20")
    assert result.returncode != 0
    assert result.stderr.count(f"RuntimeFault: {text}") == 4, result.stderr
    assert "lost its peers" not in result.stderr


@slow
@pytest.mark.multi_process
def test_every_rank_is_told_of_another_shape_before_the_step() -> None:
    result = torchrun("fault_worker.py", "shape", "every", HELIX_TIMEOUT="20")
    assert result.stderr.count("RuntimeFault: ranks disagree in step 3: rank 2 has input_ids [2, 2]") == 4, (
        result.stderr
    )
    assert "lost its peers" not in result.stderr


@slow
@pytest.mark.multi_process
def test_a_rank_whose_shape_alone_changes_says_so_and_the_others_name_it() -> None:
    """It waits for the others, who run the step: what they compute with would never come together."""
    result = torchrun("fault_worker.py", "shape", "deferred", HELIX_TIMEOUT="20")
    assert result.returncode != 0 and "done" not in result.stdout
    said = "RuntimeFault: ranks disagree in step 3: rank 2 has input_ids [2, 2]"
    assert said in result.stderr
    for rank in (0, 1, 3):
        text = rf"rank {rank} lost its peers in step 3 at graph node '({FIRST}|{SECOND})': rank 2 raised at step 3: {re.escape(said)}"
        assert re.search(text, result.stderr), result.stderr


def nodes(kind: str) -> list[subprocess.CompletedProcess[str]]:
    """The fault worker on two nodes of two ranks."""
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nnodes",
        "2",
        "--node-rank",
        "$NODE_RANK",
        "--nproc-per-node",
        "2",
        "--master-addr",
        "node0",
        "--master-port",
        "29500",
        str(ROOT / "tests/distributed/fault_worker.py"),
        kind,
    ]
    return launch_nodes(command, 2, 120, HELIX_TIMEOUT="20")


@pytest.mark.multi_process
def test_two_nodes_of_two_ranks() -> None:
    results = nodes("none")
    assert [r.returncode for r in results] == [0, 0], results[0].stderr + results[1].stderr
    printed = sorted("".join(r.stdout for r in results).split("\n"))
    assert printed[1:] == [f"rank {r} done" for r in range(4)]


@slow
@pytest.mark.multi_process
def test_a_death_on_one_node_is_told_on_the_other() -> None:
    first, second = nodes("inside-kill")
    assert first.returncode != 0 and second.returncode != 0
    for rank, stderr in ((0, first.stderr), (1, first.stderr), (3, second.stderr)):
        text = f"helix_compile: rank {rank} lost its peers in step 3 at .*: {DIED.format(3)}"
        assert re.search(text, stderr), stderr


GRAPH = "replayed graph of 2 collectives"
LATE = rf"rank {{}} lost its peers in step 5 at graph node '{GRAPH}': the device has not finished it within 5 s: {{}}"
STUCK = rf"rank {{}} died or is stuck without an exception; last sign of life: step {{}} \({GRAPH}\), \d+\.\ds ago"
REPLAYS = {
    "none": [],
    "host": [
        rf"rank 0 lost its peers in step 5 at graph node '{GRAPH}': the device has not finished it within 5 s: (rank 1 raised at step 5: TimeoutError: {GRAPH}: the host|{STUCK.format(1, 5)})",
        rf"rank 1 lost its peers in step 5 at graph node '{GRAPH}': the host did not come back from it within 5 s: rank 0",
    ],
    "device": [LATE.format(rank, STUCK.format(1 - rank, 5)) for rank in (0, 1)],
    "late": [LATE.format(0, STUCK.format(1, 4))],
}


@pytest.mark.multi_process
@pytest.mark.parametrize("kind", [pytest.param(k, marks=() if k == "device" else slow) for k in REPLAYS])
def test_a_replay_that_does_not_end_is_said(kind: str) -> None:
    """By every rank that waits for it, within the timeout: which step, what was replayed, and who did not come."""
    result = torchrun("replay_worker.py", kind, HELIX_TIMEOUT="5", processes=2, seconds=120)
    for text in REPLAYS[kind]:
        assert re.search(f"helix_compile: {text}", result.stderr), result.stderr
    assert (result.returncode == 0) == (kind == "none") == ("rank 1 done" in result.stdout)


# what follows needs no process group: a store in memory stands for torchrun's


def guards(count: int = 3, seconds: float = 0.3) -> list[RankGuard]:
    store = dist.HashStore()
    return [RankGuard(store, r, count, timedelta(seconds=seconds)) for r in range(count)]


def test_transport_errors_are_known_by_their_text() -> None:
    """As gloo of torch 2.13 words them; a wrong argument is not one."""
    closed = "[third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:233"
    assert is_transport_error(RuntimeError(closed))
    assert is_transport_error(RuntimeError("Timed out waiting 8000ms for send operation"))
    assert not is_transport_error(RuntimeError("Split sizes doesn't match total dim 0 size"))
    assert not is_transport_error(ValueError("gloo"))


def test_the_message_of_a_peer_that_raised_between_steps() -> None:
    mine, peer, _ = guards()
    for guard in (mine, peer):
        guard.begin_step()
        guard.end_step()
    peer.raised(KeyError("layer_9"))
    mine.begin_step()
    fault = mine.lost_peers("body_0.wait_tensor", RuntimeError("gloo: Connection closed"))
    assert str(fault) == (
        "rank 0 lost its peers in step 2 at graph node 'body_0.wait_tensor': rank 1 raised at step 2: KeyError: 'layer_9'"
    )


def test_survivors_of_other_hosts_are_told_from_the_dead_by_their_marks() -> None:
    mine, survivor, dead = guards()
    for guard in (mine, survivor, dead):
        guard.begin_step()
    survivor.lost_peers("wait_tensor", RuntimeError("gloo"))
    fault = str(mine.lost_peers("wait_tensor", RuntimeError("gloo")))
    assert "rank 2 died or is stuck" in fault and "rank 1" not in fault


def test_a_peer_that_does_not_come_is_named_after_the_timeout() -> None:
    mine, came, _ = guards()
    came.store.set("claims/0/1", "{}")
    started = time.monotonic()
    with pytest.raises(Exception, match="before step 1: rank 2 died or is stuck") as caught:
        mine.wait(["claims/0/1", "claims/0/2"], "start")
    assert "rank 1" not in str(caught.value).replace("step 1", "")
    assert 0.3 <= time.monotonic() - started < 3


def test_not_rank_0_is_blamed_when_it_waits_itself() -> None:
    """The verdict is rank 0's to give, and it lacks the claims of rank 2."""
    _, mine, _ = guards()
    for rank in (0, 1):
        mine.store.set(f"claims/0/{rank}", "{}")
    with pytest.raises(Exception, match="rank 2 died or is stuck") as caught:
        mine.wait(["verdict/0/0"], "start", owed=[f"claims/0/{r}" for r in range(3)])
    assert "rank 0" not in str(caught.value)


def test_a_dead_process_is_known_and_a_reused_pid_is_not_taken_for_it() -> None:
    here = own_life()
    assert not is_dead(here, here)
    assert is_dead(here._replace(born="1"), here)
    assert not is_dead(Life("another host", 1, "1"), here)
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        stat = Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()
        life = Life(here.host, child.pid, stat[19])
        assert not is_dead(life, here)
        child.kill()
        time.sleep(0.2)
        assert is_dead(life, here)  # a zombie until it is waited for
    assert is_dead(life, here)


def test_differences_name_the_odd_rank_even_if_it_is_rank_0() -> None:
    claims = [{"plan": "b"}, {"plan": "a"}, {"plan": "a"}]
    assert difference(claims, 0) == ("ranks disagree before the first step: rank 0 has plan b, rank 1 has a")
    assert difference(claims[1:], 4) == ""


_IN_C = """
import ctypes, sys
from helix_compile.worlds.peers import before_sigterm
assert before_sigterm(lambda: (sys.stderr.write("last words\\n"), sys.stderr.flush()))
assert not before_sigterm(print)
mutex = ctypes.create_string_buffer(64)
print("waits", flush=True)
for _ in range(2):  # the second time for ever, without the interpreter, and no signal interrupts it
    ctypes.CDLL(None).pthread_mutex_lock(mutex)
"""


def test_a_rank_that_waits_inside_c_has_last_words() -> None:
    """Torchrun ends survivors by SIGTERM; where only a Python handler listened, nothing would be said, nor would it end."""
    process = subprocess.Popen([sys.executable, "-c", _IN_C], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "waits\n"
    process.terminate()
    _, said = process.communicate(timeout=20)
    assert said == "last words\n" and process.returncode == EXIT_STATUS


def test_somebody_elses_handler_is_left_alone() -> None:
    script = (
        "import signal; mine = lambda *_: None; signal.signal(signal.SIGTERM, mine);"
        "from helix_compile.worlds.peers import before_sigterm;"
        "assert not before_sigterm(print) and signal.getsignal(signal.SIGTERM) is mine"
    )
    assert subprocess.run([sys.executable, "-c", script]).returncode == 0
