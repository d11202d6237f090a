"""Every MLA family that transformers ships, and some with grouped-query attention, is rewritten, or refused with the reason that applies; docs/families.md agrees."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from benchmarks.families import PAGE
from helix_compile import PlanError
from tests.support.decoders import found_decoders, other_decoders
from tests.support.families import FAMILIES, GROUPED, fresh_family, shipped_families
from tests.support.family_run import compiled_family, decoder_row, measured_row, run_family
from tests.support.numerics import LIMIT

_SLOW = pytest.mark.slow
_NUMBER = re.compile(r"\d\.\de[+-]\d\d")
_VARIES = re.compile(
    _NUMBER.pattern + r"|\.py:\d+|\b[su]\d+\b"
)  # and lines of the installed transformers, torch's names of sizes
# deepseek_v3 is what most other tests run; the others of the first line differ from it by a norm, a width or a factor,
# those of the second are refused as deepseek_v32 is, tests/whole/test_gqa.py runs those of the third
_DEAR = ("bailing_hybrid", "mistral4")  # to the passes what kimi_linear (a hybrid) and deepseek_v2 (MLA, a router) are
_IN_OTHER_TESTS = (
    "dots3_note",
    "deepseek_v3",
    "glm4_moe_lite",
    "axk1",
    "youtu",
    "glm_moe_dsa",
    "axk2",
    "mistral_large4",
    "hy_v4",
    "glm5_next",
    "llama",
    "qwen3",
    "qwen3_moe",
    "glm4",
    "cohere",
    "ernie4_5",
    "mistral",
    "mixtral",
    "gemma3",
    "olmo3",
    "llama4",
    "gpt_oss",
    "granite_swa",
    "gemma4",
    "gemma3n",
)
# norms of q and k that mix the heads; scales of q that differ by head: tpa=1 and q_proj="replicate" alone
_WHOLE_HEADS = ("olmo3", "mistral_large4")


def test_no_shipped_family_is_forgotten() -> None:
    assert sorted(set(FAMILIES) - set(GROUPED)) == shipped_families()


def _rows() -> dict[str, str]:
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    return {line.split("|")[1].strip(): line for line in lines if line.startswith("| ")}


def _cases() -> list:
    cases = []
    for name, family in FAMILIES.items():
        slow = name in _IN_OTHER_TESTS or name in _DEAR
        cases.append(pytest.param(name, "", marks=[_SLOW] if slow else []))
        cases += [pytest.param(name, variant, marks=[_SLOW]) for variant in family.variants]
    return cases


@pytest.mark.parametrize(("name", "variant"), _cases())
def test_a_family_does_what_the_table_says(name: str, variant: str) -> None:
    row = measured_row(name, variant)
    written = _rows()[row.name]
    assert _VARIES.sub("#", str(row)) == _VARIES.sub("#", written)
    for text in (*row.deviations, *_NUMBER.findall(written)):
        if _NUMBER.fullmatch(text):
            assert float(text) <= LIMIT[torch.float64]
    if row.refused:
        assert FAMILIES[name].refused and re.search(r"MatchError: layer \d+: ", row.refused)
    else:
        assert (variant or not FAMILIES[name].refused) and not any("tokens" in d for d in row.deviations)


def test_the_table_has_a_row_for_each_case_and_no_other() -> None:
    names = {f"{n}, {v}" if v else n for n, family in FAMILIES.items() for v in ("", *family.variants)}
    assert set(_rows()) - {"family", "class"} == names | set(other_decoders())


def test_every_decoder_that_the_search_finds_is_named() -> None:
    page, found = PAGE.read_text(encoding="utf-8"), found_decoders()
    assert len(found) > 100
    assert [n for n in found if f"| {n} |" not in page and f"`{n}`" not in page] == []
    for name in other_decoders():  # and why it was found
        assert all(f"`{has}`" in _rows()[name] for has in found[name].has), name


def test_the_search_finds_a_new_decoder(tmp_path: Path) -> None:
    """By a field of its configuration, or by its modeling; not what can't generate, nor what has neither."""
    mask = "create_sliding_window_causal_mask"
    made = {
        "latent": ("    kv_lora_rank: int = 8", "class LatentForCausalLM(LatentPreTrainedModel, GenerationMixin):"),
        "slides": ("    vocab_size: int = 8", f"{mask}()\nclass SlidesForCausalLM(X, SlidesGenerationMixin):"),
        "chooses": ("", "class ChoosesIndexer(nn.Module):\nclass ChoosesForCausalLM(\n    X, GenerationMixin\n):"),
        "reads": ("    sliding_window: int = 8", "class ReadsModel(ReadsPreTrainedModel):\n# GenerationMixin"),
        "dense": ("    # kv_lora_rank", "class DenseForCausalLM(X, GenerationMixin):"),
    }
    for name, (configuration, modeling) in made.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / f"configuration_{name}.py").write_text(configuration)
        (tmp_path / name / f"modeling_{name}.py").write_text(modeling)
    has = {"LatentForCausalLM": "kv_lora_rank", "SlidesForCausalLM": mask, "ChoosesForCausalLM": "ChoosesIndexer"}
    assert {n: found.has for n, found in found_decoders(tmp_path).items()} == {n: (h,) for n, h in has.items()}


@pytest.mark.slow
@pytest.mark.parametrize("name", other_decoders())
def test_a_decoder_does_what_the_table_says(name: str) -> None:
    row = decoder_row(name)
    cells = [row.name, row.sites, row.leaves, *row.deviations, row.refused]
    written = [c.strip() for c in _rows()[name].split("|")[1:-1]]
    assert _VARIES.sub("#", "|".join(cells)) == _VARIES.sub("#", "|".join([written[0], *written[2:]]))
    for text in (*row.deviations, written[4]):
        if _NUMBER.fullmatch(text):
            assert float(text) <= LIMIT[torch.float64]


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n, f in FAMILIES.items() if not f.refused])
@pytest.mark.parametrize(
    "options",
    [{"cp": 1}, {"cp": 2, "tpa": 2}, {"cp": 2, "q_proj": "gather"}, {"cp": 4, "merge": "ag_rs", "v_up": "before"}],
)
def test_a_family_with_other_options(name: str, options: dict) -> None:
    model = fresh_family(name)
    if name in GROUPED:
        options = {k: v for k, v in options.items() if k != "v_up"}  # no W_UV
        kv_heads = model.config.num_key_value_heads
        if kv_heads % options.get("tpa", 1):  # three heads can't be halved
            options["tpa"] = kv_heads
    if name in _WHOLE_HEADS and options.keys() & {"tpa", "q_proj"}:
        with pytest.raises(PlanError, match=r'nearest that works: (tpa=1|q_proj="replicate")'):
            compiled_family(model, **options, **FAMILIES[name].options)
        return
    run = run_family(model, compiled_family(model, **options, **FAMILIES[name].options))
    assert run.worst <= LIMIT[torch.float64] and run.same_tokens
