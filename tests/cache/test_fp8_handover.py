"""A cache in FP8 on its way in and out: rounded once, or bit for bit; into a file, after truncate and reset, saved and loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from helix_compile import HelixModule, helix_compile, read_cache, write_cache
from helix_compile.cache.shards import join_shards
from helix_compile.errors import HelixError, RuntimeFault
from tests.support.driver import left_padded, random_ids
from tests.support.fp8 import CacheRounding, poison
from tests.support.gqa_models import fresh_gqa
from tests.support.models import tiny_model

SCALES = (0.01, 0.05)
FORMATS: dict[str, dict[str, Any]] = {
    "fp8_e4m3": {"cache_dtype": "fp8_e4m3", "cache_scale": SCALES},
    "fp8_ds_mla": {"cache_dtype": "fp8_ds_mla"},
}
ROUNDINGS = {"fp8_e4m3": CacheRounding(SCALES), "fp8_ds_mla": CacheRounding(None)}
LENGTHS = [5, 11, 8]


def compiled(name: str, cp: int = 2, **plan: Any) -> HelixModule:
    return helix_compile(tiny_model("short"), cp=cp, max_seq_len=256, **FORMATS[name], **plan)


def prefilled() -> tuple[DynamicCache, torch.Tensor]:
    model, mask = tiny_model("short"), left_padded(LENGTHS)
    cache = DynamicCache(config=model.config)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    ids = random_ids(model, *mask.shape)
    with torch.no_grad():
        model(input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache)
    return cache, mask


@pytest.mark.parametrize("name", FORMATS)
def test_an_import_is_rounded_once_and_comes_out_so(name: str) -> None:
    cache, mask = prefilled()
    module = compiled(name, cp=3, tokens_per_block=2)
    poison(module)
    module.import_cache(cache, mask=mask)
    latents, k_ropes, lengths = module.export_cache()
    assert lengths.tolist() == LENGTHS
    for site, layer in enumerate(cache.layers):
        rounded = ROUNDINGS[name](site, layer.keys, layer.values)
        for got, expected in zip((latents[site], k_ropes[site]), rounded, strict=True):
            for row, n in enumerate(LENGTHS):
                assert torch.equal(got[row, :n], expected[row, 0, mask.shape[1] - n :])


@pytest.mark.parametrize("name", FORMATS)
def test_raw_goes_bit_for_bit_through_a_file_to_other_ranks(name: str, tmp_path: Path) -> None:
    """Scales that no amax / 448 would give stay as they are."""
    one, other = compiled(name), compiled(name, cp=4, tokens_per_block=1)
    ids = random_ids(tiny_model("short"), 3, 9)
    one(ids)
    if name == "fp8_ds_mla":  # half the values, twice the scale: the same entries, not what we would write
        for cache in one.ranks[0].cache + one.ranks[1].cache:
            cache[..., 20:24] = (cache[..., 20:24].contiguous().view(torch.float32) * 2).view(torch.uint8)
    raw = one.export_cache(raw=True)
    assert raw.latents[0].dtype is (torch.float8_e4m3fn if name == "fp8_e4m3" else torch.uint8)
    write_cache(tmp_path / "raw", raw)
    other.import_cache(*read_cache(tmp_path / "raw"))
    back = join_shards([*other.export_shards(raw=True), *other.export_shards(raw=True)])
    for a, b in zip((*raw.latents, *raw.k_ropes), (*back.latents, *back.k_ropes), strict=True):
        assert a.dtype is b.dtype and torch.equal(a.view(torch.uint8), b.view(torch.uint8))
    again = random_ids(tiny_model("short"), 3, 2)
    torch.testing.assert_close(one(again), other(again), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", FORMATS)
def test_truncate_reset_and_appended_imports(name: str) -> None:
    """What was taken back leaves no trace, NaN neither; an import may go on behind a prompt."""
    model, module, fresh = tiny_model("short"), compiled(name), compiled(name)
    ids = random_ids(model, 2, 14)
    expected = fresh(ids)
    module(ids[:, :6])
    poison(module)
    module.reset()
    module(ids[:, :9])
    module(random_ids(model, 2, 4))
    module.truncate(9)
    latents, k_ropes, _ = fresh.export_cache()
    module.import_cache([x[:, 9:12] for x in latents], [x[:, 9:12] for x in k_ropes], [3, 3], append=True)
    assert module.lengths.tolist() == [12, 12]
    torch.testing.assert_close(module(ids[:, 12:]), expected[:, 12:], rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", FORMATS)
def test_save_and_load_are_bitwise(name: str, tmp_path: Path) -> None:
    module = compiled(name)
    module.save(tmp_path / "m")
    loaded = HelixModule.load(tmp_path / "m")
    ids = random_ids(tiny_model("short"), 2, 7)
    assert loaded.plan == module.plan and torch.equal(loaded(ids), module(ids))
    text = (tmp_path / "m" / "graphs.json").read_text()
    (tmp_path / "m" / "digests.json").unlink()
    if name == "fp8_e4m3":
        (tmp_path / "m" / "graphs.json").write_text(text.replace('"cache_scale": {"node": "cache_scale_0"}', ""))
        with pytest.raises(HelixError, match=r"cache_scale: got .*, expected a cache_scale"):
            HelixModule.load(tmp_path / "m")


def test_k_and_v_of_ranks_that_share_heads() -> None:
    model = fresh_gqa("llama")
    plan: dict[str, Any] = {"cache_dtype": "fp8_e4m3", "cache_scale": 0.02, "max_seq_len": 64}
    one, other = helix_compile(model, cp=2, **plan), helix_compile(model, cp=1, tpa=2, **plan)
    ids = random_ids(model, 2, 9)
    one(ids)
    for raw in (False, True):
        other.import_cache(*one.export_cache(raw=raw))
        back = other.export_cache(raw=True)
        for a, b in zip(one.export_cache(raw=True).latents, back.latents, strict=True):
            assert torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def test_values_of_another_scale_are_refused(tmp_path: Path) -> None:
    """They would stand for other numbers, and no dtype tells: a module's own say it, from a file and from joined shards too."""
    module, same = compiled("fp8_e4m3"), compiled("fp8_e4m3", cp=1)
    other = helix_compile(tiny_model("short"), cp=2, max_seq_len=256, cache_dtype="fp8_e4m3", cache_scale=(0.01, 0.5))
    module(random_ids(tiny_model("short"), 2, 5))
    write_cache(tmp_path / "raw", module.export_cache(raw=True))
    for raw in (
        module.export_cache(raw=True),
        read_cache(tmp_path / "raw"),
        join_shards(module.export_shards(raw=True)),
    ):
        with pytest.raises(RuntimeFault, match=r"attention 1: FP8 values of cache_scale 0\.05 for a cache of 0\.5"):
            other.import_cache(*raw)
        same.import_cache(*raw)
    other.import_cache(*module.export_cache())  # entries are rounded anew
    shards = module.export_shards(raw=True)
    other_shards = other.export_shards(raw=True)
    with pytest.raises(RuntimeFault, match="join_shards: FP8 values of several cache_scales"):
        join_shards([shards[0], other_shards[1]])
    plain = [x.clone() for x in shards[0].latents]  # an engine's own values say nothing: the plan's scale holds
    assert not any(hasattr(x, "cache_scale") for x in plain)
    damaged = (tmp_path / "raw").read_bytes().replace(b"cache_scales", b"cache_scalez")
    (tmp_path / "raw").write_bytes(damaged)
    read_cache(tmp_path / "raw")
    (tmp_path / "raw").write_bytes(damaged.replace(b"cache_scalez", b"cache_scales").replace(b"[0.0", b"{0.0"))
    with pytest.raises(RuntimeFault, match=r"cache_scales .* expected a list of 2 numbers"):
        read_cache(tmp_path / "raw")


def test_what_does_not_fit_is_refused() -> None:
    module, plain = compiled("fp8_e4m3"), helix_compile(tiny_model("short"), cp=2, max_seq_len=256)
    ids = random_ids(tiny_model("short"), 1, 3)
    module(ids), plain(ids)
    with pytest.raises(RuntimeFault, match="raw=True has no effect"):
        plain.export_cache(raw=True)
    raw = module.export_cache(raw=True)
    with pytest.raises(RuntimeFault, match=r"parts of torch\.float8_e4m3fn for a cache in torch\.float64"):
        plain.import_cache(*raw)
    with pytest.raises(RuntimeFault, match=r"parts of torch\.float8_e4m3fn for a cache in torch\.uint8"):
        compiled("fp8_ds_mla").import_cache(*raw)
    with pytest.raises(RuntimeFault, match=r"parts of torch\.float64 and torch\.float8_e4m3fn"):
        module.import_cache(raw.latents, [x.double() for x in raw.k_ropes], raw.lengths)
    with pytest.raises(RuntimeFault, match=r"parts of torch\.uint8 for a cache in torch\.float8_e4m3fn"):
        module.import_cache([x.view(torch.uint8) for x in raw.latents], None, raw.lengths)
