"""pad_heads: heads and experts that do not divide, exact against the unmodified model in fp64; what is refused and why."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from helix_compile import HelixError, HelixModule, compare, helix_compile, verify
from helix_compile.verifier.numeric.reference import WidenedIslands
from helix_compile.views.rank_share import fake_group, share_of_rank
from tests.support.driver import random_ids
from tests.support.gqa_models import fresh_gqa
from tests.support.padding import check_bytes, check_exact, gqa_of, mla_of, padded
from tests.support.run_faults import dump_run, nothing, swapped_shards

# the whole product of heads and layouts is in tests/slow
EXACT: dict[str, tuple[Any, dict[str, Any]]] = {
    "20 over 8": (lambda: mla_of(20), {"cp": 8, "v_up": "after"}),
    "5 over 8, ranks with zeros alone": (lambda: mla_of(5), {"cp": 4, "tpa": 2, "q_proj": "gather", "merge": "ag_rs"}),
    "8 experts over 5": (lambda: mla_of(5), {"cp": 5, "ep": 5, "v_up": "before"}),
    "zeros in each group": (lambda: gqa_of(12, 3), {"cp": 8}),
    "a KV head of zeros": (lambda: gqa_of(12, 3), {"cp": 2, "tpa": 2, "q_proj": "gather"}),
}


@pytest.mark.parametrize("case", EXACT)
def test_exact_and_the_bytes_are_counted(case: str) -> None:
    build, options = EXACT[case]
    compiled = padded(build(), **options)
    check_exact(build(), compiled)
    check_bytes(build(), compiled)


REFUSED: list[tuple[Any, dict[str, Any], str]] = [
    (
        lambda: mla_of(20),
        {"cp": 8},
        "choose cp*tpa from [1, 2, 4, 5, 10, 20]; or pad_heads=True, 20 -> 24 heads, the new ones zeros",
    ),
    (lambda: gqa_of(12, 3), {"cp": 2, "tpa": 2}, "3 KV heads can't be divided over tpa=2 (3 % 2 = 1)"),
    (lambda: gqa_of(12, 3), {"cp": 2, "tpa": 2}, "or pad_heads=True, 12 -> 16 heads"),
    (
        lambda: mla_of(5),
        {"cp": 5, "ep": 5},
        "or pad_heads=True, 8 -> 10 experts, the new ones zeros that no token chooses",
    ),
    (lambda: mla_of(5), {"cp": 1, "pad_heads": True}, "option pad_heads=True has no effect at cp*tpa = 1"),
    (lambda: mla_of(5), {"cp": 5, "pad_heads": 1}, "option pad_heads=1 (int); expected True or False"),
]


@pytest.mark.parametrize(("build", "options", "message"), REFUSED, ids=[m[-30:] for *_, m in REFUSED])
def test_the_refusal_offers_it(build: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(HelixError, match=re.escape(message)):
        helix_compile(build(), world="virtual", **options)


def test_where_everything_divides_a_note_says_so() -> None:
    plan = padded(mla_of(20), cp=4).plan
    assert "pad_heads: heads and experts divide over cp*tpa = 4 ranks: nothing is padded" in plan.notes
    assert (
        plan.bodies
        == helix_compile(mla_of(20), world="virtual", **{**plan.options.to_json(), "pad_heads": False}).plan.bodies
    )


class WithoutEpsilon(torch.nn.Module):
    """A norm of q by its length: a query of zeros is 0 * inf."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * (x * x).mean(-1, keepdim=True).rsqrt()


def test_a_head_that_would_not_be_finite_is_refused_and_not_offered() -> None:
    model = fresh_gqa("qwen3", num_attention_heads=5, num_key_value_heads=1)
    for layer in model.model.layers:
        layer.self_attn.q_norm = WithoutEpsilon().eval()
    with pytest.raises(HelixError, match="5 heads can't be divided") as plain:
        helix_compile(model, cp=2, world="virtual")
    assert "pad_heads" not in str(plain.value)
    with pytest.raises(
        HelixError, match=r"q of a head of zeros is not finite .*nearest that works: cp\*tpa from \[1, 5\]"
    ):
        padded(model, cp=2)


def test_heads_that_can_not_be_cut_can_not_be_padded() -> None:
    """A weight for each head between q's linear and attention."""
    model = fresh_gqa("llama", num_attention_heads=6, num_key_value_heads=2)

    class PerHead(torch.nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            made = super().forward(x)
            return (made.unflatten(-1, (6, 10)) * self.by_head[:, None]).flatten(-2)

    for layer in model.model.layers:
        q = layer.self_attn.q_proj
        q.__class__ = PerHead
        q.by_head = torch.nn.Parameter(torch.randn(6, dtype=torch.float64))
    with pytest.raises(HelixError, match=r"pad_heads=True: 6 heads can't be padded to 8 .*head 0 alone"):
        padded(model, cp=4)


@pytest.mark.parametrize("case", ["mla", "grouped"])
def test_verify_accepts_a_sound_one(case: str) -> None:
    model = mla_of(5) if case == "mla" else gqa_of(12, 3)
    compiled = padded(model, cp=2, tpa=2, **({"ep": 4, "v_up": "after"} if case == "mla" else {"q_proj": "gather"}))
    report = verify(compiled, model)
    assert report.ok, str(report)


def test_the_cache_goes_to_other_degrees_and_back(tmp_path: Path) -> None:
    """A KV head of zeros is no part of what is handed over; a saved module and its reload hold the same."""
    model = gqa_of(12, 3)
    one, other = padded(model, cp=2, tpa=2), padded(model, cp=3)
    assert [r.cache[0].shape[2] for r in one.ranks] == [2] * 4
    ids, more = random_ids(model, 3, 7), random_ids(model, 3, 2)
    with WidenedIslands():
        one(ids)
        entries = one.export_cache()
        assert entries.latents[0].shape == (3, 7, 3 * 14)
        wanted = one(more)
        one.save(tmp_path / "saved")
        for module in (other, one, HelixModule.load(tmp_path / "saved")):
            module.import_cache(*entries)
            torch.testing.assert_close(module(more), wanted, rtol=1e-10, atol=1e-10)
    assert not any(r.cache[0][:, :, 1].nonzero().any() for r in one.ranks[2:])


def test_compared_runs_of_other_paddings(tmp_path: Path) -> None:
    """Zero heads are left out of what is compared, also where they have attended; a fault still shows."""
    model = gqa_of(12, 3)
    for name, options, fault in (
        ("alone", {"cp": 1, "pad_heads": False}, nothing),
        ("padded", {"cp": 2, "tpa": 2}, nothing),
        ("otherwise", {"cp": 8}, nothing),
        ("swapped", {"cp": 8}, swapped_shards),
    ):
        dump_run(padded(model, **{"max_seq_len": 96, **options}), tmp_path / name, fault)
    for a, b in (("alone", "padded"), ("padded", "otherwise")):
        comparison = compare(tmp_path / a, tmp_path / b)
        assert comparison.equal and comparison.found.compared > 50, str(comparison)
    assert not compare(tmp_path / "alone", tmp_path / "swapped").equal


@pytest.mark.slow
def test_the_backend_takes_it() -> None:
    model = mla_of(5)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="helix", options={"cp": 4, "max_seq_len": 64, "pad_heads": True})
    ids = random_ids(model, 2, 7)
    with torch.no_grad():
        got, wanted = compiled(input_ids=ids).logits, model(input_ids=ids).logits
    torch._dynamo.reset()
    assert (got - wanted).abs().max() <= 1e-7 * wanted.abs().max()  # fp32 islands are not widened here


def test_what_a_rank_of_zeros_holds_is_said() -> None:
    plan = padded(mla_of(5), cp=4, tpa=2, ep=8).plan
    facts = inspect_rank(plan, 7)
    assert "no head of the model" in facts and "experts 7 to 7" in facts


def inspect_rank(plan: Any, rank: int) -> str:
    model = mla_of(5)
    with fake_group(rank, plan.layout.world_size) as group:
        held = helix_compile(model, options=plan.options, world=group)
        return str(share_of_rank(held.plan, held.ranks[0], held.world.mesh))
