"""mla_decode in C++ against its reference in float64: drawn sizes, hostile memory, threads, narrower vectors; what it leaves alone."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._inductor import config as inductor_config
from torch._inductor.cpu_vec_isa import pick_vec_isa, valid_vec_isa_list

from helix_compile import LoweringUnavailable, helix_compile
from helix_compile.ir.graph import helix_op
from helix_compile.ir.stage import nodes_of
from helix_compile.kernels.cpp import build
from helix_compile.kernels.cpp import mla_decode as cpp
from helix_compile.kernels.registry import Capacity, Site, select_kernel
from helix_compile.kernels.target import CPP, KernelTarget, target_for
from tests.support.driver import random_ids, worst_deviation
from tests.support.kernel_checks import check_op, drawn
from tests.support.mla import STALE, MlaInputs, mla_inputs
from tests.support.models import fresh_model, tiny_model
from tests.support.numerics import LIMIT

helix, helix_cpp = torch.ops.helix, torch.ops.helix_cpp
HERE = KernelTarget(CPP, 1)


@pytest.fixture(autouse=True, scope="module")
def nan_memory() -> Iterator[None]:
    """What torch.empty returns is NaN: outputs and work space that are left unwritten show."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=[1, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """Torch's: with three a sequence is cut."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def hostile(inputs: MlaInputs, dtype: torch.dtype = torch.float64) -> MlaInputs:
    """With NaN in every slot that nobody sees."""
    cache = inputs.cache.masked_fill(inputs.cache == STALE, torch.nan)
    return replace(inputs, cache=cache).to(dtype)


def off(inputs: MlaInputs, got: Any = None) -> float:
    """How far C++ is from the reference in float64, relative to the largest of each result; which rows are dead must agree."""
    o, lse = got or helix_cpp.mla_decode(*inputs.args)
    o_ref, lse_ref = helix.mla_decode(*inputs.to(torch.float64).args)
    assert torch.equal(lse == -torch.inf, lse_ref == -torch.inf) and o.isfinite().all()
    alive = lse_ref != -torch.inf
    errors = [
        (a.double() - b).abs().max() / b.abs().max()
        for a, b in ((o, o_ref), (lse[alive], lse_ref[alive]))
        if alive.any()
    ]
    return max(map(float, errors), default=float(o.abs().max()) if o.numel() else 0.0)


@st.composite
def drawn_inputs(draw: st.DrawFn) -> MlaInputs:
    page = draw(st.sampled_from([1, 16, 50, 128]))
    lengths = draw(st.lists(st.sampled_from([0, 1, page - 1, page + 1, 63, 64, 65, 200]), min_size=1, max_size=4))
    T, H = draw(st.sampled_from([1, 2, 5])), draw(st.sampled_from([1, 3, 16, 20, 70]))
    R, r = draw(st.sampled_from([(32, 16), (7, 3), (1, 1), (40, 0), (512, 64)]))
    return mla_inputs(lengths, T, H, R, r, page, seed=draw(st.integers(0, 99)))


def test_any_sizes_in_float64(threads: int) -> None:
    @drawn(40)
    @given(drawn_inputs())
    def agrees(inputs: MlaInputs) -> None:
        assert off(hostile(inputs)) < 1e-12

    agrees()


LIMITS = {torch.float64: 1e-12, torch.float32: 4e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)], ids=str
)
def test_narrower_entries_are_rounded_once(dtype: torch.dtype, threads: int) -> None:
    """Sums are float32: what is left is the rounding of the output, and lse is not rounded to 16 bits."""
    for inputs in (
        mla_inputs([129, 0, 70], T=2, H=20, R=512, r=64, page_size=128, scale=0.1),
        mla_inputs([33], H=3, R=7, r=3),
    ):
        inputs = hostile(inputs, dtype)
        o, lse = helix_cpp.mla_decode(*inputs.args)
        assert o.dtype == dtype and lse.dtype == torch.float32
        assert off(inputs, (o, lse)) < LIMITS[dtype]
        lse_ref = helix.mla_decode(*inputs.to(torch.float64).args)[1]
        alive = lse_ref != -torch.inf
        assert (lse - lse_ref)[alive].abs().max() < 4e-6 * lse_ref[alive].abs().max()


def test_strides_and_wider_rows(threads: int) -> None:
    """Queries by head, a cache that is a part of wider rows, a page table and lengths that lie apart: NaN between."""
    inputs = hostile(mla_inputs([40, 0, 17], T=2, H=5))
    wanted = helix_cpp.mla_decode(*inputs.args)
    by_head = inputs.q_latent.permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3)
    rope = torch.stack([inputs.q_rope, torch.full_like(inputs.q_rope, torch.nan)], dim=-1)[..., 0]
    rows = torch.nn.functional.pad(inputs.cache, (0, 5, 0, 3), value=torch.nan)[:, :16, : inputs.cache.shape[2]]
    table, visible = (torch.stack([x, x - 1], dim=-1)[..., 0] for x in (inputs.page_table, inputs.visible))
    got = helix_cpp.mla_decode(by_head, rope, rows, table, visible, inputs.scale)
    assert not any(t.is_contiguous() for t in (by_head, rope, rows, table, visible))
    assert all(map(torch.equal, got, wanted))


def test_large_scores_and_a_nan(threads: int) -> None:
    """Maxima that come late, scores far beyond exp's range; a NaN reaches its row, and that alone."""
    assert off(hostile(mla_inputs([200, 65], T=2, H=5, magnitude=300.0))) < 1e-12
    inputs = hostile(mla_inputs([20, 100], H=2))
    inputs.q_latent[1, 0, 1, 3] = torch.nan
    o, lse = helix_cpp.mla_decode(*inputs.args)
    assert o[1, 0, 1].isnan().all() and lse[1, 0, 1].isnan()
    assert o[1, 0, 0].isfinite().all() and o[0].isfinite().all() and lse[0].isfinite().all()


def test_nothing_to_do() -> None:
    for lengths, T in (([0, 0], 1), ([5], 0)):
        inputs = mla_inputs(lengths, max(T, 1), H=3)
        inputs = replace(
            inputs, q_latent=inputs.q_latent[:, :T], q_rope=inputs.q_rope[:, :T], visible=inputs.visible[:, :T]
        )
        o, lse = helix_cpp.mla_decode(*inputs.args)
        assert o.shape[1] == T and (o == 0).all() and (lse == -torch.inf).all()


def test_the_op_is_what_torch_expects() -> None:
    check_op(helix_cpp.mla_decode.default, *hostile(mla_inputs([17, 0], T=2, H=3), torch.float32).args)


@pytest.mark.parametrize(
    ("edit", "replacement"),
    [
        ("hidden = std::max<int64_t>(0, seen)", "hidden = std::max<int64_t>(0, seen + 1)"),
        ("const Vec factor = (before - safe).exp();", "const Vec factor(Sum(1));"),
        ("total += weight * part.sum[n];", "total += part.sum[n];"),
        ("x.width(), own + i * L);\n    for (; i + 4", "x.R, own + i * L);\n    for (; i + 4"),
    ],
    ids=["mask off by one", "stale maximum", "parts of one weight", "no rope"],
)
@pytest.mark.slow  # four builds
def test_faults_of_the_source_are_seen(
    edit: str, replacement: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each deviates by more than a thousand times what the tests above allow."""
    source = cpp.SOURCE.read_text()
    assert source.count(edit) == 1
    broken = tmp_path / "broken.cpp"
    broken.write_text(source.replace(edit, replacement))
    monkeypatch.setattr(cpp, "SOURCE", broken)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        inputs = mla_inputs([150, 40], T=2, H=5, page_size=16)
        o = helix_cpp.mla_decode(*inputs.to(torch.float64).args)[0]
    finally:
        torch.set_num_threads(before)
    assert not (o - helix.mla_decode(*inputs.to(torch.float64).args)[0]).abs().max() < 1e-9


@pytest.mark.slow
@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("bits", [512, 256, 1], ids=["AVX-512", "AVX2", "no vectors"])
def test_each_width_of_vectors(bits: int, dtype: torch.dtype, threads: int) -> None:
    """The same source for each kind of CPU that this one can run, and for one that Inductor knows no vectors of."""
    with inductor_config.patch({"cpp.simdlen": bits}):
        widths = [isa.bit_width() for isa in valid_vec_isa_list()]
        if bits > 1 and bits not in widths:  # nothing to run here: what is asked for would be taken for another width
            assert not pick_vec_isa()
            return
        assert (pick_vec_isa().bit_width() == bits) if bits > 1 else not pick_vec_isa()
        build.library.cache_clear()
        assert isinstance(build.library(cpp.SOURCE, dtype), ctypes.CDLL)
        try:
            for lengths, R, r, H in (([129, 0, 70], 512, 64, 20), ([33], 7, 3, 3), ([200, 64], 40, 0, 70)):
                inputs = hostile(mla_inputs(lengths, 2, H, R, r, 128, scale=0.1), dtype)
                assert off(inputs) < LIMITS[dtype]
        finally:
            build.library.cache_clear()


def refusal(inputs: MlaInputs, **keywords: Any) -> str:
    choice = select_kernel(Site("mla_decode", inputs.args, Capacity(4, 64), keywords), HERE)
    assert (choice.kernel is None) != (choice.reason == "C++")
    return choice.reason


def test_what_it_leaves_to_the_reference() -> None:
    """With the reason; and the op, called all the same, is the reference."""
    inputs = mla_inputs([17, 5], H=3)
    first = torch.ones_like(inputs.visible)
    assert refusal(inputs) == "C++"
    assert "a window" in refusal(inputs, first=first)
    narrow = replace(inputs, cache=inputs.cache.to(torch.float8_e4m3fn))
    assert "cache torch.float8_e4m3fn" in refusal(narrow)
    turned = replace(inputs, cache=inputs.cache.transpose(1, 2).contiguous().transpose(1, 2))
    assert "stride 16" in refusal(turned)
    for other, keywords in ((inputs, {"first": first}), (turned, {})):
        assert all(
            map(torch.equal, helix_cpp.mla_decode(*other.args, **keywords), helix.mla_decode(*other.args, **keywords))
        )


def test_without_a_compiler_the_reference_stays(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It is chosen, with the reason; a graph that names the C++ op (saved elsewhere) runs by it too."""
    monkeypatch.setattr(cpp, "library", build.library.__wrapped__)
    inputs, model = mla_inputs([17, 5], H=3), tiny_model("short")
    with inductor_config.patch({"cpp.cxx": ("no-such-compiler",)}), caplog.at_level("INFO", logger=cpp.__name__):
        assert "can't be built here" in refusal(inputs)
        got = helix_cpp.mla_decode(*inputs.args)
        compiled = helix_compile(model, cp=2, lower="cpp", max_seq_len=64)
    assert all(map(torch.equal, got, helix.mla_decode(*inputs.args))) and "can't be built here" in caplog.text
    (said,) = {k["reason"] for k in compiled.inspect().facts["kernels"] if k["op"] == "helix.mla_decode.default"}
    assert "can't be built here" in said
    compiled(random_ids(model, 1, 3))


@pytest.mark.parametrize("lower", ["cpp", pytest.param("cpp+inductor", marks=pytest.mark.slow)])
def test_a_whole_model(lower: str, tmp_path: Path) -> None:
    """Every attention is C++, ragged with empty shards as exact as the reference; saved and loaded it is the same bits."""
    model = fresh_model("short", torch.float64)
    compiled = helix_compile(model, cp=2, lower=lower, tokens_per_block=3, max_seq_len=64)
    targets = {str(n.target) for n in nodes_of(compiled.graph) if helix_op(n) == "mla_decode"}
    assert targets == {"helix_cpp.mla_decode.default"}
    assert worst_deviation(model, compiled, [5, 2, 9, 1], (1, 3, 1)) <= LIMIT[torch.float64]
    compiled.save(tmp_path / "saved")
    loaded = type(compiled).load(tmp_path / "saved")
    ids = random_ids(model, 2, 4)
    compiled.reset()
    assert torch.equal(compiled(ids), loaded(ids))


def test_it_is_chosen_in_a_process_that_imports_nothing_else(tmp_path: Path) -> None:
    """Who compiles a model, or loads one, need not name the C++."""
    code = f"""
from helix_compile import HelixModule, helix_compile
from helix_compile.models.presets import build_model, preset_config
compiled = helix_compile(build_model(preset_config("tiny")), cp=2, lower="cpp", max_seq_len=64)
print({{k["op"] for k in compiled.inspect().facts["kernels"] if "mla_decode" in k["op"]}})
compiled.save({str(tmp_path / "m")!r})
"""
    load = f"from helix_compile import HelixModule; HelixModule.load({str(tmp_path / 'm')!r}, world='virtual'); print('loaded')"
    for script, said in ((code, "{'helix_cpp.mla_decode.default'}"), (load, "loaded")):
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
        assert done.stdout.strip() == said, done.stderr


def test_a_card_is_refused() -> None:
    assert target_for("cpp", torch.device("cpu")) == HERE
    with pytest.raises(LoweringUnavailable, match="lower='cpp' is for a CPU; got device cuda"):
        target_for("cpp", torch.device("cuda"))
