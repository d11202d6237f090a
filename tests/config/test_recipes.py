"""Recipes in: published ones, command lines, files of several servers; what is refused, what is left out, what is noted."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from helix_compile import CapturedGraph, HelixError, HelixOptions, HelixPlan
from helix_compile.capture.source import captured_from
from helix_compile.checkpoint.named import named_model
from helix_compile.compile import plan_model
from helix_compile.config.dialects import fields_of_file
from helix_compile.config.options import OWN_NAMES, own_fields
from helix_compile.config.reading import ENGINES, read_recipe
from helix_compile.config.recipe import ConfigFields
from helix_compile.errors import PlanError
from tests.support.recipes import PUBLISHED, PublishedRecipe


@pytest.fixture(scope="module")
def tiny() -> CapturedGraph:
    return captured_from(named_model("tiny", meta=True), None)


def planned(captured: CapturedGraph, options: HelixOptions) -> HelixPlan:
    return plan_model(captured, options).plan


def read_as(engine: str, source: dict[str, Any], lenient: bool = False) -> ConfigFields:
    return read_recipe(source, own_fields, OWN_NAMES, engine, lenient)


def held(options: HelixOptions, expected: dict[str, Any]) -> dict[str, Any]:
    return {name: getattr(options, name) for name in expected}


def written(folder: Path, source: Any, files: Mapping[str, str]) -> Any:
    """A mapping as the YAML file it is published as; a text with files as a script beside them."""
    for name, content in files.items():
        (folder / name).write_text(content)
    if isinstance(source, str):
        (folder / "run.sh").write_text(source)
        return folder / "run.sh" if files else source
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(source, sort_keys=False))
    return file


@pytest.mark.parametrize("recipe", PUBLISHED, ids=lambda r: r.name)
def test_published(recipe: PublishedRecipe, tmp_path: Path, tiny: CapturedGraph) -> None:
    source = written(tmp_path, recipe.source, recipe.files)
    if isinstance(recipe.strict, str):
        with pytest.raises(HelixError) as caught:
            HelixOptions.from_file(source)
        assert recipe.strict in str(caught.value)
    else:
        options = HelixOptions.from_file(source)
        assert held(options, recipe.strict) == recipe.strict
        assert options == HelixOptions.from_file(source, lenient=True)
    if (expected := recipe.lenient or recipe.strict) and isinstance(expected, dict):
        options = HelixOptions.from_file(source, lenient=True)
        assert held(options, expected) == expected
        padded = options.cp * options.tpa > 8  # the heads that this model has
        plan = planned(tiny, replace(options, pp=1, pp_split="first", pad_heads=padded))
        assert (plan.layout.kvp, plan.layout.tpa, plan.layout.ep) == (options.cp, options.tpa, options.ep)
    else:
        with pytest.raises(HelixError):
            HelixOptions.from_file(source, lenient=True)


SCRIPT = r"""#!/bin/bash
# decode node; don't ask
export VLLM_DCP_Q_REPLICATE=1
TP=8
CUDA_VISIBLE_DEVICES=0,1,2,3 \
vllm serve deepseek-ai/DeepSeek-R1 \
    -tp ${TP} -dcp=${DCP:-4} --dcp-comm-backend a2a  \
    --cp_kv_cache_interleave_size 16 -ep -O3 \
    --max-model-len 128K --max-num-seqs 16 \
    --no-enable-prefix-caching --served-model-name a b \
    --compilation-config '{"cudagraph_mode": "FULL # all"}' --kv-transfer-config.kv_role kv_consumer \
    --seed 0 --tool-call-parser deepseek_v3 \
    2>&1 < /dev/null >> log.txt | tee x.log &  # to a file
"""


@pytest.mark.parametrize(
    ("text", "expected", "dialect"),
    [
        (
            SCRIPT,
            {"cp": 4, "tpa": 2, "ep": 8, "tokens_per_block": 16, "merge": "a2a", "max_seq_len": 131072,
             "max_batch_size": 16, "q_proj": "replicate"},
            "vLLM",
        ),
        ("vllm serve X --tensor-parallel-size 8 -dcp 8", {"cp": 8, "tpa": 1, "merge": "ag_rs", "tokens_per_block": 1}, "vLLM"),
        ("VLLM_DCP_Q_REPLICATE=0 vllm serve X -tp 2 -dcp 2", {"cp": 2, "q_proj": "gather"}, "vLLM"),
        ("vllm serve X -tp 4 -dcp 2 --no-dcp-q-replicate -pp 2", {"cp": 2, "tpa": 2, "q_proj": "gather", "pp": 2}, "vLLM"),
        ("docker run --gpus all -p 80:80 vllm/vllm-openai:v0.20 --model X -tp 2 -dcp 2 --max-model-len 4k",
         {"cp": 2, "max_seq_len": 4000}, "vLLM"),
        ("python -m vllm.entrypoints.openai.api_server --model X -tp 2 -dcp 2", {"cp": 2}, "vLLM"),
        ("-tp 2 --decode_context_parallel_size=2 --enable-expert-parallel", {"cp": 2, "ep": 2}, "vLLM"),
        ("python3 -m sglang.launch_server --model X --tp 8 --dcp-size 4 --ep 8 --cuda-graph-bs 1 2 4 --mem-fraction 0.8",
         {"cp": 4, "tpa": 2, "ep": 8, "tokens_per_block": 1}, "SGLang"),
        ("sglang serve --model-path X --tp-size=4 --dcp-size=2 --dcp-comm-backend fi_a2a --no-dcp-replicate-q-proj",
         {"cp": 2, "tpa": 2, "merge": "a2a", "q_proj": "gather"}, "SGLang"),
        ("--tp-size 8 --dcp-size 8 --moe-a2a-backend deepep", {"cp": 8, "ep": 8}, "SGLang"),
        ("--tp-size 8 --dcp-size 2 --dp-size 4 --enable-dp-attention --max-running-requests 64 --context-length 9000",
         {"cp": 2, "tpa": 1, "ep": 1, "max_batch_size": 16, "max_seq_len": 9000}, "SGLang"),
    ],
)  # fmt: skip
def test_command_lines(text: str, expected: dict[str, Any], dialect: str, tmp_path: Path) -> None:
    read = fields_of_file(text)
    assert read.dialect == dialect
    options = HelixOptions.from_file(text)
    assert held(options, expected) == expected
    for name, content in (("run.sh", text), ("run.txt", text), ("run.yaml", json.dumps(text))):
        (tmp_path / name).write_text(content)
        assert HelixOptions.from_file(tmp_path / name) == options
    forced = HelixOptions.from_vllm if dialect == "vLLM" else HelixOptions.from_sglang
    other = HelixOptions.from_sglang if dialect == "vLLM" else HelixOptions.from_vllm
    assert forced(text) == options
    with pytest.raises(HelixError):
        other(text)


V, S = "vllm serve X -tp 2 -dcp 2", "python -m sglang.launch_server --model X --tp 2 --dcp-size 2"


@pytest.mark.parametrize(
    ("source", "said"),
    [
        (V, None),
        (f"{V} --enforce-eager", False),
        (f"{V} --no-enforce-eager", True),
        (f"{V} -O0", False),
        (f"{V} -O3", None),
        (f"{V} --compilation-config 0", False),
        (f"""{V} -cc '{{"cudagraph_mode": "NONE"}}'""", False),
        (f"{V} -cc.cudagraph_mode none -cc.cudagraph_capture_sizes 1", False),
        (f"""{V} -O0 -cc '{{"cudagraph_mode": "FULL_DECODE_ONLY"}}'""", True),
        (f"{V} --enforce-eager -cc.cudagraph_mode FULL", False),
        (f"{V} -cc.use_cudagraph false", False),
        (f"""{V} -cc '{{"level": 3}}'""", None),
        (f'CC=$(cat cc.json)\n{V} -cc "$CC"', None),
        ({"tensor-parallel-size": 2, "decode-context-parallel-size": 2, "enforce-eager": True}, False),
        ({"tensor-parallel-size": 2, "decode-context-parallel-size": 2, "compilation-config": None}, None),
        ({"tensor-parallel-size": 2, "decode-context-parallel-size": 2, "compilation-config": {"cudagraph_mode": "NONE"}}, False),
        (S, None),
        (f"{S} --disable-cuda-graph", False),
        (f"{S} --disable-decode-cuda-graph", False),
        (f"{S} --disable-prefill-cuda-graph", None),
        (f"{S} --cuda-graph-backend-decode disabled", False),
        (f"{S} --disable-cuda-graph --cuda-graph-backend-decode full", True),
        (f"""{S} --cuda-graph-backend-decode full --cuda-graph-config '{{"decode": {{"backend": "disabled"}}}}'""", False),
        (f"""{S} --cuda-graph-config '{{"prefill": {{"backend": "disabled"}}}}'""", None),
        ({"tensor_parallel_size": 8, "moe_expert_parallel_size": 1, "cuda_graph_config": None}, False),
        ({"tensor_parallel_size": 8, "moe_expert_parallel_size": 1, "cuda_graph_config": {"max_batch_size": 8}}, True),
        ({"tensor_parallel_size": 8, "moe_expert_parallel_size": 1}, None),
        ({"generation_servers": {"tensor_parallel_size": 8}, "context_servers": {"cuda_graph_config": None}}, None),
        ({"generation_servers": {"tensor_parallel_size": 8}, "cuda_graph_config": None}, False),
    ],
    ids=str,
)  # fmt: skip
def test_whether_steps_are_recorded(source: Any, said: bool | None, tmp_path: Path) -> None:
    """As each engine has it, and in its order where several keys speak; None: nothing is said, and our default holds."""
    read = fields_of_file(written(tmp_path, source, {}))
    assert read.fields.get("cuda_graphs") is said
    decides = {"enforce_eager", "disable_cuda_graph"} | ({"compilation_config"} if "mode" in str(source) else set())
    assert not decides & {*read.without_effect}


def test_a_command_and_its_file_are_one_set_of_options(tmp_path: Path) -> None:
    """Where both say a thing: the command line has it in vLLM and SGLang, TensorRT-LLM's versions differ."""
    (tmp_path / "c.yaml").write_text("tensor_parallel_size: 4\nmax_batch_size: 32\nkv_cache_config:\n  dtype: nvfp4\n")
    script = tmp_path / "run.sh"

    def refused(text: str) -> str:
        script.write_text(text)
        with pytest.raises(HelixError) as caught:
            HelixOptions.from_file(script)
        return str(caught.value)

    both = refused("trtllm-serve X --tp_size 8 --config c.yaml")
    assert "tensor_parallel_size: got 8 on the command line and 4 in c.yaml" in both
    assert "kv_cache_dtype: got 'auto' on the command line and 'nvfp4'" in refused(
        "trtllm-serve X --config c.yaml --kv_cache_dtype auto"
    )
    assert "kv_cache_config.dtype: got 'nvfp4'" in refused("trtllm-serve X --tp_size 4 --config c.yaml")
    script.write_text("trtllm-serve X --tp_size 4 --port $PORT --extra_llm_api_options c.yaml --grpc --revision main")
    read = fields_of_file(script, lenient=True)
    assert (read.fields["tpa"], read.fields["max_batch_size"]) == (4, 32) and {"port", "grpc", "revision"} <= {
        *read.without_effect
    }
    (tmp_path / "d.yaml").write_text("tp-size: 8\ndcp-size: 8\nport: 80\n")
    script.write_text("sglang serve X --config d.yaml --dcp-size 4 --port 90")
    read = fields_of_file(script)
    assert (read.fields["cp"], read.fields["tpa"]) == (4, 2)
    assert read.recipe.notes[0] == "dcp_size=4: SGLang takes the command line's, not the 8 of d.yaml"
    (tmp_path / "e.yaml").write_text("- 1\n")
    assert "e.yaml: expected a mapping" in refused("vllm serve X --config e.yaml")
    assert "lies beside it; there is none at" in refused("vllm serve X --config /dev/stdin")


def test_the_script_says_what_has_no_effect() -> None:
    idle = fields_of_file(SCRIPT).without_effect
    assert {"enable_prefix_caching", "served_model_name", "optimization_level", "kv_transfer_config", "seed"} <= {*idle}
    assert "compilation_config" not in idle  # its cudagraph_mode is cuda_graphs here
    assert "CUDA_VISIBLE_DEVICES" in idle and len(idle) == len({*idle})
    assert "VLLM_DCP_Q_REPLICATE" not in idle and "dcp_q_replicate" not in idle


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("vllm serve X --tensor-parallel-sise 8", "tensor_parallel_sise: got an unknown key, expected one that is understood; did you mean tensor_parallel_size"),
        ("vllm serve X -tp 8 --zzz 3", "zzz: got an unknown key, expected one that is understood; the nearest is "),
        ("vllm serve X -tp 8 -tp 4", "tensor_parallel_size: got it twice"),
        ("vllm serve X -tp eight", "tensor_parallel_size: got 'eight' (str), expected an int >= 1"),
        ("vllm serve X -tp", "tensor_parallel_size: got no value, expected one after -tp"),
        ("vllm serve X -tp 8 'unclosed", "can't be parsed: line 1: No closing quotation"),
        ("vllm serve X Y -tp 8", "got 'Y', which no flag takes"),
        ("vllm serve X -tp 8\nvllm serve Y -tp 4", "got 2 commands of an engine (lines 1, 2), expected one"),
        ("vllm serve X -tp 8\n  -dcp 8", "got flags apart from the command (-dcp ..., line 2)"),
        ("ls -l\ncd -", "got no command of an engine"),
        ("trtllm-serve X --cp_size 8", "cp_config: got none, expected {cp_type: HELIX, tokens_per_block: N}"),
        ("trtllm-serve X --tensor_parallel_sise 8", "got an unknown key, expected one that is understood; did you mean tensor_parallel_size"),
        ("trtllm-serve X --tp_size 8 --config no.yaml", "extra_llm_api_options: got 'no.yaml', expected a file that the text writes"),
        ("trtllm-serve X --tp_size 8 --server_role CONTEXT", "expected the generation server's recipe"),
        ("trtllm-serve X --tp_size 8 --kv_cache_dtype nvfp4", "kv_cache_config.dtype: got 'nvfp4'"),
        ("trtllm-serve mm_embedding_serve X --port 80", "expected a server that decodes"),
        ("trtllm-serve disaggregated -l info", "got no --config_file"),
        ("vllm serve X -tp $TP", "tensor_parallel_size: got '$TP', expected a text that says it; line 1: TP is not set in this text"),
        ("vllm serve X -tp 8 $MORE", "got '$MORE', expected a text that says it; line 1: MORE is not set"),
        ("vllm serve X -tp 8 --served-model-name a $MORE", "served_model_name: got '$MORE', expected a text"),
        ('vllm serve X -tp 8 "$@"', "line 1: $@ is what the script is called with"),
        ("TP=$(nvidia-smi -L | wc -l)\nvllm serve X -tp $TP", "line 1: $(nvidia-smi -L | wc -l) is known only when it runs"),
        ("TP=8\nif [ -n \"$A\" ]; then\n  TP=4\nfi\nvllm serve X -tp $TP", "line 3: TP is set behind the if of line 2"),
        ("A=(-tp 8)\n[[ $B ]] && A+=(-dcp 8)\nvllm serve X ${A[@]}", "line 2: A is set behind the && of line 2"),
        ("for t in 4 8; do\nvllm serve X -tp $t\ndone", "line 1: t runs through a loop"),
        ("T=4\nrun() {\nvllm serve X -tp $T\n}\nT=8\nrun", "line 5: T is set again behind the function of line 2"),
        ("T=4\n. ./env.sh\nvllm serve X -tp $T", "line 2: `. ./env.sh` may set it"),
        ("VLLM_DCP_Q_REPLICATE=0\nvllm serve X -tp 2 -dcp 2", "line 1: VLLM_DCP_Q_REPLICATE is set but not exported"),
        ("vllm serve X -tp 8 \\\n# a note\n  -dcp 8", "got flags apart from the command (-dcp ..., line 3)"),
        ("A=(-tp 8\nvllm serve X", "line 1: an array is not closed"),
        ("cat << EOF > f\na: 1\n", "line 2: the here-document does not end"),
        ("--host a --port 80", "these flags may be of "),
        ("vllm serve X -tp 8 -dcp 8 --kv-cache-dtype fp8_e5m2", "kv_cache_dtype: got 'fp8_e5m2' (str), expected 'auto'"),
        ("vllm serve X -tp 8 -dcp 8 -sc '{\"method\": \"mtp\"}'", "speculative_config: got '{\"method\": \"mtp\"}', expected no such key: drafts"),
        ("vllm serve X -tp 8 --hf-overrides '{\"a\": 1}'", "hf_overrides: got "),
        ("vllm serve X -tp 8 -pcp 2", "prefill_context_parallel_size: got 2 (int), expected 1"),
        ("vllm serve X --dcp-q-replicate -tp 2", "dcp_q_replicate: got True at decode_context_parallel_size 1"),
        ("VLLM_PP_LAYER_PARTITION=3,1 vllm serve X -tp 2 -pp 2", "VLLM_PP_LAYER_PARTITION: got '3,1'"),
        ("--tp-size 8 --dcp-size 3", "dcp_size: got 3 with tp_size 8, expected a divisor"),
        ("--tp-size 8 --dcp-size 8 --dp-size 2 --enable-dp-attention", "dcp_size: got 8 with tp_size / dp_size 4"),
        ("--tp-size 8 --dcp-size 8 --dcp-replicate-q-proj", "no such key with dcp_comm_backend ag_rs"),
        ("--tp-size 8 --dcp-comm-backend a2a", "no such key at dcp_size 1"),
        ("--tp-size 8 --dcp-size 8 --moe-dense-tp-size 1", "moe_dense_tp_size: got 1 (int), expected 8"),
        ("--tp-size 8 --dcp-size 8 --disaggregation-mode prefill", "give the decode server's recipe"),
        ("--tp-size 8 --dcp-size 8 --ep-num-redundant-experts 32", "ep_num_redundant_experts: got "),
        ("--tp-size 8 --attn-cp-size 2", "attn_cp_size: got 2 (int), expected 1"),
        ({"tensor-parallel-size": 8, "decode-context-parallel-size": 8, "dcp-size": 8}, "several dialects"),
        ("vllm serve X -tp 8\nvllm serve Y -tp 4", "or its flags alone; of servers that share the work, the one that decodes"),
        ({"tensor_parallel_size": 1, "moe_expert_parallel_size": 8, "contxt_parallel_size": 8, "cp_config": {}}, "contxt_parallel_size: got an unknown key, expected one that is understood; did you mean context_parallel_size"),
        ("vllm serve X --tensor-paralel-size 8 -dcp 8", "tensor_paralel_size: got an unknown key"),
        ({"CP": 4}, "CP: got an unknown key, expected one that is understood; did you mean cp?"),
        ({"apiVersion": "v1", "kind": "Pod", "spec": {}}, "got a file of Kubernetes, expected the options of an engine"),
        ({"services": {"v": {"command": "vllm serve X -tp 8"}}}, "got a file of Docker Compose, expected"),
        ("no/such/file.yaml", "can't read this configuration"),
        ({"tensor_parallel_size": 8, "cp_config": None, "sparse_attention_config": {"algorithm": "dsa", "index_topk": 4}},
         "sparse_attention_config.index_topk: got 4, expected no such key: give a checkpoint folder"),
        ({"tensor_parallel_size": 8, "cp_config": None, "sparse_attention_config": {"algorithm": "rocket"}},
         "expected no such key: which keys are attended to is the model's own"),
        ({"tensor_parallel_size": 8, "port": 80}, "these keys may be of TensorRT-LLM or vLLM; call from_trtllm"),
    ],
)  # fmt: skip
def test_refused(source: Any, message: str) -> None:
    with pytest.raises(HelixError) as caught:
        HelixOptions.from_file(source)
    assert message in str(caught.value)


def test_lenient_leaves_out_and_says_so(tiny: CapturedGraph, caplog: pytest.LogCaptureFixture) -> None:
    text = "vllm serve X -tp 8 -dcp 8 --zzz 3 4 --kv-cache-dtype fp8_e5m2 -q modelopt -sc '{}' --spec-model Y --spec-tokens 3"
    with pytest.raises(HelixError):
        HelixOptions.from_vllm(text)
    options = HelixOptions.from_vllm(text, lenient=True)
    plan = planned(tiny, options)
    notes = "\n".join(plan.notes)
    assert "zzz is unknown, and was ignored; the nearest is " in notes
    assert "left out: quantization='modelopt': a checkpoint says itself" in notes
    assert "left out: spec_model='Y', spec_tokens='3': drafts belong" in notes  # once, for one reason
    # bfloat16 takes two bytes an element, fp8 one: half of what the plan counts
    here, there = float(plan.kv_bytes_per_token_per_rank), float(plan.kv_bytes_per_token_per_rank) / 2
    assert f"bfloat16: {here:g} bytes a token and rank in place of {there:g}" in notes
    assert plan.notes == HelixPlan.from_json(plan.to_json()).notes
    # notes are no part of what options are, and survive a change of them
    assert options == HelixOptions(cp=8, ep=1, merge="ag_rs", tokens_per_block=1)
    assert planned(tiny, replace(options, max_batch_size=2)).notes == plan.notes


@pytest.mark.parametrize(
    ("source", "note"),
    [
        ("--tp-size 32 --ep-size 32 --dp-size 4 --enable-dp-attention --dcp-size 8 --dcp-comm-backend ag_rs",
         "dp_size: one of 4 data-parallel replicas of attention is planned, on its 8 ranks; experts lie over ep=8 of these "
         "ranks, in the engine over ep=32 of all 32"),
        ("vllm serve X -tp 2 -dcp 2 -dp 4 -ep --dcp-q-replicate --dcp-comm-backend a2a", "data_parallel_size: one of 4 data-parallel replicas"),
        ("vllm serve X -tp 2 -dcp 2 --dcp-comm-backend a2a", "dcp_q_replicate is not said"),
        ("vllm serve X -tp 2 -dcp 2 --dcp-q-replicate", "dcp_comm_backend is not said: planned with ag_rs"),
        ("vllm serve X -tp 2 -dcp 2 --dcp-q-replicate --dcp-comm-backend a2a --kv-transfer-config.kv_connector NixlConnector",
         "vLLM takes its block size then, which is not said either: planned with 1"),
        ("--tp-size 8 --dcp-size 8", "dcp_comm_backend is not said: planned with ag_rs"),
        ("--tp-size 32 --ep-size 32 --attn-dp-size 4 --dcp-size 8 --dcp-comm-backend ag_rs", "attn_dp_size: one of 4 data-parallel"),
        ("--tp-size 2 --dcp-size 2 --dcp-comm-backend fi_a2a --dcp-replicate-q-proj", "over FlashInfer's transport"),
        ("--tp-size 8 --dcp-size 8 --dcp-comm-backend ag_rs --ep-size 2 --moe-a2a-backend deepep", "ep_size=2: SGLang makes it tp_size, 8"),
        ({"context_parallel_size": 2, "cp_config": {"cp_type": "HELIX"}}, "cp_config.tokens_per_block is not said"),
    ],
)  # fmt: skip
def test_noted(source: Any, note: str) -> None:
    notes = fields_of_file(source).recipe.notes
    assert len(notes) == 1 and note in notes[0]


def test_our_own_file_leniently() -> None:
    assert HelixOptions.from_file({"cp": 4, "megre": "a2a"}, lenient=True) == HelixOptions(cp=4)
    (note,) = fields_of_file({"cp": 4, "megre": "a2a"}, lenient=True).recipe.notes
    assert note == "megre is unknown, and was ignored; did you mean merge?"
    assert fields_of_file({"tensor-parallel-size": 8, "model": "x"}).dialect == "vLLM"


def test_launchers_of_several_servers() -> None:
    decode = {"tp-size": 8, "dcp-size": 4, "served-model-name": "x"}
    launcher = {
        "name": "job",
        "backend": {"type": "sglang", "sglang_config": {"prefill": {"tp-size": 2}, "decode": decode}},
    }
    assert held(HelixOptions.from_file(launcher), {"cp": 4, "tpa": 2}) == {"cp": 4, "tpa": 2}
    assert fields_of_file(launcher).dialect == "SGLang"
    decode = {"tensor-parallel-size": 8, "decode-context-parallel-size": 8, "dcp-kv-cache-interleave-size": 1}
    launcher = {"backend": {"decode_environment": {"VLLM_DCP_Q_REPLICATE": 0}, "vllm_config": {"decode": decode}}}
    assert HelixOptions.from_file(launcher) == HelixOptions.from_vllm({**decode, "dcp_q_replicate": False})


@pytest.mark.parametrize("dialect", ["vLLM", "SGLang", "TensorRT-LLM"])
def test_every_key_without_effect_is_taken(dialect: str) -> None:
    """As a file has it and, for those that have one, on a command line; also its null."""
    keys = ENGINES[dialect]
    value = {"int": 3, "number": 0.5, "bool": True, "str": "x", "mapping": {"a": 1}, "list": [1], "any": "x"}
    read = {
        "vLLM": HelixOptions.from_vllm,
        "SGLang": HelixOptions.from_sglang,
        "TensorRT-LLM": HelixOptions.from_trtllm,
    }[dialect]
    given = {
        k: value[kind.split(" or ")[0].replace("scalar", "str")]
        for k, kind in keys.without_effect.items()
        if k not in keys.changing or keys.changing[k].at
    }
    plain = {"tensor_parallel_size": 2} if dialect != "SGLang" else {"tp_size": 2}
    assert read({**given, **plain}) == read({**dict.fromkeys(given), **plain}) == read(plain)
    if dialect != "TensorRT-LLM":
        flags = [f"--{k.replace('_', '-')}" + ("" if v is True else f" {v}") for k, v in given.items()]
        ranks = "--tp-size 2" if dialect == "SGLang" else "-tp 2"
        assert read(" ".join((ranks, *flags))) == read(plain)


@pytest.mark.parametrize("dialect", ["vLLM", "SGLang", "TensorRT-LLM"])
def test_values_that_change_what_a_rank_computes_or_holds(dialect: str) -> None:
    """Of keys that have no effect else: refused, left out leniently with the reason; null and what asks for nothing are taken."""
    keys = ENGINES[dialect]
    value = {"int": 3, "number": 0.5, "bool": True, "str": "x", "list": [1], "any": "x"}
    plain = {"tensor_parallel_size": 2} if dialect != "SGLang" else {"tp_size": 2}
    nothing = {"int": 0, "number": 0, "bool": False, "str": "", "list": [], "any": None}
    for key, changing in keys.changing.items():
        kind = keys.without_effect[key].split(" or ")[0].replace("scalar", "list")
        given = changing.at[0] if changing.at else value[kind]
        with pytest.raises(
            PlanError, match=rf"{key}: got {re.escape(repr(given))}, expected no such key: {changing.why}"
        ):
            read_as(dialect, {**plain, key: given})
        read = read_as(dialect, {**plain, key: given}, lenient=True)
        assert read.recipe.notes == (f"left out: {key}={given!r}: {changing.why}",) and key not in read.without_effect
        for taken in (nothing[kind], None, *changing.but):
            read = read_as(dialect, {**plain, key: taken})
            assert key in read.without_effect and read.recipe.notes == ()
    assert all(changing.at == () or changing.but == () for changing in keys.changing.values())


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("vllm serve X -tp 2 -dcp 2 --dcp-comm-backend ag_rs --dcp-q-replicate --kv-cache-dtype fp8 --kv-cache-dtype-skip-layers 0 1", "kv_cache_dtype_skip_layers: got ['0', '1'], expected no such key: every layer's cache is in what cache_dtype says"),
        ("vllm serve X -tp 2 -dcp 2 --dcp-comm-backend ag_rs --dcp-q-replicate --kv-cache-dtype fp8 --calculate-kv-scales", "calculate_kv_scales: got True, expected no such key: an FP8 cache has the scales that cache_scale says"),
        ("--tp-size 2 --dcp-size 2 --dcp-comm-backend ag_rs --kv-cache-dtype fp8_e4m3 --quantization-param-path s.json", "quantization_param_path: got 's.json', expected no such key: an FP8 cache has"),
        ("VLLM_MLA_DISABLE=1 vllm serve X -tp 2 -dcp 2 --dcp-comm-backend ag_rs --dcp-q-replicate", "VLLM_MLA_DISABLE: got '1', expected no such key: latent attention caches latents"),
        ("SGLANG_CPU_QUANTIZATION=1 python -m sglang.launch_server --tp-size 2", "SGLANG_CPU_QUANTIZATION: got '1', expected no such key: a checkpoint says itself"),
        ({"tensor_parallel_size": 2, "moe_expert_parallel_size": 2, "moe_config": {"use_low_precision_moe_combine": True}}, "moe_config.use_low_precision_moe_combine: got True, expected no such key: collectives carry"),
        ({"tensor_parallel_size": 2, "kv_cache_config": {"mamba_ssm_cache_dtype": "bfloat16"}}, "kv_cache_config.mamba_ssm_cache_dtype: got 'bfloat16', expected no such key: states of linear"),
        ("--tp-size 2 --dcp-size 2 --torchao-config $Q", "torchao_config: got '$Q', expected a text that says it"),
    ],
)  # fmt: skip
def test_what_a_rank_holds_is_not_without_effect(source: Any, message: str) -> None:
    with pytest.raises(PlanError, match=re.escape(message)):
        fields_of_file(source)
    if "$Q" not in str(source):
        (note,) = fields_of_file(source, lenient=True).recipe.notes
        assert note.startswith("left out: ") and message.split("expected no such key: ")[1] in note


def test_scales_and_layers_of_an_fp8_cache_have_no_effect_on_another() -> None:
    read = fields_of_file(
        "VLLM_MLA_DISABLE=0 vllm serve X -tp 2 -dcp 2 --dcp-comm-backend ag_rs --dcp-q-replicate --kv-cache-dtype-skip-layers 0 --calculate-kv-scales"
    )
    assert {"kv_cache_dtype_skip_layers", "calculate_kv_scales", "VLLM_MLA_DISABLE"} <= {*read.without_effect}
    assert read.recipe.notes == ()


def test_variables_of_an_engine_that_are_not_known_are_noted() -> None:
    read = fields_of_file(
        "VLLM_NEW=3 VLLM_USE_V1=1 NCCL_DEBUG=INFO vllm serve X -tp 2 -dcp 2 --dcp-comm-backend ag_rs --dcp-q-replicate"
    )
    assert read.recipe.notes == ("variables of vLLM that are not known here, planned as without them: VLLM_NEW=3",)
    assert {"VLLM_NEW", "VLLM_USE_V1", "NCCL_DEBUG"} <= {*read.without_effect}
    read = fields_of_file(
        "vllm serve X -tp 2 -dcp 2 --dcp-comm-backend ag_rs --dcp-q-replicate --additional-config '{\"a\": 1}'"
    )
    assert read.recipe.notes == ("additional_config has keys of a plug-in's own: what they change is not planned",)


HELIX = {"cp_type": "HELIX", "tokens_per_block": 32}
TWO = {"context_parallel_size": 2, "cp_config": HELIX}


@pytest.mark.parametrize(
    ("above", "inside"),
    [
        ({"tensor_parallel_size": 4}, {"tensor_parallel_size": 2}),
        ({"kv_cache_config": {"dtype": "fp8", "tokens_per_block": 32}}, {"kv_cache_config": {"enable_block_reuse": False}}),
        ({"moe_config": {"backend": "CUTLASS"}}, {"moe_config": {"backend": "TRTLLM"}}),
    ],
)  # fmt: skip
def test_a_disaggregated_file_that_contradicts_itself(above: dict[str, Any], inside: dict[str, Any]) -> None:
    """As TensorRT-LLM refuses it; what both say alike, and what is of the servers in front, is no contradiction."""
    (key,) = above
    with pytest.raises(
        PlanError, match=rf"{key}: got .* at the top and .* in generation_servers, expected one of them"
    ):
        HelixOptions.from_file({**above, "generation_servers": {**TWO, **inside}})
    with pytest.raises(PlanError, match=key):
        HelixOptions.from_file({**above, "generation_servers": {**TWO, **inside}}, lenient=True)
    front = {"port": 80, "num_instances": 3, "node_id": 3, "num_workers": 2, "disagg_coordinator_url": "http://x"}
    front |= dict.fromkeys(("allow_request_chat_template", "gen_strip_message_history", "gen_tokids_ctxbytes"), True)
    servers = {**TWO, **inside, "port": 81, "num_instances": 1}
    assert HelixOptions.from_file({**front, **inside, "generation_servers": servers}) == HelixOptions.from_file(
        {**TWO, **inside}
    )


def test_a_recipe_says_its_dtype_and_another_is_refused(tiny: CapturedGraph) -> None:
    """It is held against that of the model, which the call or the command gives."""
    source = "vllm serve X -tp 2 -dcp 2 --dcp-comm-backend ag_rs --dcp-q-replicate --dtype {}"
    plain = planned(tiny, HelixOptions(cp=2)).notes
    assert planned(tiny, HelixOptions.from_file(source.format("bfloat16"))).notes == plain
    with pytest.raises(
        PlanError, match=r"the recipe says dtype float16, the model that is planned is in bfloat16: give"
    ):
        planned(tiny, HelixOptions.from_file(source.format("half")))
    notes = planned(tiny, HelixOptions.from_file(source.format("half"), lenient=True)).notes
    (note,) = (n for n in notes if n not in plain)
    assert note.startswith("dtype=half is left out")
    with pytest.raises(PlanError, match=r"dtype: got 'fp4' \(str\), expected 'auto' or one of"):
        HelixOptions.from_file(source.format("fp4"))


def test_numbers_of_a_file_that_becomes_a_command_line_may_be_text() -> None:
    options = HelixOptions.from_vllm(
        {"tensor-parallel-size": "8", "decode-context-parallel-size": 8, "max-model-len": "128k"}
    )
    assert options.cp == 8 and options.max_seq_len == 128_000
    assert HelixOptions.from_vllm({"tensor-parallel-size": 8, "max-model-len": "128K"}).max_seq_len == 131_072


def test_no_key_is_in_two_tables() -> None:
    for keys in ENGINES.values():
        tables = [*keys.applied, *keys.without_effect, *keys.refused, *keys.beside]
        assert len(tables) == len({*tables}), sorted({k for k in tables if tables.count(k) > 1})
        assert not {*keys.short} & {*tables}


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("vllm serve X -tp 2 -dcp 2 --kv-cache-dtype fp8", "fp8_e4m3"),
        ("vllm serve X -tp 2 -dcp 2 --kv-cache-dtype fp8_ds_mla", "fp8_ds_mla"),
        ("--tp-size 2 --dcp-size 2 --kv-cache-dtype fp8_e4m3", "fp8_e4m3"),
        ({"tensor_parallel_size": 2, "moe_expert_parallel_size": 1, "kv_cache_config": {"dtype": "fp8"}}, "fp8_e4m3"),
        ("vllm serve X -tp 2 -dcp 2 --kv-cache-dtype bfloat16", "auto"),
    ],
    ids=str,
)
def test_an_fp8_cache_is_an_option(source: Any, expected: str) -> None:
    assert HelixOptions.from_file(source).cache_dtype == expected
