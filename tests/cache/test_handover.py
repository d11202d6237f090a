"""Hand-over of a cache: export, import by chunks, a DynamicCache, shards of a sender, a file, two processes."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache

from helix_compile import HelixModule, RuntimeFault, helix_compile
from helix_compile.cache import file as handover_file
from helix_compile.cache.file import read_cache, write_cache
from helix_compile.cache.shards import CacheEntries, CacheShard, join_shards, positions_of_sender, shards_of_sender
from helix_compile.checkpoint.named import named_model
from helix_compile.models.presets import build_model, preset_config
from helix_compile.verifier.numeric.reference import WidenedIslands
from tests.support.driver import Reference, deviation, left_padded, random_ids
from tests.support.handover import columns_of, dealt, random_entries, untouched
from tests.support.models import tiny_model

ROOT = Path(__file__).resolve().parents[2]
R, r, SITES = 20, 6, 4


def compiled_tiny(**options: int) -> HelixModule:
    return helix_compile(tiny_model(), max_seq_len=256, **{"cp": 4, "tokens_per_block": 3, **options})


def same(a: CacheEntries, b: CacheEntries) -> bool:
    parts = zip((*a.latents, *a.k_ropes, a.lengths), (*b.latents, *b.k_ropes, b.lengths), strict=True)
    return all(torch.equal(x, y) for x, y in parts)


@pytest.mark.parametrize("plan", [{}, {"cp": 2, "tpa": 2, "tokens_per_block": 5}, {"cp": 1}], ids=str)
def test_export_is_the_inverse_of_import(plan: dict[str, int]) -> None:
    compiled, entries = compiled_tiny(**plan), random_entries([50, 1, 0, 37], [R] * SITES, [r] * SITES)
    compiled.import_cache(*entries)
    assert same(compiled.export_cache(), entries)
    compiled.import_cache(*compiled.export_cache())
    assert same(compiled.export_cache(), entries)


def test_a_cache_moves_between_layouts_in_mid_decode() -> None:
    """From cp 4, blocks of 3, to cp 2 x tpa 2, blocks of 5; both go on as the model does."""
    model, reference = tiny_model(), Reference(tiny_model())
    here, there = compiled_tiny(), compiled_tiny(cp=2, tpa=2, tokens_per_block=5)
    mask, ids = left_padded([19, 31]), random_ids(model, 2, 31)
    ones = torch.ones(2, 1, dtype=torch.int64)
    with WidenedIslands():
        here(ids, mask), reference.step(ids, mask)
        there.import_cache(*here.export_cache())
        for _ in range(4):
            ids = random_ids(model, 2, 1)
            expected = reference.step(ids, ones)
            assert deviation(here(ids), expected, ones) <= 1e-10
            assert deviation(there(ids), expected, ones) <= 1e-10


@pytest.mark.parametrize("chunks", [[30], [11, 2, 17]], ids=str)
def test_a_dynamic_cache_whole_or_as_it_grows(chunks: list[int]) -> None:
    """The sender's cache is given again after each chunk; what is here already is skipped."""
    model, mask = tiny_model(), left_padded([19, 30, 27])
    compiled, reference = compiled_tiny(), Reference(model)
    start = 0
    with WidenedIslands():
        for width in chunks:
            part = mask[:, start : start + width]
            reference.step(random_ids(model, 3, width), part)
            start += width
            compiled.import_cache(reference.cache, mask=mask[:, :start], append=True)
        assert compiled.lengths.tolist() == [19, 30, 27]
        ids, ones = random_ids(model, 3, 1), torch.ones(3, 1, dtype=torch.int64)
        assert deviation(compiled(ids), reference.step(ids, ones), ones) <= 1e-10


def test_chunks_of_tensors_are_one_cache() -> None:
    entries = random_entries([50, 1, 37], [R] * SITES, [r] * SITES)
    compiled = compiled_tiny()
    for start, stop in ((0, 4), (4, 23), (23, 50)):
        lengths = (entries.lengths.clamp(max=stop) - start).clamp(min=0)
        latents, k_ropes = ([t[:, start:stop] for t in part] for part in entries[:2])
        compiled.import_cache(latents, k_ropes, lengths, append=True)
    assert same(compiled.export_cache(), entries)


def test_a_row_is_handed_over_while_the_others_go_on() -> None:
    compiled, ids = compiled_tiny(), random_ids(tiny_model(), 2, 9)
    compiled(ids)
    before = compiled.export_cache()
    compiled.reset(rows=[0])
    new = random_entries([40, 0], [R] * SITES, [r] * SITES)
    compiled.import_cache(*new, append=True)
    after = compiled.export_cache()
    assert after.lengths.tolist() == [40, 9]
    assert all(torch.equal(a[0], b[0]) for a, b in zip(after.latents, new.latents, strict=True))
    assert all(torch.equal(a[1, :9], b[1]) for a, b in zip(after.k_ropes, before.k_ropes, strict=True))


def filled(columns: int, kind: type = DynamicCache, width: int = R, heads: int = 1) -> Any:
    cache = kind(config=tiny_model().config)
    for i in range(SITES):
        cache.update(torch.ones(1, heads, columns, width), torch.ones(1, heads, columns, r), i)
    return cache


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (lambda c: c.import_cache(filled(8), [torch.ones(1, 8, r)] * 4), "leave k_ropes out"),
        (lambda c: c.import_cache(DynamicCache()), "the DynamicCache is empty"),
        (lambda c: c.import_cache(filled(8, width=R + 1)), "widths 21 and 6; expected R = 20"),
        (lambda c: c.import_cache(filled(8, heads=2)), r"holds \(1, 2, 8, 20\), expected \[B, 1, S, width\]"),
        (lambda c: c.import_cache(filled(8), lengths=[9]), r"lengths \[9\]; expected 0 <= length <= columns 8"),
        (lambda c: c.import_cache(filled(8), mask=torch.ones(1, 7)), r"mask \(1, 7\), expected \(1, 8\)"),
        (lambda c: c.import_cache(filled(4), append=True), r"holds \[4\] tokens, fewer than the \[5\]"),
        (
            lambda c: c.import_cache(*random_entries([1, 2], [R] * 4, [r] * 4), append=True),
            "2 sequences to append to a batch of 1",
        ),
        (
            lambda c: c.import_cache(*random_entries([252], [R] * 4, [r] * 4), append=True),
            r"\[252\] tokens after \[5\] are more than max_seq_len=256",
        ),
        (lambda c: c.import_cache([torch.ones(1, 8, R)] * 4), "k_ropes must be a list of tensors"),
    ],
)
def test_refused_before_anything_is_written(given: Callable[[HelixModule], None], message: str) -> None:
    compiled = compiled_tiny()
    compiled(random_ids(tiny_model(), 1, 5))
    with untouched(compiled), pytest.raises(RuntimeFault, match=message):
        given(compiled)


def test_a_static_cache_is_refused() -> None:
    model = tiny_model()
    cache = StaticCache(config=model.config, max_cache_len=16)
    with pytest.raises(RuntimeFault, match="must be a list of tensors"):
        compiled_tiny().import_cache(cache)  # type: ignore[arg-type]


# TensorRT-LLM's vectors of prompt placement (executor/test_request_utils.py; its tokens are named from 1)
PROMPTS = [
    (2, 4, 13, [[1, 2, 9, 10], [3, 4, 11, 12], [5, 6, 13], [7, 8]]),
    (4, 2, 12, [[1, 2, 3, 4, 9, 10, 11, 12], [5, 6, 7, 8]]),
    (4, 4, 10, [[1, 2, 3, 4], [5, 6, 7, 8], [9, 10], []]),
]


@pytest.mark.parametrize("rotation", ["global", "restarts_at_decode"])
@pytest.mark.parametrize(("tokens_per_block", "cp", "length", "expected"), PROMPTS)
def test_prompts_lie_as_tensorrt_llm_says(
    rotation: str, tokens_per_block: int, cp: int, length: int, expected: list[list[int]]
) -> None:
    for rank, tokens in enumerate(expected):
        held = positions_of_sender(length, rank, cp, tokens_per_block, rotation, length)
        assert (held + 1).tolist() == tokens


def test_the_first_decoded_token_lies_as_tensorrt_llm_says() -> None:
    """10 tokens, blocks of 4, cp 4: its executor gives the first decoded token to rank 0, a global ledger to rank 2."""
    for rotation, owner in (("restarts_at_decode", 0), ("global", 2)):
        for rank in range(4):
            held = positions_of_sender(11, rank, 4, 4, rotation, 10).tolist()
            assert (10 in held) == (rank == owner)


@pytest.mark.parametrize("rotation", ["global", "restarts_at_decode"])
@pytest.mark.parametrize(("cp", "tokens_per_block"), [(4, 4), (3, 1), (2, 32), (1, 5)])
def test_shards_of_any_sender(rotation: str, cp: int, tokens_per_block: int) -> None:
    """Dealt token by token as the sender's executor does, then joined, imported and exported."""
    entries, prompts = random_entries([50, 11, 3], [R] * SITES, [r] * SITES), [41, 10, 0]
    restart = rotation != "global"
    parts = dealt(entries, cp, tokens_per_block, prompts if restart else None)
    joined = join_shards(
        shards_of_sender(
            *parts,
            entries.lengths.tolist(),
            tokens_per_block=tokens_per_block,
            rotation=rotation,
            prompt_lengths=prompts if restart else None,
        )
    )
    assert same(joined, entries)
    compiled = compiled_tiny()
    compiled.import_cache(*joined)
    assert same(compiled.export_cache(), entries)


def test_a_wrong_rotation_is_found() -> None:
    entries = random_entries([11], [R], [r])
    parts = dealt(entries, 4, 4, [10])
    with pytest.raises(
        RuntimeFault,
        match=r"rank 0 latents: attention 0: got \(1, 5, 20\), expected \[1, 4, width\]: by rotation='global'",
    ):
        shards_of_sender(*parts, [11], tokens_per_block=4)
    for wrong, message in (
        ({"rotation": "local"}, "rotation='local'; expected one of"),
        ({"rotation": "restarts_at_decode"}, "expected prompt_lengths for"),
        ({"prompt_lengths": [10]}, "where they have no effect"),
        ({"rotation": "restarts_at_decode", "prompt_lengths": [12]}, "0 <= prompt length <= length"),
        ({"tokens_per_block": 0}, "tokens_per_block must be an int >= 1, got 0"),
    ):
        with pytest.raises(RuntimeFault, match=message):
            shards_of_sender(*parts, [11], **{"tokens_per_block": 4, **wrong})  # type: ignore[arg-type]


def test_one_rank_alone_exports_its_part() -> None:
    """As on real ranks: each process holds one rank."""
    entries = random_entries([50, 7], [R] * SITES, [r] * SITES)
    shards: list[CacheShard] = []
    for rank in range(8):
        compiled = compiled_tiny(tpa=2)
        compiled.ranks[:] = compiled.ranks[rank : rank + 1]
        compiled.import_cache(*entries)
        with pytest.raises(RuntimeFault, match=rf"holds cp rank {rank % 4} of 4 alone; export_shards"):
            compiled.export_cache()
        shards += compiled.export_shards()
    assert shards[1].positions[1, :3].tolist() == [3, 4, 5] and shards[2].positions[1, 0] == 6
    assert same(join_shards(shards), entries)
    with pytest.raises(RuntimeFault, match=r"sequence 0 of 50 tokens: 38 tokens in 3 shards, 12 positions missing"):
        join_shards([s for s in shards if s.cp_rank != 1])
    shards[5].latents[2][0, 0, 0] += 1
    with pytest.raises(RuntimeFault, match="two shards of cp rank 1 differ"):
        join_shards(shards)


def test_nothing_to_export() -> None:
    compiled = compiled_tiny()
    with pytest.raises(RuntimeFault, match="there is no batch"):
        compiled.export_cache()
    with pytest.raises(RuntimeFault, match="meta device"):
        helix_compile(named_model("tiny", None, meta=True), cp=2).export_cache()


def test_a_file_holds_a_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, entries = tmp_path / "cache.safetensors", random_entries([9, 4], [R] * 2, [r] * 2)
    halves = [torch.cat([a, b], dim=-1) for a, b in zip(*entries[:2], strict=True)]
    views = CacheEntries([h[..., :R] for h in halves], [h[..., R:] for h in halves], entries.lengths)
    write_cache(path, views)
    assert same(read_cache(path), entries)
    shared = CacheEntries([entries.latents[0]] * 2, [entries.k_ropes[0]] * 2, entries.lengths)
    write_cache(path, shared)
    assert same(read_cache(path), shared)
    whole = path.read_bytes()
    for broken in (
        whole[:-7],
        whole[:40],
        b"",
        b"\xff" * 64,
        whole.replace(b"latents.1", b"latents.7"),
        whole.replace(b"cache.1", b"cache.9"),
    ):
        path.write_bytes(broken)
        with pytest.raises(RuntimeFault, match=r"cache\.safetensors: "):
            read_cache(path)
    with pytest.raises(RuntimeFault, match="can't read this cache"):
        read_cache(tmp_path / "none.safetensors")
    path.write_bytes(whole)
    monkeypatch.setattr(handover_file, "save_file", _full_disk)
    with pytest.raises(RuntimeFault, match=r"can't write the cache: .*No space left"):
        write_cache(path, entries)
    assert [f.name for f in tmp_path.iterdir()] == [path.name] and same(read_cache(path), shared)


def _full_disk(tensors: dict[str, Tensor], file: Path, metadata: dict[str, str]) -> None:
    file.write_bytes(b"half")
    raise OSError(28, "No space left on device")


@pytest.mark.slow
def test_the_example_of_two_processes(tmp_path: Path) -> None:
    """Prefill by the unmodified model in one process, decode by four ranks in another; one process says the same."""
    for script in ("prefill", "decode"):
        command = [sys.executable, str(ROOT / f"examples/04_handover/{script}.py"), str(tmp_path)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    model = build_model(preset_config("tiny"))
    prompts = torch.randint(0, 256, (2, 50), generator=torch.Generator().manual_seed(1))
    expected = model.generate(prompts, max_new_tokens=24, do_sample=False, pad_token_id=0)
    assert json.loads(done.stdout) == expected[:, 50:].tolist()
    assert columns_of(read_cache(tmp_path / "cache.safetensors")) == 50


def test_only_a_file_is_replaced(tmp_path: Path) -> None:
    """A link, a folder or a device in the place of the file stays what it is."""
    link, aim = tmp_path / "link", tmp_path / "aim"
    aim.write_bytes(b"as it was")
    link.symlink_to(aim)
    entries = CacheEntries([torch.zeros(1, 2, 4)], [torch.zeros(1, 2, 2)], torch.tensor([2]))
    for path in (link, tmp_path):
        with pytest.raises(RuntimeFault, match="is a link, a folder or a device"):
            write_cache(path, entries)
    assert link.is_symlink() and aim.read_bytes() == b"as it was"
