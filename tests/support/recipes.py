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
    PublishedRecipe(
        "vllm R1 over two nodes",
        "vllm serve deepseek-ai/DeepSeek-R1 -tp 16 -dcp 16 --nnodes 2 --node-rank 0 --master-addr 10.0.0.1 --master-port 29501",
        {"cp": 16, "tpa": 1, "ep": 1, "tokens_per_block": 1, "merge": "ag_rs"},
    ),
    PublishedRecipe(
        "vllm kimi-k2 with heads over two",
        "vllm serve moonshotai/Kimi-K2-Instruct --trust-remote-code -tp 16 -dcp 8 --cp-kv-cache-interleave-size 16 "
        "--gpu-memory-utilization 0.95 --max-num-batched-tokens 8k --max-model-len 128k",
        {"cp": 8, "tpa": 2, "ep": 1, "tokens_per_block": 16, "max_seq_len": 128000},
    ),
    PublishedRecipe(
        "vllm of grouped queries",
        "vllm serve Qwen/Qwen3-235B-A22B --tensor-parallel-size 8 --decode-context-parallel-size 2 --enable-expert-parallel",
        {"cp": 2, "tpa": 4, "ep": 8},
    ),
    PublishedRecipe(
        "vllm over ray and two stages",
        "ray start --head\nvllm serve deepseek-ai/DeepSeek-V3 --distributed-executor-backend ray -pp 2 -tp 8 -dcp 8",
        {"cp": 8, "tpa": 1, "ep": 1, "pp": 2, "stage": 0, "pp_split": "middle"},
    ),
    PublishedRecipe(
        "vllm wide experts",
        "VLLM_ALL2ALL_BACKEND=deepep_low_latency VLLM_USE_DEEP_GEMM=1 vllm serve deepseek-ai/DeepSeek-R1 --tensor-parallel-size 1 "
        "--data-parallel-size 16 --data-parallel-size-local 8 --data-parallel-address 10.0.0.1 --data-parallel-rpc-port 13345 "
        "--enable-expert-parallel --api-server-count=8",
        {"cp": 1, "tpa": 1, "ep": 1},
    ),
    PublishedRecipe(
        "vllm R1 NVFP4",
        "export VLLM_USE_FLASHINFER_MOE_FP4=1\nvllm serve nvidia/DeepSeek-R1-FP4-v2 --kv-cache-dtype fp8 -tp 4 -dcp 4 "
        "--dcp-comm-backend a2a --async-scheduling --max-num-batched-tokens 8192 --no-enable-prefix-caching",
        {**FP8, "cp": 4, "tpa": 1, "ep": 1, "merge": "a2a"},
    ),
    PublishedRecipe(
        "vllm R1 NVFP4 with its format",
        "vllm serve nvidia/DeepSeek-R1-0528-FP4 --quantization modelopt_fp4 --kv-cache-dtype fp8 -tp 8 --dtype bfloat16",
        "a checkpoint says itself how its weights are quantised",
        {**FP8, "cp": 1, "tpa": 8, "ep": 1},
    ),
    PublishedRecipe(
        "vllm layers of an FP8 cache",
        "vllm serve openai/gpt-oss-120b -tp 4 -dcp 2 --kv-cache-dtype fp8 --kv-cache-dtype-skip-layers sliding_window",
        "every layer's cache is in what cache_dtype says",
        {**FP8, "cp": 2, "tpa": 2, "ep": 1},
    ),
    PublishedRecipe(
        "vllm on another accelerator",
        "vllm serve vllm-ascend/DeepSeek-V3.1-W8A8 --host 0.0.0.0 --port 8004 --decode-context-parallel-size 8 "
        "--prefill-context-parallel-size 2 --tensor-parallel-size 8 --enable-expert-parallel --quantization ascend "
        '--additional-config \'{"ascend_scheduler_config":{"enabled":false}}\'',
        "prefill_context_parallel_size: got 2 (int), expected 1",
    ),
    PublishedRecipe(
        "vllm in a cluster",
        {"apiVersion": "leaderworkerset.x-k8s.io/v1", "kind": "LeaderWorkerSet", "spec": {"replicas": 1}},
        "got a file of Kubernetes, expected the options of an engine",
    ),
    PublishedRecipe(
        "sglang V3 over two nodes",
        "python3 -m sglang.launch_server --model-path deepseek-ai/DeepSeek-V3 --tp 16 --dist-init-addr 10.0.0.1:5000 --nnodes 2 "
        "--node-rank 0 --trust-remote-code",
        {"cp": 1, "tpa": 16, "ep": 1},
    ),
    PublishedRecipe(
        "sglang V3 with replicas of attention",
        "python3 -m sglang.launch_server --model-path deepseek-ai/DeepSeek-V3 --tp 8 --dp-size 8 --enable-dp-attention "
        "--trust-remote-code",
        {"cp": 1, "tpa": 1, "ep": 1},
    ),
    PublishedRecipe(
        "sglang decode of 72",
        "python3 -m sglang.launch_server --model-path /models/DeepSeek-V3-0324 --disaggregation-ib-device mlx5_1 "
        "--disaggregation-mode decode --dist-init-addr 10.0.0.1:5757 --nnodes 9 --node-rank 0 --tp-size 72 --dp-size 72 "
        "--enable-dp-attention --decode-log-interval 1 --enable-deepep-moe --page-size 1 --host 0.0.0.0 --trust-remote-code "
        "--moe-dense-tp-size 1 --enable-dp-lm-head --disable-radix-cache --watchdog-timeout 1000000 --enable-two-batch-overlap "
        "--deepep-mode low_latency --mem-fraction-static 0.835 --max-running-requests 18432 --context-length 4500 "
        "--ep-num-redundant-experts 32 --cuda-graph-bs 256",
        "an expert lies once, on the rank that the plan says",
        {"cp": 1, "tpa": 1, "ep": 1, "max_batch_size": 256, "max_seq_len": 4500},
    ),
    PublishedRecipe(
        "sglang V3 with an older FP8 cache",
        "python3 -m sglang.launch_server --model deepseek-ai/DeepSeek-V3-0324 --tp 8 --kv-cache-dtype fp8_e5m2 "
        "--enable-torch-compile --torch-compile-max-bs 8",
        "kv_cache_dtype: got 'fp8_e5m2' (str), expected 'auto'",
        {"cp": 1, "tpa": 8, "cache_dtype": "auto"},
    ),
    PublishedRecipe(
        "sglang and its file",
        "python -m sglang.launch_server --config config.yaml --mem-fraction-static 0.9",
        {"cp": 8, "tpa": 1, "ep": 8, "merge": "a2a", "q_proj": "replicate"},
        files={
            "config.yaml": "model-path: deepseek-ai/DeepSeek-R1\ntp-size: 8\ndcp-size: 8\nep-size: 8\ndcp-comm-backend: a2a\n"
            "dcp-replicate-q-proj: true\nhost: 0.0.0.0\nlog-requests: true\n"
        },
    ),
    PublishedRecipe(
        "sglang with weights quantised on the way",
        "python3 -m sglang.launch_server --model-path deepseek-ai/DeepSeek-V2-Lite --torchao-config int4wo-128 --port 30000",
        "torchao_config: got 'int4wo-128', expected no such key: a checkpoint says itself",
        {"cp": 1, "tpa": 1},
    ),
    PublishedRecipe(
        "trtllm R1 for few users",
        "trtllm-serve nvidia/DeepSeek-R1-FP4 --backend pytorch --max_batch_size 4 --tp_size 8 --ep_size 2 --pp_size 1 "
        "--max_num_tokens 32768 --trust_remote_code --extra_llm_api_options extra.yml",
        DRAFTS,
        {"cp": 1, "tpa": 8, "ep": 2, "max_batch_size": 4},
        files={
            "extra.yml": "moe_config: {backend: TRTLLM}\nspeculative_config: {decoding_type: MTP, num_nextn_predict_layers: 3}\n"
        },
    ),
    PublishedRecipe(
        "trtllm R1 for many users",
        {
            "backend": "pytorch",
            "tensor_parallel_size": 8,
            "moe_expert_parallel_size": 8,
            "enable_attention_dp": True,
            "attention_dp_config": {"batching_wait_iters": 0, "enable_balance": True, "timeout_iters": 60},
            "cuda_graph_config": {"enable_padding": True, "batch_sizes": [1, 2, 4, 8, 128]},
            "kv_cache_config": {"dtype": "fp8", "free_gpu_memory_fraction": 0.85, "enable_block_reuse": False},
            "max_batch_size": 128,
            "print_iter_log": True,
            "stream_interval": 10,
        },
        {**FP8, "cp": 1, "tpa": 1, "ep": 1, "max_batch_size": 128},
    ),
    PublishedRecipe(
        "trtllm Helix with experts apart",
        {
            "tensor_parallel_size": 2,
            "context_parallel_size": 8,
            "moe_expert_parallel_size": 4,
            "cp_config": {"cp_type": "HELIX", "tokens_per_block": 32, "use_nccl_for_alltoall": True},
            "kv_cache_config": {"tokens_per_block": 32, "dtype": "fp8"},
            "moe_config": {"backend": "CUTLASS"},
            "disable_overlap_scheduler": True,
        },
        {**FP8, "cp": 8, "tpa": 2, "ep": 4, "tokens_per_block": 32},
    ),
]
