"""The paper's roofline against the vectors that helix-algorithm, section 12, works out by hand; HOP-B against section 10."""

from __future__ import annotations

import pytest

from helix_compile.errors import LayoutError
from helix_compile.predict.roofline import hopb_time, kv_read_us, weight_read_us

FIGURE_1 = {"kv_heads": 8, "head_dim": 128, "bytes_per_value": 0.5, "bandwidth_gb_s": 8000}


def read(context: int = 10**6, **degrees: int) -> float:
    return kv_read_us(batch=8, context=context, **FIGURE_1, **degrees)


def weights(tpa: int, tpf: int) -> float:
    return weight_read_us(q_heads=128, ffn=65536, tpa=tpa, tpf=tpf, **FIGURE_1)


def test_tensor_parallel_stops_at_the_kv_heads() -> None:
    degrees = (1, 2, 4, 8, 16, 32, 64)
    assert [read(tpa=n) for n in degrees] == [1024, 512, 256, 128, 128, 128, 128]
    stated = [236.978, 118.489, 59.245, 29.622, 14.942, 7.602, 3.932]
    assert [round(weights(n, n), 3) for n in degrees] == stated


def test_kvp_goes_on() -> None:
    kvp = (1, 2, 4, 8, 16, 32)
    assert [read(tpa=8, kvp=n) for n in kvp] == [128, 64, 32, 16, 8, 4]
    assert [round(weights(8, 8 * n), 3) for n in kvp] == [29.622, 17.039, 10.748, 7.602, 6.029, 5.243]


def test_context_and_the_latent_variant() -> None:
    lengths = (100_000, 250_000, 500_000, 1_000_000, 2_000_000, 4_000_000)
    assert [read(context=s, tpa=8) for s in lengths] == [12.8, 32, 64, 128, 256, 512]
    latent = [kv_read_us(8, 1, 288, 10**6, 1, 8000, kvp=n) for n in (1, 2, 4, 8, 16, 32, 64)]
    assert latent == [576, 288, 144, 72, 36, 18, 9]


def test_hopb() -> None:
    assert hopb_time(8, 2, 1.2, overlap=False) == pytest.approx(25.6, abs=1e-12)
    assert hopb_time(8, 2, 1.2, overlap=True) == pytest.approx(17.2, abs=1e-12)
    assert hopb_time(8, 1.2, 2, overlap=True) == pytest.approx(17.2, abs=1e-12)  # the exchange is the longer one
    assert hopb_time(1, 2, 1.2, overlap=True) == hopb_time(1, 2, 1.2, overlap=False)  # nothing to hide behind


def test_refusals() -> None:
    with pytest.raises(LayoutError, match="kvp > 0 expected, got 0"):
        read(kvp=0)
    with pytest.raises(LayoutError, match="exchange=-1"):
        hopb_time(1, 1, -1, overlap=True)
