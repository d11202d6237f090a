"""Presets against the figures of helix-algorithm, section 14; latencies between what is stated; a user's file."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from helix_compile.errors import HelixError
from helix_compile.predict.accelerators import PRESETS, accelerator

RIDGES = {  # the table's own: flop/B in BF16, FP8, FP4 (0: there is none), of B200 and B300 by their nominal 8 TB/s
    "h100": (3.35, 295, 591, 0),
    "h200": (4.8, 206, 412, 0),
    "b200": (8.0, 281, 562, 1125),
    "gb200": (8.0, 312, 625, 1250),
    "b300": (8.0, 281, 562, 1750),
    "gb300": (8.0, 312, 625, 1875),
}


def test_presets_have_their_ridges_and_sources() -> None:
    for name, (hbm, *ridges) in RIDGES.items():
        own = PRESETS[name]
        peaks = (own.bf16_tflops, own.fp8_tflops, own.fp4_tflops)
        assert [round(peak / hbm) for peak in peaks] == ridges and hbm * 0.96 < own.hbm_tb_s <= hbm
        assert "aiconfigurator" in own.source and own.link_gb_s in (450, 900)
    assert set(PRESETS) == {*RIDGES, "gb200-paper"} and "a fit and no prediction" in PRESETS["gb200-paper"].source


def test_latencies() -> None:
    b200 = PRESETS["b200"]
    assert b200.latency_of("all_to_all_single", 8, 100) == 10.6
    assert b200.latency_of("all_to_all_single", 8, 1 << 20) == 15.0
    assert b200.latency_of("all_to_all_single", 8, 1 << 14) == pytest.approx(10.6 + 0.4 * 4.4)  # 2 of 5 doublings
    gb200 = PRESETS["gb200"]
    assert gb200.latency_of("all_to_all_single", 64, 0) == 10.7  # flat behind the last
    assert gb200.latency_of("all_reduce", 64, 0) == pytest.approx(4.9 + 4 * 1.1)  # as in the last doubling
    assert gb200.latency_of("all_reduce", 3, 0) == pytest.approx(3.8 + 1.1 * 0.5849625)
    assert b200.collective_us("all_reduce", 8, 9e5) == pytest.approx(5.8 + 1.0)
    assert PRESETS["h100"].flops_per_us("fp4") == PRESETS["h100"].flops_per_us("fp8") == 1979e6 * 0.6


def test_a_file_overrides_a_preset(tmp_path: Path) -> None:
    (tmp_path / "pcie.toml").write_text(
        'link_gb_s = 50\nlink_ranks = 8\nsource = "ours"\n[latency_us]\nall_reduce = 30\nall_to_all_single = [[2, 20, 25], [8, 30, 40]]\n'
    )
    own = accelerator("b200", tmp_path / "pcie.toml")
    assert own.name == "pcie" and own.link_gb_s == 50 and own.hbm_tb_s == 7.7 and own.source == "ours"
    assert own.latency_of("all_reduce", 8, 1e9) == 30 and own.latency_of("all_to_all_single", 8, 0) == 30
    assert own.latency_us["all_gather_into_tensor"] == PRESETS["b200"].latency_us["all_gather_into_tensor"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("hbm_tbs: 3\n", "'hbm_tbs' is no field.*nearest: hbm_tb_s"),
        ("hbm_tb_s: fast\n", "hbm_tb_s='fast'; expected a number > 0"),
        ("link_gb_s: 0\n", "link_gb_s=0; expected a number > 0"),
        ("latency_us: {all_reduce: -1}\n", "latency_us.all_reduce: got -1"),
        ("latency_us: {broadcast: 1}\n", r"latency_us: got \['all_gather_into_tensor', .*'broadcast'"),
        ("hbm_efficiency: 1.5\n", "a share of the peak"),
        ("- 1\n", "got list, expected a table"),
    ],
)
def test_refusals(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(HelixError, match=message):
        accelerator("gb200", tmp_path / "a.yaml")
    with pytest.raises(HelixError, match=r"--gpu 'gb20' is unknown.*nearest: gb200"):
        accelerator("gb20")
    assert replace(PRESETS["gb200"], launch_us=0.0) == PRESETS["gb200"]
