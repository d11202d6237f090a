"""Published configurations at their published sizes, on meta: each plans for eight ranks, or is refused by the sentence here."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path

import pytest

from helix_compile import CheckpointError, HelixError, helix_compile
from helix_compile.checkpoint.configuration import TEXT_KEYS, read_configuration
from helix_compile.checkpoint.named import named_model
from helix_compile.checkpoint.stated import stated_format
from helix_compile.plan.helix_plan import OF_CANDIDATES
from helix_compile.plan.ring import ring_pages

RELEASES = Path(__file__).resolve().parents[1] / "data" / "releases"

# release -> layers that are planned, or what the refusal says
EXPECTED: dict[str, int | str] = {
    "Kimi-K2-Instruct": 61,
    "Kimi-K2.5": 61,
    "LongCat-Flash-Chat": 28,
    "MiniCPM3-4B": 62,
    "Mistral-Small-4-119B-text": 36,
    "Moonlight-16B-A3B": 27,
    "nvidia-DeepSeek-V3.1-NVFP4": 61,
    "GLM-4.7-Flash": "20 heads can't be divided over N = cp*tpa = 8",
    "DeepSeek-V3.2": 61,
    "GLM-5-FP8": 78,
    "GLM-5.2": 78,
    "dots3-note-text": 46,
    "Mistral-Large-4-text": 72,
    "Kimi-K3": "model_type 'kimi_k3' is not in transformers: its MLA without rope and with an output gate",
    "openPangu-Ultra-MoE-718B": "model_type 'pangu_ultra_moe' is not in transformers",
    "DeepSeek-V2-Lite": 27,
    "DeepSeek-V2.5": 60,
    "DeepSeek-V3": 61,
    "DeepSeek-R1": 61,
    "DeepSeek-V3.1": 61,
    "DeepSeek-VL2-Small": 27,
    "DeepSeek-VL2": "scoring_func='sigmoid': transformers' deepseek_v2 reads no scoring_func and computes 'softmax'",
    "DeepSeek-OCR": "use_mla=False: transformers' deepseek_v2 reads no use_mla and computes True",
    "Kimi-K2-Thinking": 61,
    "Kimi-VL-A3B-Instruct": 27,
    "Kimi-Linear-48B-A3B-Instruct": 7,
    "Youtu-LLM-2B": 32,
    "A.X-K1": 61,
    "Ling-3": 7,
    "GigaChat3-10B-A1.8B": 26,
}
# of more layers, most of linear attention: those with a cache of tokens are planned
DEPTHS = {"Kimi-Linear-48B-A3B-Instruct": 27, "Ling-3": 42}
# what reading alone refuses
UNREAD = {"Kimi-K3", "openPangu-Ultra-MoE-718B", "DeepSeek-VL2", "DeepSeek-OCR"}


def test_the_table_is_whole() -> None:
    assert {path.stem for path in RELEASES.glob("*.json")} == set(EXPECTED)


@pytest.mark.parametrize("release", EXPECTED)
def test_a_release_is_read_or_refused(release: str) -> None:
    """Its configuration alone, also in the fast tier: layers, and one table of rope with the base that it states."""
    path = RELEASES / f"{release}.json"
    if release in UNREAD:
        with pytest.raises(CheckpointError) as caught:
            read_configuration(path)
        assert EXPECTED[release] in str(caught.value)
        return
    found, stated = read_configuration(path), json.loads(path.read_text())
    config = found.config.get_text_config()
    text = next((stated[key] for key in TEXT_KEYS if key in stated), stated)
    depth = text.get("num_hidden_layers") or text.get("num_layers")
    attentions = 2 if release.startswith("LongCat") else 1
    assert config.num_hidden_layers == attentions * depth
    if isinstance(EXPECTED[release], int):
        assert depth == DEPTHS.get(release, EXPECTED[release])
    if base := text.get("rope_theta"):
        rope = getattr(config, "rope_parameters", None) or {"rope_theta": base}  # Kimi-Linear turns nothing
        assert rope["rope_theta"] == base
    for key, value in (text.get("rope_scaling") or {}).items():
        assert config.rope_parameters["rope_type" if key == "type" else key] == value
    stated_format(found)


def _layers(release: str, field: str, value: str) -> int:
    stated = json.loads((RELEASES / f"{release}.json").read_text())
    return sum(str(kind) == value for kind in stated[field]) if field in stated else stated["num_hidden_layers"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "release", ["DeepSeek-V3.2", "GLM-5-FP8", "GLM-5.2", "dots3-note-text", "Mistral-Large-4-text"]
)
def test_bytes_of_sparse_releases(release: str) -> None:
    """By the published sizes, in bfloat16: 512 + 64 values of a latent, 1,024 + 64 of dots3's windows, 128 of an index key; a layer
    without rope has no such 64; each layer that chooses sends its 2,048 best keys and their scores to 7 others.
    """
    plan = helix_compile(named_model(str(RELEASES / f"{release}.json"), meta=True), cp=8, max_seq_len=2**17).plan
    latents = _layers(release, "layer_types", "indexed_attention") if release.startswith("dots3") else EXPECTED[release]
    assert isinstance(latents, int)
    choosing = latents if release.startswith("dots3") else _layers(release, "indexer_types", "full")
    windows = int(str(EXPECTED[release])) - latents
    no_rope = _layers(release, "no_rope_layers", "0") if release.startswith("Mistral") else 0
    values = latents * (512 + 64) - no_rope * 64 + choosing * 128 + windows * (1024 + 64)
    assert plan.kv_bytes_per_token_per_rank * 8 == 2 * values
    of_choices = [(len(b.layers), c) for b in plan.bodies for c in b.collectives if c.what in OF_CANDIDATES]
    if plan.topk_exchange == "gather":
        sent = sum(layers * c.egress_bytes_per_rank_per_token for layers, c in of_choices)
        assert sent == choosing * 7 * 2048 * 8
    else:
        assert sum(layers for layers, c in of_choices if c.what == OF_CANDIDATES[0]) == choosing
        assert {c.egress_bytes_per_rank_per_token for _, c in of_choices} == {2048 * 8 * 7 / 8, Fraction(8 * 7, 8)}


@pytest.mark.slow
@pytest.mark.parametrize("window", ["auto", "replicate"])
def test_windows_of_a_release_on_every_rank(window: str) -> None:
    """dots3 has layers with a window of 512: in 6 pages of each of 8 ranks, where they are asked for."""
    model = named_model(str(RELEASES / "dots3-note-text.json"), meta=True)
    plan = helix_compile(model, cp=8, max_seq_len=2**17, window=window).plan
    windows = [a for body in plan.bodies for a in body.attentions if a.window]
    assert windows
    pages = {"replicate": {ring_pages(windows[0].window, 2**17)}, "auto": {0}}[
        window
    ]  # 17 blocks of 32 tokens: all ranks have some of them
    assert {a.ring for a in windows} == pages
    assert bool(plan.ring_bytes_per_sequence_per_rank) == (window == "replicate")


@pytest.mark.slow
@pytest.mark.parametrize("release", EXPECTED)
def test_a_release_plans_or_says_why_not(release: str) -> None:
    expected = EXPECTED[release]
    try:
        compiled = helix_compile(named_model(str(RELEASES / f"{release}.json"), meta=True), cp=8)
    except HelixError as error:
        assert isinstance(expected, str) and expected in str(error)
        return
    assert sum(len(body.layers) for body in compiled.plan.bodies) == expected
