"""The sharded cache over a module's life: import, reset of rows, neighbours, several modules, the user's model."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from helix_compile import HelixModule, RuntimeFault, helix_compile
from helix_compile.config.options import PAGE_SIZE
from helix_compile.layout.ledger import positions_on_rank
from helix_compile.runtime import step as step_inputs
from helix_compile.verifier.numeric.reference import WidenedIslands
from tests.support.driver import Reference, deviation, left_padded, random_ids
from tests.support.models import fresh_model, tiny_model


def compiled_tiny(**options: int) -> HelixModule:
    return helix_compile(tiny_model(), max_seq_len=256, **{"cp": 4, "tokens_per_block": 3, **options})


@pytest.mark.parametrize("plan", [{"cp": 4}, {"cp": 2, "tpa": 2, "tokens_per_block": 5}], ids=str)
def test_import_of_a_left_padded_prefill(plan: dict[str, int]) -> None:
    model, mask = tiny_model(), left_padded([19, 30, 27])
    compiled, reference = compiled_tiny(**plan), Reference(model)
    with WidenedIslands():
        reference.step(random_ids(model, 3, 30), mask)
    layers = reference.cache.layers
    latents, ropes = ([t.squeeze(1) for t in part] for part in zip(*((x.keys, x.values) for x in layers), strict=True))
    compiled.import_cache(latents, ropes, mask.sum(1), mask)
    assert compiled.lengths.tolist() == [19, 30, 27]
    ones = torch.ones(3, 1, dtype=torch.int64)
    for _ in range(5):
        ids = random_ids(model, 3, 1)
        with WidenedIslands():
            assert deviation(compiled(ids), reference.step(ids, ones), ones) <= 1e-10


def test_import_puts_each_token_at_its_owner() -> None:
    compiled = compiled_tiny()
    latents = [torch.arange(50.0, dtype=torch.float64).view(1, 50, 1).expand(1, 50, 20)] * 4
    ropes = [torch.zeros(1, 50, 6, dtype=torch.float64)] * 4
    compiled.import_cache(latents, ropes, [50])
    for rank in compiled.ranks:
        expected = positions_on_rank(50, rank.rank, 4, 3)
        pages = rank.cache[2][compiled.page_table[0]].reshape(-1, 26)
        assert torch.equal(pages[: len(expected), 0], expected.double())
        assert torch.count_nonzero(pages[len(expected) :]) == 0


def test_import_refuses_flat_latents() -> None:
    flat = [torch.ones(8, dtype=torch.float64)] * 4
    with pytest.raises(RuntimeFault, match=r"latents must be \[B, S, R\], got \(8,\)"):
        compiled_tiny().import_cache(flat, flat, [8])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"latents": 3}, "3 latents and 4 k_ropes for 4 cached attentions"),
        ({"width": 19}, r"widths 19 and 6; expected R = 20 and r = 6"),
        ({"lengths": [9]}, r"lengths \[9\]; expected 0 <= length <= columns 8"),
        ({"mask": torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1]])}, r"the mask keeps \[6\] tokens a row, lengths say \[8\]"),
    ],
    ids=["sites", "width", "lengths", "mask"],
)
def test_import_refuses_before_it_writes(change: dict, message: str) -> None:
    compiled = compiled_tiny()
    latents = [torch.ones(1, 8, change.get("width", 20), dtype=torch.float64)] * change.get("latents", 4)
    ropes = [torch.ones(1, 8, 6, dtype=torch.float64)] * 4
    with pytest.raises(RuntimeFault, match=message):
        compiled.import_cache(latents, ropes, change.get("lengths", [8]), change.get("mask"))
    assert not any(torch.count_nonzero(c) for r in compiled.ranks for c in r.cache)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"latents": 1}, r"latents must be a list of tensors \[B, S, R\], got int"),
        (
            {"latents": [torch.ones(1, 8, 20, dtype=torch.int64)] * 4},
            r"attention 0: latents must be floating, got torch\.int64",
        ),
        ({"k_ropes": [None] * 4}, r"k_ropes must be a list of tensors \[B, S, r\], got a list holding NoneType"),
        ({"lengths": None}, "lengths must be a list or a tensor of ints, one a sequence, got NoneType"),
        ({"lengths": torch.tensor([8]).numpy()}, "one a sequence, got ndarray"),
        ({"lengths": torch.tensor(8)}, r"got a tensor of shape \(\)"),
        ({"mask": [[1] * 8]}, r"mask must be a tensor \[B, S\], got list"),
        (
            {"latents": [torch.ones(1, 8, 6)] * 4, "k_ropes": [torch.ones(1, 8, 20)] * 4},
            r"widths 6 and 20; expected R = 20 and r = 6.*swapped",
        ),
    ],
    ids=["int", "integers", "none", "no lengths", "numpy", "one length", "list mask", "swapped"],
)
def test_import_refuses_the_wrong_kind(change: dict, message: str) -> None:
    compiled = compiled_tiny()
    good = {"latents": [torch.ones(1, 8, 20)] * 4, "k_ropes": [torch.ones(1, 8, 6)] * 4}
    with pytest.raises(RuntimeFault, match=message):
        compiled.import_cache(**{**good, "lengths": [8], **change})
    assert compiled.lengths.tolist() == []
    assert not any(torch.count_nonzero(c) for r in compiled.ranks for c in r.cache)


def test_widths_are_saved(tmp_path: Path) -> None:
    compiled = compiled_tiny()
    compiled.save(tmp_path / "saved")
    assert HelixModule.load(tmp_path / "saved").facts.latent_widths == (20,) * 4


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_a_step_that_fails_in_a_later_chunk_leaves_the_lengths(
    error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled, ids = compiled_tiny(), random_ids(tiny_model(), 2, 14)
    plain = compiled_tiny()
    compiled(ids[:, :3]), plain(ids[:, :3])
    monkeypatch.setattr(step_inputs, "MAX_CHUNK", 4)
    run, calls = compiled.world.run, []

    def failing(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise error
        return run(*arguments)

    compiled.world.run = failing
    with pytest.raises(error):
        compiled(ids[:, 3:])
    assert compiled.lengths.tolist() == [3, 3] and len(calls) == 2
    assert torch.equal(compiled(ids[:, 3:]), plain(ids[:, 3:]))


def test_a_new_sequence_in_one_row_while_the_others_go_on() -> None:
    model, compiled = tiny_model(), compiled_tiny()
    going = Reference(model)
    ids = random_ids(model, 2, 11)
    with WidenedIslands():
        compiled(torch.cat([ids[:1], random_ids(model, 1, 11), ids[1:]]))
        going.step(ids, torch.ones_like(ids))
        compiled.reset(rows=[1])
        assert compiled.lengths.tolist() == [11, 0, 11]
        fresh = Reference(model)
        for tokens in (4, 1, 2):
            old, new = random_ids(model, 2, tokens), random_ids(model, 1, tokens)
            logits = compiled(torch.cat([old[:1], new, old[1:]]))
            ones = torch.ones_like(old)
            assert deviation(logits[[0, 2]], going.step(old, ones), ones) <= 1e-10
            assert deviation(logits[1:2], fresh.step(new, ones[:1]), ones[:1]) <= 1e-10


def test_neighbours_do_not_matter() -> None:
    model, compiled = tiny_model(), compiled_tiny()
    row, other = random_ids(model, 1, 9), random_ids(model, 2, 9)
    alone = compiled(row)
    compiled.reset()
    together = compiled(torch.cat([other[:1], row, other[1:]]))
    compiled.reset()
    replaced = compiled(torch.cat([other[1:], row, other[1:]]))
    assert (together[1] - alone[0]).abs().max() <= 1e-12 * alone.abs().max()
    assert (together[1] - replaced[1]).abs().max() <= 1e-12 * alone.abs().max()


def test_reset_forgets_everything() -> None:
    compiled, ids = compiled_tiny(), random_ids(tiny_model(), 2, 9)
    first = compiled(ids)
    compiled(random_ids(tiny_model(), 2, 30))
    compiled.reset()
    assert torch.equal(compiled(ids), first)


def test_page_table_is_obeyed() -> None:
    """Pages in another order, scattered: same logits. What is not in the table is never read."""
    model = tiny_model()
    plain, moved = (helix_compile(model, cp=2, tokens_per_block=2, max_seq_len=640, max_batch_size=2) for _ in "ab")
    table = moved._ledger.page_table
    assert table.shape == (2, -(-320 // PAGE_SIZE))
    table.copy_(torch.tensor([[5, 0, 3], [1, 4, 2]]))
    ids = random_ids(model, 2, 600)
    assert torch.equal(plain(ids), moved(ids))
    assert torch.equal(plain.ranks[0].cache[0][0], moved.ranks[0].cache[0][5])


def test_several_modules_and_the_users_model() -> None:
    model = fresh_model(experts="grouped_mm", dtype=torch.float32)
    hooked = model.model.layers[1].register_forward_hook(lambda *_: None)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    modules = [helix_compile(model, cp=cp, max_seq_len=64) for cp in (1, 2, 4)]
    ids = random_ids(model, 2, 7)
    logits = [m(ids) for m in modules]
    again = [m(random_ids(model, 2, 1)) for m in modules]
    assert len(again) == 3
    expected = Reference(model).step(ids, torch.ones_like(ids))
    assert all(deviation(x, expected, torch.ones_like(ids)) <= 1e-5 for x in logits)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert model.config._experts_implementation == "grouped_mm"
    assert not any("forward" in vars(layer) for layer in model.model.layers)
    assert len(model.model.layers[1]._forward_hooks) == 1
    hooked.remove()


def test_shards_are_views_and_go_with_the_module() -> None:
    model = fresh_model()
    compiled = helix_compile(model, cp=4, max_seq_len=64)
    whole = {t.untyped_storage().data_ptr() for t in model.state_dict().values()}
    whole |= {b.untyped_storage().data_ptr() for b in model.buffers()}
    copied = [n for r in compiled.ranks for n, t in r.params.items() if t.untyped_storage().data_ptr() not in whole]
    assert copied == []  # F = 112, 40 and 24 heads divide by 4: nothing is padded
    replaced = torch.zeros_like(compiled.ranks[1].params["model.norm.weight"])
    compiled.ranks[1].params["model.norm.weight"] = replaced
    assert compiled.ranks[0].params["model.norm.weight"] is not replaced
    gone = [weakref.ref(compiled), weakref.ref(compiled.ranks[0].cache[0]), weakref.ref(replaced)]
    del compiled, replaced
    gc.collect()
    assert [ref() for ref in gone] == [None, None, None]
    ref = weakref.ref(model)
    del model
    gc.collect()
    assert ref() is None


def test_an_edit_of_the_graph_is_what_runs() -> None:
    compiled, ids = compiled_tiny(), random_ids(tiny_model(), 2, 6)
    before: Tensor = compiled(ids)
    compiled.reset()
    body = compiled.graph.get_submodule("body_0")
    merge = next(n for n in body.graph.nodes if n.target is torch.ops.helix.merge_lse.default)
    with body.graph.inserting_after(merge):
        doubled = body.graph.call_function(torch.ops.aten.mul.Tensor, (merge, 2.0))
    merge.replace_all_uses_with(doubled, delete_user_cb=lambda user: user is not doubled)
    body.recompile()
    assert not torch.allclose(compiled(ids), before)
