"""Steps that are recorded and replayed give the bits of steps that are not; by a recorder that needs no card.

Most tests take the torch references for kernels, of which one piece holds the whole step; the recorder keeps operator calls.
"""

from __future__ import annotations

import dataclasses
import gc
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch.utils._python_dispatch import TorchDispatchMode

from helix_compile import HelixModule, RuntimeFault, helix_compile
from helix_compile.ir.graph import aten, calls
from helix_compile.ir.stage import bodies_of
from helix_compile.kernels.ops import HELIX_OPS
from helix_compile.runtime import replays
from helix_compile.runtime.replays import ReplayedSteps
from helix_compile.worlds import program
from helix_compile.worlds.tape import Tape
from tests.distributed.steps import (
    FP8_HEADS,
    FP8_LATENTS,
    grouped_model,
    hybrid_model,
    padded_model,
    sparse_model,
    windowed_model,
)
from tests.support.driver import left_padded, random_ids
from tests.support.kernel_cases import CASES
from tests.support.models import fresh_model
from tests.support.recording import FakeGraphs, ReadsAValue, storage
from tests.support.sparse_steps import candidates_of_ranks

OPTIONS: dict[str, Any] = {"cp": 2, "tpa": 2, "tokens_per_block": 4, "max_batch_size": 3, "max_seq_len": 64}
RECORDER = "helix_compile.module.recorder_for"
WEIGHT = "model.layers.1.self_attn.o_proj.weight"


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """What our ops read on the host counts for nothing, as if each were a kernel."""
    monkeypatch.setattr(program, "host_read", lambda node: "")
    monkeypatch.setattr(program, "host_reads", lambda graph: [])


class Pair:
    """A module, and one of the same model that replays what a fake recorder keeps; both take the same steps."""

    def __init__(self, model: Any, monkeypatch: pytest.MonkeyPatch, **options: Any):
        self.model, self.fake = model, FakeGraphs()
        given = {**OPTIONS, "lower": "reference", **options}
        self.plain = helix_compile(model, **given)
        with monkeypatch.context() as patch:
            patch.setattr(RECORDER, lambda device: self.fake)
            self.replayed = helix_compile(model, **given)
        assert self.replayed.replays is not None and self.plain.replays is None
        self.replays: ReplayedSteps = self.replayed.replays

    def each(self, act: Callable[[HelixModule], Any]) -> tuple[Any, Any]:
        """What `act` does to both."""
        return act(self.plain), act(self.replayed)

    def step(self, B: int, T: int, mask: Tensor | None = None, **more: Any) -> Tensor:
        """The replayed logits, which are the plain ones; between two steps the recorder's memory holds nothing."""
        ids = random_ids(self.model, B, T)
        expected, got = self.each(lambda module: module(ids, mask, **more))
        kept = torch.ones(B, T, dtype=torch.bool) if mask is None else mask.bool()
        kept = kept[:, -expected.shape[1] :]
        assert got.shape == expected.shape and expected[kept].isfinite().all()
        assert torch.equal(got[kept], expected[kept]), (B, T)
        self.fake.scribble()
        return got

    def known(self) -> dict[int, str]:
        """Storage -> what lies there, of all that a recorded step may read or write."""
        names: dict[int, str] = {}
        for rank in self.replayed.ranks:
            names |= {storage(t): f"{rank.rank} {name}" for name, t in rank.params.items()}
            names |= {storage(t): f"{rank.rank} cache {i}" for i, t in enumerate(rank.cache)}
        programs = self.replayed.programs()
        assert programs is not None
        for p in programs:
            numbers = [t for t in p.held if t.dim() == 0]
            names |= {storage(t): f"{p.rank} number {i}" for i, t in enumerate(numbers)}
        for recording in self.replays._recordings.values():
            names |= {storage(t): name for name, t in recording.inputs.items()}
        return names


@pytest.fixture
def pair(kernels: None, monkeypatch: pytest.MonkeyPatch) -> Pair:
    return Pair(fresh_model("short", torch.float32), monkeypatch)


def life_of_a_batch(pair: Pair) -> None:
    """Prompt, steps, drafts that are taken back, a row that starts anew, an idle row, another batch, an imported cache."""
    pair.step(3, 7, left_padded([7, 2, 1]))
    for T in (1, 1, 1, 3, 3):
        pair.step(3, T)
    pair.each(lambda module: module.truncate([int(n) - 2 for n in module.lengths]))
    for T in (3, 1, 1):
        pair.step(3, T)
    pair.each(lambda module: module.reset([1]))
    pair.step(3, 1)
    pair.step(3, 1, torch.tensor([[1], [0], [1]]))
    pair.step(3, 3, torch.tensor([[0, 1, 1], [1, 1, 1], [0, 0, 0]]))
    exported = pair.plain.export_cache()
    pair.each(lambda module: module.reset())
    for B, T in ((1, 1), (2, 3)):
        pair.each(lambda module: module.reset())
        for _ in range(3):
            pair.step(B, T)
    pair.each(lambda module: module.import_cache(*exported))
    pair.step(3, 1)
    pair.step(3, 3)


def test_a_batch_has_the_bits_of_one_that_is_not_replayed(pair: Pair) -> None:
    life_of_a_batch(pair)
    assert len(pair.fake.pieces) == 4 and all(tape.pieces == 1 for tape in pair.replays.recordings)
    assert pair.fake.warm_ups == 5  # these shapes, and the prompt
    assert sum(piece.replays for piece in pair.fake.pieces) == 15
    assert pair.plain.world.sent_bytes == pair.replayed.world.sent_bytes
    assert pair.plain.world.num_collectives == pair.replayed.world.num_collectives
    for mine, theirs in zip(pair.replayed.ranks, pair.plain.ranks, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(mine.cache, theirs.cache, strict=True))


def without_inputs(left: str) -> Callable[..., None]:
    """Inputs of the first step stay, of `left`."""
    filled: set[int] = set()

    def fill(places: dict[str, Tensor], step: dict[str, Tensor]) -> None:
        for name, place in places.items():
            if name != left or id(place) not in filled:
                place.copy_(step[name])
            filled.add(id(place))

    return fill


def close_without_replay(tape: Tape) -> None:
    if tape._recording:
        tape._recording = False
        tape._items.append(tape._recorder.end().replay)


@pytest.mark.parametrize(
    ("where", "what", "wrong"),
    [
        (replays, "_fill", without_inputs("input_ids")),
        (replays, "_fill", without_inputs("positions")),
        (replays, "_key", lambda end, B, T: (end, B)),
        (replays, "_key", lambda end, B, T: (end, T)),
        (Tape, "_close", close_without_replay),
    ],
    ids=["stale ids", "stale positions", "one recording for any T", "one for any B", "taken for computed at capture"],
)
def test_a_wrong_replay_shows(pair: Pair, monkeypatch: pytest.MonkeyPatch, where: Any, what: str, wrong: Any) -> None:
    monkeypatch.setattr(where, what, wrong)
    with pytest.raises((AssertionError, RuntimeError)):
        life_of_a_batch(pair)


def test_logits_are_the_callers_own(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    def held_logits_change() -> bool:
        found = [pair.step(2, 1) for _ in range(4)]
        before = [logits.clone() for logits in found]
        pair.step(2, 1)
        return not all(map(torch.equal, found, before))

    assert not held_logits_change()
    monkeypatch.setattr(replays, "_copied", lambda outputs: outputs)
    assert held_logits_change()


def test_a_shape_launches_the_same_on_the_same_memory(pair: Pair) -> None:
    """Recorded twice, with other tokens, lengths and rows that are idle: operators, numbers, shapes, strides and storages are equal, and
    all memory is a parameter, a cache, an input, or allocated by the recording itself.
    """
    pair.step(3, 6, left_padded([6, 1, 2]))
    seen = []
    for mask in (None, torch.tensor([[0, 1], [0, 0], [1, 1]])):
        pair.replays.clear()
        for _ in range(2):
            pair.step(3, 2, mask)
        seen.append(pair.fake.pieces[-1].signature(pair.known()))
    assert len(seen[0]) > 100 and seen[0] == seen[1]


EDITS: dict[str, Callable[[HelixModule], None]] = {}


def edit(act: Callable[[HelixModule], None]) -> Callable[[HelixModule], None]:
    EDITS[act.__name__] = act
    return act


@edit
def assigned(module: HelixModule) -> None:
    module.ranks[1].params[WEIGHT] = module.ranks[1].params[WEIGHT] * 2


@edit
def moved(module: HelixModule) -> None:
    module.ranks[0].params[WEIGHT].data = module.ranks[0].params[WEIGHT] * 3  # the same object, elsewhere


@edit
def turned(module: HelixModule) -> None:
    weight = module.ranks[0].params[WEIGHT]  # the same object and memory, by columns, then by rows
    rows, columns = weight.shape
    weight.data = weight.data.as_strided(weight.shape, (columns, 1) if weight.stride(0) == 1 else (1, rows))


@edit
def another_cache(module: HelixModule) -> None:
    module.ranks[2].cache[1] = module.ranks[2].cache[1] * 1.5


@edit
def another_graph(module: HelixModule) -> None:
    (body, *_) = bodies_of(module.graph).values()
    calls(body.graph, aten.silu.default)[0].target = aten.relu.default
    body.recompile()


@pytest.mark.parametrize("name", EDITS)
def test_an_edit_shows_in_the_next_step(pair: Pair, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for _ in range(3):
        last = pair.step(2, 1)
    pieces = len(pair.fake.pieces)
    pair.each(EDITS[name])
    for _ in range(3):
        pair.step(2, 1)
    assert len(pair.fake.pieces) > pieces and len(pair.replays.recordings) == 1
    if name == "moved":  # if nobody asked where it lies; how it lies, programs ask too
        monkeypatch.setattr(replays._Recording, "holds", True)
        with pytest.raises(AssertionError):
            pair.each(EDITS[name])
            pair.step(2, 1)
    assert last.isfinite().all()


def test_an_edit_in_place_needs_no_other_recording(pair: Pair) -> None:
    for _ in range(3):
        pair.step(2, 1)
    with torch.no_grad():
        pair.model.model.layers[0].mlp.up_proj.weight.mul_(1.5)
    pair.step(2, 1)
    assert len(pair.fake.pieces) == 1 and pair.fake.pieces[0].replays == 3


def test_settings_and_modes_of_the_caller_are_followed(pair: Pair) -> None:
    for _ in range(3):
        pair.step(2, 1)
    (piece,) = pair.fake.pieces
    torch.set_float32_matmul_precision("medium")
    try:
        pair.step(2, 1)
    finally:
        torch.set_float32_matmul_precision("highest")
    assert piece.replays == 2 and pair.fake.warm_ups == 2

    class Sees(TorchDispatchMode):
        seen = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.seen += func is aten.linear.default or func is aten.mm.default
            return func(*args, **(kwargs or {}))

    with Sees() as mode:
        pair.replayed(random_ids(pair.model, 2, 1))
    assert mode.seen > 8 and piece.replays == 2


def test_recorded_in_inference_mode_and_replayed_outside(pair: Pair) -> None:
    with torch.inference_mode():
        for _ in range(2):
            pair.step(2, 1)
    assert not pair.step(2, 1).is_inference()
    assert pair.fake.pieces[0].replays == 2


def test_few_recordings_are_kept(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """The least recently used one goes, its memory too, and is recorded again when it comes twice more."""
    monkeypatch.setattr(replays, "KEPT", 2)
    for T in (1, 1, 2, 2, 1, 3):
        pair.step(2, T)
    gone = weakref.ref(pair.fake.pieces[1])
    pair.fake.pieces[1:] = []
    pair.step(2, 3)  # the third recording: that of T = 2 goes
    gc.collect()
    assert gone() is None and len(pair.replays.recordings) == 2
    for T in (1, 2, 2, 1, 3, 2):
        pair.step(2, T)
    assert len(pair.replays.recordings) == 2


def test_prompts_are_not_recorded(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replays, "RECORDED_TOKENS", 4)
    for _ in range(3):
        pair.step(1, 5)
    assert not pair.fake.pieces and not pair.fake.warm_ups
    pair.step(1, 4), pair.step(1, 4)
    assert len(pair.fake.pieces) == 1


def test_two_modules_take_turns(kernels: None, monkeypatch: pytest.MonkeyPatch) -> None:
    model = fresh_model("short", torch.float32)
    pairs = [Pair(model, monkeypatch), Pair(model, monkeypatch, cp=4, tpa=1)]
    for _ in range(4):
        for one in pairs:
            one.step(2, 1)
            for other in pairs:  # each has memory of its own
                other.fake.scribble()
    assert [len(one.fake.pieces) for one in pairs] == [1, 1]


def test_a_step_that_cannot_be_recorded_says_so(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a card refuses: the node and what to do; the batch goes on where it was, and no piece is left open."""
    pair.step(2, 1)

    def refuses(call: Any, arguments: Any) -> Any:
        if call is aten.silu.default:
            raise RuntimeError("operation not permitted when stream is capturing")
        return call(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(pair.fake, "launch", refuses)
        with pytest.raises(RuntimeFault, match=r"rank 0, node layer_0\.\w+: aten.silu.*capturing; .*cuda_graphs=False"):
            pair.replayed(random_ids(pair.model, 2, 1))
    for _ in range(2):
        pair.step(2, 1)
    assert pair.replayed.lengths.tolist() == [3, 3]


def test_modules_side_by_side_in_threads(kernels: None, monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = [Pair(fresh_model("short", torch.float32), monkeypatch) for _ in range(2)]
    ids = [random_ids(pair.model, 2, 1) for pair in pairs for _ in range(5)]
    expected = [[pair.plain(x) for x in ids[i * 5 : i * 5 + 5]] for i, pair in enumerate(pairs)]
    with ThreadPoolExecutor(2) as pool:
        runs = [
            pool.submit(lambda i=i: [pairs[i].replayed(x) for x in ids[i * 5 : i * 5 + 5]]) for i in range(len(pairs))
        ]
        assert all(all(map(torch.equal, run.result(), e)) for run, e in zip(runs, expected, strict=True))
    assert [len(pair.fake.pieces) for pair in pairs] == [1, 1]


@pytest.mark.parametrize("more", [{}, {"prompt_lookup_num_tokens": 3}], ids=["greedy", "drafts"])
def test_generate(pair: Pair, more: dict[str, Any]) -> None:
    ids = (random_ids(pair.model, 1, 5) % 96 + 1).repeat(1, 3)[:, :13]
    options = {"do_sample": False, "pad_token_id": 0, "max_new_tokens": 16, **more}
    expected, got = pair.each(lambda module: module.generate(ids, **options))
    assert torch.equal(got, expected) and sum(piece.replays for piece in pair.fake.pieces) > 3


@pytest.mark.parametrize("sample", [{}, {"do_sample": True, "top_k": 2}], ids=["best words", "top words"])
def test_generate_with_a_head_that_is_cut(
    kernels: None, monkeypatch: pytest.MonkeyPatch, sample: dict[str, Any]
) -> None:
    pair = Pair(fresh_model("short", torch.float32), monkeypatch, head="shard", pad_heads=True)
    ids = random_ids(pair.model, 2, 4)
    found = []
    for module in (pair.plain, pair.replayed):
        torch.manual_seed(3)
        found.append(module.generate(ids, pad_token_id=0, max_new_tokens=9, **{"do_sample": False, **sample}))
    assert torch.equal(*found) and sum(piece.replays for piece in pair.fake.pieces) > 5
    assert pair.plain.world.sent_bytes == pair.replayed.world.sent_bytes


def test_a_reloaded_module_replays(pair: Pair, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pair.replayed.save(tmp_path / "saved")
    fake = FakeGraphs()
    monkeypatch.setattr(RECORDER, lambda device: fake)
    loaded = HelixModule.load(tmp_path / "saved")
    for _ in range(3):
        ids = random_ids(pair.model, 2, 1)
        assert torch.equal(loaded(ids), pair.plain(ids))
    assert [piece.replays for piece in fake.pieces] == [2]
    off = helix_compile(pair.model, **OPTIONS, cuda_graphs=False)
    assert off.replays is None and off.programs() is None


def test_what_reads_on_the_host_is_called_between_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the references as they are: append and attention of each layer and rank, and the experts of one, stand apart."""
    pair = Pair(fresh_model("short", torch.float32), monkeypatch)
    life_of_a_batch(pair)
    for tape in pair.replays.recordings:
        assert tape.apart_calls == 4 * (2 * 2 + 1) and 1 < tape.pieces <= tape.apart_calls + 1
    assert pair.plain.world.sent_bytes == pair.replayed.world.sent_bytes


def test_code_of_others_is_not_replayed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer that stays the user's module has a state; a function that an edit calls may keep what it is given."""
    hybrid = Pair(hybrid_model(), monkeypatch, cp=4, tpa=1)
    pair = Pair(fresh_model("short", torch.float32), monkeypatch)
    kept: list[Tensor] = []

    def keeps(x: Tensor) -> Tensor:
        kept.append(x)
        return x * len(kept)

    (body, *_) = bodies_of(pair.replayed.graph).values()
    node = calls(body.graph, aten.linear.default)[0]
    with body.graph.inserting_after(node):
        scaled = body.graph.call_function(keeps, (node,))
    scaled.meta = dict(node.meta)
    node.replace_all_uses_with(scaled, delete_user_cb=lambda user: user is not scaled)
    body.recompile()
    for _ in range(3):
        hybrid.step(2, 1)
        pair.replayed(random_ids(pair.model, 2, 1))
    assert not hybrid.fake.pieces and not pair.fake.pieces and len(kept) == 12


@pytest.mark.slow
def test_compiled_segments_are_replayed(monkeypatch: pytest.MonkeyPatch) -> None:
    pair = Pair(fresh_model("short", torch.bfloat16), monkeypatch, lower="inductor")
    for T in (5, 1, 1, 1, 2, 2):
        pair.step(2, T)
    (one, two) = pair.replays.recordings
    assert one.pieces == two.pieces > 1 and one.apart_calls == 4 * 3  # segments that hold a reference which reads


def test_what_stands_apart_is_told() -> None:
    """As a report of a card says it: of a stage of references, of segments, and of one without anything to tell."""
    card = torch.device("cuda")
    compiled = helix_compile(fresh_model("short", torch.float32), **OPTIONS, lower="reference")
    facts = compiled.inspect().facts["cuda_graphs"]
    assert facts == {"used": False, "why": "on cpu: CUDA graphs are a card's", "apart": []}
    assert (
        compiled.replays is None and compiled.programs() is None
    )  # the default True asks for nothing here; nor does False
    off = replays.replay_facts(
        dataclasses.replace(compiled.plan.options, cuda_graphs=False), compiled.device, compiled.graph, ""
    )
    assert off == {"used": False, "why": "cuda_graphs=False", "apart": []}
    told = replays.replay_facts(compiled.plan.options, card, compiled.graph, "gloo works through the host")
    assert told["used"] and "in pieces" in told["why"]
    ops = [" ".join(x["why"].split()[:5]) for x in told["apart"]]
    wanted = ["cache_append", "mla_decode", "cache_append", "mla_decode", "moe_experts"]
    assert ops == [*(f"the torch reference of helix.{op}.default" for op in wanted), "gloo works through the host"]
    off = replays.replay_facts(dataclasses.replace(compiled.plan.options, cuda_graphs=False), card, compiled.graph, "")
    assert (off["used"], off["why"]) == (False, "cuda_graphs=False")
    hybrid = helix_compile(hybrid_model(), **{**OPTIONS, "cp": 4, "tpa": 1})
    told = replays.replay_facts(hybrid.plan.options, card, hybrid.graph, "")
    assert not told["used"] and "stays the user's own module" in told["why"]
    kernels = fx.GraphModule(torch.nn.Module(), fx.Graph())
    told = replays.replay_facts(compiled.plan.options, card, kernels, "")
    assert told["why"].endswith("one graph a step")


def one_call() -> dict[str, tuple[Any, ...]]:
    """Arguments of each op, on the CPU."""
    found: dict[str, tuple[Any, ...]] = {}
    for case in CASES:
        found.setdefault(case.op, case.arguments(torch.float32, 0))
    number, positions = torch.tensor(1), torch.tensor([[0, 5, -1], [9, 10, 11]])
    logits, (_, candidates) = torch.randn(2, 1, 9), candidates_of_ranks("random", [[20], [3]], 30, 4, 2, 5, seed=0)
    partial_o, lse, lse_P = torch.randn(2, 1, 4, 6), torch.randn(2, 1, 4), torch.randn(3, 2, 1, 4)
    return found | {
        "shard_index": (positions, number, 2, 4),
        "first_visible": (positions, number, 2, 4, 6, 0),
        "embed_rows": (torch.tensor([[3, 0]]), torch.randn(4, 5), number),
        "best_word": (logits, number, 9),
        "top_words": (logits, number, 9, 3),
        "best_of_words": (torch.randn(2, 1, 3, 2),),
        "total_lse": (lse_P,),
        "apply_sinks": (partial_o, lse, torch.randn(4)),
        "rescale_by_lse": (partial_o, lse, lse_P),
        "rows_of_part": (partial_o, 1, 2),
        "place_rows": (partial_o[:1], partial_o, 0, 2),
        "rows_for_owners": (candidates[0], 3),
        "pack_kth": (torch.randn(3, 1), torch.ones(3, 1, dtype=torch.int64)),
        "heads_of_rank": (torch.randn(2, 1, 4, 6), number, 2),
        "unpack_kth": (torch.ones(6, 2, dtype=torch.int32), positions),
    }


def test_which_references_read_on_the_host() -> None:
    """Op.reads_values is what the recorder says of each; codecs of the exchange are of one kind."""
    given = one_call()
    ops = {op.name: op for op in HELIX_OPS if "." not in op.name}
    assert given.keys() >= ops.keys()
    for name, op in ops.items():
        fake = FakeGraphs()
        fake.begin()
        try:
            op.function(*given[name])
            reads = False
        except ReadsAValue:
            reads = True
        finally:
            fake.abandon()
        assert reads == op.reads_values, name


@pytest.mark.parametrize(
    "read", [Tensor.item, Tensor.tolist, bool, int, Tensor.nonzero, Tensor.numpy, lambda x: x[x > 0], lambda x: x.cpu()]
)
def test_a_read_on_the_host_is_caught(read: Callable[[Tensor], Any]) -> None:
    fake = FakeGraphs()
    fake.begin()
    try:
        with pytest.raises(ReadsAValue):
            read(torch.ones(1))
    finally:
        fake.abandon()


@pytest.mark.slow
def test_triton_kernels_are_one_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    """The very launchers of a card, by Triton's interpreter: nothing stands apart."""
    pair = Pair(fresh_model("short", torch.float32), monkeypatch, lower="triton", cp=2, tpa=1)
    pair.step(2, 3, left_padded([3, 1]))
    for _ in range(3):
        pair.step(2, 1)
    (tape,) = pair.replays.recordings
    assert (tape.pieces, tape.apart_calls) == (1, 0)


OF_KINDS: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "grouped": (grouped_model, {}),
    "zero heads": (padded_model, {"pad_heads": True}),
    "cut vocabulary": (grouped_model, {"head": "shard", "pad_heads": True}),
    "windows of their own": (windowed_model, {"window": "replicate"}),
    "sparse": (sparse_model, {}),
    "sparse, owner": (sparse_model, {"topk_exchange": "owner"}),
    "fp8 latents": (lambda: fresh_model("short", torch.float32), FP8_LATENTS),
    "fp8 heads": (grouped_model, FP8_HEADS),
    "ag_rs": (lambda: fresh_model("short", torch.float32), {"merge": "ag_rs", "q_proj": "gather"}),
    "float16": (lambda: fresh_model("short", torch.float16), {}),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", OF_KINDS)
def test_every_kind_of_site_is_one_piece(kernels: None, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """No op of torch in any of them reads on the host."""
    make, options = OF_KINDS[name]
    pair = Pair(make(), monkeypatch, **options)
    for T in (5, 1, 1, 1, 3, 3, 3):
        pair.step(2, T)
    assert [(tape.pieces, tape.apart_calls) for tape in pair.replays.recordings] == [(1, 0)] * 2
    pair.replays.clear()
    seen = []
    for _ in range(2):
        for _ in range(2):
            pair.step(2, 2)
        seen.append(pair.fake.pieces[-1].signature(pair.known()))
        pair.replays.clear()
    assert seen[0] == seen[1]
