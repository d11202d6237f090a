"""Who is to blame, and for what: legal strides, a graph without an output, an original that can't run."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

from helix_compile import HelixModule, helix_compile, verify
from helix_compile.verifier.numeric.steps import check_ranks
from tests.support.models import SIZES, VARIANTS, fresh_model

HEAD = "lm_head.weight"


@cache
def model_of(dtype: torch.dtype) -> Any:
    return fresh_model("short", dtype)


def built(dtype: torch.dtype = torch.float64) -> HelixModule:
    return helix_compile(model_of(dtype), cp=2, max_seq_len=32, tokens_per_block=2)


def other_strides(compiled: HelixModule) -> None:
    held = compiled.ranks[1].params
    held[HEAD] = held[HEAD].t().contiguous().t()


def test_other_strides_on_one_rank_are_legal() -> None:
    compiled = built(torch.float32)
    other_strides(compiled)
    report = verify(compiled, model_of(torch.float32))
    assert report.ok, report


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_unlike_strides_allow_rounding_and_no_more(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    K = 4096
    hidden, weight = torch.randn(1, 8, K, dtype=dtype), torch.randn(97, K, dtype=dtype)
    turned = weight.t().contiguous().t()
    first, second = hidden @ weight.t(), hidden @ turned.t()
    kept = torch.ones(1, 8, dtype=torch.bool)
    apart = [{HEAD: weight}, {HEAD: turned}]
    assert not check_ranks([first, second], kept, "here", 0, apart)
    # two hundredths of the largest logit is a fault in every dtype
    wrong = second + 0.02 * first.abs().max()
    (found,) = check_ranks([first, wrong], kept, "here", 0, apart)
    assert found.code == "HX405" and "of the largest" in found.expected
    # equal strides: a single bit is a fault
    bit = first.clone()
    bit[0, 0, 0] *= 1 + 2 * torch.finfo(dtype).eps
    (found,) = check_ranks([first, bit], kept, "here", 0, [{HEAD: weight}, {HEAD: weight}])
    assert found.expected == "the same bits"


def test_a_wrong_value_under_other_strides_is_a_fault() -> None:
    compiled = built()
    other_strides(compiled)
    compiled.ranks[1].params[HEAD] = compiled.ranks[1].params[HEAD] * 1.0001
    codes = {f.code for f in verify(compiled, model_of(torch.float64)).findings}
    assert {"HX204", "HX405"} <= codes


@pytest.mark.parametrize("where", ["outer graph", "body_1"])
def test_a_graph_without_an_output(where: str) -> None:
    compiled = built()
    gm: Any = compiled.graph if where == "outer graph" else compiled.graph.get_submodule(where)
    gm.graph.erase_node(next(n for n in gm.graph.nodes if n.op == "output"))
    for other in (model_of(torch.float64), built()):
        (finding,) = verify(compiled, other).findings
        assert finding.code == "HX110" and finding.where.endswith(where)
        assert finding.got == "no output node"


def test_a_graph_that_reads_a_value_before_it_is_computed() -> None:
    compiled = built()
    body: Any = compiled.graph.get_submodule("body_0")
    last = [n for n in body.graph.nodes if n.op == "call_function"][-1]
    next(n for n in body.graph.nodes if n.op == "call_function").append(last)
    (finding,) = verify(compiled, model_of(torch.float64)).findings
    assert finding.code == "HX110" and "body_0" in finding.where


def test_an_original_that_cannot_run() -> None:
    torch.manual_seed(0)
    sizes = {**SIZES, **VARIANTS["short"], "moe_intermediate_size": 10}
    model = DeepseekV3ForCausalLM(DeepseekV3Config(**sizes)).to(torch.float16).eval()
    model.set_experts_implementation("grouped_mm")  # takes widths of 16 bytes only
    report = verify(helix_compile(model, cp=2, max_seq_len=32, tokens_per_block=2), model)
    (finding,) = report.findings
    assert finding.code == "HX503" and "the original model, run by itself in float16" in finding.got
    assert "multiple of 16 bytes" in finding.got
