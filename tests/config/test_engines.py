"""Recipes out: what is written for an engine is read back to the same options and the same plan."""

from __future__ import annotations

import re
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from helix_compile import HelixError, HelixOptions
from helix_compile.capture.source import captured_from
from helix_compile.checkpoint.named import named_model
from helix_compile.compile import plan_model
from helix_compile.config.engines import ENGINE_NAMES, engine_recipe

READ = {"vllm": HelixOptions.from_vllm, "sglang": HelixOptions.from_sglang, "trtllm": HelixOptions.from_trtllm}


@st.composite
def asked(draw: st.DrawFn) -> HelixOptions:
    cp, tpa, pp = (draw(st.sampled_from(sizes)) for sizes in ((1, 2, 4, 8, 64), (1, 2, 3), (1, 1, 2, 4)))
    fits = [e for e in range(1, cp * tpa + 1) if cp * tpa % e == 0]
    exchange: dict[str, Any] = {}
    if cp > 1:
        exchange = {
            "merge": draw(st.sampled_from(["a2a", "ag_rs"])),
            "q_proj": draw(st.sampled_from(["replicate", "gather"])),
            "v_up": draw(st.sampled_from(["auto", "before", "after"])),
            "window": draw(st.sampled_from(["shard", "replicate", "auto"])),
        }
    if pp > 1:
        exchange |= {
            "stage": draw(st.integers(0, pp - 1)),
            "pp_split": draw(st.sampled_from(["first", "middle", "last"])),
        }
    cache_dtype = draw(st.sampled_from(["auto", "fp8_e4m3", "fp8_ds_mla"]))
    if cache_dtype == "fp8_e4m3":
        exchange["cache_scale"] = draw(st.sampled_from([1.0, 0.5, 3e-5, (0.25, 2.0, 1.0), (3.0,)]))
    return HelixOptions(
        cache_dtype=cache_dtype,
        cp=cp,
        tpa=tpa,
        pp=pp,
        ep=draw(st.sampled_from([None, *fits])),
        tokens_per_block=draw(st.sampled_from([1, 7, 16, 24, 32, 64, 128, 256])),
        max_batch_size=draw(st.integers(1, 2**31 - 1)),
        max_seq_len=draw(st.integers(1, 2**31 - 1)),
        lower=draw(st.sampled_from(["auto", "reference", "triton"])),
        unmatched=draw(st.sampled_from(["error", "keep"])),
        pad_heads=draw(st.booleans()) if cp * tpa > 1 else False,
        cuda_graphs=draw(st.booleans()),
        head=draw(st.sampled_from(["replicate", "shard"])) if cp * tpa > 1 else "replicate",
        check=draw(st.sampled_from(["deferred", "every", "off"])) if cp * tpa > 1 else "deferred",
        **exchange,
    )


@settings(max_examples=60, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(options=asked(), engine=st.sampled_from(ENGINE_NAMES))
def test_read_back(options: HelixOptions, engine: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    text = engine_recipe(options, options.ep or 1, engine, "some/model")
    file = tmp_path_factory.mktemp("recipe") / ("r.yaml" if engine == "trtllm" else "r.sh")
    file.write_text(text)
    for read in (HelixOptions.from_file, READ[engine]):
        back = read(file)
        assert back == options, text
        assert back.notes_of_plan(1, 1, "x") == ()  # type: ignore[arg-type]
    if engine != "trtllm":
        assert HelixOptions.from_file(text) == options


def test_the_arguments_alone_say_the_layout() -> None:
    """Written apart: ranks, degrees and blocks as each engine's documents have them, without the comments."""
    options = HelixOptions(cp=4, tpa=2, ep=8, tokens_per_block=16, merge="a2a", q_proj="gather")
    words = shlex.split(engine_recipe(options, 8, "vllm", "a model"), comments=True)
    assert words[:3] == ["vllm", "serve", "a model"]
    for flag, value in (
        ("--tensor-parallel-size", "8"),
        ("--decode-context-parallel-size", "4"),
        ("--cp-kv-cache-interleave-size", "16"),
        ("--dcp-comm-backend", "a2a"),
    ):
        assert words[words.index(flag) + 1] == value
    assert "--enable-expert-parallel" in words and "--no-dcp-q-replicate" in words
    words = shlex.split(engine_recipe(options, 8, "sglang", "m"), comments=True)
    for flag, value in (("--tp-size", "8"), ("--dcp-size", "4"), ("--ep-size", "8"), ("--dcp-comm-backend", "a2a")):
        assert words[words.index(flag) + 1] == value
    values = yaml.safe_load(engine_recipe(options, 8, "trtllm", "m"))
    assert values["context_parallel_size"] * values["tensor_parallel_size"] == 8
    assert values["moe_expert_parallel_size"] * values["moe_tensor_parallel_size"] == 8
    assert values["cp_config"] == {"cp_type": "HELIX", "tokens_per_block": 16}
    assert values["kv_cache_config"] == {"tokens_per_block": 16} and "cuda_graph_config" not in values
    launched = {engine: engine_recipe(replace(options, cuda_graphs=False), 8, engine, "m") for engine in ENGINE_NAMES}
    words = shlex.split(launched["vllm"], comments=True)
    assert words[words.index("--compilation-config") + 1] == '{"cudagraph_mode": "NONE"}'
    assert "--disable-decode-cuda-graph" in shlex.split(launched["sglang"], comments=True)
    assert yaml.safe_load(launched["trtllm"])["cuda_graph_config"] is None


@pytest.mark.parametrize(
    ("change", "engine", "unsaid"),
    [
        ({}, "vllm", set()),
        ({"v_up": "before"}, "vllm", {"v_up"}),
        ({"ep": 4}, "vllm", {"ep"}),
        ({"tokens_per_block": 24}, "vllm", {"tokens_per_block"}),
        ({"ep": 4}, "sglang", set()),
        ({"tokens_per_block": 16}, "sglang", {"tokens_per_block"}),
        ({"merge": "ag_rs"}, "sglang", {"q_proj"}),
        ({"merge": "ag_rs", "q_proj": "gather"}, "sglang", set()),
        ({"tokens_per_block": 24, "ep": 4}, "trtllm", set()),
        ({"merge": "ag_rs", "q_proj": "gather"}, "trtllm", {"merge", "q_proj"}),
        ({"cache_dtype": "fp8_e4m3"}, "trtllm", set()),
        ({"cache_dtype": "fp8_e4m3", "cache_scale": 0.5}, "vllm", {"cache_scale"}),
        ({"cache_dtype": "fp8_ds_mla"}, "vllm", set()),
        ({"cache_dtype": "fp8_ds_mla"}, "sglang", {"cache_dtype"}),
        ({"cache_dtype": "fp8_ds_mla"}, "trtllm", set()),
        ({"ep": None}, "trtllm", {"ep"}),
        *(
            ({"cuda_graphs": False, "merge": "ag_rs", "q_proj": "gather"}, engine, set())
            for engine in ("vllm", "sglang")
        ),
    ],
)
def test_what_an_engine_can_not_say_is_a_comment_a_line(change: dict[str, Any], engine: str, unsaid: set[str]) -> None:
    options = replace(HelixOptions(cp=4, tpa=2, ep=8, tokens_per_block=1), **change)
    lines = [x for x in engine_recipe(options, options.ep or 8, engine, "m").splitlines() if x.startswith("# not in ")]
    assert {re.match(r"# not in [\w-]+: (\w+)=", line)[1] for line in lines} == unsaid  # type: ignore[index]
    assert all(len(line.split(": ", 2)[2]) > 20 for line in lines)


def test_the_same_plan(tmp_path: Path) -> None:
    captured = captured_from(named_model("tiny", meta=True), None)
    for options in (
        HelixOptions(cp=4),
        HelixOptions(cp=2, tpa=2, ep=2, v_up="before", tokens_per_block=24, q_proj="gather", merge="ag_rs"),
    ):
        plan = plan_model(captured, options).plan
        for engine in ENGINE_NAMES:
            file = tmp_path / ("r.yaml" if engine == "trtllm" else "r.txt")
            file.write_text(plan.to_engine(engine, "tiny"))
            assert plan_model(captured, HelixOptions.from_file(file)).plan == plan
    with pytest.raises(HelixError, match="engine 'tgi' is unknown; expected one of 'vllm', 'sglang', 'trtllm'"):
        plan.to_engine("tgi")
