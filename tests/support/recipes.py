"""Published recipes of decode context parallelism (values only), and what must come of them.

A line: name, what is published, fields of HelixOptions or the sentence of the refusal, the same read leniently (None: as
before), and the files beside it.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

DRAFTS = "drafts belong to the loop that decodes"
FP8 = {"cache_dtype": "fp8_e4m3"}
ULYSSES = "CP type must be HELIX for MLA, but got ULYSSES, the default"


class PublishedRecipe(NamedTuple):
    """One line of the table."""

    name: str
    source: Any
    strict: dict[str, Any] | str
    lenient: dict[str, Any] | None = None
    files: Mapping[str, str] = MappingProxyType({})


_CACHE = {"enable_block_reuse": False, "enable_partial_reuse": False}
_NIXL = {"backend": "NIXL", "transceiver_runtime": "PYTHON"}
_UCX = {"backend": "UCX"}
_LITE = {**_CACHE, "tokens_per_block": 32, "use_kv_cache_manager_v2": True}
_R1 = {
    "num_instances": 1,
    "pipeline_parallel_size": 1,
    "enable_chunked_prefill": False,
    "max_batch_size": 1,
    "max_seq_len": 100000,
    "moe_config": {"backend": "TRTLLM"},
    "kv_cache_config": {**_CACHE, "max_tokens": 100000, "dtype": "fp8"},
    "cache_transceiver_config": {**_UCX, "max_tokens_in_buffer": 100000},
}
_MOONCAKE = (
    '{"kv_connector":"MooncakeStoreConnector","kv_role":"kv_both","kv_load_failure_policy":"recompute",'
    '"kv_connector_extra_config":{"load_async":true,"lookup_async":true,"enable_offload":false}}'
)
_PREFILL = '{"mla_prefill_backend":"TRTLLM_RAGGED","use_prefill_query_quantization":true}'
_K3 = {
    "served-model-name": "moonshotai/Kimi-K3",
    "tensor-parallel-size": 8,
    "decode-context-parallel-size": 8,
    "dcp-comm-backend": "a2a",
    "trust-remote-code": True,
    "load-format": "fastsafetensors",
    "moe-backend": "auto",
    "gpu-memory-utilization": 0.92,
    "no-enable-flashinfer-autotune": True,
    "kv-cache-dtype": "fp8",
    "kv-transfer-config": _MOONCAKE,
    "attention-backend": "TOKENSPEED_MLA",
    "attention-config": _PREFILL,
    "enable-prefix-caching": True,
    "language-model-only": True,
    "prefix-match-unit": 128,
}

# launch scripts as they are written: arrays, defaults, files beside them or written on the way
_GENERATION = """
cuda_graph_config: null
cp_config:
  cp_type: HELIX
  tokens_per_block: 32
kv_cache_config:
  enable_block_reuse: false
  tokens_per_block: 32
cache_transceiver_config:
  backend: UCX
"""
_SERVE = r"""#!/bin/bash
trtllm-llmapi-launch trtllm-serve serve ${model_path} \
    --backend pytorch --max_batch_size 1024 --max_seq_len 8192 \
    --kv_cache_free_gpu_memory_fraction 0.9 \
    --tp_size 2 --cp_size 4 --ep_size 8 --trust_remote_code \
    --extra_llm_api_options extra-llm-api-config.yml 2>&1 | tee server.log
"""
_SERVE_HERE = (
    r"""
model_path=/models/DeepSeek-R1
extra_llm_api_file=/tmp/extra-llm-api-config.yml
CP=${CP:-4}
cat << EOF > ${extra_llm_api_file}
"""
    + _GENERATION.lstrip()
    + r"""EOF
if [ -z "$HF_TOKEN" ]; then
    echo "no token" >&2
    exit 1
fi
export TRTLLM_SERVER_DISABLE_GC=1
mpirun -n 1 --oversubscribe trtllm-serve "$model_path" --port="${PORT:-8000}" \
    --cp_size=$CP --ep_size=$((CP)) --config=${extra_llm_api_file} &
SERVER_PID=$!
"""
)
_DISAGGREGATED = """
hostname: localhost
port: 8000
backend: pytorch
context_servers:
  num_instances: 1
  tensor_parallel_size: 2
generation_servers:
  num_instances: 1
  tensor_parallel_size: 1
  context_parallel_size: 2
  cp_config: {cp_type: HELIX, tokens_per_block: 32}
"""
_ARRAYS = r"""#!/usr/bin/env bash
set -euo pipefail
MODEL_PATH="${MODEL_ID:-moonshotai/Kimi-K2-Instruct}"
TP_SIZE=${TP_SIZE:-8}
export SGLANG_ENABLE_UNIFIED_RADIX_TREE=1
COMMON=(
  --model-path "${MODEL_PATH}"
  --host 0.0.0.0 --port "${SGLANG_PORT}"
## [decode]
#  --disaggregation-mode decode
)
ARGS=( "${COMMON[@]}" --tp "$TP_SIZE" --dcp-size $((TP_SIZE / 2)) )
ARGS+=(--dcp-comm-backend a2a --dcp-replicate-q-proj)
mkdir -p logs
nohup python3 -m sglang.launch_server "${ARGS[@]}" > logs/server.log 2>&1 &
child=$!
wait "$child"
"""
_DOCKER = r"""docker run --rm --gpus all --ipc=host -p 8000:8000 -e HF_HUB_OFFLINE=1 \
  nvcr.io/nvidia/tensorrt-llm/release:1.2.0 \
  bash -lc "trtllm-serve serve /data/model --tp_size 8 --ep_size 8 --max_batch_size 1 --max_seq_len 4096"
"""
_VLLM_CONFIG = "tensor-parallel-size: 4\ndecode-context-parallel-size: 4\nmax-num-seqs: 32\nport: 8000\n"
_HELIX = {"tokens_per_block": 32, "merge": "a2a"}

PUBLISHED = [
    PublishedRecipe(
        "trtllm-serve and its file",
        _SERVE,
        {"cp": 4, "tpa": 2, "ep": 8, "max_batch_size": 1024, "max_seq_len": 8192, **_HELIX},
        files={"extra-llm-api-config.yml": _GENERATION},
    ),
    PublishedRecipe("trtllm-serve and a file it writes", _SERVE_HERE, {"cp": 4, "tpa": 1, "ep": 4, **_HELIX}),
    PublishedRecipe(
        "trtllm-serve disaggregated",
        "trtllm-serve disaggregated -c disagg_config.yaml -t 3600",
        {"cp": 2, "tpa": 1, "ep": 1, "tokens_per_block": 32},
        files={"disagg_config.yaml": _DISAGGREGATED},
    ),
    PublishedRecipe(
        "trtllm-serve in a container", _DOCKER, {"cp": 1, "tpa": 8, "ep": 8, "max_batch_size": 1, "max_seq_len": 4096}
    ),
    PublishedRecipe(
        "sglang with arrays",
        _ARRAYS,
        {"cp": 4, "tpa": 2, "ep": 1, "tokens_per_block": 1, "merge": "a2a", "q_proj": "replicate"},
    ),
    PublishedRecipe(
        "sglang with an array under a condition",
        _ARRAYS.replace("mkdir -p logs", 'if [[ -n "${RATIO:-}" ]]; then\n  ARGS+=(--hicache-ratio "$RATIO")\nfi'),
        "line 15: ARGS is set behind the if of line 14",
    ),
    PublishedRecipe(
        "vllm and its file",
        'vllm serve "${MODEL:?}" --config config.yaml --max-num-seqs 16 --port ${PORT}',
        {"cp": 4, "tpa": 1, "ep": 1, "max_batch_size": 16},
        files={"config.yaml": _VLLM_CONFIG},
    ),
    PublishedRecipe(
        "trtllm blog21",
        {
            "context_parallel_size": 2,
            "cp_config": {
                "cp_type": "HELIX",
                "tokens_per_block": 32,
                "use_nccl_for_alltoall": False,
                "fifo_version": 2,
            },
            "kv_cache_config": {"tokens_per_block": 32},
        },
        {"cp": 2, "tpa": 1, "ep": 1, "tokens_per_block": 32},
    ),
    PublishedRecipe(
        "trtllm ctxtp2 gentp1cp2",
        {
            "hostname": "localhost",
            "model": "DeepSeek-V3-Lite/bf16",
            "free_gpu_memory_fraction": 0.25,
            "backend": "pytorch",
            "cuda_graph_config": None,
            "context_servers": {
                "num_instances": 1,
                "kv_cache_config": _LITE,
                "tensor_parallel_size": 2,
                "cache_transceiver_config": _NIXL,
            },
            "generation_servers": {
                "num_instances": 1,
                "tensor_parallel_size": 1,
                "pipeline_parallel_size": 1,
                "context_parallel_size": 2,
                "enable_chunked_prefill": False,
                "cp_config": {"cp_type": "HELIX", "tokens_per_block": 32},
                "kv_cache_config": _LITE,
                "cache_transceiver_config": _NIXL,
            },
        },
        {"cp": 2, "tpa": 1, "ep": 1, "tokens_per_block": 32},
    ),
    PublishedRecipe(
        "trtllm R1 FP4",
        {
            "hostname": "localhost",
            "port": 8000,
            "model": "DeepSeek-R1-FP4",
            "backend": "pytorch",
            "disable_overlap_scheduler": True,
            "cuda_graph_config": None,
            "context_servers": {**_R1, "tensor_parallel_size": 4, "max_num_tokens": 100000, "urls": ["localhost:8001"]},
            "generation_servers": {
                **_R1,
                "tensor_parallel_size": 1,
                "context_parallel_size": 4,
                "max_num_tokens": 32,
                "urls": ["localhost:8002"],
            },
        },
        ULYSSES,
    ),
    PublishedRecipe(
        "trtllm generation only",
        {
            "hostname": "localhost",
            "port": 8000,
            "model": "DeepSeek-V3-Lite/bf16",
            "backend": "pytorch",
            "cuda_graph_config": None,
            "context_servers": {"num_instances": 0},
            "generation_servers": {
                "num_instances": 1,
                "tensor_parallel_size": 1,
                "pipeline_parallel_size": 1,
                "context_parallel_size": 2,
                "cp_config": {"cp_type": "helix"},
                "cache_transceiver_config": _UCX,
                "urls": ["localhost:8002"],
            },
        },
        {"cp": 2, "tpa": 1, "ep": 1, "tokens_per_block": 32},
    ),
    PublishedRecipe(
        "vllm b200 tp8 pp2",
        {
            **_K3,
            "pipeline-parallel-size": 2,
            "max-model-len": 1048576,
            "enable-prompt-tokens-details": True,
            "enable-auto-tool-choice": True,
            "tool-call-parser": "kimi_k3",
            "reasoning-parser": "kimi_k3",
            "max-num-seqs": 32,
            "max-num-batched-tokens": 8192,
            "speculative-config": '{"model":"Inferact/Kimi-K3-DSpark","num_speculative_tokens":7,"method":"dspark"}',
            "compilation-config": '{"cudagraph_mode":"FULL_AND_PIECEWISE","cudagraph_capture_sizes":[8,16,24]}',
        },
        DRAFTS,
        {
            **FP8,
            "cp": 8,
            "tpa": 1,
            "ep": 1,
            "tokens_per_block": 1,
            "merge": "a2a",
            "pp": 2,
            "stage": 0,
            "pp_split": "middle",
            "max_batch_size": 32,
            "max_seq_len": 1048576,
        },
    ),
    PublishedRecipe(
        "vllm gb300 dcp8",
        {**_K3, "max-num-batched-tokens": 16384, "stream-interval": 10, "max-cudagraph-capture-size": 1024},
        {**FP8, "cp": 8, "tpa": 1, "ep": 1, "tokens_per_block": 1, "merge": "a2a", "pp": 1},
    ),
    PublishedRecipe(
        "vllm glm-5.3",
        {
            "model": "Inferact/GLM-5.3-NVFP4",
            "tensor-parallel-size": 4,
            "decode-context-parallel-size": 4,
            "dcp-comm-backend": "ag_rs",
            "kv-cache-dtype": "fp8_e4m3",
            "speculative-config": '{"method":"mtp","num_speculative_tokens":5}',
        },
        DRAFTS,
        {**FP8, "cp": 4, "tpa": 1, "ep": 1, "tokens_per_block": 1, "merge": "ag_rs"},
    ),
    PublishedRecipe(
        "vllm kimi-k3 dcp8",
        {
            "model": "moonshotai/Kimi-K3",
            "tensor-parallel-size": 8,
            "decode-context-parallel-size": 8,
            "dcp-comm-backend": "a2a",
            "attention-backend": "TOKENSPEED_MLA",
            "attention-config": _PREFILL,
        },
        {"cp": 8, "tpa": 1, "ep": 1, "tokens_per_block": 1, "merge": "a2a"},
    ),
    PublishedRecipe(
        "sglang kimi-k3",
        "--tp-size 8 --dcp-size 8 --disable-custom-all-reduce --mem-fraction-static 0.85",
        {"cp": 8, "tpa": 1, "ep": 1, "tokens_per_block": 1, "merge": "ag_rs", "q_proj": "gather"},
    ),
    PublishedRecipe(
        "sglang glm-5.3",
        "--tp-size 4 --ep-size 4 --dcp-size 4 --dcp-comm-backend a2a --dcp-replicate-q-proj",
        {"cp": 4, "tpa": 1, "ep": 4, "tokens_per_block": 1, "merge": "a2a", "q_proj": "replicate"},
    ),
    PublishedRecipe(
        "sglang glm-5.2 PD",
        "--tp-size 8 --dcp-size 8 --page-size 128 --mem-fraction-static 0.90 --speculative-algorithm EAGLE "
        "--speculative-num-steps 5 --speculative-eagle-topk 1 --kv-cache-dtype fp8_e4m3",
        DRAFTS,
        {**FP8, "cp": 8, "tpa": 1, "ep": 1, "tokens_per_block": 1, "merge": "ag_rs"},
    ),
    PublishedRecipe(
        "sglang kimi-k3 x32",
        "--tp-size 32 --ep-size 32 --enable-dp-attention --dp-size 4 --enable-dp-lm-head --dcp-size 8 "
        "--moe-a2a-backend megamoe --kv-cache-dtype fp8_e4m3",
        {**FP8, "cp": 8, "tpa": 1, "ep": 8, "tokens_per_block": 1, "merge": "ag_rs"},
    ),
    # lines of the engines' own documentation, and what people put around them
    PublishedRecipe(
        "vllm R1 in its image",
        'docker run --gpus all --env "HF_TOKEN=$HF_TOKEN" -p 8000:8000 --ipc=host vllm/vllm-openai:latest '
        "--model deepseek-ai/DeepSeek-R1 --tensor-parallel-size 8 --decode-context-parallel-size 4",
        {"cp": 4, "tpa": 2, "ep": 1},
    ),
    PublishedRecipe(
        "vllm V3 by its module",
        "python3 -m vllm.entrypoints.api_server --model deepseek-ai/DeepSeek-V3 -tp=8 --decode_context_parallel_size=2 "
        "--disable-log-requests --enable-auto-tool-choice --tool-call-parser deepseek_v3",
        {"cp": 2, "tpa": 4, "ep": 1},
    ),
    PublishedRecipe(
        "vllm kimi-k2-thinking",
        "vllm serve moonshotai/Kimi-K2-Thinking --trust-remote-code --tensor-parallel-size 8 -dcp 8 --enable-auto-tool-choice "
        "--max-num-batched-tokens 32768 --tool-call-parser kimi_k2 --reasoning-parser kimi_k2",
        {"cp": 8, "tpa": 1, "ep": 1, "tokens_per_block": 1, "merge": "ag_rs"},
    ),
    PublishedRecipe(
        "vllm glm-4.7-fp8",
        "vllm serve zai-org/GLM-4.7-FP8 --tensor-parallel-size 8 --speculative-config.method mtp "
        "--speculative-config.num_speculative_tokens 1 --tool-call-parser glm47 --reasoning-parser glm45",
        DRAFTS,
        {"cp": 1, "tpa": 8},
    ),
    PublishedRecipe(
        "vllm over ssh", "ssh node1 'vllm serve deepseek-ai/DeepSeek-R1 -tp 8 -dcp 8'", {"cp": 8, "tpa": 1, "ep": 1}
    ),
    PublishedRecipe(
        "vllm bench", "vllm bench throughput --model x -tp 4 -dcp 4", "`vllm bench`, which starts no server"
    ),
    PublishedRecipe(
        "Python of vllm", "LLM(model='x', tensor_parallel_size=8)", "got Python, expected a file of options"
    ),
    PublishedRecipe(
        "dynamo vllm",
        "python3 -m dynamo.vllm --model deepseek-ai/DeepSeek-R1 -tp 8 --decode-context-parallel-size 8 --is-decode-worker "
        "--connector nixl",
        {"cp": 8, "tpa": 1, "ep": 1},
    ),
    PublishedRecipe(
        "dynamo vllm of prompts",
        "python3 -m dynamo.vllm --model deepseek-ai/DeepSeek-R1 -tp 8 --is-prefill-worker",
        "Dynamo's worker of prompts, expected the recipe of the one that decodes",
    ),
    PublishedRecipe(
        "dynamo sglang",
        "python3 -m dynamo.sglang --model-path deepseek-ai/DeepSeek-R1 --tp 8 --dcp-size 4 --disaggregation-mode decode",
        {"cp": 4, "tpa": 2, "ep": 1},
    ),
    PublishedRecipe(
        "dynamo trtllm and its file",
        "python3 -m dynamo.trtllm --model-path $MODEL --extra-engine-args decode.yaml --disaggregation-mode decode",
        {"cp": 4, "tpa": 2, "ep": 4, "tokens_per_block": 32},
        files={
            "decode.yaml": "tensor_parallel_size: 2\ncontext_parallel_size: 4\nmoe_expert_parallel_size: 4\n"
            "cp_config: {cp_type: HELIX, tokens_per_block: 32}\nkv_cache_config: {tokens_per_block: 32}\n"
        },
    ),
    PublishedRecipe(
        "sglang by attention's context parallelism",
        "python3 -m sglang.launch_server --model deepseek-ai/DeepSeek-V3.2-Exp --tp 8 --attention-context-parallel-size 4",
        "attn_cp_size: got 4 (int), expected 1: this split is not supported; decode context parallelism is dcp_size",
    ),
    PublishedRecipe(
        "vllm behind a registry, prompts elsewhere",
        "podman run --device nvidia.com/gpu=all -p 8000:8000 example.io/mirror/vllm/vllm-openai:v0.33.0 --model deepseek-ai/DeepSeek-R1 "
        "-tp 8 -dcp 8 --block-size 64 --kv-transfer-config "
        """'{"kv_connector":"NixlConnector","kv_role":"kv_consumer"}' --max-num-active-seqs 64""",
        {"cp": 8, "tpa": 1, "ep": 1, "tokens_per_block": 64, "merge": "ag_rs"},
    ),
    PublishedRecipe(
        "sglang gb200",
        "SGLANG_NUM_RESERVED_DECODE_TOKENS=112 python3 -m sglang.launch_server --model-path deepseek-ai/DeepSeek-V3-0324 "
        "--disaggregation-mode decode --dist-init-addr ${HEAD}:5757 --nnodes 8 --node-rank 0 --tp-size 32 --attn-dp-size 4 --dcp-size 8 "
        "--max-running-requests 1024 --context-length 2176 --moe-a2a-backend deepep --prefill-round-robin-balance --deepep-mode "
        "low_latency --enable-dp-lm-head --cuda-graph-bs 1 2 4 8 --ep-dispatch-algorithm static",
        {
            "cp": 8,
            "tpa": 1,
            "ep": 8,
            "tokens_per_block": 1,
            "merge": "ag_rs",
            "q_proj": "gather",
            "max_batch_size": 256,
        },
    ),
    PublishedRecipe(
        "sglang with both kinds of replicas",
        "--tp-size 32 --attn-dp-size 4 --dp-size 2 --dcp-size 8",
        "attn_dp_size: got 4 (int), expected no such key with dp_size 2",
    ),
    PublishedRecipe(
        "trtllm wide ep, defaults written out",
        {
            "tensor_parallel_size": 2,
            "context_parallel_size": 4,
            "moe_expert_parallel_size": 8,
            "cp_config": {"cp_type": "HELIX", "tokens_per_block": 32},
            "moe_config": {"backend": "WIDEEP", "load_balancer": None, "max_num_tokens": None},
            "kv_cache_config": {
                "dtype": "fp8",
                "tokens_per_block": 32,
                "max_attention_window": None,
                "max_tokens": None,
            },
            "sparse_attention_config": {"algorithm": "dsa", "indexer_max_chunk_size": 32768, "index_topk": None},
            "stream_interval": 20,
        },
        {**FP8, "cp": 4, "tpa": 2, "ep": 8, "tokens_per_block": 32},
    ),
    PublishedRecipe(
        "trtllm-bench", "trtllm-bench --model X throughput --tp 8 --ep 8", "got `trtllm-bench`, which starts no server"
    ),
]
